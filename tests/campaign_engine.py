"""A soak of the engine: after a warm-up that has seen every shape, so many minutes of random requests: memory stays flat, nothing
is compiled, and in the end every page is back. Part of `make campaign`.

    python tests/campaign_engine.py MINUTES [LAYERS]

LAYERS: V2-Lite with so many layers and random bfloat16 weights, for a GPU; if not given, a tiny model in float32.
"""

import dataclasses
import os
import random
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv2_jax import config, engine, model
from dsv2_jax.completion import complete
from dsv2_jax.engine import Engine
from dsv2_jax.sampling import Sampling
from dsv2_jax.steps import compilations
from sharding.mesh import make_mesh

TINY = dataclasses.replace(config.tiny(), num_hidden_layers=2, vocab_size=512, max_position_embeddings=1024)
LENGTHS = (1, 20, 64, 100, 150, 250, 600)
WARM_UP = 200  # random requests, after those of every shape
GROWTH = 0.05  # of memory, at most


class Traffic:
    """Requests of random lengths and options, few different tokens in them, so that beginnings are shared; some are aborted."""

    def __init__(self, engine: Engine):
        self.engine, self.chance = engine, random.Random(0)
        self.sent, self.tokens = [], 0

    def request(self) -> None:
        chance, vocab = self.chance, self.engine.cfg.vocab_size
        mixed = len(self.sent) // 50 % 2  # in turns: all greedy, and anything
        prompt = [chance.randrange(3)] * chance.choice(LENGTHS) + [chance.randrange(vocab)]
        sampling = Sampling(
            max_new_tokens=chance.randrange(1, 120),
            temperature=mixed * chance.choice((0.0, 1.0)),
            top_p=chance.choice((1.0, 0.9)),
            frequency_penalty=mixed * chance.choice((0.0, 0.0, 0.0, 1.0)),
            n=chance.choice((1, 1, 2)),
            seed=chance.randrange(100),
        )
        self.sent.append(self.engine.add_request(prompt, sampling))

    def step(self) -> None:
        if self.chance.random() < 0.5 and len(self.engine._waiting) < 20:
            self.request()
        if self.sent and self.chance.random() < 0.02:
            self.engine.abort(self.chance.choice(self.sent[-20:]))
        self.tokens += len(self.engine.step())


def every_shape(one: Engine) -> None:
    """Each kind of sampling with each length of prompt, found in the cache and not, alone and in a full batch."""
    for token, kind in enumerate((Sampling(), Sampling(temperature=1.0), Sampling(frequency_penalty=1.0)), start=3):
        few, many = (dataclasses.replace(kind, max_new_tokens=new) for new in (2, 60))
        for length in LENGTHS:
            for _ in range(2):
                complete(one, [([length % 256] + [token] * length, few)])
        complete(one, [([token, n], many) for n in range(16)])


def memory() -> int:
    """Bytes in use: of the first device, or of this process where devices do not say."""
    stats = jax.devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(minutes: float, layers: int | None) -> None:
    if layers:
        cfg, dtype, pages = dataclasses.replace(config.v2_lite(), num_hidden_layers=layers), jnp.bfloat16, 100
    else:
        cfg, dtype, pages = TINY, jnp.float32, 24
    engine.PREFILL, engine.EXTEND = 256, 64  # fewer programs to compile
    one = Engine(model.init(cfg, 0, dtype), cache_tokens=pages * 64, max_batch=16)
    every_shape(one)
    traffic = Traffic(one)
    while len(traffic.sent) < WARM_UP:
        traffic.step()
    programs, before, start = compilations(), memory(), time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        traffic.step()
    while one.busy:
        one.step()
    new, grown = compilations() - programs, memory() / before - 1
    print(
        f"{len(traffic.sent)} requests, {traffic.tokens} tokens, {one.counters.reused_tokens} of prompts found in the cache,"
        f" {one.counters.preemptions} preemptions; {new} programs compiled beside {programs}, memory {grown:+.1%};"
        f" {one.free_pages} of {pages} pages free"
    )
    assert not new and one.free_pages == pages and grown < GROWTH


if __name__ == "__main__":
    with jax.set_mesh(make_mesh()):
        main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
