"""PTX inside kernels, on the registers of Mosaic's arrays: 32-bit words, which may be pairs of 16-bit floats, and float32."""

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector


def ptx(text: str, results: int, *operands, floats: bool = False, ordered: bool = False, convergent: bool = False) -> tuple:
    """Results are words, or floats. `ordered`: not to be moved across barriers and other warps' business."""
    kind = ir.F32Type.get() if floats else ir.IntegerType.get_signless(32)
    if results == 0:
        utils.inline_ptx(text, *operands, has_side_effects=True, convergent=True)
        return ()
    return utils.inline_ptx(
        text, *operands, result_types=(kind,) * results, has_side_effects=ordered, convergent=ordered or convergent
    )


def address(ref):
    """Where an array in shared memory begins."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), utils.memref_ptr(ref))


def words(array) -> list:
    """The registers of an array of float16 in layout WGMMA, or of a vector of 32-bit numbers."""
    return [utils.bitcast(x, ir.IntegerType.get_signless(32)) for x in array.registers.flat]


def halves(words, columns: int):
    """Words in the order of pairs of columns and in each of its two rows, as an array [64, columns] of float16 in layout WGMMA."""
    f16x2 = ir.VectorType.get((2,), ir.F16Type.get())
    return _array([utils.bitcast(x, f16x2) for x in words], columns)


def floats(array) -> list:
    """The elements that a thread has of an array of float32."""
    return [
        vector.extract(x, dynamic_position=[], static_position=[k])
        for x in array.registers.flat
        for k in range(ir.VectorType(x.type).shape[0])
    ]


def singles(floats, columns: int):
    """Floats in the order of pairs of columns, each of its two rows, and the two columns: [64, columns] in layout WGMMA."""
    return _array([_vector(floats[i : i + 2]) for i in range(0, len(floats), 2)], columns)


def like(array, values):
    """An array of float32 or int32 in which each register is one element."""
    registers = np.array([_vector([x]) for x in values], object).reshape(array.registers.shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=array.is_signed)


def _vector(values):
    x = llvm.mlir_undef(ir.VectorType.get((len(values),), values[0].type))
    for k, value in enumerate(values):
        x = vector.insert(value, x, dynamic_position=[], static_position=[k])
    return x


def _array(registers: list, columns: int):
    shape = mgpu.WGMMA_LAYOUT.registers_shape((64, columns))
    registers = np.array(registers, object).reshape(shape)
    return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)
