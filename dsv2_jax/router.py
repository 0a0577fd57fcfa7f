"""Which experts a token goes to, with which weights (paper eq. 20-22, section 2.2.2), and the balance losses (eq. 23-31).

Letters: B sequences, T positions, D model, E routed experts, G groups (the paper's devices), K experts a token.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from pallas_kernels.einsum import einsum_float32
from pallas_kernels.top_experts import parts, top_experts
from sharding import specs


class Routing(NamedTuple):
    """A token's experts. All but the ids is float32."""

    experts_BTK: jax.Array  # int32, in order of falling affinity; num_experts for a token that needs none
    weights_BTK: jax.Array  # factors of the experts' outputs
    affinities_BTK: jax.Array  # the chosen experts' scores
    scores_BTE: jax.Array  # affinities: the softmax over all experts, before any limit


@jax.named_scope("router")
def route(x_BTD: jax.Array, w_router_DE: jax.Array, cfg: ModelConfig, slots_BT: jax.Array | None = None) -> Routing:
    """Scores all experts in float32 and chooses the top ones, of the best groups only if the configuration limits them.

    A group's score is the maximum of its experts' (device-limited routing; DeepSeek-V3's sum of two is another rule).
    `slots_BT`: at inference, where the cache keeps each token; those that it keeps nowhere, -1, need no expert.
    """
    limited = cfg.topk_method == "group_limited_greedy"
    limits = cfg.num_experts_per_tok, *((cfg.n_group, cfg.topk_group) if limited else (1, 1))
    tokens, depth = math.prod(x_BTD.shape[:2]) // jax.sharding.get_abstract_mesh().size, x_BTD.shape[2]
    # Products of bfloat16 numbers are exact in float32. Those of float32 are summed in one order, whatever the batch.
    p = 1
    if x_BTD.dtype == jnp.bfloat16:
        p = parts(tokens, depth, cfg.n_routed_experts, *limits, inference=slots_BT is not None)
    x_BTPX, w_PXE = x_BTD.reshape(*x_BTD.shape[:2], p, -1), w_router_DE.reshape(p, -1, cfg.n_routed_experts)
    logits_PBTE = einsum_float32("btpx,pxe->pbte", x_BTPX, w_PXE)

    def choose(logits_PBTE, slots_BT):
        logits_PNE = logits_PBTE.reshape(p, -1, cfg.n_routed_experts)
        chosen = top_experts(logits_PNE, None if slots_BT is None else slots_BT.reshape(-1), *limits)
        return tuple(x_NK.reshape(*logits_PBTE.shape[1:3], -1) for x_NK in chosen)

    # Kernels know no mesh: each device chooses for its own sequences.
    experts_BTK, affinities_BTK = jax.shard_map(choose, out_specs=specs.activations_BTD)(logits_PBTE, slots_BT)
    if cfg.norm_topk_prob and cfg.num_experts_per_tok > 1:
        weights_BTK = affinities_BTK / (
            affinities_BTK.sum(axis=-1, keepdims=True) + 1e-20
        )  # and unscaled, as in the released code
    else:
        weights_BTK = affinities_BTK * cfg.routed_scaling_factor
    return Routing(experts_BTK, weights_BTK, affinities_BTK, jax.nn.softmax(logits_PBTE.sum(axis=0), axis=-1))


def reach(cfg: ModelConfig, devices: int) -> tuple[int, float]:
    """Of `devices` that share the experts, in order: how many a token needs, at most and in the mean under uniform routing.

    Raises: InputError, if the devices cannot share the experts evenly, or groups and devices cut each other.
    """
    if cfg.n_routed_experts % devices or (devices % cfg.n_group and cfg.n_group % devices):
        told = f"a divisor of n_routed_experts={cfg.n_routed_experts} that divides n_group={cfg.n_group} or is a multiple of it"
        raise InputError(f"mesh: expert={devices}, expected {told}")

    def missing(all_items: int, taken: int) -> float:
        """The chance that none of `taken` items lies on one given device."""
        return math.comb(all_items - all_items // devices, taken) / math.comb(all_items, taken)

    most = min(cfg.num_experts_per_tok, devices)
    if cfg.topk_method == "group_limited_greedy":
        most = min(most, cfg.topk_group * max(1, devices // cfg.n_group))
        if devices <= cfg.n_group:  # nearly every chosen group holds a chosen expert
            return most, min(most, devices * (1 - missing(cfg.n_group, cfg.topk_group)))
    return most, min(most, devices * (1 - missing(cfg.n_routed_experts, cfg.num_experts_per_tok)))


def expert_load(experts_BTK: jax.Array, num_experts: int) -> jax.Array:
    """How many of each sequence's token-expert pairs fall on each expert: float32 [B, E]."""
    return jax.nn.one_hot(experts_BTK, num_experts, dtype=jnp.float32).sum(axis=(1, 2))


def balance(routing: Routing, cfg: ModelConfig) -> dict[str, jax.Array]:
    """The balance losses without their coefficients, float32 [], each the mean over sequences: 1 at perfect balance (the third
    where each token reaches exactly M groups). The gradient flows through P alone, f being a count.

    expert_balance: sum_i f_i P_i over experts (eq. 23-25). device_balance: over groups, the mean f and the sum of P in each (eq.
    26-28). comm_balance: over groups, f counting each token that reaches the group once (eq. 29-31). batch_balance: as
    expert_balance, but f and P are those of all tokens together (the released code with seq_aux=false).
    """
    tokens = routing.scores_BTE.shape[1]
    f_BE = expert_load(routing.experts_BTK, cfg.n_routed_experts) * cfg.n_routed_experts / (cfg.num_experts_per_tok * tokens)
    p_BE = routing.scores_BTE.mean(axis=1)
    f_BGX, p_BGX = (a.reshape(a.shape[0], cfg.n_group, -1) for a in (f_BE, p_BE))
    p_BG = p_BGX.sum(axis=-1)
    reached_BTG = jax.nn.one_hot(group_of(routing.experts_BTK, cfg), cfg.n_group, dtype=bool).any(axis=2)
    sent_BG = reached_BTG.astype(jnp.float32).mean(axis=1) * cfg.n_group / cfg.topk_group
    return {
        "expert_balance": (f_BE * p_BE).sum(axis=-1).mean(),
        "device_balance": (f_BGX.mean(axis=-1) * p_BG).sum(axis=-1).mean(),
        "comm_balance": (sent_BG * p_BG).sum(axis=-1).mean(),
        "batch_balance": (f_BE.mean(axis=0) * p_BE.mean(axis=0)).sum(),
    }


def group_of(experts: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The group (the paper's device) that holds an expert."""
    return experts // (cfg.n_routed_experts // cfg.n_group)
