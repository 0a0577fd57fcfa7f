"""Grouped expert matmul: rows in expert order, each multiplied with its own expert's matrix, forward and backward.

Groups begin at multiples of `row_unit`, so that a block of `row_unit` rows belongs to one expert. Rows of no group, behind the
last one, are never read; what is in them afterwards is not specified. Rows that pad a group to `row_unit` must be zero (in grouped_mlp.py: have
weight zero), and come out as zero. Letters: see reference.py.
"""

import functools
from types import SimpleNamespace

import jax

from pallas_kernels import grouped_matmul_hopper, grouped_matmul_xla, grouped_wgrad_hopper
from pallas_kernels.dispatch import choose
from pallas_kernels.tickets import EXPERTS

PARTS = {
    "xla": grouped_matmul_xla,
    "pallas": SimpleNamespace(
        matmul=grouped_matmul_hopper.matmul,
        swiglu=grouped_matmul_hopper.swiglu,
        weight_gradients=grouped_wgrad_hopper.weight_gradients,
    ),
}


def row_unit(rows: int, experts: int, implementation: str | None = None) -> int:
    """The block height for `rows` rows over `experts` groups; it decides how many rows are multiplied for padding's sake.

    The Hopper kernels take 16 (V2, 307 rows an expert: 0.938 of a dense matmul's rate, and 0.921 with 32), and 32 where that pads
    little and halves the time to compile them (V2-Lite, 1536 rows: 0.925 and 0.929). The others do a block at a time: a power of
    two near half a group.
    """
    if choose(implementation, None) == "pallas":
        return 32 if rows >= 768 * experts else 16
    return min(128, max(8, 1 << (max(rows // (2 * experts), 1) - 1).bit_length()))


def padded_rows(rows: int, experts: int, unit: int) -> int:
    """Rows that always suffice for `rows` rows in `experts` groups, each padded to `unit`."""
    groups = min(rows, experts)
    return -(-(rows + groups * (unit - 1)) // unit) * unit


def unsupported(x_MK: jax.Array, ws: list, unit: int) -> str | None:
    """Why the Hopper kernels cannot take these operands; None if they can."""
    dtypes = sorted({str(a.dtype) for a in (x_MK, *ws)})
    if dtypes != ["bfloat16"]:
        return f"the operands are {', '.join(dtypes)}, expected bfloat16"
    # Of a dimension of one block of 64 a TMA copy has no index, and what lies outside would be stored inside.
    if any(size % 64 or size < 128 for w in ws for size in w.shape[1:]):
        return f"the weights are {', '.join(str(w.shape) for w in ws)}, expected dimensions of 128 or more that 64 divides"
    if len(ws[0]) > EXPERTS:
        return f"there are {len(ws[0])} experts, expected {EXPERTS} or fewer"
    if unit not in (16, 32, 64):
        return f"row_unit is {unit}, expected 16, 32 or 64"
    if x_MK.shape[0] % unit or x_MK.shape[0] < 64:
        return f"there are {x_MK.shape[0]} rows, expected 64 or more and a multiple of row_unit, {unit}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnames=("row_unit", "implementation"))
def grouped_matmul(x_MK, w_EKF, group_sizes_E, row_unit: int, implementation: str | None = None) -> jax.Array:
    """See `reference.grouped_matmul`: same arguments, and the same result in rows of groups; differentiable in x and w.

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason.
    """
    return _parts(x_MK, w_EKF, row_unit, implementation).matmul([x_MK], [w_EKF], group_sizes_E, row_unit)


def _parts(x_MK, w_EKF, row_unit, implementation):
    return PARTS[choose(implementation, unsupported(x_MK, [w_EKF], row_unit))]


def _forward(x_MK, w_EKF, group_sizes_E, row_unit, implementation):
    return grouped_matmul(x_MK, w_EKF, group_sizes_E, row_unit, implementation), (x_MK, w_EKF, group_sizes_E)


def _backward(row_unit, implementation, saved, g_MF):
    x_MK, w_EKF, group_sizes_E = saved
    parts = _parts(x_MK, w_EKF, row_unit, implementation)
    dx_MK = parts.matmul([g_MF], [w_EKF], group_sizes_E, row_unit, transposed=True)
    (dw_EKF,) = parts.weight_gradients(x_MK, [g_MF], group_sizes_E, row_unit, w_EKF.dtype)
    return dx_MK, dw_EKF, None


grouped_matmul.defvjp(_forward, _backward)
