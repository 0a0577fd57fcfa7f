"""Sampling against the distribution it is meant to have, penalties against numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import sampling as sampling_lib
from dsv2_jax.fields import InputError
from dsv2_jax.sampling import Sampling, check, to_arrays, to_history
from sharding import specs
from sharding.mesh import make_mesh

PROBS_V = np.array([0.4, 0.05, 0.3, 0.25])
LOGITS_V = np.log(PROBS_V).astype(np.float32) + 3.0
sample = jax.jit(sampling_lib.sample, static_argnames="top")
SETTINGS = [  # what the rows of one batch may ask for
    Sampling(),
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=1),
    Sampling(temperature=2.0, top_k=40, seed=2),
    Sampling(temperature=1.3, top_k=300, top_p=0.99, min_p=0.01, seed=3),
    Sampling(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.2, seed=4),
    Sampling(temperature=0.0, logit_bias={3: 40.0}, frequency_penalty=1.0),
    Sampling(temperature=1.0, logit_bias={5: -100, 999: 3}, n=2, seed=5),
]


def drawn(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    logits_BV = jnp.broadcast_to(LOGITS_V, (draws, 4))
    tokens_B = sample(logits_BV, np.arange(draws), to_arrays([sampling] * draws), None).tokens_B
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
        (Sampling(temperature=1.0, min_p=0.6), np.array([0.4, 0, 0.3, 0.25]) / 0.95),
        (Sampling(temperature=0.0), np.array([1, 0, 0, 0])),
    ],
)
def test_frequencies(sampling, expected):
    # Four standard deviations of a frequency over 4000 draws are at most 0.032.
    np.testing.assert_allclose(drawn(sampling), expected, atol=0.032)


@pytest.mark.parametrize("varied", ["position", "seed", "answer"])
def test_each_source_of_randomness_draws_from_the_distribution(varied):
    draws, size = 20000, 100
    logits_V = np.random.default_rng(0).normal(size=size).astype(np.float32)
    counts = np.arange(draws)
    how = to_arrays([Sampling(temperature=1.0)] * draws)
    how = how if varied == "position" else how._replace(**{varied: counts.astype(np.uint32)})
    positions_B = counts if varied == "position" else np.full(draws, 9)
    tokens_B = sample(np.broadcast_to(logits_V, (draws, size)), positions_B, how, None).tokens_B
    observed_V = np.bincount(tokens_B, minlength=size)

    def chi_square(logits_V: np.ndarray) -> float:
        expected_V = draws * np.exp(logits_V) / np.exp(logits_V).sum()
        return float(((observed_V - expected_V) ** 2 / expected_V).sum())

    # Of 99 degrees of freedom: the mean plus five standard deviations. A temperature wrong by a tenth is found out.
    most = 99 + 5 * np.sqrt(2 * 99)
    assert chi_square(logits_V) < most < chi_square(logits_V / 1.1)


def test_a_seed_repeats_and_another_differs():
    logits_BV = jnp.zeros((1, 1000))
    first, second, other, answer = (
        [
            int(sample(logits_BV, jnp.array([p]), to_arrays([Sampling(temperature=1.0, seed=s)], [a]), None)[0][0])
            for p in range(5)
        ]
        for s, a in ((1, 0), (1, 0), (2, 0), (1, 1))
    )
    assert first == second != other
    assert first != answer != other
    assert len(set(first)) == 5


def mixed_batch(rows: list[int]):
    """Some rows of a batch in which each asks for something else: arguments of `sample`."""
    rng = np.random.default_rng(0)
    logits_BV = (rng.normal(size=(len(SETTINGS), 1000)) * 2).astype(np.float32)
    prompts = [rng.integers(0, 1000, 20).tolist() for _ in SETTINGS]
    answers = [rng.integers(0, 1000, 300).tolist() for _ in SETTINGS]
    samplings = [SETTINGS[row] for row in rows]
    history = to_history(samplings, [prompts[row] for row in rows], [answers[row] for row in rows], 1000)
    return logits_BV[rows], np.array(rows) + 320, to_arrays(samplings, [row % 2 for row in rows]), history


def test_a_row_does_not_depend_on_its_batch():
    together = sample(*mixed_batch([*range(8)]), top=3)
    for row in range(8):
        alone = sample(*mixed_batch([row]), top=3)
        twice = sample(*mixed_batch([row, 0, 7]), top=3)
        for whole, one, three in zip(together[::2], alone[::2], twice[::2]):  # ids
            np.testing.assert_array_equal(whole[row], one[0])
            np.testing.assert_array_equal(whole[row], three[0])
        np.testing.assert_allclose(together.logprobs_B[row], alone.logprobs_B[0], rtol=1e-6)


def test_eight_devices_give_the_tokens_of_one():
    one = sample(*mixed_batch([*range(8)]), top=3)
    mesh = make_mesh(2, 4)
    with jax.set_mesh(mesh):
        arguments = jax.device_put(mixed_batch([*range(8)]), jax.NamedSharding(mesh, specs.per_request_B))
        eight = sample(*arguments, top=3)
        assert {x.sharding.spec[0] for x in eight} == {specs.BATCH}
        given_whole = sample(*mixed_batch([*range(8)]), top=3)
    for a, b, c in zip(one, eight, given_whole):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(b, c)


def test_penalties_by_hand():
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={4: -1.5, 0: 1})
    history = to_history([sampling, Sampling()], [[0, 1], [0, 1]], [[2, 2, 3], [2, 3]], 6)
    logits_BV = np.array([[3.0, -3.0, 3.0, -3.0, 3.0, -3.0]] * 2, np.float32)
    got_BV = sampling_lib.penalise(logits_BV, to_arrays([sampling, Sampling()]), history)
    # In the prompt: 3 / 2 + 1 and -3 * 2. In the answer: 3 / 2 - 0.5 - 2 * 0.25 and -3 * 2 - 0.5 - 0.25. Neither: the bias alone.
    np.testing.assert_allclose(got_BV, [[2.5, -6.0, 0.5, -6.75, 1.5, -3.0], [3, -3, 3, -3, 3, -3]])


def test_greedy_takes_the_best_of_the_penalised_logits_whatever_the_limits():
    logits_BV = np.array([[1.0, 4.0, 3.9, 3.9]], np.float32)
    asked = {"top_k": 1, "top_p": 0.1, "min_p": 1.0, "seed": 3}
    for penalty, expected in (
        ({}, 1),
        ({"repetition_penalty": 1.1}, 2),
        ({"logit_bias": {0: 2.95}}, 1),
        ({"logit_bias": {0: 3.1}}, 0),
    ):
        sampling = Sampling(**asked, **penalty)
        got = sample(logits_BV, np.array([5]), to_arrays([sampling]), to_history([sampling], [[1]], [[]], 4))
        assert got.tokens_B[0] == expected
    assert sample(logits_BV, np.array([5]), None, None).tokens_B[0] == 1


def test_the_only_token_left_is_drawn_even_with_the_largest_random_bits():
    """They are 1 as a float32, and the token's time would be infinite, as that of the tokens beyond the limits."""
    position, token, size = 85, 24926, 102400  # found by search
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), position)
    assert np.float32(jax.random.bits(key, (size,))[token]) == 2**32
    logits_BV = np.where(np.arange(size) == token, 5.0, 0.0).astype(np.float32)[None]
    got = sample(logits_BV, np.array([position]), to_arrays([Sampling(temperature=1.0, top_k=1)]), None)
    assert got.tokens_B[0] == token


def test_log_probabilities_are_the_models_own():
    sampling = Sampling(temperature=2.0, top_k=1, presence_penalty=2.0, logit_bias={2: 100})
    history = to_history([sampling], [[]], [[0, 0]], 4)
    got = sample(LOGITS_V[None], np.array([0]), to_arrays([sampling]), history, top=4)
    assert got.tokens_B[0] == 2
    np.testing.assert_allclose(got.logprobs_B, np.log(PROBS_V[2:3]), rtol=1e-5)
    np.testing.assert_array_equal(got.top_ids_BK, [[0, 2, 3, 1]])
    np.testing.assert_allclose(got.top_logprobs_BK, [np.log(PROBS_V[[0, 2, 3, 1]])], rtol=1e-5)


def test_the_most_likely_tokens_are_those_of_a_stable_sort():
    logits_BV = np.round(np.random.default_rng(0).normal(size=(4, 200))).astype(np.float32)
    logits_BV[1, 5:] = -np.inf
    got = sample(logits_BV, np.zeros(4, np.int32), None, None, top=20)
    order_BV = np.argsort(-logits_BV, axis=-1, kind="stable")
    np.testing.assert_array_equal(got.top_ids_BK, order_BV[:, :20])
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits_BV)), order_BV[:, :20], axis=1)
    np.testing.assert_allclose(got.top_logprobs_BK, expected, rtol=1e-5)


NAMES = [f.name for f in dataclasses.fields(Sampling)]
NONSENSE = [
    None,
    "",
    "hot",
    float("nan"),
    float("inf"),
    -(10**5000),
    10**5000,
    -1e308,
    1e308,
    [],
    [[[]]],
    {"a": 1},
    {-1: 1},
    b"x",
]
NONSENSE += [
    (1.5,),
    (True,),
    (-1,),
    ("",),
    (None,),
    {0: float("nan")},
    {0: 101},
    {0: True},
    {True: 1},
    {0: [1]},
    {10**5000: "\n"},
    {1.0: 1},
]


@pytest.mark.parametrize("name", NAMES)
def test_nonsense_is_refused_by_name_in_one_short_line(name):
    for value in [*NONSENSE, *([True] if name != "ignore_eos" else [0, 1])]:
        if (name, value) == ("max_new_tokens", 10**5000):
            continue  # the context ends first
        with pytest.raises(InputError, match=rf"^{name} (is|has|of) .*, expected ") as refused:
            Sampling(**{name: value})
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 2),
        ("top_k", -1),
        ("top_k", 2**31),
        ("min_p", 1.01),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("n", 0),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**32),
        ("logit_bias", {3: 100.5}),
        ("logit_bias", {"3": 1}),
        ("stop_token_ids", [3]),
    ],
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"{field} (is|has|of)"):
        Sampling(**{field: value})


def test_ids_are_checked_against_the_vocabulary():
    check(Sampling(logit_bias={9: 1}, stop_token_ids=(0, 9), logprobs=10, top_k=11), 10, "line 3")
    for bad, told in (
        (Sampling(logit_bias={1: 1, 10: 1}), r"line 3: logit_bias has token id 10, expected an integer in \[0, 9\]"),
        (Sampling(stop_token_ids=(9, 10**5000)), "line 3: stop_token_ids has token id int of too many digits"),
        (Sampling(logprobs=11), "line 3: logprobs is 11, expected at most 10"),
    ):
        with pytest.raises(InputError, match=told):
            check(bad, 10, "line 3")
