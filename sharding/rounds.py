"""A computation cut into rounds of one size, as many as the data needs: bounded buffers, and nothing dropped."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def in_rounds(once: Callable[..., jax.Array], count: jax.Array, operands: Any, integers: Any) -> jax.Array:
    """The sum of `once(r, operands, integers)` over rounds r < count, where round 0 always runs; differentiable in `operands`.

    Round 0 stands outside the loop, where the compiler can overlap it with other work; it alone keeps residuals. The loop
    over further rounds runs no iteration in the common case, and its backward pass computes each of them again.

    Args:
        once: holds collectives only over axes on which `count` is the same.
        count: int32 [], known on the device alone.
        operands, integers: pytrees; the second has no gradient. Sums over rounds are float32 whatever the dtype.
    """

    def sum_rounds(operands, integers, count):
        y, pull = jax.vjp(lambda operands: once(0, operands, integers), operands)
        return lax.fori_loop(1, count, lambda r, y: y + once(r, operands, integers), y), pull

    @jax.custom_vjp
    def run(operands, integers, count):
        return sum_rounds(operands, integers, count)[0]

    def forward(operands, integers, count):
        y, pull = sum_rounds(operands, integers, count)
        return y, (operands, integers, count, pull)

    def backward(saved, dy):
        operands, integers, count, pull = saved

        def add_round(r, sums):
            (gradients,) = jax.vjp(lambda operands: once(r, operands, integers), operands)[1](dy)
            return jax.tree.map(jnp.add, sums, gradients)

        (first,) = pull(dy)
        sums = lax.fori_loop(1, count, add_round, jax.tree.map(lambda g: g.astype(jnp.float32), first))
        return jax.tree.map(lambda sum, g: sum.astype(g.dtype), sums, first), None, None

    run.defvjp(forward, backward)
    return run(operands, integers, count)
