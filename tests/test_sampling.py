"""Sampling against the distribution it is meant to have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.fields import InputError
from dsv2_jax.sampling import Sampling, sample, to_arrays

PROBS_V = np.array([0.4, 0.05, 0.3, 0.25])
LOGITS_V = np.log(PROBS_V).astype(np.float32) + 3.0


def drawn(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    logits_BV = jnp.broadcast_to(LOGITS_V, (draws, 4))
    tokens_B, _ = jax.jit(sample)(logits_BV, jnp.arange(draws), to_arrays([sampling] * draws))
    return np.bincount(tokens_B, minlength=4) / draws


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(temperature=1.0), PROBS_V),
        (Sampling(temperature=0.5), PROBS_V**2 / (PROBS_V**2).sum()),
        (Sampling(temperature=1.0, top_k=2), np.array([4, 0, 3, 0]) / 7),
        (Sampling(temperature=1.0, top_p=0.69), np.array([4, 0, 3, 0]) / 7),  # 0.4 alone does not reach it, 0.4 + 0.3 does
        (Sampling(temperature=1.0, top_p=0.71), np.array([0.4, 0, 0.3, 0.25]) / 0.95),
        (Sampling(temperature=1.0, top_p=0.01), np.array([1, 0, 0, 0])),
        (Sampling(temperature=0.0), np.array([1, 0, 0, 0])),
    ],
)
def test_frequencies(sampling, expected):
    # Four standard deviations of a frequency over 4000 draws are at most 0.032.
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.032)


def test_a_seed_repeats_and_another_differs():
    logits_BV = jnp.zeros((1, 1000))
    first, second, other = (
        [int(sample(logits_BV, jnp.array([p]), to_arrays([Sampling(temperature=1.0, seed=s)]))[0][0]) for p in range(5)]
        for s in (1, 1, 2)
    )
    assert first == second != other
    assert len(set(first)) == 5


def test_log_probabilities_are_the_models_own():
    _, logprob_B = sample(LOGITS_V[None], jnp.array([0]), to_arrays([Sampling(temperature=2.0, top_k=1)]))
    np.testing.assert_allclose(np.asarray(logprob_B), np.log(PROBS_V[:1]), rtol=1e-5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 2),
        ("top_k", -1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("seed", -1),
        ("stop", ("",)),
        ("temperature", "hot"),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field} is"):
        Sampling(**{field: value})
