"""Codes in shared memory to float16 in registers, twice, both the right operand of `warp_products`: as keys and, transposed, as values.

A warp's lane is (g, t) = (lane / 4, lane % 4). A box is 32 tokens of 384 or 512 bytes of codes, in swizzled tiles of 8 tokens by 128
bytes: segment s of 16 bytes of token r lies at s ^ (r % 8). A page's two boxes have the tokens of warps 0 and 1, and of 2 and 3.
The pages store a token's codes so that a lane finds those of its keys in segments 2 t and 2 t + 1 of each 128 bytes.

For values a transposing matrix load takes a segment of eight tokens as a matrix of 16-bit units, which are two e4m3 codes or one
half of a word of 6-bit codes. It gives lane (g, t) unit g of tokens 2 t and 2 t + 1: the pair that a column of values wants. So the
columns of outputs are latents in an order of their own, which `store_output` knows.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WGMMA, swizzled
from pallas_kernels.inline import address, floats, halves, ptx, words

FP8_TILES, INT6_TILES = 8 * 512, 8 * 384  # bytes of eight tokens
FP8_BOX, INT6_BOX = (plgpu.RefType(swizzled(dtype)) for dtype in (jnp.float8_e4m3fn, jnp.uint32))


def _f16(columns: int):
    return plgpu.ShapeDtypeStruct((64, columns), jnp.float16, layout=WGMMA)


FP8 = """{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""

# Of the boxes at $1 and $2: a lane's first row and in it segment 2 t; bit 4 changed, 2 t + 1. Its second row lies {tile} bytes on.
KEY_PLACE = """{{
.reg .b32 x, y, z;
.reg .pred second;
mov.u32 x, %tid.x;
and.b32 y, x, 3;
shl.b32 y, y, 5;
bfe.u32 z, x, 2, 3;
mad.lo.u32 y, z, 128, y;
shl.b32 z, z, 4;
xor.b32 y, y, z;
bfe.u32 z, x, 5, 1;
mad.lo.u32 y, z, {two_tiles}, y;
and.b32 z, x, 64;
setp.ne.u32 second, z, 0;
selp.b32 z, $2, $1, second;
add.u32 $0, y, z;
}}"""
LOAD4 = """{{
.reg .b32 x;
xor.b32 x, $4, {swap};
ld.shared.v4.b32 {{$0, $1, $2, $3}}, [x + {offset}];
}}"""
LOAD4_PLAIN = "ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"

# A lane's row of the transposing load of segment $2 of the 32 tokens of box $1.
VALUE_PLACE = """{{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
and.b32 y, x, 7;
xor.b32 z, y, $2;
shl.b32 z, z, 4;
mad.lo.u32 z, y, 128, z;
bfe.u32 x, x, 3, 2;
mad.lo.u32 z, x, {tile}, z;
add.u32 $0, z, $1;
}}"""
LOAD_TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"

# Two tokens' pairs of codes to two codes' pairs of tokens.
SPLIT = """{
.reg .b32 x;
.reg .b16 low, high;
prmt.b32 x, $2, 0, 0x3120;
mov.b32 {low, high}, x;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""

# (x & mask) | y is 0xEA to lop3. Codes go to bits 4-9 of a half, under the exponent of 1.0: 1 + code / 64, which the span and -1.5
# times as much turn into a latent. Codes 0 .. 3 of the words $4 and $5, or 4 .. 7 of $4, $5 and $6 (see `codes_to_words`).
# Results are moved last: only then may they take the place of operands.
INT6_LOW = "\n".join(
    ["{", ".reg .b32 x;", ".reg .b32 y<4>;"]
    + [
        f"lop3.b32 y{2 * i}, ${4 + i}, 0x03F003F0, 0x3C003C00, 0xEA;"
        f"shr.u32 x, ${4 + i}, 6; lop3.b32 y{2 * i + 1}, x, 0x03F003F0, 0x3C003C00, 0xEA;"
        for i in range(2)
    ]
    + [f"fma.rn.f16x2 y{i}, y{i}, $6, $7;" for i in range(4)]
    + [f"mov.b32 ${i}, y{i};" for i in range(4)]
    + ["}"]
)
INT6_HIGH = "\n".join(
    ["{", ".reg .b32 x;", ".reg .b32 y<4>;"]
    + ["lop3.b32 y0, $6, 0x03F003F0, 0x3C003C00, 0xEA;shr.u32 x, $6, 6; lop3.b32 y1, x, 0x03F003F0, 0x3C003C00, 0xEA;"]
    + [
        f"shl.b32 x, ${4 + i}, 6; lop3.b32 y{2 + i}, x, 0x03C003C0, 0x3C003C00, 0xEA;"
        f"shl.b32 x, $6, {4 - 2 * i}; lop3.b32 y{2 + i}, x, 0x00300030, y{2 + i}, 0xEA;"
        for i in range(2)
    ]
    + [f"fma.rn.f16x2 y{i}, y{i}, $7, $8;" for i in range(4)]
    + [f"mov.b32 ${i}, y{i};" for i in range(4)]
    + ["}"]
)

# Of two groups: their spans, each in both halves, and -1.5 times as much.
FACTORS = """{
.reg .b32 x, y, z;
mov.b32 x, $4;
mov.b32 z, 0xBE00BE00;
prmt.b32 y, x, x, 0x1010;
prmt.b32 x, x, x, 0x3232;
mul.rn.f16x2 $2, y, z;
mul.rn.f16x2 $3, x, z;
mov.b32 $0, y;
mov.b32 $1, x;
}"""

# A lane's span of group g for two tokens, and lane ^ 4's: of the even group and of the odd one.
PAIR_SPANS = """{
.reg .b32 x, y, z;
.reg .pred odd;
mov.u32 z, %tid.x;
and.b32 z, z, 4;
setp.ne.u32 odd, z, 0;
mov.b32 y, $2;
shfl.sync.bfly.b32 x, y, 4, 31, 0xffffffff;
selp.b32 $0, x, y, odd;
selp.b32 $1, y, x, odd;
}"""
NEGATED = "{.reg .b32 y; mov.b32 y, 0xBE00BE00; mul.rn.f16x2 $0, $1, y;}"


# Where a lane's first results of row g lie in [16, 512] of bfloat16, in swizzled tiles of 8 x 64.
FP8_PLACE = """{{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
bfe.u32 y, x, 2, 3;
mad.lo.u32 z, y, 128, $1;
and.b32 $0, x, 3;
mad.lo.u32 $0, $0, 2, {k};
xor.b32 y, y, $0;
mad.lo.u32 z, y, 16, z;
bfe.u32 y, x, 5, 1;
mad.lo.u32 z, y, 1024, z;
bfe.u32 y, x, 6, 1;
mad.lo.u32 $0, y, 4, z;
}}"""
INT6_PLACE = """{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
bfe.u32 y, x, 2, 3;
mad.lo.u32 z, y, 144, $1;
and.b32 y, x, 3;
mad.lo.u32 z, y, 1024, z;
bfe.u32 y, x, 5, 1;
mad.lo.u32 z, y, 4096, z;
bfe.u32 y, x, 6, 1;
mad.lo.u32 $0, y, 8, z;
}"""
STORE_BF16 = """{{
.reg .b32 x, v;
cvt.rn.bf16x2.f32 v, $2, $1;
xor.b32 x, $0, {swap};
st.shared.b32 [x + {offset}], v;
}}"""


# The segment that a warp w takes: first + w, or first + 4 (w / 2) + w % 2.
FP8_SEGMENT = "{{.reg .b32 x; mov.u32 x, %tid.x; bfe.u32 x, x, 5, 2; add.u32 $0, x, {first};}}"
INT6_SEGMENT = """{{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 6, 1;
bfe.u32 x, x, 5, 1;
mad.lo.u32 x, y, 4, x;
add.u32 $0, x, {first};
}}"""
# Spans [64 tokens, 16 groups]: a lane's first row, and its row of the transposing load of the eight groups of its segments.
KEY_SPANS = """{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 2, 3;
bfe.u32 x, x, 5, 2;
mad.lo.u32 y, x, 16, y;
mad.lo.u32 $0, y, 32, $1;
}"""
VALUE_SPANS = """{
.reg .b32 x, y;
mov.u32 x, %tid.x;
and.b32 y, x, 31;
bfe.u32 x, x, 5, 1;
mad.lo.u32 x, x, 16, $1;
mad.lo.u32 $0, y, 32, x;
}"""


def fp8_keys(block: int, boxes):
    """Latents 64 block .. + 63 of the warps' tokens, [64 tokens, 64]."""

    @plgpu.inline_mgpu(arg_types=(FP8_BOX,) * 2, return_type=_f16(64))
    def run(_, *boxes):
        (place,) = ptx(KEY_PLACE.format(two_tiles=2 * FP8_TILES), 1, *map(address, boxes))
        chunk, half = divmod(block, 2)
        rows = []
        for row in range(2):
            loaded = ptx(LOAD4.format(swap=16 * half, offset=1024 * chunk + FP8_TILES * row), 4, place, ordered=True)
            rows.append([pair for x in loaded for pair in ptx(FP8, 2, x)])
        return halves([x for pair in zip(*rows) for x in pair], 64)

    return run(*boxes)


def fp8_values(block: int, box):
    """Block `block` of latents of a box, [64 latents, 32 tokens]; see `store_output` for which these are."""

    @plgpu.inline_mgpu(arg_types=(FP8_BOX,), return_type=_f16(32))
    def run(_, box):
        chunk, half = divmod(block, 2)
        (segment,) = ptx(FP8_SEGMENT.format(first=4 * half), 1)
        (place,) = ptx(VALUE_PLACE.format(tile=FP8_TILES), 1, address(box), segment)
        loaded = ptx(LOAD_TRANSPOSED.format(offset=1024 * chunk), 4, place, ordered=True)
        return halves([pair for x in loaded for pair in ptx(SPLIT, 2, x)], 32)

    return run(box)


def int6_words(half: int, spans, boxes):
    """The words and spans of units 4 half .. + 3 for a thread's two rows: registers, in no layout that means anything."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(INT6_BOX,) * 2), return_type=(_f16(96), _f16(32)))
    def run(_, spans, *boxes):
        (span_place,) = ptx(KEY_SPANS, 1, address(spans))
        (place,) = ptx(KEY_PLACE.format(two_tiles=2 * INT6_TILES), 1, *map(address, boxes))
        pairs, loaded = [], []
        for row in range(2):
            pairs += ptx(LOAD4_PLAIN.format(offset=256 * row + 16 * half), 4, span_place, ordered=True)
            for plane in range(3):
                loaded += ptx(LOAD4.format(swap=16 * half, offset=1024 * plane + INT6_TILES * row), 4, place, ordered=True)
        return halves(loaded, 96), halves(pairs, 32)

    return run(spans, *boxes)


def int6_keys(unit: int, loaded, spans):
    """Unit 0 .. 3 of what `int6_words` has loaded, [64 tokens, 64 latents]."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA), return_type=_f16(64))
    def run(_, loaded, spans):
        loaded, spans = words(loaded), words(spans)  # [row, plane, unit] and [row, unit]
        rows = []
        for row in range(2):
            factors = ptx(FACTORS, 4, spans[4 * row + unit])
            planes = [loaded[12 * row + 4 * plane + unit] for plane in range(3)]
            rows.append(ptx(INT6_LOW, 4, *planes[:2], *factors[0::2]) + ptx(INT6_HIGH, 4, *planes, *factors[1::2]))
        return halves([x for pair in zip(*rows) for x in pair], 64)

    return run(loaded, spans)


def int6_spans(box: int, spans):
    """For values: the spans of a thread's two groups of 32 latents, of the tokens of box `box`."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=_f16(32))
    def run(_, spans):
        (span_place,) = ptx(VALUE_SPANS, 1, address(spans))
        raw = ptx(LOAD_TRANSPOSED.format(offset=1024 * box), 4, span_place, ordered=True)
        return halves([y for x in raw for y in ptx(PAIR_SPANS, 2, x, ordered=True)], 32)

    return run(spans)


def int6_values(q: int, spans, box):
    """Blocks 4 q .. + 3 of latents of a box, each [64 latents, 32 tokens]; see `store_output` for which these are."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, INT6_BOX), return_type=(_f16(32),) * 4)
    def run(_, spans, box):
        spans = words(spans)  # [eight tokens, group]
        (segment,) = ptx(INT6_SEGMENT.format(first=2 * q), 1)
        (place,) = ptx(VALUE_PLACE.format(tile=INT6_TILES), 1, address(box), segment)
        planes = [ptx(LOAD_TRANSPOSED.format(offset=1024 * plane), 4, place, ordered=True) for plane in range(3)]
        codes = []
        for m in range(4):
            three, factors = [plane[m] for plane in planes], [(x, *ptx(NEGATED, 1, x)) for x in spans[2 * m : 2 * m + 2]]
            codes.append(ptx(INT6_LOW, 4, *three[:2], *factors[0]) + ptx(INT6_HIGH, 4, *three, *factors[1]))
        return tuple(halves([x for eight in codes for x in eight[2 * c : 2 * c + 2]], 32) for c in range(4))

    return run(spans, box)


def store_output(block: int, int6: bool, out, o_smem):
    """Block `block` of outputs [64, 16] (see `warp_products`) to its latents' columns of o_smem [16, 512], as bfloat16."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(swizzled(jnp.bfloat16))))
    def run(_, out, o):
        def store(place, pair, swap, offset):
            ptx(STORE_BF16.format(swap=swap, offset=offset), 0, place, *pair)

        base, values = address(o), floats(out)
        for row in range(2):
            low, high = values[2 * row :][:2], values[2 * row + 4 :][:2]
            if int6:  # a lane's columns are the halves of a word, two adjacent latents
                (place,) = ptx(INT6_PLACE, 1, base)
                for e, pair in enumerate((low, high)):
                    store(place, pair, 16 * (block % 4 * 2 + e), 8192 * row + 4 * (block // 4))
            else:  # its columns of both results are the codes of a unit, two adjacent latents
                for k, pair in enumerate(zip(low, high)):
                    (place,) = ptx(FP8_PLACE.format(k=k), 1, base)
                    store(place, pair, 0, 8192 * row + 2048 * (block // 2) + 8 * (block % 2))

    run(out, o_smem)
