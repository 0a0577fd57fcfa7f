"""The grouped expert matmul against PyTorch's, against one dense matmul of the same FLOPs, and against the bytes of the weights.

    python -m benchmarks.grouped_matmul [--tune]

Rows are spread over the experts unevenly (Dirichlet, alpha 8); FLOPs are those of rows that exist, while our time includes what
pads them. Each ratio is the median, the least and the most of alternating pairs. --tune times the kernels' tilings instead, each
against the one in use.
"""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pairs import compare, jax_calls, torch_calls
from pallas_kernels import grouped_matmul_hopper, grouped_wgrad_hopper
from pallas_kernels.grouped_matmul import row_unit

SHAPES = {  # experts, model, hidden, rows; least ratios: forward, swiglu, input gradient, weight gradient
    "V2-Lite": ((64, 2048, 1408, 98304), (1.03, 1.04, 1.0, 0.85)),
    "V2": ((160, 5120, 1536, 49152), (1.3, 1.04, 1.25, 0.72)),
}
GOALS = "0.93x dense", "1.08x", "0.9x dense", "0.93x (V2 0.88x)"
DECODE_ROWS, COPY_RATE = 1536, 4.3e12


def main():
    print("                                    ours us  TFLOP/s  of dense   peer us  ratio (least to most)     must  goal")
    missed = []
    for model, (shape, bars) in SHAPES.items():
        operands = Operands(*shape)
        dense = jax.jit(jnp.matmul)
        dense_calls = jax_calls(dense, operands.x_MD[: operands.rows], operands.w_EDG[0])
        torch_forward = torch_grouped(operands)
        two_passes = operands.calls("swiglu of two passes")
        peers = torch_forward, two_passes, torch_forward, dense_calls
        names = "forward", "swiglu", "input gradient", "weight gradient"
        for name, peer, must, goal in zip((*names, "weight gradient, float32"), (*peers, dense_calls), (*bars, 0), (*GOALS, "")):
            ours = operands.calls(name)
            result, beside = compare(ours, peer), compare(ours, dense_calls)
            rate = operands.flop / result.ours / 1e12
            print(
                f"{model:8} {name:25} {result.ours * 1e6:9.1f} {rate:8.0f} {beside.ratio:9.3f} {result.peer * 1e6:9.1f}"
                f"  {result!s:24} {must:>5}x  {goal}",
                flush=True,
            )
            if result.ratio < must:
                missed.append((model, name))
    experts, model, hidden, _ = SHAPES["V2"][0]
    decode = Operands(experts, model, hidden, DECODE_ROWS)
    calls = decode.calls("forward")
    seconds, floor = compare(calls, calls).ours, 2 * decode.w_EDG.size / COPY_RATE
    print(
        f"V2 decode, {DECODE_ROWS} rows: {seconds * 1e6:.1f} us, {floor / seconds:.3f} of the rate of a copy; must 1.0, goal 1.03"
    )
    if floor / seconds < 1:
        missed.append(("V2", "decode"))
    raise SystemExit(f"below their bars: {missed}" if missed else 0)


class Operands:
    """Random operands of a shape, and the kernels on them, compiled."""

    def __init__(self, experts, model, hidden, rows):
        rng = np.random.default_rng(0)
        self.sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 8.0))).astype(np.int32)
        self.rows, self.flop, self.unit = rows, 4 * rows * model * hidden, row_unit(rows, experts, "pallas")
        padded = -(-self.sizes // self.unit) * self.unit
        starts, total = np.cumsum(padded) - padded, -(-int(padded.sum()) // 64) * 64
        place = np.concatenate([start + np.arange(size) for start, size in zip(starts, self.sizes)])

        def spread(seed, width):
            live = jax.random.normal(jax.random.key(seed), (rows, width), jnp.bfloat16)
            return jnp.zeros((total, width), jnp.bfloat16).at[place].set(live)

        def weights(seed, *shape):
            return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(0.02)

        self.x_MD, self.dy_MG = (jax.jit(spread, static_argnums=1)(i, width) for i, width in enumerate((model, 2 * hidden)))
        make = jax.jit(weights, static_argnums=(1, 2, 3))
        self.w_EDG = make(2, experts, model, 2 * hidden)
        self.w_gate_EDF, self.w_up_EDF = (make(seed, experts, model, hidden) for seed in (3, 4))
        self.weight_M, self.sizes_E = jnp.ones(total), jnp.asarray(self.sizes)

    def calls(self, name):
        """The named kernel, for `compare`."""
        matmul, wgrad = grouped_matmul_hopper.matmul, grouped_wgrad_hopper.weight_gradients

        def two_passes(x, weight, w, sizes):
            gate, up = jnp.split(matmul([x], [w], sizes, self.unit).astype(jnp.float32), 2, axis=1)
            return (weight[:, None] * jax.nn.silu(gate) * up).astype(x.dtype)

        x, weight, w, dy = self.x_MD, self.weight_M, self.w_EDG, self.dy_MG
        function, *args = {
            "forward": (lambda x, w, sizes: matmul([x], [w], sizes, self.unit), x, w),
            "swiglu": (
                lambda *a: grouped_matmul_hopper.swiglu(*a, self.unit, save=False),
                x,
                weight,
                self.w_gate_EDF,
                self.w_up_EDF,
            ),
            "swiglu of two passes": (two_passes, x, weight, w),
            "input gradient": (lambda dy, w, sizes: matmul([dy], [w], sizes, self.unit, transposed=True), dy, w),
            "weight gradient": (lambda x, dy, sizes: wgrad(x, [dy], sizes, self.unit, jnp.bfloat16), x, dy),
            "weight gradient, float32": (lambda x, dy, sizes: wgrad(x, [dy], sizes, self.unit, jnp.float32), x, dy),
        }[name]
        compiled = jax.jit(function).lower(*args, self.sizes_E).compile()
        text = compiled.as_text()
        if "grouped_matmul_mosaic" not in text and "grouped_wgrad_mosaic" not in text:
            raise SystemExit(f"{name}: the kernel is not what ran")
        return jax_calls(compiled, *args, self.sizes_E)


def torch_grouped(operands):
    """PyTorch's forward on the same sizes, without padding."""
    import torch

    experts, model, columns = operands.w_EDG.shape
    x = torch.randn(operands.rows, model, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(experts, model, columns, device="cuda", dtype=torch.bfloat16) * 0.02
    ends = torch.tensor(np.cumsum(operands.sizes).astype(np.int32), device="cuda")
    return torch_calls(lambda: torch.nn.functional.grouped_mm(x, w, offs=ends))


def tune():
    """Each tiling's speed over that of the one in use."""
    tiling, stages = grouped_matmul_hopper.Tiling, grouped_wgrad_hopper.Stages
    tilings = [(rows, *rest) for rows in (160, 176, 192) for rest in ((4, 3, 2), (3, 3, 2), (3, 3, 3))]
    for model, (shape, _) in SHAPES.items():
        operands = Operands(*shape)
        for name in ("forward", "swiglu", "input gradient", "weight gradient"):
            used = operands.calls(name)
            if name == "weight gradient":
                patches = [
                    mock.patch.object(grouped_wgrad_hopper, "STAGES", stages(*s)) for s in ((4, 3, 4), (5, 3, 2), (6, 3, 2))
                ]
            else:
                made = [functools.partial(lambda t, unit, *_: tiling(2, unit, *t), t) for t in tilings]
                patches = [mock.patch.object(grouped_matmul_hopper, "tiling", f) for f in made]
            for patch in patches:
                with patch:
                    print(model, name, patch.new, compare(operands.calls(name), used), flush=True)


if __name__ == "__main__":
    tune() if "--tune" in sys.argv else main()
