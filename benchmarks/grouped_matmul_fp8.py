"""The 8-bit grouped matmul against our bfloat16 one, forward, gate and up in one product: one row a shape.

    python -m benchmarks.grouped_matmul_fp8

Group sizes are drawn from a spread of experts, rows padded to 16. Rows are quantised beforehand, as tokens are before they are
copied to their experts; what that takes for as many rows is printed beside. A ratio is the median of alternating pairs, with the
least and the most; the floor is the later of the arithmetic, at the rate of XLA's 8192 x 8192 x 8192 product of e4m3, and the
bytes, at the rate of a copy.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pairs import compare, jax_calls
from pallas_kernels.grouped_matmul import grouped_matmul, padded_rows
from pallas_kernels.grouped_matmul_fp8 import grouped_matmul_fp8, quantise_rows, quantise_weights

UNIT = 16
SHAPES = (  # model, experts, K, F, rows, least ratio and goal
    ("V2-Lite", 64, 2048, 2816, 98304, 1.5, 1.75),
    ("V2", 160, 5120, 3072, 49152, 1.5, 1.75),
    ("V2-Lite decode", 64, 2048, 2816, 64 * 6, None, None),
    ("V2-Lite decode", 64, 2048, 2816, 512 * 6, None, None),
    ("V2 decode", 160, 5120, 3072, 1536, None, None),
)


def main():
    arithmetic, copy = matmul_rate(), copy_rate()
    print(f"ceilings: e4m3 matmul {arithmetic / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s")
    print(
        "shape            rows     ours us  TFLOP/s  of floor  bfloat16 us  ratio (least to most)    must  goal  quantise us  error"
    )
    missed = []
    for name, experts, depth, columns, rows, must, goal in SHAPES:
        x_MK, w_EKF, sizes_E = operands(experts, depth, columns, rows)
        x = jax.jit(functools.partial(quantise_rows, implementation="pallas"))(x_MK)
        w = jax.jit(quantise_weights)(w_EKF)
        ours = jax.jit(functools.partial(grouped_matmul_fp8, row_unit=UNIT, implementation="pallas"))
        peer = jax.jit(functools.partial(grouped_matmul, row_unit=UNIT, implementation="pallas"))
        error = relative_error(ours(x, w, sizes_E), peer(x_MK, w_EKF, sizes_E), int((-(-sizes_E // UNIT) * UNIT).sum()))
        if error > 0.05:
            raise SystemExit(f"the outputs differ from bfloat16's by {error:.3f}")
        result = compare(jax_calls(ours, x, w, sizes_E), jax_calls(peer, x_MK, w_EKF, sizes_E))
        quantise = best(functools.partial(jax.jit(functools.partial(quantise_rows, implementation="pallas")), x_MK))
        flop = 2 * rows * depth * columns
        used = int((sizes_E > 0).sum())
        floor = max(flop / arithmetic, (used * depth * columns + rows * (depth + 2 * columns)) / copy)
        print(
            f"{name:14} {rows:6} {result.ours * 1e6:11.1f} {flop / result.ours / 1e12:8.0f} {floor / result.ours:9.2f}"
            f" {result.peer * 1e6:12.1f}  {result!s:24} {must or '-':>5} {goal or '-':>5} {quantise * 1e6:12.1f}  {error:.3f}",
            flush=True,
        )
        if must and result.ratio < must:
            missed.append(name)
    raise SystemExit(f"below their bars: {missed}" if missed else 0)


def operands(experts: int, depth: int, columns: int, rows: int):
    """Normal rows in groups of random sizes, normal weights."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(rows, rng.dirichlet(np.full(experts, 8.0)))
    padded = -(-sizes // UNIT) * UNIT
    place = np.concatenate([start + np.arange(size) for start, size in zip(np.cumsum(padded) - padded, sizes)])

    @jax.jit
    def make(place):
        x_MK = jnp.zeros((padded_rows(rows, experts, UNIT), depth), jnp.bfloat16)
        x_MK = x_MK.at[place].set(jax.random.normal(jax.random.key(0), (rows, depth), jnp.bfloat16))
        return x_MK, 0.02 * jax.random.normal(jax.random.key(1), (experts, depth, columns), jnp.bfloat16)

    return *make(jnp.asarray(place)), jnp.asarray(sizes, jnp.int32)


@functools.partial(jax.jit, static_argnums=2)
def relative_error(got_MF, wanted_MF, used: int) -> jax.Array:
    got_MF, wanted_MF = (a[:used].astype(jnp.float32) for a in (got_MF, wanted_MF))
    return jnp.linalg.norm(got_MF - wanted_MF) / jnp.linalg.norm(wanted_MF)


def matmul_rate() -> float:
    """FLOP a second."""
    x = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16).astype(jnp.float8_e4m3fn)
    product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16))
    return 2 * 8192**3 / best(lambda: product(x, x))


def copy_rate() -> float:
    """Bytes a second that a copy of 2 GiB reads and writes."""
    x = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    return 2 * x.nbytes / best(lambda: jnp.copy(x))


def best(run, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready([run() for _ in range(5)])
        times.append((time.perf_counter() - begin) / 5)
    return min(times)


if __name__ == "__main__":
    main()
