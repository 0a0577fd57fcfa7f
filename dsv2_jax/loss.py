"""Log-probabilities in float32 with bounded memory: logits exist a chunk of positions at a time, and are made once.

Letters: B batch, T positions, D model, V vocabulary.
"""

import jax
import jax.numpy as jnp

from dsv2_jax.model import Decoder, head_logits
from pallas_kernels.einsum import einsum_float32
from sharding import specs

CHUNK = 2048  # positions whose logits exist at a time; beyond 16 chunks they grow instead


def log_probs(model: Decoder, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """float32 [B, T]: the log-probability of each target. It has no gradient; `log_likelihood` has."""

    def island(w_head_DV, *arrays):
        parts = []
        for hidden_BTD, targets_BT in _chunks(*arrays):
            hidden_BTD, parts = _after(hidden_BTD, parts)
            parts.append(_log_probs(head_logits(hidden_BTD, w_head_DV), targets_BT)[0])
        return jnp.concatenate(parts, axis=1)

    return jax.shard_map(island, out_specs=specs.tokens_BT)(model.w_head[...], hidden_BTD, targets_BT)


def log_likelihood(model: Decoder, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    """float32 []: the sum of the targets' log-probabilities, each times its weight.

    Where a gradient is asked for it is made along with the value, from the same logits: no chunk of them is kept or made again.
    """

    def island(w_head_DV, *arrays):
        w_head_DV = jax.lax.pcast(w_head_DV, specs.BATCH, to="varying")  # one sum of its gradient over devices, not one a chunk
        return jax.lax.psum(_log_likelihood(w_head_DV, *arrays), specs.BATCH)

    return jax.shard_map(island, out_specs=specs.replicated)(model.w_head[...], hidden_BTD, targets_BT, weights_BT)


@jax.custom_vjp
def _log_likelihood(w_head_DV, hidden_BTD, targets_BT, weights_BT) -> jax.Array:
    total = 0.0
    for hidden, targets, weights in _chunks(hidden_BTD, targets_BT, weights_BT):
        hidden, total = _after(hidden, total)
        total += (weights * _log_probs(head_logits(hidden, w_head_DV), targets)[0]).sum()
    return total


def _forward(w_head_DV, hidden_BTD, targets_BT, weights_BT):
    total, dw_DV, dhidden = 0.0, 0.0, []
    for hidden, targets, weights in _chunks(hidden_BTD, targets_BT, weights_BT):
        hidden, dw_DV = _after(hidden, dw_DV)
        logits_BTV = head_logits(hidden, w_head_DV)
        log_probs_BT, log_sum_BT = _log_probs(logits_BTV, targets)
        total += (weights * log_probs_BT).sum()
        chosen_BTV = targets[..., None] == jnp.arange(logits_BTV.shape[-1])
        dlogits_BTV = weights[..., None] * (chosen_BTV - jnp.exp(logits_BTV - log_sum_BT[..., None]))
        dlogits_BTV = dlogits_BTV.astype(hidden.dtype)  # as the matmuls' other operands
        dw_DV += einsum_float32("btd,btv->dv", hidden, dlogits_BTV)
        dhidden.append(einsum_float32("btv,dv->btd", dlogits_BTV, w_head_DV).astype(hidden.dtype))
    return total, (dw_DV.astype(w_head_DV.dtype), jnp.concatenate(dhidden, axis=1))


def _backward(saved, g):
    return *((g * gradient).astype(gradient.dtype) for gradient in saved), None, None


_log_likelihood.defvjp(_forward, _backward)


def _log_probs(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The targets' log-probabilities, and the logarithm of the sum of all exponentials, in one pass over the logits."""

    def join(a, b):  # a maximum, and the sum of the exponentials below it
        (max_a, sum_a), (max_b, sum_b) = a, b
        less = jnp.exp(-jnp.abs(max_a - max_b))
        return jnp.maximum(max_a, max_b), jnp.where(max_a > max_b, sum_a + sum_b * less, sum_a * less + sum_b)

    nothing = jnp.finfo(logits_BTV.dtype).min, jnp.zeros((), logits_BTV.dtype)
    max_BT, sum_BT = jax.lax.reduce((logits_BTV, jnp.ones_like(logits_BTV)), nothing, join, (logits_BTV.ndim - 1,))
    log_sum_BT = max_BT + jnp.log(sum_BT)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1, mode="clip")[..., 0]
    return target_BT - log_sum_BT, log_sum_BT


def _after(hidden, results) -> tuple:
    """Both, `hidden` not before `results`: XLA would make the logits of all chunks first."""
    return jax.lax.optimization_barrier((hidden, results))


def _chunks(*arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
    """Slices of the arrays [B, T, ...] along T."""
    length = arrays[0].shape[1]
    chunk = max(CHUNK, -(-length // 16))
    return [tuple(a[:, start : start + chunk] for a in arrays) for start in range(0, length, chunk)]
