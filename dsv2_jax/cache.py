"""The latent cache: what attention keeps of the past, 512 + 64 values a token and layer, never expanded keys or values.

Letters: L layers, B requests, S capacity in tokens, C latent dim, R rope dim, T new tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv2_jax.config import ModelConfig
from pallas_kernels.latent_pages import PAGE
from sharding import specs


class LatentCache(NamedTuple):
    """Normalised latents and rotated rope keys; the index along S is the token's position. Without L inside a layer."""

    c_kv_LBSC: jax.Array
    k_rope_LBSR: jax.Array


def empty(cfg: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> LatentCache:
    """A cache of zeros for `capacity` tokens at least, in whole pages; positions past a request's last token count for nothing."""
    shape = (cfg.num_hidden_layers, batch, -(-capacity // PAGE) * PAGE)
    return LatentCache(
        jnp.zeros((*shape, cfg.kv_lora_rank), dtype, out_sharding=specs.cache_LBSC),
        jnp.zeros((*shape, cfg.qk_rope_head_dim), dtype, out_sharding=specs.cache_LBSC),
    )


def write(layer: LatentCache, c_kv_BTC: jax.Array, k_rope_BTR: jax.Array, start_B: jax.Array) -> LatentCache:
    """Puts T new tokens of each request at its positions start, start + 1, ... Needs start + T <= capacity."""
    put = jax.vmap(lambda old_SX, new_TX, start: lax.dynamic_update_slice(old_SX, new_TX, (start, 0)))
    return LatentCache(put(layer.c_kv_LBSC, c_kv_BTC, start_B), put(layer.k_rope_LBSR, k_rope_BTR, start_B))
