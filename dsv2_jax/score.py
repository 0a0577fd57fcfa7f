"""Log-probabilities of given text: whole sequences in the naive form, those of one length bucket together.

Letters: B sequences, T positions, V vocabulary.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from dsv2_jax.engine import bucket, place
from dsv2_jax.loss import log_probs
from dsv2_jax.model import Decoder, from_zero
from dsv2_jax.prompts import check_tokens

MAX_TOKENS = 8192  # that are scored together
SHORTEST = 16


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
        length = bucket(len(sequences[first]), SHORTEST)
        most = max(1, MAX_TOKENS // length)
        batch = [sequences[first]]
        while (
            len(batch) < most
            and first + len(batch) < len(sequences)
            and bucket(len(sequences[first + len(batch)]), SHORTEST) == length
        ):
            batch.append(sequences[first + len(batch)])
        devices = jax.sharding.get_abstract_mesh().size
        rows = devices * bucket(-(-len(batch) // devices))
        tokens_BT = np.zeros((rows, length), np.int32)
        for row, sequence in zip(tokens_BT, batch):
            row[: len(sequence)] = sequence
        logprobs_BT, logits_BTV = _score_batch(model, place(tokens_BT), place(np.roll(tokens_BT, -1, axis=1)), with_logits)
        logprobs_BT = np.asarray(logprobs_BT)
        for row, sequence in enumerate(batch):
            logits = np.asarray(logits_BTV[row, : len(sequence)]) if with_logits else None
            yield Score(logprobs_BT[row, : len(sequence) - 1], logits)
        first += len(batch)
