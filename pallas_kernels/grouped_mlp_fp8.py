"""A mixture's experts in 8-bit floats, for inference: `grouped_mlp` with 8-bit weights, activations quantised on the way.

Rows are quantised once for gate and up, and the hidden values, which carry the row weights, again for down: as in grouped_mlp.py
they are computed in float32, from products rounded to bfloat16. Letters: see reference.py; D model, F hidden.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul_fp8 import Fp8Weights, grouped_matmul_fp8, no_gradient, quantise_rows
from pallas_kernels.grouped_matmul_xla import repeated
from pallas_kernels.grouped_mlp import check_rows


@functools.partial(jax.custom_vjp, nondiff_argnames=("row_unit", "implementation"))
def grouped_mlp_fp8(
    x_MD,
    weight_M,
    w_gate: Fp8Weights,
    w_up: Fp8Weights,
    w_down: Fp8Weights,
    group_sizes_E,
    row_unit: int,
    implementation: str | None = None,
) -> jax.Array:
    """`reference.grouped_mlp` of the weights that values [E, F, D] and [E, D, F] stand for: [M, D] in x's dtype.

    Both dimensions of the weights are multiples of 128, beyond what they hold zeros; x may have fewer columns than D, which then
    come back.

    Raises: ValueError, if the implementation is "pallas" and cannot run, with the reason, or if x has neither as many rows as there are
        weights nor at most `row_unit`; TypeError, if it is differentiated.
    """
    check_rows(x_MD, weight_M, row_unit)
    multiply = functools.partial(
        grouped_matmul_fp8, group_sizes_E=group_sizes_E, row_unit=row_unit, implementation=implementation
    )
    columns, x_MD = x_MD.shape[1], repeated(x_MD, len(weight_M), row_unit)
    x = quantise_rows(jnp.pad(x_MD, ((0, 0), (0, w_gate.values_EFK.shape[2] - columns))), implementation)
    gate_MF, up_MF = (multiply(x, w).astype(jnp.float32) for w in (w_gate, w_up))
    hidden_MF = weight_M[:, None] * jax.nn.silu(gate_MF) * up_MF
    out_MD = multiply(quantise_rows(hidden_MF.astype(x_MD.dtype), implementation), w_down)
    return out_MD[:, :columns].astype(x_MD.dtype)


def _forward(x_MD, weight_M, w_gate, w_up, w_down, group_sizes_E, row_unit, implementation):
    return grouped_mlp_fp8(x_MD, weight_M, w_gate, w_up, w_down, group_sizes_E, row_unit, implementation), None


grouped_mlp_fp8.defvjp(_forward, no_gradient)
