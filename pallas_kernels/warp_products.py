"""Products of sixteen query rows, made by each warp alone (mma.sync), whose right operand is in registers.

A warp's lane is (g, t) = (lane / 4, lane % 4). Of an array [64, X] in layout WGMMA warp w holds rows 16 w .. + 15, a lane rows g and
g + 8, and in them columns 2 t and 2 t + 1 of every 8. Here the sixteen rows are the same query rows in each warp, and the columns are
the warp's own: its tokens of scores and probabilities, its latents of outputs. A right operand of K by 16 comes as a float16
[64, K], likewise in registers: a lane holds columns g and g + 8 of it, in rows 2 t and 2 t + 1 of every 8.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import WGMMA, swizzled
from pallas_kernels.inline import address, floats, halves, ptx, singles, words

COLUMNS = 16
HALF_FLOAT, BFLOAT = (plgpu.RefType(swizzled(dtype)) for dtype in (jnp.float16, jnp.bfloat16))
SCORES = plgpu.ShapeDtypeStruct((64, COLUMNS), jnp.float32, layout=WGMMA)

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};"

# Of a swizzled [16, X] with tiles of 8 x 64, rows 8 .. 15 lying {rows} bytes after rows 0 .. 7: a lane's row of the load of
# four matrices, which are rows 0 .. 7 and 8 .. 15 of eight columns and then of the next eight. Bits 5 and 6 give 16 columns of 64.
LEFT_PLACE = """{{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
bfe.u32 y, x, 3, 1;
mad.lo.u32 y, y, {rows}, $1;
and.b32 z, x, 7;
mad.lo.u32 y, z, 128, y;
bfe.u32 x, x, 4, 1;
xor.b32 x, x, z;
mad.lo.u32 $0, x, 16, y;
}}"""
LOAD_PLAIN = """{{
.reg .b32 x;
xor.b32 x, $4, {swap};
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [x + {offset}];
}}"""

# Of a swizzled [64, 64]: a lane's row of the load of four times eight columns of its warp's first eight rows.
RIGHT_PLACE = """{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
bfe.u32 y, x, 5, 2;
mad.lo.u32 y, y, 2048, $1;
and.b32 z, x, 7;
mad.lo.u32 y, z, 128, y;
bfe.u32 x, x, 3, 2;
xor.b32 x, x, z;
mad.lo.u32 $0, x, 16, y;
}"""

# As LEFT_PLACE, of a swizzled [16, 64]: columns 16 w .. + 15 of warp w.
P_PLACE = """{
.reg .b32 x, y, z, w;
mov.u32 x, %tid.x;
bfe.u32 y, x, 3, 1;
mad.lo.u32 y, y, 1024, $1;
and.b32 z, x, 7;
mad.lo.u32 y, z, 128, y;
bfe.u32 w, x, 5, 2;
bfe.u32 x, x, 4, 1;
mad.lo.u32 x, w, 2, x;
xor.b32 x, x, z;
mad.lo.u32 $0, x, 16, y;
}"""
STORE_P = """{
.reg .b32 a, b, c, d;
cvt.rn.f16x2.f32 a, $2, $1;
cvt.rn.f16x2.f32 b, $4, $3;
cvt.rn.f16x2.f32 c, $6, $5;
cvt.rn.f16x2.f32 d, $8, $7;
stmatrix.sync.aligned.m8n8.x4.shared.b16 [$0], {a, b, c, d};
}"""

# A lane's first two of its warp's sixteen tokens in float32 [64]; its other two lie 32 bytes on.
TOKEN_PLACE = """{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 5, 2;
mad.lo.u32 y, y, 64, $1;
and.b32 x, x, 3;
mad.lo.u32 $0, x, 8, y;
}"""
LOAD_TWO = "ld.shared.v2.f32 {{$0, $1}}, [$2 + {offset}];"

# Of a bfloat16 [16, 512]: a thread's first 16 bytes; the next lie 2048 bytes on.
CONVERT = """{{
.reg .b32 a, x, y, p<4>;
mov.u32 a, %tid.x;
and.b32 a, a, 127;
mad.lo.u32 a, a, 16, $0;
ld.shared.v4.b32 {{p0, p1, p2, p3}}, [a + {offset}];
{pairs}
st.shared.v4.b32 [a + {offset}], {{p0, p1, p2, p3}};
}}"""
CONVERT_PAIR = "shl.b32 x, p{0}, 16; and.b32 y, p{0}, 0xFFFF0000; cvt.rn.f16x2.f32 p{0}, y, x;"


def to_float16(x_smem):
    """Converts bfloat16 [16, 512] in place."""

    @plgpu.inline_mgpu(arg_types=(BFLOAT,))
    def run(_, x):
        pairs = "\n".join(CONVERT_PAIR.format(k) for k in range(4))
        for i in range(8):
            ptx(CONVERT.format(offset=2048 * i, pairs=pairs), 0, address(x))

    run(x_smem)


def add_scores(scores, keys, block: int, q_smem):
    """Adds to scores [64, 16] what 64 latents give: keys float16 [64, 64], queries the columns 64 block .. of q_smem.

    q_smem is what `to_float16` has left of [16, 512].
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA, BFLOAT), return_type=SCORES)
    def run(_, scores, keys, q):
        (place,) = ptx(LEFT_PLACE.format(rows=8192), 1, address(q))
        out, right = floats(scores), words(keys)
        for step in range(4):
            left = ptx(LOAD_PLAIN.format(swap=32 * step, offset=1024 * block), 4, place, ordered=True)
            out = _step(out, left, right[4 * step : 4 * step + 4])
        return singles(out, COLUMNS)

    return run(scores, keys, q_smem)


def add_rope_scores(scores, k_smem, q_smem):
    """Adds to scores the products of bfloat16 keys [64, 64] and queries [16, 64]."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, BFLOAT, BFLOAT), return_type=SCORES)
    def run(_, scores, k, q):
        (left_place,) = ptx(LEFT_PLACE.format(rows=1024), 1, address(q))
        (right_place,) = ptx(RIGHT_PLACE, 1, address(k))
        out = floats(scores)
        for pair in range(2):
            tokens = [ptx(LOAD_PLAIN.format(swap=64 * pair, offset=1024 * j), 4, right_place, ordered=True) for j in range(2)]
            for half in range(2):
                left = ptx(LOAD_PLAIN.format(swap=64 * pair + 32 * half, offset=0), 4, left_place, ordered=True)
                out = _step(out, left, [tokens[j][2 * half + k] for k in range(2) for j in range(2)], "bf16")
        return singles(out, COLUMNS)

    return run(scores, k_smem, q_smem)


def store_probabilities(p, p_smem):
    """p [64, 16] to float16 [16 rows, 64 tokens]."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, HALF_FLOAT))
    def run(_, p, p_smem):
        (place,) = ptx(P_PLACE, 1, address(p_smem))
        ptx(STORE_P, 0, place, *floats(p))

    run(p, p_smem)


def load_probabilities(p_smem):
    """All of p_smem, in registers as `add_values` takes them."""

    @plgpu.inline_mgpu(arg_types=(HALF_FLOAT,), return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.float16, layout=WGMMA))
    def run(_, p):
        (place,) = ptx(LEFT_PLACE.format(rows=1024), 1, address(p))
        loaded = []
        for step in range(4):
            loaded += ptx(LOAD_PLAIN.format(swap=32 * step, offset=0), 4, place, ordered=True)
        return halves(loaded, 64)

    return run(p_smem)


def add_values(out, p, values, first: int = 0):
    """Adds to outputs [64, 16] the products of values float16 [64, K] of K tokens from 16 first on."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,) * 3, return_type=SCORES)
    def run(_, out, p, values):
        sums, left, right = floats(out), words(p), words(values)
        for step in range(len(right) // 4):
            sums = _step(sums, left[4 * (first + step) :][:4], right[4 * step :][:4])
        return singles(sums, COLUMNS)

    return run(out, p, values)


def of_tokens(x_smem):
    """float32 [64] of tokens, for each of the warps' columns: [64, 16]."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=SCORES)
    def run(_, x):
        (place,) = ptx(TOKEN_PLACE, 1, address(x))
        pairs = [ptx(LOAD_TWO.format(offset=32 * j), 2, place, floats=True, ordered=True) for j in range(2)]
        return singles([x for pair in pairs for _ in range(2) for x in pair], COLUMNS)

    return run(x_smem)


def _step(out: list, left, right, dtype: str = "f16") -> list:
    """Sixteen steps of the inner dimension, to a thread's part of a [64, 16]: right holds rows 0 .. 7's two words, then 8 .. 15's."""
    columns = [ptx(MMA.format(dtype), 4, *left, *right[j::2], *out[4 * j :][:4], floats=True, convergent=True) for j in range(2)]
    return [*columns[0], *columns[1]]
