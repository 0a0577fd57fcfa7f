"""The paged latent cache: pages of 64 tokens in one of four formats, written a token or a chunk at a time.

format  latent of a token (512 values)                       rope key   bytes a token   bits a value (of 576)
f32     float32                                              float32    2304            32
bf16    bfloat16                                             bfloat16   1152            16
fp8     e4m3 with one float32 scale: 512 + 4 B               bfloat16   644             8.94
int6    6-bit codes of groups of 32: 384 + 32 B              bfloat16   544             7.56

int6: latent = span * (code - 32) / 64 with codes 1..63 (63 levels, symmetric) and one float16 span a group, which has 9
significant bits so that 1.5 * span is exact: a kernel puts the code's bits under the exponent of 1.0, which reads as
1 + code / 64, and one multiply-add in float16 gives the latent (for latents up to 21,000; normalised ones are below 23 times their
gain). A channel larger than its neighbours costs them their precision, so latents should come in a basis where none is: each group
turned by the orthogonal H32 / sqrt(32), see `rotate`. Whoever makes latents and queries can have that for nothing, in the weights;
here it is not done.

Relative error of the latents (tests/test_latent_pages.py): fp8 2.6% and int6 2.2% if they are Gaussian; fp8 2.2% and int6,
rotated, 1.7% with eight channels twelve times larger than the rest.

Letters: B requests, T new tokens, P pages of a request, S = 64 P tokens, C latent dim, R rope dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PAGE = 64  # tokens
GROUP = 32  # latents that share an int6 span
LANES = 4
CHUNK = 128  # latents whose order fp8 pages change together
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn, "int6": jnp.uint32}


class LatentPages(NamedTuple):
    """Latents as they are stored [pages, 64, X], rope keys [pages, 64, R], and what scales the latents, or None.

    The format is told by the latents' dtype. X is C, or for int6 3/16 C words; scales are [pages, 64] for fp8 and
    [pages, 64, C / 32] for int6.
    """

    latent: jax.Array
    rope: jax.Array
    scale: jax.Array | None

    @property
    def format(self) -> str:
        """The name of these pages' format."""
        return next(name for name, dtype in DTYPES.items() if self.latent.dtype == dtype)

    @property
    def bytes_per_token(self) -> int:
        """What one token occupies in one layer."""
        return sum(x.nbytes for x in self if x is not None) // (self.latent.shape[0] * PAGE)


def empty(num_pages: int, format: str, latent_dim: int = 512, rope_dim: int = 64) -> LatentPages:
    """Pages of zeros.

    Raises: ValueError, for an unknown format, or a latent dim that int6 cannot divide.
    """
    if format not in DTYPES:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(DTYPES)}")
    if format in ("fp8", "int6") and latent_dim != 512:
        raise ValueError(f"latent_dim is {latent_dim}, expected 512 for {format} pages")
    width = latent_dim * 3 // 16 if format == "int6" else latent_dim
    scale = {
        "fp8": jnp.zeros((num_pages, PAGE), jnp.float32),
        "int6": jnp.zeros((num_pages, PAGE, latent_dim // GROUP), jnp.float16),
    }
    return LatentPages(
        jnp.zeros((num_pages, PAGE, width), DTYPES[format]),
        jnp.zeros((num_pages, PAGE, rope_dim), jnp.float32 if format == "f32" else jnp.bfloat16),
        scale.get(format),
    )


def write(pages: LatentPages, slots_BT: jax.Array, latent_BTC: jax.Array, rope_BTR: jax.Array) -> LatentPages:
    """Stores tokens in their slots, slot 64 p + r being row r of page p; nothing for -1. In place where the pages are donated."""
    slots_BT = jnp.where(slots_BT < 0, PAGE * len(pages.latent), slots_BT)  # past the end: dropped
    latent_BTX, scale_BTX = pack(latent_BTC, pages.format)
    new = LatentPages(latent_BTX, rope_BTR.astype(pages.rope.dtype), scale_BTX)
    return jax.tree.map(lambda old, x: old.at[slots_BT // PAGE, slots_BT % PAGE].set(x, mode="drop"), pages, new)


def read(pages: LatentPages, table_BP: jax.Array, dtype=jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    """The latents [B, S, C] and rope keys [B, S, R] of the tables' pages in a float dtype, index = position."""
    latent_BPX, rope_BPR, scale_BPX = jax.tree.map(lambda x: x[table_BP], pages)
    latent_BPC = unpack(latent_BPX, scale_BPX, dtype)
    return tuple(x.reshape(x.shape[0], -1, x.shape[-1]).astype(dtype) for x in (latent_BPC, rope_BPR))


def pack(latent: jax.Array, format: str) -> tuple[jax.Array, jax.Array | None]:
    """Latents [..., C] as a format stores them, and their scales."""
    if format in ("f32", "bf16"):
        return latent.astype(DTYPES[format]), None
    if format == "fp8":
        latent = latent.astype(jnp.float32)
        scale = jnp.abs(latent).max(axis=-1) / 448  # the largest e4m3 value
        scale = jnp.where(scale == 0, 1, scale)
        chunks = (latent / scale[..., None]).astype(jnp.float8_e4m3fn).reshape(*latent.shape[:-1], -1, CHUNK)
        return _by_lane(chunks).reshape(latent.shape), scale
    groups = latent.astype(jnp.float32).reshape(*latent.shape[:-1], -1, GROUP)
    span = _nine_bits(jnp.abs(groups).max(axis=-1) * (64 / 31)).astype(jnp.float16)
    steps = groups * (64 / jnp.where(span == 0, 1, span).astype(jnp.float32))[..., None]
    codes = 32 + jnp.clip(jnp.round(steps), -31, 31).astype(jnp.int32)
    return codes_to_words(codes.reshape(latent.shape)), span


def unpack(stored: jax.Array, scale: jax.Array | None, dtype=jnp.float32) -> jax.Array:
    """The latents [..., C] that `pack` stored, in a float dtype."""
    if scale is None:
        return stored.astype(dtype)
    if stored.dtype == jnp.float8_e4m3fn:
        chunks = stored.reshape(*stored.shape[:-1], -1, CHUNK)
        return (_by_dim(chunks).reshape(stored.shape).astype(jnp.float32) * scale[..., None]).astype(dtype)
    span = jnp.repeat(scale.astype(jnp.float32), GROUP, axis=-1)
    return (span * (words_to_codes(stored) - 32) / 64).astype(dtype)


def rotate(x: jax.Array) -> jax.Array:
    """x [..., C] with each group of 32 multiplied by H32 / sqrt(32), which is its own inverse; float32, from exact products."""
    groups, signs = x.reshape(*x.shape[:-1], -1, GROUP), _SIGNS.astype(x.dtype)
    out = jnp.einsum("...gi,ij->...gj", groups, signs, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    return (out / np.sqrt(GROUP).astype(np.float32)).reshape(x.shape)


def codes_to_words(codes: jax.Array) -> jax.Array:
    """Packs 6-bit codes [..., 512] into words [..., 96].

    A lane's 128 codes fill three planes of eight words, sixteen codes a word of each: the codes of even dims the low halves, of
    odd dims the high halves. Of the eight codes in the three halves the first six lie in bits 4-9 and 10-15; the upper four bits
    of the last two in bits 0-3 of the first and the second half, their lower two in bits 0-1 and 2-3 of the third. So a kernel
    unpacks two codes at a time with one shift and one or two masks.
    """
    # Taken place by place, which a GPU does while it stores the words: transpositions would be kernels of their own.
    units = jnp.take_along_axis(codes.astype(jnp.uint32), jnp.broadcast_to(_BY_WORD, codes.shape), axis=-1)
    units = units.reshape(*codes.shape[:-1], 8, 2, LANES * 8)  # code, half, word of all lanes
    a, b, c, d, e, f, g, h = (units[..., i, :, :] for i in range(8))
    tails = (g >> 2, h >> 2, (g & 3) | ((h & 3) << 2))
    halves = [tail | (x << 4) | (y << 10) for tail, x, y in zip(tails, (a, c, e), (b, d, f))]
    return jnp.concatenate([half[..., 0, :] | (half[..., 1, :] << 16) for half in halves], axis=-1)


def words_to_codes(words: jax.Array) -> jax.Array:
    """The codes [..., 512] of packed words, int32."""
    words = words.reshape(*words.shape[:-1], 3, LANES, 8)
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=-1)
    u, v, w = (halves[..., plane, :, :, :] for plane in range(3))
    tails = (((u & 15) << 2) | (w & 3), ((v & 15) << 2) | ((w >> 2) & 3))
    codes = jnp.stack([x for half in (u, v, w) for x in ((half >> 4) & 63, half >> 10)] + list(tails), axis=-2)
    return _by_dim(codes.astype(jnp.int32).reshape(*codes.shape[:-4], 512))


def _by_lane(x: jax.Array) -> jax.Array:
    """Orders dims by owner, one of the four lanes that share a row of a matrix operand: lane t has 2t and 2t + 1 of every 8."""
    return x.reshape(*x.shape[:-1], -1, LANES, 2).swapaxes(-3, -2).reshape(x.shape)


def _by_dim(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], LANES, -1, 2).swapaxes(-3, -2).reshape(x.shape)


def _nine_bits(x: jax.Array) -> jax.Array:
    """Float32 rounded to 9 significant bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jax.lax.bitcast_convert_type(((bits + 0x4000) >> 15) << 15, jnp.float32)


def _hadamard(n: int) -> np.ndarray:
    return np.ones((1, 1)) if n == 1 else np.kron([[1, 1], [1, -1]], _hadamard(n // 2))


# The dim of each lane's word w, code i, half j is 64 w + 8 i + 2 * lane + j; here in the order i, j, lane, w.
_BY_WORD = np.arange(512).reshape(8, 8, LANES, 2).transpose(1, 3, 2, 0).reshape(-1)
_SIGNS = _hadamard(GROUP)  # without the root of 32: exact in any dtype
