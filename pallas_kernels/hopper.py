"""What the Hopper kernels share: layouts, launch parameters, and ways around the compiler that more than one of them needs.

Kernels are written in Pallas Mosaic GPU. A program of three to five warpgroups runs on each SM: some compute, the others feed them
through the tensor memory accelerator (TMA). Shared memory that TMA fills and wgmma reads is tiled and swizzled; the two must agree.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

SMS = 132  # streaming multiprocessors of an H100 SXM or H200; a persistent kernel runs one program on each
WGMMA = plgpu.Layout.WGMMA
ROW, COL = WGMMA.reduce(1), WGMMA.reduce(0)  # of a vector with a value for each row, or each column, of a WGMMA array

PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
)


def registers(consumers: int, others: int = 1, each: int = 24) -> int:
    """Registers a thread for each of a program's `consumers`, if its `others` among the warpgroups keep `each`.

    All warpgroups start with the same number. One that asks for more than others have given back waits forever.
    """
    warpgroups = consumers + others
    start = min((1 << 16) // (128 * warpgroups) // 8 * 8, 240)
    return min((warpgroups * start - others * each) // consumers // 8 * 8, 240)


def swizzled(dtype, swizzle: int = 128) -> tuple:
    """The transforms of a shared-memory array whose rows are tiles of `swizzle` bytes."""
    width = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)


def spread(x: jax.Array, shape: tuple[int, int], dim: int = 0) -> jax.Array:
    """Broadcasts a vector in layout ROW (dim 0) or COL (dim 1) to a WGMMA array. (Layout inference fails on kept dimensions.)"""
    return lax.broadcast_in_dim(x, shape, [dim])


def drain(free, steps: jax.Array, stages: int, first: int = 0) -> None:
    """Waits until the last of `steps` uses of a ring are over: a program must not end with a completion nobody waited for."""

    def wait(step, _):
        plgpu.barrier_wait(free.at[first + lax.rem(step, jnp.int32(stages))])

    lax.fori_loop(jnp.maximum(steps - stages, 0), steps, wait, None)


def vary_like(x: jax.Array, outs):
    """What a kernel made of x, varying over the mesh as x does: inside `shard_map`, kernels' results do not say that they do."""

    def vary(out):
        axes = jax.typeof(x).manual_axis_type.varying - jax.typeof(out).manual_axis_type.varying
        return lax.pcast(out, tuple(axes), to="varying") if axes else out

    return jax.tree.map(vary, outs)
