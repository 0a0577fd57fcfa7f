"""Laws of the whole model: decode = prefill = full forward, packed = unpacked. Meshes: test_sharded_training.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv2_jax import cache, config, mla, model
from dsv2_jax.cache import Cache
from dsv2_jax.context import Context
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


def through(pages, positions_BT, attend: bool = True) -> Cache:
    """Tokens at these positions in pages of their own, two a request, in no order."""
    table_BP = np.array([[3, 1], [0, 2]])[: len(positions_BT)]
    slots_BT = np.take_along_axis(table_BP, positions_BT // 64, axis=1) * 64 + positions_BT % 64
    return Cache(pages, place(slots_BT), place(table_BP) if attend else None)


def distance(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_equals_prefill_equals_full_forward_equals_unrolled(name):
    cfg = VARIANTS[name]
    m = model.init(cfg, 0, jnp.float32)
    length = 70  # more than a page
    ids = tokens(2, length)
    hidden_BTD, _, _ = jax.jit(lambda m: forward(m, ids))(m)
    full = m.logits(hidden_BTD)
    assert distance(model.trace(m, jnp.asarray(ids)).logits, full) < BOUND

    run = jax.jit(lambda m, ids, positions_BT, cache: forward(m, ids, positions_BT, cache=cache))
    positions_BT = np.broadcast_to(np.arange(length), (2, length))
    first = through(cache.empty(cfg, 4, "float32"), positions_BT[:, : length - 8], attend=False)
    hidden_BTD, pages, _ = run(m, ids[:, : length - 8], positions_BT[:, : length - 8], first)
    steps = [m.logits(hidden_BTD)]
    for i in range(length - 8, length):
        hidden_BTD, pages, _ = run(m, ids[:, [i]], positions_BT[:, [i]], through(pages, positions_BT[:, [i]]))
        steps.append(m.logits(hidden_BTD))
    assert distance(jnp.concatenate(steps, axis=1), full) < BOUND


def test_absorbed_equals_naive_over_a_chunk():
    m = model.init(TINY, 0, jnp.float32)
    ids = tokens(2, 24)
    naive, _, _ = forward(m, ids)
    positions_BT = np.broadcast_to(np.arange(24), (2, 24))
    absorbed, _, _ = forward(m, ids, cache=through(cache.empty(TINY, 4, "float32"), positions_BT))
    assert distance(absorbed, naive) < BOUND


def test_what_fills_up_a_batch_changes_nothing_and_is_not_stored():
    m = model.init(TINY, 0, jnp.float32)
    ids, positions_BT = tokens(2, 8), np.broadcast_to(np.arange(8), (2, 8))
    whole, pages, stats = forward(m, ids, positions_BT, cache=through(cache.empty(TINY, 4, "float32"), positions_BT))
    filled_BT, padding = np.concatenate([positions_BT, np.full((2, 8), -1)], axis=1), tokens(2, 8, seed=1)
    used = through(cache.empty(TINY, 4, "float32"), filled_BT)
    used = used._replace(slots_BT=place(np.where(filled_BT < 0, -1, np.asarray(used.slots_BT))))
    filled, filled_pages, filled_stats = forward(m, np.concatenate([ids, padding], axis=1), filled_BT, cache=used)
    assert distance(filled[:, :8], whole) < BOUND
    np.testing.assert_allclose(filled_pages.latent, pages.latent, atol=1e-5)
    assert np.asarray(filled_stats["experts"])[:, :, :8].tolist() == np.asarray(stats["experts"]).tolist()


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


def test_layers_are_computed_again_in_the_backward_pass_also_where_no_loop_keeps_the_passes_apart():
    def barriers(layers):
        m = model.abstract(dataclasses.replace(TINY, num_hidden_layers=layers), jnp.float32)
        ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
        text = str(jax.make_jaxpr(jax.grad(lambda m, ids: forward(m, ids, remat="full")[0].sum(), allow_int=True))(m, ids))
        return text.count("prevent_cse=True"), text.count("prevent_cse=False")

    (alone, stacked), mixed = barriers(2), barriers(3)  # a dense one, and one or two others
    assert alone and not stacked
    assert all(mixed)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_rope_keys_of_few_tokens_are_those_of_many(mesh_shape):
    """In a decode step bfloat16 keys are summed in parts."""
    with jax.set_mesh(make_mesh(*mesh_shape)):
        attention = mla.MLA(TINY, nnx.Rngs(0), jnp.bfloat16)
        x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(8, 1, TINY.hidden_size)), jnp.bfloat16)
        x_BTD = jax.reshard(x_BTD, specs.activations_BTD)
        ctx = Context(*[None] * 4)
        got, wanted = (attention._rope_keys(x_BTD, ctx._replace(table_BP=table)) for table in (x_BTD, None))
    np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=2**-7, atol=2**-10)
