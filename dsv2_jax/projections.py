"""Products of tokens and parameters, whether these are as they were drawn or stored, or in 8-bit floats (see fp8.py).

With 8-bit weights activations are quantised on the way and products rounded to bfloat16, see pallas_kernels/grouped_matmul_fp8.py.
Letters: B batch, T positions, D model, M rows in expert order, E experts, K and F a matrix's inputs and outputs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsv2_jax.fp8 import BLOCK, MULTIPLIED, Fp8Matrix
from pallas_kernels.grouped_matmul_fp8 import Fp8Weights, matmul_fp8, quantise_weights
from pallas_kernels.grouped_mlp import grouped_mlp
from pallas_kernels.grouped_mlp_fp8 import grouped_mlp_fp8
from sharding import specs

Weight = nnx.Param | Fp8Matrix


def project(subscripts: str, x_BTK: jax.Array, w: Weight) -> jax.Array:
    """`jnp.einsum` of tokens [B, T, K] and a parameter [K, *outputs] over K, in x's dtype."""
    if not isinstance(w, Fp8Matrix):
        return jnp.einsum(subscripts, x_BTK, w)
    # Kernels know no mesh: each device multiplies its own sequences.
    y_BTF = jax.shard_map(matmul_fp8, out_specs=specs.activations_BTD)(x_BTK, _operand(w))
    return y_BTF[..., : math.prod(w.outputs)].reshape(*x_BTK.shape[:2], *w.outputs)


def project_experts(
    rows_MD: jax.Array, weight_M: jax.Array, weights: tuple[Weight, Weight, Weight], group_sizes_E: jax.Array, row_unit: int
) -> jax.Array:
    """`reference.grouped_mlp` with the experts' gate, up and down."""
    if isinstance(weights[0], Fp8Matrix):
        return grouped_mlp_fp8(rows_MD, weight_M, *map(_operand, weights), group_sizes_E, row_unit)
    return grouped_mlp(rows_MD, weight_M, *(w[...] for w in weights), group_sizes_E, row_unit)


def _operand(w: Fp8Matrix) -> Fp8Weights:
    return Fp8Weights(w.values, w.scales)


def exact(w: Weight) -> jax.Array:
    """What a weight, or a stack of them, stands for, in float32."""
    if not isinstance(w, Fp8Matrix):
        return w[...].astype(jnp.float32)
    outputs = math.prod(w.outputs)
    scales = jnp.repeat(jnp.repeat(w.scales, BLOCK, axis=-2), BLOCK, axis=-1)
    w_FK = (w.values.astype(jnp.float32) * scales)[..., :outputs, : w.inputs]
    return w_FK.swapaxes(-1, -2).reshape(w.shape)


def quantised(layer: Any) -> Any:
    """A layer's module with its large matrices in 8 bits."""

    def quantise(path: tuple[Any, ...], param: nnx.Param) -> Weight:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if name not in MULTIPLIED:
            return param
        w, stacked = param[...], int("experts" in jax.tree_util.keystr(path))
        inputs, *outputs = w.shape[stacked:]
        w_EKF = w.reshape(*(w.shape[:stacked] or (1,)), inputs, math.prod(outputs))
        w_EKF = jnp.pad(w_EKF, [(0, 0), *((0, -n % BLOCK) for n in w_EKF.shape[1:])])
        values_EFK, scales_EHG = quantise_weights(w_EKF)
        return Fp8Matrix(*((values_EFK, scales_EHG) if stacked else (values_EFK[0], scales_EHG[0])), inputs, tuple(outputs))

    return jax.tree.map_with_path(quantise, layer, is_leaf=lambda node: isinstance(node, nnx.Param))
