"""The order of token-expert pairs by expert: the row that each pair goes to, the pair that each row holds, and its weight.

Letters: N tokens, K experts a token, P token-expert pairs, E experts, M rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import expert_order_hopper
from pallas_kernels.dispatch import choose
from pallas_kernels.tickets import before

FEW = 4096  # pairs whose places are found by one Hopper kernel, or in XLA by comparing all with all; a sort is a dozen small kernels


class Order(NamedTuple):
    """Where each of a token's pairs goes (its K experts, or its S devices), and what each row of the result holds."""

    pair_M: jax.Array  # the pair n * K + k that a row holds; N * K for none
    row_NK: jax.Array  # the row that holds a pair; M for none


@functools.partial(jax.custom_vjp, nondiff_argnames=("num_experts", "unit", "rows", "implementation"))
def expert_order(
    local_NK: jax.Array, weights_NK: jax.Array, num_experts: int, unit: int, rows: int, implementation: str | None = None
) -> tuple[Order, jax.Array, jax.Array, jax.Array]:
    """Sorts pairs by expert, ties by pair, each expert's rows beginning at a multiple of `unit`. Differentiable in the weights.

    Tokens that fit one unit keep their places: token n has row n of the unit of each of its experts, whose size is a unit. Rows need
    not be gathered then; every expert may be given all tokens.

    Args:
        local_NK: int32. Ids outside [0, num_experts) belong to other devices and get no row. The others of a token differ; where
            they do not, the kernel gives them one row between them.
        weights_NK: float32, of the pairs.
        rows: M, enough for all pairs and their padding.

    Returns:
        the order; each row's weight [M], zero where it holds no pair; experts' sizes and first rows [E].

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason.
    """
    kernel = choose(implementation, unsupported(local_NK, weights_NK, num_experts)) == "pallas"
    make = expert_order_hopper.expert_order if kernel else _expert_order_xla
    kept = places_kept(len(local_NK), unit)
    pair_M, row_NK, weight_M, sizes_E, starts_E = make(local_NK, weights_NK, num_experts, unit, rows, kept)
    return Order(pair_M, row_NK), weight_M, sizes_E, starts_E


def _forward(local_NK, weights_NK, num_experts, unit, rows, implementation):
    made = expert_order(local_NK, weights_NK, num_experts, unit, rows, implementation)
    return made, made[0].row_NK


def _backward(num_experts, unit, rows, implementation, row_NK, gradients):
    return None, _or_zero(gradients[1], row_NK)


expert_order.defvjp(_forward, _backward)


def places_kept(tokens: int, unit: int) -> bool:
    """Whether so many tokens have the same rows in each expert's unit."""
    return tokens <= unit


def unsupported(local_NK: jax.Array, weights_NK: jax.Array, num_experts: int) -> str | None:
    """Why the Hopper kernel cannot take these operands; None if it can."""
    if (local_NK.dtype, weights_NK.dtype) != (jnp.int32, jnp.float32):
        return f"ids and weights are {local_NK.dtype} and {weights_NK.dtype}, expected int32 and float32"
    if not 0 < local_NK.size <= FEW:
        return f"there are {local_NK.size} pairs, expected 1 to {FEW}"
    if num_experts > 256:
        return f"there are {num_experts} experts, expected 256 or fewer"
    return None


def inverse(row_NK: jax.Array, rows: int) -> Order:
    """The order of pairs that go to these rows, each to one of its own; `rows` stands for none."""
    pairs = row_NK.size
    pair_M = jnp.full(rows, pairs, jnp.int32).at[row_NK.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    return Order(pair_M, row_NK)


def _or_zero(x_X: jax.Array, index: jax.Array) -> jax.Array:
    """Elements of a vector [X]; an index past the end gives zero."""
    return jnp.where(index < len(x_X), x_X.at[jnp.minimum(index, len(x_X) - 1)].get(mode="promise_in_bounds"), 0)


def _expert_order_xla(local_NK, weights_NK, num_experts, unit, rows, places_kept):
    expert_P = local_NK.reshape(-1)
    expert_P = jnp.where((expert_P >= 0) & (expert_P < num_experts), expert_P, num_experts)
    index_P, index_E = jnp.arange(expert_P.size, dtype=jnp.int32), jnp.arange(num_experts, dtype=jnp.int32)
    few = expert_P.size <= FEW
    if few:
        sizes_E = (index_E[:, None] == expert_P).sum(axis=1, dtype=jnp.int32)
        before_P = ((expert_P[:, None] == expert_P) & (index_P < index_P[:, None])).sum(axis=1, dtype=jnp.int32)
    else:
        sizes_E = jnp.zeros(num_experts + 1, jnp.int32).at[expert_P].add(1)[:-1]
        sorted_P = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
        place_P = jnp.zeros_like(index_P).at[sorted_P].set(index_P, unique_indices=True)
        before_P = place_P - jnp.append(jnp.cumsum(sizes_E) - sizes_E, 0)[expert_P]
    if places_kept:
        sizes_E, before_P = jnp.where(sizes_E > 0, unit, 0), index_P // local_NK.shape[1]
    starts_E = before(-(-sizes_E // unit) * unit)
    row_P = jnp.where(expert_P < num_experts, jnp.append(starts_E, 0)[expert_P] + before_P, rows).astype(jnp.int32)
    row_NK = row_P.reshape(local_NK.shape)
    if few:
        held_MP = row_P == jnp.arange(rows, dtype=jnp.int32)[:, None]
        pair_M = jnp.where(held_MP, index_P, index_P.size).min(axis=1)
    else:
        pair_M = inverse(row_NK, rows).pair_M
    # By an index of its own: XLA would join this with a part of what gathers the rows, which then waits for it.
    weight_M = _or_zero(weights_NK.reshape(-1), jax.lax.optimization_barrier(pair_M))
    return pair_M, row_NK, weight_M, sizes_E, starts_E
