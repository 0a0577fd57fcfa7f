"""The parts of few requests, added up by a program of its own: each element has one thread, which reads six parts at once.

In the kernel that made them workers read one after the other (`decode_schedule.merge`): many requests, of whom hardly any has parts, need
no second launch for that. One of 1,101 tokens, 16 heads, on an H200: 15.2 us with that, and 6.5 and 3.1 here.
Letters: B requests, W workers, P = W + B places, M rows, C latent dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_schedule import Schedule
from pallas_kernels.hopper import PARAMS
from pallas_kernels.lanes import THREADS, full, gather, iota, pack_bfloat16, scatter

FEW = 16  # requests, at most; where the two ways are level has not been measured
LOWEST = -1e30  # the logarithm of no sum: finite, so that differences are numbers
ROWS, LATENTS = 16, 32  # of a program
AT_ONCE = 6  # parts whose reads a thread has under way


ONE = 0x3F800000  # as float32's bits: vectors of one number are int32


def number(word):
    return lax.bitcast_convert_type(word, jnp.float32)


def place_of(piece, worker, workers: int):
    """Where a part lies: the first ones behind those of the workers, of whom each has one other part at most."""
    return jnp.where(piece.part == 0, workers + piece.request, worker)


@jax.jit  # lowered once a shape
def add_parts(parts_PCM: jax.Array, lse_PM: jax.Array, schedule: Schedule) -> jax.Array:
    """The sum of each request's parts, weighted by their shares of the softmax: bfloat16 [B, M, C]. Zero where no part has seen a token.

    Args:
        parts_PCM: float32; each part by itself normalised, zero where it has seen no token.
        lse_PM: float32, the binary logarithms of the parts' sums.
    """
    batch, (places, latent, rows) = len(schedule.blocks_B), parts_PCM.shape
    passes = LATENTS // 2 * ROWS // THREADS

    def body(parts_gmem, lse_gmem, first_gmem, cuts_gmem, out_gmem):
        request, thread = lax.axis_index("request"), iota(THREADS)
        row = lax.axis_index("rows") * ROWS + (thread & (ROWS - 1))
        pair = lax.axis_index("latents") * (LATENTS // 2) + lax.div(thread, full(thread, ROWS))
        pairs = [pair + n * (THREADS // ROWS) for n in range(passes)]  # of latents, and with ROWS rows each
        elements = [(2 * pair + k) * rows + row for pair in pairs for k in range(2)]

        def read(place):
            """What a place has of the thread's row and elements; nothing of place -1."""
            here = place >= 0
            lse = number(gather(lse_gmem, jnp.where(here, place * rows + row, -1)))
            values = [number(gather(parts_gmem, jnp.where(here, place * (latent * rows) + i, -1))) for i in elements]
            return jnp.where(here, jnp.maximum(lse, LOWEST), LOWEST), [jnp.where(here, x, 0.0) for x in values]

        def add(step, carry):
            highest, total, *sums = carry
            index = [full(thread, 0) + (step * AT_ONCE + k) for k in range(AT_ONCE)]
            parts = [read(jnp.where(i < cuts, first + i, -1)) for i in index]
            new = functools.reduce(jnp.maximum, [lse for lse, _ in parts], highest)
            decay = jnp.exp2(highest - new)
            total, sums = total * decay, [x * decay for x in sums]
            for lse, values in parts:
                weight = jnp.exp2(lse - new)  # that of nothing counts only where there is nothing else, and adds zeros then
                total, sums = total + weight, [x + weight * value for x, value in zip(sums, values)]
            return new, total, *sums

        first, cuts = first_gmem[request], cuts_gmem[request]
        lse, values = read(full(thread, places - batch) + request)
        carry = lse, number(full(thread, ONE)), *values
        _, total, *sums = lax.fori_loop(0, lax.div(cuts + (AT_ONCE - 1), jnp.int32(AT_ONCE)), add, carry)
        for pair, low, high in zip(pairs, sums[::2], sums[1::2]):
            place = (request * rows + row) * (latent // 2) + pair
            scatter(out_gmem, place, pack_bfloat16(low / total, high / total))

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((batch * rows * latent // 2,), jnp.int32),
        grid=(batch, rows // ROWS, latent // LATENTS),
        grid_names=("request", "rows", "latents"),
        kernel_name="add_parts",
        compiler_params=PARAMS,
    )
    words = kernel(parts_PCM.reshape(-1), lse_PM.reshape(-1), schedule.first_B, schedule.cuts_B)
    return lax.bitcast_convert_type(words.reshape(batch, rows, latent // 2), jnp.bfloat16).reshape(batch, rows, latent)
