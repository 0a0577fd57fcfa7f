"""Grouped expert matmul for Hopper: rows in expert order, each times its own expert's matrix; also two such products in one.

The weights are wgmma's M operand (out^T = w^T x^T), so that a tile is any multiple of 16 rows tall, and an expert's rows are cut
into equally tall tiles: no row is multiplied in vain but those that pad an expert to `row_unit`. A tile is 256 columns wide, 128
for each of two consumers, which share the rows in shared memory and have a ring of weights each. The second consumer's weights
come `LAG` steps later, so that one consumer stores its result while the other keeps the tensor cores busy. (Where few experts have
rows at all, there is but one.) Another warpgroup loads, and another takes tickets.

One H200, rate over that of one dense cuBLAS matmul of the same FLOPs in the same run (SwiGLU's of a later run than the others, after its
division had become a reciprocal root, 1.5% of V2's time): V2-Lite, 98304 rows, row_unit 32: forward 0.924
(668 TFLOP/s), gate and up with SwiGLU 0.905, input gradient 0.939; V2, 49152 rows, row_unit 16: 0.930 (592), 0.896, 0.895. V2 decode,
1536 rows: 1162 us, where the weights' bytes take 1171 at the rate of a copy. In an earlier run, beside 0.929 for V2-Lite's forward
and 0.944 for V2's: row_unit 16 for V2-Lite 0.925; LAG 0 with 3 x stages and 3 out_slots 0.916 and 0.938; tiles of 160 rows with 3
out_slots 0.925 for V2-Lite. One token's six experts of V2-Lite, both products: 34 us, with two consumers 42.

Letters: M rows, A and B matmul dims (B of the result), D model, F hidden, E experts. Kernel-side names: x rows, w weights.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets
from pallas_kernels.hopper import COL, PARAMS, SMS, drain, registers, spread, swizzled, vary_like

STEP = 64  # of the contraction: 128 bytes of bfloat16, one swizzled row
LAG = 1


class Tiling(NamedTuple):
    """Heights are multiples of `unit` up to `rows`; the kernel holds a copy of its loop for each."""

    consumers: int
    unit: int
    rows: int
    x_stages: int  # more than w_stages by LAG where a second consumer uses the rows later
    w_stages: int
    out_slots: int  # blocks of 64 x 64 a consumer can be storing


def tiling(row_unit: int, rows: int, experts: int) -> Tiling:
    """By the mean rows of an expert: figures above; `python -m benchmarks.grouped_matmul --tune` measures the last again."""
    if row_unit <= 32 and rows <= 48 * experts:  # decode: the weights' bytes are all that counts
        if rows <= 16 * experts:  # those of a few experts: narrow tiles, so that all SMs read
            return Tiling(1, row_unit, 32, 9, 9, 2)
        return Tiling(2, row_unit, 32, 6, 5, 2)
    return Tiling(2, row_unit, min(192, rows // row_unit * row_unit), 4, 3, 2)


def matmul(xs_MA: list, ws: list, group_sizes_E: jax.Array, row_unit: int, transposed: bool = False) -> jax.Array:
    """The sum of the grouped products x @ w over the operand pairs: [M, B].

    Weights are [E, A, B], or, `transposed`, [E, B, A] and read as they lie. Rows of no group are neither read nor written.
    """
    return _launch(xs_MA, ws, None, group_sizes_E, row_unit, transposed, outs=1)[0]


def swiglu(x_MD, weight_M, w_gate_EDF, w_up_EDF, group_sizes_E, row_unit: int, save: bool) -> list[jax.Array]:
    """[weight * silu(x @ w_gate) * (x @ w_up)], rounded once, and with `save` both products too: each [M, F].

    Of fewer rows than weights, `row_unit` at most, each group has all.
    """
    x_MD = jnp.pad(x_MD, ((0, -len(x_MD) % 8), (0, 0)))  # TMA reads tiles of eight rows
    return _launch([x_MD], [w_gate_EDF, w_up_EDF], weight_M, group_sizes_E, row_unit, False, outs=3 if save else 1)


def _equal(units, blocks, index, _):
    """A cut for `tickets.look_up`: blocks as equal as can be."""
    height, taller = units // blocks, units % blocks
    return index * height + jnp.minimum(index, taller), height + (index < taller)


def _launch(xs_MA, ws, weight_M, group_sizes_E, row_unit: int, transposed: bool, outs: int) -> list[jax.Array]:
    dtype, gated = xs_MA[0].dtype, weight_M is not None
    rows = len(weight_M if gated else xs_MA[0])
    same = len(xs_MA[0]) < rows  # for every group; a tile's further rows, past the end of x, come as zeros
    columns = ws[0].shape[1 if transposed else 2]
    width = 64 if gated else 128  # of a consumer's result
    t = tiling(row_unit, rows, len(group_sizes_E))
    consumers = range(t.consumers)
    steps = [x.shape[1] // STEP for x in xs_MA]
    total_steps = sum(steps)
    column_tiles = pl.cdiv(columns, t.consumers * width)

    def grouped_matmul(*refs):
        (sizes_gmem, *weight_gmem), refs = refs[: 1 + gated], refs[1 + gated :]
        x_gmems, refs = refs[: len(xs_MA)], refs[len(xs_MA) :]
        w_gmems, refs = refs[: len(ws)], refs[len(ws) :]
        out_gmems, refs = refs[:outs], refs[outs:]
        x_smem, w_smem, out_smem, x_full, x_free, w_full, w_free, *ring = refs
        wg = lax.axis_index("wg")

        def slot(step, stages):
            return lax.rem(step, jnp.int32(stages))

        def per_height(units, f):  # wgmma shapes and TMA boxes are static
            for height in range(t.unit, t.rows + 1, t.unit):
                pl.when(units == height // t.unit)(lambda height=height: f(height))

        def per_pair(k, f):  # f(pair, columns of the contraction) for the pair that step k belongs to
            first = 0
            for pair, n in enumerate(steps):
                call = lambda pair=pair, first=first: f(pair, pl.ds((k - first) * STEP, STEP))  # noqa: E731
                pl.when((k >= first) & (k < first + n))(call) if len(steps) > 1 else call()
                first += n

        def load_rows(first, height, k, step):
            s = slot(step, t.x_stages)
            pl.when(step >= t.x_stages)(lambda: plgpu.barrier_wait(x_free.at[s]))

            def copy(pair, ks):
                x = x_gmems[pair].at[pl.ds(0 if same else first, height), ks]
                plgpu.copy_gmem_to_smem(x, x_smem.at[s, pl.ds(0, height)], x_full.at[s])

            per_pair(k, copy)

        def load_weights(consumer, expert, column, k, step):
            s = slot(step, t.w_stages)
            place = consumer * t.w_stages + s
            pl.when(step >= t.w_stages)(lambda: plgpu.barrier_wait(w_free.at[place]))
            cols = pl.ds((t.consumers * column + consumer) * width, width)

            def copy(pair, ks):
                w = w_gmems[pair]
                w = w.at[expert, cols, ks] if transposed else w.at[expert, ks, cols]
                plgpu.copy_gmem_to_smem(w, w_smem.at[consumer, s], w_full.at[place])

            if gated:
                for i, w in enumerate(w_gmems):
                    w = w.at[expert, pl.ds(k * STEP, STEP), cols]
                    plgpu.copy_gmem_to_smem(w, w_smem.at[consumer, s, i], w_full.at[place])
            else:
                per_pair(k, copy)

        @pl.when(wg == t.consumers + 1)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def attach(fields, words, barrier):  # the row weights, as integers
                plgpu.copy_gmem_to_smem(weight_gmem[0].at[pl.ds(fields[1] * t.unit, t.rows)], words, barrier)

            most = t.rows // t.unit
            blocks = tickets.cut_rows(sizes_gmem, t.unit, 1, most, ring)
            describe = functools.partial(tickets.look_up, blocks, column_tiles, most, _equal, ring)
            tickets.lead(describe, blocks.count * column_tiles, ring, attach if gated else None, in_turn=t.consumers == 1)

        @pl.when(wg == t.consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def tile(fields, _, carry):
                before, expert0, column0 = carry  # of the tile before this one, whose last steps the second consumer awaits
                expert, first, column, units = fields
                first = first * t.unit

                def load(height):
                    def both(k, _):
                        load_rows(first, height, k, before + k)
                        load_weights(0, expert, column, k, before + k)

                    def head(k, _):
                        both(k, None)
                        for consumer in consumers[1:]:
                            late = functools.partial(load_weights, consumer, expert0, column0)
                            pl.when(before > 0)(lambda late=late: late(total_steps - LAG + k, before + k - LAG))

                    def rest(k, _):
                        both(k, None)
                        for consumer in consumers[1:]:
                            load_weights(consumer, expert, column, k - LAG, before + k - LAG)

                    lax.fori_loop(0, LAG, head, None)
                    lax.fori_loop(LAG, total_steps, rest, None)

                per_height(units, load)
                return before + total_steps, expert, column

            zero = jnp.int32(0)
            done, expert, column = tickets.follow(tile, 4, (zero, zero, zero), ring)

            def flush(k, _):
                for consumer in consumers[1:]:
                    load_weights(consumer, expert, column, total_steps - LAG + k, done - LAG + k)

            pl.when(done > 0)(lambda: lax.fori_loop(0, LAG, flush, None))
            drain(x_free, done, t.x_stages)
            for consumer in consumers:
                drain(w_free, done, t.w_stages, consumer * t.w_stages)

        @pl.when(wg < t.consumers)
        def _():
            plgpu.set_max_registers(registers(t.consumers, 2), action="increase")

            def tile(fields, ring_slot, before):
                _, first, column, units = fields
                first, column = first * t.unit, t.consumers * column + wg

                def free(k):
                    plgpu.barrier_arrive(x_free.at[slot(before + k, t.x_stages)])
                    plgpu.barrier_arrive(w_free.at[wg * t.w_stages + slot(before + k, t.w_stages)])

                def compute(height):
                    def multiply(acc, k):
                        s_x, s_w = slot(before + k, t.x_stages), slot(before + k, t.w_stages)
                        plgpu.barrier_wait(x_full.at[s_x])
                        plgpu.barrier_wait(w_full.at[wg * t.w_stages + s_w])
                        x = x_smem.at[s_x, pl.ds(0, height)].transpose((1, 0))
                        if gated:
                            for i in range(2):
                                plgpu.wgmma(acc.at[i * 64 : (i + 1) * 64], w_smem.at[wg, s_w, i].transpose((1, 0)), x)
                        else:
                            w = w_smem.at[wg, s_w]
                            plgpu.wgmma(acc, w if transposed else w.transpose((1, 0)), x)

                    def result(acc):
                        multiply(acc, 0)

                        def step(k, _):
                            multiply(acc, k)
                            plgpu.wgmma_wait(2 if gated else 1)  # all but this step's products are done
                            free(k - 1)

                        lax.fori_loop(1, total_steps, step, None)
                        product = acc[...]
                        free(total_steps - 1)
                        store(product)

                    def store(product):
                        stored = 0
                        for top in range(0, height, 64):
                            block = min(64, height - top)
                            for left in range(0, width, 64):
                                values = [product[left : left + 64, top : top + block]]
                                if gated:
                                    gate, up = values[0], product[64:, top : top + block]
                                    weight = plgpu.load(tickets.words(ring, ring_slot).at[pl.ds(top, block)], layout=COL)
                                    weight = lax.bitcast_convert_type(weight, jnp.float32)
                                    root = lax.rsqrt(1.0 + jnp.exp(-gate))  # of the sigmoid: a division is many instructions
                                    hidden = gate * (root * root) * up * spread(weight, (64, block), 1)
                                    values = [hidden, gate, up][:outs]
                                for value, out_gmem in zip(values, out_gmems):
                                    staged = out_smem.at[wg, stored % t.out_slots, pl.ds(0, block)]
                                    stored += 1
                                    value = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA)
                                    plgpu.wait_smem_to_gmem(t.out_slots - 1, wait_read_only=True)
                                    staged.transpose((1, 0))[...] = value
                                    plgpu.commit_smem()
                                    at = pl.ds(first + top, block), pl.ds(column * width + left, 64)
                                    plgpu.copy_smem_to_gmem(staged, out_gmem.at[*at])

                    pl.run_scoped(result, plgpu.ACC((128, height), jnp.float32))

                def skip(k, _):
                    plgpu.barrier_wait(x_full.at[slot(before + k, t.x_stages)])
                    plgpu.barrier_wait(w_full.at[wg * t.w_stages + slot(before + k, t.w_stages)])
                    free(k)

                if pl.cdiv(columns, width) % t.consumers:  # the last tile has nothing for the second consumer
                    inside = column * width < columns
                    lax.cond(inside, lambda: per_height(units, compute), lambda: lax.fori_loop(0, total_steps, skip, None))
                else:
                    per_height(units, compute)
                return before + total_steps

            tickets.follow(tile, 4, jnp.int32(0), ring)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    tile_of_w = (2, STEP, 64) if gated else (128, STEP) if transposed else (STEP, 128)
    block = min(64, t.rows)
    transforms = swizzled(dtype)
    scratch = [
        plgpu.SMEM((t.x_stages, t.rows, STEP), dtype, transforms=transforms),
        plgpu.SMEM((t.consumers, t.w_stages, *tile_of_w), dtype, transforms=transforms),
        plgpu.SMEM((t.consumers, t.out_slots, block, 64), dtype, transforms=transforms),
        plgpu.Barrier(num_arrivals=1, num_barriers=t.x_stages),
        plgpu.Barrier(num_arrivals=t.consumers, num_barriers=t.x_stages),
        plgpu.Barrier(num_arrivals=1 + gated, num_barriers=t.consumers * t.w_stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=t.consumers * t.w_stages),
        *tickets.ring(readers=t.consumers + 1, depth=2, attached=t.rows if gated else 0),
    ]
    kernel = plgpu.kernel(
        grouped_matmul,
        out_type=[jax.ShapeDtypeStruct((rows, columns), dtype)] * outs,
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=t.consumers + 2,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=PARAMS,
    )
    weight = [lax.bitcast_convert_type(weight_M, jnp.int32)] if gated else []
    return vary_like(xs_MA[0], kernel(group_sizes_E.astype(jnp.int32), *weight, *xs_MA, *ws))
