"""Absorbed decode on Hopper over pages of fp8 or 6-bit latents.

The sixteen rows of a product by a single warp (mma.sync) are sixteen query rows, where a wgmma would pad them to 64. Its right operand
is in registers, where codes become float16: twice, as keys and, transposed, as values, so that nothing dequantised goes back to
shared memory. Of a page's 64 tokens each of a warpgroup's four warps scores sixteen; they exchange maxima and probabilities, and
each adds up the outputs of its own 128 latents. A page is a long chain of loads, conversions, products and softmax, so three
compute warpgroups work on their own, each on every third page with its own softmax. They meet at the end of a piece.

e4m3 is converted as it is, its scale of a token multiplies the scores, and the probabilities by adding its logarithm to the exponent.
Six-bit codes are placed below the exponent of 1.0 (see latent_pages).

One H200, 16 heads, 256 requests of 4096 tokens, and times as fast as bfloat16 pages in the same run: fp8 181 us (3.74 TB/s), 1.66; int6
212 us (2.69 TB/s), 1.40. Int6 is bound by what a page takes to unpack: with a third of its loads of matrices left out, 181 us. As fast
within 5%, and longer: codes multiplied as they lie and spans apart from them; one barrier a page, with the exponents' reference
renewed only when a score outgrows it; two warpgroups with more registers. Bringing pages into the L2 cache ahead of their loads took an
earlier version from 201 us to 250 (fp8).

Letters: B requests, M rows (heads of query tokens) of a request, C latent dim, R rope dim, T query tokens, P pages, S slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dequantise, warp_products
from pallas_kernels.decode_schedule import BLOCK, ROWS, Schedule, merge, pieces
from pallas_kernels.hopper import PARAMS, ROW, WGMMA, registers, spread, swizzled, vary_like
from pallas_kernels.warp_products import COLUMNS
from pallas_kernels.warpgroup import put, sync, take, warps_max, warps_sum

LOG2E = 1.4426950408889634
LATENT, ROPE = 512, 64
WARPGROUPS = 3  # compute warpgroups
DIMS = 64  # latents that a warpgroup's four warps add to the outputs at once
BLOCKS = LATENT // DIMS
HALF = BLOCK // 2  # tokens of a box of codes
SLOTS = {"fp8": 3, "int6": 4}  # boxes for each warpgroup: 48 KB
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
    slots = SLOTS[pages.format]
    unit = scale * LOG2E

    def body(q_gmem, q_rope_gmem, positions_gmem, codes_gmem, k_rope_gmem, scale_gmem, table_gmem, *refs):
        schedule_gmem, (o_gmem, partial_gmem, lse_gmem), smem = Schedule(*refs[:6]), refs[6:9], refs[9:]
        q_smem, q_rope_smem, codes_smem, k_rope_smem, scale_smem, p_smem, scratch_smem, stats_smem, union, *barriers = smem
        words_smem, o_smem = union
        q_full, q_ready, q_free, scale_full, scale_free, codes_full, codes_free, rope_full, rope_free, *merging = barriers
        stats_ready, part_ready, turn, merged = merging
        tile, warpgroup = lax.axis_index("tile"), lax.axis_index("warpgroup")
        worker = workers - 1 - lax.axis_index("worker")  # see `merge`
        partial_ready = pl.get_global(plgpu.SemaphoreType.REGULAR((tiles * subtiles, workers)))

        def columns(subtile):
            return pl.ds(tile * ROWS + subtile * COLUMNS, COLUMNS)

        def place_of(own):
            """Warpgroup 0, which writes the piece, comes last: it never has more blocks than another."""
            return lax.rem(own + WARPGROUPS - 1, jnp.int32(WARPGROUPS))

        def blocks_of(own, begin, end):
            return lax.div(end - begin - place_of(own) + WARPGROUPS - 1, jnp.int32(WARPGROUPS))

        def slot_of(own, n, k):
            """Of box k of the n-th page of a warpgroup."""
            return own * slots + lax.rem(2 * n + k, jnp.int32(slots))

        def load_pages(own):
            """One warp for each compute warpgroup."""

            def load_page(request, block, n):
                page = table_gmem[request, block]
                place = own * 2 + lax.rem(n, jnp.int32(2))
                pl.when(n >= 2)(lambda: plgpu.barrier_wait(scale_free.at[place]))
                plgpu.copy_gmem_to_smem(scale_gmem.at[page], scale_smem.at[place], scale_full.at[place])
                for k in range(2):
                    slot = slot_of(own, n, k)
                    pl.when(2 * n + k >= slots)(lambda slot=slot: plgpu.barrier_wait(codes_free.at[slot]))
                    plgpu.copy_gmem_to_smem(codes_gmem.at[page, pl.ds(HALF * k, HALF)], codes_smem.at[slot], codes_full.at[slot])
                pl.when(n > 0)(lambda: plgpu.barrier_wait(rope_free.at[own]))
                plgpu.copy_gmem_to_smem(k_rope_gmem.at[page], k_rope_smem.at[own], rope_full.at[own])

            def load_piece(piece, done):
                request, begin, end = piece[:3]

                def load_rows(subtile, done):
                    def load_one(i, done):
                        load_page(request, begin + place_of(own) + WARPGROUPS * i, done)
                        return done + 1

                    return lax.fori_loop(0, blocks_of(own, begin, end), load_one, done)

                return lax.fori_loop(0, subtiles, load_rows, done)

            done = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            pl.when(done > 0)(lambda: plgpu.barrier_wait(rope_free.at[own]))
            for k in range(2):
                pl.when(done > k)(lambda k=k: plgpu.barrier_wait(scale_free.at[own * 2 + k]))
            for slot in range(slots):
                pl.when(2 * done > slot)(lambda slot=slot: plgpu.barrier_wait(codes_free.at[own * slots + slot]))

        def load_queries():
            def load_piece(piece, visited):
                def load_rows(subtile, visited):
                    pl.when(visited > 0)(lambda: plgpu.barrier_wait(q_free))
                    plgpu.copy_gmem_to_smem(q_gmem.at[piece.request, columns(subtile)], q_smem.at[0], q_full)
                    plgpu.copy_gmem_to_smem(q_rope_gmem.at[piece.request, columns(subtile)], q_rope_smem.at[0], q_full)
                    return visited + 1

                return lax.fori_loop(0, subtiles, load_rows, visited)

            visited = pieces(schedule_gmem, worker, load_piece, jnp.int32(0))
            pl.when(visited > 0)(lambda: plgpu.barrier_wait(q_free))

        def attend_rows(own, piece, subtile, carry):
            done, visited = carry
            request, begin, end = piece[:3]
            opened = jnp.minimum(schedule_gmem.open_B[request], end)

            def masked(scores, block):
                first_row = tile * ROWS + subtile * COLUMNS
                warp_row, column = (plgpu.broadcasted_iota(jnp.int32, scores.shape, dim, layout=WGMMA) for dim in range(2))
                row = first_row + warp_row % COLUMNS
                first = lax.div(first_row, num_heads)
                limit = row - row + positions_gmem[request, jnp.minimum(first, tokens - 1)]
                for t in range(1, -(-(COLUMNS - 1) // num_heads) + 1):
                    token = first + t
                    later = positions_gmem[request, jnp.minimum(token, tokens - 1)]
                    limit = jnp.where(row >= token * num_heads, later, limit)
                token = block * BLOCK + (warp_row - warp_row % COLUMNS) + column
                return jnp.where(token <= limit, scores, -jnp.inf)

            count = blocks_of(own, begin, end)
            plgpu.barrier_wait(q_full)

            @pl.when(own == 1)  # not 0, which may still write the piece before
            def _():
                warp_products.to_float16(q_smem.at[0])
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_ready)

            plgpu.barrier_wait(q_ready)
            pl.when(count == 0)(lambda: plgpu.barrier_arrive(q_free))

            def score(n, place, zero, here):
                """The scores that the page's latents give, in two sums, and those of its rope keys."""
                sums = [plgpu.layout_cast(jnp.zeros((BLOCK, COLUMNS), jnp.float32), WGMMA)] * 3
                for k in range(2):
                    plgpu.barrier_wait(codes_full.at[slot_of(here, n, k)])
                codes = [codes_smem.at[slot_of(here, n, k)] for k in range(2)]
                if int6:
                    plgpu.barrier_wait(scale_full.at[place])
                for block in range(BLOCKS):
                    if not int6:
                        keys = dequantise.fp8_keys(block, codes)
                    else:
                        if block % 4 == 0:
                            words = dequantise.int6_words(block // 4, scale_smem.at[place], codes)
                        keys = dequantise.int6_keys(block % 4, *words)
                    sums[block % 2] = warp_products.add_scores(sums[block % 2], keys, block, q_smem.at[zero])
                plgpu.barrier_wait(rope_full.at[here])
                return sums[0] + sums[1], warp_products.add_rope_scores(sums[2], k_rope_smem.at[here], q_rope_smem.at[zero])

            def add_values(n, place, acc, here):
                """Adds the page's values; frees a box of codes when they are in registers."""
                acc, p = list(acc), warp_products.load_probabilities(p_smem.at[here])
                for k in range(2):
                    codes = codes_smem.at[slot_of(here, n, k)]
                    if int6:
                        spans = dequantise.int6_spans(k, scale_smem.at[place])
                        values = (x for q in range(2) for x in dequantise.int6_values(q, spans, codes))
                    else:
                        values = (dequantise.fp8_values(block, codes) for block in range(BLOCKS))
                    for block, x in enumerate(values):
                        acc[block] = warp_products.add_values(acc[block], p, x, 2 * k)
                    plgpu.barrier_arrive(codes_free.at[slot_of(here, n, k)])
                if int6:
                    plgpu.barrier_arrive(scale_free.at[place])
                return acc

            def addresses():
                # Made where they are used: all made before the loop, they would fill registers that the products need.
                return lax.optimization_barrier((jnp.int32(0), own))

            def page(i, carry):
                acc, m, total = carry
                n = done + i
                block = begin + place_of(own) + WARPGROUPS * i
                zero, here = addresses()
                place = here * 2 + lax.rem(n, jnp.int32(2))
                scores, rope_scores = score(n, place, zero, here)
                plgpu.barrier_arrive(rope_free.at[here])
                pl.when(i == count - 1)(lambda: plgpu.barrier_arrive(q_free))
                if int6:
                    scores = (scores + rope_scores) * unit
                else:
                    plgpu.barrier_wait(scale_full.at[place])
                    token_scale = jnp.maximum(warp_products.of_tokens(scale_smem.at[place]), 1e-30)
                    scores = scores * (token_scale * unit) + (rope_scores * unit + jnp.log2(token_scale))
                scores = lax.cond(block >= opened, lambda s: masked(s, block), lambda s: s, scores)
                highest = warps_max(jnp.maximum(m, scores.max(axis=1)), scratch_smem.at[here])
                p = jnp.exp2(scores - spread(highest, scores.shape))
                warp_products.store_probabilities(p, p_smem.at[here])
                decay = jnp.exp2(m - highest)
                total = total * spread(decay, p.shape) + (p if int6 else p / token_scale)
                if not int6:
                    plgpu.barrier_arrive(scale_free.at[place])
                acc = [x * spread(decay, x.shape) for x in acc]
                sync()  # all probabilities are there
                return add_values(n, place, acc, here), highest, total

            acc = [plgpu.layout_cast(jnp.zeros((DIMS, COLUMNS), jnp.float32), WGMMA)] * BLOCKS
            m = plgpu.layout_cast(jnp.full((BLOCK,), LOWEST, jnp.float32), ROW)
            total = plgpu.layout_cast(jnp.zeros((BLOCK, COLUMNS), jnp.float32), WGMMA)
            acc, m, total = lax.fori_loop(0, count, page, (acc, m, total))

            total = warps_sum(total.sum(axis=1), scratch_smem.at[own])
            sync()  # all warps have read the scratch memory

            # The warpgroups meet: 0 adds what the others have found. Its place is free when it has written the piece before.
            pl.when((own > 0) & (visited > 0))(lambda: plgpu.barrier_wait(merged))
            stats_smem[own, 0], stats_smem[own, 1] = m, total
            plgpu.barrier_arrive(stats_ready.at[own])
            for p in range(WARPGROUPS):
                pl.when(own != p)(lambda p=p: plgpu.barrier_wait(stats_ready.at[p]))
            stats = [[plgpu.load(stats_smem.at[p, i], layout=ROW) for i in range(2)] for p in range(WARPGROUPS)]
            highest = stats[0][0]
            for other, _ in stats[1:]:
                highest = jnp.maximum(highest, other)
            shares = [t * jnp.exp2(x - highest) for x, t in stats]
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            acc = [x * spread(inverse, x.shape) for x in acc]

            @pl.when(own == 0)
            def _():
                out = [x * spread(shares[0], x.shape) for x in acc]
                for p in range(1, WARPGROUPS):
                    plgpu.barrier_wait(part_ready.at[p])
                    out = [x + take(c, COLUMNS, words_smem) * spread(shares[p], x.shape) for c, x in enumerate(out)]
                    if p < WARPGROUPS - 1:
                        plgpu.barrier_arrive(turn.at[p])
                finish(piece, subtile, out, highest, sum(shares[1:], shares[0]))
                plgpu.barrier_arrive(merged)

            for p in range(1, WARPGROUPS):

                @pl.when(own == p)
                def _(p=p):
                    if p > 1:
                        plgpu.barrier_wait(turn.at[p - 1])
                    for c, x in enumerate(acc):
                        put(c, x, words_smem)
                    plgpu.barrier_arrive(part_ready.at[p])

            return done + count, visited + 1

        def finish(piece, subtile, acc, m, total):
            """Adds the results of the request's later parts; writes the output, or what an earlier part will add."""
            part_index = tile * subtiles + subtile

            def part_lse(offset):
                return plgpu.load(lse_gmem.at[worker + offset, part_index], layout=ROW, optimized=False)

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
                    out + plgpu.load(parts.at[block_dims(c)], layout=WGMMA, optimized=False) * spread(weight, out.shape)
                    for c, out in enumerate(chunks)
                ]

            share = jnp.exp2(m - highest) * inverse
            chunks = merge(piece, add, [x * spread(share, x.shape) for x in acc])

            @pl.when(piece.part == 0)
            def _():
                sync()  # all warps have taken what lay there
                for c, out in enumerate(chunks):
                    dequantise.store_output(c, int6, out, o_smem)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o_smem, o_gmem.at[piece.request, columns(subtile)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(piece.part > 0)
            def _():
                for c, out in enumerate(chunks):
                    partial_gmem[worker, part_index, block_dims(c)] = out
                lse_gmem[worker, part_index] = highest + jnp.log2(total)
                plgpu.commit_smem()  # all threads have written
                pl.semaphore_signal(partial_ready.at[part_index, worker])

        def compute(own):
            plgpu.set_max_registers(registers(WARPGROUPS), action="increase")

            def attend_piece(piece, carry):
                return lax.fori_loop(0, subtiles, lambda subtile, carry: attend_rows(own, piece, subtile, carry), carry)

            _, visited = pieces(schedule_gmem, worker, attend_piece, (jnp.int32(0), jnp.int32(0)))
            pl.when((own > 0) & (visited > 0))(lambda: plgpu.barrier_wait(merged))
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup < WARPGROUPS)(lambda: compute(warpgroup))

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp):
                pl.when(warp < WARPGROUPS)(lambda: load_pages(warp))
                pl.when(warp == WARPGROUPS)(load_queries)

    scale_box = (2 * WARPGROUPS, *pages.scale.shape[1:])
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, LATENT), dtype),
            jax.ShapeDtypeStruct((workers, tiles * subtiles, LATENT, COLUMNS), jnp.float32),
            jax.ShapeDtypeStruct((workers, tiles * subtiles, BLOCK), jnp.float32),
        ),
        grid=(tiles, workers),
        grid_names=("tile", "worker"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((1, COLUMNS, LATENT), dtype, transforms=swizzled(dtype)),  # queries, soon in float16
            plgpu.SMEM((1, COLUMNS, ROPE), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM(
                (WARPGROUPS * slots, HALF, pages.latent.shape[2]), pages.latent.dtype, transforms=swizzled(pages.latent.dtype)
            ),
            plgpu.SMEM((WARPGROUPS, BLOCK, ROPE), pages.rope.dtype, transforms=swizzled(pages.rope.dtype)),
            plgpu.SMEM(scale_box, pages.scale.dtype),
            plgpu.SMEM((WARPGROUPS, COLUMNS, BLOCK), F16, transforms=swizzled(F16)),  # probabilities
            plgpu.SMEM((WARPGROUPS, 4 * COLUMNS), jnp.float32),  # reductions across warps
            plgpu.SMEM((WARPGROUPS, 2, BLOCK), jnp.float32),  # maxima and sums
            plgpu.RefUnion(
                plgpu.SMEM((LATENT * COLUMNS // 2,), jnp.uint32),  # another warpgroup's results, float16
                plgpu.SMEM((COLUMNS, LATENT), dtype, transforms=swizzled(dtype)),
            ),
            plgpu.Barrier(num_arrivals=2),  # queries full
            plgpu.Barrier(),  # queries converted
            plgpu.Barrier(num_arrivals=WARPGROUPS),  # queries free
            plgpu.Barrier(num_barriers=2 * WARPGROUPS),  # scales full
            plgpu.Barrier(num_barriers=2 * WARPGROUPS),  # scales free
            plgpu.Barrier(num_barriers=WARPGROUPS * slots),  # codes full
            plgpu.Barrier(num_barriers=WARPGROUPS * slots),  # codes free
            plgpu.Barrier(num_barriers=WARPGROUPS),  # rope keys full
            plgpu.Barrier(num_barriers=WARPGROUPS),  # rope keys free
            plgpu.Barrier(num_barriers=WARPGROUPS),  # statistics ready
            plgpu.Barrier(num_barriers=WARPGROUPS),  # a warpgroup's results are in their place
            plgpu.Barrier(num_barriers=WARPGROUPS),  # they have been taken from it
            plgpu.Barrier(),  # the piece is written
        ],
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=0),
    )
    out_BMC, _, _ = kernel(q_latent_BMC, q_rope_BMR, positions_BT, pages.latent, pages.rope, pages.scale, table_BP, *schedule)
    return vary_like(q_latent_BMC, out_BMC)


def block_dims(block: int):
    return pl.ds(block * DIMS, DIMS)
