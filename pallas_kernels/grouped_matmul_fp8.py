"""Grouped expert matmul in 8-bit floats (e4m3), for inference: nothing here has a gradient.

Weights carry a float32 scale for each block of 128 x 128, activations one for each 128 columns of a row (DeepSeek-V3, section
3.3.2, and its checkpoints). Hopper adds 8-bit products with about 14 bits, so that the partial sums of every 128 columns are
scaled and added in float32. The result differs from that of bfloat16 operands by 3.6% (normal values, either model's K), nearly all
of it the operands' own rounding; from the exact product of the 8-bit operands by bfloat16's rounding, and 0.07% besides.

Letters: M rows, K and F matmul dims, E experts, G and H blocks of 128 columns in K and F, U rows of a block.
"""

import functools
import math
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import grouped_matmul_fp8_hopper, quantise_rows_hopper
from pallas_kernels.dispatch import choose
from pallas_kernels.tickets import EXPERTS

BLOCK = 128  # columns under one scale
UNIT = 8  # rows: the kernels take multiples
LEAST = 1e-12  # of the activations' magnitudes: no scale is zero
LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)  # 448
NOTHING = 2.0**-100  # a block of weights below it is one of zeros


class Fp8Weights(NamedTuple):
    """Expert matrices, K last: Hopper multiplies 8-bit operands only where both have K contiguous."""

    values_EFK: jax.Array  # e4m3
    scales_EHG: jax.Array  # float32


class Fp8Rows(NamedTuple):
    """Activations; a block's scales for all rows lie together."""

    values_MK: jax.Array  # e4m3
    scales_GM: jax.Array  # float32


def quantise_weights(w_EKF: jax.Array) -> Fp8Weights:
    """Expert matrices [E, K, F] of any float dtype in blocks of 128 x 128, whose largest magnitude becomes 448.

    A scale keeps 21 bits, so that 448 times it is a float32: what the result stands for gives the same result again. Of a block
    of zeros it is 1.

    Raises: ValueError, if K or F is no multiple of 128.
    """
    blocks_EGKHF = _split(_split(w_EKF, 2, "F"), 1, "K").astype(jnp.float32)
    largest_EGH = jnp.abs(blocks_EGKHF).max(axis=(2, 4))
    bits_EGH = lax.bitcast_convert_type(largest_EGH * (1 / LARGEST), jnp.uint32)
    scales_EGH = jnp.where(largest_EGH < NOTHING, 1.0, lax.bitcast_convert_type(bits_EGH + 4 & ~jnp.uint32(7), jnp.float32))
    scales_EKF = jnp.repeat(jnp.repeat(scales_EGH, BLOCK, axis=1), BLOCK, axis=2)
    values_EKF = (w_EKF.astype(jnp.float32) / scales_EKF).astype(jnp.float8_e4m3fn)
    return Fp8Weights(values_EKF.swapaxes(1, 2), scales_EGH.swapaxes(1, 2))


def quantise_rows(x_MK: jax.Array, implementation: str | None = None) -> Fp8Rows:
    """Rows [M, K] of any float dtype in blocks of 128 columns; zeros stay zeros. Quantise tokens before copying them to experts.

    Raises: ValueError, if K is no multiple of 128, or the implementation is "pallas" and cannot run, with the reason.
    """
    blocks_MGK = _split(x_MK, 1, "K").astype(jnp.float32)
    unsupported = None
    if x_MK.dtype != jnp.bfloat16:
        unsupported = f"the rows are {x_MK.dtype}, expected bfloat16"
    elif x_MK.shape[0] == 0 or x_MK.shape[0] % UNIT:
        unsupported = f"there are {x_MK.shape[0]} rows, expected a multiple of {UNIT}"
    if choose(implementation, unsupported) == "pallas":
        return Fp8Rows(*quantise_rows_hopper.quantise_rows(x_MK, LEAST, LARGEST))
    scales_MG = jnp.maximum(jnp.abs(blocks_MGK).max(axis=2), LEAST) * (1 / LARGEST)
    values_MGK = (blocks_MGK * (1 / scales_MG)[:, :, None]).astype(jnp.float8_e4m3fn)
    return Fp8Rows(values_MGK.reshape(x_MK.shape), scales_MG.T)


def grouped_matmul_fp8(x, w: Fp8Weights, group_sizes_E, row_unit: int, implementation: str | None = None) -> jax.Array:
    """See `reference.grouped_matmul_fp8`: the same result in rows of groups, rounded to bfloat16.

    Args:
        x: Fp8Rows, or rows [M, K] of any float dtype, which are quantised first. M is a multiple of `row_unit`.

    Raises: ValueError, if K or F is no multiple of 128, x and w differ in K, or the implementation is "pallas" and cannot run, with
        the reason.
    """
    x = x if isinstance(x, Fp8Rows) else quantise_rows(x)
    (rows, depth), (_, columns, w_depth) = x.values_MK.shape, w.values_EFK.shape
    if depth != w_depth:
        raise ValueError(f"x has {depth} columns, expected K of w, {w_depth}")
    for name, size in (("K", depth), ("F", columns)):
        if size % BLOCK:
            raise ValueError(f"{name} is {size}, expected a multiple of {BLOCK}")
    unsupported = None
    if row_unit % UNIT:
        unsupported = f"row_unit is {row_unit}, expected a multiple of {UNIT}"
    elif rows % row_unit or not rows:
        unsupported = f"there are {rows} rows, expected a multiple of row_unit, {row_unit}"
    elif len(w.values_EFK) > EXPERTS:
        unsupported = f"there are {len(w.values_EFK)} experts, expected {EXPERTS} or fewer"
    if choose(implementation, unsupported) == "pallas":
        return grouped_matmul_fp8_hopper.matmul(x, w, group_sizes_E, row_unit)
    return _by_blocks(x, w, group_sizes_E, row_unit)


@functools.partial(jax.custom_vjp, nondiff_argnames="implementation")
def matmul_fp8(x, w: Fp8Weights, implementation: str | None = None) -> jax.Array:
    """Rows [..., K] of any float dtype times one matrix, values [F, K], in x's dtype: quantised as above, rounded to bfloat16.

    K and F of `w` are multiples of 128; x may have fewer columns, those of zeros at w's end.

    Raises: ValueError, as `grouped_matmul_fp8`; TypeError, if it is differentiated.
    """
    rows = math.prod(x.shape[:-1])
    x_MK = jnp.pad(x.reshape(rows, x.shape[-1]), ((0, -rows % UNIT), (0, w.values_EFK.shape[-1] - x.shape[-1])))
    sizes_E = lax.full((1,), x_MK.shape[0], jnp.int32)
    quantised = quantise_rows(x_MK, implementation)
    out_MF = grouped_matmul_fp8(quantised, Fp8Weights(*(a[None] for a in w)), sizes_E, UNIT, implementation)
    return out_MF[:rows].reshape(*x.shape[:-1], -1).astype(x.dtype)


def no_gradient(*_) -> NoReturn:
    raise TypeError("8-bit weights are for inference: what they are multiplied with has no gradient")


matmul_fp8.defvjp(lambda x, w, implementation: (matmul_fp8(x, w, implementation), None), no_gradient)


def _split(x: jax.Array, axis: int, name: str) -> jax.Array:
    """Cuts an axis into blocks."""
    if x.shape[axis] % BLOCK:
        raise ValueError(f"{name} is {x.shape[axis]}, expected a multiple of {BLOCK}")
    return x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])


def _by_blocks(x: Fp8Rows, w: Fp8Weights, group_sizes_E: jax.Array, row_unit: int) -> jax.Array:
    """Loops over the used blocks of `row_unit` rows; each is of one expert, and multiplied in float32."""
    last_E = jnp.cumsum(-(-group_sizes_E // row_unit))
    block_expert = jnp.searchsorted(last_E, jnp.arange(x.values_MK.shape[0] // row_unit), side="right")

    def multiply_block(block, out_MF):
        values_UK = lax.dynamic_slice_in_dim(x.values_MK, block * row_unit, row_unit)
        scales_GU = lax.dynamic_slice_in_dim(x.scales_GM, block * row_unit, row_unit, axis=1)
        expert = block_expert[block]
        x_UK = values_UK.astype(jnp.float32) * jnp.repeat(scales_GU, BLOCK, axis=0).T
        scales_FK = jnp.repeat(jnp.repeat(w.scales_EHG[expert], BLOCK, axis=0), BLOCK, axis=1)
        w_FK = w.values_EFK[expert].astype(jnp.float32) * scales_FK
        out_UF = lax.dot_general(x_UK, w_FK, (((1,), (1,)), ((), ())), lax.Precision.HIGHEST)
        return lax.dynamic_update_slice_in_dim(out_MF, out_UF.astype(out_MF.dtype), block * row_unit, 0)

    shape = x.values_MK.shape[0], w.values_EFK.shape[1]
    return lax.fori_loop(0, last_E[-1], multiply_block, lax.full_like(x.values_MK, 0, jnp.bfloat16, shape))
