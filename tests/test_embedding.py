"""The look-up's gradient against sums in float64, on one device and on eight, and without additions in no fixed order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.embedding import BLOCK, look_up, sum_by_token
from sharding import specs
from sharding.mesh import make_mesh
from tests.kernel_cases import assert_repeats, close

BOUND = 1e-6  # float32, also of bfloat16 rows


def exact(rows, tokens, vocabulary):
    sums_VD = np.zeros((vocabulary, rows.shape[1]))
    np.add.at(sums_VD, tokens, np.asarray(rows, np.float64))
    return sums_VD


def natural(count, vocabulary):
    """Tokens with frequencies as in text."""
    rng = np.random.default_rng(count)
    return rng.choice(vocabulary, count, p=(odds := 1 / np.arange(1, vocabulary + 1)) / odds.sum()).astype(np.int32)


TOKENS = {
    "natural": natural(3000, 500),
    "few": natural(50, 500),
    "all one": np.full(5 * BLOCK + 1, 7, np.int32),
    "ends of blocks": np.repeat(np.int32([3, 1, 4, 0]), [BLOCK, 2 * BLOCK, 1, BLOCK - 1]),
    "one": np.int32([2]),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", TOKENS)
def test_sums_are_exact(kind, dtype):
    rng = np.random.default_rng(0)
    tokens = rng.permutation(TOKENS[kind])
    rows = jnp.asarray(rng.normal(size=(len(tokens), 6)), dtype)
    sums_VD = jax.jit(sum_by_token, static_argnums=2)(rows, tokens, 500)
    assert sums_VD.dtype == jnp.float32
    close(sums_VD, exact(rows, tokens, 500), BOUND)
    absent_V = np.bincount(tokens, minlength=500) == 0
    assert absent_V.any() and not sums_VD[absent_V].any()


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_gradient(mesh_shape):
    rng = np.random.default_rng(0)
    tokens_BT = natural(16 * 90, 40).reshape(16, 90)
    embed_VD, g_BTD = (rng.normal(size=shape).astype(np.float32) for shape in ((40, 6), (16, 90, 6)))
    mesh = make_mesh(*mesh_shape)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, spec))
            for a, spec in ((embed_VD, specs.replicated), (tokens_BT, specs.tokens_BT), (g_BTD, specs.activations_BTD))
        ]
        x_BTD, gradient_VD = jax.jit(lambda e, t, g: (look_up(e, t), jax.vjp(look_up, e, t)[1](g)[0]))(*placed)
    np.testing.assert_array_equal(x_BTD, embed_VD[tokens_BT])
    close(gradient_VD, exact(g_BTD.reshape(-1, 6), tokens_BT.reshape(-1), 40), BOUND)


@pytest.mark.gpu
def test_repeats_bit_for_bit():
    rng = np.random.default_rng(0)
    tokens = natural(16384, 102400)
    rows = jnp.asarray(rng.normal(size=(len(tokens), 2048)), jnp.bfloat16)
    assert_repeats(jax.jit(lambda *a: sum_by_token(*a, 102400)), rows, tokens, times=20)
