"""Rows in expert order against a loop over experts: every implementation, and the Hopper kernel in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, expert_order, expert_order_hopper
from pallas_kernels.grouped_matmul import padded_rows
from tests import lanes_interpreted
from tests.kernel_cases import assert_repeats


def distinct(rng, tokens, choices, experts):
    """Ids of a token that differ; about a third of them of no expert here."""
    return np.argsort(rng.random((tokens, experts + experts // 2)), axis=1)[:, :choices]


IDS = {
    "one token": lambda rng: (distinct(rng, 1, 6, 64), 64),
    "eight tokens": lambda rng: (distinct(rng, 8, 6, 64), 64),
    "a batch": lambda rng: (distinct(rng, 256, 6, 64), 64),
    "many experts": lambda rng: (distinct(rng, 512, 6, 160), 160),
    "no whole words": lambda rng: (distinct(rng, 77, 3, 5) - 2, 5),
    "words of one warpgroup each": lambda rng: (distinct(rng, 90, 4, 6), 6),
    "all absent": lambda rng: (np.where(rng.random((40, 6)) < 0.5, -1, 64), 64),
    "one expert": lambda rng: (np.where(np.arange(6) == rng.integers(0, 6, (300, 1)), 17, 64), 64),
    "one expert here": lambda rng: (np.where(np.arange(6) == rng.integers(0, 9, (50, 1)), 0, 1), 1),
    "one choice": lambda rng: (rng.integers(-1, 8, (700, 1)), 8),
}


class OrderCases:
    """`order` has `expert_order`'s signature, and exactly its result."""

    order = None

    @pytest.mark.parametrize("unit", [1, 16])
    @pytest.mark.parametrize("case", IDS)
    def test_rows_are_sorted_by_expert_and_pair_or_keep_places(self, case, unit):
        ids_NK, experts = IDS[case](np.random.default_rng(0))
        weights_NK = np.random.default_rng(1).normal(size=ids_NK.shape).astype(np.float32)
        rows = padded_rows(ids_NK.size, experts, unit) + 3 * unit
        run = jax.jit(functools.partial(type(self).order, num_experts=experts, unit=unit, rows=rows))
        order, weight_M, sizes_E, starts_E = run(jnp.asarray(ids_NK, jnp.int32), weights_NK)
        pair_M, row_P, start = np.full(rows, ids_NK.size), np.full(ids_NK.size, rows), 0
        for e in range(experts):
            pairs = np.flatnonzero(ids_NK == e)
            size, places = len(pairs), np.arange(len(pairs))
            if len(ids_NK) <= unit:  # tokens keep their places
                size, places = unit * (size > 0), pairs // ids_NK.shape[1]
            assert (sizes_E[e], starts_E[e]) == (size, start)
            row_P[pairs] = start + places
            pair_M[row_P[pairs]] = pairs
            start += -(-size // unit) * unit
        np.testing.assert_array_equal(order.row_NK, row_P.reshape(ids_NK.shape))
        np.testing.assert_array_equal(order.pair_M, pair_M)
        np.testing.assert_array_equal(weight_M, np.append(weights_NK, 0)[pair_M])

    def test_a_weight_has_the_gradient_of_its_row(self):
        ids_NK, experts = IDS["no whole words"](np.random.default_rng(0))
        order = functools.partial(type(self).order, num_experts=experts, unit=16, rows=400)
        ids_NK, weights_NK = jnp.asarray(ids_NK, jnp.int32), jnp.ones(ids_NK.shape)
        dweight_M = jnp.arange(400.0)
        (dweights_NK,) = jax.vjp(lambda weights_NK: order(ids_NK, weights_NK)[1], weights_NK)[1](dweight_M)
        np.testing.assert_array_equal(dweights_NK, np.append(dweight_M, 0)[order(ids_NK, weights_NK)[0].row_NK])


class TestXla(OrderCases):
    order = staticmethod(functools.partial(expert_order.expert_order, implementation="xla"))


class TestXlaManyPairs(TestXla):
    @pytest.fixture(autouse=True)
    def all_are_many(self, monkeypatch):
        monkeypatch.setattr(expert_order, "FEW", 0)


@pytest.mark.gpu
class TestPallas(OrderCases):
    order = staticmethod(functools.partial(expert_order.expert_order, implementation="pallas"))

    def test_the_same_every_time(self):
        ids_NK, experts = IDS["a batch"](np.random.default_rng(1))
        run = jax.jit(functools.partial(type(self).order, num_experts=experts, unit=16, rows=3000))
        assert_repeats(run, jnp.asarray(ids_NK, jnp.int32), jnp.ones(ids_NK.shape))


@pytest.mark.parametrize(
    "case, warpgroups", [("one token", 8), ("eight tokens", 8), ("words of one warpgroup each", 8), ("no whole words", 1)]
)
def test_interpreter(case, warpgroups, monkeypatch):
    """The kernel but for its PTX, which the interpreter does not run: one element after the other instead, and bits are not set
    atomically, so that no two warpgroups may have bits of one word."""

    lanes_interpreted.install(monkeypatch, expert_order_hopper)
    monkeypatch.setattr(expert_order_hopper, "WARPGROUPS", warpgroups)
    ids_NK, experts = IDS[case](np.random.default_rng(0))
    kept = expert_order.places_kept(len(ids_NK), 16)
    weights_NK = jnp.asarray(np.random.default_rng(1).normal(size=ids_NK.shape), jnp.float32)
    operands = jnp.asarray(ids_NK, jnp.int32), weights_NK, experts, 16, padded_rows(ids_NK.size, experts, 16), kept
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got = expert_order_hopper.expert_order.__wrapped__(*operands)  # traced anew: nothing of other tests
    for a, b in zip(got, expert_order._expert_order_xla(*operands), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tokens, experts", [(8, 64), (256, 64), (512, 160), (77, 20)])
def test_lowers_for_cuda_inside_shard_map(tokens, experts, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    rows = padded_rows(6 * tokens, experts, 16)
    order = functools.partial(expert_order.expert_order, num_experts=experts, unit=16, rows=rows)
    mesh, batch = jax.sharding.get_abstract_mesh(), P(("data", "expert"))
    ids = jax.ShapeDtypeStruct((tokens * mesh.size, 6), jnp.int32, sharding=jax.NamedSharding(mesh, batch))
    run = jax.jit(jax.shard_map(order, out_specs=batch))
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32, sharding=ids.sharding)
    text = run.trace(ids, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.reduce" not in text  # it is the kernel alone


@pytest.mark.parametrize(
    "shape, ids, weights, experts, message",
    [
        ((8, 6), jnp.int16, jnp.float32, 64, "int16"),
        ((8, 6), jnp.int32, jnp.bfloat16, 64, "bfloat16"),
        ((683, 6), jnp.int32, jnp.float32, 64, "4098 pairs"),
        ((8, 6), jnp.int32, jnp.float32, 257, "257 experts"),
    ],
)
def test_the_kernel_says_what_it_needs(shape, ids, weights, experts, message, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    order = functools.partial(expert_order.expert_order, num_experts=experts, unit=16, rows=9000, implementation="pallas")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(order, *(jax.ShapeDtypeStruct(shape, dtype) for dtype in (ids, weights)))
