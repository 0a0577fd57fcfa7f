"""Temperature and limits against a sort in float64, and against sets known by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import limits

ROUNDING = 1e-6  # of float32 probabilities and of top_p and min_p themselves; where it decides, either set is right
weights = jax.jit(limits.weights)


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[int]:
    """The ids that one row may draw."""
    arrays = (np.array([x], dtype) for x, dtype in [(temperature, "f4"), (top_k, "i4"), (top_p, "f4"), (min_p, "f4")])
    return np.flatnonzero(weights(np.array([logits], np.float32), *arrays)[0]).tolist()


def sorted_reference(logits_V, temperature, top_k, top_p, min_p):
    """The ids in falling order, their weights in float64, and how many are kept."""
    order_V = np.argsort(-logits_V, kind="stable")
    weights_V = np.exp((logits_V[order_V].astype(np.float64) - logits_V.max()) / temperature)
    left = min(top_k, len(order_V)) if top_k else len(order_V)
    mass = np.cumsum(weights_V[:left])
    if top_p < 1:
        left = min(left, 1 + np.count_nonzero(mass < top_p * mass[-1]))
    return order_V, weights_V, min(left, np.count_nonzero(weights_V >= min_p))


def draw_logits(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    logits_BV = (rng.normal(size=shape) * 3).astype(np.float32)
    if kind == "tied":
        return np.round(logits_BV)  # with zeros of both signs
    if kind == "uniform":
        return np.full(shape, 7.5, np.float32)
    if kind == "one-hot":
        return np.where(np.arange(shape[1]) == shape[1] // 2, 60.0, 0.0).astype(np.float32) * np.ones((shape[0], 1), np.float32)
    if kind == "masked":
        return np.where((rng.random(shape) < 0.5) & (np.arange(shape[1]) > 0), -np.inf, logits_BV)
    return logits_BV


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000, 102400])
@pytest.mark.parametrize("kind", ["normal", "tied", "uniform", "one-hot", "masked"])
def test_limits_equal_a_sort(kind, size):
    rng = np.random.default_rng(size)
    rows = 8
    logits_BV = draw_logits(kind, (rows, size), rng)
    how = {
        "temperature": rng.choice([0.3, 1.0, 1.7], rows).astype(np.float32),
        "top_k": rng.choice([0, 1, 2, 50, 5000, 2**31 - 1], rows).astype(np.int32),
        "top_p": rng.choice([1e-6, 0.3, 0.9, 0.999, 1.0], rows).astype(np.float32),
        "min_p": rng.choice([0, 1e-4, 0.05, 1.0], rows).astype(np.float32),
    }
    decided = 0
    for row, weights_V in enumerate(np.asarray(weights(logits_BV, *how.values()))):
        temperature, top_k, top_p, min_p = (float(a[row]) for a in how.values())
        reference = functools.partial(sorted_reference, logits_BV[row], temperature, int(top_k))
        least = reference(top_p * (1 - ROUNDING), min_p * (1 + ROUNDING) if min_p < 1 else 1)[2]
        order_V, expected_V, most = reference(top_p * (1 + ROUNDING), min_p * (1 - ROUNDING))
        expected_V[expected_V < 1e-37] = 0  # below float32
        count = np.count_nonzero(weights_V[order_V][:most])
        assert np.count_nonzero(expected_V[:least]) <= count == np.count_nonzero(weights_V)
        np.testing.assert_allclose(weights_V[order_V][:count], expected_V[:count], rtol=2e-5)
        decided += least == most
    assert decided >= rows / 2


@pytest.mark.parametrize(
    "logits, how, expected",
    [
        ([1, 2, 2, 2, 0], {"top_k": 2}, [1, 2]),
        ([1, 2, 2, 2, 0], {"top_k": 4}, [0, 1, 2, 3]),
        ([0.0, -0.0, 0.0, -0.0], {"top_k": 3}, [0, 1, 2]),
        ([5, 5, 5, 5, 5, 5, 5, 5], {"top_p": 0.5}, [0, 1, 2, 3]),
        ([5, 5, 5, 5, 5, 5, 5, 5], {"top_p": 0.51}, [0, 1, 2, 3, 4]),
        ([0, 1, 1, 0, 0, 0], {"top_k": 4, "top_p": 0.999}, [0, 1, 2, 3]),
        (np.log([1, 4, 3, 2]), {"top_p": 0.45}, [1, 2]),  # of 0.1, 0.4, 0.3, 0.2
        (np.log([1, 4, 3, 2]), {"top_p": 0.45, "top_k": 2}, [1]),  # of what is left, 4/7 and 3/7
        (np.log([1, 4, 3, 2]), {"top_p": 0.45, "temperature": 0.5}, [1]),  # of 1, 16, 9, 4 thirtieths
        (np.log([1, 4, 3, 2]), {"min_p": 0.49}, [1, 2, 3]),
        (np.log([1, 4, 3, 2]), {"min_p": 0.51}, [1, 2]),
        (np.log([1, 4, 3, 2]), {"min_p": 0.51, "temperature": 0.5}, [1, 2]),
        (np.log([1, 4, 3, 2]), {"min_p": 0.6, "temperature": 0.5}, [1]),
        ([3, 3, 1], {"min_p": 1.0}, [0, 1]),
        ([3, 3, 1], {"top_p": 1e-45}, [0]),
        ([-np.inf, 2, -np.inf, 1], {"top_k": 3, "top_p": 0.999}, [1, 3]),
        ([1.0, 1.001, 0.999], {"top_k": 1, "temperature": 1e6}, [1]),  # though all three are as likely to float32
        ([1.0, 1.001, 0.999], {"top_p": 0.5, "temperature": 1e6}, [0, 1]),
        ([1.0, 1.001, 0.999], {"temperature": 1e-45}, [1]),
        ([3e38, -3e38, 0], {}, [0]),
    ],
)
def test_sets_known_by_hand(logits, how, expected):
    assert kept(logits, **how) == expected


def test_every_float_has_its_rank():
    floats = np.array([-np.inf, -3e38, -1.0, -1e-38, 0.0, 1e-38, 1.0, 3e38, np.inf], np.float32)
    bits = floats.view(np.uint32)
    ranks = np.where(bits >> 31, ~bits, bits ^ np.uint32(1 << 31))
    assert (np.diff(ranks.astype(np.int64)) > 0).all()
    np.testing.assert_array_equal(limits._float_of_rank(jnp.asarray(ranks)), floats)
