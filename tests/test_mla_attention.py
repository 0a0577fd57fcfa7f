"""Training attention against its reference; in one chunk and in several, and by kernels; what the kernels refuse; their compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, mla_attention
from pallas_kernels.mla_attention_forward import BLOCK, _spans
from tests.kernel_cases import AttentionCases, assert_repeats


class TestXlaOneChunk(AttentionCases):
    attention = staticmethod(mla_attention.mla_attention)


class TestXlaManyChunks(AttentionCases):
    attention = staticmethod(mla_attention.mla_attention)

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr(mla_attention, "CHUNK", 30)


@pytest.mark.gpu
class TestPallas(AttentionCases):
    attention = staticmethod(lambda *a, **k: mla_attention.mla_attention(*a, **k, implementation="pallas"))
    DTYPE, DIMS, BOUND = jnp.bfloat16, (128, 64, 128), 8e-3

    @pytest.mark.parametrize("batch, length", [(2, 37), (1, 130)])  # one position: in test_mla_attention_backward.py
    def test_forward_and_gradients(self, batch, length):
        super().test_forward_and_gradients(batch, length)

    @pytest.mark.parametrize(
        "batch, length, heads, segmented",
        [(2, 1000, 5, True), (1, 2047, 17, True), (1, 2047, 17, False), (3, 136, 1, True), (1, 512, 128, True)],
    )
    def test_longer(self, batch, length, heads, segmented):
        choices_of_ids = self.segments(batch, length, seed=heads) if segmented else [None]
        self.check(self.operands(batch, length, heads, seed=length), choices_of_ids)

    @pytest.mark.parametrize("segmented", [False, True])
    def test_repeats_bit_for_bit(self, segmented):
        arrays, ids_BT = self.operands(2, 1100, 40), self.segments(2, 1100)[1] if segmented else None

        @jax.jit
        def run(*arrays):
            out, vjp = jax.vjp(lambda *a: type(self).attention(*a, ids_BT, scale=0.1), *arrays)
            return out, *vjp(out)

        assert_repeats(run, *arrays)


@pytest.mark.gpu
class TestCudnn(AttentionCases):
    attention = staticmethod(lambda *a, **k: mla_attention.mla_attention(*a, **k, implementation="cudnn"))
    DTYPE, DIMS, BOUND = jnp.bfloat16, (128, 64, 128), 8e-3

    @pytest.mark.parametrize("batch, length", [(2, 38), (1, 130)])  # odd lengths have no gradients in cuDNN
    def test_forward_and_gradients(self, batch, length):
        super().test_forward_and_gradients(batch, length)

    def test_without_segments(self):
        self.check(self.operands(2, 38), [None])


def test_a_forced_kernel_says_why_it_cannot_run():
    arrays = AttentionCases().operands(1, 3)
    with pytest.raises(ValueError, match=r"dimensions are \(16, 8, 12\), expected \(128, 64, 128\)"):
        mla_attention.mla_attention(*arrays, None, scale=1.0, implementation="pallas")
    wide = [jnp.zeros((1, 3, *shape)) for shape in ((2, 128), (2, 64), (2, 128), (64,), (2, 128))]
    with pytest.raises(ValueError, match="an operand is float32"):
        mla_attention.mla_attention(*wide, None, scale=1.0, implementation="pallas")
    wide = [x.astype(jnp.bfloat16) for x in wide]
    with pytest.raises(ValueError, match=r"scale is -1\.0"):
        mla_attention.mla_attention(*wide, None, scale=-1.0, implementation="pallas")
    with pytest.raises(ValueError, match="the device is cpu"):
        mla_attention.mla_attention(*wide, None, scale=1.0, implementation="pallas")


@pytest.mark.parametrize("batch, length, heads, segmented", [(1, 1, 3, True), (2, 4096, 16, False)])
def test_kernels_lower_for_cuda(monkeypatch, batch, length, heads, segmented):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    shapes = [(heads, 128), (heads, 64), (heads, 128), (64,), (heads, 128)]
    arrays = [jax.ShapeDtypeStruct((batch, length, *shape), jnp.bfloat16) for shape in shapes]
    ids = [jax.ShapeDtypeStruct((batch, length), jnp.int32)] if segmented else []

    def gradients(*arrays):
        def attend(*operands):
            return mla_attention.mla_attention(*operands, arrays[5] if segmented else None, scale=0.1)

        out, vjp = jax.vjp(attend, *arrays[:5])
        return vjp(out)

    text = jax.jit(gradients).trace(*arrays, *ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "mla_attention_forward" in text and "mla_attention_d" in text


def test_spans_leave_out_only_what_nobody_sees():
    for ids_BT in AttentionCases().segments(2, 12 * BLOCK, seed=3):
        keys_BQ, clear_BQ = np.asarray(_spans(ids_BT.reshape(2, -1, BLOCK)))
        assert ((keys_BQ >= 1) & (keys_BQ <= np.arange(1, 13)) & (clear_BQ >= 0) & (clear_BQ <= keys_BQ)).all()
        ids_BKS = np.asarray(ids_BT).reshape(2, -1, BLOCK)
        for row, query in np.ndindex(2, 12):
            begin, clear = query + 1 - keys_BQ[row, query], query + 1 - clear_BQ[row, query]
            assert not np.isin(ids_BKS[row, query], ids_BKS[row, :begin]).any()
            assert clear > query or (ids_BKS[row, clear : query + 1] == ids_BKS[row, query, 0]).all()
