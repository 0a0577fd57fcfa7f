"""The pictures of a run, from its metrics.jsonl."""

import sys

import numpy as np
import pytest

from dsv2_jax.fields import InputError
from dsv2_jax.metrics import FILE, MetricsFile
from dsv2_jax.plot import plot


def write(directory, **more):
    file = MetricsFile(directory / FILE, 0)
    for step in range(1, 20):
        skipped = step == 7
        record = {"step": step, "loss/lm": None if skipped else 7 / step, "loss/expert_balance": 0.01, "skipped": float(skipped)}
        file.write(record | {"grad_norm": 1.0, "lr": 1e-3} | (more if step % 5 == 0 else {}))


def image(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


def count(path, color):
    """Pixels of a color."""
    return int((abs(image(path) - np.array(color) / 255) < 0.02).all(axis=-1).sum())


def test_curves_of_every_quantity(tmp_path):
    write(tmp_path)
    (path,) = plot(tmp_path)
    assert path == tmp_path / "metrics.png"
    height, width, _ = image(path).shape
    assert width / height == pytest.approx(15 / 8, rel=0.01)  # two rows of three, of which two are not there
    red, blue, orange = (214, 39, 40), (31, 119, 180), (255, 127, 14)
    assert count(path, red) > 20 and count(path, blue) > 200  # the skipped step, the curves
    without = count(path, orange)
    write(tmp_path, **{"loss/eval": 3.0, "loss/device_balance": 0.05})
    assert count(plot(tmp_path)[0], orange) > without + 100


def test_a_heat_map_of_the_last_loads(tmp_path):
    """White is a fair share; the busiest and the dead expert have the ends of the scale."""
    load = np.full((2, 16), 10)
    load[0, 3], load[0, 4] = 20, 0
    write(tmp_path, **{"moe/load": load.tolist()})
    _, path = plot(tmp_path)
    assert path == tmp_path / "expert_load.png"
    red, blue, fair = (103, 0, 31), (5, 48, 97), (246, 247, 247)
    ends = count(path, red), count(path, blue)
    cell = count(path, fair) / 30
    assert min(ends) > 0.9 * cell and max(ends) < 1.6 * cell, (ends, cell)  # one cell each, and a bit of the scale's bar


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        plot(tmp_path)
    (tmp_path / FILE).touch()
    with pytest.raises(InputError, match="empty"):
        plot(tmp_path)
    (tmp_path / FILE).write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="nothing to draw"):
        plot(tmp_path)
    assert not list(tmp_path.glob("*.png"))


def test_missing_matplotlib_is_told(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot(tmp_path)
    assert not list(tmp_path.glob("*.png"))
