"""The latent cache: what attention keeps of the past, 512 + 64 values a token and layer, never expanded keys or values.

Each device has a pool of pages of its own, for the requests whose tokens it computes. A page stands for 64 tokens in all layers:
layer l keeps page p's in row l * N + p of the pool, so that the pool is one array, which every layer updates in place.
Letters: L layers, N pages of a device, B requests, T new tokens, P pages of a request, H heads, C latent dim, R rope dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv2_jax.config import ModelConfig
from dsv2_jax.context import Context
from dsv2_jax.fields import InputError
from pallas_kernels import latent_pages
from pallas_kernels.decode_schedule import Schedule, make_schedule
from pallas_kernels.latent_pages import PAGE, LatentPages
from pallas_kernels.mla_decode import mla_decode
from sharding import specs

FORMATS = {"float32": "f32", "bfloat16": "bf16", "fp8": "fp8", "int6": "int6"}  # `--cache_dtype` and the kernels' names

HOST = 1 << 29  # bytes of a cache where the device does not say how much memory it has: a CPU


class Cache(NamedTuple):
    """The pages, and what a step does with them. Page ids count within a device and are the same in all layers."""

    pages: LatentPages  # [devices * L * N, 64, X]
    slots_BT: jax.Array  # int32, 64 * page + row: where each token is stored; -1: nowhere, as it only fills up the batch
    table_BP: jax.Array | None  # int32: the pages each request attends over; None: the step's tokens attend to each other alone


def empty(cfg: ModelConfig, num_pages: int, dtype: str) -> LatentPages:
    """Pages of zeros, `num_pages` on each device of the current mesh, in a format of FORMATS."""

    def pool() -> LatentPages:
        return latent_pages.empty(cfg.num_hidden_layers * num_pages, FORMATS[dtype], cfg.kv_lora_rank, cfg.qk_rope_head_dim)

    return jax.jit(jax.shard_map(pool, out_specs=specs.per_request_B))()


def bytes_per_token(cfg: ModelConfig, dtype: str) -> int:
    """Bytes that a token takes in all layers.

    Raises: InputError, where the format does not fit the model's latent dim.
    """
    try:
        page = jax.eval_shape(lambda: latent_pages.empty(1, FORMATS[dtype], cfg.kv_lora_rank, cfg.qk_rope_head_dim))
    except ValueError as error:
        raise InputError(f"cache_dtype {dtype}: {error}") from None
    return cfg.num_hidden_layers * sum(x.size * x.dtype.itemsize for x in page if x is not None) // PAGE


def tokens_that_fit(cfg: ModelConfig, dtype: str, max_batch: int) -> int:
    """For how many tokens a device's free memory has room, less what programs need; never more than `max_batch` full contexts."""
    stats = jax.devices()[0].memory_stats()
    room = HOST if not stats else int(0.92 * stats["bytes_limit"]) - stats["bytes_in_use"]
    return min(max(room, 0) // bytes_per_token(cfg, dtype), max_batch * cfg.max_position_embeddings)


def schedule(positions_BT: jax.Array, num_heads: int) -> Schedule:
    """How the kernel splits attention over pages, the same in all layers."""
    split = jax.shard_map(lambda positions_BT: make_schedule(positions_BT, num_heads), out_specs=specs.per_request_B)
    return split(positions_BT)


def write(
    pages: LatentPages, c_kv_BTC: jax.Array, k_rope_BTR: jax.Array, ctx: Context, layer: jax.Array, layers: int
) -> LatentPages:
    """Stores a layer's latents and rope keys in the slots of their tokens."""

    def island(pages, c_kv_BTC, k_rope_BTR, slots_BT, layer):
        first = layer * (len(pages.latent) // layers)
        return latent_pages.write(pages, jnp.where(slots_BT < 0, -1, slots_BT + first * PAGE), c_kv_BTC, k_rope_BTR)

    store = jax.shard_map(island, out_specs=specs.per_request_B)
    return store(pages, c_kv_BTC, k_rope_BTR, ctx.slots_BT, layer)


def attend(
    q_latent_BTHC: jax.Array,
    q_rope_BTHR: jax.Array,
    pages: LatentPages,
    ctx: Context,
    layer: jax.Array,
    layers: int,
    scale: float,
) -> jax.Array:
    """Absorbed attention of each token over a layer's pages of its request, up to its own position: [B, T, H, C]."""

    def island(q_latent_BTHC, q_rope_BTHR, pages, table_BP, positions_BT, schedule, layer):
        table_BP = table_BP + layer * (len(pages.latent) // layers)
        return mla_decode(q_latent_BTHC, q_rope_BTHR, pages, table_BP, positions_BT, scale=scale, schedule=schedule)

    # Kernels know no mesh: each device attends over its own pages.
    over_pages = jax.shard_map(island, out_specs=specs.heads_BTNV, check_vma=False)
    return over_pages(q_latent_BTHC, q_rope_BTHR, pages, ctx.table_BP, ctx.positions_BT, ctx.schedule, layer)
