"""What 8-bit weights and small caches cost: attention's error, and how far the model's predictions move, on real text.

    python train.py --preset=tiny --workdir=small --set kv_lora_rank=512 --set qk_rope_head_dim=64 --set seq_len=1024 ...
    python -m benchmarks.quality small TEXT 1024 8192

Each text is cut from the file's beginning to so many tokens, and every token is predicted from latents read back from the cache, its
own among them. All rows are against the same checkpoint with bfloat16 weights and cache: the error of each layer's attention for the
same input, ||difference|| / ||output|| (mean and most over layers); the mean Kullback-Leibler divergence of the predictions in nats a
token; and the change of perplexity.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import cache, convert, model
from dsv2_jax.cache import Cache
from dsv2_jax.context import Context
from dsv2_jax.mla import rms_norm
from dsv2_jax.rope import cos_sin
from dsv2_jax.rotation import rotated
from dsv2_jax.steps import OPTIONS
from dsv2_jax.tokenizer import Tokenizer
from pallas_kernels.latent_pages import PAGE
from sharding.mesh import make_mesh

CHUNK = 256
BASE = ("bfloat16", "bfloat16")
VARIANTS = (("bfloat16", "fp8"), ("bfloat16", "int6"), ("fp8", "bfloat16"), ("fp8", "int6"))  # weights, cache


def main(directory: str, text: str, lengths: list[int]) -> None:
    weights = convert.open_checkpoint(directory)
    tokens = Tokenizer.load(weights.directory).encode(Path(text).read_text())
    models = {name: model.load(weights, "bfloat16", fp8=name == "fp8") for name in ("bfloat16", "fp8")}
    print("tokens  weights   cache     attention error (most)  divergence  perplexity  change")
    for length in lengths:
        if len(tokens) < length + 1 or length % CHUNK:
            raise SystemExit(f"{text} has {len(tokens)} tokens, expected more than {length}, a multiple of {CHUNK}")
        given = np.array(tokens[: length + 1], np.int32)
        base = Forced(models["bfloat16"], "bfloat16", max(lengths))
        others = {name: Forced(models[name[0]], name[1], max(lengths)) for name in VARIANTS}
        nll, divergence = dict.fromkeys((BASE, *VARIANTS), 0.0), dict.fromkeys(VARIANTS, 0.0)
        for start in range(0, length, CHUNK):
            chunk, targets = given[start : start + CHUNK], given[start + 1 : start + CHUNK + 1]
            wanted = base.predict(chunk, start)
            nll[BASE] -= float(of(wanted, targets))
            for name, other in others.items():
                got = other.predict(chunk, start)
                nll[name] -= float(of(got, targets))
                divergence[name] += float((jnp.exp(wanted) * (wanted - got)).sum())
        perplexity = {name: np.exp(total / length) for name, total in nll.items()}
        print(f"{length:6}  {'bfloat16':8}  {'bfloat16':8} {'-':>15} {'-':>16} {perplexity[BASE]:11.3f}  {'-':>6}")
        for name, other in others.items():
            errors = np.asarray(attention_errors(base.model, other.model, given[:length], (BASE[1], name[1])))
            change = perplexity[name] / perplexity[BASE] - 1
            print(
                f"{length:6}  {name[0]:8}  {name[1]:8} {errors.mean():15.2%} ({errors.max():.2%}) {divergence[name] / length:11.2e}"
                f" {perplexity[name]:11.3f}  {change:+6.2%}",
                flush=True,
            )


class Forced:
    """A model that is told every token, a chunk at a time, and sees the past through a cache of a format."""

    def __init__(self, m: model.Decoder, cache_dtype: str, length: int):
        self.model = rotated(m) if cache_dtype == "int6" else m
        self.pages = cache.empty(m.cfg, -(-length // PAGE), cache_dtype)

    def predict(self, chunk: np.ndarray, start: int) -> jax.Array:
        """Log-probabilities [T, V] of what follows each token of the chunk."""
        log_probs_TV, self.pages = predict(self.model, self.pages, jnp.asarray(chunk[None]), start)
        return log_probs_TV


@functools.partial(jax.jit, donate_argnums=1, compiler_options=OPTIONS)
def predict(m: model.Decoder, pages, tokens_BT, start):
    tokens_BT, positions_BT, segments_BT = model.from_zero(tokens_BT)
    table_BP = jnp.arange(pages.latent.shape[0] // m.cfg.num_hidden_layers, dtype=jnp.int32)[None]
    positions_BT = positions_BT + start
    hidden_BTD, pages, _ = m(tokens_BT, positions_BT, segments_BT, Cache(pages, positions_BT, table_BP))
    return jax.nn.log_softmax(m.logits(hidden_BTD[0])), pages


@jax.jit
def of(log_probs_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
    return jnp.take_along_axis(log_probs_TV, targets_T[:, None], axis=1).sum()


@functools.partial(jax.jit, static_argnums=3, compiler_options=OPTIONS)
def attention_errors(base: model.Decoder, other: model.Decoder, tokens_T, formats) -> jax.Array:
    """Of each layer [L], both models being given the same input, what comes before in `base`."""
    cfg, pages_per_layer = base.cfg, -(-len(tokens_T) // PAGE)
    tokens_BT, positions_BT, segments_BT = model.from_zero(jnp.asarray(tokens_T)[None])
    table_BP = jnp.arange(pages_per_layer, dtype=jnp.int32)[None]
    split = cache.schedule(positions_BT, cfg.num_attention_heads)
    ctx = Context(positions_BT, segments_BT, *cos_sin(cfg, positions_BT))
    ctx = ctx._replace(slots_BT=positions_BT, table_BP=table_BP, schedule=split)
    x_BTD, errors, layer = base._embed(tokens_BT, positions_BT, segments_BT)[0], [], 0
    for kind, start, length in cfg.runs:
        for index in range(start, start + length):
            one, another = (jax.tree.map(lambda a, index=index: a[index], getattr(m, kind)) for m in (base, other))
            normed_BTD = rms_norm(x_BTD, one.attn_norm[...], cfg.rms_norm_eps)
            wanted, got = (
                part.attn(normed_BTD, ctx, cache.empty(cfg, pages_per_layer, dtype), jnp.int32(layer))[0].astype(jnp.float32)
                for part, dtype in zip((one, another), formats)
            )
            errors.append(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
            x_BTD, _, _ = one(x_BTD, ctx._replace(table_BP=None))
            layer += 1
    return jnp.stack(errors)


if __name__ == "__main__":
    with jax.set_mesh(make_mesh()):
        main(sys.argv[1], sys.argv[2], [int(length) for length in sys.argv[3:]])
