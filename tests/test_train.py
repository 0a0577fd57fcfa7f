"""train.py as its user runs it: a run, killed, stopped and resumed, raised, refused, not finite, exported and continued."""

import json
import random
import shutil
import signal
import subprocess
import sys

import campaign_resume
import campaign_signals
import jax
import numpy as np
import pytest
from campaign_resume import ROOT, command, losses

from dsv2_jax import model
from dsv2_jax.convert import convert, open_checkpoint
from dsv2_jax.loss import log_probs
from dsv2_jax.metrics import read
from dsv2_jax.tokenizer import Tokenizer
from dsv2_jax.weights import load


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
    (directory / "held_out.txt").write_text((ROOT / "dsv2_jax" / "rope.py").read_text())
    return directory


@pytest.fixture(scope="module")
def evaluated(scratch):
    return [f"--eval_data={scratch}/held_out.txt", "--set=eval_every=3"]


@pytest.fixture(scope="module")
def whole(scratch, evaluated):
    """A run of 7 steps, in its one process; evaluated and traced, which changes nothing."""
    run(scratch / "whole", 7, *evaluated, "--set=load_every=2", "--profile_steps=2:3")
    return scratch / "whole"


def test_a_run_writes_what_the_contract_says(whole):
    records = read(whole / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 8))
    keys = "step tokens loss/lm loss/expert_balance loss/device_balance loss/comm_balance grad_norm lr skipped moe/max_load "
    keys += "moe/drop_fraction moe/dead_experts moe/drop_fraction_of_layer moe/dead_experts_of_layer "
    keys += "perf/tokens_per_s perf/mfu perf/step_ms"
    assert set(records[0]) == set(keys.split())
    pairs = 8 * 32 * 4
    assert [record["step"] for record in records if "moe/load" in record] == [2, 4, 6, 7]
    for record in records:
        assert len(record["moe/drop_fraction_of_layer"]) == len(record["moe/dead_experts_of_layer"]) == 1
        assert sum(record["moe/dead_experts_of_layer"]) == record["moe/dead_experts"]
        for loads in record.get("moe/load", ()):
            assert len(loads) == 16 and sum(loads) == pairs and loads.count(0) == record["moe/dead_experts"]
            assert max(loads) / (pairs / 16) == record["moe/max_load"]
    assert records[-1]["tokens"] == 7 * 8 * 32
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["6", "7"]
    config = json.loads((whole / "config.json").read_text())
    assert config["train"]["seq_len"] == 32 and config["model"]["vocab_size"] == 300
    assert (whole / "tokenizer.json").exists()


def test_raising_steps_goes_on_exactly(scratch, whole, evaluated):
    """Two runs make the steps of one; the data's place and the optimizer are those of the uninterrupted run."""
    parts = scratch / "parts"
    run(parts, 2)
    run(parts, 7, *evaluated, "--profile_steps=1:4")  # of which two are left
    assert campaign_resume.compare(whole, parts, 7) == (0, 0)
    assert "nothing to do" in run(parts, 7).stdout
    assert list((parts / "profile").rglob("*.xplane.pb"))
    evaluations = [[(r["step"], r["loss/eval"]) for r in read(d / "metrics.jsonl") if "loss/eval" in r] for d in (whole, parts)]
    assert [step for step, _ in evaluations[0]] == [3, 6, 7] and evaluations[1] == evaluations[0]


def test_evaluation_covers_all_of_the_held_out_text_once(whole):
    """It is the mean over tokens, nothing dropped, whatever batches it comes in."""
    weights, tokenizer = open_checkpoint(whole), Tokenizer.load(whole)
    ids = [*tokenizer.encode((whole.parent / "held_out.txt").read_text(), bos=True), tokenizer.eos_id]
    rows_BT = np.zeros((-(-len(ids) // 32), 33), np.int32)  # rows of 32, and the first of the next
    targets = np.zeros(rows_BT[:, 1:].shape, bool)
    for row_T, is_target_T, begin in zip(rows_BT, targets, range(0, len(ids), 32)):
        part = ids[begin : begin + 33]
        row_T[: len(part)] = part
        is_target_T[: len(part) - 1] = True

    @jax.jit
    def mean(decoder):
        tokens = rows_BT[:, :-1]
        hidden, _, _ = decoder(tokens, np.broadcast_to(np.arange(32), tokens.shape), targets.astype(np.int32))
        return -(log_probs(decoder, hidden, rows_BT[:, 1:]) * targets).sum() / targets.sum()

    expected = mean(load(weights, model.abstract(weights.config, "float32")))
    assert read(whole / "metrics.jsonl")[-1]["loss/eval"] == pytest.approx(float(expected), rel=1e-5)


def test_a_window_of_steps_is_traced(whole):
    assert list((whole / "profile").rglob("*.xplane.pb"))


def test_killed_stopped_and_resumed_is_bit_identical(scratch):
    """kill -9, SIGTERM, SIGINT, and on; a signal saves and ends with code 0."""
    ended, twin, moments = scratch / "ended", scratch / "twin", random.Random(1)
    campaign_resume.kill(ended, 1, moments)
    for number in (signal.SIGTERM, signal.SIGINT):
        step = campaign_signals.stop(ended, number, moments)
    campaign_resume.run(ended, step + 4)
    campaign_resume.run(twin, step + 4)
    assert campaign_resume.compare(twin, ended, step + 4) == (0, 0)
    assert [step for step, *_ in losses(ended)] == list(range(1, step + 5))


def test_ends_after_steps_that_are_not_finite(scratch):
    """In one line that names the step; the state of before and the batch are kept; started again it ends the same."""
    workdir, explodes = (
        scratch / "nan",
        [f"--set={field}" for field in ("learning_rate=3.4e38", "warmup_steps=0", "max_skipped=3")],
    )
    told = refused(workdir, 100, *explodes)
    assert "error: step 4: " in told and str(workdir / "nonfinite") in told
    records = campaign_signals.strict(workdir)
    for name in ("loss/lm", "loss/expert_balance", "grad_norm"):
        assert [record[name] is None for record in records] == [False, True, True, True], name
    states = [campaign_resume.final_state(place, step) for place, step in ((workdir / "nonfinite", 4), (workdir, 3))]
    assert {name for name in states[0] if states[0][name] != states[1][name]} == {"step", "data"}
    assert open_checkpoint(workdir / "nonfinite").shapes
    with np.load(workdir / "nonfinite" / "batch_0.npz") as batch:
        assert batch["tokens"].shape == (1, 8, 32)
    assert "error: step 6: " in refused(workdir, 100, *explodes)
    assert [(record["step"], record["skipped"]) for record in campaign_signals.strict(workdir)] == [
        (1, 0),
        *((n, 1) for n in range(2, 7)),
    ]


def test_accumulates_and_ramps_in_one_program(scratch):
    """The batch grows from 4 to 8 sequences over 512 tokens, 4 at a time; resumed on the ramp, it is the same run."""
    ramp, flags = scratch / "ramp", ["--set=micro_batch_size=4", "--set=drop_pool=4"]
    flags += ["--set=ramp_from=4", "--set=ramp_tokens=512"]
    assert run(ramp, 6, *flags).stdout.count("compiled") == 1
    assert [record["tokens"] for record in read(ramp / "metrics.jsonl")] == [128, 256, 384, 512, 768, 1024]
    resumed = shutil.copytree(ramp, scratch / "ramp_resumed")
    shutil.rmtree(resumed / "checkpoints" / "6")
    assert "from step 3 to 6" in run(resumed, 6, *flags).stdout
    assert campaign_resume.compare(ramp, resumed, 6) == (0, 0)


def test_falls_back_on_request_to_the_checkpoint_before_a_damaged_one(scratch, whole):
    damaged = shutil.copytree(whole, scratch / "damaged")
    file = max((damaged / "checkpoints" / "7" / "state").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert str(damaged / "checkpoints" / "7") in refused(damaged, 8)
    said = run(damaged, 7, "--set=fall_back=true").stdout
    assert f"moved aside: {damaged}/checkpoints/7.damaged" in said
    assert sorted(path.name for path in (damaged / "checkpoints").iterdir()) == ["6", "7", "7.damaged"]
    assert campaign_resume.compare(whole, damaged, 7) == (0, 0)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--mesh=data=3,expert=x"], "'expert=x': expected an axis of data, expert and its size"),
        (["--mesh=foo=2"], "'foo=2': expected an axis"),
        (["--mesh=data=64"], "needs 64 devices"),
        (["--zero=2"], "zero is 2, expected 1 or 3"),
        (["--recipe=v3"], "--recipe=v3: expected v2 or v2_lite"),
        (["--profile_steps=5"], "--profile_steps=5: expected FIRST:LAST"),
        (["--gpus=8"], "--gpus is of use with --dry_run"),
        (["--num_processes=2"], "--num_processes is of use with --coordinator"),
        (["--dry_run", "--gpu=b200"], "--gpu=b200: unknown GPU, did you mean 'h200'"),
    ],
)
def test_a_bad_flag_is_told_in_one_line(scratch, flags, told):
    assert told in refused(scratch / "unborn", 1, *flags)
    assert not (scratch / "unborn").exists()


def test_a_batch_that_the_mesh_does_not_divide_is_refused(scratch):
    environment = campaign_signals.fake_devices(8)
    sets = [*command(scratch / "unborn", 1), "--mesh=data=4,expert=2", "--set=micro_batch_size=4", "--set=drop_pool=4"]
    done = subprocess.run(sets, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "the 4 sequences computed at a time: expected a multiple of the mesh's 8" in done.stderr
    assert done.stderr.count("\n") == 1 and not (scratch / "unborn").exists()


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
    """An export is complete, and a new run can start from it: same parameters and tokenizer, another learning rate.

    A record that stands for several steps has the speed of all of them.
    """
    convert(str(whole), str(scratch / "hf"), "hf")
    assert (scratch / "hf" / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    flags = [
        f"--workdir={scratch}/tuned",
        f"--data={scratch}/text.txt",
        f"--init_from={scratch}/hf",
        "--steps=3",
        "--preset=tiny",
    ]
    sets = ["--set=seq_len=32", "--set=learning_rate=1e-9", "--set=weight_decay=0", "--set=log_every=2"]
    subprocess.run([sys.executable, "train.py", *flags, *sets], cwd=ROOT, check=True, capture_output=True)
    before, after = open_checkpoint(scratch / "hf"), open_checkpoint(scratch / "tuned")
    assert after.config == before.config
    for path in before.shapes:
        np.testing.assert_allclose(after.read(path), before.read(path), atol=1e-8)
    records = read(scratch / "tuned" / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 3]
    for record in records:
        assert record["perf/tokens_per_s"] * record["perf/step_ms"] / 1e3 == pytest.approx(16 * 32)
    first, last = records[0], read(whole / "metrics.jsonl")[0]
    assert first["loss/lm"] < last["loss/lm"] - 0.05
