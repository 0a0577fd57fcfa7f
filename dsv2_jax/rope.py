"""Decoupled rotary embedding with YaRN (paper section 2.1.3 and 3.1.4).

The two mscales do different things, and mixing them up is the commonest error in ports of this model:
  mscale / mscale_all_dim   scale cos and sin by the ratio m(mscale) / m(mscale_all_dim), which is 1 when they are equal;
  mscale_all_dim            scales every attention logit by m(mscale_all_dim)^2 (1.59 for V2), in `softmax_scale`.
Pairs are interleaved as in the checkpoints: dimensions (2j, 2j+1) turn together. Letters: B batch, T positions, R rope dim, J = R/2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax.config import ModelConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(mscale) = 0.1 mscale ln(factor) + 1, and 1 where the context is not extended."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(cfg: ModelConfig) -> float:
    """The factor of the attention logits: (d_h + d_h^R)^-1/2 m(mscale_all_dim)^2; also in the absorbed form."""
    scale = cfg.qk_head_dim**-0.5
    if cfg.rope_scaling and cfg.rope_scaling.mscale_all_dim:
        scale *= yarn_mscale(cfg.rope_scaling.factor, cfg.rope_scaling.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(cfg: ModelConfig) -> np.ndarray:
    """Rotation per position of each pair, float32 [J]: plain for fast pairs, divided by the factor for slow ones, a ramp between."""
    dim, yarn = cfg.qk_rope_head_dim, cfg.rope_scaling
    # float32 from the start, as the reference computes them: at position 100,000 the last bit is visible.
    plain_J = 1.0 / np.float32(cfg.rope_theta) ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    if yarn is None:
        return plain_J

    def turns_at(rotations: float) -> float:
        """The pair that makes `rotations` turns over the original window, as a real number."""
        window = yarn.original_max_position_embeddings
        return dim * math.log(window / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(turns_at(yarn.beta_fast)), 0)
    high = min(math.ceil(turns_at(yarn.beta_slow)), dim - 1)
    ramp_J = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001), 0, 1)
    return (plain_J / np.float32(yarn.factor) * ramp_J + plain_J * (1 - ramp_J)).astype(np.float32)


def cos_sin(cfg: ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every pair's angle, float32 [B, T, J], with the ratio of the mscales."""
    angles_BTJ = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    yarn, ratio = cfg.rope_scaling, 1.0
    if yarn:
        ratio = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles_BTJ) * ratio, jnp.sin(angles_BTJ) * ratio


def rotate(x_BTxR: jax.Array, cos_BTJ: jax.Array, sin_BTJ: jax.Array) -> jax.Array:
    """Turns the interleaved pairs of [B, T, R] or [B, T, N, R]; computed in float32, returned in x's dtype."""
    pairs = x_BTxR.astype(jnp.float32).reshape(*x_BTxR.shape[:-1], -1, 2)
    if x_BTxR.ndim == 4:
        cos_BTJ, sin_BTJ = cos_BTJ[:, :, None], sin_BTJ[:, :, None]
    real, imag = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([real * cos_BTJ - imag * sin_BTJ, real * sin_BTJ + imag * cos_BTJ], axis=-1)
    return turned.reshape(x_BTxR.shape).astype(x_BTxR.dtype)
