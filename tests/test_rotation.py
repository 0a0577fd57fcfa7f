"""The rotated model is the same function, and its latents survive 6 bits where single channels are large."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv2_jax import config, model
from dsv2_jax.completion import complete
from dsv2_jax.engine import Engine
from dsv2_jax.projections import exact
from dsv2_jax.rotation import rotated
from dsv2_jax.sampling import Sampling
from dsv2_jax.score import score
from sharding.mesh import make_mesh

CFG = dataclasses.replace(
    config.tiny(), num_hidden_layers=2, initializer_range=0.1, vocab_size=512, kv_lora_rank=512, qk_rope_head_dim=64
)
IDS = np.random.default_rng(0).integers(0, 512, (2, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def m():
    """A model whose latent norm has gains of unlike sizes."""
    with jax.set_mesh(make_mesh()):
        made = model.init(CFG, 0, jnp.float32)
        for stack in (made.dense, made.moe):
            stack.attn.kv_norm[...] = jnp.exp(jax.random.normal(jax.random.key(1), stack.attn.kv_norm.shape))
        return made


def test_the_rotated_model_is_the_same_function(m):
    turned = rotated(m)
    wanted, got = model.trace(m, IDS).logits, model.trace(turned, IDS).logits
    assert np.linalg.norm(got - wanted) <= 1e-5 * np.linalg.norm(wanted)
    changed = [name for name, leaf in model.parameters(turned).items() if leaf is not model.parameters(m)[name]]
    assert sorted({name.split(".")[-1] for name in changed}) == ["kv_norm", "w_dkv", "w_uk", "w_uv"]


def test_8_bit_weights_are_turned_into_others():
    m = model.init(CFG, 0, jnp.float32, fp8=True)
    plain = model.init(CFG, 0, jnp.float32)
    for kind in ("dense", "moe"):
        getattr(plain, kind).attn.w_dkv = nnx.Param(exact(getattr(m, kind).attn.w_dkv))
    wanted, got = (model.parameters(rotated(one)) for one in (plain, m))
    for name in ("moe.attn.w_dkv", "dense.attn.w_dkv", "moe.attn.w_uk"):
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-6, atol=1e-6)
    assert "moe.attn.w_o.values" in got


@pytest.mark.parametrize("dtype", ["fp8", "int6"])
def test_answers_from_a_small_cache_stay_near(m, dtype):
    """Forced along the same tokens by a bias, log-probabilities through 8 and 6-bit latents stay near those in float32."""
    prompt, sampling = IDS[0].tolist(), Sampling(max_new_tokens=8, logit_bias={7: 100.0})
    got = complete(Engine(m, cache_dtype=dtype, cache_tokens=1024, max_batch=2), [(prompt, sampling)])[0][0]
    assert got.token_ids == [7] * 8
    error = np.abs(got.logprobs - next(score(m, [prompt + [7] * 8])).logprobs[-8:])
    assert 0 < error.max() < 0.3  # in nats, after eight tokens of a random model whose log-probabilities spread over several
