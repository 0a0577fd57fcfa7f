"""Decode over bfloat16 pages against FlashMLA, and against what the chip can do: one row a shape.

    FLASHMLA_DIR=... python -m benchmarks.mla_decode

FLASHMLA_DIR holds a package `vllm` with FlashMLA's extension and interface, as vLLM 0.24 ships them for PyTorch 2.11. Both read
the same pages; ours are two arrays. Each ratio is the median, the least and the most of alternating pairs.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pairs import compare, jax_calls, torch_calls
from pallas_kernels.decode_schedule import make_schedule
from pallas_kernels.latent_pages import LatentPages
from pallas_kernels.mla_decode import mla_decode

MIXED = "mixed"  # 128 requests of 200 to 16384 tokens, evenly in their logarithm
SHAPES = (  # heads, requests, tokens of each, least ratio and goal
    (128, 128, 4096, 1.0, "1.15x"),
    (128, 64, 8192, 1.0, "1.15x"),
    (128, 16, 65536, 1.0, "1.15x"),
    (128, 128, MIXED, 1.0, "1.15x"),
    (128, 1, 131072, None, ""),
    (16, 128, 4096, 1.0, "0.96 of copy"),
    (16, 256, 4096, 1.0, "0.96 of copy"),
    (16, 128, MIXED, 1.0, "1.15x"),
    (16, 1, 131072, None, ""),
)
SCALE = 0.07


def main():
    import torch

    sys.path.insert(0, os.environ["FLASHMLA_DIR"])
    import vllm._flashmla_C  # noqa: F401, registers the operations
    from vllm.third_party.flashmla.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    copy = copy_rate(torch)
    matmul = matmul_rate()
    print(f"ceilings: copy {copy / 1e12:.2f} TB/s, bfloat16 matmul {matmul / 1e12:.0f} TFLOP/s")
    print("heads requests tokens      ours us  TFLOP/s  TB/s  of ceiling  peer us  ratio (least to most)    must  goal")
    missed = []
    for heads, requests, tokens, must, goal in SHAPES:
        lengths = np.full(requests, tokens) if tokens != MIXED else mixed(requests)
        latent_rope, table, q = (x.to("cuda") for x in operands(torch, lengths, heads))
        lengths_cuda = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        metadata, _ = get_mla_metadata()

        def peer():
            return flash_mla_with_kvcache(q, latent_rope, table, lengths_cuda, 512, metadata, None, SCALE, True)  # noqa: B023

        halves = [x.contiguous() for x in (q[..., :512], q[..., 512:], latent_rope[:, :, 0, :512], latent_rope[:, :, 0, 512:])]
        q_latent, q_rope, latent, rope, table_BP, lengths_B = (jax.dlpack.from_dlpack(x) for x in (*halves, table, lengths_cuda))
        positions_BT = (lengths_B - 1)[:, None]
        pages = LatentPages(latent, rope, None)
        schedule = jax.jit(make_schedule, static_argnums=1)(positions_BT, heads)
        decode = jax.jit(lambda *a: mla_decode(*a[:-1], scale=SCALE, schedule=a[-1], implementation="pallas"))
        args = (q_latent, q_rope, pages, table_BP, positions_BT, schedule)
        error = relative_error(torch, decode(*args), peer()[0])
        if error > 0.01:
            raise SystemExit(f"outputs differ from FlashMLA's by {error:.3f}")
        result = compare(jax_calls(decode, *args), torch_calls(peer))
        flop, read = 2 * heads * lengths.sum() * 1088, lengths.sum() * 1152
        floor = max(flop / matmul, read / copy)
        bar = f"{must}x" if must else "-"
        print(
            f"{heads:5} {requests:8} {tokens:>6} {result.ours * 1e6:12.1f} {flop / result.ours / 1e12:8.0f}"
            f" {read / result.ours / 1e12:5.2f} {floor / result.ours:11.2f} {result.peer * 1e6:8.1f}  {result!s:24} {bar:>5}  {goal}",
            flush=True,
        )
        if must and result.ratio < must:
            missed.append((heads, requests, tokens))
    raise SystemExit(f"below their bars: {missed}" if missed else 0)


def mixed(requests: int) -> np.ndarray:
    return np.exp(np.random.default_rng(0).uniform(np.log(200), np.log(16384), requests)).astype(int)


def operands(torch, lengths, heads):
    """Pages in no order, a table of them, and queries."""
    blocks = -(-lengths // 64)
    order = torch.randperm(int(blocks.sum()), dtype=torch.int32)
    table = torch.zeros(len(lengths), int(blocks.max()), dtype=torch.int32)
    for row, pages in zip(table, order.split(blocks.tolist())):
        row[: len(pages)] = pages
    pages = torch.randn(len(order), 64, 1, 576, device="cuda", dtype=torch.bfloat16)
    return pages, table, torch.randn(len(lengths), 1, heads, 576, device="cuda", dtype=torch.bfloat16)


def relative_error(torch, got: jax.Array, wanted) -> float:
    got = torch.from_dlpack(got).float()
    return float((got - wanted).norm() / wanted.float().norm())


def copy_rate(torch) -> float:
    """Bytes a second that a copy of 4 GiB reads and writes."""
    x = torch.randn(1 << 31, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    seconds = best(lambda: (y.copy_(x), torch.cuda.synchronize()))
    return 2 * x.nbytes / seconds


def matmul_rate() -> float:
    """FLOP a second of XLA's 8192 x 8192 x 8192 product."""
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * 8192**3 / best(lambda: product(x).block_until_ready())


def best(run, repeats: int = 10) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
