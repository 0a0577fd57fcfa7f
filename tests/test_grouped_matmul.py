"""The grouped matmul and the experts' MLP against their references; the Hopper kernels in the interpreter, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    dispatch,
    grouped_matmul_fp8_hopper,
    grouped_matmul_hopper,
    grouped_matmul_xla,
    grouped_wgrad_hopper,
    lanes,
    tickets,
)
from pallas_kernels.grouped_matmul import grouped_matmul, padded_rows, row_unit
from pallas_kernels.grouped_mlp import grouped_mlp
from pallas_kernels.hopper import PARAMS
from tests import lanes_interpreted
from tests.kernel_cases import GroupedCases, GroupedMatmulCases, GroupedMlpCases, assert_repeats, close, with_gradients


class TestXla(GroupedMatmulCases):
    matmul = staticmethod(functools.partial(grouped_matmul, implementation="xla"))


class TestMlpXla(GroupedMlpCases):
    mlp = staticmethod(functools.partial(grouped_mlp, implementation="xla"))
    SHAPES = (((16, 24), 8, GroupedCases.SIZES[:3]),)


class Bfloat16(GroupedCases):
    """The models' widths and row units, few experts: sizes around tiles, all rows in one expert, and few rows, as in decode.

    Of the gradients, several roundings to bfloat16 deep, 3.5e-3 is to be expected; of one rounding, 1.7e-3.
    """

    DTYPE, BOUND, SPARE = jnp.bfloat16, 5e-3, 0  # the most rows fill the last block
    MANY = (307, 0, 1, 64, 190), (0, 0, 700, 0, 0), (0, 0, 0, 0, 0), (16, 193, 385, 100, 7)
    FEW = (3, 0, 1, 40, 16), (0, 0, 0, 0, 0), (0, 200, 0, 0, 0)
    MOST = (*[0] * 5, 40, 3, *[0] * 120, 16, *[0] * 31, 20), (*[0] * 159, 1)
    ONE = (3, 0, 1, 16, 16, *[0] * 11), (0, 30, *[0] * 14)  # so few that there is one consumer
    SHAPES = (
        ((192, 320), 64, MANY),
        ((5120, 1536), 16, FEW),
        ((192, 320), 16, FEW),
        ((192, 320), 16, ONE),
        ((192, 128), 16, MOST),
        ((2048, 1408), 32, MANY),
        ((5120, 1536), 16, MANY),
    )


@pytest.mark.gpu
class TestPallas(Bfloat16, GroupedMatmulCases):
    matmul = staticmethod(functools.partial(grouped_matmul, implementation="pallas"))

    def test_the_same_bits_every_time(self):
        rng, sizes = np.random.default_rng(0), self.MANY[0]
        group_rows, sizes_E = self.group_rows(sizes, 32, self.MANY), jnp.asarray(sizes, jnp.int32)
        (_, x_MK), (_, g_MF) = (self.rows(rng, group_rows, width) for width in (2048, 1408))

        @jax.jit
        def run(x_MK, w_EKF, g_MF):
            out_MF, dx_MK, dw_EKF = with_gradients(type(self).matmul, 32)(sizes_E, (x_MK, w_EKF), g_MF)
            used = int(group_rows[1].sum())
            return out_MF[:used], dx_MK[:used], dw_EKF

        assert_repeats(run, x_MK, self.weights(rng, 5, 2048, 1408), g_MF)


@pytest.mark.gpu
class TestMlpPallas(Bfloat16, GroupedMlpCases):
    mlp = staticmethod(functools.partial(grouped_mlp, implementation="pallas"))


class TestInterpreter(Bfloat16):
    """The kernels' parts on three programs, which take tiles in turn: the interpreter has no atomics."""

    SIZE, UNIT, SPARE = (300, 0, 5, 64, 33), 64, 2

    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch):
        monkeypatch.setattr(tickets, "new_counter", lambda: None)
        lanes_interpreted.install(monkeypatch, tickets)
        for kernel in (grouped_matmul_hopper, grouped_wgrad_hopper, tickets):
            monkeypatch.setattr(kernel, "SMS", 3)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield

    def setup_method(self):
        self.rng, self.sizes_E = np.random.default_rng(0), jnp.asarray(self.SIZE, jnp.int32)
        padded = -(-np.array(self.SIZE) // self.UNIT) * self.UNIT
        self.groups = [(e, slice(end - size, end)) for e, (end, size) in enumerate(zip(np.cumsum(padded), padded)) if size]

    def poisoned(self, *width):
        return self.rows(self.rng, self.group_rows(self.SIZE, self.UNIT), *width)[1]

    def by_group(self, out_M, wanted):
        for e, mine in self.groups:
            close(np.asarray(out_M[mine], np.float32), wanted(e, mine), self.BOUND)

    def test_two_products_and_transposed_weights(self):
        xs_MA = [self.poisoned(width) for width in (128, 64)]
        ws_EBA = [self.weights(self.rng, len(self.SIZE), 320, width) for width in (128, 64)]
        (out_MB,) = [grouped_matmul_hopper.matmul(xs_MA, ws_EBA, self.sizes_E, self.UNIT, transposed=True)]
        self.by_group(out_MB, lambda e, mine: sum(exact(x[mine]) @ exact(w[e]).T for x, w in zip(xs_MA, ws_EBA)))

    def test_the_last_of_many_experts(self):
        sizes_E, w_EAB = jnp.zeros(256, jnp.int32).at[255].set(5), self.weights(self.rng, 256, 64, 128)
        x_MA = self.rows(self.rng, self.group_rows((5,), self.UNIT), 64)[0]
        (out_MB,) = [grouped_matmul_hopper.matmul([x_MA], [w_EAB], sizes_E, self.UNIT)]
        close(exact(out_MB[: self.UNIT]), exact(x_MA[: self.UNIT]) @ exact(w_EAB[255]), self.BOUND)

    def test_swiglu(self):
        x_MD, weight_M = self.poisoned(64), self.poisoned()
        w_gate_EDF, w_up_EDF = (self.weights(self.rng, len(self.SIZE), 64, 192) for _ in range(2))
        outs = grouped_matmul_hopper.swiglu(x_MD, weight_M, w_gate_EDF, w_up_EDF, self.sizes_E, self.UNIT, save=True)

        def gate(e, mine):
            return exact(x_MD[mine]) @ exact(w_gate_EDF[e])

        def up(e, mine):
            return exact(x_MD[mine]) @ exact(w_up_EDF[e])

        def hidden(e, mine):
            return gate(e, mine) / (1 + np.exp(-gate(e, mine))) * up(e, mine) * exact(weight_M[mine])[:, None]

        for out_MF, wanted in zip(outs, (hidden, gate, up), strict=True):
            self.by_group(out_MF, wanted)

    @pytest.mark.parametrize("rows", [16, 13, 8])
    def test_swiglu_of_rows_that_every_group_has(self, rows):
        sizes_E = 16 * jnp.asarray([1, 0, 1, 1, 0, 1], jnp.int32)
        x_ND, weight_M = (jnp.asarray(self.rng.normal(size=shape), jnp.bfloat16) for shape in ((rows, 64), (96,)))
        w_gate_EDF, w_up_EDF = (self.weights(self.rng, 6, 64, 192) for _ in range(2))
        operands = x_ND, weight_M.astype(jnp.float32), w_gate_EDF, w_up_EDF, sizes_E, 16, False
        (got_MF,), (wanted_MF,) = grouped_matmul_hopper.swiglu(*operands), grouped_matmul_xla.swiglu(*operands)
        close(exact(got_MF[:64]), exact(wanted_MF[:64]), self.BOUND)

    @pytest.mark.parametrize("arrays, block", [(1, 64), (2, 16)])
    def test_weight_gradients(self, arrays, block):
        x_MA, *dys_MB = (self.rows(self.rng, self.group_rows(self.SIZE, block), 192)[1] for _ in range(1 + arrays))
        dws_EAB = grouped_wgrad_hopper.weight_gradients(x_MA, dys_MB, self.sizes_E, block, jnp.float32)
        starts = np.cumsum(-(-np.array(self.SIZE) // block) * block)
        for dw_EAB, dy_MB in zip(dws_EAB, dys_MB, strict=True):
            for e, size in enumerate(self.SIZE):
                first = starts[e] - -(-size // block) * block
                mine = slice(first, first + size)
                close(dw_EAB[e], exact(x_MA[mine]).T @ exact(dy_MB[mine]), self.BOUND)


class TestInterpreterFewRows(TestInterpreter):
    """One consumer."""

    SIZE, UNIT, SPARE = (30, 0, 5, 16, 1, *[0] * 11), 16, 0


CUTS = [grouped_matmul_hopper._equal, grouped_matmul_fp8_hopper._whole]
UNIT, PER_UNIT, MOST, COLUMNS = 16, 2, 12, 3


def tiles(cut):
    """A function that gives the fields of every ticket, one after the other, as one warpgroup finds them, and their number."""
    most = 300 * COLUMNS

    def body(rows_gmem, out_gmem, words):
        blocks = tickets.cut_rows(rows_gmem, UNIT, PER_UNIT, MOST, [words])
        thread = lanes.iota(lanes.THREADS)

        def put(place, value):
            tickets.scatter(out_gmem, jnp.where(thread == 0, place, -1), lanes.full(thread, value))

        def step(ticket, _):
            slot = jax.lax.rem(ticket, jnp.int32(2))
            for field, value in enumerate(tickets.look_up(blocks, COLUMNS, MOST, cut, [words], ticket, slot)):
                put(ticket * 4 + field, value)

        count = blocks.count * COLUMNS
        put(most * 4, count)
        jax.lax.fori_loop(0, count, step, None)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((most * 4 + 1,), jnp.int32),
        grid=(1,),
        grid_names=("program",),
        scratch_types=[plgpu.SMEM((2, tickets.ATTACHED), jnp.int32)],
        compiler_params=PARAMS,
    )


def tiles_cover_each_expert_once(cut, cases, experts):
    rng, run = np.random.default_rng(0), jax.jit(tiles(cut))
    for case in range(cases):
        lengths_E = rng.multinomial(rng.integers(0, 400), rng.dirichlet(np.full(experts, 0.5))) * (case > 0)
        rows_E = np.maximum(lengths_E * 8 - rng.integers(0, 8, experts), 0)  # padded to 16, of which each counts as 2
        lengths_E = -(-rows_E // UNIT) * PER_UNIT
        blocks_E, starts_E = -(-lengths_E // MOST), np.cumsum(lengths_E) - lengths_E
        *fields, count = np.asarray(run(jnp.asarray(rows_E, jnp.int32))).tolist()
        found = np.reshape(fields, (-1, 4))[:count]
        assert found[:, 0].tolist() == np.repeat(np.arange(experts), blocks_E * COLUMNS).tolist()
        assert found[:, 2].tolist() == list(range(COLUMNS)) * blocks_E.sum()
        rows = [(e, row) for e, first, _, length in found[::COLUMNS] for row in range(first, first + length)]
        assert rows == [(e, start + row) for e, (start, n) in enumerate(zip(starts_E, lengths_E)) for row in range(n)]
        assert len(found) == 0 or 0 < found[:, 3].min() <= found[:, 3].max() <= MOST


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("experts", [20, 160])
def test_tiles_in_the_interpreter(cut, experts, monkeypatch):
    lanes_interpreted.install(monkeypatch, tickets)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        tiles_cover_each_expert_once(cut, cases=3, experts=experts)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("experts", [20, 160, 256])
def test_tiles(cut, experts):
    tiles_cover_each_expert_once(cut, cases=20, experts=experts)


def exact(a):
    return np.asarray(a, np.float32)


@pytest.mark.parametrize(
    "rows, unit, tokens",
    [(4096, 64, 4096), (128, 16, 128), (64, 16, 64), (64, 16, 8), (64, 16, 13)],
    ids=["training", "decode", "few rows", "eight for all", "thirteen for all"],
)
def test_lowers_for_cuda_inside_shard_map(rows, unit, tokens, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    widths = [(2048, 1408), (2048, 1408), (1408, 2048)]
    batch = P(("data", "expert"))

    def mlp(x_MD, weight_M, experts, sizes_E):
        experts = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), experts)
        return grouped_mlp(x_MD, weight_M, *experts, sizes_E, unit, "pallas")

    def gradients(x_MD, weight_M, experts, sizes_E):
        out_MD, vjp = jax.vjp(lambda *a: jax.shard_map(mlp, out_specs=batch)(*a, sizes_E), x_MD, weight_M, experts)
        return vjp(out_MD)

    def array(shape, dtype=jnp.bfloat16, spec=batch):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(jax.sharding.get_abstract_mesh(), spec))

    experts = [array((4, *width), spec=P("expert")) for width in widths]
    args = array((tokens, 2048)), array((rows,), jnp.float32), experts, array((4,), jnp.int32, P("expert"))
    text = jax.jit(gradients).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 6


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jax.ShapeDtypeStruct((128, 128), jnp.float32)}, "float32"),
        ({"w": jax.ShapeDtypeStruct((4, 160, 128), jnp.bfloat16)}, "64 divides"),
        ({"w": jax.ShapeDtypeStruct((4, 64, 128), jnp.bfloat16)}, "128 or more"),
        ({"w": jax.ShapeDtypeStruct((257, 128, 128), jnp.bfloat16)}, "257 experts"),
        ({"unit": 8}, "row_unit is 8"),
        ({"x": jax.ShapeDtypeStruct((120, 128), jnp.bfloat16)}, "120 rows"),
    ],
)
def test_the_kernel_says_what_it_needs(change, message, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    fits = {
        "x": jax.ShapeDtypeStruct((128, 128), jnp.bfloat16),
        "w": jax.ShapeDtypeStruct((4, 128, 192), jnp.bfloat16),
        "unit": 16,
    }
    operands = fits | change
    run = functools.partial(grouped_matmul, row_unit=operands["unit"], implementation="pallas")
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, operands["x"], operands["w"], jax.ShapeDtypeStruct((4,), jnp.int32))


def test_rows_are_all_or_those_of_every_group():
    x_MD, weight_M, sizes_E = jnp.zeros((8, 16)), jnp.zeros(16), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="x has 8 rows, expected 16, as there are weights, or row_unit, 4"):
        grouped_mlp(x_MD, weight_M, *[jnp.zeros((2, 16, 16))] * 3, sizes_E, 4)


def test_padded_rows_always_suffice():
    rng = np.random.default_rng(0)
    for _ in range(300):
        experts, rows = int(rng.integers(1, 20)), int(rng.integers(1, 200))
        unit = row_unit(rows, experts)
        sizes = np.bincount(rng.integers(0, rng.integers(1, experts + 1), rows), minlength=experts)
        assert (-(-sizes // unit) * unit).sum() <= padded_rows(rows, experts, unit)
        assert padded_rows(rows, experts, unit) % unit == 0
