"""Checkpoints: exact, complete or absent, for any mesh; and as the weights of a model."""

import gc
import json
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import MODEL, TRAIN, batch, new_state, numpy

from dsv2_jax import checkpoint, convert, model, train_state
from dsv2_jax.checkpoint import Checkpoints, WorkdirWeights
from dsv2_jax.fields import InputError
from dsv2_jax.train_state import TrainState
from sharding.mesh import make_mesh

# A failing Orbax abandons its coroutines.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")
CONFIG = {"model": MODEL.to_hf("bfloat16"), "train": {"dtype": "bfloat16"}}


def state_at(step: int) -> TrainState:
    """A state of arbitrary numbers, the same on every mesh."""
    rng = np.random.default_rng(step)
    like = train_state.abstract(MODEL, TRAIN)
    state = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding), like)
    return state._replace(step=jnp.int32(step))


@pytest.fixture
def tidy():
    yield
    gc.collect()  # here, where its complaints are ignored


def save(workdir, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(workdir, CONFIG, keep)
    for step in steps:
        checkpoints.save(state_at(step), {"position": step})
    checkpoints.wait()
    return checkpoints


def assert_equal(a: TrainState, b: TrainState) -> None:
    a, b = numpy(train_state.arrays(a)), numpy(train_state.arrays(b))
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


def test_state_data_and_configuration_come_back_exactly(tmp_path):
    checkpoints = save(tmp_path, 1, 2)
    state, data = checkpoints.restore(2, train_state.abstract(MODEL, TRAIN))
    assert_equal(state, state_at(2))
    assert data == {"position": 2}
    assert checkpoint.read_config(tmp_path, 2) == json.loads(json.dumps(CONFIG))


@pytest.mark.parametrize("there, here", [((2, 4), (1, 1)), ((1, 1), (1, 8)), ((1, 8), (4, 2))])
def test_restored_onto_another_mesh(tmp_path, there, here):
    with jax.set_mesh(make_mesh(*there)):
        save(tmp_path, 3)
    with jax.set_mesh(make_mesh(*here)):
        abstract = train_state.abstract(MODEL, TRAIN)
        state, _ = Checkpoints(tmp_path, CONFIG, 2).restore(3, abstract)
        for name, leaf in train_state.arrays(abstract).items():
            assert train_state.arrays(state)[name].sharding == leaf.sharding, name
    assert_equal(state, state_at(3))


def test_steps_that_run_during_the_save_do_not_reach_it(tmp_path):
    """The next steps reuse the buffers of the state that is being written."""
    state, _ = train_state.train_step(new_state(), batch(), TRAIN)
    expected = numpy(train_state.arrays(state))
    checkpoints = Checkpoints(tmp_path, CONFIG, 2)
    checkpoints.save(state, {})
    for _ in range(3):
        state, _ = train_state.train_step(state, batch(), TRAIN)
    jax.block_until_ready(state)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, train_state.abstract(MODEL, TRAIN))
    for name, array in numpy(train_state.arrays(restored)).items():
        assert np.array_equal(array, expected[name]), name


def test_the_newest_are_kept_and_unfinished_ones_do_not_count(tmp_path):
    assert checkpoint.latest_step(tmp_path) is None
    save(tmp_path, 1, 2, 3)
    directory = tmp_path / "checkpoints"
    assert sorted(path.name for path in directory.iterdir()) == ["2", "3"]
    shutil.copytree(directory / "3", directory / "4.orbax-checkpoint-tmp")
    assert checkpoint.latest_step(tmp_path) == 3
    newest = np.asarray(state_at(3).params.final_norm[...])
    assert np.array_equal(WorkdirWeights(tmp_path).read("final_norm"), newest.astype("bfloat16"))
    save(tmp_path, 4)  # tidies up first
    assert sorted(path.name for path in directory.iterdir()) == ["3", "4"]


@pytest.mark.usefixtures("tidy")
def test_a_failure_in_the_background_is_raised_at_a_later_step(tmp_path):
    checkpoints = save(tmp_path, 1)
    state = state_at(2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoints.save(state, {})
            for _ in range(1000):
                checkpoints.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.latest_step(tmp_path) == 1
    state, _ = Checkpoints(tmp_path, CONFIG, 2).restore(1, train_state.abstract(MODEL, TRAIN))
    assert_equal(state, state_at(1))


def test_a_save_that_cannot_fit_is_refused_with_its_size(tmp_path):
    with pytest.raises(InputError, match=r"needs 1000000000\.00 GB"):
        checkpoint._require_space(tmp_path, 10**18)


def test_workdir_weights_are_the_parameters_in_the_compute_dtype(tmp_path):
    save(tmp_path, 1, 2)
    weights = WorkdirWeights(tmp_path)
    assert (weights.config, weights.dtype, weights.directory) == (MODEL, "bfloat16", tmp_path)
    expected = numpy(model.parameters(state_at(2).params))
    assert weights.shapes == {path: (array.shape, np.dtype("bfloat16")) for path, array in expected.items()}
    for path, array in expected.items():
        read = weights.read(path)
        assert read.dtype == np.dtype("bfloat16") and np.array_equal(read, array.astype("bfloat16")), path
    experts = "moe.ffn.experts.w_up"
    index = (0, 3, slice(4, 9))
    assert np.array_equal(weights.read(experts, index), expected[experts][index].astype("bfloat16"))


def test_parameters_are_stored_by_layer_and_expert(tmp_path):
    """So that a slice is read without its neighbours."""
    save(tmp_path, 1)
    arrays = WorkdirWeights(tmp_path)._arrays
    assert arrays["moe.ffn.experts.w_up"].chunk_layout.read_chunk.shape == (1, 1, 32, 16)
    assert arrays["moe.attn.w_o"].chunk_layout.read_chunk.shape == (1, 2, 8, 32)
    assert arrays["embed"].chunk_layout.read_chunk.shape == (64, 32)


def test_exported_and_loaded_again(tmp_path):
    """Out to Hugging Face's layout and in again, as infer.py and --init_from do."""
    save(tmp_path / "run", 1)
    convert.convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    direct = numpy(model.parameters(model.load(convert.open_checkpoint(tmp_path / "run"), "float32")))
    exported = numpy(model.parameters(model.load(convert.open_checkpoint(tmp_path / "hf"), "float32")))
    state = numpy(model.parameters(state_at(1).params))
    for path, array in state.items():
        assert np.array_equal(exported[path], array.astype("bfloat16").astype("float32")), path
        assert np.array_equal(exported[path], direct[path]), path


@pytest.mark.usefixtures("tidy")
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_told_by_its_step(tmp_path, damage):
    checkpoints = save(tmp_path, 1)
    state = tmp_path / "checkpoints" / "1" / "state"

    def spoil(path):
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
        else:
            path.unlink()

    data = sorted((path for path in state.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)
    spoil(data.pop())
    with pytest.raises(InputError, match=r"checkpoints/1.* damaged"):
        checkpoints.restore(1, train_state.abstract(MODEL, TRAIN))
    for path in data:  # the largest may have held moments alone, which are not weights
        spoil(path)
    with pytest.raises(InputError, match="damaged"):
        weights = WorkdirWeights(tmp_path)
        for path in weights.shapes:
            weights.read(path)


def test_no_checkpoint_or_another_programs_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        WorkdirWeights(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir()
    with pytest.raises(InputError, match=r"checkpoints/5: not a checkpoint of train\.py"):
        WorkdirWeights(tmp_path)
