"""Decode over fp8 and 6-bit pages against our own over bfloat16 pages of the same latents: one row a format and shape.

    python -m benchmarks.mla_decode_quantised

Each ratio is bfloat16's time over ours: the median, the least and the most of alternating pairs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.mla_decode import copy_rate, mixed
from benchmarks.pairs import compare, jax_calls
from pallas_kernels import latent_pages
from pallas_kernels.decode_schedule import make_schedule
from pallas_kernels.mla_decode import mla_decode

MIXED = "mixed"
SHAPES = (  # heads, requests, tokens of each, and the least ratio and the goal of fp8 and of int6
    (16, 256, 4096, {"fp8": (1.5, 1.7), "int6": (1.6, 2.0)}),
    (16, 128, 4096, {}),
    (16, 128, MIXED, {}),
    (128, 128, 4096, {}),
)
SCALE = 0.07


def main():
    copy = copy_rate(torch)
    print(f"ceiling: copy {copy / 1e12:.2f} TB/s")
    print("format heads requests tokens   ours us  TB/s  of ceiling  bf16 us  ratio (least to most)    must  goal")
    missed = []
    for heads, requests, tokens, bars in SHAPES:
        lengths = np.full(requests, tokens) if tokens != MIXED else mixed(requests)
        positions_BT = jnp.asarray(lengths[:, None] - 1, jnp.int32)
        schedule = jax.jit(make_schedule, static_argnums=1)(positions_BT, heads)
        decode = jax.jit(lambda *a: mla_decode(*a[:-1], scale=SCALE, schedule=a[-1], implementation="pallas"))
        pages, queries, table_BP = operands(lengths, heads)
        args = {name: (*queries, pages[name], table_BP, positions_BT, schedule) for name in pages}
        for name in ("fp8", "int6"):
            error = relative_error(decode(*args[name]), decode(*args["bf16"]))
            if error > 0.06:
                raise SystemExit(f"{name}: outputs differ from those over bfloat16 pages by {error:.3f}")
            result = compare(jax_calls(decode, *args[name]), jax_calls(decode, *args["bf16"]))
            read = lengths.sum() * pages[name].bytes_per_token
            must, goal = bars.get(name, (None, None))
            print(
                f"{name:6} {heads:5} {requests:8} {tokens:>6} {result.ours * 1e6:9.1f} {read / result.ours / 1e12:5.2f}"
                f" {read / copy / result.ours:11.2f} {result.peer * 1e6:8.1f}  {result!s:24}"
                f" {f'{must}x' if must else '-':>5} {f'{goal}x' if goal else '-':>5}",
                flush=True,
            )
            if must and result.ratio < must:
                missed.append((name, heads, requests, tokens))
    raise SystemExit(f"below their bars: {missed}" if missed else 0)


def operands(lengths, heads):
    """The same random latents as pages of each format, queries, and a table of the pages in no order."""
    blocks = -(-lengths // latent_pages.PAGE)
    order = np.random.default_rng(0).permutation(blocks.sum())
    table_BP = np.zeros((len(lengths), blocks.max()), np.int32)
    for row, mine in zip(table_BP, np.split(order, np.cumsum(blocks)[:-1])):
        row[: len(mine)] = mine

    @jax.jit
    def make():
        keys = jax.random.split(jax.random.key(0), 3)
        latent, rope = (
            jax.random.normal(key, (len(order), latent_pages.PAGE, dim), jnp.bfloat16) for key, dim in zip(keys, (512, 64))
        )
        packed = {name: latent_pages.pack(latent, name) for name in ("bf16", "fp8", "int6")}
        pages = {name: latent_pages.LatentPages(codes, rope, scale) for name, (codes, scale) in packed.items()}
        q_BTNX = jax.random.normal(keys[2], (len(lengths), 1, heads, 576), jnp.bfloat16)
        return pages, (q_BTNX[..., :512], q_BTNX[..., 512:])

    return *make(), jnp.asarray(table_BP)


def relative_error(got: jax.Array, wanted: jax.Array) -> float:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


if __name__ == "__main__":
    main()
