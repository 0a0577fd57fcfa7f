"""Cases that every implementation of a kernel must pass; a new implementation inherits them all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import latent_pages, reference
from pallas_kernels.decode_schedule import make_schedule
from pallas_kernels.grouped_matmul_fp8 import quantise_rows, quantise_weights


def close(got, wanted, bound=1e-5, of=""):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(got - wanted) <= bound * max(np.linalg.norm(wanted), 1e-30), of


def assert_repeats(run, *operands, times=100):
    """All results of a compiled function are the same bits in every run."""
    first = run(*operands)

    def bits(x):
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")

    same = jax.jit(
        lambda a, b: functools.reduce(
            jnp.logical_and, ((bits(x) == bits(y)).all() for x, y in zip(*map(jax.tree.leaves, (a, b))))
        )
    )
    assert all(same(first, run(*operands)) for _ in range(times))


def in_float32(function):
    """The function compiled, of operands in float32 whatever they were, and without TF32."""

    @jax.jit
    def run(*operands):
        with jax.default_matmul_precision("highest"):
            return function(*jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands))

    return run


class GroupedCases:
    """Rows in groups; what padding rows hold is zero, what rows of no group hold is poison. References are computed in float32.

    A shape is widths, a row unit, and sizes of the groups: as many groups and rows for each, so that one program takes them all.
    """

    DTYPE, BOUND = jnp.float32, 1e-5
    SIZES = (5, 0, 8, 3), (0, 0, 0, 0), (30, 0, 0, 0), (0, 0, 0, 17), (1, 1, 1, 1), (8, 8, 8, 8)
    SHAPES = ((16, 24), 8, SIZES), ((16, 24), 1, SIZES)
    SPARE = 2  # blocks of no group, whatever the sizes

    def pytest_generate_tests(self, metafunc):
        if "choices" in metafunc.fixturenames:
            ids = [f"{widths}-{unit}-{max(map(sum, choices))} rows" for widths, unit, choices in self.SHAPES]
            metafunc.parametrize("widths, unit, choices", self.SHAPES, ids=ids)

    def group_rows(self, sizes, unit, choices=()):
        """Whether a row is of a group, and whether it belongs to one or pads it: bool [M]."""
        padded, *others = (-(-np.array(each) // unit) * unit for each in (sizes, *choices))
        row_M = np.arange(max(int(each.sum()) for each in (padded, *others)) + self.SPARE * unit)
        starts = np.cumsum(padded) - padded
        of_group_M = ((row_M[:, None] >= starts) & (row_M[:, None] < starts + sizes)).any(axis=1)
        return of_group_M, row_M < padded.sum()

    def rows(self, rng, group_rows, *width):
        """Clean rows, for a reference, and the same ones with poison in rows of no group."""
        of_group_M, used_M = (mask.reshape(-1, *[1] * len(width)) for mask in group_rows)
        clean = np.where(of_group_M, rng.normal(size=(len(of_group_M), *width)), 0)
        dtype = self.DTYPE if width else jnp.float32
        return [jnp.asarray(np.asarray(a, dtype)) for a in (clean, np.where(used_M, clean, np.nan))]

    def weights(self, rng, *shape):
        return jnp.asarray(np.asarray(rng.standard_normal(shape, np.float32) / 8, self.DTYPE))

    def check_all(self, make, function, wanted_function, unit, choices, row_widths, weights):
        """What `make` makes of a function of rows of these widths, weights and group sizes, for all choices of those."""
        run, run_reference = jax.jit(make(function, unit)), in_float32(make(wanted_function, unit))
        for seed, sizes in enumerate(choices):
            rng, group_rows = np.random.default_rng(seed), self.group_rows(sizes, unit, choices)
            (*rows, g), (*poisoned, poisoned_g) = zip(*(self.rows(rng, group_rows, *width) for width in row_widths))
            sizes_E = jnp.asarray(sizes, jnp.int32)
            wanted = run_reference(sizes_E, (*rows, *weights), g)
            for a, b in zip(run(sizes_E, (*poisoned, *weights), poisoned_g), wanted, strict=True):
                assert a.dtype == (jnp.float32 if a.ndim == 1 else self.DTYPE)
                mine = group_rows[1] if a.shape[0] == len(group_rows[1]) else slice(None)
                close(np.asarray(a, np.float32)[mine], np.asarray(b)[mine], self.BOUND, f"sizes {sizes}, {a.shape}")


def without_gradients(function, row_unit):
    return lambda sizes_E, operands, _: [function(*operands, group_sizes_E=sizes_E, row_unit=row_unit)]


def with_gradients(function, row_unit):
    def run(sizes_E, operands, cotangent):
        out, vjp = jax.vjp(functools.partial(function, group_sizes_E=sizes_E, row_unit=row_unit), *operands)
        return out, *vjp(cotangent)

    return run


class GroupedMatmulCases(GroupedCases):
    """`matmul` has `reference.grouped_matmul`'s signature and is differentiable."""

    matmul = None

    def test_forward_and_gradients(self, widths, unit, choices):
        weights = [self.weights(np.random.default_rng(0), len(choices[0]), *widths)]
        row_widths = [(width,) for width in widths]
        self.check_all(with_gradients, type(self).matmul, reference.grouped_matmul, unit, choices, row_widths, weights)

    def test_nothing_of_experts_times_rows_is_made(self):
        (depth, columns), unit, choices = self.SHAPES[0]
        experts, rows = len(choices[0]), len(self.group_rows(choices[0], unit, choices)[0])
        shapes = (rows, depth), (experts, depth, columns), (rows, columns)
        x_MK, w_EKF, g_MF = (jax.ShapeDtypeStruct(shape, self.DTYPE) for shape in shapes)
        run = jax.jit(with_gradients(type(self).matmul, unit))
        text = run.lower(jax.ShapeDtypeStruct((experts,), jnp.int32), (x_MK, w_EKF), g_MF).compile().as_text()
        assert f"[{rows}," in text and f"[{experts},{rows}," not in text


class GroupedMlpCases(GroupedCases):
    """`mlp` has `reference.grouped_mlp`'s signature and is differentiable."""

    mlp = None

    def test_forward_and_gradients(self, widths, unit, choices):
        self.check_mlp(with_gradients, widths, unit, choices)

    def test_when_not_differentiated(self):
        for shape in self.SHAPES[:2]:
            self.check_mlp(without_gradients, *shape)

    @pytest.mark.parametrize("make", [without_gradients, with_gradients])
    @pytest.mark.parametrize("missing", [0, 3])
    def test_rows_that_every_group_has(self, make, missing):
        (model, hidden), unit, _ = min(self.SHAPES, key=lambda shape: (shape[1], shape[0]))  # the unit of few tokens
        sizes, rng = unit * np.array([1, 0, 1, 1, 0, 1]), np.random.default_rng(0)
        weights = [self.weights(rng, len(sizes), *shape) for shape in ((model, hidden), (model, hidden), (hidden, model))]
        x_ND = jnp.asarray(rng.normal(size=(unit - missing, model)), self.DTYPE)
        used_M = np.arange(unit * len(sizes)) < sizes.sum()
        weight_M = rng.random(len(used_M)) * (rng.random(len(used_M)) < 0.3)
        cotangent_MD = rng.normal(size=(len(used_M), model))
        clean, poisoned = (
            [
                jnp.asarray(np.where(used_M, x.T, other).T, dtype)
                for x, dtype in ((weight_M, jnp.float32), (cotangent_MD, self.DTYPE))
            ]
            for other in (0, np.nan)
        )
        sizes_E = jnp.asarray(sizes, jnp.int32)
        got = jax.jit(make(type(self).mlp, unit))(sizes_E, (x_ND, poisoned[0], *weights), poisoned[1])
        wanted = in_float32(make(reference.grouped_mlp, unit))(sizes_E, (x_ND, clean[0], *weights), clean[1])
        for a, b in zip(got, wanted, strict=True):
            mine = used_M if a.shape[0] == len(used_M) else slice(None)
            close(np.asarray(a, np.float32)[mine], np.asarray(b)[mine], self.BOUND, a.shape)

    def check_mlp(self, make, widths, unit, choices):
        rng, (model, hidden) = np.random.default_rng(0), widths
        weights = [self.weights(rng, len(choices[0]), *shape) for shape in ((model, hidden), (model, hidden), (hidden, model))]
        row_widths = (model,), (), (model,)
        self.check_all(make, type(self).mlp, reference.grouped_mlp, unit, choices, row_widths, weights)


class AttentionCases:
    """`attention` has `reference.mla_attention`'s signature and is differentiable. The reference is computed in float32."""

    attention = None
    DTYPE, DIMS, BOUND = jnp.float32, (16, 8, 12), 1e-5  # nope, rope and value dimensions

    def operands(self, batch, length, heads=3, seed=0):
        rng = np.random.default_rng(seed)
        nope, rope, value = self.DIMS
        shapes = [(heads, nope), (heads, rope), (heads, nope), (rope,), (heads, value)]
        return [jnp.asarray(np.asarray(rng.normal(size=(batch, length, *shape)), self.DTYPE)) for shape in shapes]

    def segments(self, batch, length, seed=0):
        """One segment; packed ones; ids in no order; segments that are interrupted."""
        rng = np.random.default_rng(seed)
        ids = (
            np.full((batch, length), 7),
            np.sort(rng.integers(0, 4, (batch, length)), axis=1),
            rng.integers(-2, 3, (batch, length)),
        )
        interrupted = np.repeat(rng.integers(0, 3, (batch, length // 50 + 1)), 50, axis=1)[:, :length]
        return [jnp.asarray(ids_BT, jnp.int32) for ids_BT in (*ids, interrupted)]

    @pytest.mark.parametrize("batch, length", [(1, 1), (2, 37), (1, 130)])
    def test_forward_and_gradients(self, batch, length):
        self.check(self.operands(batch, length), self.segments(batch, length))

    def test_without_segments(self):
        self.check(self.operands(2, 37), [None])

    def check(self, arrays, choices_of_ids):
        def gradients(attention, arrays, ids_BT):
            out, vjp = jax.vjp(lambda *a: attention(*a, ids_BT, scale=0.1), *arrays)
            return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

        run = jax.jit(functools.partial(gradients, type(self).attention))
        run_reference = in_float32(functools.partial(gradients, reference.mla_attention))
        for ids_BT in choices_of_ids:
            for got_array, wanted_array in zip(run(arrays, ids_BT), run_reference(arrays, ids_BT)):
                assert got_array.dtype == self.DTYPE
                close(got_array, wanted_array, self.BOUND)

    def test_what_a_position_does_not_see_does_not_count(self):
        arrays, ids_BT = self.operands(1, 150), jnp.asarray([[1] * 70 + [2] * 80])
        attention = jax.jit(lambda *a: type(self).attention(*a, ids_BT, scale=0.1))
        hidden_T = (np.arange(150) < 70) | (np.arange(150) >= 120)
        hidden = [hidden_T.reshape(1, -1, *(1,) * (x.ndim - 2)) for x in arrays]
        poisoned = [jnp.asarray(np.where(there, np.asarray(1e4, x.dtype), x)) for there, x in zip(hidden, arrays)]
        got_BTNV, again_BTNV = (np.asarray(attention(*operands)) for operands in (arrays, poisoned))
        assert (got_BTNV[:, 70:120] == again_BTNV[:, 70:120]).all()


class DecodeCases:
    """`decode` has `reference.mla_decode`'s signature. Pages that no request owns hold NaN, rows past a request's end 1000."""

    decode = None
    DTYPE, DIMS, BOUND = jnp.float32, (24, 8), 1e-5
    # Tokens, heads, and for each request the position of its last token: -1 is an empty slot.
    SHAPES = (
        (1, 16, (700, -1, 127, 128, 5, -1)),
        (1, 5, (255, 256)),
        (2, 16, (90, 1, 640)),
        (3, 16, (300, -1, 63)),
        (4, 16, (3, 64, 66, 1500)),
        (2, 128, (129, 200, 7)),
        (1, 64, (5000,)),
        (1, 16, (5000,)),
        (1, 128, (0, 62, 63, 64, 1000, *range(-1, 900, 31))),
        (1, 16, (20000,)),
        (1, 16, (5000, 63, *range(-1, 900, 31))),
        (3, 16, (4000, 63, *range(-1, 900, 31))),
    )

    def operands(self, tokens, heads, last, seed=0):
        rng = np.random.default_rng(seed)
        last = np.array(last)
        blocks = last // 64 + 1
        table_BP = np.zeros((len(last), max(blocks.max(), 1) + 1), np.int32)
        order = 1 + rng.permutation(blocks.sum() + 2)  # page 0 and two more are nobody's; page 0 must be finite
        latent_PSC, rope_PSR = (np.full((len(order) + 1, 64, dim), np.nan, np.float32) for dim in self.DIMS)
        latent_PSC[0] = rope_PSR[0] = 1000
        for b, count in enumerate(blocks):
            table_BP[b, :count], order = order[:count], order[count:]
            for pages in (latent_PSC, rope_PSR):
                rows = rng.normal(size=(64 * count, pages.shape[2]))
                rows[last[b] + 1 :] = 1000
                pages[table_BP[b, :count]] = rows.reshape(count, 64, pages.shape[2])
        pages = (jnp.asarray(np.asarray(pages_PSX, self.DTYPE)) for pages_PSX in (latent_PSC, rope_PSR))
        q_latent_BTNC, q_rope_BTNR = (
            jnp.asarray(np.asarray(rng.normal(size=(len(last), tokens, heads, dim)), self.DTYPE)) for dim in self.DIMS
        )
        positions_BT = last[:, None] - np.arange(tokens)[::-1]  # the first ones of a short request see nothing
        positions_BT = jnp.asarray(np.maximum(positions_BT, -1), jnp.int32)
        return q_latent_BTNC, q_rope_BTNR, latent_pages.LatentPages(*pages, None), jnp.asarray(table_BP), positions_BT

    def check(self, operands, **kwargs):
        got_BTNC = jax.jit(functools.partial(type(self).decode, scale=0.2))(*operands, **kwargs)
        assert got_BTNC.dtype == self.DTYPE
        close(got_BTNC, in_float32(functools.partial(reference.mla_decode, scale=0.2))(*operands), self.BOUND)

    @pytest.mark.parametrize("tokens, heads, last", SHAPES)
    def test_equals_the_reference(self, tokens, heads, last):
        self.check(self.operands(tokens, heads, last))

    def test_tokens_of_any_positions(self):
        operands = self.operands(4, 16, (500, 64, 200))[:-1]
        self.check((*operands, jnp.asarray([[500, -1, 3, 77], [0, 64, 63, 1], [-1, -1, 200, -1]], jnp.int32)))

    def test_a_schedule_may_be_given(self):
        operands = self.operands(1, 128, (900, 77, -1, 400))
        self.check(operands, schedule=make_schedule(operands[-1], 128))


class QuantisedDecodeCases(DecodeCases):
    """The same over pages of `FORMAT`; what is wanted is exact attention over the latents that these hold."""

    FORMAT = None
    DTYPE, DIMS, BOUND = jnp.bfloat16, (512, 64), 8e-3

    def operands(self, tokens, heads, last, seed=0):
        q_latent_BTNC, q_rope_BTNR, pages, *rest = super().operands(tokens, heads, last, seed)
        latent, scale = jax.jit(latent_pages.pack, static_argnums=1)(pages.latent, self.FORMAT)
        return q_latent_BTNC, q_rope_BTNR, latent_pages.LatentPages(latent, pages.rope, scale), *rest


class Fp8GroupedMatmulCases(GroupedCases):
    """`matmul` has `reference.grouped_matmul_fp8`'s signature, and its result in bfloat16."""

    matmul = None
    DTYPE = jnp.bfloat16
    SIZES = (5, 0, 8, 3), (0, 0, 0, 0), (70, 0, 130, 129)
    SHAPES = ((256, 384), 8, SIZES), ((256, 384), 32, SIZES)

    def operands(self, group_rows, experts, widths):
        """Rows for the reference, rows with poison, and weights; the magnitudes of blocks differ."""
        rng = np.random.default_rng(0)
        depth, columns = widths
        rows = self.rows(rng, group_rows, depth)
        factor_MK = np.repeat(np.exp(rng.normal(size=(len(rows[0]), depth // 128))), 128, axis=1)
        factor_EK1 = np.repeat(np.exp(rng.normal(size=(experts, depth // 128, 1))), 128, axis=1)
        w_EKF = self.weights(rng, experts, depth, columns) * jnp.asarray(factor_EK1, self.DTYPE)
        return *(x * jnp.asarray(factor_MK, self.DTYPE) for x in rows), w_EKF

    def test_multiplies_what_the_8_bit_operands_stand_for(self, widths, unit, choices):
        quantise = jax.jit(lambda *a: (*map(quantise_rows, a[:2]), quantise_weights(a[2])))
        matmul = jax.jit(functools.partial(type(self).matmul, row_unit=unit))
        wanted_matmul = in_float32(functools.partial(reference.grouped_matmul_fp8, row_unit=unit))
        for sizes in choices:
            group_rows, sizes_E = self.group_rows(sizes, unit, choices), jnp.asarray(sizes, jnp.int32)
            clean, poisoned, w = quantise(*self.operands(group_rows, len(sizes), widths))
            got_MF, wanted_MF = (np.asarray(a) for a in (matmul(poisoned, w, sizes_E), wanted_matmul(clean, w, sizes_E)))
            assert got_MF.dtype == jnp.bfloat16
            used_M = group_rows[1]
            close(got_MF[used_M], wanted_MF[used_M], 2.5e-3, f"sizes {sizes}")  # bfloat16's rounding is 1.7e-3

    def test_is_near_the_product_of_the_operands(self):
        sizes, (widths, unit, _) = (70, 0, 33), self.SHAPES[0]
        group_rows, sizes_E = self.group_rows(sizes, unit), jnp.asarray(sizes, jnp.int32)
        clean_MK, poisoned_MK, w_EKF = self.operands(group_rows, len(sizes), widths)
        matmul = jax.jit(lambda x, w: type(self).matmul(x, quantise_weights(w), sizes_E, row_unit=unit))
        wanted_matmul = in_float32(functools.partial(reference.grouped_matmul, row_unit=unit))
        got_MF, wanted_MF = (np.asarray(a) for a in (matmul(poisoned_MK, w_EKF), wanted_matmul(clean_MK, w_EKF, sizes_E)))
        close(got_MF[group_rows[1]], wanted_MF[group_rows[1]], 0.05)
