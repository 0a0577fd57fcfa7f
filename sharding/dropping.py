"""Device-level token dropping of training (paper section 2.2.4): which token-expert pairs stay within their group's budget.

A pool of consecutive sequences of the global batch shares one budget for each group, so the same pairs are dropped on every mesh.
Letters: B sequences, T positions, K pairs a token; P pairs of a device, C cells (a group in a pool), G groups.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding import specs
from sharding.mesh import AXES


def kept(
    affinity_BTK: jax.Array, group_BTK: jax.Array, exempt_B: jax.Array, *, num_groups: int, budget: int, pool: int
) -> jax.Array:
    """Whether each pair is kept: bool [B, T, K].

    Exempt sequences are never dropped and use up budget first; then pairs with the highest affinity, ties to the lower
    sequence, position and k. The threshold is found exactly, by four counts of 256 digits each, in integers.

    Args:
        affinity_BTK: float32 >= 0, batch over data x expert.
        group_BTK: int32, the group of the pair's expert.
        exempt_B: bool.
        budget: most pairs of a group in a pool.
        pool: sequences that share a budget; a divisor of B.
    """
    if affinity_BTK.shape[0] % pool:
        raise ValueError(f"pool={pool}: expected a divisor of the batch's {affinity_BTK.shape[0]} sequences")

    def island(affinity_BTK, group_BTK, exempt_B):
        rows, pairs = group_BTK.shape[0], group_BTK[0].size
        # The fewest axes that hold whole pools.
        axes = next(axes for axes in ((), ("expert",), AXES) if rows * lax.axis_size(axes) % pool == 0)
        shard = lax.axis_index(axes) if axes else 0
        cells = rows * lax.axis_size(axes) // pool * num_groups
        pool_B = (shard * rows + jnp.arange(rows)) // pool
        cell_P = (pool_B[:, None] * num_groups + group_BTK.reshape(rows, pairs)).reshape(-1)
        start_P = jnp.repeat(jnp.maximum(pool_B * pool - shard * rows, 0) * pairs, pairs)
        exempt_P = jnp.repeat(exempt_B, pairs)
        highest = jnp.uint32(0x7F800000)  # infinity; floats >= 0 are ordered like their bits
        key_P = jnp.where(exempt_P, highest, lax.bitcast_convert_type(affinity_BTK, jnp.uint32).reshape(-1))
        threshold_C, left_C = _select(key_P, cell_P, jnp.full(cells, budget), axes)
        tie_P = key_P == threshold_C[cell_P]
        rank_P = _rank(tie_P, cell_P, cells, num_groups, start_P, axes, shard)
        kept_P = exempt_P | (key_P > threshold_C[cell_P]) | (tie_P & (rank_P < left_C[cell_P]))
        return kept_P.reshape(group_BTK.shape)

    return jax.shard_map(island, out_specs=specs.activations_BTD)(affinity_BTK, group_BTK, exempt_B)


def _select(key_P, cell_P, budget_C, axes) -> tuple[jax.Array, jax.Array]:
    """Of each cell: the key of its pair number `budget`, counted from the highest, and how many pairs with that key fit."""
    prefix_C, left_C = jnp.zeros_like(budget_C, jnp.uint32), budget_C
    for shift in (24, 16, 8, 0):
        among_P = (key_P >> shift >> 8) == prefix_C[cell_P]  # two shifts: one of 32 bits is undefined
        digit_P = ((key_P >> shift) & 255).astype(jnp.int32)
        count_CV = jnp.zeros((*budget_C.shape, 256), jnp.int32).at[cell_P, digit_P].add(among_P.astype(jnp.int32))
        if axes:
            count_CV = lax.psum(count_CV, axes)
        above_CV = jnp.cumsum(count_CV[:, ::-1], axis=1)[:, ::-1] - count_CV  # pairs with a higher digit
        digit_C = jnp.argmax(above_CV < left_C[:, None], axis=1)  # the lowest digit that still fits
        left_C -= jnp.take_along_axis(above_CV, digit_C[:, None], axis=1)[:, 0]
        prefix_C = (prefix_C << 8) | digit_C.astype(jnp.uint32)
    return prefix_C, left_C


def _rank(tie_P, cell_P, cells, groups, start_P, axes, shard) -> jax.Array:
    """The number of tied pairs of the same cell before each one, in the order of the global batch. `start_P`: where its pool
    begins on this device."""
    group_P = cell_P % groups
    tied_PG = ((group_P[:, None] == jnp.arange(groups)) & tie_P[:, None]).astype(jnp.int32)
    before_PG = jnp.cumsum(tied_PG, axis=0) - tied_PG
    rank_P = before_PG[jnp.arange(len(tie_P)), group_P] - before_PG[start_P, group_P]
    if axes:
        tied_SC = lax.all_gather(jnp.zeros(cells, jnp.int32).at[cell_P].add(tie_P.astype(jnp.int32)), axes)
        before_C = jnp.where(jnp.arange(tied_SC.shape[0])[:, None] < shard, tied_SC, 0).sum(axis=0)
        rank_P += before_C[cell_P]
    return rank_P
