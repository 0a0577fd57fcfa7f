"""Which implementation runs, and what is said where one cannot."""

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import choose


def test_a_cpu_takes_xla_and_says_why_not_pallas():
    assert choose(None, None) == choose("xla", None) == "xla"
    with pytest.raises(ValueError, match="'pallas', which cannot run: the device is cpu, expected a Hopper GPU"):
        choose("pallas", None)


def test_a_hopper_gpu_takes_pallas_unless_the_operands_do_not_fit(monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    assert choose(None, None) == choose("pallas", None) == "pallas"
    assert choose("xla", None) == "xla"
    assert choose(None, "K is 24, expected a multiple of 64") == "xla"
    with pytest.raises(ValueError, match="cannot run: K is 24"):
        choose("pallas", "K is 24, expected a multiple of 64")


def test_unknown_names_are_refused_and_peers_are_known():
    assert choose("cudnn", None, ("cudnn",)) == "cudnn"
    with pytest.raises(ValueError, match="'cuda', expected None or one of xla, pallas, cudnn"):
        choose("cuda", None, ("cudnn",))
