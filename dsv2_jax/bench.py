"""What prefill and decode cost: medians of timed steps at given batch and lengths."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from dsv2_jax import cache as latent_cache
from dsv2_jax import generate
from dsv2_jax.fields import InputError
from dsv2_jax.model import Decoder

REPEATS = 7


def bench(model: Decoder, batches: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> None:
    """Prints a table with a row for each batch of prompts (lists of token ids).

    The decode step is timed at the middle of the answer, greedy. "experts" is the number of distinct experts a layer reads in
    that step, the mean over layers: a router that sends all tokens to the same few experts flatters every figure.
    """
    for prompts in batches:
        if (longest := max(map(len, prompts))) + new_tokens > model.cfg.max_position_embeddings:
            limit = model.cfg.max_position_embeddings
            raise InputError(f"max_new_tokens is {new_tokens}, expected at most {limit - longest} after a prompt of {longest}")
    table = Table(
        "batch", "prompt", "prefill ms", "prompt tok/s", "decode ms/step", "new tok/s", "experts/layer", "cache B/token"
    )
    for prompts in batches:
        table.add_row(*_row(model, prompts, new_tokens))
    device = jax.devices()[0].device_kind
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{device}, {model.embed.dtype}, medians of {REPEATS}, implementation: xla")
    console.print(table)


def _row(model: Decoder, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    longest = max(map(len, prompts))
    rows, length = generate.bucket(len(prompts), least=1), generate.bucket(longest)
    lengths_B = np.array([len(p) for p in prompts] + [1] * (rows - len(prompts)), np.int32)
    tokens_BT = np.zeros((rows, length), np.int32)
    for row, prompt in zip(tokens_BT, prompts):
        row[: len(prompt)] = prompt
    cache = latent_cache.empty(model.cfg, rows, generate.bucket(longest + new_tokens, least=length), model.embed.dtype)
    tokens_BT, lengths_B, at_B = map(generate.place, (tokens_BT, lengths_B, lengths_B + new_tokens // 2))
    state = [None, cache]

    def prefill() -> None:
        state[0], _, state[1] = jax.block_until_ready(generate.prefill(model, tokens_BT, lengths_B, state[1], None))

    def decode() -> None:
        state[0], _, state[1] = jax.block_until_ready(generate.decode(model, state[0], at_B, state[1], None))

    prefill_s, decode_s = _median(prefill), _median(decode)
    return [
        str(len(prompts)),
        str(longest),
        f"{prefill_s * 1e3:.2f}",
        f"{sum(map(len, prompts)) / prefill_s:,.0f}",
        f"{decode_s * 1e3:.2f}",
        f"{len(prompts) / decode_s:,.1f}",
        _distinct_experts(model, state[0], at_B, state[1]),
        str(model.cfg.kv_elements_per_token * model.embed.dtype.itemsize),
    ]


def _median(step: Callable[[], None]) -> float:
    step()  # compiles
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _distinct_experts(model: Decoder, tokens_B, positions_B, cache) -> str:
    if not model.cfg.stack_size("moe"):
        return "none"

    @jax.jit
    def chosen(model, tokens_B, positions_B, cache):
        stats = model(tokens_B[:, None], positions_B[:, None], jnp.ones_like(tokens_B)[:, None], cache, absorbed=True)[2]
        return stats["experts"]

    experts_LX = np.asarray(chosen(model, tokens_B, positions_B, cache)).reshape(model.cfg.stack_size("moe"), -1)
    return f"{np.mean([len(set(layer)) for layer in experts_LX]):.1f} of {model.cfg.n_routed_experts}"
