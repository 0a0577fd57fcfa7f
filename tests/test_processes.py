"""A run of two processes: one process does the same; stopped, lost, and started unlike."""

import json
import re
import signal
import subprocess

import campaign_resume
import numpy as np
import pytest
from campaign_resume import ROOT, command
from campaign_signals import FOREVER, await_line, fake_devices, lose, start_processes, stopped_at

from dsv2_jax import checkpoint
from dsv2_jax.metrics import read


def ends(processes):
    """Exit code, stdout and stderr of each."""
    try:
        texts = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *pair) for process, pair in zip(processes, texts)]


def losses(workdir):
    return [[record["loss/lm"], record["grad_norm"]] for record in read(workdir / "metrics.jsonl")]


def saved(workdir, step):
    """The arrays of a checkpoint, and the place in the data."""
    arrays = checkpoint._Arrays(workdir / "checkpoints" / str(step))
    place = json.loads((arrays.directory / "data" / "metadata").read_text())
    return {name: store.read().result() for name, store in arrays.stores.items()}, place


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    campaign_resume.write_text(directory)
    return directory


def test_two_processes_of_four_devices_equal_one_of_eight_and_one_of_one_goes_on(scratch):
    one, two = scratch / "one", scratch / "two"
    first, second = ends(start_processes(two, 4, 4, "--set=checkpoint_every=4"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "step 4/4" in first[1]
    # Gloo prints from several threads, whose lines run into each other; of this program's own there is none.
    assert "step" not in second[1] and not second[2]

    def alone(workdir, devices, mesh):
        line = command(workdir, 6, mesh, "--set=checkpoint_every=4")
        subprocess.run(line, cwd=ROOT, env=fake_devices(devices), check=True, capture_output=True)

    alone(one, 8, "--mesh=data=2,expert=4")
    np.testing.assert_allclose(losses(two), losses(one)[:4], rtol=1e-6)
    (arrays, place), (expected, expected_place) = saved(two, 4), saved(one, 4)
    assert arrays.keys() == expected.keys() and place == expected_place
    for name, array in expected.items():
        assert np.linalg.norm(arrays[name] - array) <= 1e-5 * np.linalg.norm(array), name

    alone(two, 1, "--mesh=data=1")
    np.testing.assert_allclose(losses(two)[4:], losses(one)[4:], rtol=1e-5)


def test_a_signal_to_one_stops_both(scratch):
    workdir = scratch / "stopped"
    processes = start_processes(workdir, FOREVER, 1)
    await_line(processes[0], "step")
    processes[1].send_signal(signal.SIGTERM)
    first, second = ends(processes)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    step = stopped_at(first[1])
    assert checkpoint.latest_step(workdir) == step == read(workdir / "metrics.jsonl")[-1]["step"]
    assert checkpoint.verify(workdir, step)


def test_the_other_leaves_when_one_is_lost(scratch):
    lose(scratch / "lost", 1)


def test_processes_that_were_started_unlike_are_refused(scratch):
    for code, _, errors in ends(start_processes(scratch / "unlike", 7, 1, own=["", "--seed=3"])):
        assert code == 2 and re.fullmatch(r"error: seed: not the same in all 2 processes of this run\n", errors), errors
    assert not (scratch / "unlike").exists()
