"""metrics.jsonl: exact numbers, each step once whatever the run went through; MFU by the convention."""

import json
import math

import numpy as np
import pytest

from dsv2_jax import metrics
from dsv2_jax.config import v2_lite
from dsv2_jax.fields import InputError
from dsv2_jax.metrics import MetricsFile


def write(path, first, last, loss=1.0):
    file = MetricsFile(path, first - 1)
    for step in range(first, last + 1):
        file.write({"step": step, "loss/lm": loss})


def test_floats_read_back_exactly(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1e300, 7.664917469024658, None]
    file = MetricsFile(tmp_path / "m.jsonl", 0)
    for step, value in enumerate(values, start=1):
        file.write({"step": step, "x": value})
    assert [record["x"] for record in metrics.read(tmp_path / "m.jsonl")] == values


def test_resuming_removes_what_comes_again(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1, 9, loss=1.0)
    write(path, 6, 12, loss=2.0)
    records = metrics.read(path)
    assert [record["step"] for record in records] == list(range(1, 13))
    assert [record["loss/lm"] for record in records] == [1.0] * 5 + [2.0] * 7
    write(path, 1, 2)
    assert len(metrics.read(path)) == 2


def test_a_torn_last_line_is_removed(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, 1, 3)
    with path.open("a") as file:
        file.write('{"step": 4, "loss')
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 3]
    write(path, 4, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', ""])
def test_a_bad_line_is_told_with_its_number(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(InputError, match=r"m\.jsonl:2"):
        metrics.read(path)
    assert path.read_text().endswith('{"step": 3}\n')


def test_speed_is_per_step_and_mfu_by_the_convention(monkeypatch):
    record = metrics.speed(v2_lite(), 4096, steps=2, tokens=32768, seconds=1.0)
    assert record == {"perf/tokens_per_s": 32768.0, "perf/mfu": None, "perf/step_ms": 500.0}  # a CPU has no known peak
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 989e12)
    record = metrics.speed(v2_lite(), 4096, steps=1, tokens=16384, seconds=0.5)
    causal_half = 27 * 16 * (192 + 128) * 4096  # 2 FLOP a multiply-add, half of the pairs
    assert record["perf/mfu"] == pytest.approx(32768 * (6 * 2_451_435_008 + 3 * causal_half) / 989e12)


def test_plain_lines_where_there_is_no_terminal(capsys):
    record = {"loss/lm": 2.5, "grad_norm": 1.0, "lr": 1e-3, "skipped": 0.0, "perf/tokens_per_s": 1000.0, "perf/mfu": 0.25}
    notable = {40: {"skipped": 1.0}, 50: {"loss/spike": 7.4}, 60: {"loss/eval": 3.0}}
    with metrics.display(0, 100) as show:
        for step in range(1, 101):
            show({"step": step} | record | notable.get(step, {}))
    first, *between, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/100  loss 2.5000") and "mfu 25.0%" in first and last.startswith("step 100/100")
    assert [line.split("mfu 25.0%  ")[1] for line in between] == ["SKIPPED: not finite", "SPIKE of 7 deviations", "eval 3.0000"]


def test_numbers_that_are_not_finite_are_null_also_in_lists(tmp_path):
    values = {"loss/lm": np.float32("nan"), "grad_norm": np.float32("inf"), "stop": np.int32(0)}
    values |= {"moe/load": np.array([[1.0, 0.0]]), "moe/dropped": np.array([np.nan])}
    record = metrics.of_step({name: np.asarray(value) for name, value in values.items()}, with_load=True)
    MetricsFile(tmp_path / "m.jsonl", 0).write({"step": 1} | record)
    expected = {"step": 1, "loss/lm": None, "grad_norm": None, "moe/drop_fraction_of_layer": [None]}
    assert metrics.read(tmp_path / "m.jsonl") == [expected | {"moe/dead_experts_of_layer": [1], "moe/load": [[1, 0]]}]


def spikes_of(losses, spikes=None):
    """What is found, and the records as they are logged and read again."""
    spikes = spikes or metrics.Spikes([])
    records = [{"loss/lm": loss} for loss in losses]
    for record in records:
        record |= spikes.check(record)
    return [record | {"loss/lm": record["loss/lm"] if math.isfinite(record["loss/lm"]) else None} for record in records]


def test_a_spike_is_six_deviations_over_the_128_losses_before():
    flat = [2.0, 4.0] * 64  # mean 3, deviation 1
    assert "loss/spike" not in spikes_of([*flat, 8.99])[-1]
    assert spikes_of([*flat, 9.5])[-1]["loss/spike"] == pytest.approx(6.5)
    assert "loss/spike" not in spikes_of([*flat[1:], 100.0])[-1]  # too few yet
    assert "loss/spike" not in spikes_of([*flat, -100.0])[-1]
    # Neither a spike nor what is not finite counts among those before; what is older than 128 does not either.
    assert spikes_of([1e9] * 3 + [*flat, 50.0, math.nan, 50.0])[-1]["loss/spike"] == pytest.approx(47)


def test_spikes_of_a_resumed_run_are_those_of_the_uninterrupted_one():
    losses = np.random.default_rng(0).normal(3, 0.1, 400)
    losses[[150, 151, 260, 270]] = [9, 50, math.nan, 6]
    whole = spikes_of(losses)
    assert [step for step, record in enumerate(whole) if "loss/spike" in record] == [150, 151, 270]
    for at in (140, 151, 200, 265, 300):
        assert whole[:at] + spikes_of(losses[at:], metrics.Spikes(whole[:at])) == whole
