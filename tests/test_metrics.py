"""metrics.jsonl: exact numbers, each step once whatever the run went through; MFU by the convention."""

import json
import math

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
    values = [0.1, 1 / 3, 5e-324, 1e300, 7.664917469024658, math.inf, None]
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
    record = metrics.speed(v2_lite(), 4096, tokens=16384, seconds=0.5)
    assert record == {"perf/tokens_per_s": 32768.0, "perf/mfu": None, "perf/step_ms": 500.0}  # a CPU has no known peak
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 989e12)
    record = metrics.speed(v2_lite(), 4096, tokens=16384, seconds=0.5)
    causal_half = 27 * 16 * (192 + 128) * 4096  # 2 FLOP a multiply-add, half of the pairs
    assert record["perf/mfu"] == pytest.approx(32768 * (6 * 2_451_435_008 + 3 * causal_half) / 989e12)


def test_plain_lines_where_there_is_no_terminal(capsys):
    record = {"loss/lm": 2.5, "grad_norm": 1.0, "lr": 1e-3, "perf/tokens_per_s": 1000.0, "perf/mfu": 0.25}
    with metrics.display(0, 100) as show:
        for step in range(1, 101):
            show({"step": step} | record)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/100  loss 2.5000") and lines[-1].startswith("step 100/100")
    assert len(lines) == 2 and "mfu 25.0%" in lines[0]
