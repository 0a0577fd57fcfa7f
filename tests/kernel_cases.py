"""Cases that every implementation of a kernel must pass; a new implementation inherits them all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import latent_pages, reference
from pallas_kernels.decode_schedule import make_schedule
from pallas_kernels.grouped_matmul_fp8 import quantise_rows, quantise_weights


def close(got, wanted, bound=1e-5):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(got - wanted) <= bound * max(np.linalg.norm(wanted), 1e-30)


class GroupedCases:
    """Rows in groups; what padding rows hold is zero, what rows of no group hold is poison. References are computed in float32."""

    DTYPE, WIDTHS, BOUND = jnp.float32, ((16, 24),), 1e-5
    UNITS = 1, 8
    SIZES = (5, 0, 8, 3), (0, 0, 0, 0), (30, 0, 0, 0), (0, 0, 0, 17), (1, 1, 1, 1), (8, 8, 8, 8)
    SPARE = 2  # blocks of no group

    def pytest_generate_tests(self, metafunc):
        for name, values in (("sizes", self.SIZES), ("unit", self.UNITS), ("widths", self.WIDTHS)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, values, ids=str)

    def group_rows(self, sizes, unit):
        """Whether a row is of a group, and whether it belongs to one or pads it: bool [M]."""
        padded = -(-np.array(sizes) // unit) * unit
        row_M = np.arange(int(padded.sum()) + self.SPARE * unit)
        starts = np.cumsum(padded) - padded
        of_group_M = ((row_M[:, None] >= starts) & (row_M[:, None] < starts + sizes)).any(axis=1)
        return of_group_M, row_M < padded.sum()

    def rows(self, rng, sizes, unit, *width):
        """Clean rows, for a reference, and the same ones with poison in rows of no group."""
        of_group_M, used_M = (mask.reshape(-1, *[1] * len(width)) for mask in self.group_rows(sizes, unit))
        clean = np.where(of_group_M, rng.normal(size=(len(of_group_M), *width)), 0)
        return [jnp.asarray(a, jnp.float32 if not width else self.DTYPE) for a in (clean, np.where(used_M, clean, np.nan))]

    def weights(self, rng, *shape):
        return jnp.asarray(rng.normal(size=shape) / 8, self.DTYPE)

    def check(self, got, wanted, used_M):
        """Compares what is said of rows in rows of groups only."""
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == (jnp.float32 if a.ndim == 1 else self.DTYPE)
            mine = used_M if a.shape[0] == len(used_M) else slice(None)
            close(np.asarray(a, np.float32)[mine], np.asarray(b)[mine], self.BOUND)


def with_gradients(function, operands, cotangent):
    out, vjp = jax.vjp(function, *operands)
    return out, *vjp(cotangent)


class GroupedMatmulCases(GroupedCases):
    """`matmul` has `reference.grouped_matmul`'s signature and is differentiable."""

    matmul = None

    def operands(self, sizes, unit, widths):
        rng = np.random.default_rng(sum(sizes) + unit)
        x, g = self.rows(rng, sizes, unit, widths[0]), self.rows(rng, sizes, unit, widths[1])
        return *zip(x, g), self.weights(rng, len(sizes), *widths), jnp.asarray(sizes, jnp.int32)

    def test_forward_and_gradients(self, sizes, unit, widths):
        (x_MK, g_MF), (poisoned_x_MK, poisoned_g_MF), w_EKF, sizes_E = self.operands(sizes, unit, widths)
        exact = [a.astype(jnp.float32) for a in (x_MK, w_EKF, g_MF)]
        wanted = with_gradients(lambda x, w: reference.grouped_matmul(x, w, sizes_E, unit), exact[:2], exact[2])
        matmul = functools.partial(type(self).matmul, group_sizes_E=sizes_E, row_unit=unit)
        got = with_gradients(matmul, (poisoned_x_MK, w_EKF), poisoned_g_MF)
        self.check(got, wanted, self.group_rows(sizes, unit)[1])

    def test_nothing_of_experts_times_rows_is_made(self):
        _, (x_MK, g_MF), w_EKF, sizes_E = self.operands(self.SIZES[0], self.UNITS[-1], self.WIDTHS[0])
        matmul = functools.partial(type(self).matmul, group_sizes_E=sizes_E, row_unit=self.UNITS[-1])
        text = jax.jit(lambda x, w, g: with_gradients(matmul, (x, w), g)).lower(x_MK, w_EKF, g_MF).compile().as_text()
        assert f"[{w_EKF.shape[0]},{x_MK.shape[0]}," not in text


class GroupedMlpCases(GroupedCases):
    """`mlp` has `reference.grouped_mlp`'s signature and is differentiable."""

    mlp = None

    def operands(self, sizes, unit, widths):
        rng, (model, hidden) = np.random.default_rng(sum(sizes) + unit), widths
        rows = [self.rows(rng, sizes, unit, *width) for width in ((model,), (), (model,))]
        shapes = [(len(sizes), *shape) for shape in ((model, hidden), (model, hidden), (hidden, model))]
        return *zip(*rows), [self.weights(rng, *shape) for shape in shapes], jnp.asarray(sizes, jnp.int32)

    def test_forward_and_gradients(self, sizes, unit, widths):
        (x_MD, weight_M, g_MD), (*poisoned, poisoned_g_MD), experts, sizes_E = self.operands(sizes, unit, widths)
        exact = [a.astype(jnp.float32) for a in (x_MD, weight_M, *experts)]
        mlp = functools.partial(reference.grouped_mlp, group_sizes_E=sizes_E, row_unit=unit)
        wanted = with_gradients(mlp, exact, g_MD.astype(jnp.float32))
        mlp = functools.partial(type(self).mlp, group_sizes_E=sizes_E, row_unit=unit)
        got = with_gradients(mlp, (*poisoned, *experts), poisoned_g_MD)
        self.check(got, wanted, self.group_rows(sizes, unit)[1])

    def test_the_same_when_not_differentiated(self, sizes, unit, widths):
        _, (x_MD, weight_M, _), experts, sizes_E = self.operands(sizes, unit, widths)
        mlp = functools.partial(type(self).mlp, group_sizes_E=sizes_E, row_unit=unit)
        plain, differentiated = mlp(x_MD, weight_M, *experts), jax.vjp(mlp, x_MD, weight_M, *experts)[0]
        used_M = self.group_rows(sizes, unit)[1]
        close(np.asarray(plain, np.float32)[used_M], np.asarray(differentiated, np.float32)[used_M], self.BOUND)


class AttentionCases:
    """`attention` has `reference.mla_attention`'s signature and is differentiable. The reference is computed in float32."""

    attention = None
    DTYPE, DIMS, BOUND = jnp.float32, (16, 8, 12), 1e-5  # nope, rope and value dimensions

    def operands(self, batch, length, heads=3, seed=0):
        rng = np.random.default_rng(seed)
        nope, rope, value = self.DIMS
        shapes = [(heads, nope), (heads, rope), (heads, nope), (rope,), (heads, value)]
        return [jnp.asarray(rng.normal(size=(batch, length, *shape)), self.DTYPE) for shape in shapes]

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
        @functools.partial(jax.jit, static_argnums=0)
        def run(attention, arrays, ids_BT):
            out, vjp = jax.vjp(lambda *a: attention(*a, ids_BT, scale=0.1), *arrays)
            return out, *vjp(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype))

        for ids_BT in choices_of_ids:
            with jax.default_matmul_precision("highest"):
                wanted = run(reference.mla_attention, [x.astype(jnp.float32) for x in arrays], ids_BT)
            for got_array, wanted_array in zip(run(type(self).attention, arrays, ids_BT), wanted):
                assert got_array.dtype == self.DTYPE
                close(got_array, wanted_array, self.BOUND)

    def test_what_a_position_does_not_see_does_not_count(self):
        arrays, ids_BT = self.operands(1, 150), jnp.asarray([[1] * 70 + [2] * 80])
        attention = jax.jit(lambda *a: type(self).attention(*a, ids_BT, scale=0.1))
        hidden_T = (np.arange(150) < 70) | (np.arange(150) >= 120)
        poisoned = [jnp.where(hidden_T.reshape(1, -1, *(1,) * (x.ndim - 2)), jnp.asarray(1e4, x.dtype), x) for x in arrays]
        assert (attention(*arrays)[:, 70:120] == attention(*poisoned)[:, 70:120]).all()


class DecodeCases:
    """`decode` has `reference.mla_decode`'s signature. Pages that no request owns hold NaN, rows past a request's end 1000."""

    decode = None
    DTYPE, DIMS, BOUND = jnp.float32, (24, 8), 1e-5
    # Tokens, heads, and for each request the position of its last token: -1 is an empty slot.
    SHAPES = (
        (1, 128, (0, 62, 63, 64, 1000)),
        (1, 16, (700, -1, 127, 128, 5, -1)),
        (1, 5, (255, 256)),
        (2, 16, (90, 1, 640)),
        (3, 16, (300, -1, 63)),
        (4, 16, (3, 64, 66, 1500)),
        (2, 128, (129, 200, 7)),
        (1, 64, (5000,)),
        (1, 16, (5000,)),
        (1, 128, tuple(range(-1, 900, 31))),
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
        pages = latent_pages.LatentPages(jnp.asarray(latent_PSC, self.DTYPE), jnp.asarray(rope_PSR, self.DTYPE), None)
        q_latent_BTNC, q_rope_BTNR = (
            jnp.asarray(rng.normal(size=(len(last), tokens, heads, dim)), self.DTYPE) for dim in self.DIMS
        )
        positions_BT = last[:, None] - np.arange(tokens)[::-1]  # the first ones of a short request see nothing
        return q_latent_BTNC, q_rope_BTNR, pages, jnp.asarray(table_BP), jnp.asarray(np.maximum(positions_BT, -1), jnp.int32)

    def check(self, operands, **kwargs):
        got_BTNC = type(self).decode(*operands, scale=0.2, **kwargs)
        exact = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == self.DTYPE else x, operands)
        assert got_BTNC.dtype == self.DTYPE
        close(got_BTNC, reference.mla_decode(*exact, scale=0.2), self.BOUND)

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
        latent, scale = latent_pages.pack(pages.latent, self.FORMAT)
        return q_latent_BTNC, q_rope_BTNR, latent_pages.LatentPages(latent, pages.rope, scale), *rest


class Fp8GroupedMatmulCases(GroupedCases):
    """`matmul` has `reference.grouped_matmul_fp8`'s signature, and its result in bfloat16."""

    matmul = None
    DTYPE, WIDTHS, UNITS = jnp.bfloat16, ((256, 384),), (8, 32)
    SIZES = (5, 0, 8, 3), (0, 0, 0, 0), (70, 0, 130, 129)

    def operands(self, sizes, unit, widths):
        """Rows for the reference, rows with poison, and weights; the magnitudes of blocks differ."""
        rng = np.random.default_rng(0)
        depth, columns = widths
        rows = self.rows(rng, sizes, unit, depth)
        factor_MK = np.repeat(np.exp(rng.normal(size=(len(rows[0]), depth // 128))), 128, axis=1)
        factor_EK1 = np.repeat(np.exp(rng.normal(size=(len(sizes), depth // 128, 1))), 128, axis=1)
        w_EKF = self.weights(rng, len(sizes), depth, columns) * jnp.asarray(factor_EK1, self.DTYPE)
        return *(x * jnp.asarray(factor_MK, self.DTYPE) for x in rows), w_EKF, jnp.asarray(sizes, jnp.int32)

    def test_multiplies_what_the_8_bit_operands_stand_for(self, sizes, unit, widths):
        clean_MK, poisoned_MK, w_EKF, sizes_E = self.operands(sizes, unit, widths)
        clean, poisoned, w = jax.jit(lambda *a: (*map(quantise_rows, a[:2]), quantise_weights(a[2])))(
            clean_MK, poisoned_MK, w_EKF
        )
        got_MF = type(self).matmul(poisoned, w, sizes_E, row_unit=unit)
        with jax.default_matmul_precision("highest"):
            wanted_MF = jax.jit(reference.grouped_matmul_fp8, static_argnums=3)(clean, w, sizes_E, unit)
        used_M = self.group_rows(sizes, unit)[1]
        assert got_MF.dtype == jnp.bfloat16
        close(got_MF[used_M], wanted_MF[used_M], 2.5e-3)  # bfloat16's rounding is 1.7e-3

    def test_is_near_the_product_of_the_operands(self, unit):
        clean_MK, poisoned_MK, w_EKF, sizes_E = self.operands((70, 0, 33), unit, self.WIDTHS[0])
        got_MF = type(self).matmul(poisoned_MK, quantise_weights(w_EKF), sizes_E, row_unit=unit)
        operands = clean_MK.astype(jnp.float32), w_EKF.astype(jnp.float32)
        used_M = self.group_rows((70, 0, 33), unit)[1]
        close(got_MF[used_M], reference.grouped_matmul(*operands, sizes_E, row_unit=unit)[used_M], 0.05)
