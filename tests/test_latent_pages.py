"""The paged latent cache's formats: bits, errors, and where tokens go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import latent_pages

FORMATS = tuple(latent_pages.DTYPES)
pack, unpack = jax.jit(latent_pages.pack, static_argnums=1), jax.jit(latent_pages.unpack)
rotate, read = jax.jit(latent_pages.rotate), jax.jit(latent_pages.read, static_argnums=2)


def latents(seed, *shape, outliers=False):
    x = np.random.default_rng(seed).normal(size=(*shape, 512))
    return jnp.asarray(x * np.where(outliers & (np.arange(512) % 64 == 0), 12, 1), jnp.float32)


def relative_error(got, wanted):
    return float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("outliers, fp8, int6", [(False, 0.0270, 0.0225), (True, 0.0230, 0.0175)])
def test_errors_are_as_stated(outliers, fp8, int6):
    for name, bound in (("fp8", fp8), ("int6", int6)):
        x = latents(1, 200, outliers=outliers)
        x = rotate(x) if name == "int6" else x
        error = relative_error(unpack(*pack(x, name)), x)
        assert 0.7 * bound < error < bound, name


@pytest.mark.parametrize("name", ["fp8", "int6"])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_errors_do_not_depend_on_the_size(name, size):
    x = latents(2, 50) * size
    assert relative_error(unpack(*pack(x, name)), x) < 0.028


def test_a_token_of_zeros_stays_zero():
    for name in FORMATS:
        stored, scale = pack(jnp.zeros((3, 512)), name)
        assert not np.asarray(unpack(stored, scale)).any(), name


def test_every_code_comes_back_from_every_place():
    codes = jnp.asarray((np.arange(64)[:, None] + np.arange(512)) % 64)
    assert (latent_pages.words_to_codes(latent_pages.codes_to_words(codes)) == codes).all()


@pytest.mark.parametrize("name", ["fp8", "int6"])
def test_packing_again_changes_no_code(name):
    stored, scale = pack(latents(3, 50), name)
    again, _ = pack(unpack(stored, scale), name)
    assert (again == stored).all()


def test_spans_have_nine_bits():
    """So that a kernel can hold 1.5 times a span in float16."""
    _, span = pack(latents(4, 50), "int6")
    span = np.asarray(span, np.float64)
    assert (np.float16(1.5 * span) == 1.5 * span).all()


def test_rotation_is_orthogonal_and_its_own_inverse():
    x = latents(5, 4)
    assert relative_error(rotate(rotate(x)), x) < 1e-6
    assert relative_error(jnp.linalg.norm(rotate(x), axis=-1), jnp.linalg.norm(x, axis=-1)) < 1e-6


@pytest.mark.parametrize("name, size", [("f32", 2304), ("bf16", 1152), ("fp8", 644), ("int6", 544)])
def test_bytes_of_a_token(name, size):
    pages = latent_pages.empty(3, name)
    assert (pages.bytes_per_token, pages.format) == (size, name)


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_read_where_they_were_written(name):
    """A chunk of one request, a token of another, and nothing of a third; the pages of none are touched."""
    table_BP = jnp.asarray([[4, 2], [1, 0], [6, 3]])
    positions_BT = np.full((3, 70), -1)
    positions_BT[0] = np.arange(10, 80)
    positions_BT[1, 7] = 64
    slots_BT = np.take_along_axis(np.asarray(table_BP), np.maximum(positions_BT, 0) // 64, axis=1) * 64 + positions_BT % 64
    slots_BT = np.where(positions_BT < 0, -1, slots_BT)
    latent_BTC = latents(6, 3, 70)
    rope_BTR = jnp.asarray(np.random.default_rng(7).normal(size=(3, 70, 64)), jnp.float32)
    pages = latent_pages.empty(7, name)
    before = jax.tree.map(lambda x: jnp.ones_like(x), pages)
    after = jax.jit(latent_pages.write, donate_argnums=0)(
        jax.tree.map(jnp.copy, before), jnp.asarray(slots_BT), latent_BTC, rope_BTR
    )
    got_BSC, got_BSR = read(after, table_BP, jnp.float32)
    wanted_BTC = unpack(*pack(latent_BTC, name)).astype(jnp.float32)
    for b, t in [(0, 0), (0, 53), (0, 54), (0, 69), (1, 7)]:
        np.testing.assert_allclose(got_BSC[b, positions_BT[b, t]], wanted_BTC[b, t], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got_BSR[b, positions_BT[b, t]], rope_BTR[b, t], rtol=1e-2 if name != "f32" else 1e-6)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
        written = np.zeros((7, 64), bool)
        written[4, 10:], written[2, :16], written[0, 0] = True, True, True
        assert (np.asarray(new)[~written] == np.asarray(old)[~written]).all()


def test_a_decode_step_writes_in_place():
    pages = latent_pages.empty(64, "int6")
    arguments = (pages, jnp.zeros((4, 1), jnp.int32), latents(8, 4, 1), jnp.zeros((4, 1, 64)))
    compiled = jax.jit(latent_pages.write, donate_argnums=0).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < pages.latent.nbytes // 8


def test_wrong_formats_are_named():
    with pytest.raises(ValueError, match="format is 'int4', expected one of"):
        latent_pages.empty(1, "int4")
    with pytest.raises(ValueError, match="latent_dim is 64, expected 512 for int6 pages"):
        latent_pages.empty(1, "int6", latent_dim=64)
