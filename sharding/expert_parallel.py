"""Dispatch of tokens to the devices that hold their experts, and combination of what comes back, in `shard_map`.

The batch is split over data x expert, the routed experts over expert. `all_to_all`: a token travels once to each device that it
needs, with its expert ids and weights; a device multiplies the pairs that fall on its own experts and sends the weighted sums
back, which are added at the token's home. Messages have one size; a queue that is longer travels in further rounds, so that
nothing is dropped on the way and buffers stay bounded. `all_gather`: every token goes to every device of its expert row.

Moving rows is done by functions that are each other's transpose, so that the backward pass holds gathers and no scatter-add.
Letters: B batch, T positions, D model, N tokens of a device, K experts a token, P token-expert pairs, X devices of an expert row,
M rows of what a function makes (of messages, or in expert order), R rows of a chunk, E experts of a device.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.expert_order import Order, expert_order, inverse, places_kept
from pallas_kernels.grouped_matmul import padded_rows, row_unit
from sharding import specs
from sharding.rounds import in_rounds

DISPATCHES = ("all_to_all", "all_gather")
ARRIVED = "arrived"  # the name under which `jax.checkpoint` knows what came over the wire
SLACK = 1.25  # buffers hold this much of the mean load under uniform routing; the rest waits for a further round
AT_ONCE = 16384  # rows that are multiplied in one go, however they fall: a loop would copy the weights it uses out of their stack

Experts = Any  # a pytree of arrays [E, ...]


def routed_experts(
    x_BTD: jax.Array,
    experts_BTK: jax.Array,
    weights_BTK: jax.Array,
    experts: Experts,
    expert_fn: Callable[..., jax.Array],
    *,
    num_experts: int,
    reach: tuple[int, float],
    dispatch: str | None = None,
) -> jax.Array:
    """sum_k weights[k] * expert_k(x) in x's dtype: sums in float32, rounded once for each device that contributes.

    Args:
        x_BTD: tokens, batch over data x expert.
        experts_BTK, weights_BTK: chosen experts, those of a token all different, and float32 factors. The id `num_experts` stands for
            none: it travels nowhere.
        experts: the experts' weights, [num_experts, ...] over expert.
        expert_fn: (experts, rows_MD, weight_M, group_sizes_E, row_unit) -> [M, D], weight * expert(row); see `grouped_matmul.py`. The rows
            may be all tokens for every expert, `row_unit` at most, with weight zero where one is not its own.
        reach: the devices of an expert row that a token needs, at most and in the mean under uniform routing.
        dispatch: one of DISPATCHES; None is `default_dispatch`.
    """

    def island(x_BTD, experts_BTK, weights_BTK, experts):
        # Without this the sum of the weights' gradients over data would sit inside loops of device-dependent length: a deadlock.
        experts = jax.tree.map(lambda w: lax.pcast(w, "data", to="varying"), experts)
        x_ND, ids_NK, weights_NK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, experts_BTK, weights_BTK))
        devices = lax.axis_size("expert")
        multiply = functools.partial(_multiply, expert_fn=expert_fn, fair_pairs=ids_NK.size)
        if devices == 1:
            y_ND = multiply(x_ND, ids_NK, weights_NK, experts)
        elif (dispatch or default_dispatch(devices)) == "all_gather":
            y_ND = _through_all_gather(x_ND, ids_NK, weights_NK, experts, multiply)
        else:
            y_ND = _through_all_to_all(x_ND, ids_NK, weights_NK, experts, multiply, num_experts, reach)
        return y_ND.astype(x_BTD.dtype).reshape(x_BTD.shape)

    return jax.shard_map(island, out_specs=specs.activations_BTD)(x_BTD, experts_BTK, weights_BTK, experts)


def default_dispatch(devices: int) -> str:
    """As fast on 2 and 4 H200s, where a token goes to most devices anyway, `all_gather` has the simpler program and needs no
    rounds; beyond, `all_to_all` sends half the bytes or less (on 8, with V2's routing, 3.3 rows a token and not 7)."""
    return "all_gather" if devices <= 4 else "all_to_all"


def _through_all_gather(x_ND, ids_NK, weights_NK, experts, multiply) -> jax.Array:
    with jax.named_scope("dispatch"):
        got_MD = checkpoint_name(gather_tokens(x_ND), ARRIVED)
        ids_MK, weights_MK = (lax.all_gather(a, "expert", tiled=True) for a in (ids_NK, weights_NK))
    y_MD = multiply(got_MD, ids_MK, weights_MK, experts)
    with jax.named_scope("combine"):
        return sum_partials(y_MD.astype(x_ND.dtype))


def _through_all_to_all(x_ND, ids_NK, weights_NK, experts, multiply, num_experts: int, reach) -> jax.Array:
    """The first round takes what fits into the slots, and rounds follow until nothing is left."""
    devices, tokens = lax.axis_size("expert"), len(x_ND)
    device_NK = ids_NK // (num_experts // devices)  # `devices` for a pair that travels nowhere
    needed_NX = (device_NK[:, :, None] == jnp.arange(devices)).any(axis=1).astype(jnp.int32)
    place_NX = jnp.cumsum(needed_NX, axis=0) - needed_NX
    most, mean = reach
    slots = slots_per_device(tokens, devices, mean)

    def exchange(r, operands, integers):
        x_ND, weights_NK, experts = operands
        ids_NK, needed_NX, place_NX = integers
        now_NX = (needed_NX == 1) & (place_NX // slots == r)
        row_NX = jnp.where(now_NX, jnp.arange(devices) * slots + place_NX - r * slots, devices * slots)
        order = inverse(jnp.sort(row_NX, axis=1)[:, :most], devices * slots)
        token_M = order.pair_M // most
        with jax.named_scope("dispatch"):
            # Ids are exact in float32 and ride with the weights: 8 K bytes a row, where the row itself takes 2 D.
            weights_MK, ids_MK = take_rows(weights_NK, order), _gather(ids_NK + 1, token_M).astype(jnp.float32)
            both = checkpoint_name(_swap(jnp.concatenate([weights_MK, ids_MK], axis=1)), ARRIVED)
            got_MD = checkpoint_name(_swap(take_rows(x_ND, order)), ARRIVED)
        weights_MK, ids_MK = jnp.split(both, 2, axis=1)
        y_MD = multiply(got_MD, lax.stop_gradient(ids_MK).astype(jnp.int32) - 1, weights_MK, experts)
        with jax.named_scope("combine"):
            return add_rows(_swap(y_MD.astype(x_ND.dtype)), order)

    operands, integers = (x_ND, weights_NK, experts), (ids_NK, needed_NX, place_NX)
    if slots == tokens:
        return exchange(0, operands, integers)
    # Every device of the mesh takes as many rounds: collectives wait for each other.
    longest = lax.pmax(needed_NX.sum(axis=0).max(), specs.BATCH)
    return in_rounds(exchange, -(-longest // slots), operands, integers)


def slots_per_device(tokens: int, devices: int, mean: float) -> int:
    """Slots of a message: for all tokens where that is hardly more than the mean (two devices), else the mean and some slack."""
    return tokens if devices <= 2 else min(tokens, math.ceil(SLACK * tokens * mean / devices / 8) * 8)


def _multiply(x_ND, ids_NK, weights_NK, experts, *, expert_fn, fair_pairs: int) -> jax.Array:
    """The weighted sums over this device's experts: float32 [N, D]. Rows beyond SLACK of a fair share go in further chunks, if
    they are many."""
    local = jax.tree.leaves(experts)[0].shape[0]
    unit = row_unit(fair_pairs, local)
    most = padded_rows(len(x_ND) * min(ids_NK.shape[1], local), local, unit)
    chunk = most if most <= AT_ONCE else min(most, padded_rows(math.ceil(SLACK * fair_pairs), local, unit))
    own_NK, rows = ids_NK - lax.axis_index("expert") * local, -(-most // chunk) * chunk
    order, weight_M, sizes_E, starts_E = expert_order(own_NK, weights_NK, local, unit, rows)

    def multiply_rows(operands, order, sizes_E):
        x_ND, weight_M, experts = operands
        with jax.named_scope("experts"):
            rows_MD = x_ND if places_kept(len(x_ND), unit) else take_rows(x_ND, order)
            out_MD = expert_fn(experts, rows_MD, weight_M, sizes_E, unit)
            return add_rows(out_MD, order)

    def multiply_chunk(r, operands, integers):
        (x_ND, weight_M, experts), (order, sizes_E, starts_E) = operands, integers
        pair_M, weight_M = (lax.dynamic_slice_in_dim(a_M, r * chunk, chunk) for a_M in (order.pair_M, weight_M))
        row_NK = jnp.where(order.row_NK // chunk == r, order.row_NK - r * chunk, chunk)
        first, last = (jnp.clip(edge_E - r * chunk, 0, chunk) for edge_E in (starts_E, starts_E + sizes_E))
        return multiply_rows((x_ND, weight_M, experts), Order(pair_M, row_NK), last - first)

    operands = x_ND, weight_M, experts
    if chunk == most:
        return multiply_rows(operands, order, sizes_E)
    return in_rounds(multiply_chunk, -(-(starts_E + sizes_E).max() // chunk), operands, (order, sizes_E, starts_E))


def _swap(x_MD: jax.Array) -> jax.Array:
    """The X blocks of rows, one for each device of the expert row, change places: block j of device i becomes block i of j."""
    return lax.all_to_all(x_MD, "expert", split_axis=0, concat_axis=0, tiled=True)


def _gather(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x; an index past the end gives zeros."""
    return _where(index < len(x), x.at[jnp.minimum(index, len(x) - 1)].get(mode="promise_in_bounds"))


def _where(inside: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows, or zeros. (Written out: of `mode="fill"` XLA makes a small program of its own, for which the large one waits.)"""
    return jnp.where(inside.reshape(*inside.shape, *[1] * (rows.ndim - inside.ndim)), rows, 0)


@jax.custom_vjp
def take_rows(x_ND: jax.Array, order: Order) -> jax.Array:
    """Every token's row once for each of its pairs, in order: [M, D], rows that hold no pair zero. Transpose: `add_rows`.

    bfloat16 rows move as pairs: on the GPU that is 1.45 times as fast, and as fast as a kernel of bulk copies (both are bound by
    the rate of writing).
    """
    pairs = x_ND.dtype == jnp.bfloat16 and x_ND.shape[1] % 2 == 0
    x_NH = lax.bitcast_convert_type(x_ND.reshape(len(x_ND), -1, 2), jnp.uint32) if pairs else x_ND
    token_M = jnp.minimum(order.pair_M // order.row_NK.shape[1], len(x_ND) - 1)
    # Not by `_gather`: of the comparison of what has been divided XLA makes a program of its own again.
    rows_MH = _where(order.pair_M < order.row_NK.size, x_NH.at[token_M].get(mode="promise_in_bounds"))
    return lax.bitcast_convert_type(rows_MH, x_ND.dtype).reshape(len(token_M), -1) if pairs else rows_MH


@jax.custom_vjp
def add_rows(rows_MD: jax.Array, order: Order) -> jax.Array:
    """The sum of each token's rows: float32 [N, D]. Transpose: `take_rows`."""
    return _gather(rows_MD, order.row_NK).astype(jnp.float32).sum(axis=1)


def _like(x: jax.Array) -> jax.Array:
    """Nothing but x's dtype, for a backward pass."""
    return jnp.zeros(0, x.dtype)


take_rows.defvjp(
    lambda x_ND, order: (take_rows(x_ND, order), order),
    lambda order, g_MD: (add_rows(g_MD, order).astype(g_MD.dtype), None),
)
add_rows.defvjp(
    lambda rows_MD, order: (add_rows(rows_MD, order), (_like(rows_MD), order)),
    lambda saved, g_ND: (take_rows(g_ND.astype(saved[0].dtype), saved[1]), None),
)


@jax.custom_vjp
def gather_tokens(x_ND: jax.Array) -> jax.Array:
    """The tokens of all devices of the expert row: [X N, D]. Transpose: `sum_partials`, which rounds once."""
    return lax.all_gather(x_ND, "expert", tiled=True)


@jax.custom_vjp
def sum_partials(partial_MD: jax.Array) -> jax.Array:
    """The sum over the expert row of its devices' results [X N, D] for this device's tokens: float32 [N, D]."""
    return _swap(partial_MD).reshape(lax.axis_size("expert"), -1, partial_MD.shape[1]).astype(jnp.float32).sum(axis=0)


gather_tokens.defvjp(
    lambda x_ND: (gather_tokens(x_ND), None),
    lambda _, g_MD: (sum_partials(g_MD).astype(g_MD.dtype),),
)
sum_partials.defvjp(
    lambda partial_MD: (sum_partials(partial_MD), _like(partial_MD)),
    lambda like, g_ND: (gather_tokens(g_ND.astype(like.dtype)),),
)
