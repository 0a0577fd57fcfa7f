"""Training attention against cuDNN through PyTorch, forward and with its gradients, and what one segment id for all costs.

    python -m benchmarks.mla_attention

Both compute the same numbers; PyTorch has the rope key copied to every head, and heads before tokens, as cuDNN likes them. FLOPs
are those of the causal half of the scores, and 3.5 times as many with gradients. Each ratio is the median, the least and the
most of alternating pairs.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import jax.numpy as jnp

from benchmarks.pairs import compare, jax_calls, torch_calls
from pallas_kernels.mla_attention import mla_attention

NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
SHAPES = (  # batch, tokens, heads; least ratio and goal of each row
    (2, 4096, 128, ((1.08, "1.2x"), (1.08, "1.3x"), (0.98, "0.99x"))),
    (4, 4096, 16, ((1.08, "1.2x"), (1.08, "1.3x"), (0.98, "0.99x"))),
    (1, 16384, 64, ((1.08, "1.2x"), (1.0, "1.15x"), (0.98, "0.99x"))),
)


def main():
    matmul = matmul_rate()
    print(f"ceiling: bfloat16 matmul {matmul / 1e12:.0f} TFLOP/s")
    print("batch tokens heads                    ours us  TFLOP/s  of ceiling   peer us  ratio (least to most)    must  goal")
    missed = []
    for batch, tokens, heads, bars in SHAPES:
        for (name, flop, ours, peer), (must, goal) in zip(pairs(batch, tokens, heads), bars):
            result = compare(ours, peer)
            rate = flop / result.ours
            print(
                f"{batch:5} {tokens:6} {heads:5} {name:18} {result.ours * 1e6:12.1f} {rate / 1e12:8.0f} {rate / matmul:11.2f}"
                f" {result.peer * 1e6:9.1f}  {result!s:24} {must:>5}x  {goal}",
                flush=True,
            )
            if result.ratio < must:
                missed.append((batch, tokens, heads, name))
    raise SystemExit(f"below their bars: {missed}" if missed else 0)


def pairs(batch: int, tokens: int, heads: int) -> list[tuple]:
    """Name of a row, FLOPs, ours and the peer, after a look at whether both compute the same."""
    import torch

    dims = NOPE + ROPE, NOPE + ROPE, VALUE, VALUE
    q, k, v, dout = (torch.randn(batch, heads, tokens, dim, device="cuda", dtype=torch.bfloat16) for dim in dims)
    k[..., NOPE:] = k[:, :1, :, NOPE:]
    q_BTNX, k_BTNX, v_BTNV, dout_BTNV = (jax.dlpack.from_dlpack(x.transpose(1, 2).contiguous()) for x in (q, k, v, dout))
    operands = q_BTNX[..., :NOPE], q_BTNX[..., NOPE:], k_BTNX[..., :NOPE], k_BTNX[:, :, 0, NOPE:], v_BTNV
    ids_BT = jnp.ones((batch, tokens), jnp.int32)
    forward, segmented, both = (
        jax.jit(function).lower(*operands, last).compile()
        for function, last in ((attend, None), (attend, ids_BT), (gradients, dout_BTNV))
    )
    if not all("mla_attention_forward" in compiled.as_text() for compiled in (forward, segmented, both)):
        raise SystemExit("the kernel is not what ran")
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def peer():
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=SCALE)

    def peer_both():
        out = peer()
        return out.detach(), *torch.autograd.grad(out, leaves, dout)

    out, dq, dk, dv = (x.transpose(1, 2) for x in peer_both())
    wanted = out, dq[..., :NOPE], dq[..., NOPE:], dk[..., :NOPE], dk[..., NOPE:].float().sum(2), dv
    for got_array, wanted_array in zip(both(*operands, dout_BTNV), wanted):
        difference = torch.from_dlpack(got_array).float() - wanted_array
        if not difference.norm() < 0.02 * wanted_array.float().norm():
            raise SystemExit(f"results differ from cuDNN's by {difference.norm() / wanted_array.float().norm():.3f}")
    flop, plain = batch * heads * tokens**2 * (NOPE + ROPE + VALUE), jax_calls(forward, *operands, None)
    return [
        ("forward", flop, plain, torch_calls(torch.no_grad()(peer))),
        ("forward, backward", 3.5 * flop, jax_calls(both, *operands, dout_BTNV), torch_calls(peer_both)),
        ("one segment / None", flop, jax_calls(segmented, *operands, ids_BT), plain),
    ]


def attend(*operands_and_ids):
    return mla_attention(*operands_and_ids, scale=SCALE)


def gradients(*operands_and_dout):
    *operands, dout_BTNV = operands_and_dout
    out_BTNV, vjp = jax.vjp(lambda *a: mla_attention(*a, None, scale=SCALE), *operands)
    return out_BTNV, *vjp(dout_BTNV)


def matmul_rate() -> float:
    """FLOP a second of XLA's 8192 x 8192 x 8192 product."""
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * 8192**3 / compare(jax_calls(product, x), jax_calls(product, x)).ours


if __name__ == "__main__":
    main()
