"""Generation laws: alone = in any batch, cached = full forward, one compilation, stops, scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import config, generate, model
from dsv2_jax.fields import InputError
from dsv2_jax.generate import Request
from dsv2_jax.sampling import Sampling
from sharding.mesh import make_mesh

CFG = dataclasses.replace(config.tiny(), num_hidden_layers=2, initializer_range=0.1, vocab_size=512)
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 1, 33, 17)]


@pytest.fixture(scope="module")
def m():
    with jax.set_mesh(make_mesh()):
        return model.init(CFG, 0, jnp.float32)


def test_greedy_through_the_cache_equals_repeated_full_forward(m):
    prompt = PROMPTS[0]
    grown = list(prompt)
    for _ in range(6):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(grown)] = grown
        grown.append(int(model.trace(m, padded).logits[0, len(grown) - 1].argmax()))
    assert generate.greedy(m, [prompt], 6)[0] == grown[len(prompt) :]


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=50, seed=7)]
)
def test_a_mixed_batch_gives_each_prompt_what_it_gets_alone(m, sampling):
    requests = [Request(p, sampling) for p in PROMPTS]
    together = generate.generate(m, requests, eos_id=None)
    backwards = generate.generate(m, requests[::-1], eos_id=None)[::-1]
    for request, one, other in zip(requests, together, backwards):
        alone = generate.generate(m, [request], eos_id=None)[0]
        assert one.token_ids == alone.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, alone.logprobs, atol=1e-5)


def test_eight_devices_give_the_tokens_of_one(m):
    one = generate.greedy(m, PROMPTS, 5)
    with jax.set_mesh(make_mesh(2, 4)):
        assert generate.greedy(model.init(CFG, 0, jnp.float32), PROMPTS, 5) == one


def test_bfloat16_follows_float32(m):
    """A batch in bfloat16 runs wherever float32 does, and its log-probabilities stay near."""
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), m)
    sampling = Sampling(max_new_tokens=1)
    for one, other in zip(*(generate.generate(x, [Request(p, sampling) for p in PROMPTS], None) for x in (m, low))):
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.3)
    assert [len(tokens) for tokens in generate.greedy(low, PROMPTS, 4)] == [4] * 4


def test_decode_compiles_once_while_it_grows(m):
    generate.greedy(m, PROMPTS[:1], 3)
    compiled = generate.decode._cache_size()
    generate.greedy(m, PROMPTS[:1], 11)  # the same buckets
    assert generate.decode._cache_size() == compiled


def test_stops(m):
    sampling = Sampling(max_new_tokens=6)
    free = generate.generate(m, [Request(PROMPTS[2], sampling)], eos_id=None)[0]
    assert (len(free.token_ids), free.finish_reason) == (6, "length")
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    ended = generate.generate(m, [Request(PROMPTS[2], sampling)], eos_id=third)[0]
    assert (ended.token_ids, ended.finish_reason) == (free.token_ids[:3], "stop")
    ignoring = dataclasses.replace(sampling, ignore_eos=True)
    assert generate.generate(m, [Request(PROMPTS[2], ignoring)], eos_id=third)[0].token_ids == free.token_ids
    by_caller = generate.generate(m, [Request(PROMPTS[2], sampling)], None, lambda index, token: token == third)[0]
    assert (by_caller.token_ids, by_caller.finish_reason) == (free.token_ids[:3], "stop")


def test_the_end_of_the_context_ends_the_answer(m):
    short = dataclasses.replace(CFG, max_position_embeddings=40)
    with jax.set_mesh(make_mesh()):
        small = model.init(short, 0, jnp.float32)
    done = generate.generate(small, [Request(PROMPTS[2], Sampling(max_new_tokens=100))], eos_id=None)[0]
    assert (len(done.token_ids), done.finish_reason) == (7, "length")
    with pytest.raises(InputError, match="the prompt has 40 tokens, expected at most 39"):
        generate.greedy(small, [[1] * 40], 1)


@pytest.mark.parametrize(
    "prompt, told", [([], "empty"), ([512], r"token id 512, expected an integer in \[0, 511\]"), ([-1], "-1"), ([1.5], "1.5")]
)
def test_bad_prompts_are_refused(m, prompt, told):
    with pytest.raises(InputError, match=told):
        generate.greedy(m, [[1], prompt], 1)


def test_score_gives_the_log_probabilities_of_the_full_forward(m):
    scores = list(generate.score(m, PROMPTS, with_logits=True))
    for prompt, got in zip(PROMPTS, scores):
        logits = np.asarray(model.trace(m, np.array([prompt], np.int32)).logits[0])
        np.testing.assert_allclose(got.logits, logits, atol=1e-4)
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(got.logprobs, expected, atol=1e-4)
        assert got.logprobs.shape == (len(prompt) - 1,)
