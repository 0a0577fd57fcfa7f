"""Checkpoints: exact, complete or absent, for any mesh; damage is told; and as the weights of a model."""

import dataclasses
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from campaign_corruption import DAMAGES, ROOT, campaign, state_at
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from training_cases import MODEL, TRAIN, batch, new_state, numpy

from dsv2_jax import checkpoint, convert, model, train_state
from dsv2_jax.checkpoint import Checkpoints, WorkdirWeights
from dsv2_jax.checksum import checksums, chunk_checksum
from dsv2_jax.fields import InputError
from dsv2_jax.train_state import TrainState
from sharding.mesh import make_mesh

# A failing Orbax abandons its coroutines.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine")
CONFIG = {"model": MODEL.to_hf("bfloat16"), "train": {"dtype": "bfloat16"}}


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


@pytest.mark.parametrize(
    "there, here", [((2, 4), (1, 1)), ((2, 4), (2, 1)), ((8, 1), (1, 4)), ((1, 8), (4, 2)), ((1, 1), (8, 1))]
)
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
    stores = checkpoint._Arrays(tmp_path / "checkpoints" / "1").stores
    for owner in ("params", "opt_state.1.mu", "opt_state.1.nu"):
        assert stores[f"{owner}.moe.ffn.experts.w_up"].chunk_layout.read_chunk.shape == (1, 1, 32, 16)
        assert stores[f"{owner}.moe.attn.w_o"].chunk_layout.read_chunk.shape == (1, 16, 32)
        assert stores[f"{owner}.embed"].chunk_layout.read_chunk.shape == (64, 32)


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
    run, hf = (model.load(convert.open_checkpoint(tmp_path / name), "bfloat16", fp8=True) for name in ("run", "hf"))
    for (path, one), other in zip(model.parameters(run).items(), model.parameters(hf).values(), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


def test_no_checkpoint_or_another_programs_is_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match="no complete checkpoint"):
        WorkdirWeights(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir()
    with pytest.raises(InputError, match=r"checkpoints/5: not a checkpoint of this version of train\.py"):
        WorkdirWeights(tmp_path)


# -- checksums


def host_checksums(array: np.ndarray, stacked: int) -> np.ndarray:
    shape = array.shape[:stacked]
    return np.stack([chunk_checksum(array[chunk]) for chunk in np.ndindex(shape)]).reshape(*shape, 2)


def numbers(dtype: str, *shape: int) -> np.ndarray:
    """All bits in use."""
    size = np.dtype(dtype).itemsize
    return np.random.default_rng(0).integers(0, 256, (*shape, size), np.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("mesh", [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_checksums_do_not_depend_on_mesh_sharding_or_device(mesh, dtype):
    with jax.set_mesh(make_mesh(*mesh)):
        for shape, stacked, spec in [
            ((), 0, P()),
            ((24,), 0, P("data")),
            ((8, 16), 0, P("expert", "data")),
            ((3, 16, 8), 1, P(None, ("data", "expert"), None)),
            ((2, 8, 16, 8), 2, P(None, "expert", "data", None)),
        ]:
            array = numbers(dtype, *shape)
            placed = jax.device_put(array, NamedSharding(jax.sharding.get_mesh(), spec))
            sums = checksums(placed, stacked)
            assert sums.dtype == np.uint32 and np.array_equal(sums, host_checksums(array, stacked)), shape


def test_checksums_of_eight_bytes():
    with jax.enable_x64(True):
        for dtype in ("float64", "int64"):
            array = numbers(dtype, 2, 3, 5)
            assert np.array_equal(checksums(jnp.asarray(array), 1), host_checksums(array, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "float64"])
def test_any_flipped_bit_changes_both_sums(dtype):
    array = numbers(dtype, 4, 6)
    before = chunk_checksum(array)
    flat = array.reshape(-1).view(np.uint8)
    for bit in range(8 * flat.size):
        flat[bit // 8] ^= 1 << bit % 8
        assert (chunk_checksum(array) != before).all(), bit
        flat[bit // 8] ^= 1 << bit % 8
    assert np.array_equal(chunk_checksum(array), before)


def test_moved_values_change_the_checksum():
    """Of what a sum without places would not see; the values are small integers, as ill mixed as can be."""
    array = np.arange(64 * 1024, dtype=np.int32).reshape(64, 1024) % 7
    changed = {
        "elements": np.where(np.indices(array.shape).sum(axis=0) == 5, np.roll(array, 1, axis=1), array),
        "rows": array[[1, 0, *range(2, 64)]],
        "shifted": np.roll(array.reshape(-1), 1).reshape(array.shape),
        "reversed": array[::-1, ::-1],
        "blocks": np.roll(array.reshape(-1), 1024 * 7 * 2).reshape(array.shape)[:, ::-1],
        "transposed": array.reshape(1024, 64).T,
        "zeroed": np.where(np.arange(64)[:, None] == 3, 0, array),
    }
    sums = {name: tuple(chunk_checksum(x)) for name, x in changed.items()} | {"": tuple(chunk_checksum(array))}
    assert len({first for first, _ in sums.values()}) == len({second for _, second in sums.values()}) == len(sums)


# -- damage


def spoil(workdir, step: int) -> None:
    """Flips a bit in the largest file of a step."""
    file = max((workdir / "checkpoints" / str(step)).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("tidy")
def test_damage_is_told_or_does_no_harm():
    """A few of each kind of `make campaign`."""
    counts, wrong = campaign(cases=18, seed=1)
    assert not wrong
    assert {*DAMAGES, "file size limit"} <= counts.keys()
    assert sum(counted["restore told"] for counted in counts.values()) >= 5


def test_a_chunk_that_is_not_what_was_saved_is_named(tmp_path):
    checkpoints = save(tmp_path, 1)
    file = tmp_path / "checkpoints" / "1" / "manifest" / "metadata"
    manifest = json.loads(file.read_text())
    stated = manifest["arrays"]["params.moe.ffn.experts.w_up"]
    stated["checksums"] = stated["checksums"][: 16 * 3] + "0" * 16 + stated["checksums"][16 * 4 :]
    manifest["digest"] = checkpoint._digest({name: value for name, value in manifest.items() if name != "digest"})
    file.write_text(json.dumps(manifest))
    where = r"checkpoints/1: damaged: params\.moe\.ffn\.experts\.w_up, layer 0, expert 3 is not what was saved"
    with pytest.raises(InputError, match=f"{where}; 1 of [0-9]+ chunks are not"):
        checkpoints.restore(1, train_state.abstract(MODEL, TRAIN))
    with pytest.raises(InputError, match=f"{where}; 1 of"):
        checkpoint.verify(tmp_path, 1)
    weights = WorkdirWeights(tmp_path)
    weights.read("moe.ffn.experts.w_up", (0, slice(4, 8)))
    for index in [(), (0, 3), (slice(None), slice(2, 4), 5)]:
        with pytest.raises(InputError, match=where):
            weights.read("moe.ffn.experts.w_up", index)


def test_a_state_of_another_model_is_refused_with_all_names(tmp_path):
    checkpoints = save(tmp_path, 1)
    other = dataclasses.replace(MODEL, vocab_size=72)
    with pytest.raises(
        InputError, match=r"missing: .*params\.embed float32\[72, 32\].*unexpected: .*params\.embed float32\[64, 32\]"
    ):
        checkpoints.restore(1, train_state.abstract(other, TRAIN))


def verify(workdir) -> subprocess.CompletedProcess:
    """The command, where JAX finds no device at all."""
    command = [sys.executable, "-m", "dsv2_jax.checkpoint", "verify", workdir]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "none"}, capture_output=True, text=True)


def test_verify_tells_of_each_step(tmp_path):
    save(tmp_path, 1, 2, 3, keep=3)
    done = verify(tmp_path)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", 3)
    count = len(train_state.arrays(train_state.abstract(MODEL, TRAIN)))
    assert lines[0] == f"step 3: {count} arrays, 0.00 GB, good" and lines[2].startswith("step 1: ")
    spoil(tmp_path, 3)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "data")
    done = verify(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path}: damaged: step 3, 1; the newest good step: 2\n"
    assert "step 3: " in lines[0] and "chunks are damaged" in lines[0] and lines[1].endswith("good")
    assert lines[2] == f"step 1: {tmp_path}/checkpoints/1/data/metadata: no such file"


def test_verify_of_nothing_is_an_error(tmp_path):
    for command, told in [("verify", "no complete checkpoint"), ("check", "unknown command 'check', expected verify")]:
        with pytest.raises(InputError, match=told):
            checkpoint.main(command, str(tmp_path))


def test_a_run_goes_on_from_the_newest_good_step(tmp_path):
    assert checkpoint.newest_good_step(tmp_path) is None
    save(tmp_path, 1, 2, 3, keep=3)
    spoil(tmp_path, 3)
    for again in ("", ".damaged"):
        assert checkpoint.newest_good_step(tmp_path) == 2
        checkpoints = Checkpoints(tmp_path, CONFIG, keep=3)
        state, data = checkpoints.restore(2, train_state.abstract(MODEL, TRAIN))
        assert_equal(state, state_at(2))
        with pytest.raises(InputError, match="holds step 3, so step 3 cannot be saved"):
            checkpoints.save(state_at(3), data)
        moved = tmp_path / "checkpoints" / f"3.damaged{again}"
        assert checkpoints.move_aside(2) == [moved] and moved.is_dir()
        assert checkpoint.latest_step(tmp_path) == checkpoint.newest_good_step(tmp_path) == 2
        checkpoints.save(state_at(3), data)
        checkpoints.wait()
        assert checkpoint.newest_good_step(tmp_path) == 3
        spoil(tmp_path, 3)
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=1)  # keeps one step, and what is not a step
    checkpoints.save(state_at(4), {})
    checkpoints.wait()
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "3.damaged", "3.damaged.damaged"}
    spoil(tmp_path, 4)
    with pytest.raises(InputError, match="all checkpoints are damaged"):
        checkpoint.newest_good_step(tmp_path)
