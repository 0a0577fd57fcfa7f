"""Models whose matrices are 8-bit floats, against the same models with every 8-bit product written out in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv2_jax import config, model, projections
from dsv2_jax.projections import project, quantised
from pallas_kernels import reference
from sharding import specs
from sharding.mesh import make_mesh
from tests.kernel_cases import close

# Widths that 128 does not divide, for the last blocks; weights large enough that a wrong scale shows.
TINY = dataclasses.replace(
    config.tiny(), num_hidden_layers=2, initializer_range=0.1, hidden_size=160, intermediate_size=200, moe_intermediate_size=72
)
LITE = dataclasses.replace(TINY, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy")


def rounded_rows(x_MK):
    """Activations as 8 bits keep them, a scale for each 128 columns."""
    blocks = jnp.pad(x_MK.astype(jnp.float32), ((0, 0), (0, -x_MK.shape[1] % 128))).reshape(len(x_MK), -1, 128)
    scale = jnp.maximum(jnp.abs(blocks).max(axis=2, keepdims=True), 1e-12) / 448
    return ((blocks / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale).reshape(len(x_MK), -1)


def exact(w):
    """[..., K, F] in float32 of 8-bit weights [..., F, K]."""
    values, scales = (a.astype(jnp.float32) for a in w)
    return (values * jnp.repeat(jnp.repeat(scales, 128, axis=-2), 128, axis=-1)).swapaxes(-1, -2)


def plain_matmul(x, w):
    y = jnp.dot(rounded_rows(x.reshape(-1, x.shape[-1])), exact(w), precision="highest")
    return y.astype(jnp.bfloat16).reshape(*x.shape[:-1], -1).astype(x.dtype)


def plain_mlp(x_MD, weight_M, w_gate, w_up, w_down, group_sizes_E, row_unit):
    def multiply(x, w):
        return (
            reference.grouped_matmul(rounded_rows(x), exact(w), group_sizes_E, row_unit).astype(jnp.bfloat16).astype(jnp.float32)
        )

    hidden = weight_M[:, None] * jax.nn.silu(multiply(x_MD, w_gate)) * multiply(x_MD, w_up)
    return multiply(hidden.astype(x_MD.dtype), w_down)[:, : x_MD.shape[1]].astype(x_MD.dtype)


def ids(batch, length):
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (batch, length)).astype(np.int32)


def error_of_tokens(got, wanted):
    """Relative, one a token. A sum that is rounded to other 8 bits spreads over later tokens (products off by 0.1% put all of them
    off by 7%), so that the median tells whether the same is computed."""
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


@pytest.mark.parametrize("subscripts, inputs, outputs", [("btd,dnx->btnx", 200, (3, 50)), ("btk,kd->btd", 160, (130,))])
def test_project_multiplies_either_kind_of_weight(subscripts, inputs, outputs):
    rng = np.random.default_rng(0)
    x = jax.reshard(jnp.asarray(rng.normal(size=(2, 5, inputs)), jnp.float32), specs.tokens_BT)
    layer = nnx.Module()
    layer.w_q = nnx.Param(jnp.asarray(rng.normal(size=(inputs, *outputs)), jnp.float32))
    w = quantised(layer).w_q
    assert (w.shape, w.values.dtype) == ((inputs, *outputs), jnp.float8_e4m3fn)
    stands_for = exact((w.values, w.scales))[:inputs, : np.prod(outputs)].reshape(w.shape)
    plain = project(subscripts, x, layer.w_q)
    close(plain, np.einsum(subscripts, x, layer.w_q[...]), 1e-5)
    got, wanted = project(subscripts, x, w), project(subscripts, x, nnx.Param(stands_for))
    assert (got.shape, got.dtype) == (plain.shape, x.dtype)
    close(got, wanted, 0.03)  # the activations' rounding
    close(got, plain, 0.04)  # and that of the weights


def test_norms_router_and_what_is_absorbed_stay_as_they_are():
    shapes = model.parameters(model.abstract(TINY, jnp.bfloat16, fp8=True))
    kept = {name.rpartition(".")[2] for name, leaf in shapes.items() if leaf.dtype == jnp.bfloat16}
    norms = {"attn_norm", "ffn_norm", "q_norm", "kv_norm", "final_norm"}
    assert kept == norms | {"embed", "w_head", "w_router", "w_kr", "w_uk", "w_uv"}


def test_the_236b_model_fits_two_gpus():
    """An H200 has 149.2 GB; of these 1.0 are that w_uk and w_uv stay bfloat16."""
    with jax.set_mesh(make_mesh(1, 2)):
        leaves = model.parameters(model.abstract(config.v2(), jnp.bfloat16, fp8=True)).values()
        held = sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in leaves)
    assert 126.5e9 < held < 126.6e9


def test_8_bits_have_no_gradient():
    m = model.abstract(TINY, jnp.float32, fp8=True)
    x_BTD = jax.ShapeDtypeStruct((2, 8, TINY.hidden_size), jnp.float32)
    dense, experts = (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), s.ffn) for s in (m.dense, m.moe))
    sizes_E = jnp.zeros(TINY.n_routed_experts, jnp.int32)
    for loss in (
        lambda x: dense(x).sum(),
        lambda x: experts.experts(x[0], x[0, :, 0], sizes_E, 8).sum(),
    ):
        with pytest.raises(TypeError, match="8-bit weights are for inference"):
            jax.eval_shape(jax.grad(loss), x_BTD)


def test_a_model_multiplies_what_its_8_bits_stand_for(monkeypatch):
    m = model.init(TINY, 0, jnp.float32, fp8=True)
    got = model.trace(m, ids(2, 24)).logits
    monkeypatch.setattr(projections, "matmul_fp8", plain_matmul)
    monkeypatch.setattr(projections, "grouped_mlp_fp8", plain_mlp)
    jax.clear_caches()
    assert np.median(error_of_tokens(got, model.trace(m, ids(2, 24)).logits)) < 1e-4


def test_meshes_agree():
    """One layer: what is drawn is the same, and what is computed; values and scales of experts are split, all else is whole."""
    cfg = dataclasses.replace(TINY, num_hidden_layers=1, first_k_dense_replace=0)
    runs = []
    for shape in ((1, 1), (2, 4)):
        with jax.set_mesh(make_mesh(*shape)):
            m = model.init(cfg, 0, jnp.float32, fp8=True)
            for name, leaf in model.parameters(m).items():
                split = [axis for axis in leaf.sharding.spec if axis]
                assert split == (["expert"] if ".experts." in name else []), name
            logits = model.trace(m, ids(8, 16)).logits
            runs.append((jax.tree.map(np.asarray, model.parameters(m)), np.asarray(logits)))
    (one, logits), (many, split_logits) = runs
    for name, leaf in one.items():
        assert leaf.tobytes() == many[name].tobytes(), name
    assert np.median(error_of_tokens(split_logits, logits)) < 1e-5
