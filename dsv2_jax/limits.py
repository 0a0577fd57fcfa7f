"""How likely each token is to be drawn: temperature, top-k, top-p and min-p, without sorting the vocabulary.

A limit keeps a set of most likely tokens, ties going to the lower ids. Its last token's logit and id say which they are, and are
found bit by bit: sixteen passes over the logits, each a sum along the rows, and some more where tokens are tied at the cut.

Letters: B requests, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


def weights(
    logits_BV: jax.Array, temperature_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """float32 [B, V]: the tokens' probabilities as parts of the likeliest one's, 0 beyond the limits.

    Each limit is applied to what the one before left: the top_k most likely tokens (0: all), the smallest set of the most likely
    ones whose mass reaches top_p of the mass (1: all), those with at least min_p times the probability of the likeliest. A mass
    is the float32 nearest to a sum of weights in fixed point, so a set does not depend on the order of summation.

    Args:
        logits_BV: float32, as the other numbers; top_k_B is int32. With a temperature of 0 the most likely tokens weigh 1.
    """
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    temperature_B1 = jnp.maximum(temperature_B, 1e-30)[:, None]  # where it is below, the best alone have any weight either way

    def tempered(logits_BV: jax.Array) -> jax.Array:
        return jnp.exp((logits_BV - best_B1) / temperature_B1)

    def count(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
        return kept_BV.sum(axis=-1)

    def mass(logits_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
        # Of floats, the sum would depend on how the compiler cuts up rows of this batch.
        with jax.enable_x64(True):
            fixed_BV = (tempered(logits_BV) * 2.0**44).astype(jnp.uint64)
            return jnp.where(kept_BV, fixed_BV, 0).sum(axis=-1).astype(jnp.float32)

    def top_k(logits_BV: jax.Array) -> Cut:
        return _smallest_set(logits_BV, count, jnp.where(top_k_B > 0, top_k_B, jnp.iinfo(jnp.int32).max))

    def top_p(logits_BV: jax.Array) -> Cut:
        enough_B = jnp.maximum(top_p_B * mass(logits_BV, logits_BV > -jnp.inf), 1.0)  # of the likeliest token's 2^44
        return _smallest_set(logits_BV, mass, jnp.where(top_p_B < 1, enough_B, jnp.inf))

    def limit(logits_BV: jax.Array, limited_B: jax.Array, smallest_set: Callable[[jax.Array], Cut]) -> jax.Array:
        wanted = (limited_B & (temperature_B > 0)).any()
        cut = jax.lax.cond(wanted, smallest_set, _everything, logits_BV)
        return jnp.where(cut.keeps(logits_BV), logits_BV, -jnp.inf)

    logits_BV = limit(logits_BV, top_k_B > 0, top_k)
    logits_BV = limit(logits_BV, top_p_B < 1, top_p)
    weights_BV = tempered(logits_BV)
    return jnp.where(weights_BV >= min_p_B[:, None], weights_BV, 0.0)


class Cut(NamedTuple):
    """The last token of a set of most likely ones: its logit, and its id. Of equal logits, the lower ids are in the set."""

    logit_B: jax.Array
    id_B: jax.Array

    def keeps(self, logits_BV: jax.Array) -> jax.Array:
        """bool [B, V]: which tokens are in the set."""
        ids_V = jnp.arange(logits_BV.shape[-1])
        at_the_cut_BV = (logits_BV == self.logit_B[:, None]) & (ids_V <= self.id_B[:, None])
        return (logits_BV > self.logit_B[:, None]) | at_the_cut_BV


def _everything(logits_BV: jax.Array) -> Cut:
    least_B = jnp.full_like(logits_BV[:, 0], -jnp.inf)
    return Cut(least_B, jnp.full_like(least_B, logits_BV.shape[-1] - 1, jnp.int32))


def _smallest_set(logits_BV: jax.Array, amount: Callable[[jax.Array, jax.Array], jax.Array], enough_B: jax.Array) -> Cut:
    """The smallest set of most likely tokens whose amount is enough; everything, where that is not.

    Args:
        amount: of logits and a set of tokens (bool [B, V]); [B], never smaller for a larger set.
        enough_B: above 0.
    """
    last = logits_BV.shape[-1] - 1
    none_B = jnp.zeros_like(logits_BV[:, 0], jnp.uint32)

    def enough(kept_BV: jax.Array) -> jax.Array:
        return amount(logits_BV, kept_BV) >= enough_B

    def at_logit(rank_B: jax.Array) -> jax.Array:
        return enough(logits_BV >= _float_of_rank(rank_B)[:, None])

    def without(ids_B: jax.Array) -> jax.Array:
        return enough(Cut(logit_B, last - ids_B.astype(jnp.int32)).keeps(logits_BV))

    logit_B = _float_of_rank(_greatest(32, at_logit, none_B))
    tied_B = ((logits_BV == logit_B[:, None]).sum(axis=-1) > 1) & (logit_B > -jnp.inf)
    surplus_B = jax.lax.cond(tied_B.any(), lambda: _greatest(last.bit_length(), without, none_B), lambda: none_B)
    return Cut(logit_B, last - surplus_B.astype(jnp.int32))


def _float_of_rank(rank_B: jax.Array) -> jax.Array:
    """The float32 numbers in order from -inf up, by unsigned integers; what lies below -inf's is -inf too."""
    rank_B = jnp.maximum(rank_B, 0x007FFFFF)
    bits_B = jnp.where(rank_B >> 31 == 1, rank_B ^ jnp.uint32(1 << 31), ~rank_B)
    return jax.lax.bitcast_convert_type(bits_B, jnp.float32)


def _greatest(bits: int, holds: Callable[[jax.Array], jax.Array], least_B: jax.Array) -> jax.Array:
    """The greatest uint32 of so many bits at which `holds`, which is true up to some number and false beyond; 0 if it is nowhere.

    Two bits at a time: their three sums share one pass over the logits.

    Args:
        least_B: zeros.
    """

    def digit(step: jax.Array, found_B: jax.Array) -> jax.Array:
        shift = (2 * (steps - 1 - step)).astype(jnp.uint32)
        held = [holds(found_B + (jnp.uint32(d) << shift)) for d in (1, 2, 3)]
        return found_B + (sum(held).astype(jnp.uint32) << shift)

    steps = -(-bits // 2)
    return jax.lax.fori_loop(0, steps, digit, least_B)
