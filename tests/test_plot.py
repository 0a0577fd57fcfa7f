"""The curves of a run, from its metrics.jsonl."""

import sys

import pytest

from dsv2_jax.fields import InputError
from dsv2_jax.metrics import FILE, MetricsFile
from dsv2_jax.plot import plot


def write(directory):
    file = MetricsFile(directory / FILE, 0)
    for step in range(1, 20):
        file.write({"step": step, "loss/lm": 7 / step, "loss/expert_balance": 0.01, "grad_norm": 1.0, "lr": 1e-3})


def test_a_png_of_every_quantity(tmp_path):
    write(tmp_path)
    path = plot(tmp_path)
    from matplotlib.image import imread

    image = imread(path)
    assert path.parent == tmp_path and image.shape[1] > 3 * image.shape[0]  # four panels side by side
    assert image[..., :3].std(axis=(0, 1)).min() > 0.01  # something is drawn


def test_nothing_to_draw_is_told(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        plot(tmp_path)
    (tmp_path / FILE).touch()
    with pytest.raises(InputError, match="empty"):
        plot(tmp_path)


def test_missing_matplotlib_is_told(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot(tmp_path)
    assert not (tmp_path / "metrics.png").exists()
