"""Grouped matmul of 8-bit floats for Hopper: rows in expert order, each times its own expert's matrix, partial sums in float32.

A tile is up to 192 rows by 128 columns, 64 rows for each of three consumers. A consumer multiplies its rows by 128 of K into a
fresh partial sum, and adds that, scaled, to its result while the others multiply. Rows are wgmma's M operand, so that a thread
holds two rows and needs the scales of two: with the weights there, as the bfloat16 kernel has them, every column has a scale of
its own, and loading and applying those took a kernel from 1370 to 1080 TFLOP/s (operands lying in shared memory). Where experts have
few rows there is one consumer, and the room goes to more stages: all that counts is to read the weights. Where tiles are too few
for all SMs, K is split, and XLA adds up the parts in the order of K, in float32.

On one H200, useful rows, and times as fast as our bfloat16 kernel in the same run: V2-Lite 98304 x 2048 x (64 x) 2816 1118 us (1014
TFLOP/s), 1.59; V2 49152 x 5120 x (160 x) 3072 1877 us (824), 1.46; in an earlier run 1084 us, 1.62, and 1696, 1.47, where two
consumers of 128 rows by 128 columns that took turns had 1168 us, 1.46, and 1745, 1.43. Decode: V2-Lite's 384 rows 109 us, 1.74;
V2's 1536 rows 618 us, where reading the weights takes 585. The chip is at its 700 W; V2's experts also pad their 307 rows to
multiples of 64, by a tenth.

Letters: M rows, K and F matmul dims, E experts, G and H blocks of 128 columns in K and F. Kernel-side names: x rows, w weights.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets
from pallas_kernels.hopper import PARAMS, ROW, SMS, WGMMA, drain, registers, spread, swizzled, vary_like

BLOCK = 128  # columns under one scale; of e4m3, one swizzled row
WAVE = 64  # rows of a consumer: wgmma's M
SLOTS = 2  # blocks of 64 rows x 128 bytes that a consumer can be storing


@functools.partial(jax.jit, static_argnames="row_unit")  # a model's many products of a few shapes: each is lowered once
def matmul(x, w, group_sizes_E: jax.Array, row_unit: int) -> jax.Array:
    """The grouped product of Fp8Rows and Fp8Weights in bfloat16, [M, F]. Rows of no group do not matter and are not written."""
    (rows, depth), (experts, columns, _) = x.values_MK.shape, w.values_EFK.shape
    consumers, stages = tiling(rows, experts)
    tile_rows = consumers * WAVE
    all_steps, column_tiles = depth // BLOCK, columns // BLOCK
    most_blocks = (rows - experts) // tile_rows + experts  # whatever the sizes
    parts, part_steps = split(all_steps, most_blocks * column_tiles, consumers)
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    width = 128 // jnp.dtype(dtype).itemsize  # columns stored at a time
    # TMA wants rows of a multiple of 16 bytes; the scales of four consecutive blocks come at a time.
    w_scales_EHG = jnp.pad(w.scales_EHG, ((0, 0), (0, 0), (0, -all_steps % 4)))
    piece = math.gcd(row_unit, WAVE)

    def body(x_gmem, xs_gmem, w_gmem, ws_gmem, sizes_gmem, out_gmem, x_smem, xs_smem, w_smem, ws_smem, *rest):
        out_smem, full, free, *ring = rest
        wg = lax.axis_index("wg")

        def stage(step):
            return lax.rem(step, jnp.int32(stages))

        def place(column):
            """The part, its first step and its number of steps, and the column tile in it."""
            part = lax.div(column, jnp.int32(column_tiles))
            begin = part * part_steps
            steps = part_steps if all_steps % part_steps == 0 else lax.min(jnp.int32(part_steps), all_steps - begin)
            return part, begin, steps, column - part * column_tiles

        @pl.when(wg == consumers + 1)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            columns = parts * column_tiles
            blocks = tickets.cut_rows(sizes_gmem, row_unit, row_unit, tile_rows, ring)
            describe = functools.partial(tickets.look_up, blocks, columns, tile_rows, _whole, ring)
            tickets.lead(describe, blocks.count * columns, ring, in_turn=most_blocks * columns <= SMS)

        @pl.when(wg == consumers)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def tile(fields, _, before):
                expert, first, column, height = fields
                _, begin, steps, column = place(column)

                def load(waves):
                    # Rows past the tile's own are another expert's, or none's: multiplied, and not stored.
                    there, here = pl.ds(pl.multiple_of(first, 8), waves * WAVE), pl.ds(0, waves * WAVE)

                    def step(i, _):
                        s, k = stage(before + i), begin + i
                        ks, four = pl.ds(k * BLOCK, BLOCK), pl.ds(pl.multiple_of(k // 4 * 4, 4), 4)
                        pl.when(before + i >= stages)(lambda: plgpu.barrier_wait(free.at[s]))
                        w = w_gmem.at[expert, pl.ds(column * BLOCK, BLOCK), ks]
                        plgpu.copy_gmem_to_smem(w, w_smem.at[s], full.at[s])
                        plgpu.copy_gmem_to_smem(x_gmem.at[there, ks], x_smem.at[s, here], full.at[s])
                        plgpu.copy_gmem_to_smem(xs_gmem.at[k, there], xs_smem.at[s, here], full.at[s])
                        plgpu.copy_gmem_to_smem(ws_gmem.at[expert, column, four], ws_smem.at[s, pl.ds(0, 4)], full.at[s])

                    lax.fori_loop(0, steps, step, None)

                for waves in range(1, consumers + 1):  # TMA boxes are static
                    pl.when(-(-height // WAVE) == waves)(lambda waves=waves: load(waves))
                return before + steps

            done = tickets.follow(tile, 4, jnp.int32(0), ring)
            drain(free, done, stages)

        @pl.when(wg < consumers)
        def _():
            plgpu.set_max_registers(registers(consumers, 2), action="increase")

            def tile(fields, _, before):
                _, first, column, height = fields
                part, begin, steps, column = place(column)
                first, height = pl.multiple_of(first, 8) + wg * WAVE, height - wg * WAVE
                mine = pl.ds(pl.multiple_of(wg * WAVE, WAVE), WAVE)

                def compute():
                    def step(i, total):
                        s = stage(before + i)
                        plgpu.barrier_wait(full.at[s])
                        scale = plgpu.load(xs_smem.at[s, mine], layout=ROW) * ws_smem[s, lax.rem(begin + i, jnp.int32(4))]

                        def multiply(partial):
                            plgpu.wgmma(partial, x_smem.at[s, mine], w_smem.at[s].transpose((1, 0)))
                            return partial[...]

                        partial = pl.run_scoped(multiply, plgpu.ACC((WAVE, BLOCK), jnp.float32))
                        plgpu.barrier_arrive(free.at[s])
                        return total + partial * spread(scale, (WAVE, BLOCK))

                    zeros = plgpu.layout_cast(jnp.zeros((WAVE, BLOCK), jnp.float32), WGMMA)
                    total = lax.fori_loop(0, steps, step, zeros)
                    for left in range(0, BLOCK, width):
                        store(total[:, left : left + width], left, left // width % SLOTS)

                def store(block, left, slot):
                    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    staged = out_smem.at[wg, slot]
                    staged[...] = block.astype(dtype)
                    plgpu.commit_smem()

                    def copy(top, count):
                        there = part, pl.ds(first + top, count), pl.ds(column * BLOCK + left, width)
                        plgpu.copy_smem_to_gmem(staged.at[pl.ds(top, count)], out_gmem.at[*there])

                    def copy_piece(i, _):
                        copy(pl.multiple_of(i * piece, 8), piece)

                    pl.when(height >= WAVE)(lambda: copy(0, WAVE))
                    pl.when(height < WAVE)(lambda: lax.fori_loop(0, height // piece, copy_piece, None))

                def skip():
                    def step(i, _):
                        s = stage(before + i)
                        plgpu.barrier_wait(full.at[s])
                        plgpu.barrier_arrive(free.at[s])

                    lax.fori_loop(0, steps, step, None)

                pl.when(height > 0)(compute)
                pl.when(height <= 0)(skip)
                return before + steps

            tickets.follow(tile, 4, jnp.int32(0), ring)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    e4m3, f32 = jnp.float8_e4m3fn, jnp.float32
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((parts, rows, columns), dtype),
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=consumers + 2,
        thread_name="wg",
        kernel_name="grouped_matmul_fp8",
        scratch_types=[
            plgpu.SMEM((stages, tile_rows, BLOCK), e4m3, transforms=swizzled(e4m3)),
            plgpu.SMEM((stages, tile_rows), f32),
            plgpu.SMEM((stages, BLOCK, BLOCK), e4m3, transforms=swizzled(e4m3)),
            plgpu.SMEM((stages, 32), f32),  # four are used: TMA writes at multiples of 128 bytes
            plgpu.SMEM((consumers, SLOTS, WAVE, width), dtype, transforms=swizzled(dtype)),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=consumers, num_barriers=stages),
            *tickets.ring(readers=consumers + 1, depth=2),
        ],
        compiler_params=PARAMS,
    )
    out_PMF = vary_like(
        x.values_MK, kernel(x.values_MK, x.scales_GM, w.values_EFK, w_scales_EHG, group_sizes_E.astype(jnp.int32))
    )
    return functools.reduce(operator.add, out_PMF).astype(jnp.bfloat16)


def _whole(rows, _, index, most):
    """A cut for `tickets.look_up`: all of an expert's blocks but the last are whole."""
    return index * most, jnp.minimum(rows - index * most, most)


def tiling(rows: int, experts: int) -> tuple[int, int]:
    """Consumers and stages of the ring of operands: by the mean rows of an expert; one alone fills a consumer."""
    return (1, 8) if rows <= max(WAVE, 32 * experts) else (3, 4)


def split(steps: int, tiles: int, consumers: int) -> tuple[int, int]:
    """Parts of K, as many as have an SM for each tile, and the steps of a part; the last may have fewer.

    A consumer writes 32 KiB, which are read again: as many bytes as the weights of four steps, and no other part has fewer.
    """
    parts = max(1, min(SMS // tiles, steps // (4 * consumers)))
    part_steps = -(-steps // parts)
    return -(-steps // part_steps), part_steps
