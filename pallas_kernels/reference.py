"""What every kernel must compute, in plain jnp: slow, and obviously right.

Letters: B batch, T queries, S keys, N heads, H nope dim, R rope dim, V value dim, C latent dim, M rows, K and F matmul dims, E experts.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import latent_pages

MASKED = -1e30  # finite, so that a row without any visible key gives a mean and not NaN


def mla_attention(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, *, scale: float) -> jax.Array:
    """Causal attention of every position over its own segment, the rope key shared by all heads (paper eq. 17-18).

    Args:
        segment_ids_BT: any numbers, in any order; None: all positions are of one segment.

    Returns:
        [B, T, N, V] in the queries' dtype; scores, softmax and accumulation in float32.
    """
    scores_BNTS = jnp.einsum("btnh,bsnh->bnts", q_nope_BTNH, k_nope_BTNH, preferred_element_type=jnp.float32)
    scores_BNTS += jnp.einsum("btnr,bsr->bnts", q_rope_BTNR, k_rope_BTR, preferred_element_type=jnp.float32)
    index_T = jnp.arange(q_nope_BTNH.shape[1])
    visible_BTS = (index_T[:, None] >= index_T)[None]
    if segment_ids_BT is not None:
        visible_BTS &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    probs_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS * scale, MASKED), axis=-1)
    out_BTNV = jnp.einsum("bnts,bsnv->btnv", probs_BNTS.astype(v_BTNV.dtype), v_BTNV, preferred_element_type=jnp.float32)
    return out_BTNV.astype(q_nope_BTNH.dtype)


def latent_attention(q_latent_BTNC, q_rope_BTNR, c_kv_BSC, k_rope_BSR, positions_BT, *, scale: float) -> jax.Array:
    """Absorbed attention over a latent cache whose index is the position: query t sees keys 0 .. positions_BT[t] (paper 2.1.2).

    Returns:
        [B, T, N, C], the attended latents, in the queries' dtype; scores, softmax and accumulation in float32.
    """
    # Queries and heads stay together, rows of the one shared key: with N before T, XLA's CPU backend refuses bfloat16 at T = 1.
    scores_BTNS = jnp.einsum("btnc,bsc->btns", q_latent_BTNC, c_kv_BSC, preferred_element_type=jnp.float32)
    scores_BTNS += jnp.einsum("btnr,bsr->btns", q_rope_BTNR, k_rope_BSR, preferred_element_type=jnp.float32)
    visible_BTS = jnp.arange(c_kv_BSC.shape[1]) <= positions_BT[:, :, None]
    probs_BTNS = jax.nn.softmax(jnp.where(visible_BTS[:, :, None], scores_BTNS * scale, MASKED), axis=-1)
    out_BTNC = jnp.einsum("btns,bsc->btnc", probs_BTNS.astype(c_kv_BSC.dtype), c_kv_BSC, preferred_element_type=jnp.float32)
    return out_BTNC.astype(q_latent_BTNC.dtype)


def mla_decode(q_latent_BTNC, q_rope_BTNR, pages, table_BP, positions_BT, *, scale: float) -> jax.Array:
    """`latent_attention` over pages (see latent_pages.py) that a table lists for each request; zero where a position is -1."""
    keys = latent_pages.read(pages, table_BP, q_latent_BTNC.dtype)
    out_BTNC = latent_attention(q_latent_BTNC, q_rope_BTNR, *keys, positions_BT, scale=scale)
    return jnp.where(positions_BT[:, :, None, None] < 0, 0, out_BTNC)


def grouped_matmul(x_MK, w_EKF, group_sizes_E, row_unit: int) -> jax.Array:
    """Multiplies each row with its own group's matrix; a group begins at a multiple of `row_unit`.

    Group e's rows are x[start_e : start_e + group_sizes_E[e]], start_e being the sum of the earlier sizes, each rounded up to
    `row_unit`. The rows that pad a group must be zero and come out as zero. Rows of no group, behind the last one, come out as
    zero here; implementations need not write them, and read nothing in them, in the backward pass either.

    Returns:
        [M, F] in x's dtype; accumulation in float32.
    """
    padded_E = -(-group_sizes_E // row_unit) * row_unit
    start_E = jnp.cumsum(padded_E) - padded_E
    row_M = jnp.arange(x_MK.shape[0])
    out_MF = jnp.zeros((x_MK.shape[0], w_EKF.shape[2]), jnp.float32)
    for start, size, w_KF in zip(start_E, group_sizes_E, w_EKF):
        mine_M1 = ((row_M >= start) & (row_M < start + size))[:, None]
        out_MF += jnp.dot(jnp.where(mine_M1, x_MK, 0), w_KF, preferred_element_type=jnp.float32)
    return out_MF.astype(x_MK.dtype)


def grouped_matmul_fp8(x, w, group_sizes_E, row_unit: int) -> jax.Array:
    """`grouped_matmul` of the numbers that 8-bit rows and weights stand for (DeepSeek-V3, section 3.3.2).

    Args:
        x: values [M, K], and a scale for each 128 columns of a row, [K / 128, M].
        w: values [E, F, K], and a scale for each block of 128 x 128, [E, F / 128, K / 128].

    Returns:
        [M, F] in float32.
    """
    x_MK = x.values_MK.astype(jnp.float32) * jnp.repeat(x.scales_GM, 128, axis=0).T
    w_EFK = w.values_EFK.astype(jnp.float32) * jnp.repeat(jnp.repeat(w.scales_EHG, 128, axis=1), 128, axis=2)
    return grouped_matmul(x_MK, w_EFK.swapaxes(1, 2), group_sizes_E, row_unit)


def grouped_mlp(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, row_unit: int) -> jax.Array:
    """(weight * silu(x @ w_gate) * (x @ w_up)) @ w_down, each row with its own group's matrices, see `grouped_matmul`.

    Args:
        x_MD: or up to row_unit rows, which every group has.
        weight_M: float32 factors, zero where a row pads a group.

    Returns:
        [M, D] in x's dtype; the hidden values are computed in float32 and rounded to it once.
    """
    if len(x_MD) < len(weight_M):
        x_MD = jnp.tile(jnp.pad(x_MD, ((0, row_unit - len(x_MD)), (0, 0))), (len(weight_M) // row_unit, 1))
    gate_MF, up_MF = (grouped_matmul(x_MD, w, group_sizes_E, row_unit).astype(jnp.float32) for w in (w_gate_EDF, w_up_EDF))
    hidden_MF = weight_M[:, None] * jax.nn.silu(gate_MF) * up_MF
    return grouped_matmul(hidden_MF.astype(x_MD.dtype), w_down_EFD, group_sizes_E, row_unit)
