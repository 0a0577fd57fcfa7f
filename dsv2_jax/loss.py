"""Log-probabilities in float32 with bounded memory.

Letters: B batch, T positions, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

from dsv2_jax.model import Decoder

CHUNK = 1024  # positions whose logits exist at a time; beyond 16 chunks they grow instead


def log_probs(model: Decoder, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 [B, T]: the log-probability of each target. Logits exist one chunk at a time, in the backward pass too."""

    @jax.checkpoint
    def chunk_log_probs(model: Decoder, hidden_BTD, targets_BT):
        logits_BTV = model.logits(hidden_BTD)
        return pick(logits_BTV, targets_BT) - jax.nn.logsumexp(logits_BTV, axis=-1)

    length = hidden_BTD.shape[1]
    chunk = max(CHUNK, -(-length // 16))
    starts = range(0, length, chunk)
    return jnp.concatenate(
        [chunk_log_probs(model, hidden_BTD[:, s : s + chunk], targets_BT[:, s : s + chunk]) for s in starts], axis=1
    )


def pick(values_V: jax.Array, ids: jax.Array) -> jax.Array:
    """values[..., id] for [..., V] and [...]; a masked sum, which shards like its operands and has no scatter as its gradient."""
    return jnp.where(ids[..., None] == jnp.arange(values_V.shape[-1]), values_V, 0).sum(axis=-1)
