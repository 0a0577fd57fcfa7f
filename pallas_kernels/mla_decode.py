"""Absorbed decode: attention of a few query tokens of each request over its pages of the latent cache.

One latent serves all heads as key and value, so 128 heads do 242 multiply-adds for each byte read and 16 heads 30: the first is
bound by the tensor cores of an H200, the second by its memory. Letters: B requests, T query tokens of each, N heads, C latent
dim, R rope dim, P pages of a request, M rows (T * N, padded to tiles of 64).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import mla_decode_hopper, mla_decode_narrow, mla_decode_quantised, reference
from pallas_kernels.decode_schedule import ROWS, Schedule, make_schedule
from pallas_kernels.dispatch import choose
from pallas_kernels.latent_pages import LatentPages

FORMATS = ("bf16", "fp8", "int6")
UNIT = 16  # rows to which a request of less than a tile is padded


def mla_decode(
    q_latent_BTNC: jax.Array,
    q_rope_BTNR: jax.Array,
    pages: LatentPages,
    table_BP: jax.Array,
    positions_BT: jax.Array,
    *,
    scale: float,
    schedule: Schedule | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The latents that each head attends to: query t of request b sees tokens 0 .. positions_BT[b, t] (paper 2.1.2).

    Args:
        pages: page 0, and what lies behind a request's last token in its last page, must be finite: read with weight zero.
        table_BP: the pages of each request, int32; entries past its last token are not used.
        positions_BT: int32; -1 for a query that sees nothing, whose output is zero.
        scale: of the scores.
        schedule: `make_schedule(positions_BT, N)`, where many layers share it.
        implementation: None, "xla" or "pallas".

    Returns:
        [B, T, N, C] in the queries' dtype; scores, softmax and accumulation in float32.

    Inside `jax.shard_map` the kernels need `check_vma=False` (Pallas: no loops of single warps over varying arrays).

    Raises: ValueError, for an unknown implementation, and for "pallas" where it cannot run.
    """
    if choose(implementation, _unsupported(q_latent_BTNC, q_rope_BTNR, pages)) == "xla":
        return reference.mla_decode(q_latent_BTNC, q_rope_BTNR, pages, table_BP, positions_BT, scale=scale)
    tokens, num_heads = q_latent_BTNC.shape[1:3]
    rows = tokens * num_heads
    if schedule is None:
        schedule = make_schedule(positions_BT, num_heads)
    if pages.format != "bf16":
        decode = mla_decode_quantised.decode
    else:
        decode = mla_decode_narrow.decode if rows < ROWS else mla_decode_hopper.decode
    q_latent_BMC, q_rope_BMR = _rows(q_latent_BTNC), _rows(q_rope_BTNR)
    out_BMC = decode(q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP, schedule, scale=scale, num_heads=num_heads)
    return out_BMC[:, :rows].reshape(q_latent_BTNC.shape)


def _rows(q_BTNX: jax.Array) -> jax.Array:
    """The heads of all query tokens of a request, padded to whole tiles or, where they do not fill one, to units."""
    batch, tokens, num_heads, dim = q_BTNX.shape
    rows = tokens * num_heads
    unit = UNIT if rows < ROWS else ROWS
    return jnp.pad(q_BTNX.reshape(batch, rows, dim), ((0, 0), (0, -rows % unit), (0, 0)))


def _unsupported(q_latent_BTNC, q_rope_BTNR, pages: LatentPages) -> str | None:
    dims = q_latent_BTNC.shape[-1], q_rope_BTNR.shape[-1]
    if dims != (512, 64):
        return f"latent and rope dims are {dims}, expected (512, 64)"
    if pages.format not in FORMATS:
        return f"the pages are {pages.format}, expected one of {', '.join(FORMATS)}"
    if not q_latent_BTNC.dtype == q_rope_BTNR.dtype == jnp.bfloat16:
        return f"the queries are {q_latent_BTNC.dtype} and {q_rope_BTNR.dtype}, expected bfloat16"
    return None
