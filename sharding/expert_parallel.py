"""Dispatch of tokens to the devices that hold their experts, and combination of what comes back, in `shard_map`.

The batch is split over data x expert, the routed experts over expert. Every device of an expert row gathers the row's tokens,
multiplies the pairs that fall on its own experts, and the partial sums return to the tokens' home.

Moving rows is done by two functions that are each other's transpose, so that the backward pass holds gathers and no scatter-add.
Letters: B batch, T positions, D model, N tokens of a device, K experts a token, M rows in expert order, E experts of a device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.grouped_matmul import padded_rows, row_unit
from sharding import specs

Experts = Any  # a pytree of arrays [E, ...]


class ExpertOrder(NamedTuple):
    """A permutation of token-expert pairs into expert order, each expert's rows beginning at a multiple of the row unit."""

    pair_M: jax.Array  # the pair n * K + k that a row holds; N * K for a padding row
    row_NK: jax.Array  # the row that holds a pair; M for a pair of another device's experts
    group_sizes_E: jax.Array


def routed_experts(
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    experts: Experts,
    expert_fn: Callable[..., jax.Array],
    num_experts: int,
) -> jax.Array:
    """sum_k weights[k] * expert_fn(x, expert k), the sum in float32 and rounded once to x's dtype.

    Args:
        x_BTD: tokens, batch over data x expert.
        experts_BTK, weights_BTK: chosen experts and float32 factors.
        experts: the experts' weights, [num_experts, ...] over expert.
        expert_fn: (rows_MD, experts, group_sizes_E, row_unit) -> [M, D], see `pallas_kernels.grouped_matmul`.
    """

    def island(x_BTD, experts_BTK, weights_BTK, experts):
        # Without this the sum of the weights' gradients over data would sit inside loops of device-dependent length: a deadlock.
        experts = jax.tree.map(lambda w: lax.pcast(w, "data", to="varying"), experts)
        local = jax.tree.leaves(experts)[0].shape[0]
        x_ND, experts_NK, weights_NK = (
            lax.all_gather(a.reshape(-1, a.shape[-1]), "expert", tiled=True) for a in (x_BTD, experts_BTK, weights_BTK)
        )
        unit = row_unit(experts_NK.size, num_experts)
        order = expert_order(experts_NK - lax.axis_index("expert") * local, local, unit)
        out_MD = expert_fn(take_rows(x_ND, order), experts, order.group_sizes_E, unit)
        y_ND = sum_rows(out_MD, weights_NK, order)
        return lax.psum_scatter(y_ND, "expert", tiled=True).astype(x_BTD.dtype).reshape(x_BTD.shape)

    return jax.shard_map(island, out_specs=specs.activations_BTD)(x_BTD, experts_BTK, weights_BTK, experts)


def expert_order(local_experts_NK: jax.Array, num_experts: int, unit: int) -> ExpertOrder:
    """Sorts pairs by expert, ties by pair; ids outside [0, num_experts) belong to other devices and get no row."""
    expert_P = local_experts_NK.reshape(-1)
    expert_P = jnp.where((expert_P >= 0) & (expert_P < num_experts), expert_P, num_experts)
    pairs = expert_P.size
    rows = padded_rows(pairs, num_experts, unit)
    sorted_P = jnp.argsort(expert_P, stable=True)
    sizes_E = jnp.zeros(num_experts + 1, jnp.int32).at[expert_P].add(1)[:-1]
    padded_E = -(-sizes_E // unit) * unit
    shift_E = jnp.append((jnp.cumsum(padded_E) - padded_E) - (jnp.cumsum(sizes_E) - sizes_E), rows)
    expert_of_sorted_P = expert_P[sorted_P]
    row_of_sorted_P = jnp.where(expert_of_sorted_P < num_experts, jnp.arange(pairs) + shift_E[expert_of_sorted_P], rows)
    row_P = jnp.zeros(pairs, jnp.int32).at[sorted_P].set(row_of_sorted_P.astype(jnp.int32), unique_indices=True)
    pair_M = jnp.full(rows, pairs, jnp.int32).at[row_of_sorted_P].set(sorted_P.astype(jnp.int32), mode="drop")
    return ExpertOrder(pair_M, row_P.reshape(local_experts_NK.shape), sizes_E)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x; an index past the end gives zeros."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_rows(x_ND: jax.Array, order: ExpertOrder) -> jax.Array:
    """Every token's row once for each of its pairs, in expert order: [M, D], padding rows zero."""
    k = order.row_NK.shape[1]
    return _gather(x_ND, order.pair_M // k)


def _take_rows_forward(x_ND, order):
    return take_rows(x_ND, order), order


def _take_rows_backward(order, g_MD):
    return _gather(g_MD, order.row_NK).astype(jnp.float32).sum(axis=1).astype(g_MD.dtype), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def sum_rows(rows_MD: jax.Array, weights_NK: jax.Array, order: ExpertOrder) -> jax.Array:
    """sum_k weights[n, k] * rows[row of pair n, k]: [N, D] float32."""
    rows_NKD = _gather(rows_MD, order.row_NK).astype(jnp.float32)
    return (rows_NKD * weights_NK[..., None]).sum(axis=1)


def _sum_rows_forward(rows_MD, weights_NK, order):
    return sum_rows(rows_MD, weights_NK, order), (rows_MD, weights_NK, order)


def _sum_rows_backward(saved, g_ND):
    rows_MD, weights_NK, order = saved
    k = weights_NK.shape[1]
    weight_M1 = _gather(weights_NK.reshape(-1), order.pair_M)[:, None]
    drows_MD = _gather(g_ND, order.pair_M // k) * weight_M1
    dweights_NK = (_gather(rows_MD, order.row_NK).astype(jnp.float32) * g_ND[:, None]).sum(axis=-1)
    return drows_MD.astype(rows_MD.dtype), dweights_NK, None


sum_rows.defvjp(_sum_rows_forward, _sum_rows_backward)
