"""The backward kernels of training attention: which blocks they visit, that they lower, and on a GPU their gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import mla_attention_backward, reference
from pallas_kernels.mla_attention_forward import BLOCK, LOG2_E
from sharding.mesh import make_mesh
from tests.kernel_cases import assert_repeats, close

SCALE = 0.09


def random_ids(rng, batch, length, kind):
    """None; or segments one after another, as packing makes them; or ids in any order."""
    if kind == "one":
        return None
    if kind == "packed":
        return np.cumsum(rng.random((batch, length)) < 5 / length, axis=1).astype(np.int32)
    return rng.integers(-1, 3, (batch, length)).astype(np.int32)


def shapes(batch, length, heads):
    dims = (heads, 128), (heads, 64), (heads, 128), (64,), (heads, 128), (heads, 128)
    return [(batch, length, *d) for d in dims]


class TestSpans:
    @pytest.mark.parametrize("kind", ["packed", "any"])
    @pytest.mark.parametrize("blocks", [1, 2, 7])
    def test_hold_all_pairs_that_see_each_other(self, kind, blocks):
        ids_BKS = random_ids(np.random.default_rng(blocks), 3, blocks * BLOCK, kind).reshape(3, blocks, BLOCK)
        ahead_B2K, back_BK = mla_attention_backward._spans(jnp.asarray(ids_BKS))
        for ids_KS, ahead_2K, back_K in zip(ids_BKS, np.asarray(ahead_B2K), np.asarray(back_BK)):
            for key in range(blocks):
                for query in range(key, blocks):
                    written = query - key < ahead_2K[0, key]
                    assert written == (query - key < back_K[query])  # what one kernel leaves, the other reads
                    assert written or not np.intersect1d(ids_KS[key], ids_KS[query]).size
                    if query - key < ahead_2K[1, key]:
                        assert len({*ids_KS[key], *ids_KS[query]}) == 1

    def test_leave_out_blocks_of_other_segments(self):
        ids_BKS = jnp.repeat(jnp.arange(6, dtype=jnp.int32) // 2, BLOCK).reshape(1, 6, BLOCK)
        ahead_B2K, back_BK = mla_attention_backward._spans(ids_BKS)
        np.testing.assert_array_equal(ahead_B2K[0], [[2, 1] * 3] * 2)
        np.testing.assert_array_equal(back_BK[0], [1, 2] * 3)


class TestLowering:
    def operands(self, batch, length, heads, sharding=None):
        of = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        *inputs, dout_BTNV = (of(s, jnp.bfloat16) for s in shapes(batch, length, heads))
        lse_BNS = of((batch, heads, -(-length // BLOCK) * BLOCK), jnp.float32)
        return *inputs, of((batch, length), jnp.int32), dout_BTNV, lse_BNS, dout_BTNV

    @pytest.mark.parametrize("length, heads, kind", [(1, 16, "one"), (130, 3, "any"), (16384, 128, "one")])
    def test_for_cuda(self, length, heads, kind):
        def run(*operands):
            ids_BT = None if kind == "one" else operands[5]
            return mla_attention_backward.backward(*operands[:5], ids_BT, *operands[6:], scale=SCALE)

        text = jax.jit(run).trace(*self.operands(1, length, heads)).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("mosaic_gpu_v2") == 2

    def test_for_cuda_inside_shard_map(self):
        mesh = make_mesh(devices=jax.devices()[:1])
        spec = PartitionSpec("data")
        run = functools.partial(mla_attention_backward.backward, scale=SCALE)
        with jax.set_mesh(mesh):
            operands = self.operands(1, 256, 4, jax.NamedSharding(mesh, spec))
            mapped = jax.shard_map(run, in_specs=(spec,) * len(operands), out_specs=(spec,) * 5)
            jax.jit(mapped).trace(*operands).lower(lowering_platforms=("cuda",))


@pytest.mark.gpu
class TestGradients:
    """On a Hopper GPU, against float32 gradients."""

    @functools.partial(jax.jit, static_argnums=0)
    def wanted(self, operands, ids_BT, dout_BTNV):
        inputs = [x.astype(jnp.float32) for x in operands]
        attend = functools.partial(reference.mla_attention, scale=SCALE)
        with jax.default_matmul_precision("highest"):
            out_BTNV, vjp = jax.vjp(lambda *x: attend(*x, ids_BT), *inputs)
            scores_BNTS = jnp.einsum("btnh,bsnh->bnts", inputs[0], inputs[2]) + jnp.einsum("btnr,bsr->bnts", inputs[1], inputs[3])
            length = scores_BNTS.shape[2]
            seen_BTS = jnp.tril(jnp.ones((length, length), bool))[None]
            if ids_BT is not None:
                seen_BTS &= ids_BT[:, :, None] == ids_BT[:, None]
            lse_BNT = jax.nn.logsumexp(jnp.where(seen_BTS[:, None], scores_BNTS * SCALE, -jnp.inf), axis=3) * LOG2_E
            return out_BTNV.astype(jnp.bfloat16), lse_BNT, vjp(dout_BTNV.astype(jnp.float32))

    def operands(self, batch, length, heads, kind):
        rng = np.random.default_rng(length)
        *operands, dout_BTNV = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes(batch, length, heads))
        return operands, random_ids(rng, batch, length, kind), dout_BTNV

    def run(self, operands, ids_BT, dout_BTNV):
        out_BTNV, lse_BNT, wanted = self.wanted(operands, ids_BT, dout_BTNV)
        lse_BNS = jnp.pad(lse_BNT, ((0, 0), (0, 0), (0, -lse_BNT.shape[2] % BLOCK)), constant_values=1e4)
        backward = jax.jit(functools.partial(mla_attention_backward.backward, scale=SCALE))
        return lambda: backward(*operands, ids_BT, out_BTNV, lse_BNS, dout_BTNV), wanted

    @pytest.mark.parametrize("kinds", [("one",), ("packed", "any")], ids="-".join)
    @pytest.mark.parametrize("batch, length, heads", [(1, 130, 3), (2, 1000, 4), (1, 2047, 6)])
    def test_are_right(self, batch, length, heads, kinds):
        for kind in kinds:
            run, wanted = self.run(*self.operands(batch, length, heads, kind))
            jnp.full((1 << 28,), jnp.nan).block_until_ready()  # memory that outputs may get: what is not written shows
            for got, want in zip(run(), wanted):
                assert got.dtype == jnp.bfloat16
                close(got, want, 5e-3, kind)

    def test_of_one_position(self):
        run, wanted = self.run(*self.operands(1, 1, 4, "one"))
        for got, want in zip(run(), wanted):
            np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=1e-2)

    def test_of_heads_in_several_chunks(self, monkeypatch):
        monkeypatch.setattr(mla_attention_backward, "ROOM", 1)
        run, wanted = self.run(*self.operands(2, 300, 16, "packed"))
        for got, want in zip(run(), wanted):
            close(got, want, 5e-3)

    def test_are_the_same_bits_in_every_run(self):
        run, _ = self.run(*self.operands(2, 1024, 16, "packed"))
        assert_repeats(run)
