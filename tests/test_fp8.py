"""Quantising in blocks on the host: against a loop over blocks, against the device's, and against itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax.fp8 import CODES, FLOAT8, NUMBERS, as_matrix, blocks_of, dequantise, quantise
from dsv2_jax.tensor_files import DTYPES
from pallas_kernels.grouped_matmul_fp8 import quantise_weights


def matrix(rows, columns, dtype="F32"):
    """Normal values whose blocks differ in magnitude, one being zeros."""
    rng = np.random.default_rng(rows)
    factor = np.exp(3 * rng.normal(size=blocks_of((rows, columns)))).repeat(128, 0).repeat(128, 1)[:rows, :columns]
    w_FK = rng.normal(size=(rows, columns)) * factor
    w_FK[:128, :128] = 0
    return w_FK.astype(DTYPES[dtype])


def in_blocks(w_FK):
    values, scales = np.empty(w_FK.shape, FLOAT8), np.empty(blocks_of(w_FK.shape), np.float32)
    quantise(w_FK, values, scales)
    return values, scales


def back(values, scales, dtype=np.float32):
    target = np.empty(values.shape, dtype)
    dequantise(values, scales, *(np.arange(n) // 128 for n in values.shape), target)
    return target


@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (300, 130), (80, 400)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_each_block_has_its_largest_magnitude_at_448(shape, dtype):
    w_FK = matrix(*shape, dtype)
    values, scales = in_blocks(w_FK)
    for h, g in np.ndindex(scales.shape):
        block = np.s_[128 * h : 128 * h + 128, 128 * g : 128 * g + 128]
        largest = np.abs(w_FK[block].astype(np.float32)).max()
        if largest == 0:
            assert scales[h, g] == 1 and not values[block].astype(np.float32).any()
        else:
            np.testing.assert_allclose(scales[h, g], largest / 448, rtol=2**-20)
            assert np.abs(values[block].astype(np.float32)).max() == 448
            wanted = w_FK[block].astype(np.float32) / scales[h, g]
            assert values[block].tobytes() == wanted.astype(FLOAT8).tobytes()
    stands_for, scale = back(values, scales), scales.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]
    w_FK = w_FK.astype(np.float64)
    assert (np.abs(stands_for - w_FK) <= np.maximum(np.abs(w_FK) * 2**-4, scale * 2**-10) * (1 + 1e-6)).all()


def test_quantising_what_8_bits_stand_for_gives_them_again():
    for seed in range(20):  # the scale times 448 must come back whatever its bits
        values, scales = in_blocks(matrix(128 + seed, 260))
        again, scales_again = in_blocks(back(values, scales))
        assert again.tobytes() == values.tobytes() and scales_again.tobytes() == scales.tobytes()


def test_host_and_device_agree_bit_for_bit():
    w_EFK = np.stack([matrix(256, 384), matrix(256, 384)[::-1] * 1e-6])
    values_EFK, scales_EHG = quantise_weights(jnp.asarray(w_EFK.swapaxes(1, 2)))
    for w_FK, *device in zip(w_EFK, np.asarray(values_EFK), np.asarray(scales_EHG)):
        for got, wanted in zip(in_blocks(w_FK), device):
            assert got.tobytes() == wanted.tobytes()


def test_a_transposed_matrix_and_a_larger_target():
    w_FK = matrix(200, 150)
    values, scales = np.zeros((256, 256), FLOAT8), np.zeros((2, 2), np.float32)
    quantise(np.asfortranarray(w_FK), values, scales)
    wanted, wanted_scales = in_blocks(w_FK)
    assert values[:200, :150].tobytes() == wanted.tobytes() and scales.tobytes() == wanted_scales.tobytes()
    assert not values[200:].astype(np.float32).any() and not values[:, 150:].astype(np.float32).any()


def test_every_number_rounds_as_ml_dtypes_says():
    """Near each of the 8-bit numbers and each midpoint between two, where a second rounding would show."""
    numbers = np.unique(np.abs(NUMBERS[np.isfinite(NUMBERS)]))
    at = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([at, *(np.nextafter(at, limit) for limit in np.float32([0, 1e9])), at * np.float32(1 + 2**-10)])
    near = np.concatenate([near, -near])
    near = near[np.abs(near) <= 448]
    w_FK = np.full((1, 128 * len(near)), 448, np.float32)  # each in a block of scale 1
    w_FK[0, 1::128] = near
    values, scales = in_blocks(w_FK)
    assert (scales == 1).all() and values[0, 1::128].tobytes() == near.astype(FLOAT8).tobytes()
    assert len(CODES) == 2**16


def test_what_is_stood_for_is_rounded_once():
    values, scales = in_blocks(matrix(140, 270))
    exact = values.astype(np.float64) * scales.repeat(128, 0).repeat(128, 1)[:140, :270]
    assert back(values, scales).tobytes() == exact.astype(np.float32).tobytes()
    bfloat16 = DTYPES["BF16"]
    assert back(values, scales, bfloat16).tobytes() == exact.astype(np.float32).astype(bfloat16).tobytes()


def test_inputs_go_last():
    w = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    assert as_matrix(w).shape == (15, 2) and as_matrix(w)[7, 1] == w[1, 1, 2]
    assert np.shares_memory(as_matrix(w), w)
