"""Absorbed decode on Hopper over pages of fp8 or 6-bit latents.

The products are transposed, S^T = K Q^T and O^T = V^T P^T with tokens and latents as the rows of a wgmma: sixteen query rows then
fill a product of 16 columns, where S = Q K^T would pad them to 64 rows, and the outputs of all 512 latents take 64 registers a
thread. So each of the two compute warpgroups works on its own, on every other block of 64 tokens, with its own softmax; while
one multiplies the other dequantises. They meet at the end of a piece. A page's values are replaced by the next page's, chunk by
chunk, as soon as their product is done.

Measured on one H200, 16 heads, 256 requests of 4096 tokens: int6 199 us (2.87 TB/s), fp8 220 us (3.07 TB/s), 5 us more with the
queries' conversion to float16. With all blocks one page, so that none waits for
memory, both take 190 us, and 150 without the products of O^T: the limit is each warpgroup's chain of dequantisation, products and
softmax, which two warpgroups do not hide.

A warpgroup turns codes into float16 in registers, in the layout in which wgmma takes its left operand: S^T reads them there,
and they are stored once, to be V^T. e4m3 is converted as it is, its scale of a token multiplies the scores, and the
probabilities by adding its logarithm to the exponent. Six-bit codes are placed below the exponent of 1.0 (see latent_pages).

Letters: B requests, M rows (heads of query tokens) of a request, C latent dim, R rope dim, T query tokens, P pages, S slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dequantise
from pallas_kernels.decode_schedule import BLOCK, ROWS, Schedule, merge, pieces
from pallas_kernels.hopper import COL, PARAMS, ROW, WGMMA, registers, spread, swizzled, vary_like
from pallas_kernels.warpgroup import column_max, column_sum, sync

LOG2E = 1.4426950408889634
LATENT, ROPE = 512, 64
CHUNK = dequantise.CHUNK
CHUNKS = LATENT // CHUNK
AHEAD = 1  # pages of a warpgroup that are brought into the L2 cache before they are loaded: fp8 220 us (2: 269)
COLUMNS = 16  # query rows a product takes
SLOTS = 3  # boxes of 64 x 128 bytes of codes, for each warpgroup
LOWEST = -1e30  # running maximum of a row that has seen nothing: finite, so that differences are numbers
F16 = jnp.float16


def decode(q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP, schedule: Schedule, *, scale: float, num_heads: int):
    """What `mla_decode_hopper.decode` computes, for fp8 and int6 pages; M is a multiple of 16 or, above 64, of 64."""
    batch, rows, _ = q_latent_BMC.shape
    tiles, workers = -(-rows // ROWS), len(schedule.request_W1) - 1
    tokens = positions_BT.shape[1]
    dtype = q_rope_BMR.dtype
    subtiles = -(-min(tokens * num_heads, ROWS) // COLUMNS)
    int6 = pages.format == "int6"
    boxes = pages.latent.shape[2] * pages.latent.dtype.itemsize // CHUNK
    box = CHUNK // pages.latent.dtype.itemsize
    unit = scale * LOG2E

    def body(q_gmem, q_rope_gmem, positions_gmem, codes_gmem, k_rope_gmem, scale_gmem, table_gmem, *refs):
        schedule_gmem, (o_gmem, partial_gmem, lse_gmem), smem = Schedule(*refs[:6]), refs[6:9], refs[9:]
        q_smem, q_rope_smem, codes_smem, k_rope_smem, scale_smem, p_smem, scratch_smem, stats_smem, union, *barriers = smem
        v_smem, (half_smem, o_smem) = union
        q_full, q_free, scale_full, scale_free, codes_full, codes_free, rope_full, rope_free, *merging = barriers
        stats_ready, half_ready, half_free = merging
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        worker = workers - 1 - lax.axis_index("worker")  # see `merge`
        partial_ready = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles * subtiles, workers)))

        def columns(subtile):
            return pl.ds(tile * ROWS + subtile * COLUMNS, COLUMNS)

        def blocks_of(own, begin, end):
            return lax.div(end - begin - own + 1, jnp.int32(2))

        def load():
            plgpu.set_max_registers(24, action="decrease")

            def load_page(own, request, block, end, n):
                page, later = (table_gmem[request, jnp.minimum(b, end - 1)] for b in (block, block + 2 * AHEAD))
                for k in range(boxes):
                    plgpu.async_prefetch(codes_gmem.at[later, :, pl.ds(k * box, box)])
                plgpu.async_prefetch(k_rope_gmem.at[later])
                plgpu.async_prefetch(scale_gmem.at[later])
                for k in range(boxes):
                    count = n * boxes + k
                    slot = own * SLOTS + lax.rem(count, jnp.int32(SLOTS))

                    @pl.when(count >= SLOTS)
                    def _():
                        plgpu.barrier_wait(codes_free.at[slot])

                    plgpu.copy_gmem_to_smem(codes_gmem.at[page, :, pl.ds(k * box, box)], codes_smem.at[slot], codes_full.at[slot])

                pl.when(n > 0)(lambda: plgpu.barrier_wait(scale_free.at[own]))
                plgpu.copy_gmem_to_smem(scale_gmem.at[page], scale_smem.at[own], scale_full.at[own])
                pl.when(n > 0)(lambda: plgpu.barrier_wait(rope_free.at[own]))
                plgpu.copy_gmem_to_smem(k_rope_gmem.at[page], k_rope_smem.at[own], rope_full.at[own])

            def load_piece(piece, carry):
                request, begin, end = piece[:3]

                def load_rows(subtile, carry):
                    def load_queries(visited):
                        @pl.when(visited > 0)
                        def _():
                            plgpu.barrier_wait(q_free)

                        plgpu.copy_gmem_to_smem(q_gmem.at[request, columns(subtile)], q_smem.at[0], q_full)
                        plgpu.copy_gmem_to_smem(q_rope_gmem.at[request, columns(subtile)], q_rope_smem.at[0], q_full)

                    def load_pair(i, done):
                        done0, done1 = done
                        block = begin + 2 * i
                        load_page(0, request, block, end, done0)
                        second = block + 1 < end
                        pl.when(second)(lambda: load_page(1, request, block + 1, end, done1))
                        return done0 + 1, done1 + second.astype(jnp.int32)

                    # The first pages are on their way before the last use of the previous queries.
                    visited, *done = carry
                    pairs = blocks_of(0, begin, end)
                    done = lax.fori_loop(0, jnp.minimum(pairs, 1), load_pair, tuple(done))
                    load_queries(visited)
                    return visited + 1, *lax.fori_loop(1, pairs, load_pair, done)

                return lax.fori_loop(0, subtiles, load_rows, carry)

            visited, *done = pieces(schedule_gmem, worker, load_piece, (jnp.int32(0),) * 3)
            pl.when(visited > 0)(lambda: plgpu.barrier_wait(q_free))
            for own in range(2):
                pl.when(done[own] > 0)(lambda own=own: plgpu.barrier_wait(scale_free.at[own]))
                pl.when(done[own] > 0)(lambda own=own: plgpu.barrier_wait(rope_free.at[own]))
                for slot in range(SLOTS):
                    pl.when(done[own] * boxes > slot)(
                        lambda own=own, slot=slot: plgpu.barrier_wait(codes_free.at[own * SLOTS + slot])
                    )

        def keys(own, n):
            """Yields the chunks of a page's keys, float16 [64, 128] in registers, and what frees their place in shared memory.

            To be called when the chunk has been stored: its codes then have been used, and so are in registers.
            """

            def slot(k):
                return own * SLOTS + lax.rem(n * boxes + k, jnp.int32(SLOTS))

            def take(k, layout):
                plgpu.barrier_wait(codes_full.at[slot(k)])
                return plgpu.load(codes_smem.at[slot(k)], layout=layout)

            def free(*boxes):
                for k in boxes:
                    plgpu.barrier_arrive(codes_free.at[slot(k)])

            if not int6:
                for chunk in range(CHUNKS):
                    yield dequantise.fp8(take(chunk, dequantise.BYTES)), lambda chunk=chunk: free(chunk)
                return
            words = [take(plane, dequantise.WORDS) for plane in range(boxes)]
            plgpu.barrier_wait(scale_full.at[own])
            spans = plgpu.load(scale_smem.at[own], layout=dequantise.SPANS, optimized=False)

            def free_page():
                free(*range(boxes))
                plgpu.barrier_arrive(scale_free.at[own])

            for chunk in range(CHUNKS):  # a thread loads words for two chunks at once
                yield dequantise.int6(chunk, spans, *words), free_page if chunk == 2 else lambda: None

        def attend_rows(own, piece, subtile, done):
            request, begin, end = piece[:3]
            opened = jnp.minimum(schedule_gmem.open_B[request], end)

            def masked(scores, block):
                first_row = tile * ROWS + subtile * COLUMNS
                column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
                first = lax.div(first_row, num_heads)
                limit = column - column + positions_gmem[request, jnp.minimum(first, tokens - 1)]
                for t in range(1, -(-(COLUMNS - 1) // num_heads) + 1):
                    token = first + t
                    later = positions_gmem[request, jnp.minimum(token, tokens - 1)]
                    limit = jnp.where(column + first_row >= token * num_heads, later, limit)
                token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=WGMMA) + block * BLOCK
                return jnp.where(token <= limit, scores, -jnp.inf)

            def score(i, refs, addresses, products=0):
                """Adds the scores of page i to refs, behind `products` products of values, one for each chunk."""
                zero, here = addresses
                for chunk, (k, free) in enumerate(keys(here, done + i)):
                    # Chunks 0 and 1 replace values as soon as their product is done; after chunk 1 all are.
                    if products and chunk < 3:
                        if chunk < 2:
                            plgpu.wgmma_wait(products - 1)
                        sync()
                    dequantise.store(k, chunk, v_smem.at[here])
                    free()
                    if chunk == 0:
                        pl.when(i == 0)(lambda: plgpu.barrier_wait(q_full))
                    dims = chunk_dims(chunk)
                    plgpu.wgmma(refs[0], k, q_smem.at[zero, :, dims].transpose((1, 0)))
                    if chunk > 0:
                        plgpu.wgmma_wait(1)  # the registers of the chunk before are free
                plgpu.barrier_wait(rope_full.at[here])
                plgpu.wgmma(refs[-1], k_rope_smem.at[here], q_rope_smem.at[zero].transpose((1, 0)))

            def scored(i, here):
                plgpu.barrier_arrive(rope_free.at[here])
                pl.when(i == count - 1)(lambda: plgpu.barrier_arrive(q_free))

            def addresses():
                # Made where they are used: all made before the loop, they would fill registers that the products need.
                return lax.optimization_barrier((jnp.int32(0), own))

            def page(i, carry, last=False):
                """Attends to page i, whose scores are known, while it scores the next."""
                acc, m, total, scores = carry
                block = begin + own + 2 * i
                zero, here = addresses()
                if int6:
                    scores = scores[0] * unit
                else:
                    plgpu.barrier_wait(scale_full.at[here])
                    token_scale = jnp.maximum(plgpu.load(scale_smem.at[here], layout=ROW), 1e-30)
                    scores = scores[0] * spread(token_scale * unit, scores[0].shape) + scores[1] * unit
                    scores += spread(jnp.log2(token_scale), scores.shape)
                scores = lax.cond(block >= opened, lambda s: masked(s, block), lambda s: s, scores)
                highest = jnp.maximum(m, column_max(scores, scratch_smem.at[here]))
                p = jnp.exp2(scores - spread(highest, scores.shape, 1))
                p_smem.at[here].transpose((1, 0))[...] = p.astype(F16)
                plgpu.commit_smem()
                decay = jnp.exp2(m - highest)
                total = total * spread(decay, p.shape, 1) + (p if int6 else p * spread(1 / token_scale, p.shape))
                if not int6:
                    plgpu.barrier_arrive(scale_free.at[here])

                def multiply(refs):
                    for chunk in range(CHUNKS):
                        values = v_smem.at[here, :, chunk_dims(chunk)].transpose((1, 0))
                        plgpu.wgmma(refs[chunk], values, p_smem.at[here].transpose((1, 0)))
                    if not last:
                        score(i + 1, refs[CHUNKS:], (zero, here), products=CHUNKS)

                acc = [plgpu.ACC.init(x * spread(decay, x.shape, 1)) for x in acc]
                results = pl.run_state(multiply)((*acc, *(() if last else empty_scores())))
                if not last:
                    scored(i + 1, here)
                return results[:CHUNKS], highest, total, results[CHUNKS:]

            def empty_scores():
                zeros = plgpu.layout_cast(jnp.zeros((BLOCK, COLUMNS), jnp.float32), WGMMA)
                return (plgpu.ACC.init(zeros),) * (1 if int6 else 2)

            def pages_of(carry):
                first = addresses()
                scores = pl.run_state(lambda refs: score(0, refs, first))(empty_scores())
                scored(0, first[1])
                carry = lax.fori_loop(0, count - 1, page, (*carry, scores))
                return page(count - 1, carry, last=True)[:3]

            def no_pages(carry):
                plgpu.barrier_wait(q_full)
                plgpu.barrier_arrive(q_free)
                return carry

            acc = (plgpu.layout_cast(jnp.zeros((CHUNK, COLUMNS), jnp.float32), WGMMA),) * CHUNKS
            m = plgpu.layout_cast(jnp.full((COLUMNS,), LOWEST, jnp.float32), COL)
            total = plgpu.layout_cast(jnp.zeros((BLOCK, COLUMNS), jnp.float32), WGMMA)
            count = blocks_of(own, begin, end)
            acc, m, total = lax.cond(count > 0, pages_of, no_pages, (acc, m, total))
            total = column_sum(total, scratch_smem.at[own])

            stats_smem[own, 0], stats_smem[own, 1] = m, total
            plgpu.barrier_arrive(stats_ready.at[own])
            plgpu.barrier_wait(stats_ready.at[1 - own])
            m_other, total_other = (plgpu.load(stats_smem.at[1 - own, i], layout=COL) for i in range(2))
            highest = jnp.maximum(m, m_other)
            total = total * jnp.exp2(m - highest) + total_other * jnp.exp2(m_other - highest)
            decay = jnp.exp2(m - highest)
            acc = [x * spread(decay, x.shape, 1) for x in acc]

            @pl.when(own == 0)
            def _():
                plgpu.barrier_wait(half_ready)
                chunks = [x + plgpu.load(half_smem.at[chunk_dims(c)], layout=WGMMA) for c, x in enumerate(acc)]
                finish(piece, subtile, chunks, highest, total)
                plgpu.barrier_arrive(half_free)

            @pl.when(own == 1)
            def _():
                for c, x in enumerate(acc):
                    half_smem[chunk_dims(c)] = x
                plgpu.barrier_arrive(half_ready)
                plgpu.barrier_wait(half_free)

            return done + count

        def finish(piece, subtile, acc, m, total):
            """Adds the results of the request's later parts; writes the output, or what an earlier part will add."""
            part_index = tile * subtiles + subtile

            def part_lse(offset):
                return plgpu.load(lse_gmem.at[worker + offset, part_index], layout=COL, optimized=False)

            def add_sum(offset, carry):
                highest, total = carry
                pl.semaphore_wait(partial_ready.at[part_index, worker + offset])
                lse = part_lse(offset)
                new = jnp.maximum(highest, lse)
                return new, total * jnp.exp2(highest - new) + jnp.exp2(lse - new)

            highest, total = merge(piece, add_sum, (m, total))
            inverse = jnp.where(total > 0, 1 / total, 0.0)

            def add(offset, chunks):
                weight = jnp.exp2(part_lse(offset) - highest) * inverse
                parts = partial_gmem.at[worker + offset, part_index]
                return [
                    out + plgpu.load(parts.at[chunk_dims(c)], layout=WGMMA, optimized=False) * spread(weight, out.shape, 1)
                    for c, out in enumerate(chunks)
                ]

            share = jnp.exp2(m - highest) * inverse
            chunks = merge(piece, add, [x * spread(share, x.shape, 1) for x in acc])

            @pl.when(piece.part == 0)
            def _():
                for c, out in enumerate(chunks):
                    o_smem.at[:, chunk_dims(c)].transpose((1, 0))[...] = out.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[piece.request, columns(subtile)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(piece.part > 0)
            def _():
                for c, out in enumerate(chunks):
                    partial_gmem[worker, part_index, chunk_dims(c)] = out
                lse_gmem[worker, part_index] = highest + jnp.log2(total)
                plgpu.commit_smem()  # all threads have written
                pl.semaphore_signal(partial_ready.at[part_index, worker])

        def compute(own):
            plgpu.set_max_registers(registers(2), action="increase")

            def attend_piece(piece, done):
                def attend_tile(subtile, done):
                    return attend_rows(own, piece, subtile, done)

                return lax.fori_loop(0, subtiles, attend_tile, done)

            pieces(schedule_gmem, worker, attend_piece, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup < 2)(lambda: compute(warpgroup))
        pl.when(warpgroup == 2)(load)

    scale_box = (2, *pages.scale.shape[1:])
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, LATENT), dtype),
            jax.ShapeDtypeStruct((workers, tiles * subtiles, LATENT, COLUMNS), jnp.float32),
            jax.ShapeDtypeStruct((workers, tiles * subtiles, COLUMNS), jnp.float32),
        ),
        grid=(tiles, workers),
        grid_names=("tile", "worker"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((1, COLUMNS, LATENT), F16, transforms=swizzled(F16)),
            plgpu.SMEM((1, COLUMNS, ROPE), q_rope_BMR.dtype, transforms=swizzled(q_rope_BMR.dtype)),
            plgpu.SMEM((2 * SLOTS, BLOCK, box), pages.latent.dtype, transforms=swizzled(pages.latent.dtype)),
            plgpu.SMEM((2, BLOCK, ROPE), pages.rope.dtype, transforms=swizzled(pages.rope.dtype)),
            plgpu.SMEM(scale_box, pages.scale.dtype),
            plgpu.SMEM((2, COLUMNS, BLOCK), F16, transforms=swizzled(F16)),  # probabilities
            plgpu.SMEM((2, 4 * COLUMNS), jnp.float32),  # reductions across warps
            plgpu.SMEM((2, 2, COLUMNS), jnp.float32),  # maxima and sums
            plgpu.RefUnion(
                plgpu.SMEM((2, BLOCK, LATENT), F16, transforms=swizzled(F16)),  # values
                [  # within warpgroup 0's values
                    plgpu.SMEM((LATENT, COLUMNS), jnp.float32, transforms=swizzled(jnp.float32, 64)),
                    plgpu.SMEM((COLUMNS, LATENT), dtype, transforms=swizzled(dtype)),
                ],
            ),
            plgpu.Barrier(num_arrivals=2),  # queries full
            plgpu.Barrier(num_arrivals=2),  # queries free
            plgpu.Barrier(num_barriers=2),  # scales full
            plgpu.Barrier(num_barriers=2),  # scales free
            plgpu.Barrier(num_barriers=2 * SLOTS),  # codes full
            plgpu.Barrier(num_barriers=2 * SLOTS),  # codes free
            plgpu.Barrier(num_barriers=2),  # rope keys full
            plgpu.Barrier(num_barriers=2),  # rope keys free
            plgpu.Barrier(num_barriers=2),  # statistics ready
            plgpu.Barrier(),  # half an output ready
            plgpu.Barrier(),  # its place free
        ],
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=0),
    )
    out_BMC, _, _ = kernel(
        q_latent_BMC.astype(F16), q_rope_BMR, positions_BT, pages.latent, pages.rope, pages.scale, table_BP, *schedule
    )
    return vary_like(q_latent_BMC, out_BMC)


def chunk_dims(chunk: int):
    return pl.ds(chunk * CHUNK, CHUNK)
