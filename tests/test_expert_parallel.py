"""Routed experts against a loop over tokens, on several meshes and with every kind of load."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import expert_order
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_xla import repeated
from sharding import expert_parallel, specs
from sharding.expert_parallel import Order, routed_experts, slots_per_device, take_rows
from sharding.mesh import make_mesh

B, T, D, E, K = 8, 24, 16, 8, 3
NONE = E  # the id of a dropped pair
LOADS = {
    "spread": lambda rng: np.argsort(rng.random((B, T, E)), axis=-1)[..., :K],
    "few experts used": lambda rng: np.broadcast_to([0, 1, 2], (B, T, K)),
    "last device only": lambda rng: np.broadcast_to([5, 6, 7], (B, T, K)),
    "one expert, the others dropped": lambda rng: np.broadcast_to([NONE, 3, NONE], (B, T, K)),
    "all dropped": lambda rng: np.full((B, T, K), NONE),
    "half dropped": lambda rng: np.where(rng.random((B, T, K)) < 0.5, NONE, np.argsort(rng.random((B, T, E)), axis=-1)[..., :K]),
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


def expert_fn(w_EDF, rows_MD, weight_M, sizes_E, unit):
    rows_MD = repeated(rows_MD, len(weight_M), unit)
    return weight_M[:, None] * grouped_matmul(rows_MD, w_EDF, sizes_E, row_unit=unit)


def compare(load, mesh_shape, dispatch):
    """Value and gradients of the dispatch and of a loop over tokens."""
    x, experts, weights, w = operands(load)

    def loop(x, weights, w):
        here = jnp.asarray(experts != NONE, jnp.float32)
        return jnp.einsum("btk,btd,btkdf->btf", weights * here, x, w[np.minimum(experts, E - 1)])

    wanted, wanted_vjp = jax.vjp(loop, x, weights, w)
    with jax.set_mesh(make_mesh(*mesh_shape)):

        def run(x, weights, w):
            return routed_experts(
                jax.reshard(x, specs.activations_BTD),
                jax.reshard(jnp.asarray(experts), specs.activations_BTD),
                jax.reshard(weights, specs.activations_BTD),
                jax.reshard(w, specs.experts_EDF),
                expert_fn,
                num_experts=E,
                reach=(min(K, mesh_shape[1]), min(K, mesh_shape[1])),
                dispatch=dispatch,
            )

        got, got_vjp = jax.vjp(jax.jit(run), *map(jnp.asarray, (x, weights, w)))
        gradients = got_vjp(jnp.cos(got))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    for gradient, expected in zip(gradients, wanted_vjp(jnp.cos(wanted))):
        np.testing.assert_allclose(gradient, expected, atol=2e-4)


@pytest.mark.parametrize(
    "mesh_shape, dispatch", [((1, 1), None), ((4, 2), "all_to_all"), ((2, 4), "all_gather"), ((1, 8), "all_to_all")]
)
@pytest.mark.parametrize("load", LOADS)
def test_routed_experts_equal_a_loop_over_tokens(mesh_shape, dispatch, load):
    compare(load, mesh_shape, dispatch)


@pytest.mark.parametrize("mesh_shape, dispatch", [((2, 4), "all_to_all"), ((1, 2), "all_to_all"), ((1, 4), "all_gather")])
@pytest.mark.parametrize("load", ["spread", "last device only", "half dropped"])
def test_what_does_not_fit_travels_and_is_multiplied_in_further_rounds(mesh_shape, dispatch, load, monkeypatch):
    monkeypatch.setattr(expert_parallel, "SLACK", 0.25)
    monkeypatch.setattr(expert_parallel, "AT_ONCE", 0)
    if mesh_shape == (2, 4):
        assert slots_per_device(B * T // 8, 4, 3) <= B * T // 8 // 3  # of a message; else few wait
    compare(load, mesh_shape, dispatch)


@pytest.mark.parametrize("mesh_shape, dispatch", [((1, 1), None), ((4, 2), "all_to_all"), ((2, 4), "all_gather")])
@pytest.mark.parametrize("load", LOADS)
def test_tokens_that_fit_one_unit_are_not_gathered(mesh_shape, dispatch, load, monkeypatch):
    monkeypatch.setattr(expert_parallel, "row_unit", lambda *_: 256)
    gathered = []

    def noted(w_EDF, rows_MD, weight_M, *rest):
        gathered.append(len(rows_MD) >= len(weight_M))
        return multiply(w_EDF, rows_MD, weight_M, *rest)

    multiply = expert_fn
    monkeypatch.setitem(globals(), "expert_fn", noted)
    compare(load, mesh_shape, dispatch)
    assert gathered and not any(gathered)


@pytest.mark.parametrize("mesh_shape, dispatch", [((1, 1), None), ((1, 2), "all_to_all"), ((1, 2), "all_gather")])
def test_the_backward_pass_scatters_no_rows(mesh_shape, dispatch, monkeypatch):
    monkeypatch.setattr(expert_order, "FEW", 0)
    x, experts, weights, w = operands("spread")

    def total(x, weights, w):
        reach = (mesh_shape[1], mesh_shape[1])
        return routed_experts(x, place(experts), weights, w, expert_fn, num_experts=E, reach=reach, dispatch=dispatch).sum()

    def place(a, spec=specs.activations_BTD):
        return jax.reshard(jnp.asarray(a), spec)

    with jax.set_mesh(make_mesh(*mesh_shape)):
        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(place(x), place(weights), place(w, specs.experts_EDF)).as_text()
    assert "stablehlo.scatter" in text  # of integers
    scatters = re.findall(r"stablehlo\.scatter.*?\}\) : \((.*?)\)", text, re.DOTALL)
    assert scatters and [types for types in scatters if f"x{D}xf32" in types] == []


def test_bfloat16_rows_move_bit_for_bit():
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.bfloat16)
    order = Order(jnp.asarray([9, 10, 0, 3], jnp.int32), jnp.asarray([[2, 4], [4, 3], [4, 4], [4, 4], [4, 0]], jnp.int32))
    np.testing.assert_array_equal(take_rows(x_ND, order), jnp.concatenate([x_ND[4:], jnp.zeros((1, 6)), x_ND[:2]]))
