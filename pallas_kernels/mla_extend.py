"""Naive attention of many new tokens to what pages hold of their requests, and to each other.

The past is expanded to keys and values of every head, some thousand tokens at a time, and the parts are added by their sums of
exponentials. A token of the past then costs a head 320 multiply-adds for each query, where absorbed attention (mla_decode.py) takes
1,088, and 131,072 once, for its expansion: fewer from 171 queries on, whatever the number of heads, as far as the past fills its parts.
The memory does not grow with the past.

Letters: see reference.py; T new tokens, S tokens of a part, P pages of a request.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import latent_pages
from pallas_kernels.latent_pages import PAGE, LatentPages
from pallas_kernels.mla_attention import part_of_attention

# Tokens of all requests that are expanded at a time. Fewer leave less empty and take less memory; but where there can be several parts,
# the host is asked before each whether to go on (XLA's loops of unknown length), in every layer. 4,096: 2 x 134 MB with 128 heads.
PART = 4096


def mla_extend(
    q_nope_BTNH: jax.Array,
    q_rope_BTNR: jax.Array,
    c_kv_BTC: jax.Array,
    k_rope_BTR: jax.Array,
    pages: LatentPages,
    table_BP: jax.Array,
    past_B: jax.Array,
    w_uk_CNH: jax.Array,
    w_uv_CNV: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """See `reference.mla_extend`: same arguments, same result.

    Args:
        pages: what the table names behind a request's past does not count, whatever it holds.
        past_B: -1 is as good as 0.
        implementation: of the parts, see `part_of_attention`.
    """
    dtype = q_nope_BTNH.dtype

    def attend(c_kv_BSC, k_rope_BSR, keys_B):
        k_nope_BSNH = jnp.einsum("bsc,cnh->bsnh", c_kv_BSC, w_uk_CNH)
        v_BSNV = jnp.einsum("bsc,cnv->bsnv", c_kv_BSC, w_uv_CNV)
        operands = q_nope_BTNH, q_rope_BTNR, k_nope_BSNH, k_rope_BSR, v_BSNV
        out_BTNV, lse_BTN = part_of_attention(*operands, keys_B, scale=scale, implementation=implementation)
        return out_BTNV.astype(jnp.float32), lse_BTN

    width = min(max(PART // len(table_BP) // PAGE, 1), table_BP.shape[1])  # pages of a part
    table_BP = jnp.pad(table_BP, ((0, 0), (0, -table_BP.shape[1] % width)))

    def add(index, state):
        out_BTNV, lse_BTN = state
        left_B = past_B - index * width * PAGE
        c_kv_BSC, k_rope_BSR = latent_pages.read(pages, lax.dynamic_slice_in_dim(table_BP, index * width, width, axis=1), dtype)
        there_BS1 = (jnp.arange(width * PAGE) < left_B[:, None])[..., None]  # the rest are, or were, tokens of others
        c_kv_BSC, k_rope_BSR = (jnp.where(there_BS1, x_BSX, 0) for x_BSX in (c_kv_BSC, k_rope_BSR))
        new_BTNV, new_lse_BTN = attend(c_kv_BSC, k_rope_BSR, jnp.clip(left_B, 1, width * PAGE))
        new_lse_BTN = jnp.where(left_B[:, None, None] > 0, new_lse_BTN, -jnp.inf)  # a request whose past has ended
        sum_BTN = jnp.logaddexp2(lse_BTN, new_lse_BTN)
        old_share_BTN, new_share_BTN = jnp.exp2(lse_BTN - sum_BTN), jnp.exp2(new_lse_BTN - sum_BTN)
        return out_BTNV * old_share_BTN[..., None] + new_BTNV * new_share_BTN[..., None], sum_BTN

    parts = -(-past_B.max() // (width * PAGE)) if table_BP.shape[1] > width else 1
    out_BTNV, _ = lax.fori_loop(0, parts, add, attend(c_kv_BTC, k_rope_BTR, None))
    return out_BTNV.astype(dtype)
