"""DeepSeek-V2 as one Flax module: embedding, a stack of dense layers, a stack of MoE layers, norm, head (paper section 2).

h = embed[ids];  per layer h += MLA(norm(h)), h += FFN(norm(h));  logits = norm(h) w_head.

Modules are plain pytrees of parameters: only `jax` transforms touch them, and nothing is mutated in a call. Layers of one kind
are stacked on a leading axis and scanned. `hugging_face.py` maps the names here to Hugging Face's.
Letters: L layers, B batch, T positions, D model, K experts a token, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax.cache import Cache, schedule
from dsv2_jax.config import ModelConfig
from dsv2_jax.context import Context, Dropping
from dsv2_jax.embedding import look_up
from dsv2_jax.fp8 import FLOAT8
from dsv2_jax.mla import MLA, init_normal, rms_norm
from dsv2_jax.moe import DeepSeekMoE, Stats, SwiGLU
from dsv2_jax.projections import quantised
from dsv2_jax.rope import cos_sin
from dsv2_jax.weights import Weights, path_name
from dsv2_jax.weights import load as weights_onto
from pallas_kernels.einsum import PRODUCT, einsum_float32
from pallas_kernels.latent_pages import LatentPages
from sharding import specs
from sharding.expert_parallel import ARRIVED


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream. `kind`: "dense" or "moe"."""

    def __init__(self, cfg: ModelConfig, kind: str, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.cfg, self.kind = cfg, kind
        self.attn_norm = nnx.Param(jnp.ones(cfg.hidden_size, dtype))
        self.attn = MLA(cfg, rngs, dtype)
        self.ffn_norm = nnx.Param(jnp.ones(cfg.hidden_size, dtype))
        self.ffn = DeepSeekMoE(cfg, rngs, dtype) if kind == "moe" else SwiGLU(cfg, cfg.intermediate_size, rngs, dtype)

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, pages: LatentPages | None = None, layer: jax.Array | None = None
    ) -> tuple[jax.Array, LatentPages | None, Stats]:
        eps = self.cfg.rms_norm_eps
        h_BTD, pages = self.attn(rms_norm(x_BTD, self.attn_norm[...], eps), ctx, pages, layer)
        x_BTD += h_BTD
        h_BTD = rms_norm(x_BTD, self.ffn_norm[...], eps)
        h_BTD, stats = self.ffn(h_BTD, ctx) if self.kind == "moe" else (self.ffn(h_BTD), {})
        return x_BTD + h_BTD, pages, stats


def float32_exact(method: Callable) -> Callable:
    """Float32 parameters multiply in float32: a GPU would use TF32 otherwise. Gradients inherit it."""

    @functools.wraps(method)
    def wrapped(self: "Decoder", *args, **kwargs):
        with jax.default_matmul_precision("highest" if self.embed.dtype == jnp.float32 else "default"):
            return method(self, *args, **kwargs)

    return wrapped


class Decoder(nnx.Module):
    """The whole model. Parameters are drawn on the current mesh, in `dtype`; activations follow the parameters' dtype.

    `fp8`: the layers' matrices are 8-bit floats (see fp8.py), for inference; they are drawn a layer at a time.
    """

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype, fp8: bool = False):
        self.cfg = cfg
        self.embed = init_normal(rngs, cfg, (cfg.vocab_size, cfg.hidden_size), dtype)
        for kind in ("dense", "moe"):
            if size := cfg.stack_size(kind):
                keys = jax.random.split(rngs.params(), size)

                def layer(key: jax.Array, kind: str = kind) -> Layer:
                    return Layer(cfg, kind, nnx.Rngs(params=key), dtype)

                setattr(self, kind, jax.lax.map(lambda key: quantised(layer(key)), keys) if fp8 else jax.vmap(layer)(keys))
        self.final_norm = nnx.Param(jnp.ones(cfg.hidden_size, dtype))
        self.w_head = init_normal(rngs, cfg, (cfg.hidden_size, cfg.vocab_size), dtype)

    @float32_exact
    def __call__(
        self,
        tokens_BT,
        positions_BT,
        segment_ids_BT,
        cache: Cache | None = None,
        *,
        remat: str = "none",
        regather: bool = False,
        dropping: Dropping | None = None,
        dispatch: str | None = None,
        unroll: bool = False,
    ) -> tuple[jax.Array, LatentPages | None, Stats]:
        """The normalised hidden states before the head.

        Args:
            tokens_BT, positions_BT, segment_ids_BT: int32; attention stays within a segment.
            cache: where tokens are written, and the pages to attend over (absorbed, segments ignored), if not over these tokens.
            remat: what the backward pass computes again: none; elementwise, all but matmuls and kernels; full, each whole layer.
                What came over the wire is kept.
            regather: where parameters are cut (ZeRO), gather a layer's again in the backward pass instead of keeping them.
            dropping, dispatch: see `context.Context`.
            unroll: compile each layer by itself: longer, but then no weight is copied out of its stack before it is used.

        Returns:
            hidden [B, T, D]; the cache's pages with the tokens in them; per MoE layer the routing's statistics, stacked on L.
        """
        x_BTD, ctx = self._embed(tokens_BT, positions_BT, segment_ids_BT)
        ctx = ctx._replace(dropping=dropping, dispatch=dispatch)
        pages = None
        if cache is not None:
            pages, ctx = cache.pages, ctx._replace(slots_BT=cache.slots_BT, table_BP=cache.table_BP)
            if cache.table_BP is not None:
                ctx = ctx._replace(schedule=schedule(positions_BT, self.cfg.num_attention_heads))

        def layer_step(carry, layer_and_index):
            (x_BTD, pages), (layer, index) = carry, layer_and_index
            x_BTD, pages, stats = specs.gather(layer)(x_BTD, ctx, pages, index)
            return (x_BTD, pages), stats

        policy = specs.keep_all_but_gathered if regather else None
        if remat != "none":
            kept = (ARRIVED,) if regather else (ARRIVED, specs.GATHERED)
            policy = jax.checkpoint_policies.save_only_these_names(*kept, *([PRODUCT] if remat == "elementwise" else []))
            if remat == "elementwise":
                policy = jax.checkpoint_policies.save_from_both_policies(policy, jax.checkpoint_policies.dots_saveable)
        stats, first = [], 0
        for kind, start, length in self.cfg.runs:
            layers = jax.tree.map(lambda a, run=slice(start, start + length): a[run], getattr(self, kind))
            step = layer_step
            if policy:
                # Two loops are not merged. A barrier between the passes would have a GPU copy all that a layer uses out of stacks.
                step = jax.checkpoint(layer_step, policy=policy, prevent_cse=length == 1)
            (x_BTD, pages), run_stats = jax.lax.scan(step, (x_BTD, pages), (layers, first + jnp.arange(length)), unroll=unroll)
            stats.append(run_stats)
            first += length
        stats = [s for s in stats if s]
        return self._norm(x_BTD), pages, jax.tree.map(lambda *a: jnp.concatenate(a), *stats) if stats else {}

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., V] of normalised hidden states [..., D]."""
        return head_logits(hidden, self.w_head[...])

    @property
    def weights_dtype(self) -> str:
        """fp8 where the layers' matrices are 8-bit floats, else the parameters' dtype."""
        return "fp8" if any(leaf.dtype == FLOAT8 for leaf in jax.tree.leaves(self)) else str(self.embed.dtype)

    def _embed(self, tokens_BT, positions_BT, segment_ids_BT) -> tuple[jax.Array, Context]:
        x_BTD = look_up(self.embed[...], tokens_BT)
        return x_BTD, Context(positions_BT, segment_ids_BT, *cos_sin(self.cfg, positions_BT))

    def _norm(self, x_BTD: jax.Array) -> jax.Array:
        return rms_norm(x_BTD, self.final_norm[...], self.cfg.rms_norm_eps)


def head_logits(hidden: jax.Array, w_head_DV: jax.Array) -> jax.Array:
    """float32 logits [..., V] of normalised hidden states [..., D]."""
    return einsum_float32("...d,dv->...v", hidden, w_head_DV)


def draw(cfg: ModelConfig, key: jax.Array, dtype: jnp.dtype, fp8: bool = False) -> Decoder:
    """Random parameters."""
    return Decoder(cfg, nnx.Rngs(params=key), dtype, fp8)


def init(cfg: ModelConfig, seed: int, dtype: jnp.dtype, fp8: bool = False) -> Decoder:
    """Random parameters on the current mesh, each device making its own part."""
    return jax.jit(functools.partial(draw, cfg, dtype=dtype, fp8=fp8))(jax.random.key(seed))


def abstract(cfg: ModelConfig, dtype: jnp.dtype, fp8: bool = False) -> Decoder:
    """Shapes, dtypes and shardings of the parameters on the current mesh, without the parameters."""
    return jax.eval_shape(lambda: draw(cfg, jax.random.key(0), dtype, fp8))


def load(weights: Weights, dtype: str, cfg: ModelConfig | None = None, fp8: bool = False) -> Decoder:
    """The model of a checkpoint on the current mesh, in `dtype` or, with `fp8`, its matrices in 8 bits; each device reads its own part.

    `cfg` (default: the checkpoint's own) may differ in what is not a shape; InputError lists every parameter that does not fit.
    """
    return weights_onto(weights, abstract(cfg or weights.config, jnp.dtype(dtype), fp8))


def parameters(model: Decoder) -> dict[str, Any]:
    """The leaves by dotted name, as in `moe.attn.w_dkv`."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(model)}


def from_zero(tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions 0, 1, ... and one segment a row: what `Decoder` takes for whole sequences."""
    tokens_BT = jax.reshard(tokens_BT, specs.tokens_BT)
    positions_BT = jax.reshard(jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape), specs.tokens_BT)
    return tokens_BT, positions_BT, jnp.ones_like(tokens_BT)


class Trace(NamedTuple):
    """A forward pass laid open, layer by layer."""

    hidden: list[jax.Array]  # the residual stream [B, T, D] after each layer
    experts: dict[int, jax.Array]  # chosen experts [B, T, K] of each MoE layer
    logits: jax.Array  # float32 [B, T, V]


@jax.jit
@float32_exact
def trace(model: Decoder, tokens_BT: jax.Array) -> Trace:
    """Runs the layers one by one, without a scan, and keeps what lies between them."""
    x_BTD, ctx = model._embed(*from_zero(tokens_BT))
    hidden, experts = [], {}
    for kind, start, length in model.cfg.runs:
        for index in range(start, start + length):
            layer = jax.tree.map(lambda a, index=index: a[index], getattr(model, kind))
            x_BTD, _, stats = layer(x_BTD, ctx)
            if stats:
                experts[len(hidden)] = stats["experts"]
            hidden.append(x_BTD)
    return Trace(hidden, experts, model.logits(model._norm(x_BTD)))
