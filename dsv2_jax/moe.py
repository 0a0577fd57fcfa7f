"""Feed-forward layers: the dense SwiGLU, and DeepSeekMoE with shared and routed experts (paper section 2.2, eq. 20-22).

Letters: B batch, T positions, D model, F hidden, E routed experts, K experts a token, M rows in expert order.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax.config import ModelConfig
from dsv2_jax.context import Context, Dropping
from dsv2_jax.fields import InputError
from dsv2_jax.mla import init_normal
from dsv2_jax.projections import project, project_experts
from dsv2_jax.router import Routing, balance, expert_load, group_of, reach, route
from sharding import dropping, specs
from sharding.expert_parallel import routed_experts

Stats = dict[str, jax.Array]


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))"""

    def __init__(self, cfg: ModelConfig, hidden: int, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.w_gate = init_normal(rngs, cfg, (cfg.hidden_size, hidden), dtype)
        self.w_up = init_normal(rngs, cfg, (cfg.hidden_size, hidden), dtype)
        self.w_down = init_normal(rngs, cfg, (hidden, cfg.hidden_size), dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = project("btd,df->btf", x_BTD, self.w_gate)
        up_BTF = project("btd,df->btf", x_BTD, self.w_up)
        return project("btf,fd->btd", jax.nn.silu(gate_BTF) * up_BTF, self.w_down)


class RoutedExperts(nnx.Module):
    """E SwiGLUs, stacked and split over the mesh's expert axis."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        e, d, f = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size
        self.w_gate = init_normal(rngs, cfg, (e, d, f), dtype, specs.experts_EDF)
        self.w_up = init_normal(rngs, cfg, (e, d, f), dtype, specs.experts_EDF)
        self.w_down = init_normal(rngs, cfg, (e, f, d), dtype, specs.experts_EDF)

    def __call__(self, rows_MD: jax.Array, weight_M: jax.Array, group_sizes_E: jax.Array, row_unit: int) -> jax.Array:
        """weight * expert(row) of rows in expert order."""
        return project_experts(rows_MD, weight_M, (self.w_gate, self.w_up, self.w_down), group_sizes_E, row_unit)


class DeepSeekMoE(nnx.Module):
    """Shared experts, which every token uses, plus the routed ones. The shared ones are one SwiGLU of their joint width, and
    neither gated nor scaled."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.cfg = cfg
        self.w_router = init_normal(rngs, cfg, (cfg.hidden_size, cfg.n_routed_experts), dtype)
        self.experts = RoutedExperts(cfg, rngs, dtype)
        if cfg.n_shared_experts is not None:
            self.shared = SwiGLU(cfg, cfg.n_shared_experts * cfg.moe_intermediate_size, rngs, dtype)

    @jax.named_scope("moe")
    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Stats]:
        """Returns the layer's output in x's dtype, and what routing did: experts [B, T, K]; in pairs, load [E] and dropped [];
        and the balance losses of `router.balance`."""
        cfg = self.cfg
        routing = route(x_BTD, self.w_router[...], cfg, ctx.slots_BT)
        experts_BTK, weights_BTK, dropped = routing.experts_BTK, routing.weights_BTK, jnp.zeros((), jnp.int32)
        if ctx.dropping:
            kept_BTK = kept_pairs(routing, ctx.dropping, cfg)
            experts_BTK = jnp.where(kept_BTK, experts_BTK, cfg.n_routed_experts)
            weights_BTK = jnp.where(kept_BTK, weights_BTK, 0.0)
            dropped = (~kept_BTK).sum(dtype=jnp.int32)
        y_BTD = routed_experts(
            x_BTD,
            experts_BTK,
            weights_BTK,
            self.experts,
            RoutedExperts.__call__,
            num_experts=cfg.n_routed_experts,
            reach=reach(cfg, jax.sharding.get_abstract_mesh().shape["expert"]),
            dispatch=ctx.dispatch,
        )
        if cfg.n_shared_experts is not None:
            with jax.named_scope("shared"):
                shared_BTD = self.shared(x_BTD)
                if ctx.slots_BT is not None and x_BTD.shape[1] == 1:
                    # In a decode step the last product shall not take the sum into itself: it would wait for the routed experts.
                    shared_BTD = jax.lax.optimization_barrier(shared_BTD)
                y_BTD += shared_BTD
        return y_BTD, balance(routing, cfg) | {
            "experts": routing.experts_BTK,
            "load": expert_load(routing.experts_BTK, cfg.n_routed_experts).astype(jnp.int32).sum(axis=0),
            "dropped": dropped,
        }


@jax.named_scope("dropping")
def kept_pairs(routing: Routing, drop: Dropping, cfg: ModelConfig) -> jax.Array:
    """Whether a token-expert pair is within its group's budget, see `sharding.dropping.kept`: bool [B, T, K].

    Raises: InputError, if the budget is no pair at all.
    """
    budget = int(drop.capacity_factor * drop.pool * math.prod(routing.experts_BTK.shape[1:]) / cfg.n_group)
    if budget < 1:
        raise InputError(
            f"capacity_factor is {drop.capacity_factor}, expected one that leaves a group a budget of one pair at least"
        )
    return dropping.kept(
        jax.lax.stop_gradient(routing.affinities_BTK),
        group_of(routing.experts_BTK, cfg),
        drop.exempt_B,
        num_groups=cfg.n_group,
        budget=budget,
        pool=drop.pool,
    )
