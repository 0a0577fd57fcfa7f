"""Absorbed decode over bfloat16 pages: implementations against the reference, the schedule, and compilation for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_schedule, latent_pages, mla_decode
from pallas_kernels.decode_schedule import BLOCK, OVERHEAD, make_schedule
from tests.kernel_cases import DecodeCases, assert_repeats


class TestXla(DecodeCases):
    decode = staticmethod(mla_decode.mla_decode)


@pytest.mark.gpu
class TestPallas(DecodeCases):
    decode = staticmethod(lambda *a, **k: mla_decode.mla_decode(*a, **k, implementation="pallas"))
    DTYPE, DIMS, BOUND = jnp.bfloat16, (512, 64), 6e-3

    @pytest.mark.parametrize("tokens, heads", [(1, 128), (1, 16)])
    @pytest.mark.parametrize("batch", [7, 40])
    def test_repeats_bit_for_bit(self, tokens, heads, batch):
        operands = self.operands(tokens, heads, tuple(np.random.default_rng(1).integers(0, 6000, batch)))
        assert_repeats(jax.jit(lambda *a: type(self).decode(*a, scale=0.2)), *operands)


def test_a_forced_kernel_says_why_it_cannot_run():
    operands = DecodeCases().operands(1, 16, (70,))
    with pytest.raises(ValueError, match=r"latent and rope dims are \(24, 8\)"):
        mla_decode.mla_decode(*operands, scale=1.0, implementation="pallas")


def pieces_of(schedule, worker):
    """What `decode_schedule.pieces` visits, in numpy."""
    request_W1, block_W1, blocks_B, _, first_B, cuts_B = (np.asarray(x) for x in schedule)
    for request in range(request_W1[worker], request_W1[worker + 1] + (block_W1[worker + 1] > 0)):
        begin = block_W1[worker] if request == request_W1[worker] else 0
        end = block_W1[worker + 1] if request == request_W1[worker + 1] else blocks_B[request]
        part = worker + 1 - first_B[request] if begin > 0 else 0
        yield request, begin, end, part, cuts_B[request]


@pytest.mark.parametrize(
    "batch, heads, most",
    [(128, 128, 4096), (1, 16, 160000), (1, 128, 90), (7, 700, 3000), (300, 16, 2000), (128, 16, 4096), (256, 16, 700)],
)
def test_schedule_covers_all_blocks_evenly_in_order(batch, heads, most):
    rng = np.random.default_rng(batch)
    for positions_BT in (rng.integers(-1, most, (batch, 2)), np.full((batch, 1), most - 1), np.full((batch, 1), -1)):
        schedule = jax.jit(make_schedule, static_argnums=1)(jnp.asarray(positions_BT, jnp.int32), heads)
        workers = len(schedule.request_W1) - 1
        pieces = [(worker, *piece) for worker in range(workers) for piece in pieces_of(schedule, worker)]
        blocks = -(-(positions_BT.max(axis=1) + 1) // BLOCK)
        assert (np.asarray(schedule.open_B) == (positions_BT.min(axis=1) + 1) // BLOCK).all()
        for request, count in enumerate(blocks):
            mine = [p for p in pieces if p[1] == request]
            assert [p[2] for p in mine] + [count] == [0] + [p[3] for p in mine]  # each piece begins where the last one ended
            assert [p[4] for p in mine] == list(range(len(mine))) and {p[5] for p in mine} == {len(mine) - 1}
            assert [p[0] - mine[0][0] for p in mine] == list(range(len(mine)))  # part p of a request is its first worker's + p
        loads = np.bincount([p[0] for p in pieces], [p[3] - p[2] + OVERHEAD for p in pieces], minlength=workers)
        assert loads.max() <= (blocks + OVERHEAD).sum() / workers + 1.5 * OVERHEAD + 1
        if heads == 16 and batch % 128 == 0 and len(set(blocks)) == 1:  # as many requests for each of 128 workers
            assert not np.asarray(schedule.cuts_B).any() and sum(loads > 0) == 128


def test_parts_of_many_rows_are_few():
    cuts = {heads: int(make_schedule(jnp.asarray([[1100]], jnp.int32), heads).cuts_B[0]) for heads in (16, 128)}
    assert cuts == {16: 17, 128: 4}  # 18 blocks: a part each, or of four at least


@pytest.mark.parametrize("cuts", [0, 1, 7, 8, 63, 64, 65, 131])
def test_parts_of_a_request_are_merged_once_each(cuts):
    @jax.jit
    @jax.vmap
    def children(part, cuts):
        def note(offset, seen):
            return seen[0].at[seen[1]].set(part + offset), seen[1] + 1

        return decode_schedule.merge(decode_schedule.Piece(0, 0, 0, part, cuts), note, (jnp.zeros(32, jnp.int32), jnp.int32(0)))

    part = np.arange(132)
    merged = [row[:count].tolist() for row, count in zip(*map(np.asarray, children(part, np.full(132, cuts))))][: cuts + 1]
    assert sorted(child for row in merged for child in row) == list(range(1, cuts + 1))
    assert all(child > part for part, row in enumerate(merged) for child in row)


def absent(tokens, heads, batch=4, pages=8, dtype=jnp.bfloat16):
    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype)

    q = array(dtype, batch, tokens, heads, 512), array(dtype, batch, tokens, heads, 64)
    cache = latent_pages.LatentPages(array(dtype, batch * pages, 64, 512), array(dtype, batch * pages, 64, 64), None)
    return *q, cache, array(jnp.int32, batch, pages), array(jnp.int32, batch, tokens)


@pytest.mark.parametrize("tokens, heads, batch", [(1, 128, 4), (2, 96, 4), (1, 16, 4), (1, 16, 40), (3, 16, 4), (3, 16, 40)])
def test_compiles_for_cuda(tokens, heads, batch, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "NVIDIA H200")
    decode = jax.jit(lambda *a: mla_decode.mla_decode(*a, scale=0.1, implementation="pallas"))
    text = decode.trace(*absent(tokens, heads, batch)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and ("add_parts" in text) == (heads == 16 and batch == 4)  # of few requests


@pytest.mark.parametrize("heads", [16, 128])
def test_runs_on_each_device_of_a_mesh(heads, monkeypatch):
    monkeypatch.setattr("pallas_kernels.dispatch.device_kind", lambda: "NVIDIA H200")
    mesh, rows = jax.sharding.get_mesh(), jax.P("data")
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, rows)), absent(1, heads)
    )
    decode = jax.shard_map(
        lambda *a: mla_decode.mla_decode(*a, scale=0.1, implementation="pallas"), out_specs=rows, check_vma=False
    )
    assert "mosaic_gpu" in jax.jit(decode).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
