"""Matmuls that accumulate in float32, in both directions, and multiply in their operands' dtype, in both directions."""

import functools

import jax
import jax.numpy as jnp

PRODUCT = "product"  # the name under which `jax.checkpoint` knows what a kernel made: as dear as a matmul's result


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` of two arrays of one dtype, the result in float32.

    The cotangent is rounded to the operands' dtype: left in float32, it would make the backward matmuls of bfloat16 operands
    float32 ones, several times slower. Float32 operands are not rounded to TF32.
    """
    return jnp.einsum(subscripts, a, b, precision=_precision(a), preferred_element_type=jnp.float32)


def _precision(a: jax.Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None


def _forward(subscripts, a, b):
    return einsum_float32(subscripts, a, b), (a, b)


def _backward(subscripts, saved, g):
    _, pull = jax.vjp(functools.partial(jnp.einsum, subscripts, precision=_precision(saved[0])), *saved)
    return pull(g.astype(saved[0].dtype))


einsum_float32.defvjp(_forward, _backward)
