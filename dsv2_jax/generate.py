"""Generation through the latent cache, and scoring: batches of requests of different lengths, compiled once per shape bucket.

Prompts are padded on the right to a bucket and prefilled together in the naive form; then every request decodes at its own
position in the absorbed form. The cache has room for the whole answer from the start, so the decode step compiles once.
Letters: B requests, T prompt positions, S cache capacity, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import cache as latent_cache
from dsv2_jax.cache import LatentCache
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.loss import log_probs
from dsv2_jax.model import Decoder, from_zero
from dsv2_jax.sampling import Sampling, SamplingArrays, check, sample, to_arrays
from sharding import specs

MAX_BATCH = 64  # requests that run together
MAX_SCORED_TOKENS = 8192  # tokens that are scored together


class Request(NamedTuple):
    token_ids: Sequence[int]
    sampling: Sampling


class Completion(NamedTuple):
    token_ids: list[int]  # new tokens only; a final EOS is among them
    logprobs: list[float]
    finish_reason: str  # "stop": EOS or the caller's stop; "length": max_new_tokens or the end of the context


def bucket(n: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def check_tokens(cfg: ModelConfig, name: str, token_ids: Sequence[int], room: int) -> None:
    """Refuses ids outside the vocabulary, an empty prompt, and one that leaves less than `room` of the context."""
    if not token_ids:
        raise InputError(f"{name}: the prompt is empty, expected at least one token")
    for token in token_ids:
        if type(token) is not int or not 0 <= token < cfg.vocab_size:
            raise InputError(f"{name}: token id {token!r}, expected an integer in [0, {cfg.vocab_size - 1}]")
    if len(token_ids) + room > cfg.max_position_embeddings:
        expected = f"at most {cfg.max_position_embeddings - room}"
        raise InputError(f"{name}: the prompt has {len(token_ids)} tokens, expected {expected} (max_position_embeddings)")


@functools.partial(jax.jit, donate_argnames="cache")
def prefill(
    model: Decoder, tokens_BT: jax.Array, lengths_B: jax.Array, cache: LatentCache, how: SamplingArrays | None
) -> tuple[jax.Array, jax.Array, LatentCache]:
    """Fills the cache with right-padded prompts; returns each request's first new token and its log-probability."""
    hidden_BTD, cache, _ = model(*from_zero(tokens_BT), cache)
    last_BD = jnp.take_along_axis(hidden_BTD, lengths_B[:, None, None] - 1, axis=1)[:, 0]
    sampled = sample(model.logits(last_BD), lengths_B, how, history=None)
    return sampled.tokens_B, sampled.logprobs_B, cache


@functools.partial(jax.jit, donate_argnames="cache")
def decode(
    model: Decoder, tokens_B: jax.Array, positions_B: jax.Array, cache: LatentCache, how: SamplingArrays | None
) -> tuple[jax.Array, jax.Array, LatentCache]:
    """One step: puts each token at its position, returns the next one and its log-probability."""
    hidden_B1D, cache, _ = model(tokens_B[:, None], positions_B[:, None], jnp.ones_like(tokens_B)[:, None], cache, absorbed=True)
    sampled = sample(model.logits(hidden_B1D[:, 0]), positions_B + 1, how, history=None)
    return sampled.tokens_B, sampled.logprobs_B, cache


def generate(
    model: Decoder,
    requests: Sequence[Request],
    eos_id: int | None,
    on_token: Callable[[int, int], bool] = lambda index, token: False,
) -> list[Completion]:
    """Runs the requests, at most MAX_BATCH at a time, those of similar length together.

    Args:
        eos_id: the token that ends an answer, unless the request ignores it.
        on_token: called with (request index, token) for every new token, in order; True stops that request after it.
    """
    for index, request in enumerate(requests):
        check_tokens(model.cfg, f"request {index}", request.token_ids, room=1)
        check(request.sampling, model.cfg.vocab_size, f"request {index}")
        if request.sampling.needs_history or request.sampling.n > 1 or request.sampling.logprobs:
            raise InputError(f"request {index}: penalties, logit_bias, n and logprobs are not part of this generation")
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].token_ids))
    completions: dict[int, Completion] = {}
    for first in range(0, len(order), MAX_BATCH):
        chosen = order[first : first + MAX_BATCH]
        completions |= zip(chosen, _generate_batch(model, [requests[i] for i in chosen], chosen, eos_id, on_token))
    return [completions[i] for i in range(len(requests))]


def _generate_batch(model, requests, indices, eos_id, on_token) -> list[Completion]:
    context = model.cfg.max_position_embeddings
    lengths = [len(r.token_ids) for r in requests]
    budgets = [min(r.sampling.max_new_tokens, context - n) for r, n in zip(requests, lengths)]
    rows = bucket(len(requests), least=jax.sharding.get_abstract_mesh().size)
    padding = rows - len(requests)  # rows of padding repeat the first request and are ignored
    requests_B = list(requests) + [requests[0]] * padding
    lengths_B = np.array(lengths + lengths[:1] * padding, np.int32)
    tokens_BT = np.zeros((rows, bucket(max(lengths))), np.int32)
    for row, request in zip(tokens_BT, requests_B):
        row[: len(request.token_ids)] = request.token_ids
    capacity = bucket(max(n + b for n, b in zip(lengths, budgets)), least=tokens_BT.shape[1])
    cache = latent_cache.empty(model.cfg, rows, capacity, model.embed.dtype)
    greedy = all(r.sampling.temperature == 0 for r in requests)
    how = None if greedy else SamplingArrays(*map(place, to_arrays([r.sampling for r in requests_B])))

    token_B, logprob_B, cache = prefill(model, place(tokens_BT), place(lengths_B), cache, how)
    completions = [Completion([], [], "") for _ in requests]
    for step in range(max(budgets)):
        # The next step is on its way to the device before this one's tokens are read.
        ahead = None
        if step + 1 < max(budgets):
            positions_B = np.minimum(lengths_B + step, capacity - 1)
            ahead = decode(model, token_B, place(positions_B), cache, how)
        tokens, logprobs = np.asarray(token_B), np.asarray(logprob_B)
        for row, request in enumerate(requests):
            done = completions[row]
            if done.finish_reason:
                continue
            token = int(tokens[row])
            done.token_ids.append(token)
            done.logprobs.append(float(logprobs[row]))
            stopped = on_token(indices[row], token)
            ended = token in request.sampling.stop_token_ids or (token == eos_id and not request.sampling.ignore_eos)
            if stopped or ended:
                completions[row] = done._replace(finish_reason="stop")
            elif len(done.token_ids) == budgets[row]:
                completions[row] = done._replace(finish_reason="length")
        if all(c.finish_reason for c in completions):
            break
        token_B, logprob_B, cache = ahead
    return completions


def greedy(model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt, `max_new_tokens` long whatever EOS says."""
    sampling = Sampling(max_new_tokens=max_new_tokens, ignore_eos=True)
    return [c.token_ids for c in generate(model, [Request(p, sampling) for p in prompts], eos_id=None)]


class Score(NamedTuple):
    logprobs: np.ndarray  # float32 [n - 1]: of each token but the first, given those before it
    logits: np.ndarray | None  # float32 [n, V]


@functools.partial(jax.jit, static_argnames="with_logits")
def _score_batch(
    model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, with_logits: bool
) -> tuple[jax.Array, jax.Array | None]:
    hidden_BTD, _, _ = model(*from_zero(tokens_BT))
    logprobs_BT = log_probs(model, hidden_BTD, targets_BT)
    return logprobs_BT, model.logits(hidden_BTD) if with_logits else None


def score(model: Decoder, sequences: Sequence[Sequence[int]], with_logits: bool = False) -> Iterator[Score]:
    """Scores the sequences in order; neighbours of one length bucket run together."""
    for index, sequence in enumerate(sequences):
        check_tokens(model.cfg, f"request {index}", sequence, room=0)
    first = 0
    while first < len(sequences):
        length = bucket(len(sequences[first]))
        most = max(1, MAX_SCORED_TOKENS // length)
        batch = [sequences[first]]
        while len(batch) < most and first + len(batch) < len(sequences) and bucket(len(sequences[first + len(batch)])) == length:
            batch.append(sequences[first + len(batch)])
        rows = bucket(len(batch), least=jax.sharding.get_abstract_mesh().size)
        tokens_BT = np.zeros((rows, length), np.int32)
        for row, sequence in zip(tokens_BT, batch):
            row[: len(sequence)] = sequence
        logprobs_BT, logits_BTV = _score_batch(model, place(tokens_BT), place(np.roll(tokens_BT, -1, axis=1)), with_logits)
        logprobs_BT = np.asarray(logprobs_BT)
        for row, sequence in enumerate(batch):
            logits = np.asarray(logits_BTV[row, : len(sequence)]) if with_logits else None
            yield Score(logprobs_BT[row, : len(sequence) - 1], logits)
        first += len(batch)


def place(array: np.ndarray) -> jax.Array:
    """A host array on the mesh, its first axis being the batch."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(array, jax.NamedSharding(mesh, specs.per_request_B))
