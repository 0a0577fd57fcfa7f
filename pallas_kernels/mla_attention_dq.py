"""Gradient of attention's queries, dQ = dS K, on Hopper in Pallas Mosaic GPU; see mla_attention_backward.py.

A program makes 256 rows of one head, 128 a warpgroup, from blocks of 64 keys and of the dS^T that mla_attention_dkv.py left.
Letters: see mla_attention_backward.py.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PARAMS, registers, swizzled
from pallas_kernels.mla_attention_dkv import first_tile
from pallas_kernels.mla_attention_forward import HALF, NOPE, ROPE

STAGES = 4  # of 56 KiB
ROWS = 8  # of a tile of shared memory, whose columns alone TMA can write
WIDTH = 4  # heads whose programs run side by side, so that those of one head meet its keys in L2


def dq(chunk, back_BK, ds_XRWKQ, k_nope_BTNH, k_rope_BTR, gradients: tuple, *, scale: float) -> None:
    """Computes dQ of a chunk of heads, into references.

    Args:
        chunk: int32 [1]; heads, and so chunks, count on from row to row of the batch.
        back_BK: for each block of queries the number of blocks of keys, from the diagonal back, that they may see.
        ds_XRWKQ: of the chunk's heads, see `mla_attention_dkv.dkv`.
        gradients: dq_nope_BTNH and dq_rope_BTNR.
    """
    blocks = back_BK.shape[1]
    pairs = blocks // 2
    plgpu.kernel(
        functools.partial(_program, pairs=pairs, blocks=blocks, scale=scale),
        out_type=(),
        grid=(ds_XRWKQ.shape[0] * pairs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_attention_dq",
        compiler_params=PARAMS,
        scratch_types={"shared": _shared()},
    )(chunk, back_BK, ds_XRWKQ, k_nope_BTNH, k_rope_BTR, *gradients)


class _Shared(NamedTuple):
    """Shared memory and barriers. `full`: TMA has written; `free`: read by both warpgroups."""

    k: Any
    ds: Any  # [stages, warpgroups, queries' halves, keys, queries]
    k_full: Any
    ds_full: Any  # a stage has one for each warpgroup
    free: Any


def _shared() -> _Shared:
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzled(jnp.bfloat16))
    return _Shared(
        k=smem((STAGES, HALF, NOPE + ROPE)),
        ds=smem((STAGES, 2, 2, HALF, HALF)),
        k_full=plgpu.Barrier(num_arrivals=2 * HALF // ROWS, num_barriers=STAGES),
        ds_full=plgpu.Barrier(num_barriers=2 * STAGES),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
    )


def _program(
    chunk_gmem,
    back_gmem,
    ds_gmem,
    k_nope_gmem,
    k_rope_gmem,
    dq_nope_gmem,
    dq_rope_gmem,
    *,
    pairs: int,
    blocks: int,
    scale: float,
    shared: _Shared,
):
    """The third warpgroup feeds, the others compute. Steps are of 64 keys."""
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    band = lax.div(program, jnp.int32(WIDTH * pairs))
    width = lax.min(jnp.int32(WIDTH), ds_gmem.shape[0] - band * WIDTH)  # the last band may have fewer heads
    place = program - band * (WIDTH * pairs)
    pair = pairs - 1 - lax.div(place, width)  # those that see most keys come first
    rank = band * WIDTH + lax.rem(place, width)
    heads = jnp.int32(k_nope_gmem.shape[2])
    place = chunk_gmem[0] * ds_gmem.shape[0] + rank
    row, head = lax.div(place, heads), lax.rem(place, heads)
    ends = 4 * pair + 2, 4 * pair + 4
    starts = tuple(end - 2 * back_gmem[row, 2 * pair + k] for k, end in enumerate(ends))

    def slot(step):
        return lax.rem(step - starts[0], jnp.int32(STAGES))

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")

        @pl.loop(starts[0], ends[1])
        def _(step):
            now = slot(step)
            pl.when(step >= starts[0] + STAGES)(lambda: plgpu.barrier_wait(shared.free.at[now]))
            for begin in range(0, HALF, ROWS):  # nope and rope side by side, so that one wgmma takes both
                keys, rows = pl.ds(step * HALF + begin, ROWS), pl.ds(begin, ROWS)
                nope, rope = shared.k.at[now, rows, pl.ds(0, NOPE)], shared.k.at[now, rows, pl.ds(NOPE, ROPE)]
                plgpu.copy_gmem_to_smem(k_nope_gmem.at[row, keys, head], nope, shared.k_full.at[now])
                plgpu.copy_gmem_to_smem(k_rope_gmem.at[row, keys], rope, shared.k_full.at[now])
            key_block, half = lax.div(step, jnp.int32(2)), lax.rem(step, jnp.int32(2))
            for mine in range(2):

                @pl.when((step >= starts[mine]) & (step < ends[mine]))
                def _():
                    tile = first_tile(key_block, blocks) + 4 * pair + 2 * mine - 2 * key_block
                    ds = ds_gmem.at[rank, pl.ds(tile, 2), half]
                    plgpu.copy_gmem_to_smem(ds, shared.ds.at[now, mine], shared.ds_full.at[2 * now + mine])

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(registers(2), action="increase")
        mine = warpgroup
        start, end = (jnp.where(mine == 0, *bounds) for bounds in (starts, ends))

        @pl.loop(starts[0], start)
        def _(step):  # keys of which only the other warpgroup's queries see some
            plgpu.barrier_wait(shared.k_full.at[slot(step)])
            plgpu.barrier_arrive(shared.free.at[slot(step)])

        def run(*accumulators):
            def multiply(step, halves):
                now = slot(step)
                plgpu.barrier_wait(shared.k_full.at[now])
                plgpu.barrier_wait(shared.ds_full.at[2 * now + mine])
                for half in halves:
                    plgpu.wgmma(accumulators[half], shared.ds.at[now, mine, half].transpose((1, 0)), shared.k.at[now])

            @pl.loop(start, end - 1)
            def _(step):
                multiply(step, (0, 1))
                plgpu.wgmma_wait(2)  # those of the step before are done
                pl.when(step > start)(lambda: plgpu.barrier_arrive(shared.free.at[slot(step - 1)]))

            multiply(end - 1, (1,))  # the other queries come before the last keys
            return [acc[...] for acc in accumulators]  # the room of the last steps is not asked for again

        gradients = pl.run_scoped(run, *[plgpu.ACC((HALF, NOPE + ROPE), jnp.float32) for _ in range(2)])

        for half in range(2):  # dQ leaves through dS's room, of which this warpgroup uses its own
            at = pl.ds((4 * pair + 2 * mine + half) * HALF, HALF)
            for third in range(3):
                columns = third * HALF
                shared.ds[third, mine, half] = (gradients[half][:, columns : columns + HALF] * scale).astype(jnp.bfloat16)
                plgpu.commit_smem()
                gmem = dq_nope_gmem.at[row, at, head, pl.ds(columns, HALF)] if columns < NOPE else dq_rope_gmem.at[row, at, head]
                plgpu.copy_smem_to_gmem(shared.ds.at[third, mine, half], gmem)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
