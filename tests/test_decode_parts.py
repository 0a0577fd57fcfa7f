"""The parts of few requests, added by a program of their own, in Pallas' interpreter against sums in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import decode_parts
from pallas_kernels.decode_schedule import BLOCK, make_schedule
from tests import lanes_interpreted

LATENT = 128


@pytest.mark.parametrize("blocks, rows", [([18], 16), ([1, 0, 30], 16), ([100], 48)])
def test_interpreter(blocks, rows, monkeypatch):
    """The kernel but for its PTX. Every fifth row of some parts, and one of all parts, has seen no token."""
    lanes_interpreted.install(monkeypatch, decode_parts)
    rng, batch = np.random.default_rng(0), len(blocks)
    schedule = make_schedule(jnp.asarray(blocks, jnp.int32)[:, None] * BLOCK - 1, 16)
    workers = len(schedule.request_W1) - 1
    parts_PCM = np.full((workers + batch, LATENT, rows), np.nan, np.float32)
    lse_PM = np.full((workers + batch, rows), np.nan, np.float32)
    wanted_BMC = np.zeros((batch, rows, LATENT))
    cuts_B, first_B = np.asarray(schedule.cuts_B), np.asarray(schedule.first_B)
    assert cuts_B.max() > decode_parts.AT_ONCE
    for b in range(batch):
        places = [workers + b, *range(first_B[b], first_B[b] + cuts_B[b])]
        values_PCM = rng.normal(size=(len(places), LATENT, rows))
        own_PM = 8 * rng.normal(size=(len(places), rows))
        own_PM[::2, ::5] = -np.inf
        own_PM[:, 3 if blocks[b] else slice(None)] = -np.inf
        values_PCM = np.where(own_PM[:, None] == -np.inf, 0, values_PCM)
        weight_PM = np.exp2(own_PM - np.maximum(own_PM.max(axis=0), -1e9))
        total_M = weight_PM.sum(axis=0)
        wanted_BMC[b] = ((weight_PM[:, None] * values_PCM).sum(axis=0) / np.where(total_M, total_M, 1)).T
        parts_PCM[places], lse_PM[places] = values_PCM, own_PM
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        got_BMC = decode_parts.add_parts.__wrapped__(jnp.asarray(parts_PCM), jnp.asarray(lse_PM), schedule)
    assert got_BMC.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got_BMC, np.float64), wanted_BMC, atol=1e-4, rtol=2**-8)
