"""Queries in the latent space: every implementation against a product in float64, and the Hopper kernel in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import absorb_queries, dispatch
from tests.kernel_cases import assert_repeats


def operands(tokens, heads, dims=(192, 128, 512)):
    rng, (whole, nope, latent) = np.random.default_rng(0), dims
    q_MNX, w_CNH = rng.normal(size=(tokens, heads, whole)), rng.normal(size=(latent, heads, nope))
    return tuple(jnp.asarray(x, jnp.bfloat16) for x in (q_MNX, w_CNH))


def check(got_MNC, q_MNX, w_CNH):
    exact_MNC = np.einsum("mnh,cnh->mnc", *(np.asarray(x, np.float64) for x in (q_MNX[..., : w_CNH.shape[2]], w_CNH)))
    assert got_MNC.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got_MNC, np.float64), exact_MNC, rtol=2**-8, atol=1e-4)  # rounded once


class AbsorbCases:
    absorb = None

    @pytest.mark.parametrize("tokens, heads", [(8, 16), (64, 16), (256, 16), (16, 128), (48, 3)])
    def test_equals_the_exact_product(self, tokens, heads):
        check(jax.jit(type(self).absorb)(*operands(tokens, heads)), *operands(tokens, heads))

    def test_other_dims(self):
        q_MNX, w_CNH = operands(24, 2, (256, 192, 128))
        check(jax.jit(type(self).absorb)(q_MNX, w_CNH), q_MNX, w_CNH)


class TestXla(AbsorbCases):
    absorb = staticmethod(functools.partial(absorb_queries.absorb_queries, implementation="xla"))


@pytest.mark.gpu
class TestPallas(AbsorbCases):
    absorb = staticmethod(functools.partial(absorb_queries.absorb_queries, implementation="pallas"))

    def test_the_same_every_time(self):
        assert_repeats(jax.jit(type(self).absorb), *operands(256, 16))


def test_interpreter():
    q_MNX, w_CNH = operands(8, 2, (192, 128, 128))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        check(absorb_queries._absorb_hopper.__wrapped__(q_MNX, w_CNH), q_MNX, w_CNH)


@pytest.mark.parametrize(
    "tokens, dims, dtype, message",
    [
        (8, (192, 128, 512), jnp.float32, "float32"),
        (12, (192, 128, 512), jnp.bfloat16, "12 tokens"),
        (264, (192, 128, 512), jnp.bfloat16, "264 tokens"),
        (8, (96, 64, 512), jnp.bfloat16, "512 and 64"),
        (8, (384, 320, 512), jnp.bfloat16, "512 and 320"),
        (8, (196, 128, 512), jnp.bfloat16, "196 dims"),
    ],
)
def test_the_kernel_says_what_it_needs(tokens, dims, dtype, message, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    q_MNX, w_CNH = (x.astype(dtype) for x in operands(tokens, 2, dims))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(absorb_queries.absorb_queries, implementation="pallas"), q_MNX, w_CNH)
