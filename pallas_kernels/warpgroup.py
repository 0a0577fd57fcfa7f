"""What one warpgroup of several needs: a barrier, reductions over the 64 rows of a WGMMA array, and a way to pass one on.

jnp's reductions over rows would share their scratch memory with the other warpgroups, and take two barriers a register.
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.hopper import COL, WGMMA

WARPS = 4


@plgpu.inline_mgpu()
def sync(_):
    """Waits for all four warps of this warpgroup."""
    utils.warpgroup_barrier()


def column_max(x, scratch_smem):
    """The largest value of each column of float32 [64, N], in layout COL.

    Scratch is float32 [4 * N], this warpgroup's own. Between two reductions there must be another barrier of the warpgroup.
    """
    return _reduce(arith.maximumf, x, scratch_smem)


def column_sum(x, scratch_smem):
    """The sum of each column; as `column_max`."""
    return _reduce(arith.addf, x, scratch_smem)


def _reduce(op, x, scratch_smem):
    columns = x.shape[1]

    @plgpu.inline_mgpu(
        arg_types=(WGMMA, plgpu.RefType()), return_type=plgpu.ShapeDtypeStruct((columns,), jnp.float32, layout=COL)
    )
    def reduce(_, x, scratch):
        # A thread has two rows of two columns of every eight; lanes 4, 8 and 16 apart have the same columns.
        pairs = [op(upper, lower) for upper, lower in x.registers.reshape(-1, 2)]
        for distance in (4, 8, 16):
            pairs = [op(pair, utils.shfl_bfly(pair, distance)) for pair in pairs]

        def constant(value):
            return utils.c(value, ir.IntegerType.get_signless(32))

        thread = utils.thread_idx()
        warp = arith.andi(arith.shrui(thread, constant(5)), constant(WARPS - 1))
        column = arith.shli(arith.andi(thread, constant(3)), constant(1))

        def place(warp, tile):
            index = arith.addi(arith.muli(warp, constant(columns)), arith.addi(column, constant(8 * tile)))
            return utils.getelementptr(utils.memref_ptr(scratch), [index], ir.F32Type.get())

        for tile, pair in enumerate(pairs):
            llvm.store(pair, place(warp, tile))
        utils.warpgroup_barrier()
        registers = []
        for tile, pair in enumerate(pairs):
            a, b, c, d = (llvm.load(pair.type, place(constant(w), tile)) for w in range(WARPS))
            registers.append(op(op(a, b), op(c, d)))  # the same tree in every thread
        layout = COL.to_mgpu()
        registers = np.array(registers, object).reshape(layout.registers_shape((columns,)))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return reduce(x, scratch_smem)


# A thread's own word of every 128.
OWN = "{.reg .b32 x; mov.u32 x, %tid.x; and.b32 x, x, 127; mad.lo.u32 $0, x, 4, $1;}"


def put(block: int, x, words_smem):
    """Leaves a float32 [64, N] as float16 for the same threads of another warpgroup: block `block`, of 32 N words."""

    @plgpu.inline_mgpu(arg_types=(WGMMA, plgpu.RefType()))
    def run(_, x, words):
        for i, pair in enumerate(x.registers.flat):
            low, high = (vector.extract(pair, dynamic_position=[], static_position=[k]) for k in range(2))
            text = "{.reg .b32 x; cvt.rn.f16x2.f32 x, $2, $1; st.shared.b32 [$0 + %d], x;}"
            utils.inline_ptx(text % (512 * (block * x.registers.size + i)), _own(words), low, high, has_side_effects=True)

    run(x, words_smem)


def take(block: int, columns: int, words_smem):
    """The block [64, columns] that another warpgroup has put."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=WGMMA))
    def run(_, words):
        layout, f32 = mgpu.WGMMA_LAYOUT, ir.F32Type.get()
        registers = np.empty(layout.registers_shape((64, columns)), object)
        for i in range(registers.size):
            text = "{.reg .b16 x, y; .reg .b32 z; ld.shared.b32 z, [$2 + %d]; mov.b32 {x, y}, z; cvt.f32.f16 $0, x; cvt.f32.f16 $1, y;}"
            place = 512 * (block * registers.size + i)
            both = utils.inline_ptx(text % place, _own(words), result_types=(f32, f32), has_side_effects=True)
            pair = llvm.mlir_undef(ir.VectorType.get((2,), f32))
            for k in range(2):
                pair = vector.insert(both[k], pair, dynamic_position=[], static_position=[k])
            registers.flat[i] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return run(words_smem)


def _own(words):
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx(OWN, llvm.ptrtoint(i32, utils.memref_ptr(words)), result_types=i32)
