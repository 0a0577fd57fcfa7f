"""The grouped matmul against its reference, and its padding."""

import numpy as np

from pallas_kernels.grouped_matmul import grouped_matmul, padded_rows, row_unit
from tests.kernel_cases import GroupedMatmulCases


class TestXla(GroupedMatmulCases):
    matmul = staticmethod(grouped_matmul)


def test_padded_rows_always_suffice():
    rng = np.random.default_rng(0)
    for _ in range(300):
        experts, rows = int(rng.integers(1, 20)), int(rng.integers(1, 200))
        unit = row_unit(rows, experts)
        sizes = np.bincount(rng.integers(0, rng.integers(1, experts + 1), rows), minlength=experts)
        assert (-(-sizes // unit) * unit).sum() <= padded_rows(rows, experts, unit)
        assert padded_rows(rows, experts, unit) % unit == 0
