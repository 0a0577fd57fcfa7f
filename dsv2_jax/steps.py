"""The programs that an engine sends to the devices: prefill and decode, and the choice of the next tokens after either.

The choice is a program of its own, so that other ways to sample compile in seconds. Pages, the last token of each request, and
histories stay on the devices; a program takes them, and gives them back changed in place. Letters: B rows of all devices, T positions,
P pages of a row, R answers a program samples, S seats of all devices, V vocabulary, L MoE layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.cache import Cache
from dsv2_jax.model import Decoder, head_logits
from dsv2_jax.sampling import History, Sampled, SamplingArrays, sample
from pallas_kernels.latent_pages import PAGE, LatentPages
from sharding import specs

OPTIONS = {
    # Products by cuBLAS alone: V2-Lite's decode step compiles in 12 to 15 s, and with Triton's candidates timed against it in 80, to
    # run as fast. Products of the same rows are not made one, for which the weights would be copied side by side.
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
    # Weights and pages that fill the memory make the compiler compute things twice, for room that no step of inference needs.
    "xla_disable_hlo_passes": "rematerialization",
}
DECODE_OPTIONS = OPTIONS | {
    # What does not depend on each other runs at the same time, as shared experts and the ordering of rows for the routed ones: a decode
    # step has many small kernels (V2-Lite on an H200: 12% less time at 1 request, and 18% at 256 with 8-bit weights). Collectives are in no graph.
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}


ROOMS = 16  # for results that the host has not read, or that the next program is still to read


class Batch(NamedTuple):
    """The tokens of a prefill. Seats and places count within a device."""

    tokens_BT: Any
    positions_BT: Any
    segments_BT: Any
    slots_BT: Any
    table_BP: Any  # None: from the prompts' beginning
    last_R: Any  # where among a device's B * T tokens the last one of a prompt stands
    seat_R: Any  # of its request; -1: no token is to be sampled


class Last(NamedTuple):
    """What the next tokens follow from. Seats count within a device."""

    hidden_RD: Any  # of the last tokens so far
    positions_R: Any  # of the next ones
    seat_R: Any  # of their requests; -1: no token is to be sampled


def _local(function: Callable, *args):
    """The function on each device's own rows."""
    return jax.shard_map(function, out_specs=specs.per_request_B)(*args)


@functools.partial(jax.jit, donate_argnames="pages", compiler_options=OPTIONS)
def prefill(model: Decoder, pages: LatentPages, batch: Batch) -> tuple[LatentPages, Last]:
    """Stores prompts or parts of them; the first new token of those that are complete is to be sampled."""

    def last(x_BTD, positions_BT, last_R):
        return x_BTD.reshape(-1, x_BTD.shape[2])[last_R], positions_BT.reshape(-1)[last_R] + 1

    hidden_BTD, pages, _ = model(
        batch.tokens_BT, batch.positions_BT, batch.segments_BT, Cache(pages, batch.slots_BT, batch.table_BP)
    )
    return pages, Last(*_local(last, hidden_BTD, batch.positions_BT, batch.last_R), batch.seat_R)


@functools.partial(jax.jit, donate_argnames="pages", compiler_options=DECODE_OPTIONS)
def decode(model: Decoder, pages: LatentPages, tokens_S: jax.Array, rows_BX: Any) -> tuple[LatentPages, Last, jax.Array | None]:
    """One more token of every request: rows are its seat, the position of its last token (-1: none), and its pages.

    Rows for one device may come from the host as they are: to put them there first takes several times as long.
    Also returns how many experts of each MoE layer the tokens use.
    """

    def unpack(rows_BX, tokens_S):
        seat_B, positions_B, table_BP = rows_BX[:, 0], rows_BX[:, 1], rows_BX[:, 2:]
        page_B = jnp.take_along_axis(table_BP, jnp.maximum(positions_B, 0)[:, None] // PAGE, axis=1)[:, 0]
        slots_B = jnp.where(positions_B < 0, -1, page_B * PAGE + positions_B % PAGE)
        tokens_B = tokens_S[jnp.maximum(seat_B, 0)]
        return seat_B, positions_B, tokens_B[:, None], positions_B[:, None], slots_B[:, None], table_BP

    rows_BX = jax.reshard(rows_BX, specs.per_request_B)
    seat_B, positions_B, tokens_BT, positions_BT, slots_BT, table_BP = _local(unpack, rows_BX, tokens_S)
    cache = Cache(pages, slots_BT, table_BP)
    hidden_B1D, pages, stats = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT), cache, unroll=True)
    used_L = (stats["load"] > 0).sum(axis=1) if stats else None
    return pages, Last(hidden_B1D[:, 0], positions_B + 1, seat_B), used_L


@functools.partial(jax.jit, donate_argnames=("tokens_S", "history"), static_argnames="top", compiler_options=OPTIONS)
def next_tokens(
    w_head_DV: jax.Array, tokens_S: jax.Array, history: History | None, last: Last, how: SamplingArrays | None, top: int
) -> tuple[jax.Array, History | None, Sampled]:
    """Samples; each token becomes its seat's last one, and is counted in the history [S, V], if there is one.

    Args:
        history: given where a request has penalties or biases.
        how, top: see `sampling.sample`.
    """

    def rows(history, seat_R):
        return jax.tree.map(lambda x_SV: x_SV[jnp.maximum(seat_R, 0)], history)

    def put(old_S, seat_R, new_R):
        return old_S.at[jnp.where(seat_R < 0, len(old_S), seat_R)].set(new_R, mode="drop")

    def count(count_SV, seat_R, tokens_R):
        return count_SV.at[jnp.where(seat_R < 0, len(count_SV), seat_R), tokens_R].add(1, mode="drop")

    own = None if history is None else _local(rows, history, last.seat_R)
    sampled = sample(head_logits(last.hidden_RD, w_head_DV), last.positions_R, how, own, top)
    tokens_S = _local(put, tokens_S, last.seat_R, sampled.tokens_B)
    if history is not None:
        history = history._replace(count_BV=_local(count, history.count_BV, last.seat_R, sampled.tokens_B))
    return tokens_S, history, sampled


@functools.partial(jax.jit, donate_argnames="history")
def begin_history(history: History, seat_D: jax.Array, new: History) -> History:
    """The history with that of a new answer, on the device where its seat is not -1."""

    def put(old_SV, seat_D, new_1V):
        return old_SV.at[jnp.where(seat_D < 0, len(old_SV), seat_D)].set(new_1V, mode="drop")

    return jax.tree.map(lambda old_SV, new_1V: _local(put, old_SV, seat_D, new_1V), history, new)


def fences(model: Decoder, rows: int, pages: int) -> list[jax.Array]:
    """Arrays to be held as long as steps of so many rows and pages a row are run: between them is room, ROOMS times, for what goes in or out.

    Else these may take the room of a program's temporaries while the next program is sent, whose own then lie elsewhere; all addresses in
    the CUDA graph of a decode step have changed, hundreds of kernels', and the host is busy with them for longer than the GPU is with the
    step: V2-Lite, one request on an H200 beside a slow host, 6.3 ms, and 2.5 with fences.
    """
    if not jax.devices()[0].memory_stats():  # a CPU
        return []
    largest = np.zeros(rows * max(4 * (2 + pages), model.embed.dtype.itemsize * model.cfg.hidden_size), np.uint8)
    whole = jax.NamedSharding(jax.sharding.get_mesh(), specs.replicated)
    blocks = [jax.device_put(largest, whole) for _ in range(2 * ROOMS)]
    return jax.block_until_ready(blocks)[::2]


def compilations() -> int:
    """Programs that have been compiled, or read from the compilation cache, for steps of any engine."""
    return sum(program._cache_size() for program in (prefill, decode, next_tokens, begin_history))
