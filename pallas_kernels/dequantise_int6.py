"""6-bit codes in shared memory as right operands of `warp_products`: keys and, transposed, values. See `dequantise`.

A code is multiplied as the float16 number that its bits are where they lie in its word (see `latent_pages.codes_to_words`): WEIGHTS
times the code, or the code less 32, times 2^-24. Queries are divided by the weights of their dims beforehand, outputs at the end.
What 32 times the unsigned codes add is subtracted for whole groups: from scores as a product of spans and sums of queries, from
outputs as one of probabilities and spans.

So spans are apart from codes. The products of keys and queries are summed for each group alone and then multiplied by its span; for
values the probabilities are, which takes them transposed: `turn_spans` does that where they lie.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dequantise import LOAD_TRANSPOSED, SEGMENT, VALUE_PLACE, f16
from pallas_kernels.hopper import WGMMA, swizzled
from pallas_kernels.inline import address, floats, halves, number, ptx, singles, words
from pallas_kernels.warp_products import COLUMNS, LOAD_PLAIN, SCORES, TOKEN_PLACE, product, query_columns

TILE = 8 * 384  # bytes of eight tokens
BOX, QUERIES_16 = (plgpu.RefType(swizzled(dtype)) for dtype in (jnp.uint32, jnp.bfloat16))
SUMS = plgpu.ShapeDtypeStruct((64, 8), jnp.float32, layout=WGMMA)

LOAD4 = "ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];"

# Words of the three planes to eight pairs of numbers: see `codes_to_words`. (x ^ y) & z is 0x28 to lop3.
# Results are moved last: only then may they take the place of operands.
CODES = "\n".join(
    ["{", ".reg .b32 x, y, z;", ".reg .b32 c<8>;", "shr.u32 x, $8, 4; shr.u32 y, $9, 6; prmt.b32 z, $10, 0, 0x4341;"]
    + [f"and.b32 c{2 * i}, ${8 + i}, 0x87C087C0; and.b32 c{2 * i + 1}, ${8 + i}, 0x003F003F;" for i in range(3)]
    + ["lop3.b32 c6, x, z, 0x07E007E0, 0x28; lop3.b32 c7, y, z, 0x01F801F8, 0x28;"]
    + [f"mov.b32 ${i}, c{i};" for i in range(8)]
    + ["}"]
)
WEIGHTS = (64, 1, 64, 1, 64, 1, 32, 8)  # of a code of dims 8 x .. + 7 of 64, in multiples of 2^-24
SCORE_UNIT = 2.0**15  # of scores: queries are times 8 / weight, codes times weight / 2^24, and a latent is span * code / 64
UNSIGNED = (False, True, False, True, False, True, True, True)  # the code itself, not the code less 32

# Two rows of matrices of 8 x 16 bytes, {step} and {next} bytes apart, the rows of each {row}: a lane's row of the load.
MATRICES = """{{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 5, 2;
mad.lo.u32 $0, y, {warp}, $1;
bfe.u32 y, x, 6, 1;
mad.lo.u32 $0, y, {pair}, $0;
bfe.u32 y, x, 4, 1;
mad.lo.u32 $0, y, {next}, $0;
bfe.u32 y, x, 3, 1;
mad.lo.u32 $0, y, {step}, $0;
and.b32 y, x, 7;
mad.lo.u32 $0, y, {row}, $0;
}}"""
LOAD = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$0, $1, $2, $3}}, [$4 + {offset}];"
TURN = """{
.reg .b32 x<4>;
ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {x0, x1, x2, x3}, [$0];
bar.warp.sync 0xffffffff;
stmatrix.sync.aligned.m8n8.x4.shared.b16 [$1], {x0, x1, x2, x3};
}"""
MULTIPLY = "mul.rn.f16x2 $0, $1, $2;"
PAIR = "{.reg .b16 x, y; mov.b32 {x, y}, $2; cvt.f32.f16 $0, x; cvt.f32.f16 $1, y;}"

# Of the boxes at $1 and $2: a lane's row of the load of four matrices, a warp's tokens 0 .. 7 and 8 .. 15 of one segment and the next.
KEY_PLACE = """{{
.reg .b32 x, y, z;
.reg .pred second;
mov.u32 x, %tid.x;
and.b32 z, x, 64;
setp.ne.u32 second, z, 0;
selp.b32 y, $2, $1, second;
bfe.u32 z, x, 5, 1;
mad.lo.u32 y, z, {two_tiles}, y;
bfe.u32 z, x, 3, 1;
mad.lo.u32 y, z, {tile}, y;
and.b32 z, x, 7;
mad.lo.u32 y, z, 128, y;
bfe.u32 x, x, 4, 1;
xor.b32 x, x, z;
mad.lo.u32 $0, x, 16, y;
}}"""

# Queries as bfloat16 [16, 512] in swizzled tiles to float16 in place, those of octet x times 8 / WEIGHTS[x]: a thread has 16 bytes
# of one octet, of eight rows. The sums of those of UNSIGNED in a group, halved and negated, go to float16 [2, 16 rows, 16 groups].
QUERIES = """{{
.reg .b32 a, b, f, x, y, z, p<4>;
.reg .f32 v, low<4>, high<4>, w;
.reg .b16 h, l;
.reg .pred counted, first;
mov.u32 x, %tid.x;
and.b32 x, x, 127;
mad.lo.u32 a, x, 16, $0;
bfe.u32 b, x, 3, 3;
mad.lo.u32 z, b, 32, $1;
xor.b32 y, x, b;
and.b32 y, y, 7;
bfe.u32 x, x, 6, 1;
mad.lo.u32 z, x, 4, z;
bfe.u32 x, y, 2, 1;
mad.lo.u32 z, x, 2, z;
and.b32 x, y, 3;
setp.eq.u32 first, x, 0;
mov.b32 b, 0xEA;
shr.u32 b, b, y;
and.b32 b, b, 1;
setp.ne.u32 counted, b, 0;
shl.b32 y, y, 2;
mov.b32 f, 0x31606060;
shr.u32 f, f, y;
and.b32 f, f, 15;
add.u32 f, f, 124;
shl.b32 f, f, 23;
ld.shared.v4.b32 {{p0, p1, p2, p3}}, [a + {offset}];
{pairs}
st.shared.v4.b32 [a + {offset}], {{p0, p1, p2, p3}};
{total}
selp.f32 v, v, 0f00000000, counted;
shfl.sync.bfly.b32 w, v, 1, 31, 0xffffffff;
add.f32 v, v, w;
shfl.sync.bfly.b32 w, v, 2, 31, 0xffffffff;
add.f32 v, v, w;
mul.f32 v, v, 0fBF000000;
cvt.rn.f16.f32 h, v;
cvt.f32.f16 w, h;
sub.f32 v, v, w;
cvt.rn.f16.f32 l, v;
@first st.shared.b16 [z + {sums}], h;
@first st.shared.b16 [z + {rest}], l;
}}"""
QUERY_PAIR = """shl.b32 x, p{0}, 16; and.b32 y, p{0}, 0xFFFF0000; mov.b32 low{0}, x; mov.b32 high{0}, y;
mov.b32 w, f; mul.f32 v, low{0}, w; mul.f32 w, high{0}, w; cvt.rn.f16x2.f32 p{0}, w, v;"""

# Of the [16, 8] of sums that four lanes share, those of group {group} of a warp's four: warps 0 and 2 have columns 0 .. 3 of theirs.
SHARED_SUMS = """{{
.reg .b32 x, y, z;
mov.u32 x, %tid.x;
and.b32 y, x, 28;
bfe.u32 x, x, 5, 1;
mad.lo.u32 y, x, 2, y;
add.u32 y, y, {lane};
mov.b32 z, $2;
mov.b32 x, $3;
shfl.sync.idx.b32 $0, z, y, 31, 0xffffffff;
shfl.sync.idx.b32 $1, x, y, 31, 0xffffffff;
}}"""
FMA = "fma.rn.f32 $0, $1, $2, $3;"


def queries(q_smem, sums_smem):
    """Converts bfloat16 queries [16, 512] in place for `keys`; what is to be added for unsigned codes to sums_smem."""

    @plgpu.inline_mgpu(arg_types=(QUERIES_16, plgpu.RefType()))
    def run(_, q, sums):
        pairs = "\n".join(QUERY_PAIR.format(k) for k in range(4))
        total = "add.f32 v, low0, high0;" + "".join(f"add.f32 v, v, low{k}; add.f32 v, v, high{k};" for k in range(1, 4))
        for i in range(8):
            place = 256 * (i // 4) + 8 * (i % 4)
            text = QUERIES.format(offset=2048 * i, pairs=pairs, total=total, sums=place, rest=512 + place)
            ptx(text, 0, address(q), address(sums))

    run(q_smem, sums_smem)


def keys(pair: int, boxes):
    """Units 2 pair and 2 pair + 1 of 64 latents of the warps' tokens, each [64 tokens, 64]: multiples of their codes."""

    @plgpu.inline_mgpu(arg_types=(BOX,) * 2, return_type=(f16(64),) * 2)
    def run(_, *boxes):
        (place,) = ptx(KEY_PLACE.format(tile=TILE, two_tiles=2 * TILE), 1, *map(address, boxes))
        planes = [ptx(LOAD_PLAIN.format(swap=32 * pair, offset=1024 * plane), 4, place, ordered=True) for plane in range(3)]
        rows = [ptx(CODES, 8, *(plane[m] for plane in planes)) for m in range(4)]
        return tuple(halves([x for both in zip(*rows[2 * u : 2 * u + 2]) for x in both], 64) for u in range(2))

    return run(*boxes)


def key_spans(half: int, spans):
    """Spans of groups 8 half .. + 7 of a thread's four tokens: [token, two groups], in no layout that means anything."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=f16(64))
    def run(_, spans):
        (place,) = ptx(TOKEN_PLACE.format(sixteen=512, two=64), 1, address(spans))
        tokens = [ptx(LOAD4.format(offset=16 * half + k), 4, place, ordered=True) for k in (0, 32, 256, 288)]
        return halves([x for words in tokens for x in words], 64)

    return run(spans)


def add_scores(scores, keys, spans, unit: int, q_smem):
    """Adds to scores [64, 16] what unit `unit` gives, of keys that `keys` made and spans that `key_spans` found."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,) * 3 + (QUERIES_16,), return_type=SCORES)
    def run(_, scores, keys, spans, q):
        out, right = floats(scores), words(keys)
        factors = [ptx(PAIR, 2, words(spans)[4 * token + unit % 4], floats=True) for token in range(4)]
        for group in range(2):
            sums = None
            for step in range(2 * group, 2 * group + 2):
                sums = product(sums, query_columns(unit, step, q), right[4 * step : 4 * step + 4])
            # A thread's elements are two tokens of each of two rows, of its first and its second two tokens.
            out = [
                ptx(FMA, 1, x, factors[i % 2 + 2 * (i // 4)][group], y, floats=True)[0] for i, (x, y) in enumerate(zip(sums, out))
            ]
        return singles(out, COLUMNS)

    return run(scores, keys, spans, q_smem)


def add_unsigned(scores, spans, sums_smem):
    """Adds to scores what their unsigned codes have them lack: products of spans and what `queries` has left."""

    @plgpu.inline_mgpu(arg_types=(WGMMA,) + (plgpu.RefType(),) * 2, return_type=SCORES)
    def run(_, scores, spans, sums):
        (place,) = ptx(MATRICES.format(warp=512, pair=0, next=16, step=256, row=32), 1, address(spans))
        right, out = ptx(LOAD.format(offset=0), 4, place, ordered=True), floats(scores)
        (place,) = ptx(MATRICES.format(warp=0, pair=0, next=16, step=256, row=32), 1, address(sums))
        for part in range(2):
            out = product(out, ptx(LOAD.format(offset=512 * part), 4, place, ordered=True), right)
        return singles(out, COLUMNS)

    return run(scores, spans, sums_smem)


def turn_spans(spans):
    """Spans [64 tokens, 16 groups] to [4 warps, 16 groups, 16 tokens] in place: each warp those of its own tokens."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def run(_, spans):
        (source,) = ptx(MATRICES.format(warp=512, pair=0, next=16, step=256, row=32), 1, address(spans))
        (target,) = ptx(MATRICES.format(warp=512, pair=0, next=256, step=16, row=32), 1, address(spans))
        ptx(TURN, 0, source, target)

    run(spans)


def written():
    """Orders a thread's writes of shared memory before loads to the same place that follow its arrival."""

    @plgpu.inline_mgpu()
    def run(_):
        ptx("fence.proxy.async.shared::cta;", 0)

    run()


def weighted(p, box: int, group: int, spans):
    """Probabilities [64, 64] of the 32 tokens of a box, times their spans of one of a warp's four groups: [64, 32]."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()), return_type=f16(32))
    def run(_, p, spans):
        (place,) = ptx(MATRICES.format(warp=128, pair=0, next=512, step=16, row=0), 1, address(spans))
        loaded = ptx(LOAD.format(offset=1024 * box + 32 * group), 4, place, ordered=True)
        return halves([ptx(MULTIPLY, 1, x, loaded[k // 2])[0] for k, x in enumerate(words(p)[8 * box : 8 * box + 8])], 32)

    return run(p, spans)


def add_sums(sums, p, box: int, spans):
    """Adds to [64, 8] the products of probabilities and spans of a box's tokens: of eight groups, four of them a warp's own."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA, plgpu.RefType()), return_type=SUMS)
    def run(_, sums, p, spans):
        (place,) = ptx(MATRICES.format(warp=0, pair=256, next=512, step=16, row=32), 1, address(spans))
        right, out, left = ptx(LOAD.format(offset=1024 * box), 4, place, ordered=True), floats(sums), words(p)
        for step in range(2):
            out = product(out, left[8 * box + 4 * step :][:4], right[2 * step : 2 * step + 2])
        return singles(out, 8)

    return run(sums, p, spans)


def values(q: int, box):
    """Blocks 4 q .. + 3 of latents of a box, each [64 latents, 32 tokens]: multiples of codes, see `outputs`."""

    @plgpu.inline_mgpu(arg_types=(BOX,), return_type=(f16(32),) * 4)
    def run(_, box):
        (segment,) = ptx(SEGMENT.format(each=2, first=q), 1)
        (place,) = ptx(VALUE_PLACE.format(tile=TILE), 1, address(box), segment)
        planes = [ptx(LOAD_TRANSPOSED.format(offset=1024 * plane), 4, place, ordered=True) for plane in range(3)]
        codes = [ptx(CODES, 8, *(plane[m] for plane in planes)) for m in range(4)]
        return tuple(halves([x for eight in codes for x in eight[2 * c : 2 * c + 2]], 32) for c in range(4))

    return run(box)


def outputs(block: int, out, sums):
    """Block `block` of outputs [64, 16] from products with multiples of codes, and the sums [64, 8] of probabilities times spans."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, WGMMA), return_type=SCORES)
    def run(_, out, sums):
        group, values, results = block // 2, floats(out), []
        shares = ptx(SHARED_SUMS.format(lane=group // 2), 2, *floats(sums)[group % 2 :: 2], floats=True)
        for i, x in enumerate(values):
            octet = 2 * (block % 4) + i // 4
            (offset,) = ptx(FMA, 1, shares[i // 2 % 2], number(-0.5 * UNSIGNED[octet]), number(0), floats=True)
            results += ptx(FMA, 1, x, number(2**18 / WEIGHTS[octet]), offset, floats=True)
        return singles(results, COLUMNS)

    return run(out, sums)
