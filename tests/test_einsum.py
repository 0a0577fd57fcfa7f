"""Float32 results of narrow operands, and backward matmuls that stay narrow."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.einsum import einsum_float32

CASES = [
    ("btd,dv->btv", [(2, 3, 8), (8, 5)]),
    ("btnh,bsnh->bnts", [(2, 3, 4, 8), (2, 5, 4, 8)]),
    ("btnr,bsr->bnts", [(2, 3, 4, 8), (2, 5, 8)]),
]


@pytest.mark.parametrize("subscripts, shapes", CASES)
@pytest.mark.parametrize("dtype, bound", [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_value_and_gradients_are_einsums(subscripts, shapes, dtype, bound):
    a, b = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes))
    wide = [x.astype(jnp.float32) for x in (a, b)]
    wanted, pull = jax.vjp(lambda a, b: jnp.einsum(subscripts, a, b, precision="highest"), *wide)
    got, got_pull = jax.vjp(lambda a, b: einsum_float32(subscripts, a, b), a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    g = jax.random.normal(jax.random.key(9), got.shape)
    for gradient, expected, operand in zip(got_pull(g), pull(g), (a, b)):
        assert gradient.dtype == operand.dtype
        assert np.linalg.norm(gradient.astype(jnp.float32) - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype, named", [("bfloat16", "bf16"), ("float32", "HIGHEST")])
def test_every_matmul_multiplies_in_the_operands_dtype(dtype, named):
    a, b = jnp.ones((2, 3, 8), dtype), jnp.ones((8, 5), dtype)
    text = (
        jax.jit(jax.grad(lambda a, b: jnp.sin(einsum_float32("btd,dv->btv", a, b)).sum(), argnums=(0, 1))).lower(a, b).as_text()
    )
    matmuls = re.findall(r"stablehlo.dot_general.*", text)
    assert len(matmuls) == 3
    for line in matmuls:
        operands = line.partition(" : (")[2].partition(") ->")[0]
        assert "f32" not in operands.replace("bf16", "") if dtype == "bfloat16" else named in line, line
