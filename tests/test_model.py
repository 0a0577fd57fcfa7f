"""Laws of the whole model: decode = prefill = full forward, packed = unpacked. Meshes: test_sharded_training.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import cache as latent_cache
from dsv2_jax import config, model
from dsv2_jax.loss import log_likelihood
from sharding import specs
from sharding.mesh import make_mesh

BOUND = 1e-5  # relative, ||a - b|| / ||b|| per tensor, float32 (design: numerics)
# Weights large enough that a wrong scale, mask or pairing shows; 0.02 hides it.
TINY = dataclasses.replace(config.tiny(), num_hidden_layers=3, initializer_range=0.1)
VARIANTS = {
    "v2": TINY,
    "lite": dataclasses.replace(TINY, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"),
    "every other layer dense": dataclasses.replace(TINY, num_hidden_layers=5, moe_layer_freq=2),
    "all dense": dataclasses.replace(TINY, n_routed_experts=None),
    "no shared expert": dataclasses.replace(TINY, n_shared_experts=None, norm_topk_prob=True, rope_scaling=None),
}


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def place(array) -> jax.Array:
    return jax.reshard(jnp.asarray(array), specs.tokens_BT)


def forward(m, tokens_BT, positions_BT=None, segments_BT=None, **kwargs):
    batch, length = tokens_BT.shape
    positions_BT = np.broadcast_to(np.arange(length), (batch, length)) if positions_BT is None else positions_BT
    segments_BT = np.ones((batch, length), np.int32) if segments_BT is None else segments_BT
    return m(place(tokens_BT), place(positions_BT), place(segments_BT), **kwargs)


def distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_equals_prefill_equals_full_forward_equals_unrolled(name):
    cfg = VARIANTS[name]
    m = model.init(cfg, 0, jnp.float32)
    ids = tokens(2, 24)
    hidden_BTD, _, _ = jax.jit(lambda m: forward(m, ids))(m)
    full = m.logits(hidden_BTD)
    assert distance(model.trace(m, jnp.asarray(ids)).logits, full) < BOUND

    cache = latent_cache.empty(cfg, 2, 32, jnp.float32)
    hidden_BTD, cache, _ = jax.jit(lambda m, c: forward(m, ids[:, :16], cache=c))(m, cache)
    steps = [m.logits(hidden_BTD)]
    decode = jax.jit(lambda m, t, p, c: m(t, p, jnp.ones_like(t), c, absorbed=True))
    for i in range(16, 24):
        hidden_BTD, cache, _ = decode(m, place(ids[:, i : i + 1]), place(np.full((2, 1), i)), cache)
        steps.append(m.logits(hidden_BTD))
    assert distance(jnp.concatenate(steps, axis=1), full) < BOUND


def test_absorbed_equals_naive_over_a_chunk():
    m = model.init(TINY, 0, jnp.float32)
    ids = tokens(2, 24)
    naive, _, _ = forward(m, ids)
    cache = latent_cache.empty(TINY, 2, 24, jnp.float32)
    absorbed, _, _ = forward(m, ids, cache=cache, absorbed=True)
    assert distance(absorbed, naive) < BOUND


def test_packed_equals_unpacked():
    m = model.init(TINY, 0, jnp.float32)
    ids = tokens(1, 24)
    positions = np.concatenate([np.arange(10), np.arange(14)])[None]
    segments = np.repeat([[1, 2]], [10, 14], axis=1)
    packed, _, _ = forward(m, ids, positions, segments)
    assert distance(packed[:, :10], forward(m, ids[:, :10])[0]) < BOUND
    assert distance(packed[:, 10:], forward(m, ids[:, 10:])[0]) < BOUND


@pytest.mark.parametrize("preset, total", [("v2", 235_741_434_880), ("v2_lite", 15_706_484_224)])
def test_parameters_add_up_to_the_published_count(preset, total):
    shapes = model.parameters(model.abstract(config.preset(preset), jnp.bfloat16))
    assert sum(int(np.prod(s.shape, dtype=np.int64)) for s in shapes.values()) == total


def test_experts_are_split_over_the_expert_axis_and_the_rest_is_not():
    with jax.set_mesh(make_mesh(2, 4)):
        for name, leaf in model.parameters(model.abstract(TINY, jnp.float32)).items():
            expected = "expert" if ".experts." in name else None
            assert (leaf.sharding.spec[1] if leaf.ndim > 1 else None) == expected, name


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
def test_float32_never_becomes_tf32(remat):
    """Every matmul of a float32 gradient asks for full precision, which only a GPU would not give by itself."""

    def total(m, ids):
        hidden_BTD, _, _ = m(*model.from_zero(ids), remat=remat)
        return log_likelihood(m, hidden_BTD, ids, jnp.ones(ids.shape))

    lowered = jax.jit(jax.grad(total)).lower(model.abstract(TINY, jnp.float32), jax.ShapeDtypeStruct((2, 16), jnp.int32))
    matmuls = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    assert len(matmuls) > 50
    assert [line for line in matmuls if "precision = [HIGHEST, HIGHEST]" not in line] == []
