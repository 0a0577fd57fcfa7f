"""The grouped matmul's parts for any machine: loops over the used blocks of rows.

A block of `row_unit` rows belongs to one expert, so that the work is that of the rows that exist, and nothing of size [E, M, F]
is ever made (`jax.lax.ragged_dot` is a dense expansion on GPU and CPU). The functions are those of grouped_matmul_hopper.py and
grouped_wgrad_hopper.py. Rows of no group come out as zero. Letters: as there, U rows of a block.
"""

import jax
import jax.numpy as jnp
from jax import lax


def matmul(xs_MA: list, ws: list, group_sizes_E: jax.Array, row_unit: int, transposed: bool = False) -> jax.Array:
    dimension_numbers = (((1,), (1 if transposed else 0,)), ((), ()))
    block_expert, used = _blocks(group_sizes_E, row_unit, xs_MA[0].shape[0])

    def multiply_block(block, out_MB):
        out_UB = sum(_dot(_block(x_MA, block, row_unit), w[block_expert[block]], dimension_numbers) for x_MA, w in zip(xs_MA, ws))
        return lax.dynamic_update_slice_in_dim(out_MB, out_UB.astype(out_MB.dtype), block * row_unit, 0)

    shape = xs_MA[0].shape[0], ws[0].shape[1 if transposed else 2]
    return lax.fori_loop(0, used, multiply_block, lax.full_like(xs_MA[0], 0, shape=shape))


def swiglu(x_MD, weight_M, w_gate_EDF, w_up_EDF, group_sizes_E, row_unit: int, save: bool) -> list[jax.Array]:
    x_MD = repeated(x_MD, len(weight_M), row_unit)
    gate_MF, up_MF = (matmul([x_MD], [w], group_sizes_E, row_unit) for w in (w_gate_EDF, w_up_EDF))
    hidden_MF = weight_M[:, None] * jax.nn.silu(gate_MF.astype(jnp.float32)) * up_MF.astype(jnp.float32)
    return [hidden_MF.astype(x_MD.dtype), gate_MF, up_MF][: 3 if save else 1]


def repeated(x_MD: jax.Array, rows: int, row_unit: int) -> jax.Array:
    """Rows that each group has, of which there are fewer than rows of all groups, filled up to a unit and once for each: [rows, D]."""
    return x_MD if len(x_MD) == rows else jnp.tile(jnp.pad(x_MD, ((0, row_unit - len(x_MD)), (0, 0))), (rows // row_unit, 1))


def weight_gradients(x_MA, dys_MB: list, group_sizes_E, row_unit: int, dtype: jnp.dtype) -> list[jax.Array]:
    block_expert, used = _blocks(group_sizes_E, row_unit, x_MA.shape[0])

    def add_block(block, dw_EAB, dy_MB):
        expert = block_expert[block]
        dw_AB = _dot(_block(x_MA, block, row_unit), _block(dy_MB, block, row_unit), (((0,), (0,)), ((), ())))
        return lax.dynamic_update_index_in_dim(dw_EAB, dw_EAB[expert] + dw_AB, expert, 0)

    def add_blocks(block, dws_EAB):
        return [add_block(block, dw_EAB, dy_MB) for dw_EAB, dy_MB in zip(dws_EAB, dys_MB)]

    shapes = [(group_sizes_E.shape[0], x_MA.shape[1], dy_MB.shape[1]) for dy_MB in dys_MB]
    zeros_EAB = [lax.full_like(x_MA, 0, jnp.float32, shape=shape) for shape in shapes]
    return [dw_EAB.astype(dtype) for dw_EAB in lax.fori_loop(0, used, add_blocks, zeros_EAB)]


def _blocks(group_sizes_E, row_unit, rows) -> tuple[jax.Array, jax.Array]:
    """The expert of each block of rows, and the number of blocks in use."""
    last_E = jnp.cumsum(-(-group_sizes_E // row_unit))
    return jnp.searchsorted(last_E, jnp.arange(rows // row_unit), side="right"), last_E[-1]


def _block(x_MA, block, row_unit) -> jax.Array:
    return lax.dynamic_slice_in_dim(x_MA, block * row_unit, row_unit)


def _dot(a: jax.Array, b: jax.Array, dimension_numbers) -> jax.Array:
    """Accumulates in float32; float32 operands are not rounded to TF32, in a backward pass either, where no context reaches."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimension_numbers, precision, preferred_element_type=jnp.float32)
