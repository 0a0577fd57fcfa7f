"""Multi-head Latent Attention (paper section 2.1, eq. 9-19), in its naive and its absorbed form, from the same weights.

naive:    expand the latents of all tokens to keys and values of every head; fewer FLOPs when queries are as many as keys.
absorbed: bring queries into the latent space (w_uk) and the result out of it (w_uv); the cache is read as it lies.

Letters: B batch, T positions, D model, N heads, H nope dim, R rope dim, V value dim, Q query latent, C kv latent.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax import cache
from dsv2_jax.config import ModelConfig
from dsv2_jax.context import Context
from dsv2_jax.projections import project
from dsv2_jax.rope import rotate, softmax_scale
from pallas_kernels.absorb_queries import absorb_queries
from pallas_kernels.einsum import einsum_float32
from pallas_kernels.latent_pages import LatentPages
from pallas_kernels.mla_attention import mla_attention
from sharding import specs

FEW, PARTS = 16, 16  # tokens of a device whose rope keys are made in parts, and the parts
LATENT_NORM_EPS = 1e-6  # the released code fixes it for the two latent norms, whatever rms_norm_eps says


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis. Statistics in float32; rounded to x's dtype before the weight, as in PyTorch."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x.dtype) * weight


def init_normal(rngs: nnx.Rngs, cfg: ModelConfig, shape: tuple[int, ...], dtype, spec=None) -> nnx.Param:
    """A parameter drawn from N(0, initializer_range^2)."""
    return nnx.Param(cfg.initializer_range * jax.random.normal(rngs.params(), shape, dtype, out_sharding=spec))


class MLA(nnx.Module):
    """Projections of one attention layer. `w_q` stands for the query path where queries are not compressed (V2-Lite)."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.cfg = cfg
        d, n, c, r = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim

        def weight(*shape: int) -> nnx.Param:
            return init_normal(rngs, cfg, shape, dtype)

        if cfg.q_lora_rank is None:
            self.w_q = weight(d, n, cfg.qk_head_dim)
        else:
            self.w_dq = weight(d, cfg.q_lora_rank)
            self.q_norm = nnx.Param(jnp.ones(cfg.q_lora_rank, dtype))
            self.w_uq = weight(cfg.q_lora_rank, n, cfg.qk_head_dim)
        self.w_dkv = weight(d, c)
        self.w_kr = weight(d, r)
        self.kv_norm = nnx.Param(jnp.ones(c, dtype))
        self.w_uk = weight(c, n, cfg.qk_nope_head_dim)
        self.w_uv = weight(c, n, cfg.v_head_dim)
        self.w_o = weight(n * cfg.v_head_dim, d)

    @jax.named_scope("mla")
    def __call__(
        self, x_BTD: jax.Array, ctx: Context, pages: LatentPages | None = None, layer: jax.Array | None = None
    ) -> tuple[jax.Array, LatentPages | None]:
        """Attends from each token to its past.

        Args:
            x_BTD: normalised hidden states.
            ctx: positions, segments and rotary angles of these tokens, and their places in the cache.
            pages: the cache of all layers; the tokens are written to it, and attended to there if `ctx` has a table.
            layer: which one this is.

        Returns:
            the attention output [B, T, D] in x's dtype, and the pages with the tokens in them.
        """
        q_BTNX = self._queries(x_BTD)
        q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNX, [self.cfg.qk_nope_head_dim], axis=-1)
        q_rope_BTNR = rotate(q_rope_BTNR, ctx.cos_BTJ, ctx.sin_BTJ)
        c_kv_BTC = rms_norm(project("btd,dc->btc", x_BTD, self.w_dkv), self.kv_norm[...], LATENT_NORM_EPS)
        k_rope_BTR = rotate(self._rope_keys(x_BTD, ctx), ctx.cos_BTJ, ctx.sin_BTJ)
        layers, scale = self.cfg.num_hidden_layers, softmax_scale(self.cfg)
        if pages is not None:
            pages = cache.write(pages, c_kv_BTC, k_rope_BTR, ctx, layer, layers)
        if ctx.table_BP is not None:
            q_latent_BTNC = _each_token(absorb_queries, q_BTNX, self.w_uk)
            o_latent_BTNC = cache.attend(q_latent_BTNC, q_rope_BTNR, pages, ctx, layer, layers, scale)
            o_BTNV = _each_token(functools.partial(jnp.einsum, "mnc,cnv->mnv"), o_latent_BTNC, self.w_uv)
        else:
            k_nope_BTNH = jnp.einsum("btc,cnh->btnh", c_kv_BTC, self.w_uk)
            v_BTNV = jnp.einsum("btc,cnv->btnv", c_kv_BTC, self.w_uv)
            # Kernels know no mesh: each device attends over its own sequences.
            attend = jax.shard_map(functools.partial(mla_attention, scale=scale), out_specs=specs.heads_BTNV)
            o_BTNV = attend(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, ctx.segment_ids_BT)
        return project("btk,kd->btd", o_BTNV.reshape(*x_BTD.shape[:2], -1), self.w_o), pages

    def _rope_keys(self, x_BTD: jax.Array, ctx: Context) -> jax.Array:
        few = math.prod(x_BTD.shape[:2]) <= FEW * jax.sharding.get_abstract_mesh().size
        # Sums of float32 numbers are in one order, whatever the batch.
        if ctx.table_BP is None or not few or x_BTD.dtype != jnp.bfloat16 or x_BTD.shape[2] % PARTS:
            return jnp.einsum("btd,dr->btr", x_BTD, self.w_kr)
        # A product of few tokens with so few columns runs on one SM, and attention waits for it: in parts on many (9 and 5.3 us).
        x_BTPX, w_PXR = x_BTD.reshape(*x_BTD.shape[:2], PARTS, -1), self.w_kr.reshape(PARTS, -1, self.w_kr.shape[1])
        return einsum_float32("btpx,pxr->pbtr", x_BTPX, w_PXR).sum(axis=0).astype(x_BTD.dtype)

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        if self.cfg.q_lora_rank is None:
            return project("btd,dnx->btnx", x_BTD, self.w_q)
        c_q_BTQ = rms_norm(project("btd,dq->btq", x_BTD, self.w_dq), self.q_norm[...], LATENT_NORM_EPS)
        return project("btq,qnx->btnx", c_q_BTQ, self.w_uq)


def _each_token(multiply: Callable, x_BTNX: jax.Array, w: nnx.Param) -> jax.Array:
    """Products of each head's X of every token and its matrix. With tokens on one axis, M = B T, a GPU's results lie as kernels read them."""

    def island(x_BTNX, w):
        return multiply(x_BTNX.reshape(-1, *x_BTNX.shape[2:]), w).reshape(*x_BTNX.shape[:3], -1)

    return jax.shard_map(island, out_specs=specs.heads_BTNV)(x_BTNX, w[...])
