"""Cases that every implementation of a kernel must pass; a new implementation inherits them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference


def close(got, wanted, bound=1e-5):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(got - wanted) <= bound * max(np.linalg.norm(wanted), 1e-30)


class GroupedMatmulCases:
    """`matmul` has `reference.grouped_matmul`'s signature and is differentiable."""

    matmul = None
    SIZES = ([5, 0, 8, 3], [0, 0, 0, 0], [30, 0, 0, 0], [0, 0, 0, 17], [1, 1, 1, 1], [8, 8, 8, 8])

    def operands(self, sizes, unit, seed=0):
        rng = np.random.default_rng(seed)
        padded = -(-np.array(sizes) // unit) * unit
        rows = int(padded.sum()) + 2 * unit  # and two blocks of no group
        x_MK = np.zeros((rows, 16), np.float32)
        for start, size in zip(np.cumsum(padded) - padded, sizes):
            x_MK[start : start + size] = rng.normal(size=(size, 16))
        w_EKF = rng.normal(size=(len(sizes), 16, 24)).astype(np.float32)
        g_MF = rng.normal(size=(rows, 24)).astype(np.float32)
        return jnp.asarray(x_MK), jnp.asarray(w_EKF), jnp.asarray(np.array(sizes, np.int32)), jnp.asarray(g_MF)

    @pytest.mark.parametrize("sizes", SIZES, ids=str)
    @pytest.mark.parametrize("unit", [1, 8])
    def test_forward_and_gradients(self, sizes, unit):
        x_MK, w_EKF, sizes_E, g_MF = self.operands(sizes, unit)
        wanted, wanted_vjp = jax.vjp(lambda x, w: reference.grouped_matmul(x, w, sizes_E, row_unit=unit), x_MK, w_EKF)
        got, got_vjp = jax.vjp(lambda x, w: type(self).matmul(x, w, sizes_E, row_unit=unit), x_MK, w_EKF)
        close(got, wanted)
        g_MF = jnp.where((x_MK != 0).any(axis=1, keepdims=True), g_MF, 0)  # no gradient comes to padding rows
        for got_gradient, wanted_gradient in zip(got_vjp(g_MF), wanted_vjp(g_MF)):
            close(got_gradient, wanted_gradient)

    def test_nothing_of_experts_times_rows_is_made(self):
        x_MK, w_EKF, sizes_E, _ = self.operands([5, 0, 8, 3], 8)
        text = jax.jit(lambda x, w: type(self).matmul(x, w, sizes_E, row_unit=8)).lower(x_MK, w_EKF).compile().as_text()
        assert f"[{w_EKF.shape[0]},{x_MK.shape[0]}," not in text


class AttentionCases:
    """`attention` has `reference.mla_attention`'s signature and is differentiable."""

    attention = None

    def operands(self, batch, length, segments, seed=0, heads=3, nope=16, rope=8, value=12):
        rng = np.random.default_rng(seed)
        shapes = [(heads, nope), (heads, rope), (heads, nope), (rope,), (heads, value)]
        arrays = [jnp.asarray(rng.normal(size=(batch, length, *s)), jnp.float32) for s in shapes]
        cuts = np.sort(rng.choice(np.arange(1, length), size=(batch, segments - 1))) if segments > 1 else np.empty((batch, 0))
        segment_ids = 1 + (np.arange(length)[None, :, None] >= cuts[:, None, :]).sum(axis=-1)
        return arrays, jnp.asarray(segment_ids, jnp.int32)

    @pytest.mark.parametrize("batch, length, segments", [(1, 1, 1), (2, 37, 1), (2, 64, 4), (1, 130, 3)])
    def test_forward_and_gradients(self, batch, length, segments):
        arrays, segment_ids_BT = self.operands(batch, length, segments)

        def run(attention):
            out, vjp = jax.vjp(lambda *a: attention(*a, segment_ids_BT, scale=0.3), *arrays)
            return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

        for got, wanted in zip(run(type(self).attention), run(reference.mla_attention)):
            close(got, wanted)
