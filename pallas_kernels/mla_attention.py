"""Latent attention of training and prefill, exact, in memory that grows with the length and not with its square.

On Hopper, kernels: `mla_attention_forward.py` and `mla_attention_backward.py`. Elsewhere, what XLA makes of chunks of queries: a
chunk sees only the keys up to its own end, so about half of the score matrix is never computed, and the backward pass recomputes
a chunk's scores instead of keeping them. cuDNN's attention is there to compare with. Letters: see reference.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import mla_attention_backward, mla_attention_forward
from pallas_kernels.dispatch import choose
from pallas_kernels.einsum import PRODUCT, einsum_float32
from pallas_kernels.reference import MASKED

CHUNK = 512  # queries; beyond 16 chunks they grow instead, to bound the size of the program


def mla_attention(
    q_nope_BTNH,
    q_rope_BTNR,
    k_nope_BTNH,
    k_rope_BTR,
    v_BTNV,
    segment_ids_BT,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """See `reference.mla_attention`: same arguments, same result, differentiable.

    With "pallas", results and gradients are the same bits in every run. "cudnn" copies the rope key for every head and pads the
    values to the keys' width, as cuDNN wants them in JAX; its gradients need not repeat.

    Args:
        implementation: None, "xla", "pallas" or "cudnn"; None: "pallas" where it can run, else "xla".
    """
    operands = q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV
    attend = {"xla": _xla, "pallas": _pallas, "cudnn": _cudnn}[choose(implementation, unsupported(*operands, scale), ("cudnn",))]
    return attend(*operands, segment_ids_BT, scale)


def unsupported(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, scale: float) -> str | None:
    """Why the kernels do not take these operands; None where they do."""
    operands = q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV
    dims = q_nope_BTNH.shape[3], q_rope_BTNR.shape[3], v_BTNV.shape[3]
    wanted = mla_attention_forward.NOPE, mla_attention_forward.ROPE, mla_attention_forward.VALUE
    if dims != wanted:
        return f"the nope, rope and value dimensions are {dims}, expected {wanted}"
    if dtypes := {str(x.dtype) for x in operands} - {"bfloat16"}:
        return f"an operand is {min(dtypes)}, expected bfloat16"
    if not q_nope_BTNH.size:
        return f"there are no queries: their shape is {q_nope_BTNH.shape}"
    if scale <= 0:
        return f"scale is {scale}, expected it above 0"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _pallas(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, scale) -> jax.Array:
    operands = q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV
    return mla_attention_forward.forward(*operands, segment_ids_BT, scale=scale)[0]


def _pallas_forward(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, scale):
    saved = q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT
    out_BTNV, lse_BNS = (checkpoint_name(x, PRODUCT) for x in mla_attention_forward.forward(*saved, scale=scale))
    return out_BTNV, (*saved, out_BTNV, lse_BNS)


def _pallas_backward(scale, saved, dout_BTNV):
    return *mla_attention_backward.backward(*saved, dout_BTNV, scale=scale), None


_pallas.defvjp(_pallas_forward, _pallas_backward)


def _cudnn(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, scale) -> jax.Array:
    heads, value = v_BTNV.shape[2:]
    k_rope_BTNR = jnp.repeat(k_rope_BTR[:, :, None], heads, axis=2)
    q_BTNX = jnp.concatenate([q_nope_BTNH, q_rope_BTNR], axis=3)
    k_BTNX = jnp.concatenate([k_nope_BTNH, k_rope_BTNR], axis=3)
    v_BTNX = jnp.pad(v_BTNV, ((0, 0), (0, 0), (0, 0), (0, q_BTNX.shape[3] - value)))
    same_B1TS = None if segment_ids_BT is None else (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    out_BTNX = jax.nn.dot_product_attention(
        q_BTNX, k_BTNX, v_BTNX, mask=same_B1TS, scale=scale, is_causal=True, implementation="cudnn"
    )
    return out_BTNX[..., :value]


def _xla(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, scale) -> jax.Array:
    length = q_nope_BTNH.shape[1]
    chunk = max(CHUNK, -(-length // 16))
    if segment_ids_BT is None:
        segment_ids_BT = jnp.zeros_like(k_rope_BTR[..., 0], dtype=jnp.int32)
    outs = []
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        outs.append(
            _attend(
                q_nope_BTNH[:, start:end],
                q_rope_BTNR[:, start:end],
                k_nope_BTNH[:, :end],
                k_rope_BTR[:, :end],
                v_BTNV[:, :end],
                segment_ids_BT[:, start:end],
                segment_ids_BT[:, :end],
                scale,
            )
        )
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


@jax.checkpoint
def _attend(q_nope_BTNH, q_rope_BTNR, k_nope_BSNH, k_rope_BSR, v_BSNV, q_segment_BT, k_segment_BS, scale) -> jax.Array:
    """Attention of the last T of S positions over all S of them."""
    scores_BNTS = einsum_float32("btnh,bsnh->bnts", q_nope_BTNH, k_nope_BSNH)
    scores_BNTS += einsum_float32("btnr,bsr->bnts", q_rope_BTNR, k_rope_BSR)
    queries, keys = scores_BNTS.shape[2:]
    causal_TS = jnp.arange(keys - queries, keys)[:, None] >= jnp.arange(keys)
    visible_BTS = causal_TS & (q_segment_BT[:, :, None] == k_segment_BS[:, None, :])
    probs_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], scores_BNTS * scale, MASKED), axis=-1)
    out_BTNV = einsum_float32("bnts,bsnv->btnv", probs_BNTS.astype(v_BSNV.dtype), v_BSNV)
    return out_BTNV.astype(q_nope_BTNH.dtype)
