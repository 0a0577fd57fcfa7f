"""Engine laws: alone = in any batch, chunking, order, with shared pages or none left; everything comes back; nothing recompiles."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import config, engine, model, steps
from dsv2_jax.completion import complete, greedy
from dsv2_jax.engine import Engine
from dsv2_jax.fields import InputError
from dsv2_jax.sampling import Sampling
from pallas_kernels.latent_pages import PAGE
from sharding.mesh import make_mesh

CFG = dataclasses.replace(config.tiny(), num_hidden_layers=2, initializer_range=0.1, vocab_size=512, max_position_embeddings=1024)
PROMPTS = [np.random.default_rng(n).integers(0, 512, n).tolist() for n in (5, 1, 33, 17, 200, 64, 65)]
GREEDY, SAMPLED = Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=50, seed=7)
BOTH = {"greedy": GREEDY, "sampled": SAMPLED}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", 256)
    monkeypatch.setattr(engine, "EXTEND", 64)


def new_engine(m, pages: int = 32, seats: int = 8, eos_id: int | None = None) -> Engine:
    """An engine with so many pages and seats on each device, of one size, so that all tests share their programs."""
    one = Engine(m, cache_tokens=32 * PAGE, max_batch=8, eos_id=eos_id)
    for pool, free in zip(one._pools, one._free_seats):
        pool.take(32 - pages)
        del free[seats:]
    return one


@pytest.fixture(scope="module")
def m():
    with jax.set_mesh(make_mesh()):
        return model.init(CFG, 0, jnp.float32)


@pytest.fixture(scope="module")
def alone(m):
    """What each prompt gets by itself, in an engine of its own."""
    with jax.set_mesh(make_mesh()):
        return {name: [complete(new_engine(m), [(p, sampling)])[0][0] for p in PROMPTS] for name, sampling in BOTH.items()}


def same(got, wanted) -> None:
    assert [one[0].token_ids for one in got] == [one.token_ids for one in wanted]
    for one, other in zip(got, wanted):
        np.testing.assert_allclose(one[0].logprobs, other.logprobs, atol=1e-5)
        assert one[0].finish_reason == other.finish_reason


def test_greedy_through_the_cache_equals_repeated_full_forward(m):
    prompts, new = PROMPTS[:5], 6
    padded = np.zeros((len(prompts), 256), np.int32)
    lengths = np.array(list(map(len, prompts)))
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    for step in range(new):
        logits = np.asarray(model.trace(m, padded).logits)
        padded[np.arange(len(prompts)), lengths + step] = logits[np.arange(len(prompts)), lengths + step - 1].argmax(-1)
    assert greedy(m, prompts, new) == [row[n : n + new].tolist() for row, n in zip(padded, lengths)]


@pytest.mark.parametrize("name", BOTH)
def test_a_mixed_batch_gives_each_prompt_what_it_gets_alone(m, alone, name):
    requests = [(p, BOTH[name]) for p in PROMPTS]
    for seats in (3, 8):  # more than run at a time; all at once
        same(complete(new_engine(m, seats=seats), requests), alone[name])
    same(complete(new_engine(m), requests[::-1])[::-1], alone[name])


@pytest.mark.parametrize("name", BOTH)
def test_chunked_prefill_gives_the_same(m, alone, name, monkeypatch):
    monkeypatch.setattr(engine, "PREFILL", 64)
    monkeypatch.setattr(engine, "EXTEND", 64)
    one = new_engine(m)
    same(complete(one, [(p, BOTH[name]) for p in PROMPTS]), alone[name])
    assert one.counters.prompt_tokens == sum(map(len, PROMPTS))


@pytest.mark.parametrize("name", BOTH)
def test_running_out_of_pages_costs_time_and_no_answer(m, alone, name):
    """Seven pages for answers that need up to four: all come in, and some must leave and come again."""
    long = dataclasses.replace(BOTH[name], max_new_tokens=90)
    prompts = PROMPTS[:4] + PROMPTS[5:]
    wanted = complete(new_engine(m), [(p, long) for p in prompts])
    one = new_engine(m, pages=7)
    same(complete(one, [(p, long) for p in prompts]), [answers[0] for answers in wanted])
    assert one.counters.preemptions > 0 and one.free_pages == 7


def test_shared_beginnings_are_found_and_change_nothing(m, alone):
    """The same prompts again, longer ones with the same beginning, and an answer as part of the next prompt."""
    one = new_engine(m)
    requests = [(p, GREEDY) for p in PROMPTS]
    same(complete(one, requests), alone["greedy"])
    assert one.counters.reused_tokens == 0
    same(complete(one, requests), alone["greedy"])
    assert one.counters.reused_tokens == 3 * 64 + 0 + 64  # 200 tokens, 64 (one has to be computed), 65
    grown = [PROMPTS[4] + alone["greedy"][4].token_ids + PROMPTS[5], PROMPTS[4][:150] + PROMPTS[2]]
    fresh = complete(new_engine(m), [(p, GREEDY) for p in grown])
    same(complete(one, [(p, GREEDY) for p in grown]), [answers[0] for answers in fresh])
    assert one.counters.reused_tokens == 256 + 3 * 64 + 2 * 64
    assert one.free_pages == 32


def test_several_answers_share_the_prompt_and_differ(m):
    sampling = dataclasses.replace(SAMPLED, n=3, temperature=1.5, top_p=1.0)
    one = new_engine(m)
    answers = complete(one, [(PROMPTS[4], sampling)])[0]
    assert len({tuple(a.token_ids) for a in answers}) == 3
    assert one.counters.reused_tokens == 2 * 3 * 64
    first = dataclasses.replace(sampling, n=1)
    assert complete(one, [(PROMPTS[4], first)])[0][0].token_ids == answers[0].token_ids


def test_eight_devices_give_the_tokens_of_one(alone):
    with jax.set_mesh(make_mesh(2, 4)):
        m8 = model.init(CFG, 0, jnp.float32)
        for name, wanted in alone.items():
            same(complete(new_engine(m8, pages=8, seats=2), [(p, BOTH[name]) for p in PROMPTS]), wanted)


def test_bfloat16_follows_float32(m, alone):
    low = jax.tree.map(lambda a: a.astype(jnp.bfloat16), m)
    got = complete(new_engine(low), [(p, Sampling(max_new_tokens=4)) for p in PROMPTS[:4]])
    for answers, wanted in zip(got, alone["greedy"]):
        assert len(answers[0].token_ids) == 4 and answers[0].logprobs[0] == pytest.approx(wanted.logprobs[0], abs=0.3)


def test_decode_steps_hold_all_answers_and_have_few_sizes():
    for max_batch in (1, 7, 8, 9, 100, 256, 300, 512):
        sizes = [engine.decode_rows(n, max_batch) for n in range(1, max_batch + 1)]
        assert all(n <= rows <= max_batch + 7 and rows % 8 == 0 for n, rows in enumerate(sizes, 1))
        assert len(set(sizes)) <= 4 and sizes[0] == 8


def test_a_step_of_another_size_gives_the_same(m, alone):
    """Forty seats: eight rows, sixteen and forty, while prompts come and answers end."""
    one = Engine(m, cache_tokens=64 * PAGE, max_batch=40)
    same(complete(one, [(p, GREEDY) for p in PROMPTS * 3]), alone["greedy"] * 3)


def test_stops(m):
    def run(eos_id=None, stop=lambda index, output: False, **asked):
        one = new_engine(m, eos_id=eos_id)
        answer = complete(one, [(PROMPTS[2], Sampling(max_new_tokens=6, **asked))], stop)[0][0]
        assert one.free_pages == 32 and not one.busy
        return answer.token_ids, answer.finish_reason

    free, reason = run()
    assert (len(free), reason) == (6, "length")
    third = free[2]
    assert third not in free[:2]
    assert run(eos_id=third) == (free[:3], "stop")
    assert run(eos_id=third, ignore_eos=True) == (free, "length")
    assert run(stop_token_ids=(third,)) == (free[:3], "stop")
    assert run(stop_token_ids=(third,), ignore_eos=True) == (free[:3], "stop")
    assert run(stop=lambda index, output: output.token == third) == (free[:3], "stop")


def test_the_end_of_the_context_ends_the_answer(m):
    short = dataclasses.replace(CFG, max_position_embeddings=40)
    small = model.init(short, 0, jnp.float32)
    done = complete(new_engine(small), [(PROMPTS[2], Sampling(max_new_tokens=100))])[0][0]
    assert (len(done.token_ids), done.finish_reason) == (7, "length")
    with pytest.raises(InputError, match="the prompt has 40 tokens, expected at most 39"):
        greedy(small, [[1] * 40], 1)


def test_what_no_cache_of_this_size_can_hold_is_refused(m):
    one = Engine(m, cache_tokens=512)
    with pytest.raises(InputError, match="request: prompt and answer take up to 900 tokens of cache, expected at most 512"):
        one.add_request([1] * 600, Sampling(max_new_tokens=300))
    with pytest.raises(InputError, match="cache_tokens is 63, expected at least 64"):
        Engine(m, cache_tokens=63)
    with pytest.raises(InputError, match="cache_dtype int6: latent_dim is 64, expected 512"):
        Engine(m, cache_tokens=512, cache_dtype="int6")


def test_likeliest_tokens_are_reported_where_asked(m):
    asked = Sampling(max_new_tokens=4, logprobs=3)
    with_top, without = complete(new_engine(m), [(PROMPTS[2], asked), (PROMPTS[3], Sampling(max_new_tokens=4))])
    for token, logprob, top in zip(with_top[0].token_ids, with_top[0].logprobs, with_top[0].top_logprobs):
        assert len(top) == 3 and top[0] == (token, pytest.approx(logprob))
    assert without[0].top_logprobs == [[]] * 4


def test_penalties_survive_other_requests_and_running_out_of_pages(m):
    """Frequent tokens are pushed away: an answer's history is its own, follows it out of its seat, and is not the next one's."""
    plain, asked = Sampling(max_new_tokens=90), Sampling(max_new_tokens=90, frequency_penalty=2.0, repetition_penalty=1.5)
    biased = Sampling(max_new_tokens=3, logit_bias={400: 100.0})
    requests = [(PROMPTS[i], s) for i, s in enumerate((asked, plain, asked, plain, biased))]
    wanted = [complete(new_engine(m), [request])[0][0] for request in requests]
    assert (
        wanted[4].token_ids == [400] * 3 and wanted[0].token_ids != complete(new_engine(m), [(PROMPTS[0], plain)])[0][0].token_ids
    )
    one = new_engine(m, pages=5, seats=3)
    same(complete(one, requests), wanted)
    assert one.counters.preemptions > 0
    same(complete(one, requests[::-1])[::-1], wanted)


def test_a_stream_is_one_request_and_abort_ends_it(m, alone):
    one = new_engine(m)
    numbers = [one.add_request(p, Sampling(max_new_tokens=9)) for p in PROMPTS[:3]]
    tokens = [output.token for output in one.stream(numbers[1])]
    assert tokens == alone["greedy"][1].token_ids
    number = one.add_request(PROMPTS[4], Sampling(max_new_tokens=500))
    for count, _ in enumerate(one.stream(number)):  # ends by itself
        if count == 3:
            one.abort(number)
    assert count == 3
    waiting = one.add_request(PROMPTS[4], Sampling(max_new_tokens=500))
    one.abort(waiting)
    while one.busy:
        assert all(output.request not in (number, waiting) for output in one.step())
    assert one.free_pages == 32
    assert list(one.stream(number)) == []


BAD = [
    ([], {}, "the prompt is empty"),
    ([512], {}, r"token id 512, expected an integer in \[0, 511\]"),
    ([-1], {}, "-1"),
    ([1.5], {}, "1.5"),
    ([True], {}, "True"),
    (["a"], {}, "'a'"),
    ([None], {}, "None"),
    ([float("nan")], {}, "nan"),
    ([2**70], {}, "expected an integer"),
    ([1] * 1024, {}, "the prompt has 1024 tokens, expected at most 1023"),
    ([1], {"stop_token_ids": (512,)}, "stop_token_ids"),
    ([1], {"logit_bias": {512: 1.0}}, "logit_bias"),
    ([1], {"temperature": float("nan")}, "temperature is nan"),
    ([1], {"temperature": "hot"}, "temperature is 'hot'"),
    ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ([1], {"top_p": -0.5}, "top_p is -0.5"),
    ([1], {"n": 0}, "n is 0"),
    ([1], {"seed": -1}, "seed is -1"),
]


def test_abuse_is_refused_and_leaves_nothing_behind(m, alone):
    """300 requests that cannot be run, among good ones: each error names the field, and the good ones get what they always get."""
    one, chance, good = new_engine(m), random.Random(0), {}
    for count in range(300):
        tokens, asked, told = chance.choice(BAD)
        with pytest.raises(InputError, match=told):
            one.add_request(tokens, Sampling(**asked))
        if count % 50 == 0:
            good[one.add_request(PROMPTS[2], GREEDY)] = []
        for output in one.step() if count % 3 == 0 else ():
            good[output.request].append(output.token)
    one.abort(12345)
    while one.busy:
        for output in one.step():
            good[output.request].append(output.token)
    assert list(good.values()) == [alone["greedy"][2].token_ids] * 6
    assert one.free_pages == 32


def test_random_traffic_compiles_nothing_new_and_leaks_nothing(m):
    """Random lengths, aborts and options: once all shapes have been seen, no program is added; and every page comes back."""
    one, chance = new_engine(m, pages=8, seats=2), random.Random(1)

    def traffic(requests):
        numbers = []
        for _ in range(requests):
            new, temperature = chance.randrange(1, 40), chance.choice((0.0, 1.0))
            sampling = Sampling(max_new_tokens=new, temperature=temperature, seed=chance.randrange(9))
            prompt = [chance.randrange(3)] * chance.choice((1, 20, 64, 100, 150))
            numbers.append(one.add_request(prompt, sampling))
            for _ in range(chance.randrange(12)):
                one.step()
            if chance.random() < 0.2:
                one.abort(chance.choice(numbers))
        while one.busy:
            one.step()
        assert one.free_pages == 8

    traffic(100)
    compiled = steps.compilations()
    traffic(100)
    assert steps.compilations() == compiled
    assert one.counters.reused_tokens > 0
