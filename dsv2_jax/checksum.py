"""A checksum of arrays that does not depend on how they are split over devices, nor on whether it is computed there or on the host."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec


def _mix(bits: Any) -> Any:
    """A bijection of uint32 whose every output bit depends on every input bit (MurmurHash3's finalizer); numpy or jax."""
    bits = (bits ^ bits >> 16) * np.uint32(0x85EBCA6B)
    bits = (bits ^ bits >> 13) * np.uint32(0xC2B2AE35)
    return bits ^ bits >> 16


# Of each of the two sums: a start, and an odd factor for each axis.
KEYS = _mix(np.arange(1, 19, dtype=np.uint32).reshape(2, 9)) | np.uint32(1)
BLOCK = 1 << 15  # elements: temporaries stay in a core's cache


def _word(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"uint{8 * min(dtype.itemsize, 4)}")


def checksums(array: jax.Array, stacked: int) -> np.ndarray:
    """uint32 [*chunks, 2] of an array whose first `stacked` axes number its chunks: the same on every mesh and process.

    Two sums, modulo 2**32, of mixed words: the bits of each 32 (or fewer) of an element, xor a key of its place in the chunk.
    It waits: many small programs that communicate, all in flight, deadlock on fake CPU devices.
    """
    return np.asarray(_checksums(array, stacked))


@functools.partial(jax.jit, static_argnames="stacked")
def _checksums(array: jax.Array, stacked: int) -> jax.Array:
    words = jax.lax.bitcast_convert_type(array, _word(array.dtype)).astype(jnp.uint32)
    axes = range(stacked, words.ndim)
    iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, words.shape, out_sharding=jax.typeof(words).sharding)
    keys = [sum((iota(axis) * factor for axis, factor in zip(axes, factors)), start) for start, *factors in KEYS]
    sums = [_mix(words ^ key).sum(tuple(axes), dtype=jnp.uint32) for key in keys]  # a GPU fuses it all: no temporary arrays
    return jax.sharding.reshard(jnp.stack(sums, axis=-1), PartitionSpec())


def chunk_checksum(chunk: np.ndarray) -> np.ndarray:
    """uint32 [2]: `checksums` of one chunk, on the host."""
    words = np.ascontiguousarray(chunk).view(_word(chunk.dtype))
    if chunk.dtype.itemsize == 8:
        words = words.reshape(*chunk.shape, 2)
    *outer, width = words.shape or (1,)
    words = words.reshape(-1, width)
    height = max(BLOCK // max(width, 1), 1)
    sums = []
    for start, *factors in KEYS:
        *places, columns = [np.arange(n, dtype=np.uint32) * factor for n, factor in zip((*outer, width), factors)]
        rows = functools.reduce(np.add.outer, places, start).reshape(-1, 1)
        blocks = [slice(i, i + height) for i in range(0, len(words), height)]
        sums.append([_mix(words[block] ^ (rows[block] + columns)).sum(dtype=np.uint32) for block in blocks])
    return np.array(sums, np.uint32).sum(axis=1, dtype=np.uint32)
