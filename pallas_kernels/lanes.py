"""Vectors of 32-bit numbers inside kernels, element i of each 128 with thread i: what a thread looks up for itself, and what the 32
threads of a warp do together. Mosaic has no such operations; these are PTX.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.inline import address, like, ptx, words

THREADS, LANES = 128, 32  # of a warpgroup, of a warp

# Each thread's own elements of an array, which begins at the last operand; of those outside of it, nothing.
GATHER = """{{
.reg .pred inside;
.reg .b32 x;
.reg .b{bits} place;
mov.b32 x, -1;
setp.lt.u32 inside, $1, {size};
mad.{mad}.u32 place, $1, 4, $2;
@inside ld.{space}.b32 x, [place];
mov.b32 $0, x;
}}"""
SCATTER = """{{
.reg .pred inside;
.reg .b{bits} place;
setp.lt.u32 inside, $0, {size};
mad.{mad}.u32 place, $0, 4, $2;
@inside {write}.b32 [place], $1;
}}"""
HALVE = """shfl.sync.bfly.b32 other, all, {distance}, 31, -1;
add.f32 all, all, other;
"""
SUM = (
    "{\n.reg .b32 all, other;\nmov.b32 all, $1;\n"
    + "".join(HALVE.format(distance=n) for n in (16, 8, 4, 2, 1))
    + "mov.b32 $0, all;\n}"
)

ADD = """shfl.sync.up.b32 other|there, all, {distance}, 0, -1;
@there add.s32 all, all, other;
"""
SUM_SO_FAR = (
    "{\n.reg .pred there;\n.reg .b32 all, other;\nmov.b32 all, $1;\n"
    + "".join(ADD.format(distance=n) for n in (1, 2, 4, 8, 16))
    + "mov.b32 $0, all;\n}"
)


def iota(size: int):
    """0 .. size - 1, a multiple of THREADS, as int32."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=plgpu.Layout.WG_STRIDED((size,), vec_size=1))


def full(x, value):
    """A vector of one number, as long as x."""
    return plgpu.layout_cast(jnp.full_like(x, value), flat(x))


def gather(x_ref, index):
    """Elements of a vector in global or shared memory, their 32 bits as int32; -1 where an index lies outside."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), flat(index)), return_type=_result(index))
    def run(_, x, index):
        place, space = _place(x)
        code = GATHER.format(size=x_ref.shape[0], **space)
        return like(index, [ptx(code, 1, i, place, ordered=True)[0] for i in words(index)])

    return run(x_ref, index)


def scatter(x_ref, index, values) -> None:
    """Writes values to a vector in global or shared memory: nowhere for an index outside."""
    _scatter("st.{space}", x_ref, index, values)


def scatter_or(x_ref, index, values) -> None:
    """As `scatter`; sets bits in what is there."""
    _scatter("red.{space}.or", x_ref, index, values)


def _scatter(write: str, x_ref, index, values) -> None:
    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), flat(index), flat(index)))
    def run(_, x, index, values):
        place, space = _place(x)
        code = SCATTER.format(size=x_ref.shape[0], write=write.format(**space), **space)
        for i, value in zip(words(index), words(values)):
            ptx(code, 0, i, value, place)

    run(x_ref, index, values)


def count_bits(x):
    """Of each int32."""
    return _each("popc.b32 $0, $1;", x)


def pack_bfloat16(low, high):
    """Two float32, rounded to bfloat16, in one int32."""
    low, high = (lax.bitcast_convert_type(x, jnp.int32) for x in (low, high))

    @plgpu.inline_mgpu(arg_types=(flat(low), flat(high)), return_type=_result(low))
    def run(_, low, high):
        return like(low, [ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", 1, *pair)[0] for pair in zip(words(low), words(high))])

    return run(low, high)


def warp_max(x):
    """The largest of a warp's int32, in all of its lanes."""
    return _each("redux.sync.max.s32 $0, $1, -1;", x)


def warp_min(x):
    """The smallest of a warp's int32, in all of its lanes."""
    return _each("redux.sync.min.s32 $0, $1, -1;", x)


def warp_sum(x):
    """The sum of a warp's float32, in all of its lanes."""
    return lax.bitcast_convert_type(_each(SUM, lax.bitcast_convert_type(x, jnp.int32)), jnp.float32)


def warp_sum_so_far(x):
    """The sum of a warp's int32 up to each lane's own."""
    return _each(SUM_SO_FAR, x)


def flat(x):
    """The layout of x."""
    return plgpu.Layout.WG_STRIDED(x.shape, vec_size=1)


def _each(code: str, x):
    @plgpu.inline_mgpu(arg_types=(flat(x),), return_type=_result(x))
    def run(_, x):
        return like(x, [ptx(code, 1, word, convergent=True)[0] for word in words(x)])

    return run(x)


def _result(x):
    return plgpu.ShapeDtypeStruct(x.shape, jnp.int32, layout=flat(x))


def _place(x):
    if utils.is_smem_ref(x):
        return address(x), {"space": "shared", "bits": 32, "mad": "lo"}
    return utils.memref_ptr(x), {"space": "global", "bits": 64, "mad": "wide"}
