"""Quantises rows to 8-bit floats on Hopper in one pass over memory; XLA takes two, one for the largest values.

In the same run on one H200: 98304 x 2048 in 173 us, XLA 424 (the bytes at a copy's rate: 142). A program takes 64 rows, 128 columns
at a time; the columns of few rows are dealt to several programs. Kernel-side names: x rows, v their 8-bit values.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PARAMS, SMS, WGMMA, spread, swizzled, vary_like

ROWS, BLOCK = 64, 128
STAGES = 4


@functools.partial(jax.jit, static_argnames=("least", "largest"))  # lowered once a shape
def quantise_rows(x_MK: jax.Array, least: float, largest: float) -> tuple[jax.Array, jax.Array]:
    """e4m3 values [M, K] and float32 scales [K / 128, M] of bfloat16 rows; a block's largest magnitude becomes `largest`."""
    rows, columns = x_MK.shape
    blocks = columns // BLOCK
    strips = pl.cdiv(rows, ROWS)
    parts = min(blocks, pl.cdiv(SMS, strips))

    def body(x_gmem, v_gmem, scale_gmem, x_smem, v_smem, scale_smem, full):
        mine = pl.ds(pl.multiple_of(lax.axis_index("strip") * ROWS, ROWS), ROWS)
        first, last = (lax.div((lax.axis_index("part") + i) * blocks, jnp.int32(parts)) for i in (0, 1))

        def fetch(i):
            slot, cols = lax.rem(i, jnp.int32(STAGES)), pl.ds((first + i) * BLOCK, BLOCK)
            copy = lambda: plgpu.copy_gmem_to_smem(x_gmem.at[mine, cols], x_smem.at[slot], full.at[slot])  # noqa: E731
            pl.when(first + i < last)(copy)

        for i in range(STAGES - 1):
            fetch(jnp.int32(i))

        def step(i, _):
            slot, out = lax.rem(i, jnp.int32(STAGES)), lax.rem(i, jnp.int32(2))
            plgpu.barrier_wait(full.at[slot])
            fetch(i + STAGES - 1)  # where the last step read: its commit_smem waited for all threads
            x = plgpu.load(x_smem.at[slot], layout=WGMMA, optimized=False).astype(jnp.float32)
            scale = jnp.maximum(jnp.max(jnp.abs(x), axis=1), least) * (1 / largest)
            values = (x * spread(1 / scale, (ROWS, BLOCK))).astype(v_smem.dtype)
            plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # all but the last step's two copies
            v_smem[out] = values
            scale_smem[out] = scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v_smem.at[out], v_gmem.at[mine, pl.ds((first + i) * BLOCK, BLOCK)])
            plgpu.copy_smem_to_gmem(scale_smem.at[out], scale_gmem.at[first + i, mine])

        lax.fori_loop(0, last - first, step, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct(x_MK.shape, jnp.float8_e4m3fn),
            # Of whole strips: a copy in one dimension does not end with its row.
            jax.ShapeDtypeStruct((blocks, strips * ROWS), jnp.float32),
        ],
        grid=(strips, parts),  # TMA reads rows beyond the end as zeros, and does not write them
        grid_names=("strip", "part"),
        kernel_name="quantise_rows",
        scratch_types=[
            plgpu.SMEM((STAGES, ROWS, BLOCK), x_MK.dtype, transforms=swizzled(x_MK.dtype)),
            plgpu.SMEM((2, ROWS, BLOCK), jnp.float8_e4m3fn, transforms=swizzled(jnp.float8_e4m3fn)),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES),
        ],
        compiler_params=PARAMS,
    )
    values_MK, scales_GM = vary_like(x_MK, kernel(x_MK))
    return values_MK, scales_GM[:, :rows]
