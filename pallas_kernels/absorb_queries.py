"""Queries brought into the latent space, each head's by its own matrix: the first product of absorbed attention (paper 2.1.2).

Letters: M tokens, N heads, X and H dims of a whole query and of the part that has no position, C latent dim.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dispatch import choose
from pallas_kernels.hopper import PARAMS, swizzled, vary_like

FEW = 256  # tokens that are one operand of a wgmma
BLOCK = 64  # latents of a program


def absorb_queries(q_MNX: jax.Array, w_uk_CNH: jax.Array, implementation: str | None = None) -> jax.Array:
    """The first H dims of each head's query times its matrix: [M, N, C] in q's dtype, summed in float32 on a GPU.

    For few tokens one Hopper kernel reads the queries as they lie; otherwise their parts are copied apart and multiplied by XLA.

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason.
    """
    if choose(implementation, unsupported(q_MNX, w_uk_CNH)) == "pallas":
        return _absorb_hopper(q_MNX, w_uk_CNH)
    return jnp.einsum("mnh,cnh->mnc", q_MNX[..., : w_uk_CNH.shape[2]], w_uk_CNH)


def unsupported(q_MNX: jax.Array, w_uk_CNH: jax.Array) -> str | None:
    """Why the Hopper kernel cannot take these operands; None if it can."""
    if not q_MNX.dtype == w_uk_CNH.dtype == jnp.bfloat16:
        return f"queries and weights are {q_MNX.dtype} and {w_uk_CNH.dtype}, expected bfloat16"
    if len(q_MNX) % 8 or not 0 < len(q_MNX) <= FEW:
        return f"there are {len(q_MNX)} tokens, expected a multiple of 8 up to {FEW}"
    latent, _, nope = w_uk_CNH.shape
    if latent % BLOCK or latent < 2 * BLOCK or nope not in (128, 192, 256):
        return f"latent and nope dims are {latent} and {nope}, expected multiples of 64 from 128 up, the latter to 256"
    if q_MNX.shape[2] % 8:
        return f"queries have {q_MNX.shape[2]} dims, expected a multiple of 8"
    return None


@jax.jit  # lowered once a shape
def _absorb_hopper(q_MNX, w_uk_CNH):
    tokens, heads, _ = q_MNX.shape
    latent, _, nope = w_uk_CNH.shape
    dtype = q_MNX.dtype

    def body(q_gmem, w_gmem, out_gmem, q_smem, w_smem, out_smem, full):
        head, latents = lax.axis_index("head"), pl.ds(lax.axis_index("block") * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(w_gmem.at[latents, head], w_smem, full)
        plgpu.copy_gmem_to_smem(q_gmem.at[:, head, pl.ds(0, nope)], q_smem, full)
        plgpu.barrier_wait(full)

        def multiply(acc):  # wgmma's 64 rows are latents, its columns tokens, however few
            plgpu.wgmma(acc, w_smem, q_smem.transpose((1, 0)))
            return acc[...]

        out_smem.transpose((1, 0))[...] = pl.run_scoped(multiply, plgpu.ACC((BLOCK, tokens), jnp.float32)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem.at[:, head, latents])
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((tokens, heads, latent), dtype),
        grid=(heads, latent // BLOCK),
        grid_names=("head", "block"),
        kernel_name="absorb_queries",
        scratch_types=[
            plgpu.SMEM((tokens, nope), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((BLOCK, nope), dtype, transforms=swizzled(dtype)),
            plgpu.SMEM((tokens, BLOCK), dtype, transforms=swizzled(dtype)),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=PARAMS,
    )
    return vary_like(q_MNX, kernel(q_MNX, w_uk_CNH))
