"""Weight gradients of a grouped matmul for Hopper: dw[e] = x_e^T dy_e, the contraction over the expert's rows, for one or two dy.

A tile is 128 columns of x by 256 of dy: two consumers share the x tile and have 128 columns of dy each, of one array or of two
(gate and up). A tile may be five steps long, as long as it takes to store one, so the consumers must take turns at that: the
second one has a loader of its own, which begins `LAG` steps late, and stays behind. A fifth warpgroup takes the tickets.

One H200, rate over that of one dense cuBLAS matmul of the same FLOPs (kernel times, single calls of each in turn, medians), with
LAG 1, 2, 3 and x stages 4, 5, 6: V2-Lite, 1536 rows an expert, 0.905, 0.912, 0.928 (655 TFLOP/s); V2, 307 rows an expert, 0.699,
0.710, 0.734 (499 TFLOP/s). A fourth stage of dy changes nothing (0.910, 0.711), nor do tiles in the other order (0.928, 0.736).

Letters: M rows, A columns of x, B columns of dy, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets
from pallas_kernels.hopper import PARAMS, SMS, drain, registers, swizzled, vary_like

STEP = 64  # rows: wgmma wants a whole swizzled block of the contraction
SIDE = 128  # of a consumer's square of the result
LAG = 3


class Stages(NamedTuple):
    x: int  # more than dy by LAG: x stays until the second consumer has used it
    dy: int
    out: int  # blocks of 64 rows by 128 bytes that a consumer can be storing


STAGES = Stages(6, 3, 2)  # figures above; `python -m benchmarks.grouped_matmul --tune`


def weight_gradients(x_MA, dys_MB: list, group_sizes_E, row_unit: int, dtype: jnp.dtype) -> list[jax.Array]:
    """[x_e^T dy_e for each expert] for each dy: [E, A, B] in `dtype`, zero for experts without rows.

    Only rows of groups are used; those that pad a group to `row_unit` must be zero in x or dy, and finite in both.
    """
    rows, experts = x_MA.shape[0], group_sizes_E.shape[0]
    across, columns = x_MA.shape[1], dys_MB[0].shape[1]
    a_tiles, b_tiles = pl.cdiv(across, SIDE), pl.cdiv(columns, SIDE * 2 // len(dys_MB))
    tiles = experts * a_tiles * b_tiles
    units = STEP // row_unit  # of a step
    block = 128 // jnp.dtype(dtype).itemsize  # columns of the result that are stored at once
    x_stages, dy_stages, out_slots = STAGES

    def grouped_wgrad(x_gmem, *refs):
        dy_gmems, refs = refs[: len(dys_MB)], refs[len(dys_MB) :]
        first_gmem, units_gmem, *refs = refs
        dw_gmems, refs = refs[: len(dys_MB)], refs[len(dys_MB) :]
        x_smem, dy_smem, out_smem, x_full, x_free, dy_full, dy_free, begun, *ring = refs
        wg = lax.axis_index("wg")

        def slot(step, stages):
            return lax.rem(step, jnp.int32(stages))

        def columns_of(consumer, b):  # the array and the first column of a consumer's part of tile column b
            return (consumer, b * SIDE) if len(dys_MB) == 2 else (0, (2 * b + consumer) * SIDE)

        def load(gmem, cols, smem, full, first, height):
            """Up to STEP rows from unit `first`. Below `height` units the slot is filled with zeros, from beyond the array."""

            def whole():
                plgpu.copy_gmem_to_smem(gmem.at[pl.ds(first * row_unit, STEP), cols], smem, full)
                for _ in range(units - 1):
                    plgpu.barrier_arrive(full)

            def part():
                for i in range(units):
                    row = jnp.where(i < height, first + i, rows // row_unit) * row_unit
                    piece = smem.at[pl.ds(i * row_unit, row_unit)]
                    plgpu.copy_gmem_to_smem(gmem.at[pl.ds(row, row_unit), cols], piece, full)

            lax.cond(height >= units, whole, part)

        def load_dy(consumer, b, k, step, first, height):
            s = slot(step, dy_stages)
            place = consumer * dy_stages + s
            pl.when(step >= dy_stages)(lambda: plgpu.barrier_wait(dy_free.at[place]))
            array, column = columns_of(consumer, b)
            cols = pl.ds(column, SIDE)
            load(dy_gmems[array], cols, dy_smem.at[consumer, s], dy_full.at[place], first + k * units, height - k * units)

        @pl.when(wg == 4)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def describe(ticket, _):
                expert, inside = lax.div(ticket, jnp.int32(a_tiles * b_tiles)), lax.rem(ticket, jnp.int32(a_tiles * b_tiles))
                a, b = lax.rem(inside, jnp.int32(a_tiles)), lax.div(inside, jnp.int32(a_tiles))
                return expert, a, b, first_gmem[expert], units_gmem[expert]

            tickets.lead(describe, jnp.int32(tiles), ring)

        @pl.when(wg == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(fields, _, before):
                _, a, b, first, height = fields

                def step(k, _):
                    s = slot(before + k, x_stages)
                    pl.when(before + k >= x_stages)(lambda: plgpu.barrier_wait(x_free.at[s]))
                    load(x_gmem, pl.ds(a * SIDE, SIDE), x_smem.at[s], x_full.at[s], first + k * units, height - k * units)
                    load_dy(0, b, k, before + k, first, height)

                steps = pl.cdiv(height, units)
                lax.fori_loop(0, steps, step, None)
                return before + steps

            done = tickets.follow(tile, 5, jnp.int32(0), ring)
            drain(x_free, done, x_stages)
            drain(dy_free, done, dy_stages)

        @pl.when(wg == 3)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def tile(fields, _, before):
                _, _, b, first, height = fields
                steps = pl.cdiv(height, units)
                pl.when((before == 0) & (steps > LAG))(lambda: plgpu.barrier_wait(begun))
                lax.fori_loop(0, steps, lambda k, _: load_dy(1, b, k, before + k, first, height), None)
                return before + steps

            done = tickets.follow(tile, 5, jnp.int32(0), ring)
            drain(dy_free, done, dy_stages, dy_stages)

        @pl.when(wg < 2)
        def _():
            plgpu.set_max_registers(registers(2, 3, 40), action="increase")

            def tile(fields, _, before):
                expert, a, b, _, height = fields
                steps = pl.cdiv(height, units)

                def free(k):
                    plgpu.barrier_arrive(x_free.at[slot(before + k, x_stages)])
                    plgpu.barrier_arrive(dy_free.at[wg * dy_stages + slot(before + k, dy_stages)])

                def result(acc):
                    def step(k, _):
                        s_x, s_dy = slot(before + k, x_stages), slot(before + k, dy_stages)
                        plgpu.barrier_wait(x_full.at[s_x])
                        plgpu.barrier_wait(dy_full.at[wg * dy_stages + s_dy])
                        pl.when((wg == 0) & (before + k == LAG) & (before == 0))(lambda: plgpu.barrier_arrive(begun))
                        plgpu.wgmma(acc, x_smem.at[s_x].transpose((1, 0)), dy_smem.at[wg, s_dy])
                        plgpu.wgmma_wait(1)
                        pl.when(k > 0)(lambda: free(k - 1))

                    lax.fori_loop(0, steps, step, None)
                    product = acc[...].astype(dtype)
                    pl.when(steps > 0)(lambda: free(steps - 1))
                    for consumer in range(2) if len(dys_MB) == 2 else [wg]:
                        pl.when(wg == consumer)(lambda consumer=consumer: store(consumer, product))

                def store(consumer, product):
                    array, column = columns_of(consumer, b)
                    for i, (top, left) in enumerate((top, left) for top in range(0, SIDE, 64) for left in range(0, SIDE, block)):
                        staged = out_smem.at[consumer, i % out_slots]
                        plgpu.wait_smem_to_gmem(out_slots - 1, wait_read_only=True)
                        staged[...] = product[top : top + 64, left : left + block]
                        plgpu.commit_smem()
                        at = pl.ds(a * SIDE + top, 64), pl.ds(column + left, block)
                        plgpu.copy_smem_to_gmem(staged, dw_gmems[array].at[expert, *at])

                pl.run_scoped(result, plgpu.ACC((SIDE, SIDE), jnp.float32))
                return before + steps

            tickets.follow(tile, 5, jnp.int32(0), ring)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    scratch = [
        plgpu.SMEM((x_stages, STEP, SIDE), x_MA.dtype, transforms=swizzled(x_MA.dtype)),
        plgpu.SMEM((2, dy_stages, STEP, SIDE), x_MA.dtype, transforms=swizzled(x_MA.dtype)),
        plgpu.SMEM((2, out_slots, 64, block), dtype, transforms=swizzled(dtype)),
        plgpu.Barrier(num_arrivals=units, num_barriers=x_stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=x_stages),
        plgpu.Barrier(num_arrivals=units, num_barriers=2 * dy_stages),
        plgpu.Barrier(num_arrivals=1, num_barriers=2 * dy_stages),
        plgpu.Barrier(),
        *tickets.ring(readers=4, depth=4),
    ]
    kernel = plgpu.kernel(
        grouped_wgrad,
        out_type=[jax.ShapeDtypeStruct((experts, across, columns), dtype)] * len(dys_MB),
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=5,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=PARAMS,
    )
    units_E = (-(-group_sizes_E // row_unit)).astype(jnp.int32)
    return vary_like(x_MA, kernel(x_MA, *dys_MB, tickets.before(units_E), units_E))
