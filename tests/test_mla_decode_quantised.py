"""Decode over fp8 and 6-bit pages: the kernels of `mla_decode_quantised` and XLA's path against exact attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_schedule, latent_pages, mla_decode, mla_decode_quantised
from tests.kernel_cases import QuantisedDecodeCases, assert_repeats, close


@pytest.mark.gpu
class TestPallasFp8(QuantisedDecodeCases):
    decode = staticmethod(lambda *a, **k: mla_decode.mla_decode(*a, **k, implementation="pallas"))
    FORMAT = "fp8"

    def test_repeats_bit_for_bit(self):
        operands = self.operands(1, 16, tuple(np.random.default_rng(1).integers(0, 6000, 300)))
        assert_repeats(jax.jit(lambda *a: type(self).decode(*a, scale=0.2)), *operands)


@pytest.mark.gpu
class TestPallasInt6(TestPallasFp8):
    FORMAT = "int6"


@pytest.mark.parametrize("name", ["fp8", "int6"])
def test_other_machines_attend_too(name):
    cases = QuantisedDecodeCases()
    cases.FORMAT = name
    *operands, positions_BT = cases.operands(1, 16, (130, -1, 64))
    operands = [jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, x) for x in operands]
    decode = jax.jit(lambda *a: mla_decode.mla_decode(*a, positions_BT, scale=0.2))
    got_BTNC, (_, _, pages, table_BP) = decode(*operands), operands
    held = latent_pages.LatentPages(latent_pages.unpack(pages.latent, pages.scale), pages.rope, None)
    close(got_BTNC, decode(*operands[:2], held, table_BP))


@pytest.mark.parametrize("name", ["fp8", "int6"])
@pytest.mark.parametrize("tokens, heads, rows", [(1, 16, 16), (1, 128, 128), (2, 5, 16)])
def test_lowers_for_the_gpu(name, tokens, heads, rows):
    pages = jax.eval_shape(lambda: latent_pages.empty(20, name))
    queries = [jax.ShapeDtypeStruct((3, rows, dim), jnp.bfloat16) for dim in (512, 64)]
    positions_BT, table_BP = jax.ShapeDtypeStruct((3, tokens), jnp.int32), jax.ShapeDtypeStruct((3, 4), jnp.int32)

    def run(q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP):
        schedule = decode_schedule.make_schedule(positions_BT, heads)
        operands = q_latent_BMC, q_rope_BMR, positions_BT, pages, table_BP, schedule
        return mla_decode_quantised.decode(*operands, scale=0.06, num_heads=heads)

    traced = jax.jit(run).trace(*queries, positions_BT, pages, table_BP)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
