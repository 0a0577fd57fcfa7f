"""What one warpgroup of several needs: a barrier, reductions across its warps, and a way to pass an array on.

jnp's reductions across warps would share their scratch memory with the other warpgroups.
"""

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels.hopper import ROW, WGMMA
from pallas_kernels.inline import address, floats, like, ptx, singles

# Where lane (g, t) of a warp leaves its value of row g, in [16 rows, 4 warps] of float32; row g + 8 lies 128 bytes on.
MEETING_PLACE = """{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 2, 3;
mad.lo.u32 $0, y, 16, $1;
}"""
LEAVE = """{{
.reg .b32 x, y;
mov.u32 x, %tid.x;
bfe.u32 y, x, 5, 2;
mad.lo.u32 y, y, 4, $0;
st.shared.f32 [y + {offset}], $1;
}}"""
MEET = "ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4 + {offset}];"


# A thread's own word of every 128.
OWN = "{.reg .b32 x; mov.u32 x, %tid.x; and.b32 x, x, 127; mad.lo.u32 $0, x, 4, $1;}"
PUT = "{{.reg .b32 x; cvt.rn.f16x2.f32 x, $2, $1; st.shared.b32 [$0 + {offset}], x;}}"
TAKE = "{{.reg .b16 x, y; .reg .b32 z; ld.shared.b32 z, [$2 + {offset}]; mov.b32 {{x, y}}, z; cvt.f32.f16 $0, x; cvt.f32.f16 $1, y;}}"


@plgpu.inline_mgpu()
def sync(_):
    """Waits for all four warps of this warpgroup."""
    utils.warpgroup_barrier()


def warps_max(x, scratch_smem):
    """Of float32 [64] in layout ROW, where each warp has sixteen rows: the largest of the four warps' values of each.

    Scratch is float32 [64], this warpgroup's own. Between two reductions there must be another barrier of the warpgroup.
    """
    return _across(arith.maximumf, x, scratch_smem)


def warps_sum(x, scratch_smem):
    """The sum of the four warps' values; as `warps_max`."""
    return _across(arith.addf, x, scratch_smem)


def _across(op, x, scratch_smem):
    @plgpu.inline_mgpu(arg_types=(ROW, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ROW))
    def run(_, x, scratch):
        (place,) = ptx(MEETING_PLACE, 1, address(scratch))
        for half, value in enumerate(floats(x)):
            ptx(LEAVE.format(offset=128 * half), 0, place, value)
        utils.warpgroup_barrier()
        results = []
        for half in range(2):
            a, b, c, d = ptx(MEET.format(offset=128 * half), 4, place, floats=True, ordered=True)
            results.append(op(op(a, b), op(c, d)))  # the same tree in every thread
        return like(x, results)

    return run(x, scratch_smem)


def put(block: int, x, words_smem):
    """Leaves a float32 [64, N] as float16 for the same threads of another warpgroup: block `block`, of 32 N words."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))
    def run(_, x, words):
        (own,), values = ptx(OWN, 1, address(words)), floats(x)
        for i in range(len(values) // 2):
            ptx(PUT.format(offset=256 * (block * len(values) + 2 * i)), 0, own, *values[2 * i : 2 * i + 2])

    run(x, words_smem)


def take(block: int, columns: int, words_smem):
    """The block [64, columns] that another warpgroup has put."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=WGMMA))
    def run(_, words):
        (own,), count, values = ptx(OWN, 1, address(words)), columns // 2, []
        for i in range(count // 2):
            values += ptx(TAKE.format(offset=256 * (block * count + 2 * i)), 2, own, floats=True, ordered=True)
        return singles(values, columns)

    return run(words_smem)
