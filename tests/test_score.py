"""Scores are the log-probabilities of the full forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import config, model
from dsv2_jax.score import score

CFG = dataclasses.replace(config.tiny(), num_hidden_layers=2, initializer_range=0.1, vocab_size=512)
SEQUENCES = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 1, 33, 17)]


def test_score_gives_the_log_probabilities_of_the_full_forward():
    m = model.init(CFG, 0, jnp.float32)
    for sequence, got in zip(SEQUENCES, score(m, SEQUENCES, with_logits=True), strict=True):
        logits = np.asarray(model.trace(m, np.array([sequence], np.int32)).logits[0])
        np.testing.assert_allclose(got.logits, logits, atol=1e-4)
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(sequence) - 1), sequence[1:]]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
        assert got.logprobs.shape == (len(sequence) - 1,)
