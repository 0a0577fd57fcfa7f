"""The grouped matmul in 8-bit floats: implementations against the reference, what quantising keeps, and compilation for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, grouped_matmul_fp8_hopper, quantise_rows_hopper, tickets
from pallas_kernels.grouped_matmul_fp8 import (
    Fp8Rows,
    Fp8Weights,
    grouped_matmul_fp8,
    matmul_fp8,
    quantise_rows,
    quantise_weights,
)
from pallas_kernels.grouped_mlp_fp8 import grouped_mlp_fp8
from tests import lanes_interpreted
from tests.kernel_cases import Fp8GroupedMatmulCases, assert_repeats, close

E4M3 = jnp.float8_e4m3fn


class TestXla(Fp8GroupedMatmulCases):
    matmul = staticmethod(functools.partial(grouped_matmul_fp8, implementation="xla"))


@pytest.mark.gpu
class TestPallas(Fp8GroupedMatmulCases):
    matmul = staticmethod(functools.partial(grouped_matmul_fp8, implementation="pallas"))
    SIZES = (5, 0, 8, 3, 0, 0, 1, 0), (0, 0, 0, 0, 0, 0, 0, 0), (1000, 1, 0, 515, 64, 128, 65, 129)
    # With few rows for each expert, one consumer and two parts of K.
    SHAPES = ((1408, 384), 8, SIZES), ((1408, 384), 8, SIZES[:1]), ((2048, 2816), 16, SIZES), ((1408, 384), 128, SIZES)

    @pytest.mark.parametrize("groups, columns", [(np.random.default_rng(0).integers(0, 400, 64), 2816), ((5, 0, 8, 3), 384)])
    def test_repeats_bit_for_bit(self, groups, columns):
        group_rows, sizes_E = self.group_rows(groups, 16), jnp.asarray(groups, jnp.int32)
        _, poisoned_MK, w_EKF = self.operands(group_rows, len(groups), (2048, columns))
        used = int(group_rows[1].sum())
        operands = jax.jit(lambda x, w: (quantise_rows(x), quantise_weights(w)))(poisoned_MK, w_EKF)
        assert_repeats(jax.jit(lambda x, w: type(self).matmul(x, w, sizes_E, row_unit=16)[:used]), *operands)

    @pytest.mark.parametrize("rows, columns", [(8, 128), (1000, 2048), (4096, 1408)])
    def test_quantises_rows_as_xla_does(self, rows, columns):
        x_MK = jax.random.normal(jax.random.key(rows), (rows, columns), jnp.bfloat16).at[1].set(0)
        quantise = jax.jit(quantise_rows, static_argnums=1)
        got, wanted = quantise(x_MK, "pallas"), quantise(x_MK, "xla")
        np.testing.assert_allclose(got.scales_GM, wanted.scales_GM, rtol=1e-6)
        # XLA's division on a GPU may be 2 units in the last place off: what lies midway may become either neighbour, an eighth apart.
        got_MK, wanted_MK = (np.asarray(rows.values_MK, np.float32) for rows in (got, wanted))
        assert (got_MK != wanted_MK).mean() < 1e-3
        np.testing.assert_allclose(got_MK, wanted_MK, rtol=0.126)


class TestInterpreter(Fp8GroupedMatmulCases):
    """Both kernels on two programs, which take tiles in turn: the interpreter has no atomics."""

    matmul = staticmethod(functools.partial(grouped_matmul_fp8, implementation="pallas"))
    SHAPES = (((256, 384), 24, ((70, 0, 200, 9),)),)  # a whole tile of 192 rows, and pieces of 8

    @pytest.mark.parametrize("depth, columns", [(100, 256), (1100, 128)])  # the second in two parts, of five steps and four
    def test_one_matrix(self, depth, columns):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, depth)), jnp.bfloat16)
        w_EKF = np.random.default_rng(1).normal(size=(1, -(-depth // 128) * 128, columns))
        w = quantise_weights(jnp.asarray(w_EKF, jnp.bfloat16))
        got, wanted = (matmul_fp8(x, Fp8Weights(*(a[0] for a in w)), name) for name in ("pallas", "xla"))
        assert got.shape == (2, 5, columns)
        close(got, wanted, 2.5e-3)

    def test_mlp(self):
        """Gate, up and down; columns are filled up to the weights'."""
        rng = np.random.default_rng(0)
        sizes = np.array([9, 0, 20])
        of_group_M, used_M = self.group_rows(sizes, 8)
        x_MD = jnp.asarray(np.where(of_group_M[:, None], rng.normal(size=(len(used_M), 100)), 0), jnp.bfloat16)
        weight_M = jnp.asarray(np.where(of_group_M, rng.random(len(used_M)), 0), jnp.float32)
        weights = [quantise_weights(jnp.asarray(rng.normal(size=(3, 128, 128)) / 8, jnp.bfloat16)) for _ in range(3)]
        operands = x_MD, weight_M, *weights, jnp.asarray(sizes, jnp.int32), 8
        got_MD, wanted_MD = (np.asarray(grouped_mlp_fp8(*operands, name), np.float32)[used_M] for name in ("pallas", "xla"))
        assert np.median(np.linalg.norm(got_MD - wanted_MD, axis=1)) < 5e-3 * np.median(np.linalg.norm(wanted_MD, axis=1))

    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch):
        monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
        monkeypatch.setattr(tickets, "new_counter", lambda: None)
        lanes_interpreted.install(monkeypatch, tickets)
        for module in (grouped_matmul_fp8_hopper, tickets):
            monkeypatch.setattr(module, "SMS", 2)
        jax.clear_caches()  # kernels are traced once a shape
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield
        jax.clear_caches()


@pytest.mark.parametrize("missing", [0, 3])
def test_rows_that_every_group_has_are_rows_of_all(missing):
    rng = np.random.default_rng(0)
    x_UD, weight_M = rng.normal(size=(8, 100)), jnp.asarray(rng.random(24), jnp.float32)
    x_UD[8 - missing :] = 0
    x_UD = jnp.asarray(x_UD, jnp.bfloat16)
    weights = [quantise_weights(jnp.asarray(rng.normal(size=(3, 128, 128)) / 8, jnp.bfloat16)) for _ in range(3)]
    mlp = functools.partial(grouped_mlp_fp8, group_sizes_E=jnp.asarray([8, 0, 8], jnp.int32), row_unit=8)
    got_MD, wanted_MD = (mlp(x_MD, weight_M, *weights) for x_MD in (x_UD[: 8 - missing], jnp.tile(x_UD, (3, 1))))
    np.testing.assert_array_equal(got_MD[:16], wanted_MD[:16])


def test_rows_keep_three_bits_of_each_value():
    x_MK = np.random.default_rng(0).normal(size=(6, 256)) * np.exp(np.arange(6))[:, None]
    x_MK[3, :128] = 0
    values_MK, scales_GM = quantise_rows(jnp.asarray(x_MK, jnp.float32))
    assert (values_MK.dtype, values_MK.shape, scales_GM.shape) == (E4M3, (6, 256), (2, 6))
    scale_MK = np.repeat(np.asarray(scales_GM), 128, axis=0).T
    error_MK = np.abs(np.asarray(values_MK, np.float64) * scale_MK - x_MK)
    assert (error_MK <= np.maximum(np.abs(x_MK) * 2**-4, scale_MK * 2**-10) * (1 + 1e-5)).all()
    assert (np.abs(np.asarray(values_MK, np.float32)).reshape(6, 2, 128).max(axis=2)[[0, 1, 2, 4, 5]] == 448).all()


def test_weights_are_transposed_and_scaled_by_blocks():
    w_EKF = np.random.default_rng(0).normal(size=(2, 128, 384)) * np.repeat([1.0, 100.0, 0.01], 128)
    values_EFK, scales_EHG = quantise_weights(jnp.asarray(w_EKF, jnp.bfloat16))
    assert (values_EFK.dtype, values_EFK.shape, scales_EHG.shape) == (E4M3, (2, 384, 128), (2, 3, 1))
    back_EFK = np.asarray(values_EFK, np.float64) * np.repeat(np.asarray(scales_EHG), 128, axis=1)
    for block in np.split(np.arange(384), 3):
        wanted_EFK = w_EKF.swapaxes(1, 2)[:, block]
        assert np.linalg.norm(back_EFK[:, block] - wanted_EFK) < 0.03 * np.linalg.norm(wanted_EFK)


def absent(rows, depth, columns, experts):
    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    x = Fp8Rows(array(E4M3, rows, depth), array(jnp.float32, depth // 128, rows))
    scales = array(jnp.float32, experts, columns // 128, depth // 128)
    return x, Fp8Weights(array(E4M3, experts, columns, depth), scales), array(jnp.int32, experts)


def test_errors_name_what_does_not_fit():
    x, w, sizes_E = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), absent(24, 128, 256, 2))
    with pytest.raises(ValueError, match="K is 100, expected a multiple of 128"):
        quantise_rows(jnp.zeros((8, 100)))
    with pytest.raises(ValueError, match="F is 64, expected a multiple of 128"):
        quantise_weights(jnp.zeros((2, 128, 64)))
    with pytest.raises(ValueError, match="x has 128 columns, expected K of w, 256"):
        grouped_matmul_fp8(x, Fp8Weights(w.values_EFK.swapaxes(1, 2), w.scales_EHG), sizes_E, row_unit=8)
    with pytest.raises(ValueError, match="row_unit is 12, expected a multiple of 8"):
        grouped_matmul_fp8(x, w, sizes_E, row_unit=12, implementation="pallas")
    with pytest.raises(ValueError, match="there are 12 rows, expected a multiple of 8"):
        quantise_rows(jnp.zeros((12, 128), jnp.bfloat16), "pallas")
    with pytest.raises(ValueError, match="the rows are float32, expected bfloat16"):
        quantise_rows(jnp.zeros((8, 128)), "pallas")


@pytest.mark.parametrize(
    "rows, depth, columns, experts, unit",
    [
        (99264, 2048, 2816, 64, 16),
        (51552, 1536, 5120, 160, 32),
        (2656, 5120, 3072, 160, 8),
        (8192, 1408, 2048, 64, 128),
        (8, 5120, 640, 1, 8),
    ],
)
def test_compiles_for_cuda(rows, depth, columns, experts, unit, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    matmul = jax.jit(functools.partial(grouped_matmul_fp8, row_unit=unit, implementation="pallas"))
    text = matmul.trace(*absent(rows, depth, columns, experts)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_runs_on_each_device_of_a_mesh(monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    mesh = jax.sharding.get_mesh()
    x_MK = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("data")))
    _, w, sizes_E = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.NamedSharding(mesh, jax.P("data"))),
        absent(256, 128, 256, 2),
    )
    matmul = jax.shard_map(functools.partial(grouped_matmul_fp8, row_unit=16, implementation="pallas"), out_specs=jax.P("data"))
    text = jax.jit(matmul).trace(x_MK, w, sizes_E).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


def test_the_quantising_kernel_compiles_for_cuda():
    run = jax.jit(functools.partial(quantise_rows_hopper.quantise_rows, least=1e-12, largest=448.0))
    text = run.trace(jax.ShapeDtypeStruct((1000, 1408), jnp.bfloat16)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
