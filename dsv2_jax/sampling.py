"""How the next token is chosen from logits, row by row: a row's choice does not depend on its batch.

Letters: B requests, V vocabulary, K most likely tokens that are reported.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import limits
from dsv2_jax.fields import InputError
from dsv2_jax.limits import Cut
from sharding import specs

MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of its generation. Field names are the flags' and the JSONL keys'."""

    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most likely token
    top_p: float = 1.0  # 1: no limit
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # 0: no limit
    repetition_penalty: float = 1.0  # of tokens in prompt and answer: positive logits are divided by it, others multiplied
    presence_penalty: float = 0.0  # off the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, for each time they are there
    logit_bias: dict[int, float] = dataclasses.field(default_factory=dict)  # token id -> what is added to its logit
    seed: int = 0
    n: int = 1  # answers, each with randomness of its own
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # they end an answer as EOS does, and are part of it
    ignore_eos: bool = False
    logprobs: int = 0  # how many of the most likely tokens are reported at each position

    def __post_init__(self) -> None:
        def require(name: str, kinds: tuple[type, ...], holds: Callable[[Any], bool], expected: str) -> None:
            value = getattr(self, name)
            if type(value) not in kinds or not holds(value):
                raise InputError(f"{name} is {_shown(value)}, expected {expected}")

        # Comparisons alone: they refuse NaN, and take integers that no float holds.
        number = (int, float)
        require("max_new_tokens", (int,), lambda v: v >= 1, "an integer >= 1")
        require("temperature", number, lambda v: 0 <= v <= 1e6, "a number in [0, 1e6]")
        require("top_p", number, lambda v: 0 < v <= 1, "a number in (0, 1]")
        require("top_k", (int,), lambda v: 0 <= v < 2**31, "an integer in [0, 2147483647] (0: no limit)")
        require("min_p", number, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        require("repetition_penalty", number, lambda v: 0.01 <= v <= 100, "a number in [0.01, 100] (1: none)")
        require("presence_penalty", number, lambda v: -2 <= v <= 2, "a number in [-2, 2]")
        require("frequency_penalty", number, lambda v: -2 <= v <= 2, "a number in [-2, 2]")
        require("logit_bias", (dict,), lambda v: True, "numbers by token id")
        for token, bias in self.logit_bias.items():
            if not _is_id(token):
                raise InputError(f"logit_bias has {_shown(token)}, expected token ids: integers >= 0")
            if type(bias) not in number or not -100 <= bias <= 100:
                raise InputError(f"logit_bias of token id {_shown(token)} is {_shown(bias)}, expected a number in [-100, 100]")
        require("seed", (int,), lambda v: 0 <= v < 2**32, "an integer in [0, 4294967295]")
        require("n", (int,), lambda v: 1 <= v <= 65536, "an integer in [1, 65536]")
        require("stop", (tuple,), lambda v: all(isinstance(s, str) and s for s in v), "non-empty strings")
        require("stop_token_ids", (tuple,), lambda v: all(map(_is_id, v)), "a list of integers >= 0")
        require("ignore_eos", (bool,), lambda v: True, "true or false")
        require("logprobs", (int,), lambda v: 0 <= v <= MAX_LOGPROBS, f"an integer in [0, {MAX_LOGPROBS}]")

    @property
    def needs_history(self) -> bool:
        """Whether the choice looks at earlier tokens, or at a bias: see `History`."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


def check(sampling: Sampling, vocab_size: int, name: str) -> None:
    """Refuses what a vocabulary of this size cannot give; `name` says in the error whose sampling it is."""
    for field in ("logit_bias", "stop_token_ids"):
        for token in getattr(sampling, field):
            if token >= vocab_size:
                raise InputError(f"{name}: {field} has token id {_shown(token)}, expected an integer in [0, {vocab_size - 1}]")
    if sampling.logprobs > vocab_size:
        raise InputError(f"{name}: logprobs is {sampling.logprobs}, expected at most {vocab_size}, the size of the vocabulary")


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer beyond 4300 digits
        text = f"{type(value).__name__} of too many digits"
    return text if len(text) <= 80 else text[:77] + "..."


class SamplingArrays(NamedTuple):
    """The device's side of a batch of `Sampling`s, each [B]."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    seed: jax.Array
    answer: jax.Array  # which of its prompt's n answers the row is


def to_arrays(samplings: Sequence[Sampling], answers: Sequence[int] | None = None) -> SamplingArrays:
    """The rows' settings as numpy arrays. `answers` says which of its prompt's n answers each row is; None: the first."""

    def array(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(s, name) for s in samplings], dtype)

    numbers = {name: array(name, np.float32) for name in SamplingArrays._fields if name not in ("top_k", "seed", "answer")}
    answer = np.zeros(len(samplings), np.uint32) if answers is None else np.array(answers, np.uint32)
    return SamplingArrays(**numbers, top_k=array("top_k", np.int32), seed=array("seed", np.uint32), answer=answer)


class History(NamedTuple):
    """What penalties and biases need to know of each row."""

    prompt_BV: jax.Array  # bool: the token is in the prompt
    count_BV: jax.Array  # int32: how often it is in the answer
    bias_BV: jax.Array  # float32: its logit_bias


def to_history(
    samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], vocab_size: int
) -> History:
    """The rows' history as numpy arrays: from the token ids of their prompts, and of their answers so far."""
    shape = len(samplings), vocab_size
    history = History(np.zeros(shape, bool), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    for prompt_V, count_V, bias_V, sampling, prompt, answer in zip(*history, samplings, prompts, answers):
        prompt_V[list(prompt)] = True
        np.add.at(count_V, list(answer), 1)
        bias_V[list(sampling.logit_bias)] = list(sampling.logit_bias.values())
    return history


class Sampled(NamedTuple):
    """Chosen tokens and log-probabilities, float32 and those of the model: at temperature 1, without penalties or limits."""

    tokens_B: jax.Array  # int32
    logprobs_B: jax.Array
    top_ids_BK: jax.Array | None  # int32: the most likely tokens, in falling order
    top_logprobs_BK: jax.Array | None


def sample(
    logits_BV: jax.Array, positions_B: jax.Array, how: SamplingArrays | None, history: History | None, top: int = 0
) -> Sampled:
    """Chooses a token for each row; ties go to the lower id.

    The order: penalties (repetition, then presence and frequency), bias, temperature, top_k, top_p, min_p. The bias is what the
    user says of a token outright, so it has the last word on its logit. The limits come after the temperature because they speak
    of the probabilities that are drawn from, each of those that the one before left (`limits.weights`; Hugging Face's order).
    Temperature 0 takes the most likely token after penalties and bias, whatever the limits.

    Args:
        logits_BV: float32. All arguments are cut over the batch, or are cut here; each device then works on its rows alone.
        positions_B: the position the token will stand at; with the seed and the answer's number it determines the randomness.
        how: None if every row is greedy, without penalties or bias, which spares all the work.
        history: None if no row needs one (`Sampling.needs_history`).
        top: how many of the most likely tokens to report, at most V.
    """
    rows = jax.shard_map(functools.partial(_sample, top=top), out_specs=specs.per_request_B)
    return rows(*jax.reshard((logits_BV, positions_B, how, history), specs.per_request_B))


@jax.named_scope("sample")
def _sample(logits_BV, positions_B, how, history, *, top: int) -> Sampled:
    wanted_BV = logits_BV if history is None else penalise(logits_BV, how, history)
    tokens_B = jnp.argmax(wanted_BV, axis=-1).astype(jnp.int32)
    if how is not None:
        weights_BV = limits.weights(wanted_BV, how.temperature, how.top_k, how.top_p, how.min_p)
        drawn_B = _draw(weights_BV, positions_B, how)
        tokens_B = jnp.where(how.temperature > 0, drawn_B, tokens_B)
    log_sum_B = jax.nn.logsumexp(logits_BV, axis=-1)
    sampled = Sampled(tokens_B, _pick(logits_BV, tokens_B) - log_sum_B, None, None)
    if top:
        ids_BK, values_BK = _most_likely(logits_BV, top)
        sampled = sampled._replace(top_ids_BK=ids_BK, top_logprobs_BK=values_BK - log_sum_B[:, None])
    return sampled


def penalise(logits_BV: jax.Array, how: SamplingArrays, history: History) -> jax.Array:
    """Hugging Face's repetition penalty over prompt and answer, OpenAI's two over the answer, and the bias; float32 [B, V]."""
    said_BV = history.count_BV > 0
    repetition_B1 = how.repetition_penalty[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(history.prompt_BV | said_BV, repeated_BV, logits_BV)
    logits_BV -= how.presence_penalty[:, None] * said_BV + how.frequency_penalty[:, None] * history.count_BV
    return logits_BV + history.bias_BV


def _draw(weights_BV: jax.Array, positions_B: jax.Array, how: SamplingArrays) -> jax.Array:
    """A race: each token arrives after an exponentially distributed time, at the rate of its weight, and the first one wins.

    (The same as the largest of Gumbel numbers plus logits; the weights are at hand, and need no logarithm.)
    """

    def bits(seed: jax.Array, answer: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), answer), position)
        return jax.random.bits(key, weights_BV.shape[1:])

    # Of 32 bits: of the usual 23, one draw in a hundred would have two winners among 100,000 tokens of one weight.
    uniform_BV = (jax.vmap(bits)(how.seed, how.answer, positions_B).astype(jnp.float32) + 0.5) * 2.0**-32
    times_BV = -jnp.log1p(-jnp.minimum(uniform_BV, 1 - 2.0**-24)) / weights_BV
    return jnp.argmin(times_BV, axis=-1).astype(jnp.int32)


def _most_likely(logits_BV: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """The ids [B, K] and logits [B, K] of the `top` most likely tokens, found one after another, which spares the sort."""
    ids_V = jnp.arange(logits_BV.shape[-1])

    def following(cut: Cut, _: None) -> tuple[Cut, Cut]:
        left_BV = ~cut.keeps(logits_BV)
        logit_B = jnp.where(left_BV, logits_BV, -jnp.inf).max(axis=-1)
        id_B = jnp.where(left_BV & (logits_BV == logit_B[:, None]), ids_V, ids_V.size - 1).min(axis=-1)
        return Cut(logit_B, id_B), Cut(logit_B, id_B)

    nothing = Cut(jnp.full_like(logits_BV[:, 0], jnp.inf), jnp.full_like(logits_BV[:, 0], -1, ids_V.dtype))
    _, chosen_KB = jax.lax.scan(following, nothing, length=top)
    return chosen_KB.id_B.T, chosen_KB.logit_B.T


def _pick(values_BV: jax.Array, ids_B: jax.Array) -> jax.Array:
    """values[b, id]; a masked sum, which shards like its operands."""
    return jnp.where(ids_B[:, None] == jnp.arange(values_BV.shape[1]), values_BV, 0).sum(axis=1)
