"""Ratios of speeds: ours and a peer's take turns, so that both see the same state of the machine."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

PAIRS = 9


class Ratio(NamedTuple):
    """Medians in seconds a call, and the peer's time over ours in each pair: the median, the least and the most."""

    ours: float
    peer: float
    ratio: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.ratio:.3f} ({self.least:.3f} to {self.most:.3f})"


def compare(ours: Callable[[int], None], peer: Callable[[int], None], seconds: float = 0.03) -> Ratio:
    """Times `ours(n)` and `peer(n)`, which call their function n times and wait for the device, in alternation."""
    counts = [_count(f, seconds) for f in (ours, peer)]
    pairs = []
    for pair in range(PAIRS):
        order = ((0, ours), (1, peer)) if pair % 2 == 0 else ((1, peer), (0, ours))
        times = {which: _time(f, counts[which]) for which, f in order}
        pairs.append((times[0], times[1]))
    ratios = [peer / ours for ours, peer in pairs]
    return Ratio(*(statistics.median(t) for t in zip(*pairs)), statistics.median(ratios), min(ratios), max(ratios))


def jax_calls(function: Callable, *args) -> Callable[[int], None]:
    """`f(n)`: n calls of a compiled JAX function, then a wait."""
    import jax

    def run(n: int) -> None:
        for _ in range(n):
            out = function(*args)
        jax.block_until_ready(out)

    return run


def torch_calls(function: Callable) -> Callable[[int], None]:
    """`f(n)`: n calls of a PyTorch function, then a wait."""
    import torch

    def run(n: int) -> None:
        for _ in range(n):
            function()
        torch.cuda.synchronize()

    return run


def _time(function: Callable[[int], None], n: int) -> float:
    began = time.perf_counter()
    function(n)
    return (time.perf_counter() - began) / n


def _count(function: Callable[[int], None], seconds: float) -> int:
    """Calls that take about `seconds`, after a warm-up."""
    function(3)
    return max(3, round(seconds / _time(function, 5)))
