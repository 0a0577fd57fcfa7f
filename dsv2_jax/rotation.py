"""The same model with its latents in another basis: one in which 6 bits are enough (see pallas_kernels/latent_pages.py).

A latent is c = norm(x w_dkv) * g, and is used through w_uk and w_uv alone. With H orthogonal, norm(x w_dkv H) = norm(x w_dkv) H, so
w_dkv H, no gain, H' diag(g) w_uk and H' diag(g) w_uv make the same attention: the cache holds norm(x w_dkv) H, and nothing is
rotated as the model runs. H is `latent_pages.rotate`: each group of 32 channels is spread evenly over itself.
Letters: L layers, D model, C latent dim, N heads, X nope or value dim.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax.mla import MLA
from dsv2_jax.model import Decoder
from dsv2_jax.projections import exact
from pallas_kernels.latent_pages import rotate


def rotated(model: Decoder) -> Decoder:
    """The model in the new basis; weights that do not touch latents are shared with it, those that do are rounded anew."""
    turned = jax.tree.map(lambda leaf: leaf, model)
    for kind in ("dense", "moe"):
        if model.cfg.stack_size(kind):
            attn: MLA = getattr(turned, kind).attn
            for name, value in _weights(attn).items():
                setattr(attn, name, nnx.Param(value))
    return turned


@jax.jit
def _weights(attn: MLA) -> dict[str, jax.Array]:
    gain_LC = attn.kv_norm[...].astype(jnp.float32)

    def after(w_LCNX: jax.Array) -> jax.Array:
        """H' diag(g) w; H is its own transpose."""
        w_LNXC = jnp.moveaxis(w_LCNX.astype(jnp.float32), 1, -1) * gain_LC[:, None, None]
        return jnp.moveaxis(rotate(w_LNXC), -1, 1).astype(w_LCNX.dtype)

    return {
        "w_dkv": rotate(exact(attn.w_dkv)).astype(attn.w_kr.dtype),  # 8 bits become what its neighbour is of
        "kv_norm": jnp.ones_like(attn.kv_norm[...]),
        "w_uk": after(attn.w_uk[...]),
        "w_uv": after(attn.w_uv[...]),
    }
