"""Training attention against its reference, in one chunk and in several."""

import pytest

from pallas_kernels import mla_attention
from tests.kernel_cases import AttentionCases


class TestXlaOneChunk(AttentionCases):
    attention = staticmethod(mla_attention.mla_attention)


class TestXlaManyChunks(AttentionCases):
    attention = staticmethod(mla_attention.mla_attention)

    @pytest.fixture(autouse=True)
    def small_chunks(self, monkeypatch):
        monkeypatch.setattr(mla_attention, "CHUNK", 16)
