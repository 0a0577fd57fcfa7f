"""Routing against the paper's rule written naively, and the balance loss at its known values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import config
from dsv2_jax.router import Routing, expert_balance, expert_load, route

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
    np.testing.assert_array_equal(low.scores_BTE, high.scores_BTE)


def test_perfect_balance_gives_one_and_collapse_more():
    tokens = 8
    experts_BTK = jnp.arange(2 * tokens * 4).reshape(2, tokens, 4) % 16  # every expert twice a sequence
    uniform = Routing(experts_BTK, jnp.ones((2, tokens, 4)), jnp.full((2, tokens, 16), 1 / 16))
    assert float(expert_balance(uniform, CFG)) == pytest.approx(1.0)
    np.testing.assert_array_equal(expert_load(experts_BTK, 16), 2)
    collapsed = Routing(
        jnp.zeros_like(experts_BTK) + jnp.arange(4), uniform.weights_BTK, jnp.zeros((2, tokens, 16)).at[..., :4].set(0.25)
    )
    assert float(expert_balance(collapsed, CFG)) == pytest.approx(4.0)


def test_balance_is_per_sequence():
    """Two sequences that are each unbalanced do not balance each other out."""
    experts_BTK = jnp.stack([jnp.tile(jnp.arange(4), (8, 1)), jnp.tile(jnp.arange(4, 8), (8, 1))])
    scores_BTE = jax.nn.one_hot(experts_BTK, 16).sum(axis=2) / 4
    assert float(expert_balance(Routing(experts_BTK, jnp.ones((2, 8, 4)), scores_BTE), CFG)) == pytest.approx(4.0)
