"""Routing and the balance losses against the paper's equations written naively, and at their known values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import config, router
from dsv2_jax.fields import InputError
from dsv2_jax.router import Routing, balance, expert_load, reach, route

CFG = dataclasses.replace(config.tiny(), routed_scaling_factor=16.0)  # 16 experts in 8 groups, 3 groups and 4 experts a token


def naive(x_D, w_DE, cfg):
    """Section 2.2.2 for one token: the groups with the highest affinity of any of their experts, then the top experts in them."""
    logits_E = np.asarray(x_D, np.float64) @ np.asarray(w_DE, np.float64)
    scores_E = np.exp(logits_E - logits_E.max()) / np.exp(logits_E - logits_E.max()).sum()
    per_group = cfg.n_routed_experts // cfg.n_group
    groups = sorted(range(cfg.n_group), key=lambda g: -scores_E[g * per_group : (g + 1) * per_group].max())[: cfg.topk_group]
    reachable = [e for e in range(cfg.n_routed_experts) if e // per_group in groups]
    experts = sorted(reachable, key=lambda e: -scores_E[e])[: cfg.num_experts_per_tok]
    return experts, scores_E[experts], scores_E


@pytest.mark.parametrize("norm", [False, True])
def test_device_limited_routing_is_the_papers(norm):
    cfg = dataclasses.replace(CFG, norm_topk_prob=norm)
    rng = np.random.default_rng(0)
    x_BTD, w_DE = rng.normal(size=(2, 50, 128)).astype(np.float32), rng.normal(size=(128, 16)).astype(np.float32) * 0.2
    got = route(jnp.asarray(x_BTD), jnp.asarray(w_DE), cfg)
    unlimited = 0
    for b, t in np.ndindex(2, 50):
        experts, scores, scores_E = naive(x_BTD[b, t], w_DE, cfg)
        assert got.experts_BTK[b, t].tolist() == experts
        np.testing.assert_allclose(got.weights_BTK[b, t], scores / scores.sum() if norm else scores * 16, rtol=1e-4)
        np.testing.assert_allclose(got.scores_BTE[b, t], scores_E, rtol=1e-4)
        unlimited += set(experts) != set(np.argsort(-scores_E)[:4])
    assert unlimited > 10  # else the limit was not tested


def test_affinities_that_underflow_do_not_lead_out_of_the_groups():
    """A saturated router: three experts of three groups have all the affinity, a fourth must be taken all the same."""
    logits_E = np.full(16, -200.0, np.float32)
    logits_E[[6, 10, 14]] = 0, -0.1, -0.2
    got = route(jnp.asarray(logits_E)[None, None], jnp.eye(16), CFG)
    assert got.scores_BTE[0, 0, 0] == 0
    assert set(np.asarray(got.experts_BTK[0, 0] // 2).tolist()) == {3, 5, 7}


def test_greedy_takes_the_top_of_all():
    cfg = dataclasses.replace(CFG, topk_method="greedy", n_group=1, topk_group=1)
    x_BTD, w_DE = jax.random.normal(jax.random.key(0), (1, 20, 128)), jax.random.normal(jax.random.key(1), (128, 16)) * 0.2
    got = route(x_BTD, w_DE, cfg)
    np.testing.assert_array_equal(got.experts_BTK, jnp.argsort(-got.scores_BTE, axis=-1)[..., :4])


def test_router_works_in_float32_whatever_the_input():
    x_BTD, w_DE = (
        jax.random.normal(jax.random.key(0), (1, 20, 128), jnp.bfloat16),
        jax.random.normal(jax.random.key(1), (128, 16), jnp.bfloat16),
    )
    low, high = route(x_BTD, w_DE, CFG), route(x_BTD.astype(jnp.float32), w_DE.astype(jnp.float32), CFG)
    assert low.scores_BTE.dtype == low.weights_BTK.dtype == jnp.float32
    np.testing.assert_allclose(low.scores_BTE, high.scores_BTE, rtol=1e-5)  # the order of the sums; a bfloat16 sum is 1e-3 off


def test_in_parts_the_product_is_the_same(monkeypatch):
    """As a Hopper GPU has it made for few tokens of inference; what fills up the batch then needs no expert."""
    x_BTD, w_DE = (
        jax.random.normal(jax.random.key(0), (4, 5, 128), jnp.bfloat16),
        jax.random.normal(jax.random.key(1), (128, 16), jnp.bfloat16),
    )
    slots_BT = jnp.where(jnp.arange(20).reshape(4, 5) % 3 == 0, -1, 7)
    whole, padded = route(x_BTD, w_DE, CFG), route(x_BTD, w_DE, CFG, slots_BT)
    monkeypatch.setattr(router, "parts", lambda *_, inference: 8 if inference else 1)
    in_parts = route(x_BTD, w_DE, CFG, slots_BT)
    np.testing.assert_array_equal(padded.experts_BTK, jnp.where(slots_BT[..., None] < 0, 16, whole.experts_BTK))
    np.testing.assert_array_equal(in_parts.experts_BTK, padded.experts_BTK)
    np.testing.assert_allclose(in_parts.weights_BTK, whole.weights_BTK, rtol=1e-5)  # the order of the sums


def naive_balance(experts_BTK, scores_BTE, cfg):
    """Equations 23-31 without the coefficients, sequence by sequence; and the released code's form over all tokens."""
    E, K, D, M = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.n_group, cfg.topk_group
    per_group = E // D

    def of(experts_TK, scores_TE):
        T = len(experts_TK)
        f = [E / (K * T) * sum(i in chosen for chosen in experts_TK.tolist()) for i in range(E)]
        P = [sum(scores_TE[t][i] for t in range(T)) / T for i in range(E)]
        groups = [range(d * per_group, (d + 1) * per_group) for d in range(D)]
        f1 = [sum(f[j] for j in group) / len(group) for group in groups]
        P1 = [sum(P[j] for j in group) for group in groups]
        f2 = [D / (M * T) * sum(any(j in chosen for j in group) for chosen in experts_TK.tolist()) for group in groups]
        return [sum(a * b for a, b in zip(*pair)) for pair in ((f, P), (f1, P1), (f2, P1))]

    each = np.mean([of(*sequence) for sequence in zip(experts_BTK, scores_BTE)], axis=0)
    joint = of(experts_BTK.reshape(-1, K), scores_BTE.reshape(-1, E))[0]
    return dict(zip(("expert_balance", "device_balance", "comm_balance", "batch_balance"), [*each, joint]))


def test_balance_losses_are_the_equations():
    x_BTD, w_DE = jax.random.normal(jax.random.key(0), (3, 20, 128)), jax.random.normal(jax.random.key(1), (128, 16)) * 0.3
    routing = route(x_BTD, w_DE, CFG)
    wanted = naive_balance(np.asarray(routing.experts_BTK), np.asarray(routing.scores_BTE, np.float64), CFG)
    got = balance(routing, CFG)
    assert len({round(value, 3) for value in wanted.values()}) == 4  # else one could stand for another
    for name, value in wanted.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-5), name


def test_the_gradient_of_balance_flows_through_the_scores_alone():
    x_BTD, w_DE = jax.random.normal(jax.random.key(0), (3, 20, 128)), jax.random.normal(jax.random.key(1), (128, 16)) * 0.3
    routing = route(x_BTD, w_DE, CFG)
    for name in ("expert_balance", "device_balance", "comm_balance", "batch_balance"):
        whole = jax.grad(lambda w, name=name: balance(route(x_BTD, w, CFG), CFG)[name])(w_DE)
        fixed = jax.grad(lambda w, name=name: balance(routing._replace(scores_BTE=route(x_BTD, w, CFG).scores_BTE), CFG)[name])(
            w_DE
        )
        np.testing.assert_allclose(whole, fixed, atol=1e-9)
        assert np.abs(whole).max() > 1e-5


def test_perfect_balance_gives_one_and_collapse_more():
    tokens = 16
    experts_BTK = np.arange(2 * tokens * 4).reshape(2, tokens, 4) % 16  # every expert four times a sequence
    reached = np.stack([np.arange(tokens) + shift for shift in (0, 1, 2)], axis=-1) % 8  # exactly three groups a token
    experts_BTK[1] = np.concatenate([2 * reached, 2 * reached[:, :1] + 1], axis=-1)
    uniform = Routing(jnp.asarray(experts_BTK), *jnp.ones((2, 2, tokens, 4)), jnp.full((2, tokens, 16), 1 / 16))
    got = balance(uniform, CFG)
    assert float(got["expert_balance"]) == pytest.approx(1.0)
    assert float(got["device_balance"]) == pytest.approx(1.0)
    np.testing.assert_array_equal(expert_load(uniform.experts_BTK, 16)[0], 4)
    second = jax.tree.map(lambda a: a[1:], uniform)
    assert float(balance(second, CFG)["comm_balance"]) == pytest.approx(1.0)
    first = jax.tree.map(lambda a: a[:1], uniform)
    assert float(balance(first, CFG)["comm_balance"]) == pytest.approx(2 / 3)  # two groups a token where three are allowed
    collapsed = uniform._replace(
        experts_BTK=jnp.zeros_like(uniform.experts_BTK) + jnp.arange(4),
        scores_BTE=jnp.zeros((2, tokens, 16)).at[..., :4].set(0.25),
    )
    assert float(balance(collapsed, CFG)["expert_balance"]) == pytest.approx(4.0)


def test_balance_is_per_sequence_but_for_the_released_variant():
    """Two sequences that are each unbalanced balance each other out in the latter alone."""
    experts_BTK = jnp.stack([jnp.tile(jnp.arange(4), (8, 1)), jnp.tile(jnp.arange(4, 8), (8, 1))])
    scores_BTE = jax.nn.one_hot(experts_BTK, 16).sum(axis=2) / 4
    got = balance(Routing(experts_BTK, *jnp.ones((2, 2, 8, 4)), scores_BTE), CFG)
    assert float(got["expert_balance"]) == pytest.approx(4.0)
    assert float(got["batch_balance"]) == pytest.approx(2.0)


@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(CFG, topk_method="greedy", n_group=1, topk_group=1)])
def test_reach_is_what_uniform_routing_does(cfg):
    scores_BTE = jax.random.uniform(jax.random.key(0), (1, 4000, 16))
    experts_TK = np.asarray(route(jnp.log(scores_BTE), jnp.eye(16), cfg).experts_BTK)[0]
    for devices in (1, 2, 4, 8, 16):
        counts = [len(set(chosen // (16 // devices))) for chosen in experts_TK]
        most, mean = reach(cfg, devices)
        assert max(counts) == most and mean == pytest.approx(np.mean(counts), rel=0.15), devices


def test_an_expert_axis_that_cuts_groups_apart_unevenly_is_refused():
    with pytest.raises(InputError, match="expert=3"):
        reach(CFG, 3)
