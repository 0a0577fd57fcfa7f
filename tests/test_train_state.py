"""The training step: schedule, decay, clipping, objective, and that it learns, on one device as on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import MODEL, TRAIN, batch, new_state, numpy

from dsv2_jax import model, train_state
from dsv2_jax.config import TrainConfig, tiny, train_preset
from dsv2_jax.fields import InputError, override
from sharding.mesh import make_mesh


@functools.cache
def gradients(config: TrainConfig) -> tuple[dict[str, np.ndarray], float, dict[str, float]]:
    """Gradients by name, the objective and its parts."""
    fn = jax.jit(jax.value_and_grad(train_state.objective, has_aux=True), static_argnums=2)
    (total, metrics), grads = fn(new_state().params, batch(), config)
    return numpy(model.parameters(grads)), float(total), {name: float(m) for name, m in metrics.items()}


def close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], bound: float) -> None:
    for name in a:
        assert np.linalg.norm(a[name] - b[name]) <= bound * np.linalg.norm(b[name]), name


def test_learning_rate_is_the_papers():
    config = TrainConfig(schedule_steps=10_000)
    steps = [1, 1000, 2000, 2001, 6000, 6001, 9000, 9001, 10_000, 20_000]
    rates = [float(train_state.learning_rate(config, jnp.int32(step))) for step in steps]
    expected = [1.2e-7, 1.2e-4, 2.4e-4, 2.4e-4, 2.4e-4, 7.584e-5, 7.584e-5, 2.396544e-5, 2.396544e-5, 2.396544e-5]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    lite = dataclasses.replace(train_preset("v2_lite"), schedule_steps=1000, warmup_steps=0)
    rates = [float(train_state.learning_rate(lite, jnp.int32(step))) for step in (1, 800, 801, 901)]
    np.testing.assert_allclose(rates, [4.2e-4, 4.2e-4, 4.2e-4 * 0.316, 4.2e-4 * 0.316**2], rtol=1e-6)


def test_the_step_is_adamw_of_the_clipped_gradient_without_decay_of_norms():
    """The first step against the update rule written out."""
    grads, _, _ = gradients(TRAIN)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    assert norm > TRAIN.clip_norm
    before = numpy(model.parameters(new_state().params))
    state, metrics = train_state.train_step(new_state(), batch(), TRAIN)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1 and float(metrics["lr"]) == pytest.approx(TRAIN.learning_rate)
    norms = {"attn_norm", "q_norm", "kv_norm", "ffn_norm", "final_norm"}
    for name, after in numpy(model.parameters(state.params)).items():
        g = grads[name] * TRAIN.clip_norm / norm
        decay = 0.0 if name.split(".")[-1] in norms else TRAIN.weight_decay
        expected = before[name] - TRAIN.learning_rate * (g / (abs(g) + TRAIN.epsilon) + decay * before[name])
        np.testing.assert_allclose(after, expected, atol=TRAIN.learning_rate * 1e-3, err_msg=name)


def test_objective_is_the_masked_mean_and_the_balance():
    decoder, given = new_state().params, batch()
    hidden, _, stats = jax.jit(lambda m, b: m(b["tokens"], b["positions"], b["segment_ids"]))(decoder, given)
    log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)), np.float64)
    chosen = np.take_along_axis(log_probs, np.asarray(given["targets"])[..., None], -1)[..., 0][
        np.asarray(given["loss_mask"]) > 0
    ]
    _, total, metrics = gradients(TRAIN)
    assert metrics["loss/lm"] == pytest.approx(-chosen.mean(), rel=1e-5)
    assert metrics["loss/expert_balance"] == pytest.approx(0.003 * float(stats["expert_balance"].sum()), rel=1e-5)
    assert total == pytest.approx(metrics["loss/lm"] + metrics["loss/expert_balance"], rel=1e-6)
    load = np.asarray(stats["load"])
    assert metrics["moe/max_load"] == pytest.approx((load.max(1) / load.mean(1)).max())


def test_remat_changes_nothing():
    plain, remat = gradients(TRAIN), gradients(dataclasses.replace(TRAIN, remat="full"))
    close(remat[0], plain[0], 1e-5)
    assert remat[1] == pytest.approx(plain[1], rel=1e-6)


@pytest.mark.parametrize("dtype, falls_to", [("float32", 0.5), ("bfloat16", 0.6)])
def test_it_learns_a_batch_by_heart(dtype, falls_to):
    config = dataclasses.replace(TRAIN, dtype=dtype)
    given = batch()
    state, first = train_state.train_step(new_state(config), given, config)
    for _ in range(60):
        state, last = train_state.train_step(state, given, config)
    assert first["loss/lm"] > 4 and last["loss/lm"] < falls_to * first["loss/lm"]
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))


def test_eight_devices_make_the_same_step_and_the_abstract_state_is_like_it():
    one, one_metrics = train_state.train_step(new_state(), batch(), TRAIN)
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        eight, eight_metrics = train_state.train_step(new_state(), batch(), TRAIN)
        abstract = train_state.abstract(MODEL, TRAIN)
    assert jax.tree.structure(eight) == jax.tree.structure(abstract)
    for name, leaf in train_state.arrays(abstract).items():
        array = train_state.arrays(eight)[name]
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), name
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim), name
    close(numpy(model.parameters(eight.opt_state[1][0].mu)), numpy(model.parameters(one.opt_state[1][0].mu)), 1e-5)
    for name, value in one_metrics.items():
        assert float(eight_metrics[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize(
    "bad",
    ["dtype=float16", "beta2=1", "remat=some", "batch_size=0", "first_decay=0.95", "learning_rate=0", "seq_len=2.5", "seed=-1"],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(InputError, match=bad.split("=")[0]):
        override([tiny(), TrainConfig()], [bad])


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        train_preset("tinny")
