"""Grouped matmul of 8-bit floats for Hopper: rows in expert order, each times its own expert's matrix, partial sums in float32.

A tile is up to 128 rows by 256 columns, 128 for each of two consumers. A consumer multiplies 64 rows by 128 columns by 128 of K
into a fresh partial sum, passes the turn to multiply to the other, and adds the sum, scaled, to its result. Taking turns also
keeps the compiler from giving two partial sums registers of their own, which do not fit: spilling, it took 750 TFLOP/s.

Rows are wgmma's M operand, so that a thread holds two rows and needs the scales of two. With the weights there, as the bfloat16
kernel has them, every column has a scale of its own: loading and applying those took a kernel from 1370 to 1080 TFLOP/s (operands
lying in shared memory).

On one H200, useful rows, against our bfloat16 kernel in alternation: V2-Lite 98304 x 2048 x (64 x) 2816 1057 TFLOP/s, 1.53 times
(1.45 to 1.60); V2 49152 x 5120 x (160 x) 3072 906, 1.51 (1.40 to 1.54); another run had 1016 and 897, 1.53 and 1.49. V2's decode of
1536 rows took 651 us, where reading the weights takes 585. The chip is at its 700 W, with 1.55 to 1.59 GHz and 1.40 to 1.44 GHz,
and of that the useful products are 60%; V2's experts also pad their 307 rows to multiples of 64, by a tenth.

Letters: M rows, K and F matmul dims, E experts, G and H blocks of 128 columns in K and F. Kernel-side names: x rows, w weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets
from pallas_kernels.hopper import PARAMS, ROW, SMS, WGMMA, drain, spread, swizzled, vary_like

STEP = 128  # of the contraction: columns under one scale, 128 bytes, one swizzled row
WAVE = 64  # rows of one partial sum: wgmma's M
ROWS, COLUMNS = 128, 256  # of a tile
STAGES = 3
SLOTS = 4  # blocks of 64 x 64 that a consumer can be storing: all of its tile


@functools.partial(jax.jit, static_argnames="row_unit")  # a model's many products of a few shapes: each is lowered once
def matmul(x, w, group_sizes_E: jax.Array, row_unit: int) -> jax.Array:
    """The grouped product of Fp8Rows and Fp8Weights in bfloat16, [M, F]. Rows of no group do not matter and are not written."""
    (rows, depth), (experts, columns, _) = x.values_MK.shape, w.values_EFK.shape
    steps, column_tiles = depth // STEP, pl.cdiv(columns, COLUMNS)
    table, count = tile_table(group_sizes_E, row_unit, column_tiles, (rows // ROWS + experts) * column_tiles)
    # TMA wants rows of a multiple of 16 bytes; four scales of consecutive blocks come at a time.
    w_scales_EHG = jnp.pad(w.scales_EHG, ((0, 0), (0, 0), (0, -steps % 4)))
    piece = min(row_unit, WAVE)

    def body(
        x_gmem, xs_gmem, w_gmem, ws_gmem, table_gmem, count_gmem, out_gmem, x_smem, xs_smem, w_smem, ws_smem, out_smem, *rest
    ):
        full, free, turn, *ring = rest
        wg = lax.axis_index("wg")

        def stage(step):
            return lax.rem(step, jnp.int32(STAGES))

        def per_height(height, f):  # TMA boxes are static
            pl.when(height > WAVE)(lambda: f(2))
            pl.when(height <= WAVE)(lambda: f(1))

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(fields, before):
                expert, first, column, height = fields
                first = pl.multiple_of(first, 8)

                def load(waves):
                    def step(k, _):
                        s, ks = stage(before + k), pl.ds(k * STEP, STEP)
                        pl.when(before + k >= STAGES)(lambda: plgpu.barrier_wait(free.at[s]))
                        # Rows past the tile's own are another expert's, or none's: multiplied, and not stored.
                        there = pl.ds(first, waves * WAVE)
                        here = pl.ds(0, waves * WAVE)
                        cols = pl.ds(column * COLUMNS, COLUMNS)
                        blocks = pl.ds(column * 2, 2), pl.ds(pl.multiple_of(k // 4 * 4, 4), 4)
                        plgpu.copy_gmem_to_smem(w_gmem.at[expert, cols, ks], w_smem.at[s], full.at[s])
                        plgpu.copy_gmem_to_smem(x_gmem.at[there, ks], x_smem.at[s, here], full.at[s])
                        plgpu.copy_gmem_to_smem(xs_gmem.at[k, there], xs_smem.at[s, here], full.at[s])
                        plgpu.copy_gmem_to_smem(ws_gmem.at[expert, *blocks], ws_smem.at[s, pl.ds(0, 2)], full.at[s])

                    lax.fori_loop(0, steps, step, None)

                per_height(height, load)
                return before + steps

            def describe(ticket):
                return [table_gmem[i, ticket] for i in range(4)]

            done, finish = tickets.lead(describe, tile, jnp.int32(0), count_gmem[0], ring)
            finish()
            drain(free, done, STAGES)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))

            def tile(fields, _, before):
                _, first, column, height = fields
                first = pl.multiple_of(first, 8)

                def compute(waves):
                    def step(k, sums):
                        s = stage(before + k)
                        plgpu.barrier_wait(full.at[s])
                        w_scale = ws_smem[s, wg, lax.rem(k, jnp.int32(4))]
                        added = []
                        for wave, total in enumerate(sums):
                            here = pl.ds(wave * WAVE, WAVE)
                            scale = plgpu.load(xs_smem.at[s, here], layout=ROW) * w_scale
                            plgpu.barrier_wait(turn.at[wg])

                            def multiply(partial, here=here):
                                columns = w_smem.at[s, pl.ds(wg * 128, 128)].transpose((1, 0))
                                plgpu.wgmma(partial, x_smem.at[s, here], columns)
                                plgpu.barrier_arrive(turn.at[1 - wg])
                                return partial[...]

                            partial = pl.run_scoped(multiply, plgpu.ACC((WAVE, 128), jnp.float32))
                            if wave == waves - 1:
                                plgpu.barrier_arrive(free.at[s])
                            added.append(total + partial * spread(scale, (WAVE, 128)))
                        return tuple(added)

                    zeros = plgpu.layout_cast(jnp.zeros((WAVE, 128), jnp.float32), WGMMA)
                    for wave, total in enumerate(lax.fori_loop(0, steps, step, (zeros,) * waves)):
                        for half in range(2):
                            store(total[:, half * 64 : half * 64 + 64], wave, half, (2 * wave + half) % SLOTS)

                def store(block, wave, half, slot):
                    plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
                    staged = out_smem.at[wg, slot]
                    staged[...] = block.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    top, cols = wave * WAVE, pl.ds(column * COLUMNS + wg * 128 + half * 64, 64)

                    def copy(begin, count):
                        here = staged.at[pl.ds(begin, count)]
                        plgpu.copy_smem_to_gmem(here, out_gmem.at[pl.ds(first + top + begin, count), cols])

                    def copy_piece(i, _):
                        copy(pl.multiple_of(i * piece, 8), piece)

                    pl.when(height >= top + WAVE)(lambda: copy(0, WAVE))
                    pl.when(height < top + WAVE)(lambda: lax.fori_loop(0, (height - top) // piece, copy_piece, None))

                per_height(height, compute)
                return before + steps

            tickets.follow(tile, 4, jnp.int32(0), count_gmem[0], ring)
            pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))  # a program must not end with a turn that nobody took
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    e4m3, f32 = jnp.float8_e4m3fn, jnp.float32
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), jnp.bfloat16),
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        kernel_name="grouped_matmul_fp8",
        scratch_types=[
            plgpu.SMEM((STAGES, ROWS, STEP), e4m3, transforms=swizzled(e4m3)),
            plgpu.SMEM((STAGES, ROWS), f32),
            plgpu.SMEM((STAGES, COLUMNS, STEP), e4m3, transforms=swizzled(e4m3)),
            plgpu.SMEM((STAGES, 8, 4), f32),  # two rows are used: TMA writes at multiples of 128 bytes
            plgpu.SMEM((2, SLOTS, WAVE, 64), jnp.bfloat16, transforms=swizzled(jnp.bfloat16)),
            plgpu.Barrier(num_arrivals=4, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=2),
            *tickets.ring(readers=2, depth=2),
        ],
        compiler_params=PARAMS,
    )
    return vary_like(x.values_MK, kernel(x.values_MK, x.scales_GM, w.values_EFK, w_scales_EHG, table, count))


def tile_table(group_sizes_E: jax.Array, row_unit: int, columns: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """int32 [4, capacity] = expert, first row, column tile, rows of each tile, and the number of tiles [1].

    All of an expert's tiles but the last are whole: equal ones can take more waves of 64 rows.
    """
    rows_E = -(-group_sizes_E // row_unit) * row_unit
    e, row, column, count = tickets.deal(-(-rows_E // ROWS), columns, capacity)
    above = row * ROWS
    fields = [e, (jnp.cumsum(rows_E) - rows_E)[e] + above, column, jnp.minimum(rows_E[e] - above, ROWS)]
    return jnp.stack(fields).astype(jnp.int32), count
