"""Latent attention for training and prefill, exact and with bounded memory.

Queries go in chunks; each chunk sees only the keys up to its own end, so about half of the score matrix is never computed, and
the backward pass recomputes a chunk's scores instead of keeping them. Letters: see reference.py.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.einsum import einsum_float32
from pallas_kernels.reference import MASKED

CHUNK = 512  # queries; beyond 16 chunks they grow instead, to bound the size of the program


def mla_attention(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, *, scale: float) -> jax.Array:
    """See `reference.mla_attention`: same arguments, same result, differentiable."""
    length = q_nope_BTNH.shape[1]
    chunk = max(CHUNK, -(-length // 16))
    outs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        outs.append(
            _attend(
                q_nope_BTNH[:, start:end],
                q_rope_BTNR[:, start:end],
                k_nope_BTNH[:, :end],
                k_rope_BTR[:, :end],
                v_BTNV[:, :end],
                segment_ids_BT[:, start:end],
                segment_ids_BT[:, :end],
                scale,
            )
        )
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


@jax.checkpoint
def _attend(q_nope_BTNH, q_rope_BTNR, k_nope_BSNH, k_rope_BSR, v_BSNV, q_segment_BT, k_segment_BS, scale) -> jax.Array:
    """Attention of the last T of S positions over all S of them."""
    scores_BNTS = einsum_float32("btnh,bsnh->bnts", q_nope_BTNH, k_nope_BSNH)
    scores_BNTS += einsum_float32("btnr,bsr->bnts", q_rope_BTNR, k_rope_BSR)
    queries, keys = scores_BNTS.shape[2:]
    causal_TS = jnp.arange(keys - queries, keys)[:, None] >= jnp.arange(keys)
    visible_BTS = causal_TS & (q_segment_BT[:, :, None] == k_segment_BS[:, None, :])
    probs_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS * scale, MASKED), axis=-1)
    out_BTNV = einsum_float32("bnts,bsnv->btnv", probs_BNTS.astype(v_BSNV.dtype), v_BSNV)
    return out_BTNV.astype(q_nope_BTNH.dtype)
