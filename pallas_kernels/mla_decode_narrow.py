"""Absorbed decode on Hopper, bfloat16, for requests of fewer than 64 rows: bound by memory.

Sixteen rows would be padded to the 64 that a wgmma takes on its left. So the products are transposed, S^T = K Q^T and
O^T = V^T P^T, with tokens and latents on the left and the rows as the columns. Each of two warpgroups computes all the scores and
one half of the outputs' latents: the tensor cores have time for that, and the warpgroups need nothing of each other. What shared
memory queries do not take holds blocks on their way. Measured beside FlashMLA on an H200 (16 heads): 1.01 at 128 requests
of 4096 tokens (3.9 TB/s), 1.06 at 256 (4.1 TB/s), and 1.09 and 1.03 at 128 of mixed length. Looking up a page's number before its place
is free took 1 to 2% more time, with an L2 prefetch of its rope keys 2 to 5%, one wait for all parts that are added 0 to 2%.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decode_parts
from pallas_kernels.decode_schedule import BLOCK, Piece, Schedule, merge, pieces
from pallas_kernels.hopper import COL, PARAMS, WGMMA, registers, spread, swizzled

LOG2E = 1.4426950408889634
LATENT, ROPE = 512, 64
HALF = LATENT // 2
LOWEST = -1e30  # running maximum of a row that has seen nothing: finite, so that differences are numbers


def decode(q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP, schedule: Schedule, *, scale: float, num_heads: int):
    """What `mla_decode_hopper.decode` computes, for M = 16, 32 or 48."""
    batch, rows, _ = q_latent_BMC.shape
    workers, tokens, table_pages = len(schedule.request_W1) - 1, positions_BT.shape[1], table_BP.shape[1]
    dtype = q_latent_BMC.dtype
    few = batch <= decode_parts.FEW  # their parts are added by another program
    places = workers + batch if few else workers  # of parts
    stages = 3 if rows == 16 else 2
    unit = scale * LOG2E
    column_max, column_sum = (_column_reduction(op, rows) for op in ("max", "add"))

    def body(q_gmem, q_rope_gmem, positions_gmem, k_gmem, k_rope_gmem, table_gmem, *refs):
        schedule_gmem, (o_gmem, partial_gmem, lse_gmem), smem = Schedule(*refs[:6]), refs[6:9], refs[9:]
        q_smem, q_rope_smem, k_smem, k_rope_smem, p_smem, scratch_smem, *barriers = smem
        q_full, q_free, k_full, k_free, rope_full, rope_free = barriers
        own = lax.axis_index("warpgroup")
        worker = workers - 1 - lax.axis_index("worker")  # see `merge`
        partial_ready = None if few else pl.get_global(plgpu.SemaphoreType.REGULAR((workers, 2)))
        half = pl.ds(own * HALF, HALF)

        def load_latents():
            def load_piece(piece: Piece, loaded):
                def load_block(block, loaded):
                    stage = lax.rem(loaded, jnp.int32(stages))
                    pl.when(loaded >= stages)(lambda: plgpu.barrier_wait(k_free.at[stage]))
                    plgpu.copy_gmem_to_smem(k_gmem.at[page_of(piece, block)], k_smem.at[stage], k_full.at[stage])
                    return loaded + 1

                return lax.fori_loop(piece.begin, last(piece), load_block, loaded)

            loaded = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            for stage in range(stages):
                pl.when(loaded > stage)(lambda stage=stage: plgpu.barrier_wait(k_free.at[stage]))

        def load_queries_and_rope():
            def load_piece(piece: Piece, loaded):
                def load_block(block, loaded):
                    pl.when(loaded > 0)(lambda: plgpu.barrier_wait(rope_free))
                    plgpu.copy_gmem_to_smem(k_rope_gmem.at[page_of(piece, block)], k_rope_smem, rope_full)
                    return loaded + 1

                pl.when(loaded > 0)(lambda: plgpu.barrier_wait(q_free))
                plgpu.copy_gmem_to_smem(q_gmem.at[piece.request], q_smem.at[0], q_full)
                plgpu.copy_gmem_to_smem(q_rope_gmem.at[piece.request], q_rope_smem.at[0], q_full)
                return lax.fori_loop(piece.begin, last(piece), load_block, loaded)

            loaded = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(q_free))
            pl.when(loaded > 0)(lambda: plgpu.barrier_wait(rope_free))

        def page_of(piece: Piece, block):
            page = table_gmem[piece.request, jnp.minimum(block, table_pages - 1)]
            return jnp.where(block < piece.end, page, 0)  # a request of no blocks takes one, wholly masked

        def last(piece: Piece):
            return jnp.maximum(piece.end, piece.begin + 1)

        def masked(scores, request, block, end):
            column = plgpu.broadcasted_iota(jnp.int32, (BLOCK, rows), 1, layout=WGMMA)
            limit = column - column + positions_gmem[request, 0]
            for t in range(1, tokens):
                limit = jnp.where(column >= t * num_heads, positions_gmem[request, t], limit)
            token = plgpu.broadcasted_iota(jnp.int32, (BLOCK, rows), 0, layout=WGMMA) + block * BLOCK
            return jnp.where(token <= jnp.minimum(limit, end * BLOCK - 1), scores, -jnp.inf)

        def attend(piece: Piece, done):
            plgpu.barrier_wait(q_full)
            opened = jnp.minimum(schedule_gmem.open_B[piece.request], piece.end)

            def attend_block(block, carry):
                acc, m, total, done = carry
                stage = lax.rem(done, jnp.int32(stages))
                zero, here = lax.optimization_barrier(
                    (jnp.int32(0), own)
                )  # addresses made in the loop: they would fill registers

                def score(acc_ref):
                    plgpu.barrier_wait(k_full.at[stage])
                    plgpu.wgmma(acc_ref, k_smem.at[stage], q_smem.at[zero].transpose((1, 0)))
                    plgpu.barrier_wait(rope_full)
                    plgpu.wgmma(acc_ref, k_rope_smem, q_rope_smem.at[zero].transpose((1, 0)))
                    return acc_ref[...]

                scores = pl.run_scoped(score, plgpu.ACC((BLOCK, rows), jnp.float32))
                plgpu.barrier_arrive(rope_free)
                pl.when(block == last(piece) - 1)(lambda: plgpu.barrier_arrive(q_free))
                scores = lax.cond(block >= opened, lambda s: masked(s, piece.request, block, piece.end), lambda s: s, scores)
                highest = jnp.maximum(m, column_max(scores, scratch_smem.at[here]) * unit)
                p = jnp.exp2(scores * unit - spread(highest, scores.shape, 1))
                p_smem.at[here].transpose((1, 0))[...] = p.astype(dtype)
                plgpu.commit_smem()
                decay = jnp.exp2(m - highest)
                total = total * spread(decay, p.shape, 1) + p

                def multiply(acc_ref):
                    values = k_smem.at[stage, :, pl.ds(here * HALF, HALF)].transpose((1, 0))
                    plgpu.wgmma(acc_ref, values, p_smem.at[here].transpose((1, 0)))

                acc = pl.run_state(multiply)(plgpu.ACC.init(acc * spread(decay, acc.shape, 1)))
                plgpu.barrier_arrive(k_free.at[stage])
                return acc, highest, total, done + 1

            acc = plgpu.layout_cast(jnp.zeros((HALF, rows), jnp.float32), WGMMA)
            m = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), COL)
            total = plgpu.layout_cast(jnp.zeros((BLOCK, rows), jnp.float32), WGMMA)
            acc, m, total, done = lax.fori_loop(piece.begin, last(piece), attend_block, (acc, m, total, done))
            finish(piece, acc, m, column_sum(total, scratch_smem.at[own]))
            return done

        def normalised(acc, total):
            return acc * spread(jnp.where(total > 0, 1 / total, 0.0), acc.shape, 1)

        def write_part(out, m, total, place):
            partial_gmem[place, half] = out
            lse_gmem[own, place] = m + jnp.log2(total)

        def finish(piece: Piece, acc, m, total):
            """Adds the results of later parts of the request, and writes the sum: the output, or what an earlier part will add.

            Of few requests every part is written as it is.
            """
            if few:
                return write_part(normalised(acc, total), m, total, decode_parts.place_of(piece, worker, workers))

            def add(offset, carry):
                acc, m, total = carry
                plgpu.semaphore_wait(partial_ready.at[worker + offset, own], memory_scope="gpu")
                lse = plgpu.load(lse_gmem.at[own, worker + offset], layout=COL, optimized=False)
                part = plgpu.load(partial_gmem.at[worker + offset, half], layout=WGMMA, optimized=False)
                highest = jnp.maximum(m, lse)
                decay, weight = jnp.exp2(m - highest), jnp.exp2(lse - highest)
                acc = acc * spread(decay, acc.shape, 1) + part * spread(weight, acc.shape, 1)
                return acc, highest, total * decay + weight

            acc, m, total = merge(piece, add, (acc, m, total))
            out = normalised(acc, total)

            @pl.when(piece.part == 0)
            def _():
                for start in range(0, HALF, BLOCK):
                    p_smem.at[own].transpose((1, 0))[...] = out[start : start + BLOCK].astype(dtype)
                    plgpu.commit_smem()
                    columns = pl.ds(own * HALF + start, BLOCK)
                    plgpu.copy_smem_to_gmem(p_smem.at[own], o_gmem.at[piece.request, :, columns])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(piece.part > 0)
            def _():
                write_part(out, m, total, worker)
                plgpu.commit_smem()  # all threads have written
                plgpu.semaphore_signal(partial_ready.at[worker, own], memory_scope="gpu")

        @pl.when(own < 2)
        def _():
            plgpu.set_max_registers(registers(2), action="increase")
            pieces(schedule_gmem, worker, attend, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(own == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp):  # two warps, so that latents need not wait until queries or rope keys can be loaded
                pl.when(warp == 0)(load_latents)
                pl.when(warp == 1)(load_queries_and_rope)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, LATENT), dtype),  # not written of few requests
            jax.ShapeDtypeStruct((places, LATENT, rows), jnp.float32),
            jax.ShapeDtypeStruct((2, places, rows), jnp.float32),
        ),
        grid=(workers,),
        grid_names=("worker",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((1, rows, LATENT), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((1, rows, ROPE), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((stages, BLOCK, LATENT), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((BLOCK, ROPE), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((2, rows, BLOCK), dtype, transforms=swizzled(dtype)),  # probabilities
            plgpu.SMEM((2, 16 * rows), jnp.float32),  # reductions across warps
            plgpu.Barrier(num_arrivals=2),  # queries full
            plgpu.Barrier(num_arrivals=2),  # queries free
            plgpu.Barrier(num_barriers=stages),  # latents full
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),  # latents free
            plgpu.Barrier(),  # rope keys full
            plgpu.Barrier(num_arrivals=2),  # rope keys free
        ],
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=0),
    )
    out_BMC, parts_PCM, lse = kernel(q_latent_BMC, q_rope_BMR, positions_BT, pages.latent, pages.rope, table_BP, *schedule)
    return decode_parts.add_parts(parts_PCM, lse[0], schedule) if few else out_BMC


@functools.cache
def _column_reduction(op: str, columns: int):
    """Over all four warps, through shared memory of the warpgroup's own: jnp's reductions of two warpgroups would share theirs."""

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=COL)
    )
    def reduce(_, x: mgpu.FragmentedArray, scratch):
        return x.reduce(op, 0, scratch)

    return reduce
