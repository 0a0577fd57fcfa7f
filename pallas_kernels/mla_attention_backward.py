"""Attention of training, backward, on Hopper in Pallas Mosaic GPU; see mla_attention.py.

Two kernels in turn, each output one program's alone and summed in a fixed order: the same operands give the same bits. The
first computes dK and dV, and leaves dS^T in bfloat16, its own operand, for the second, which multiplies it with the keys. So
scores and their gradients are computed once: 5 matmuls, where a second kernel that computes them again makes it 7, and adding
dQ up in float32 with atomics, from all key blocks, moves three times the bytes in no fixed order. dS takes half of
2 B N T^2 bytes; it exists for some heads at a time.

On an H200, forward and backward in turn with torch SDPA on cuDNN (random gradients, medians of 5 pairs of 0.15 s): 1.18x at
2 x 4096 tokens and 128 heads (1.11 to 1.21), 1.18x at 4 x 4096 and 16 (1.12 to 1.20), 1.11x at 16384 and 64 (1.07 to 1.14).
At the first of these dK and dV take 5.3 ms (522 TFLOP/s), dQ 1.6 ms (525 TFLOP/s, dS read at 2.7 TB/s). Power binds: in such
bursts the card draws its 700 W and the clock falls from 1.98 GHz to 1.6, in dQ's kernel to 1.3.

Letters: see reference.py; S the length in whole blocks, K blocks of 128 keys or queries, X heads of a chunk, P groups of heads,
R tiles (with X) or the rope dimension.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import vary_like
from pallas_kernels.mla_attention_dkv import dkv, tiles
from pallas_kernels.mla_attention_dq import dq
from pallas_kernels.mla_attention_forward import BLOCK, HALF

ROOM = 2_250_000_000  # bytes of dS at a time, or those of one head: 128 heads at 4096 tokens, 8 at 16384
GROUP = 4  # heads of a program at most


def backward(
    q_nope_BTNH,
    q_rope_BTNR,
    k_nope_BTNH,
    k_rope_BTR,
    v_BTNV,
    segment_ids_BT,
    out_BTNV,
    lse_BNS,
    dout_BTNV,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of `reference.mla_attention` in bfloat16 at head dimensions 128, 64 and 128.

    Args:
        segment_ids_BT: None where all positions are of one segment.
        out_BTNV: from `mla_attention_forward.forward`, as lse_BNS is.
        dout_BTNV: of a loss, with respect to `out_BTNV`.

    Returns:
        Gradients of the first five arguments.
    """
    batch, length, heads, _ = q_nope_BTNH.shape
    blocks = 2 * pl.cdiv(length, 2 * BLOCK)
    missing = blocks * BLOCK - length
    if missing:  # TMA reads rows beyond the end as zeros, and with these they add zero to dK and dV
        lse_BNS = jnp.pad(lse_BNS[:, :, :length], ((0, 0), (0, 0), (0, missing)))
    minus_delta_BNT = -jnp.einsum("btnv,btnv->bnt", out_BTNV.astype(jnp.float32), dout_BTNV.astype(jnp.float32))
    minus_delta_BNS = jnp.pad(minus_delta_BNT, ((0, 0), (0, 0), (0, missing)))
    operands = [q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, dout_BTNV]
    if length % 8 or length < BLOCK:  # TMA counts in 8 rows
        operands = [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in operands]
    if segment_ids_BT is None:
        ids, back_K = [], np.arange(1, blocks + 1, dtype=np.int32)
        ahead_B2K, back_BK = np.tile(back_K[::-1], (batch, 2, 1)), np.tile(back_K, (batch, 1))
    else:
        ids_BS = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, missing)), mode="edge")
        ids = [ids_BS]
        ahead_B2K, back_BK = _spans(ids_BS.reshape(batch, blocks, BLOCK))

    at_a_time = max(1, ROOM // (tiles(blocks) * BLOCK * HALF * 2))  # heads
    group = next(n for n in range(min(GROUP, at_a_time), 0, -1) if heads % n == 0)
    groups = batch * heads // group
    count = next(n for n in range(max(1, at_a_time // group), 0, -1) if groups % n == 0)

    def empty(shape, dtype=jnp.bfloat16):
        return jax.empty_ref(jax.ShapeDtypeStruct(shape, dtype))

    def whole(ref):  # inside shard_map, kernels take no references that vary over the mesh, though what they write there does
        return vary_like(q_nope_BTNH, jax.freeze(ref))[:, :length]

    dq_nope, dq_rope, dk_nope, _, dv, _ = (empty(x.shape) for x in operands)
    dk_rope_PSR = empty((groups, blocks * BLOCK, k_rope_BTR.shape[2]), jnp.float32)

    def chunk(index, _):
        index, gradients = index.reshape(1), (dk_nope, dv, dk_rope_PSR)
        ds_XRWKQ = dkv(index, count, ahead_B2K, operands, lse_BNS, minus_delta_BNS, ids, gradients, heads=group, scale=scale)
        dq(index, back_BK, ds_XRWKQ, *operands[2:4], (dq_nope, dq_rope), scale=scale)

    lax.fori_loop(jnp.int32(0), jnp.int32(groups // count), chunk, None)
    dk_rope_PTR = whole(dk_rope_PSR)
    dk_rope_BTR = dk_rope_PTR.reshape(batch, -1, *dk_rope_PTR.shape[1:]).sum(axis=1).astype(jnp.bfloat16)
    return whole(dq_nope), whole(dq_rope), whole(dk_nope), dk_rope_BTR, whole(dv)


def _spans(ids_BKS) -> tuple[jax.Array, jax.Array]:
    """Which blocks of queries and keys meet, as far as their least and largest ids tell, whatever the order of ids.

    Returns:
        For each block of keys the number of blocks of queries, from the diagonal ahead, to the last that meets it or an earlier
        block of keys, and how many, up to the first of another id, are all of its own one; for each block of queries the number
        of blocks of keys, from the diagonal back, whose queries these are.
    """
    blocks = ids_BKS.shape[1]
    least_BK, most_BK = ids_BKS.min(axis=2), ids_BKS.max(axis=2)
    block_K = jnp.arange(blocks, dtype=jnp.int32)
    meet_BKQ = (least_BK[:, :, None] <= most_BK[:, None]) & (most_BK[:, :, None] >= least_BK[:, None])
    end_BK = lax.cummax(jnp.where(meet_BKQ, block_K + 1, 0).max(axis=2), axis=1)
    equal_BKQ = (least_BK[:, :, None] == most_BK[:, None]) & (most_BK[:, :, None] == least_BK[:, None])
    clear_BK = jnp.where(~equal_BKQ & (block_K >= block_K[:, None]), block_K, blocks).min(axis=2)
    start_BK = (end_BK[:, None] <= block_K[:, None]).sum(axis=2, dtype=jnp.int32)
    return jnp.stack([end_BK, clear_BK], axis=1) - block_K, block_K + 1 - start_BK
