"""Log-probabilities in float32 with bounded memory.

Letters: B batch, T positions, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

from dsv2_jax.model import Decoder, head_logits
from sharding import specs

CHUNK = 1024  # positions whose logits exist at a time; beyond 16 chunks they grow instead


def log_probs(model: Decoder, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 [B, T]: the log-probability of each target. Logits exist one chunk at a time, in the backward pass too."""

    @jax.checkpoint
    def chunk_log_probs(w_head_DV, hidden_BTD, targets_BT):
        logits_BTV = head_logits(hidden_BTD, w_head_DV)
        return pick(logits_BTV, targets_BT) - jax.nn.logsumexp(logits_BTV, axis=-1)

    def island(w_head_DV, hidden_BTD, targets_BT):
        w_head_DV = jax.lax.pcast(w_head_DV, specs.BATCH, to="varying")  # one sum of its gradient over devices, not one a chunk
        length = hidden_BTD.shape[1]
        chunk = max(CHUNK, -(-length // 16))
        parts = [(hidden_BTD[:, s : s + chunk], targets_BT[:, s : s + chunk]) for s in range(0, length, chunk)]
        return jnp.concatenate([chunk_log_probs(w_head_DV, *part) for part in parts], axis=1)

    return jax.shard_map(island, out_specs=specs.tokens_BT)(model.w_head[...], hidden_BTD, targets_BT)


def pick(values_V: jax.Array, ids: jax.Array) -> jax.Array:
    """values[..., id] for [..., V] and [...]; a masked sum, which shards like its operands and has no scatter as its gradient."""
    return jnp.where(ids[..., None] == jnp.arange(values_V.shape[-1]), values_V, 0).sum(axis=-1)
