"""`pallas_kernels.lanes` without PTX, for Pallas' interpreter: one element after the other."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.lanes import LANES


def inside(ref, i):
    return (i >= 0) & (i < ref.shape[0])


def gather(ref, index):
    x = lax.bitcast_convert_type(ref[...], jnp.int32)
    return jnp.where(inside(ref, index), x[jnp.clip(index, 0, ref.shape[0] - 1)], -1)


def scatter(ref, index, values, combine=lambda new, old: new):
    def put(i, _):
        @pl.when(inside(ref, index[i]))
        def _():
            ref[index[i]] = combine(values[i], ref[index[i]])

    lax.fori_loop(0, index.size, put, None)


def scatter_or(ref, index, values):
    scatter(ref, index, values, lambda new, old: new | old)


def count_bits(x):
    return lax.population_count(x)


def pack_bfloat16(low, high):
    return lax.bitcast_convert_type(jnp.stack([low, high], axis=-1).astype(jnp.bfloat16), jnp.int32)


def of_warps(function):
    """By running sums and their like in both directions: the interpreter broadcasts nothing within a mesh."""
    return lambda x: function(x.reshape(-1, LANES)).reshape(x.shape)


warp_max = of_warps(lambda x: lax.cummax(lax.cummax(x, axis=1), axis=1, reverse=True))
warp_min = of_warps(lambda x: lax.cummin(lax.cummin(x, axis=1), axis=1, reverse=True))
warp_sum = of_warps(lambda x: lax.cumsum(x, axis=1) + lax.cumsum(x, axis=1, reverse=True) - x)

warp_sum_so_far = of_warps(lambda x: lax.cumsum(x, axis=1))


def install(monkeypatch, kernel) -> None:
    """In place of what the kernel's module has imported."""
    warps = "warp_max", "warp_min", "warp_sum", "warp_sum_so_far"
    for name in ("gather", "scatter", "scatter_or", "count_bits", "pack_bfloat16", *warps):
        monkeypatch.setattr(kernel, name, globals()[name], raising=False)
