"""How the next token is chosen from logits, row by row: a row's choice does not depend on its batch.

Letters: B requests, V vocabulary.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.fields import InputError
from dsv2_jax.loss import pick


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of its generation. Field names are the flags' and the JSONL keys'."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # 1: no limit
    top_k: int = 0  # 0: no limit
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def require(name: str, kinds: tuple[type, ...], holds, expected: str) -> None:
            value = getattr(self, name)
            if type(value) not in kinds or not holds(value):
                raise InputError(f"{name} is {value!r}, expected {expected}")

        number = (int, float)
        require("max_new_tokens", (int,), lambda v: v >= 1, "an integer >= 1")
        require("temperature", number, lambda v: math.isfinite(v) and v >= 0, "a finite number >= 0")
        require("top_p", number, lambda v: 0 < v <= 1, "a number in (0, 1]")
        require("top_k", (int,), lambda v: 0 <= v < 2**31, "an integer >= 0 (0: no limit)")
        require("seed", (int,), lambda v: 0 <= v < 2**32, "an integer in [0, 4294967295]")
        require("stop", (tuple,), lambda v: all(isinstance(s, str) and s for s in v), "non-empty strings")
        require("ignore_eos", (bool,), lambda v: True, "true or false")


class SamplingArrays(NamedTuple):
    """The device's side of a batch of `Sampling`s, each [B]."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    seed: jax.Array


def to_arrays(samplings: list[Sampling]) -> SamplingArrays:
    return SamplingArrays(
        np.array([s.temperature for s in samplings], np.float32),
        np.array([s.top_p for s in samplings], np.float32),
        np.array([s.top_k for s in samplings], np.int32),
        np.array([s.seed for s in samplings], np.uint32),
    )


@jax.named_scope("sample")
def sample(logits_BV: jax.Array, positions_B: jax.Array, how: SamplingArrays | None) -> tuple[jax.Array, jax.Array]:
    """Chooses a token for each row; ties go to the lower id.

    Args:
        logits_BV: float32.
        positions_B: the position the token will stand at; with the seed it determines the row's randomness.
        how: None if every row is greedy, which spares the sort.

    Returns:
        int32 tokens [B], and their float32 log-probabilities [B] under the model (at temperature 1, without limits).
    """
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    tokens_B = jnp.argmax(log_probs_BV, axis=-1).astype(jnp.int32)
    if how is not None:
        tokens_B = jnp.where(how.temperature > 0, jax.vmap(_sample_row)(log_probs_BV, positions_B, how), tokens_B)
    return tokens_B, pick(log_probs_BV, tokens_B)


def _sample_row(log_probs_V: jax.Array, position: jax.Array, how: SamplingArrays) -> jax.Array:
    """Temperature, then top-k, then top-p: the smallest set of the most likely tokens whose mass reaches top_p."""
    order_V = jnp.argsort(-log_probs_V, stable=True)
    scaled_V = log_probs_V[order_V] / jnp.where(how.temperature > 0, how.temperature, 1.0)
    rank_V = jnp.arange(scaled_V.size)
    scaled_V = jnp.where((how.top_k == 0) | (rank_V < how.top_k), scaled_V, -jnp.inf)
    probs_V = jax.nn.softmax(scaled_V)
    mass_before_V = jnp.cumsum(probs_V) - probs_V
    scaled_V = jnp.where((mass_before_V < how.top_p) | (how.top_p >= 1), scaled_V, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(how.seed), position)
    return order_V[jax.random.categorical(key, scaled_V)].astype(jnp.int32)
