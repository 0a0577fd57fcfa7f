"""A mixture's experts at once: rows in expert order through their own SwiGLU, forward and backward (DeepSeek-V2, eq. 20).

A row's router weight scales its hidden values in float32, before they are rounded, and not its output. Combining is then a plain
sum, and the weight's gradient needs no output: it is the product of the hidden values with their own gradient. Rows of no group,
and rows that pad a group: see grouped_matmul.py. x may also have at most row_unit rows, the first ones of every group: each group's
size is then row_unit or 0, and the weights of rows that are not its own are zero.

Letters: see reference.py; D model, F hidden, N units of U rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.dispatch import choose
from pallas_kernels.einsum import PRODUCT
from pallas_kernels.grouped_matmul import PARTS, unsupported
from pallas_kernels.grouped_matmul_xla import repeated


@functools.partial(jax.custom_vjp, nondiff_argnames=("row_unit", "implementation"))
def grouped_mlp(
    x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, row_unit: int, implementation: str | None = None
) -> jax.Array:
    """See `reference.grouped_mlp`: same arguments, and the same result in rows of groups; differentiable in all but the sizes.

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason; or if x has neither as many rows as there are
        weights nor at most `row_unit`.
    """
    check_rows(x_MD, weight_M, row_unit)
    parts = _parts(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, row_unit, implementation)
    (hidden_MF,) = parts.swiglu(x_MD, weight_M, w_gate_EDF, w_up_EDF, group_sizes_E, row_unit, save=False)
    return parts.matmul([hidden_MF], [w_down_EFD], group_sizes_E, row_unit)


def check_rows(x_MD: jax.Array, weight_M: jax.Array, row_unit: int) -> None:
    """Raises: ValueError, if the rows are neither all nor those of every group."""
    if len(x_MD) != len(weight_M) and len(x_MD) > row_unit:
        raise ValueError(
            f"x has {len(x_MD)} rows, expected {len(weight_M)}, as there are weights, or row_unit, {row_unit}, at most"
        )


def _parts(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, row_unit, implementation):
    rows_MD = jax.ShapeDtypeStruct((len(weight_M), x_MD.shape[1]), x_MD.dtype)
    return PARTS[choose(implementation, unsupported(rows_MD, [w_gate_EDF, w_up_EDF, w_down_EFD], row_unit))]


def _forward(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, row_unit, implementation):
    parts = _parts(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, row_unit, implementation)
    hidden_MF, gate_MF, up_MF = parts.swiglu(x_MD, weight_M, w_gate_EDF, w_up_EDF, group_sizes_E, row_unit, save=True)
    out_MD = parts.matmul([hidden_MF], [w_down_EFD], group_sizes_E, row_unit)
    products = checkpoint_name(gate_MF, PRODUCT), checkpoint_name(up_MF, PRODUCT)
    return out_MD, (x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, *products)


def _backward(row_unit, implementation, saved, dout_MD):
    few_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_E, gate_MF, up_MF = saved
    x_MD = repeated(few_MD, len(weight_M), row_unit)
    parts = _parts(x_MD, weight_M, w_gate_EDF, w_up_EDF, w_down_EFD, row_unit, implementation)
    dhidden_MF = parts.matmul([dout_MD], [w_down_EFD], group_sizes_E, row_unit, transposed=True)
    used = (-(-group_sizes_E // row_unit) * row_unit).sum()
    in_group_M = jnp.arange(x_MD.shape[0]) < used
    hidden_MF, dgate_MF, dup_MF, dweight_M = _swiglu_gradients(gate_MF, up_MF, dhidden_MF, weight_M, in_group_M)
    (dw_down_EFD,) = parts.weight_gradients(hidden_MF, [dout_MD], group_sizes_E, row_unit, w_down_EFD.dtype)
    dx_MD = parts.matmul([dgate_MF, dup_MF], [w_gate_EDF, w_up_EDF], group_sizes_E, row_unit, transposed=True)
    if len(few_MD) < len(x_MD):
        dx_NUD = jnp.where(in_group_M[:, None], dx_MD, 0).reshape(-1, row_unit, x_MD.shape[1])
        dx_MD = dx_NUD.sum(axis=0, dtype=jnp.float32)[: len(few_MD)]
    dw_EDF = parts.weight_gradients(x_MD, [dgate_MF, dup_MF], group_sizes_E, row_unit, w_gate_EDF.dtype)
    return dx_MD.astype(x_MD.dtype), dweight_M, *dw_EDF, dw_down_EFD, None


def _swiglu_gradients(gate_MF, up_MF, dhidden_MF, weight_M, in_group_M) -> list[jax.Array]:
    """The hidden values again, and the gradients of gate, up and row weight: one pass over memory. Zero in rows of no group."""
    gate, up, dhidden = (a.astype(jnp.float32) for a in (gate_MF, up_MF, dhidden_MF))
    sigmoid, weight = jax.nn.sigmoid(gate), weight_M[:, None].astype(jnp.float32)
    silu = gate * sigmoid
    dup = dhidden * weight * silu
    dgate = dhidden * weight * up * (sigmoid + silu * (1 - sigmoid))
    hidden, dgate, dup = (jnp.where(in_group_M[:, None], a, 0).astype(gate_MF.dtype) for a in (weight * silu * up, dgate, dup))
    dweight_M = jnp.where(in_group_M, (silu * up * dhidden).sum(axis=1), 0).astype(weight_M.dtype)
    return hidden, dgate, dup, dweight_M


grouped_mlp.defvjp(_forward, _backward)
