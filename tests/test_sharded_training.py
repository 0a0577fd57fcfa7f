"""One device = eight: the loss and every gradient of a training step on every mesh, however it is run; and what travels."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from training_cases import MODEL, TRAIN, batch, new_state, numpy

from dsv2_jax import model, train_state
from dsv2_jax.collectives import parse_collectives
from dsv2_jax.router import reach
from sharding import expert_parallel
from sharding.expert_parallel import slots_per_device
from sharding.mesh import make_mesh

SEQ_LEN = 40  # a dimension of nothing else
BOUND = 1e-5  # relative, ||a - b|| / ||b|| per tensor, float32 (design: numerics)
# Every pair of settings occurs, not every combination.
SETTINGS = [
    # mesh (data, expert), zero, dispatch, remat, microbatches
    ((8, 1), 1, "all_to_all", "none", 1),
    ((8, 1), 3, "all_gather", "full", 2),
    ((1, 8), 3, "all_to_all", "full", 1),
    ((1, 8), 1, "all_gather", "elementwise", 2),
    ((4, 2), 1, "all_gather", "full", 1),
    ((4, 2), 3, "all_to_all", "elementwise", 2),
    ((2, 4), 3, "all_gather", "none", 1),
    ((2, 4), 1, "all_to_all", "full", 2),
]


@pytest.fixture(autouse=True)
def rows_of_a_real_size_go_in_rounds(monkeypatch):
    monkeypatch.setattr(expert_parallel, "AT_ONCE", 0)


def gradients(mesh_shape, microbatches=1, **fields):
    config = dataclasses.replace(TRAIN, **fields)
    with jax.set_mesh(make_mesh(*mesh_shape)):
        grads, sums = jax.jit(train_state.gradient, static_argnums=2)(new_state(config), batch(microbatches), config)
        return numpy(model.parameters(grads)), numpy(sums)


@functools.cache
def one_device():
    return gradients((1, 1))


@pytest.mark.parametrize("mesh_shape, zero, dispatch, remat, microbatches", SETTINGS)
def test_one_device_equals_eight(mesh_shape, zero, dispatch, remat, microbatches):
    grads, sums = gradients(mesh_shape, microbatches, zero=zero, dispatch=dispatch, remat=remat)
    wanted, wanted_sums = one_device()
    assert wanted_sums["dropped"].sum() > 0
    for name, value in wanted_sums.items():
        np.testing.assert_allclose(sums[name], value, rtol=BOUND, err_msg=name)
    for name, gradient in wanted.items():
        assert np.linalg.norm(grads[name] - gradient) <= BOUND * np.linalg.norm(gradient), name


def compiled(mesh_shape, **fields) -> str:
    """The compiled step."""
    config = dataclasses.replace(TRAIN, seq_len=SEQ_LEN, **fields)
    with jax.set_mesh(make_mesh(*mesh_shape)):
        state, given = train_state.abstract(MODEL, config), train_state.abstract_batch(config)
        return train_state.train_step.lower(state, given, config).compile().as_text()


def collectives(mesh_shape, **fields) -> list[tuple[str, tuple[int, ...]]]:
    """Kind and result shapes of the collectives in the compiled step."""
    text = compiled(mesh_shape, **fields)
    kinds = "all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    return [(kind, tuple(map(int, dims.split(",")))) for types, kind in found for dims in re.findall(r"\[([\d,]+)\]", types)]


@pytest.mark.parametrize("remat", ["none", "elementwise", "full"])
def test_a_layer_exchanges_rows_twice_forward_and_twice_backward_and_gathers_none(remat):
    """On an expert axis of two devices, where one round always suffices. Rematerialisation keeps what has arrived."""
    tokens = TRAIN.batch_size * SEQ_LEN // 8
    found = collectives((4, 2), dispatch="all_to_all", remat=remat)
    rows = [shape for kind, shape in found if kind == "all-to-all" and shape[-1] == MODEL.hidden_size]
    exchanged = sum(int(np.prod(shape)) for shape in rows)
    assert exchanged == 4 * 2 * tokens * MODEL.hidden_size, rows
    # No activation is gathered or summed over devices: nothing but parameters, gradients and counts.
    for kind, shape in found:
        if kind in ("all-gather", "all-reduce", "collective-permute"):
            assert not {SEQ_LEN, tokens, 2 * tokens} & set(shape), (kind, shape)


def test_eight_devices_exchange_as_often_and_further_rounds_stand_in_loops():
    """The default there: messages for less than half of the tokens, what is left in loops that as a rule run no round."""
    slots = slots_per_device(TRAIN.batch_size * SEQ_LEN // 8, 8, reach(MODEL, 8)[1])
    assert slots == 40  # of 80 tokens
    row, ids_and_weights = MODEL.hidden_size * 4, MODEL.num_experts_per_tok * 8
    found = [one for one in parse_collectives(compiled((1, 8), remat="full")) if one.kind == "all-to-all"]
    assert sum(one.payload * one.times for one in found if one.certain) == 8 * slots * (4 * row + 2 * ids_and_weights)
    assert [one for one in found if not one.certain]


def test_the_all_gather_variant_gathers_activations():
    """What the test before looks for is there when it should be."""
    found = collectives((4, 2), dispatch="all_gather")
    tokens = TRAIN.batch_size * SEQ_LEN // 8
    assert ("all-gather", (2 * tokens, MODEL.hidden_size)) in found


@pytest.mark.parametrize("zero, gathers, remat", [(1, 1, "full"), (3, 2, "full"), (3, 2, "none")])
def test_zero_3_gathers_a_layer_again_in_the_backward_pass(zero, gathers, remat):
    found = collectives((8, 1), zero=zero, remat=remat)
    experts = (MODEL.n_routed_experts, MODEL.hidden_size, MODEL.moe_intermediate_size)
    assert [shape for kind, shape in found if kind == "all-gather"].count(experts) == 2 * gathers  # w_gate and w_up


def test_at_rest_parameters_gradients_and_moments_are_cut_over_all_devices():
    with jax.set_mesh(make_mesh(2, 4)):
        state = train_state.abstract(MODEL, TRAIN)
    for name, leaf in train_state.arrays(state).items():
        here = int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        whole = int(np.prod(leaf.shape))
        assert here * 8 == whole or whole < 64, (name, leaf.shape, leaf.sharding.spec)


@pytest.mark.parametrize("dispatch", ["all_to_all", "all_gather"])
def test_no_gradient_is_summed_in_whatever_order_a_gpu_adds(dispatch):
    """A scatter of floats is made of atomic additions, unless each place is written once."""
    config = dataclasses.replace(TRAIN, dispatch=dispatch)
    with jax.set_mesh(make_mesh(1, 8)):
        args = train_state.abstract(MODEL, config), train_state.abstract_batch(config), config
        text = jax.jit(train_state.gradient, static_argnums=2).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    scatters = re.findall(r'"stablehlo.scatter".*?unique_indices = (\w+).*?\}\) : \(tensor<(?:\d+x)*(\w+)>', text, re.DOTALL)
    assert len(scatters) == text.count('"stablehlo.scatter"') > 0
    assert not [kind for unique, kind in scatters if unique == "false" and kind.startswith(("f", "bf"))]
