"""The order of few pairs by expert on Hopper, in one launch of one program: a decode step waits for it in every layer.

Each expert has a bit for each token, in shared memory. Its size is the number of its bits, a pair's place among its expert's the
number of those of earlier tokens, or its token's number, where tokens keep their places. A thread has some pairs, from the reading of
their ids to the writing of their rows and weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PARAMS, vary_like
from pallas_kernels.lanes import THREADS, count_bits, full, gather, iota, scatter, scatter_or

WARPGROUPS = 8  # of the program, at most


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))  # lowered once a shape
def expert_order(
    ids_NK: jax.Array, weights_NK: jax.Array, experts: int, unit: int, rows: int, places_kept: bool
) -> tuple[jax.Array, ...]:
    """pair_M, row_NK, weight_M, sizes_E and starts_E of `expert_order.expert_order`."""
    (tokens, choices), pairs = ids_NK.shape, ids_NK.size
    masks = pl.cdiv(tokens, 32)  # words of an expert's bits
    warpgroups = min(pl.cdiv(pairs, THREADS), WARPGROUPS)

    def body(
        ids_gmem, weights_gmem, pair_gmem, row_gmem, weight_gmem, size_gmem, start_gmem, bits_smem, padded_smem, start_smem, met
    ):
        own = lax.axis_index("warpgroup")

        def indices(size, first=0, among=1):
            """One of `among` equal parts, in whole vectors of 128, of what covers 0 .. size - 1."""
            part = pl.cdiv(size, THREADS * among) * THREADS
            return iota(part) + first * part

        def fill(x_ref, value):
            index = indices(x_ref.shape[0], own, warpgroups)
            scatter(x_ref, index, full(index, value))

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(met)
            plgpu.barrier_wait(met)

        pair = indices(pairs, own, warpgroups)
        expert, weight = gather(ids_gmem, pair), gather(weights_gmem, pair)
        token = lax.div(pair, jnp.full_like(pair, choices))
        mask, bit = token >> 5, jnp.left_shift(1, token & 31)
        here = (expert >= 0) & (expert < experts)
        fill(bits_smem, 0)
        fill(pair_gmem, pairs)
        fill(weight_gmem, 0)
        meet()
        scatter_or(bits_smem, jnp.where(here, mask * experts + expert, -1), bit)
        meet()

        @pl.when(own == 0)
        def _():
            index = indices(experts)
            size = sum(count_bits(gather(bits_smem, index + m * experts)) for m in range(masks))
            if places_kept:
                size = jnp.where(size > 0, full(index, unit), 0)
            scatter(size_gmem, index, size)
            scatter(padded_smem, index, lax.div(size + (unit - 1), jnp.full_like(size, unit)) * unit)
            plgpu.commit_smem()
            start = full(index, 0)
            for e in range(experts):
                start += jnp.where(index > e, padded_smem[e], 0)
            scatter(start_smem, index, start)
            scatter(start_gmem, index, start)

        place = token if places_kept else full(expert, 0)
        for m in range(0 if places_kept else masks):
            counted = jnp.where(mask == m, bit - 1, jnp.where(mask > m, -1, 0))
            place += count_bits(gather(bits_smem, expert + m * experts) & counted)
        meet()
        row = jnp.where(here, gather(start_smem, expert) + place, rows)
        scatter(row_gmem, pair, row)
        scatter(pair_gmem, row, pair)
        scatter(weight_gmem, row, weight)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in (rows, pairs, rows, experts, experts)],
        grid=(1,),
        grid_names=("program",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="expert_order",
        scratch_types=[
            plgpu.SMEM((masks * experts,), jnp.int32),  # bits of 32 tokens for each expert, then of the next 32
            plgpu.SMEM((experts,), jnp.int32),
            plgpu.SMEM((experts,), jnp.int32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        compiler_params=PARAMS,
    )
    weights_P = lax.bitcast_convert_type(weights_NK.reshape(-1), jnp.int32)
    pair_M, row_P, weight_M, sizes_E, starts_E = vary_like(ids_NK, kernel(ids_NK.reshape(-1), weights_P))
    return pair_M, row_P.reshape(ids_NK.shape), lax.bitcast_convert_type(weight_M, jnp.float32), sizes_E, starts_E
