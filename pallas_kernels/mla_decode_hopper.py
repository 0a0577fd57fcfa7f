"""Absorbed decode on Hopper, bfloat16, for tiles of 64 rows: bound by the tensor cores, and at 128 heads by the power limit.

A tile needs the whole register file for its output [64, 512], so that no second tile can hide the softmax of the first. Instead
two warpgroups hold one half of the latent columns each and take turns on pairs of blocks of 64 tokens, like FlashMLA's dense
kernel: warpgroup 0 scores the even block, warpgroup 1 the odd one, each gives its probabilities to the other through shared
memory, and each multiplies both blocks' with its own columns. While one computes a softmax, products of the other run. Shared
memory holds the queries and one pair: half a block is loaded again as soon as the products with it are done.

Outputs are rescaled only when a running maximum has risen by more than LAZY steps, mostly once in a request. Measured beside
FlashMLA on an H200 at its power limit (128 heads; medians of 5 pairs): 1.09-1.10 at 128 requests of 4096 tokens (1.03-1.07
rescaling always), 1.06 at 64 of 8192, 1.17 at 128 of mixed length.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf, vector

from pallas_kernels.decode_schedule import BLOCK, ROWS, Piece, Schedule, merge, pieces
from pallas_kernels.hopper import PARAMS, ROW, WGMMA, registers, spread, swizzled

LOG2E = 1.4426950408889634
LATENT, ROPE = 512, 64
HALF = LATENT // 2
CHUNKS, WIDTH = 2, 256  # of a block's latents: what is loaded and freed at once
LAZY = 8.0  # probabilities may reach 2 ** LAZY before a running maximum follows: no loss in bfloat16 or float32
LOWEST = -1e30  # running maximum of a row that has seen nothing: finite, so that differences are numbers


def decode(q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP, schedule: Schedule, *, scale: float, num_heads: int):
    """Attends with M rows of each request, a multiple of 64.

    Returns:
        [B, M, C] in the queries' dtype.
    """
    batch, rows, _ = q_latent_BMC.shape
    tiles, workers = rows // ROWS, len(schedule.request_W1) - 1
    tokens, table_pages = positions_BT.shape[1], table_BP.shape[1]
    dtype = q_latent_BMC.dtype

    def body(q_gmem, q_rope_gmem, positions_gmem, k_gmem, k_rope_gmem, table_gmem, *refs):
        schedule_gmem, (o_gmem, partial_gmem, lse_gmem), smem = Schedule(*refs[:6]), refs[6:9], refs[9:]
        q_smem, k_smem, k_rope_smem, p_smem, stats_smem, *barriers = smem
        q_full, q_free, k_full, k_free, p_ready, sum_ready = barriers
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        worker = workers - 1 - lax.axis_index("worker")  # see `merge`
        partial_ready = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles, workers, 2)))
        tile_rows = pl.ds(tile * ROWS, ROWS)

        def load_queries():
            def load_piece(piece: Piece, visited):
                pl.when(visited > 0)(lambda: plgpu.barrier_wait(q_free))
                for c in range(CHUNKS):
                    columns = pl.ds(c * WIDTH, WIDTH)
                    plgpu.copy_gmem_to_smem(q_gmem.at[piece.request, tile_rows, columns], q_smem.at[c], q_full)
                return visited + 1

            visited = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            pl.when(visited > 0)(lambda: plgpu.barrier_wait(q_free))

        def load_keys():
            def load_piece(piece: Piece, loaded):
                def load_pair(i, loaded):
                    # In the order in which the previous pair frees them: half a block, then the other half.
                    for slot in range(2):
                        block = piece.begin + 2 * i + slot
                        page = table_gmem[piece.request, jnp.minimum(block, table_pages - 1)]
                        page = jnp.where(block < piece.end, page, 0)
                        for c in range(CHUNKS):
                            chunk = slot * CHUNKS + c
                            pl.when(loaded > 0)(lambda chunk=chunk: plgpu.barrier_wait(k_free.at[chunk]))
                            columns = pl.ds(c * WIDTH, WIDTH)
                            plgpu.copy_gmem_to_smem(k_gmem.at[page, :, columns], k_smem.at[slot, c], k_full.at[chunk])
                        plgpu.copy_gmem_to_smem(k_rope_gmem.at[page], k_rope_smem.at[slot], k_full.at[2 * CHUNKS + slot])
                    return loaded + 1

                return lax.fori_loop(0, pairs(piece.begin, piece.end), load_pair, loaded)

            loaded = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            for chunk in range(2 * CHUNKS):
                pl.when(loaded > 0)(lambda chunk=chunk: plgpu.barrier_wait(k_free.at[chunk]))

        def compute(own):
            plgpu.set_max_registers(registers(2), action="increase")
            other = 1 - own

            def masked(scores, request, block, end):
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 0, layout=WGMMA) + tile * ROWS
                first = lax.div(tile * ROWS, num_heads)
                limit = row - row + positions_gmem[request, jnp.minimum(first, tokens - 1)]
                for t in range(1, -(-(ROWS - 1) // num_heads) + 1):
                    token = first + t
                    limit = jnp.where(row >= token * num_heads, positions_gmem[request, jnp.minimum(token, tokens - 1)], limit)
                token = plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), 1, layout=WGMMA) + block * BLOCK
                return jnp.where(token <= jnp.minimum(limit, end * BLOCK - 1), scores, -jnp.inf)

            def attend(piece: Piece, carry):
                request, begin, end = piece.request, piece.begin, piece.end
                plgpu.barrier_wait(q_full)
                q_rope = plgpu.load(q_rope_gmem.at[request, tile_rows], layout=WGMMA, optimized=False)
                opened = jnp.minimum(schedule_gmem.open_B[request], end)
                num_pairs = pairs(begin, end)

                def pair(i, carry):
                    acc, m, total = carry
                    block = begin + 2 * i + own
                    # Made anew each time, or the compiler keeps the addresses of all products' operands: more than fit in registers.
                    zero, one = lax.optimization_barrier((jnp.int32(0), jnp.int32(1)))
                    here = (zero, one)[own]

                    def score(acc_ref):
                        for c in range(CHUNKS):
                            plgpu.barrier_wait(k_full.at[own * CHUNKS + c])
                            plgpu.wgmma(acc_ref, q_smem.at[zero + c], k_smem.at[here, c].transpose((1, 0)))
                        plgpu.barrier_wait(k_full.at[2 * CHUNKS + own])
                        plgpu.wgmma(acc_ref, q_rope, k_rope_smem.at[here].transpose((1, 0)))
                        return acc_ref[...]

                    scores = pl.run_scoped(score, plgpu.ACC((ROWS, BLOCK), jnp.float32))

                    @pl.when(i == num_pairs - 1)
                    def _():
                        plgpu.barrier_arrive(q_free)

                    scores = lax.cond(block >= opened, lambda s: masked(s, request, block, end), lambda s: s, scores)
                    highest = scores.max(axis=1) * (scale * LOG2E)
                    turn = turn0 if own == 0 else turn1
                    return turn(acc, m, total, scores, highest, (zero, one))

                acc = plgpu.layout_cast(jnp.zeros((ROWS, HALF), jnp.float32), WGMMA)
                m = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), ROW)
                total = plgpu.layout_cast(jnp.zeros((ROWS, 8), jnp.float32), WGMMA)
                acc, m, total = lax.fori_loop(0, num_pairs, pair, (acc, m, total))
                total = total.sum(axis=1)
                stats_smem[2 + own] = total
                plgpu.barrier_arrive(sum_ready.at[own])
                plgpu.barrier_wait(sum_ready.at[other])
                total += plgpu.load(stats_smem.at[2 + other], layout=ROW)

                def part_lse(offset):
                    return plgpu.load(lse_gmem.at[own, worker + offset, tile_rows], layout=ROW, optimized=False)

                def add_sum(offset, carry):
                    highest, total = carry
                    pl.semaphore_wait(partial_ready.at[tile, worker + offset, own])
                    lse = part_lse(offset)
                    new = jnp.maximum(highest, lse)
                    return new, total * jnp.exp2(highest - new) + jnp.exp2(lse - new)

                highest, total = merge(piece, add_sum, (m, total))
                inverse = jnp.where(total > 0, 1 / total, 0.0)
                share = jnp.exp2(m - highest) * inverse
                whole = piece.part == 0
                for start in range(0, HALF, BLOCK):
                    here = pl.ds(own * HALF + start, BLOCK)

                    def add(offset, out):
                        weight = jnp.exp2(part_lse(offset) - highest) * inverse
                        part = plgpu.load(partial_gmem.at[worker + offset, tile_rows, here], layout=WGMMA, optimized=False)
                        return out + part * spread(weight, out.shape)

                    out = merge(piece, add, acc[:, start : start + BLOCK] * spread(share, (ROWS, BLOCK)))

                    @pl.when(whole)
                    def _():
                        # Nobody reads these probabilities any more: see `sum_ready`.
                        p_smem[own] = out.astype(dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(p_smem.at[own], o_gmem.at[request, tile_rows, here])
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    @pl.when(~whole)
                    def _():
                        partial_gmem[worker, tile_rows, here] = out

                @pl.when(~whole)
                def _():
                    lse_gmem[own, worker, tile_rows] = highest + jnp.log2(total)
                    plgpu.commit_smem()  # all threads have written
                    pl.semaphore_signal(partial_ready.at[tile, worker, own])

                return carry

            def multiply(acc_ref, p, slot):
                for c in range(CHUNKS // 2):
                    columns = acc_ref.at[:, pl.ds(c * WIDTH, WIDTH)]
                    plgpu.wgmma(columns, p, k_smem.at[slot, own * (CHUNKS // 2) + c])

            def release(slot):
                for c in range(CHUNKS // 2):
                    plgpu.wgmma_wait(CHUNKS // 2 - 1 - c)
                    plgpu.barrier_arrive(k_free.at[slot * CHUNKS + own * (CHUNKS // 2) + c])

            def turn0(acc, m, total, scores, highest, index):
                m0 = raised(m, highest)
                stats_smem[0] = m0
                decay = jnp.exp2(m - m0)
                acc = rescale(acc, decay)
                p = jnp.exp2(scores * (scale * LOG2E) - spread(m0, scores.shape))
                p16 = p.astype(dtype)
                p_smem[0] = p16
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[0])

                def even(refs):
                    acc_ref, total_ref = refs
                    multiply(acc_ref, p16, index[0])
                    total_ref[...] = total_ref[...] * spread(decay, (ROWS, 8)) + eights(p)
                    release(0)

                acc, total = pl.run_state(even)((plgpu.ACC.init(acc), total))
                plgpu.barrier_wait(p_ready.at[1])
                m1 = plgpu.load(stats_smem.at[1], layout=ROW)
                decay = jnp.exp2(m0 - m1)

                def odd(refs):
                    acc_ref, total_ref = refs
                    multiply(acc_ref, p_smem.at[index[1]], index[1])
                    total_ref[...] = total_ref[...] * spread(decay, (ROWS, 8))
                    release(1)

                acc, total = pl.run_state(odd)((plgpu.ACC.init(rescale(acc, decay)), total))
                return acc, m1, total

            def turn1(acc, m, total, scores, highest, index):
                plgpu.barrier_wait(p_ready.at[0])
                m0 = plgpu.load(stats_smem.at[0], layout=ROW)
                m1 = raised(m0, highest)
                stats_smem[1] = m1
                decay0, decay1 = jnp.exp2(m - m0), jnp.exp2(m0 - m1)

                def even(refs):
                    acc_ref, total_ref = refs
                    multiply(acc_ref, p_smem.at[index[0]], index[0])
                    p = jnp.exp2(scores * (scale * LOG2E) - spread(m1, scores.shape))
                    p_smem[1] = p.astype(dtype)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(p_ready.at[1])
                    total_ref[...] = total_ref[...] * spread(decay0 * decay1, (ROWS, 8)) + eights(p)
                    release(0)

                def odd(acc_ref):
                    multiply(acc_ref, p_smem.at[index[1]], index[1])
                    release(1)

                acc, total = pl.run_state(even)((plgpu.ACC.init(rescale(acc, decay0)), total))
                acc = pl.run_state(odd)(plgpu.ACC.init(rescale(acc, decay1)))
                return acc, m1, total

            pieces(schedule_gmem, worker, attend, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == 0)(lambda: compute(0))
        pl.when(warpgroup == 1)(lambda: compute(1))

        @pl.when(warpgroup == 2)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp):  # two warps, so that the next request's keys need not wait until its queries can be loaded
                pl.when(warp == 0)(load_keys)
                pl.when(warp == 1)(load_queries)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, LATENT), dtype),
            jax.ShapeDtypeStruct((workers, rows, LATENT), jnp.float32),
            jax.ShapeDtypeStruct((2, workers, rows), jnp.float32),
        ),
        grid=(tiles, workers),
        grid_names=("tile", "worker"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((CHUNKS, ROWS, WIDTH), dtype, transforms=swizzled(dtype)),  # queries
            plgpu.SMEM((2, CHUNKS, BLOCK, WIDTH), dtype, transforms=swizzled(dtype)),  # latents of the even and the odd block
            plgpu.SMEM((2, BLOCK, ROPE), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((2, ROWS, BLOCK), dtype, transforms=swizzled(dtype)),  # probabilities
            plgpu.SMEM((4, ROWS), jnp.float32),  # running maxima and sums
            plgpu.Barrier(num_arrivals=CHUNKS),  # queries full
            plgpu.Barrier(num_arrivals=2),  # queries free
            plgpu.Barrier(num_barriers=2 * CHUNKS + 2),  # chunks of latents full, and the rope keys
            plgpu.Barrier(num_barriers=2 * CHUNKS),  # chunks of latents, and with the last of a block its rope keys, free
            plgpu.Barrier(num_barriers=2),  # probabilities and running maximum ready
            plgpu.Barrier(num_barriers=2),  # sum ready, and nobody reads the other's probabilities any more
        ],
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=512),  # of 227 KiB all but 1.3 are used
    )
    out_BMC, _, _ = kernel(q_latent_BMC, q_rope_BMR, positions_BT, pages.latent, pages.rope, table_BP, *schedule)
    return out_BMC


def raised(m, highest):
    """A running maximum that follows the true one by more than LAZY steps only: probabilities then stay below 2 ** LAZY."""
    return jnp.where(highest > m + LAZY, highest, m)


def eights(p):
    """Sums over each eighth column: what a thread can add up without the others of its row."""
    return sum(p[:, start : start + 8] for start in range(8, BLOCK, 8)) + p[:, :8]


def pairs(begin, end):
    """Steps over two blocks; a request of no blocks takes one, wholly masked."""
    return jnp.maximum(lax.div(end - begin + 1, jnp.int32(2)), 1)


@plgpu.inline_mgpu(arg_types=(WGMMA, ROW), return_type=plgpu.ShapeDtypeStruct((ROWS, HALF), jnp.float32, layout=WGMMA))
def rescale(_, acc: mgpu.FragmentedArray, decay: mgpu.FragmentedArray):
    """`acc * decay`, in a branch that a warp takes only if one of its 16 rows has a decay other than 1: hardly ever, by `raised`."""
    one = arith.constant(ir.F32Type.get(), 1.0)
    changed = None
    for register in decay.registers.flat:
        differs = arith.cmpf(arith.CmpFPredicate.UNE, vector.extract(register, [], [0]), one)
        changed = differs if changed is None else arith.ori(changed, differs)
    i32 = ir.IntegerType.get_signless(32)
    changed = nvvm.vote_sync(arith.constant(i32, ir.IntegerAttr.get(i32, -1)), changed, "any")
    registers = acc.registers
    branch = scf.IfOp(changed, [register.type for register in registers.flat], has_else=True)
    with ir.InsertionPoint(branch.then_block):
        scaled = acc * decay.broadcast_in_dim(acc.shape, (0,), acc.layout)
        scf.yield_(list(scaled.registers.flat))
    with ir.InsertionPoint(branch.else_block):
        scf.yield_(list(registers.flat))
    results = np.array(branch.results, dtype=object).reshape(registers.shape)
    return mgpu.FragmentedArray(_registers=results, _layout=acc.layout, _is_signed=acc.is_signed)
