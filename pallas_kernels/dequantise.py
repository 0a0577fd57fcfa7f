"""Codes to float16 in registers, as the left operand of a wgmma.

A chunk is 64 tokens of 128 latents: thread 4 r + t of a warp's 32 holds rows r and r + 8 of the warp's 16, and in them the
columns 2 t and 2 t + 1 of every 8. The pages store a token's codes so that a thread finds its own in consecutive bytes.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from pallas_kernels.hopper import WGMMA, swizzled

CHUNK = 128


def _rows(columns: int, vector: int, lanes: int):
    """The layout of [64, columns] in which each of four lanes has its own columns / lanes of a row, in vectors."""
    lane = -4 if lanes == 4 else plgpu.Replicated(4)
    tiling = plgpu.Tiling(((64, columns), (16, columns), (8, columns // lanes), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-7,), lane_dims=(-3, lane), vector_dim=-1)


BYTES = _rows(128, 16, lanes=4)
WORDS = _rows(32, 4, lanes=4)
SPANS = _rows(16, 8, lanes=1)  # every lane needs all groups' spans
KEYS = plgpu.ShapeDtypeStruct((64, CHUNK), jnp.float16, layout=WGMMA)

FP8 = """{
.reg .b16 low, high;
mov.b32 {low, high}, $2;
cvt.rn.f16x2.e4m3x2 $0, low;
cvt.rn.f16x2.e4m3x2 $1, high;
}"""

# (x & mask) | y is 0xEA to lop3. Codes go to bits 4-9 of a half, under the exponent of 1.0: 1 + code / 64.
# Results are moved last: only then may they take the place of operands.
INT6 = "\n".join(
    ["{", ".reg .b32 x;", ".reg .b32 y<8>;"]
    + [
        f"lop3.b32 y{2 * i}, ${8 + i}, 0x03F003F0, 0x3C003C00, 0xEA;"
        f"shr.u32 x, ${8 + i}, 6; lop3.b32 y{2 * i + 1}, x, 0x03F003F0, 0x3C003C00, 0xEA;"
        for i in range(3)
    ]
    + [
        f"shl.b32 x, ${8 + i}, 6; lop3.b32 y{6 + i}, x, 0x03C003C0, 0x3C003C00, 0xEA;"
        f"shl.b32 x, $10, {4 - 2 * i}; lop3.b32 y{6 + i}, x, 0x00300030, y{6 + i}, 0xEA;"
        for i in range(2)
    ]
    + [f"fma.rn.f16x2 y{i}, y{i}, ${11 + i // 4}, ${13 + i // 4};" for i in range(8)]
    + [f"mov.b32 ${i}, y{i};" for i in range(8)]
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


# Where a lane's row of a step's four 8 x 8 matrices goes: rows 0-7, rows 8-15, and the next eight columns of both.
PLACE = """{
.reg .b32 x, y;
and.b32 x, $1, 7;
shl.b32 x, x, 7;
add.u32 x, x, $2;
bfe.u32 y, $1, 3, 1;
mad.lo.u32 x, y, 8192, x;
bfe.u32 y, $1, 5, 2;
mad.lo.u32 x, y, 16384, x;
bfe.u32 y, $1, 4, 1;
xor.b32 y, y, $1;
and.b32 y, y, 7;
mad.lo.u32 $0, y, 16, x;
}"""
STORE = """{{
.reg .b32 x;
xor.b32 x, $0, {swap};
stmatrix.sync.aligned.m8n8.x4.shared.b16 [x + {offset}], {{$1, $2, $3, $4}};
}}"""


@plgpu.inline_mgpu(arg_types=(BYTES,), return_type=KEYS)
def fp8(_, codes):
    """[64, 128] e4m3 to float16, exact."""
    rows = [[pair for x in _words(row) for pair in _ptx(FP8, 2, x)] for row in codes.registers.reshape(2, -1)]
    return _keys(rows)


def int6(chunk: int, spans, *planes):
    """Chunk 0 .. 3 of three planes of words [64, 32], with spans [64, 16], to float16."""

    @plgpu.inline_mgpu(arg_types=(SPANS, WORDS, WORDS, WORDS), return_type=KEYS)
    def convert(_, spans, *planes):
        rows = []
        for row in range(2):
            spans_of_two = _words(spans.registers.reshape(2, -1)[row])
            words = [_words(plane.registers.reshape(2, -1)[row]) for plane in planes]
            pairs = []
            for unit in (2 * chunk, 2 * chunk + 1):
                factors = _ptx(FACTORS, 4, spans_of_two[unit])
                pairs += _ptx(INT6, 8, *(plane[unit] for plane in words), *factors)
            rows.append(pairs)
        return _keys(rows)

    return convert(spans, *planes)


def store(keys, chunk: int, values_smem):
    """Stores a chunk to its columns of [64, 512], swizzled by 128 bytes.

    One matrix store takes the four registers of one wgmma step; Mosaic's own would take the registers of two tiles of columns
    from each of two steps, and move all of them into new ones first.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType(swizzled(jnp.float16))))
    def run(_, keys, values):
        thread = _ptx("mov.u32 $0, %tid.x;", 1)[0]
        (place,) = _ptx(PLACE, 1, thread, llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(values)))
        steps = np.array([utils.bitcast(x, ir.IntegerType.get_signless(32)) for x in keys.registers.flat], object).reshape(8, 4)
        for step, registers in enumerate(steps):
            offset = chunk * 2048 + step // 4 * 1024
            utils.inline_ptx(STORE.format(swap=step % 4 * 32, offset=offset), place, *registers, has_side_effects=True)

    run(keys, values_smem)


def _words(registers) -> list:
    """The 32-bit words of vector registers."""
    i32 = ir.IntegerType.get_signless(32)
    words = []
    for register in registers:
        count = utils.bitwidth(register.type) // 32
        x = utils.bitcast(register, ir.VectorType.get((count,), i32))
        words += [vector.extract(x, dynamic_position=[], static_position=[i]) for i in range(count)]
    return words


def _ptx(text: str, results: int, *operands) -> tuple:
    return utils.inline_ptx(text, *operands, result_types=(ir.IntegerType.get_signless(32),) * results)


def _keys(rows) -> mgpu.FragmentedArray:
    """The keys of which a thread holds these pairs, in order of columns, in its two rows."""
    layout = mgpu.WGMMA_LAYOUT
    f16x2 = ir.VectorType.get((2,), ir.F16Type.get())
    registers = np.array([utils.bitcast(x, f16x2) for pair in zip(*rows) for x in pair], object)
    return mgpu.FragmentedArray(
        _registers=registers.reshape(layout.registers_shape((64, CHUNK))), _layout=layout, _is_signed=None
    )
