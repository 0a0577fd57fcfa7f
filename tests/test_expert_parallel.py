"""Rows in expert order, and routed experts against a loop over tokens, on several meshes and with every kind of load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import grouped_matmul
from sharding import specs
from sharding.expert_parallel import expert_order, routed_experts
from sharding.mesh import make_mesh

B, T, D, E, K = 8, 6, 16, 8, 3
LOADS = {
    "spread": lambda rng: np.argsort(rng.random((B, T, E)), axis=-1)[..., :K],
    "few experts used": lambda rng: np.broadcast_to([0, 1, 2], (B, T, K)),
    "last device only": lambda rng: np.broadcast_to([5, 6, 7], (B, T, K)),
}


def operands(load):
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    return (
        x_BTD,
        LOADS[load](rng).astype(np.int32),
        rng.random((B, T, K)).astype(np.float32),
        rng.normal(size=(E, D, D)).astype(np.float32),
    )


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("load", LOADS)
def test_routed_experts_equal_a_loop_over_tokens(mesh_shape, load):
    x, experts, weights, w = operands(load)

    def loop(x, weights, w):
        return jnp.einsum("btk,btd,btkdf->btf", weights, x, w[experts])

    wanted, wanted_vjp = jax.vjp(loop, x, weights, w)
    with jax.set_mesh(make_mesh(*mesh_shape)):

        def run(x, weights, w):
            return routed_experts(
                jax.reshard(x, specs.activations_BTD),
                jax.reshard(jnp.asarray(experts), specs.activations_BTD),
                jax.reshard(weights, specs.activations_BTD),
                jax.reshard(w, specs.experts_EDF),
                lambda rows_MD, w_EDF, sizes_E, unit: grouped_matmul(rows_MD, w_EDF, sizes_E, row_unit=unit),
                E,
            )

        got, got_vjp = jax.vjp(jax.jit(run), *map(jnp.asarray, (x, weights, w)))
        gradients = got_vjp(jnp.cos(got))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    for gradient, expected in zip(gradients, wanted_vjp(jnp.cos(wanted))):
        np.testing.assert_allclose(gradient, expected, atol=2e-4)


@pytest.mark.parametrize("unit", [1, 8])
def test_expert_order_is_a_permutation_of_the_local_pairs(unit):
    rng = np.random.default_rng(1)
    local = rng.integers(-3, 8, (20, K)).astype(np.int32)  # 5 experts here, the others elsewhere
    order = expert_order(jnp.asarray(local), 5, unit)
    pair_M, row_NK = np.asarray(order.pair_M), np.asarray(order.row_NK)
    mine = (local >= 0) & (local < 5)
    assert (row_NK[~mine] == pair_M.size).all()
    np.testing.assert_array_equal(pair_M[row_NK[mine]], np.flatnonzero(mine))
    assert (pair_M == local.size).sum() == pair_M.size - mine.sum()
    np.testing.assert_array_equal(order.group_sizes_E, np.bincount(local[mine], minlength=5))
    starts = np.cumsum(-(-np.asarray(order.group_sizes_E) // unit) * unit) - (-(-np.asarray(order.group_sizes_E) // unit) * unit)
    for e in range(5):
        rows = np.sort(row_NK[local == e])
        np.testing.assert_array_equal(rows, starts[e] + np.arange(rows.size))
        np.testing.assert_array_equal(pair_M[rows], np.flatnonzero(local == e))  # ties in order of the pair


def test_the_backward_pass_scatters_no_rows():
    x, experts, weights, w = operands("spread")

    def total(x, weights, w):
        expert_fn = lambda rows_MD, w_EDF, sizes_E, unit: grouped_matmul(rows_MD, w_EDF, sizes_E, row_unit=unit)  # noqa: E731
        return routed_experts(x, jnp.asarray(experts), weights, w, expert_fn, E).sum()

    place = [
        jax.reshard(jnp.asarray(a), s)
        for a, s in zip((x, weights, w), (specs.activations_BTD, specs.activations_BTD, specs.experts_EDF))
    ]
    text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*place).as_text()
    row_scatters = [line for line in text.splitlines() if "stablehlo.scatter" in line and f"x{D}xf32" in line]
    assert row_scatters == []
