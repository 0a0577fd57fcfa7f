"""fp8 codes in shared memory to float16 in registers, twice, both right operands of `warp_products`: as keys and, transposed, as values.

A warp's lane is (g, t) = (lane / 4, lane % 4). A box is 32 tokens of 512 bytes of codes (384 for int6), in swizzled tiles of 8 tokens
by 128 bytes: segment s of 16 bytes of token r lies at s ^ (r % 8). A page's two boxes have the tokens of warps 0 and 1, and of 2 and
3. The pages store a token's codes so that a lane finds those of its keys in segments 2 t and 2 t + 1 of each 128 bytes.

For values a transposing matrix load takes a segment of eight tokens as a matrix of 16-bit units, two codes each. It gives lane (g, t)
unit g of tokens 2 t and 2 t + 1: the pair that a column of values wants. So the columns of outputs are latents in an order of their
own, which `store_output` knows.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WGMMA, swizzled
from pallas_kernels.inline import address, floats, halves, ptx

TILE = 8 * 512  # bytes of eight tokens
BOX = plgpu.RefType(swizzled(jnp.float8_e4m3fn))


def f16(columns: int):
    """The type of what `halves` makes."""
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
mad.lo.u32 z, y, 4, z;
bfe.u32 y, x, 5, 2;
mad.lo.u32 $0, y, 2048, z;
}"""
STORE_BF16 = """{{
.reg .b32 x, v;
cvt.rn.bf16x2.f32 v, $2, $1;
xor.b32 x, $0, {swap};
st.shared.b32 [x + {offset}], v;
}}"""


# The segment that a warp w takes: first + {each} w.
SEGMENT = "{{.reg .b32 x; mov.u32 x, %tid.x; bfe.u32 x, x, 5, 2; mul.lo.u32 x, x, {each}; add.u32 $0, x, {first};}}"


def fp8_keys(block: int, boxes):
    """Latents 64 block .. + 63 of the warps' tokens, [64 tokens, 64]."""

    @plgpu.inline_mgpu(arg_types=(BOX,) * 2, return_type=f16(64))
    def run(_, *boxes):
        (place,) = ptx(KEY_PLACE.format(two_tiles=2 * TILE), 1, *map(address, boxes))
        chunk, half = divmod(block, 2)
        rows = []
        for row in range(2):
            loaded = ptx(LOAD4.format(swap=16 * half, offset=1024 * chunk + TILE * row), 4, place, ordered=True)
            rows.append([pair for x in loaded for pair in ptx(FP8, 2, x)])
        return halves([x for pair in zip(*rows) for x in pair], 64)

    return run(*boxes)


def fp8_values(block: int, box):
    """Block `block` of latents of a box, [64 latents, 32 tokens]; see `store_output` for which these are."""

    @plgpu.inline_mgpu(arg_types=(BOX,), return_type=f16(32))
    def run(_, box):
        chunk, half = divmod(block, 2)
        (segment,) = ptx(SEGMENT.format(each=1, first=4 * half), 1)
        (place,) = ptx(VALUE_PLACE.format(tile=TILE), 1, address(box), segment)
        loaded = ptx(LOAD_TRANSPOSED.format(offset=1024 * chunk), 4, place, ordered=True)
        return halves([pair for x in loaded for pair in ptx(SPLIT, 2, x)], 32)

    return run(box)


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
                    store(place, pair, 16 * (block % 4 * 2 + e), 8192 * row + 1024 * (block // 4))
            else:  # its columns of both results are the codes of a unit, two adjacent latents
                for k, pair in enumerate(zip(low, high)):
                    (place,) = ptx(FP8_PLACE.format(k=k), 1, base)
                    store(place, pair, 0, 8192 * row + 2048 * (block // 2) + 8 * (block % 2))

    run(out, o_smem)
