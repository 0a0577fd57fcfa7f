"""train.py as its user runs it: a run, killed and resumed, raised, refused, exported and continued."""

import json
import random
import subprocess
import sys

import campaign_resume
import numpy as np
import pytest
from campaign_resume import ROOT, command, losses

from dsv2_jax.convert import convert, open_checkpoint
from dsv2_jax.metrics import read


def run(workdir, steps, *more, code=0):
    done = subprocess.run(command(workdir, steps, *more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def refused(workdir, steps, *more):
    """The one line that it ends with."""
    done = run(workdir, steps, *more, code=2)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    campaign_resume.write_text(directory)
    return directory


@pytest.fixture(scope="module")
def whole(scratch):
    """A run of 7 steps, in its one process."""
    run(scratch / "whole", 7)
    return scratch / "whole"


def test_a_run_writes_what_the_contract_says(whole):
    records = read(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    keys = "step tokens loss/lm loss/expert_balance moe/max_load grad_norm lr perf/tokens_per_s perf/mfu perf/step_ms"
    assert set(records[0]) == set(keys.split())
    assert records[-1]["tokens"] == 7 * 8 * 32
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["6", "7"]
    config = json.loads((whole / "config.json").read_text())
    assert config["train"]["seq_len"] == 32 and config["model"]["vocab_size"] == 300
    assert (whole / "tokenizer.json").exists()


def test_raising_steps_goes_on_exactly(scratch, whole):
    """Three runs make the steps of one; the data's place and the optimizer are those of the uninterrupted run."""
    for steps in (2, 5, 7):
        run(scratch / "parts", steps)
    assert campaign_resume.compare(whole, scratch / "parts", 7) == (0, 0)
    assert "nothing to do" in run(scratch / "parts", 7).stdout


def test_killed_and_resumed_is_bit_identical(scratch):
    killed, twin = scratch / "killed", scratch / "twin"
    stood = campaign_resume.kill(killed, 2, random.Random(1))
    steps = stood[-1] + 4
    campaign_resume.run(killed, steps)
    campaign_resume.run(twin, steps)
    assert campaign_resume.compare(twin, killed, steps) == (0, 0)
    assert [step for step, *_ in losses(killed)] == list(range(1, steps + 1))


def test_another_configuration_is_refused_and_named(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    told = refused(whole, 9, "--set=learning_rate=0.5")
    assert "learning_rate (0.006 there, 0.5 here)" in told
    assert "seed (0 there, 3 here)" in refused(whole, 9, "--seed=3")
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_bad_input_leaves_no_workdir(scratch):
    (scratch / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    new = scratch / "new"
    assert "bad.jsonl:2" in refused(new, 1, f"--data={scratch}/bad.jsonl")
    assert "did you mean 'seq_len'" in refused(new, 1, "--set=seqlen=4")
    assert not new.exists()


def test_a_directory_of_something_else_is_not_touched(scratch):
    other = scratch / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "deepseek_v2"}')
    assert "not train.py's" in refused(other, 1)
    assert [path.name for path in other.iterdir()] == ["config.json"]


def test_exported_and_continued(scratch, whole):
    """An export is complete, and a new run can start from it: same parameters and tokenizer, another learning rate."""
    convert(str(whole), str(scratch / "hf"), "hf")
    assert (scratch / "hf" / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    flags = [
        f"--workdir={scratch}/tuned",
        f"--data={scratch}/text.txt",
        f"--init_from={scratch}/hf",
        "--steps=1",
        "--preset=tiny",
    ]
    sets = ["--set=seq_len=32", "--set=learning_rate=1e-9", "--set=weight_decay=0"]
    subprocess.run([sys.executable, "train.py", *flags, *sets], cwd=ROOT, check=True, capture_output=True)
    before, after = open_checkpoint(scratch / "hf"), open_checkpoint(scratch / "tuned")
    assert after.config == before.config
    for path in before.shapes:
        np.testing.assert_allclose(after.read(path), before.read(path), atol=1e-8)
    first, last = read(scratch / "tuned" / "metrics.jsonl")[0], read(whole / "metrics.jsonl")[0]
    assert first["loss/lm"] < last["loss/lm"] - 0.05
