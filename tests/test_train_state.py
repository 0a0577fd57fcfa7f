"""The training step: schedule, decay, clipping, objective, and that it learns, on one device as on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import MODEL, TRAIN, batch, new_state, numpy

from dsv2_jax import model, train_state
from dsv2_jax.config import tiny
from dsv2_jax.fields import InputError, override
from dsv2_jax.train_config import TrainConfig, finetuning, train_preset
from sharding.mesh import make_mesh


@functools.cache
def gradients(config: TrainConfig) -> tuple[dict[str, np.ndarray], float, dict[str, float]]:
    """Gradients by name, the objective and its parts."""
    grads, sums = jax.jit(train_state.gradient, static_argnums=2)(new_state(config), batch(), config)
    total = sum(float(value) for name, value in sums.items() if name.startswith("loss/"))
    return numpy(model.parameters(grads)), total, numpy(sums)


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


def test_finetuning_holds_its_rate():
    rates = [float(train_state.learning_rate(finetuning(), jnp.int32(step))) for step in (20, 1000, 1001, 5000)]
    np.testing.assert_allclose(rates, 5e-6, rtol=1e-6)


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
    decoder, given = new_state().params, {name: a[0] for name, a in batch().items() if a.ndim == 3}
    hidden, _, stats = jax.jit(lambda m, b: m(b["tokens"], b["positions"], b["segment_ids"]))(decoder, given)
    log_probs = np.asarray(jax.nn.log_softmax(decoder.logits(hidden)), np.float64)
    chosen = np.take_along_axis(log_probs, np.asarray(given["targets"])[..., None], -1)[..., 0][
        np.asarray(given["loss_mask"]) > 0
    ]
    _, _, sums = gradients(dataclasses.replace(TRAIN, capacity_factor=None))
    assert sums["loss/lm"] == pytest.approx(-chosen.mean(), rel=1e-5)
    for name, alpha in {"expert_balance": 0.003, "device_balance": 0.05, "comm_balance": 0.02}.items():
        assert sums[f"loss/{name}"] == pytest.approx(alpha * float(stats[name].sum()), rel=1e-5)
    np.testing.assert_array_equal(sums["load"], stats["load"])
    assert sums["dropped"].sum() == 0


def test_packed_documents_have_the_loss_they_have_apart():
    """loss/lm; the balance losses and dropping go by packed rows."""
    config = dataclasses.replace(TRAIN, capacity_factor=None)
    packed = {name: np.array(a[0]) for name, a in batch().items() if a.ndim == 3}
    apart = {name: np.zeros((32, 16), a.dtype) for name, a in packed.items()}
    for name, rows in packed.items():
        apart[name][:16, :6], apart[name][16:, :8] = rows[:, :6], rows[:, 6:14]
    one, other = (
        train_state.evaluate(new_state(config).params, train_state.place([part], 1), config) for part in (packed, apart)
    )
    assert float(one[1]) == float(other[1]) == 16 * 14
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-6)


@pytest.mark.parametrize("seq_aux, kind", [(True, "expert_balance"), (False, "batch_balance")])
def test_the_released_codes_balance_is_a_named_choice(seq_aux, kind):
    config = dataclasses.replace(TRAIN, balance="released", capacity_factor=None)
    state = new_state(config)
    decoder = state.params
    decoder.cfg = dataclasses.replace(MODEL, seq_aux=seq_aux)
    given = {name: a[0] for name, a in batch().items() if a.ndim == 3}
    _, _, stats = jax.jit(lambda m, b: m(b["tokens"], b["positions"], b["segment_ids"]))(decoder, given)
    _, sums = jax.jit(train_state.gradient, static_argnums=2)(state, batch(), config)
    assert float(sums["loss/expert_balance"]) == pytest.approx(0.001 * float(stats[kind].sum()), rel=1e-5)
    assert float(sums["loss/device_balance"]) == float(sums["loss/comm_balance"]) == 0


def test_what_a_step_tells_of_its_experts():
    _, metrics = train_state.train_step(new_state(), batch(), TRAIN)
    _, _, sums = gradients(TRAIN)
    load, dropped = sums["load"], sums["dropped"]
    assert float(metrics["moe/max_load"]) == pytest.approx((load.max(1) / load.mean(1)).max())
    assert float(metrics["moe/drop_fraction"]) == pytest.approx(dropped.sum() / load.sum())
    assert 0.01 < dropped.sum() / load.sum() < 0.5
    np.testing.assert_allclose(metrics["moe/dropped"], dropped / load.sum(1))
    assert float(metrics["moe/dead_experts"]) == (load == 0).sum()
    assert load.sum() == 16 * 16 * MODEL.num_experts_per_tok


def test_a_share_of_sequences_is_exempt_by_seed_and_step():
    """All exempt: nothing is dropped. None or some: pairs are, and others at another step."""
    dropped = {}
    for share, step in ((0.0, 0), (0.5, 0), (0.5, 1), (1.0, 0)):
        config = dataclasses.replace(TRAIN, exempt_share=share, capacity_factor=0.5)
        state = new_state(config)._replace(step=jnp.int32(step))
        grads, sums = jax.jit(train_state.gradient, static_argnums=2)(state, batch(), config)
        dropped[share, step] = float(sums["dropped"].sum()), float(grads.w_head[...].sum())
    assert dropped[1.0, 0][0] == 0 < dropped[0.5, 0][0] <= dropped[0.0, 0][0]
    assert dropped[0.5, 0][1] != dropped[0.5, 1][1]


def test_one_sequence_is_a_batch_and_a_pool():
    config = dataclasses.replace(TRAIN, batch_size=1, drop_pool=1, exempt_share=0.0)
    row = {name: np.array(a[0][:1]) for name, a in batch().items() if a.ndim == 3}
    _, sums = jax.jit(train_state.gradient, static_argnums=2)(new_state(config), train_state.place([row], 1), config)
    load_LG = np.asarray(sums["load"]).reshape(-1, MODEL.n_group, MODEL.n_routed_experts // MODEL.n_group).sum(axis=-1)
    budget = 16 * MODEL.num_experts_per_tok // MODEL.n_group
    np.testing.assert_array_equal(sums["dropped"], np.maximum(load_LG - budget, 0).sum(axis=-1))
    assert np.isfinite(float(sums["loss/lm"])) and sums["dropped"].sum() > 0


def test_evaluation_drops_nothing():
    config = dataclasses.replace(TRAIN, capacity_factor=0.25)
    loss, tokens = train_state.evaluate(new_state(config).params, batch(), config)
    _, _, sums = gradients(dataclasses.replace(TRAIN, capacity_factor=None))
    assert float(loss / tokens) == pytest.approx(float(sums["loss/lm"]), rel=1e-5)


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(bad):
    state, _ = train_state.train_step(new_state(), batch(), TRAIN)
    before = numpy(train_state.arrays(state))
    mask = np.array(batch()["loss_mask"])
    mask[0, 3, 2] = float(bad)
    given = batch() | {"loss_mask": jax.device_put(mask, batch()["loss_mask"].sharding)}
    state, metrics = train_state.train_step(state, given, TRAIN)
    assert float(metrics["skipped"]) == 1 and not np.isfinite(float(metrics["loss/lm"]))
    for name, after in numpy(train_state.arrays(state)).items():
        assert name == "step" or after.tobytes() == before[name].tobytes(), name
    state, metrics = train_state.train_step(state, batch(), TRAIN)
    assert float(metrics["skipped"]) == 0 and int(state.step) == 3
    assert not np.array_equal(state.params.w_head[...], before["params.w_head"])


def test_any_process_may_ask_for_the_end():
    assert int(train_state.train_step(new_state(), batch(), TRAIN)[1]["stop"]) == 0
    assert int(train_state.train_step(new_state(), batch(stop=True), TRAIN)[1]["stop"]) == 1


def test_the_batch_ramp_and_what_it_means_for_the_schedule():
    config = TrainConfig(batch_size=16, ramp_from=4, ramp_tokens=4096 * 100, micro_batch_size=4, drop_pool=4, schedule_steps=30)
    sizes = [config.batch_at(step) for step in range(1, 31)]
    seen = 0
    for step, size in enumerate(sizes, start=1):
        assert config.sequences_before(step) == seen
        assert size == min(16, int(4 + 12 * seen / 100) // 4 * 4)
        seen += size
    assert sizes[0] == 4 and sizes[-1] == 16 and len(set(sizes)) == 4
    first = next(step for step in range(1, 31) if config.sequences_before(step) >= 0.6 * seen)
    assert config.last_steps_before_drops[0] == first - 1
    assert float(train_state.learning_rate(config, jnp.int32(first))) < float(
        train_state.learning_rate(config, jnp.int32(first - 1))
    )
    paper = train_preset("v2")
    assert (paper.batch_at(1), paper.batch_at(30_000), paper.microbatches) == (2304, 9216, 4)
    assert paper.sequences_before(paper.schedule_steps + 1) * 4096 == pytest.approx(8.1e12, rel=1e-4)


def test_fewer_microbatches_than_the_program_has_room_for_are_the_same_step():
    """The ramp: one program for every batch size."""
    config = dataclasses.replace(TRAIN, batch_size=16, micro_batch_size=8)
    whole, room = batch(2), batch(1)
    padded = {
        name: jnp.concatenate([a.reshape(2, 8, -1), jnp.zeros_like(a.reshape(2, 8, -1))]) if a.ndim == 3 else a
        for name, a in room.items()
    } | {"count": whole["count"]}
    fn = jax.jit(train_state.gradient, static_argnums=2)
    exempt_none = dataclasses.replace(config, exempt_share=0.0)
    close(*(numpy(model.parameters(fn(new_state(), given, exempt_none)[0])) for given in (padded, whole)), 1e-6)


@pytest.mark.parametrize("dtype, falls_to", [("float32", 0.5), ("bfloat16", 0.6)])
def test_it_learns_a_batch_by_heart(dtype, falls_to):
    config = dataclasses.replace(TRAIN, dtype=dtype)
    given = batch()
    state, first = train_state.train_step(new_state(config), given, config)
    for _ in range(60):
        state, last = train_state.train_step(state, given, config)
    assert first["loss/lm"] > 4 and last["loss/lm"] < falls_to * first["loss/lm"]
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))


def test_eight_devices_make_the_same_step_and_the_abstract_state_and_batch_are_like_it():
    one, one_metrics = train_state.train_step(new_state(), batch(), TRAIN)
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        eight, eight_metrics = train_state.train_step(new_state(), batch(), TRAIN)
        abstract = train_state.abstract(MODEL, TRAIN)
        same = jax.tree.map(
            lambda a, b: (a.shape, a.dtype, a.sharding.spec) == (b.shape, b.dtype, b.sharding.spec),
            batch(),
            train_state.abstract_batch(TRAIN),
        )
    assert all(jax.tree.leaves(same)), same
    assert jax.tree.structure(eight) == jax.tree.structure(abstract)
    for name, leaf in train_state.arrays(abstract).items():
        array = train_state.arrays(eight)[name]
        assert (array.shape, array.dtype) == (leaf.shape, leaf.dtype), name
        assert array.sharding.is_equivalent_to(leaf.sharding, array.ndim), name
    close(numpy(model.parameters(eight.opt_state[1].mu)), numpy(model.parameters(one.opt_state[1].mu)), 1e-5)
    for name, value in one_metrics.items():
        np.testing.assert_allclose(eight_metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "bad",
    [
        "dtype=float16",
        "beta2=1",
        "remat=some",
        "zero=2",
        "dispatch=ragged",
        "drop_pool=5",
        "micro_batch_size=7",
        "ramp_from=10000",
        "balance=none",
        "batch_size=0",
        "first_decay=0.95",
        "learning_rate=0",
        "seq_len=2.5",
        "seed=-1",
    ],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(InputError, match=bad.split("=")[0]):
        override([tiny(), TrainConfig()], [bad])


def test_an_unknown_preset_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'tiny'"):
        train_preset("tinny")
