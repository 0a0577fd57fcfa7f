"""Grouped expert matmul: rows in expert order, each multiplied with its own expert's matrix, forward and backward.

Groups begin at multiples of `row_unit`, so that a block of `row_unit` rows belongs to one expert: a loop over the used blocks
does the work of the rows that exist, and nothing of size [E, M, F] is ever made (`jax.lax.ragged_dot` is a dense expansion on
GPU and CPU). Letters: see reference.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def row_unit(rows: int, experts: int) -> int:
    """The block height for `rows` rows over `experts` groups: a power of two near half a group, so that padding stays small."""
    return min(128, max(8, 1 << (max(rows // (2 * experts), 1) - 1).bit_length()))


def padded_rows(rows: int, experts: int, unit: int) -> int:
    """Rows that always suffice for `rows` rows in `experts` groups, each padded to `unit`."""
    groups = min(rows, experts)
    return -(-(rows + groups * (unit - 1)) // unit) * unit


@functools.partial(jax.custom_vjp, nondiff_argnames=("row_unit",))
def grouped_matmul(x_MK, w_EKF, group_sizes_E, row_unit: int) -> jax.Array:
    """See `reference.grouped_matmul`: same arguments, same result, differentiable in x and w. M is a multiple of `row_unit`."""
    return _rows_by_expert(x_MK, w_EKF, group_sizes_E, row_unit, (((1,), (0,)), ((), ())))


def _forward(x_MK, w_EKF, group_sizes_E, row_unit):
    return grouped_matmul(x_MK, w_EKF, group_sizes_E, row_unit=row_unit), (x_MK, w_EKF, group_sizes_E)


def _backward(row_unit, saved, g_MF):
    x_MK, w_EKF, group_sizes_E = saved
    dx_MK = _rows_by_expert(g_MF, w_EKF, group_sizes_E, row_unit, (((1,), (1,)), ((), ())))
    block_expert, used = _blocks(group_sizes_E, row_unit, x_MK.shape[0])

    def add_block(block, dw_EKF):
        x_UK = lax.dynamic_slice_in_dim(x_MK, block * row_unit, row_unit)
        g_UF = lax.dynamic_slice_in_dim(g_MF, block * row_unit, row_unit)
        expert = block_expert[block]
        dw_KF = dw_EKF[expert] + _dot(x_UK, g_UF, (((0,), (0,)), ((), ())))
        return lax.dynamic_update_index_in_dim(dw_EKF, dw_KF, expert, 0)

    dw_EKF = lax.fori_loop(0, used, add_block, lax.full_like(w_EKF, 0, jnp.float32))
    return dx_MK.astype(x_MK.dtype), dw_EKF.astype(w_EKF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _blocks(group_sizes_E, row_unit, rows) -> tuple[jax.Array, jax.Array]:
    """The expert of each block of rows, and the number of blocks in use."""
    last_E = jnp.cumsum(-(-group_sizes_E // row_unit))
    return jnp.searchsorted(last_E, jnp.arange(rows // row_unit), side="right"), last_E[-1]


def _rows_by_expert(x_MA, w_EAB, group_sizes_E, row_unit, dimension_numbers) -> jax.Array:
    """Loops over the used blocks; padding rows inside a block must be zero in x, and come out as zero."""
    block_expert, used = _blocks(group_sizes_E, row_unit, x_MA.shape[0])

    def multiply_block(block, out_MB):
        x_UA = lax.dynamic_slice_in_dim(x_MA, block * row_unit, row_unit)
        out_UB = _dot(x_UA, w_EAB[block_expert[block]], dimension_numbers)
        return lax.dynamic_update_slice_in_dim(out_MB, out_UB.astype(out_MB.dtype), block * row_unit, 0)

    width = w_EAB.shape[2] if dimension_numbers[0][1] == (0,) else w_EAB.shape[1]
    return lax.fori_loop(0, used, multiply_block, lax.full_like(x_MA, 0, shape=(x_MA.shape[0], width)))


def _dot(a: jax.Array, b: jax.Array, dimension_numbers) -> jax.Array:
    """Accumulates in float32; float32 operands are not rounded to TF32, in a backward pass either, where no context reaches."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimension_numbers, precision, preferred_element_type=jnp.float32)
