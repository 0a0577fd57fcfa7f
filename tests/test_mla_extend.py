"""Naive attention over pages: implementations against the reference, in one part and in several, over every format; compilation for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch, latent_pages, mla_attention, mla_extend, reference
from pallas_kernels.latent_pages import PAGE
from tests.kernel_cases import AttentionCases, DecodeCases, close, in_float32


class ExtendCases:
    """`extend` has `reference.mla_extend`'s signature. Pages that no request owns hold NaN, rows past a request's past 1000."""

    extend = None
    DTYPE, DIMS, BOUND = jnp.float32, (16, 8, 12, 24), 1e-5  # nope, rope, value, latent
    # New tokens, heads, and how many tokens are there before them.
    SHAPES = (70, 3, (0, 1, 64, 200)), (5, 1, (0, 0)), (130, 2, (700,)), (64, 17, (127, 128, 129))

    def operands(self, tokens, heads, past, format=None):
        nope, rope, value, latent = self.DIMS
        rng = np.random.default_rng(heads)

        def normal(*shape, of=1.0):
            return jnp.asarray(np.asarray(rng.normal(size=shape) * of, self.DTYPE))

        maker = DecodeCases()
        maker.DTYPE, maker.DIMS = self.DTYPE, (latent, rope)
        pages, table_BP = maker.operands(1, 1, [count - 1 for count in past])[2:4]
        if format:
            stored, scale = jax.jit(latent_pages.pack, static_argnums=1)(pages.latent, format)
            pages = latent_pages.LatentPages(stored, pages.rope, scale)
        new = normal(len(past), tokens, heads, nope), normal(len(past), tokens, heads, rope), normal(len(past), tokens, latent)
        weights = (normal(latent, heads, width, of=latent**-0.5) for width in (nope, value))
        return *new, normal(len(past), tokens, rope), pages, table_BP, jnp.asarray(past, jnp.int32), *weights

    def check(self, operands):
        got_BTNV = jax.jit(functools.partial(type(self).extend, scale=0.1))(*operands)
        assert got_BTNV.dtype == self.DTYPE
        close(got_BTNV, in_float32(functools.partial(reference.mla_extend, scale=0.1))(*operands), self.BOUND)

    @pytest.mark.parametrize("tokens, heads, past", SHAPES)
    def test_equals_the_reference(self, tokens, heads, past):
        self.check(self.operands(tokens, heads, past))

    def test_what_the_table_names_behind_the_past_does_not_count(self):
        *new, pages, table_BP, past_B, w_uk_CNH, w_uv_CNV = self.operands(33, 2, (0, 70, 128))
        extend = jax.jit(functools.partial(type(self).extend, scale=0.1))
        pages = jax.tree.map(lambda x: jnp.concatenate([x, jnp.full_like(x[:1], jnp.nan)]), pages)
        strange_BP = jnp.where(jnp.arange(table_BP.shape[1]) * PAGE < past_B[:, None], table_BP, len(pages.latent) - 1)
        own_BTNV, got_BTNV = (extend(*new, pages, table, past_B, w_uk_CNH, w_uv_CNV) for table in (table_BP, strange_BP))
        assert (own_BTNV == got_BTNV).all()

    @pytest.mark.parametrize("pages", [1, 2, 4])
    def test_in_parts_of_any_size(self, pages, monkeypatch):
        past = (0, 64, 65, 300, 129)
        monkeypatch.setattr(mla_extend, "PART", pages * PAGE * len(past))
        self.check(self.operands(33, 2, past))


class TestXla(ExtendCases):
    extend = staticmethod(mla_extend.mla_extend)

    def test_of_nothing_before_is_attention_of_the_new(self):
        *new, pages, table_BP, past_B, w_uk_CNH, w_uv_CNV = self.operands(70, 3, (0, 0))
        got_BTNV = mla_extend.mla_extend(*new, pages, table_BP, past_B, w_uk_CNH, w_uv_CNV, scale=0.1)
        q_nope_BTNH, q_rope_BTNR, c_kv_BTC, k_rope_BTR = new
        k_nope_BTNH, v_BTNV = (jnp.einsum("btc,cnx->btnx", c_kv_BTC, w_CNX) for w_CNX in (w_uk_CNH, w_uv_CNV))
        close(got_BTNV, mla_attention.mla_attention(q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, None, scale=0.1))

    def test_queries_in_several_chunks(self, monkeypatch):
        monkeypatch.setattr(mla_attention, "CHUNK", 30)
        self.check(self.operands(70, 3, (0, 1, 64, 200)))


class TestXlaWide(ExtendCases):
    """The model's own dimensions, in bfloat16 and over all formats of it."""

    extend = staticmethod(mla_extend.mla_extend)
    DTYPE, DIMS, BOUND = jnp.bfloat16, (128, 64, 128, 512), 8e-3

    @pytest.mark.parametrize("format", ["bf16", "fp8", "int6"])
    def test_over_every_format(self, format):
        self.check(self.operands(70, 2, (90, 200), format))


@pytest.mark.gpu
class TestPallas(TestXlaWide):
    extend = staticmethod(functools.partial(mla_extend.mla_extend, implementation="pallas"))
    SHAPES = (512, 16, (0, 1, 64, 200)), (700, 128, (3000,)), (2048, 5, (20000,)), (512, 16, (1, 5000, 8191, 8193))

    @pytest.mark.parametrize("tokens, heads, past", SHAPES)
    def test_equals_the_reference(self, tokens, heads, past):
        self.check(self.operands(tokens, heads, past))


@pytest.mark.parametrize("keys", [1, 40, 99])
def test_two_parts_make_the_whole(keys):
    q_nope, q_rope, *keys_and_values = AttentionCases().operands(2, 100)
    part = functools.partial(mla_attention.part_of_attention, q_nope, q_rope, scale=0.1)
    whole_BTNV, whole_lse_BTN = part(*keys_and_values, jnp.full(2, 100))
    first_BTNV, first_lse_BTN = part(*(x[:, :keys] for x in keys_and_values), jnp.full(2, keys))
    rest_BTNV, rest_lse_BTN = part(*(x[:, keys:] for x in keys_and_values), jnp.full(2, 100 - keys))
    close(jnp.logaddexp2(first_lse_BTN, rest_lse_BTN), whole_lse_BTN)
    share_BTN1 = jnp.exp2(first_lse_BTN - whole_lse_BTN)[..., None]
    close(first_BTNV * share_BTN1 + rest_BTNV * (1 - share_BTN1), whole_BTNV)


def test_keys_that_are_not_counted_do_not_count():
    q_nope, q_rope, *keys_and_values = AttentionCases().operands(2, 100)
    part = functools.partial(mla_attention.part_of_attention, q_nope, q_rope, scale=0.1)
    wanted = part(*(x[:, :30] for x in keys_and_values), jnp.full(2, 30))
    got = part(*(x.at[:, 30:].set(1e4) for x in keys_and_values), jnp.full(2, 30))
    for got_array, wanted_array in zip(got, wanted):
        close(got_array, wanted_array)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int6"])
def test_kernel_lowers_for_cuda(monkeypatch, format):
    operands = TestXlaWide().operands(512, 16, (3, 90), format)
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    run = jax.jit(functools.partial(mla_extend.mla_extend, scale=0.1))
    text = run.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2  # of the new tokens, and of the past
