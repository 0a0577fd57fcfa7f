"""Weights in 8-bit floats (e4m3) with a float32 scale for each block of 128 x 128 (DeepSeek-V3, section 3.3.2, and its checkpoints).

What they stand for is value times scale. In a model an `Fp8Matrix` stands where a parameter stood; projections.py makes and
multiplies it. In a checkpoint a parameter of e4m3 has another beside it, its name with SCALES: float32 [H, G] a matrix, or [F, G]
where its blocks begin within another parameter's. Letters: K and F a matrix's inputs and outputs, G and H blocks of 128 in them.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np

from dsv2_jax.tensor_files import DTYPES, copy

SCALES = ".scales"
FLOAT8 = DTYPES["F8_E4M3"]
BLOCK = 128  # rows and columns under one scale
LARGEST = float(ml_dtypes.finfo(FLOAT8).max)  # 448
NOTHING = 2.0**-100  # a block below it is one of zeros
# Matrices that are quantised. The key's rotary part and what is used absorbed, head by head, are so in checkpoints alone: in a
# model they are a 128th of the 236B's bytes, and multiply as they are.
MULTIPLIED = frozenset({"w_q", "w_dq", "w_uq", "w_dkv", "w_o", "w_gate", "w_up", "w_down"})
STORED = MULTIPLIED | {"w_kr", "w_uk", "w_uv"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Matrix:
    """Stands for a parameter [..., inputs, *outputs]; F is the product of its outputs. Zeros fill the last blocks."""

    values: jax.Array  # e4m3 [..., F, K], in whole blocks
    scales: jax.Array  # float32 [..., H, G]
    inputs: int = dataclasses.field(metadata={"static": True})
    outputs: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.values.shape[:-2], self.inputs, *self.outputs


# -- on the host

with np.errstate(invalid="ignore"):
    CODES = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(FLOAT8).view(np.uint8)
NUMBERS = np.arange(2**8, dtype=np.uint8).view(FLOAT8).astype(np.float32)


def as_matrix(w: np.ndarray) -> np.ndarray:
    """A parameter [K, *outputs] as [F, K], the form of checkpoints and kernels: a view where that can be."""
    return w.reshape(len(w), -1).T


def blocks_of(shape: tuple[int, int]) -> tuple[int, int]:
    """How many blocks [H, G] hold a matrix [F, K]."""
    return -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)


def quantise(w_FK: np.ndarray, values_FK: np.ndarray, scales_HG: np.ndarray) -> None:
    """`grouped_matmul_fp8.quantise_weights` of one matrix of any float dtype, bit for bit, whose last blocks may be partial.

    Writes into the first F rows and K columns of `values`, and into `scales`; holds a row of blocks besides.
    """
    rows, columns = w_FK.shape
    starts = np.arange(0, columns, BLOCK)
    for h, scales_G in enumerate(scales_HG):
        strip = np.empty((min(BLOCK, rows - h * BLOCK), columns), np.float32)
        copy(strip, w_FK[h * BLOCK : (h + 1) * BLOCK])
        largest_G = np.maximum.reduceat(np.abs(strip).max(axis=0), starts)
        scales_G[:] = (((largest_G * np.float32(1 / LARGEST)).view(np.uint32) + 4) & ~np.uint32(7)).view(np.float32)
        scales_G[largest_G < NOTHING] = 1
        strip /= np.repeat(scales_G, BLOCK)[:columns]
        # Rounded to 16 bits towards the odd neighbour, a number still rounds to the same 8 bits: a table has them. (The cast of
        # ml_dtypes takes three times as long, and lets no other thread run.)
        bits = strip.view(np.uint16)
        codes = CODES.take(bits[:, 1::2] | (bits[:, ::2] != 0))
        values_FK[h * BLOCK : h * BLOCK + len(strip), :columns] = codes.view(FLOAT8)


def dequantise(
    values_FK: np.ndarray, scales_HG: np.ndarray, row_F: np.ndarray, column_K: np.ndarray, target_FK: np.ndarray
) -> None:
    """Writes value times scale, a float32 product, rounded to the dtype of `target`.

    Args:
        row_F, column_K: which row and column of `scales` a row and a column of the values has.
    """
    for i in range(0, len(values_FK), BLOCK):
        strip = slice(i, i + BLOCK)
        product = NUMBERS.take(values_FK[strip].view(np.uint8))
        product *= scales_HG[row_F[strip]][:, column_K]
        copy(target_FK[strip], product)
