"""Rotary frequencies and scales against the reference's numbers, and the properties of a rotation."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import config, rope

# float32 values of transformers' and DeepSeek's YaRN for V2 (spec section 2.3).
GOLDEN = {
    0: 1, 1: 0.749894202, 5: 0.237137392, 10: 0.0562341288, 11: 0.0390069261, 12: 0.0268793609, 15: 0.0083345091,
    16: 0.00550000044, 20: 0.000790569407, 22: 0.00017782794, 23: 3.3338034e-05, 31: 3.33380353e-06,
}  # fmt: skip


def test_inverse_frequencies_are_the_references():
    frequencies = rope.inverse_frequencies(config.v2())
    assert frequencies.dtype == np.float32 and frequencies.shape == (32,)
    for pair, value in GOLDEN.items():
        assert frequencies[pair] == pytest.approx(value, rel=3e-7), pair


def test_softmax_scale():
    assert rope.softmax_scale(config.v2()) == pytest.approx(0.1147213868, rel=1e-9)
    yarn = dataclasses.replace(config.v2().rope_scaling, mscale=1.0, mscale_all_dim=1.0)
    assert rope.softmax_scale(dataclasses.replace(config.v2(), rope_scaling=yarn)) == pytest.approx(0.1352337789, rel=1e-9)
    assert rope.softmax_scale(dataclasses.replace(config.v2(), rope_scaling=None)) == pytest.approx(192**-0.5, rel=1e-9)


def test_cos_and_sin_carry_the_ratio_of_the_mscales_and_nothing_else():
    position = jnp.zeros((1, 1), jnp.int32)
    assert rope.cos_sin(config.v2(), position)[0].max() == 1.0
    yarn = dataclasses.replace(config.v2().rope_scaling, mscale=1.0)
    unequal = dataclasses.replace(config.v2(), rope_scaling=yarn)
    assert float(rope.cos_sin(unequal, position)[0].max()) == pytest.approx(1.3688879454 / 1.2608037774, rel=1e-6)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 64)), jnp.float32) for _ in range(2))

    def at(x, position):
        return rope.rotate(x, *rope.cos_sin(config.v2(), jnp.array([[position]])))[0, 0]

    assert float(jnp.linalg.norm(at(q, 5000))) == pytest.approx(float(jnp.linalg.norm(q)), rel=1e-5)
    near, far = at(q, 107) @ at(k, 100), at(q, 5007) @ at(k, 5000)
    assert float(near) == pytest.approx(float(far), rel=1e-3)  # angles near 5000 are rounded to 2.4e-4 in float32
    assert abs(float(near - at(q, 108) @ at(k, 100))) > 1e-2


def test_pairs_are_interleaved():
    x = jnp.zeros((1, 1, 64)).at[0, 0, 2].set(1.0)  # the first of pair 1
    turned = rope.rotate(x, *rope.cos_sin(config.v2(), jnp.array([[1]])))[0, 0]
    np.testing.assert_allclose(turned[2:4], [np.cos(GOLDEN[1]), np.sin(GOLDEN[1])], rtol=1e-6)
    assert float(jnp.abs(turned).sum()) == pytest.approx(float(jnp.abs(turned[2:4]).sum()))
