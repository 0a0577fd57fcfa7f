"""Which experts a token goes to, with which weights (paper eq. 20-22, section 2.2.2), and the balance loss (eq. 23-25).

Letters: B sequences, T positions, D model, E routed experts, G groups (the paper's devices), K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv2_jax.config import ModelConfig


class Routing(NamedTuple):
    """A token's experts. Weights and scores are float32."""

    experts_BTK: jax.Array  # int32, in order of falling affinity
    weights_BTK: jax.Array  # factors of the experts' outputs
    scores_BTE: jax.Array  # affinities: the softmax over all experts, before any limit


@jax.named_scope("router")
def route(x_BTD: jax.Array, w_router_DE: jax.Array, cfg: ModelConfig) -> Routing:
    """Scores all experts in float32 and chooses the top ones, of the best groups only if the configuration limits them.

    A group's score is the maximum of its experts' (device-limited routing; DeepSeek-V3's sum of two is another rule).
    """
    logits_BTE = jnp.einsum(
        "btd,de->bte", x_BTD.astype(jnp.float32), w_router_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    scores_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    allowed_BTE = scores_BTE
    if cfg.topk_method == "group_limited_greedy":
        grouped_BTGX = scores_BTE.reshape(*scores_BTE.shape[:2], cfg.n_group, -1)
        _, groups_BTM = jax.lax.top_k(grouped_BTGX.max(axis=-1), cfg.topk_group)
        chosen_BTG = jax.nn.one_hot(groups_BTM, cfg.n_group, dtype=bool).any(axis=-2)
        allowed_BTE = jnp.where(chosen_BTG[..., None], grouped_BTGX, 0.0).reshape(scores_BTE.shape)
    weights_BTK, experts_BTK = jax.lax.top_k(allowed_BTE, cfg.num_experts_per_tok)
    if cfg.norm_topk_prob and cfg.num_experts_per_tok > 1:
        weights_BTK /= weights_BTK.sum(axis=-1, keepdims=True) + 1e-20  # and unscaled, as in the released code
    else:
        weights_BTK *= cfg.routed_scaling_factor
    return Routing(experts_BTK, weights_BTK, scores_BTE)


def expert_load(experts_BTK: jax.Array, num_experts: int) -> jax.Array:
    """How many of each sequence's token-expert pairs fall on each expert: float32 [B, E]."""
    return jax.nn.one_hot(experts_BTK, num_experts, dtype=jnp.float32).sum(axis=(1, 2))


def expert_balance(routing: Routing, cfg: ModelConfig) -> jax.Array:
    """sum_i f_i P_i per sequence (eq. 23-25 without alpha_1), averaged over sequences: 1 at perfect balance. The gradient flows
    through P alone, f being a count."""
    tokens = routing.scores_BTE.shape[1]
    f_BE = expert_load(routing.experts_BTK, cfg.n_routed_experts) * cfg.n_routed_experts / (cfg.num_experts_per_tok * tokens)
    p_BE = routing.scores_BTE.mean(axis=1)
    return (f_BE * p_BE).sum(axis=-1).mean()
