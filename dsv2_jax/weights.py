"""Weights: where parameters come from. What every checkpoint offers, the native directory, and loading onto devices.

A native directory holds `native.json` (format, configuration, shapes and dtypes), one safetensors file a parameter named by its
path (`moe.attn.w_dkv.safetensors`), layers and experts stacked, and the small files beside: config.json, tokenizer, licence.
Parameters of 8-bit floats have their scales beside them, see fp8.py.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding, SingleDeviceSharding

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.fp8 import BLOCK, FLOAT8, SCALES, Fp8Matrix, as_matrix, blocks_of, dequantise, quantise
from dsv2_jax.tensor_files import copy, create_tensors, read_json, read_tensors

FORMAT = 2
MANIFEST = "native.json"


class Weights(Protocol):
    """A checkpoint, opened: parameters by path, read slice by slice."""

    config: ModelConfig
    dtype: str  # of most of its elements: bfloat16 (which 8 bits stand for), float16 or float32
    directory: Path  # holds the tokenizer and other small files
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]]

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """`parameter[index]`: of the dtype in `shapes`, often a view of a memory map and read when it is used."""
        ...


class NativeWeights:
    """A native directory as `Weights`. `hf_dtypes`: of Hugging Face tensors that were narrower than their stack is."""

    def __init__(self, directory: Path) -> None:
        """Raises: InputError, if a file is missing, damaged, or other than native.json says."""
        self.directory = Path(directory)
        manifest = read_json(member(self.directory, MANIFEST))
        if manifest.get("format") != FORMAT:
            raise InputError(f"{self.directory}/{MANIFEST}: format is {manifest.get('format')!r}, this program reads {FORMAT}")
        for key in ("config", "parameters", "hf_dtypes"):
            if not isinstance(manifest.get(key), dict):
                raise InputError(f"{self.directory}/{MANIFEST}: {key} is {manifest.get(key)!r}, expected an object")
        self.config = ModelConfig.from_hf(manifest["config"])
        self.hf_dtypes: dict[str, str] = manifest["hf_dtypes"]
        if not all(dtype in ("bfloat16", "float16", "float32") for dtype in self.hf_dtypes.values()):
            raise InputError(f"{self.directory}/{MANIFEST}: hf_dtypes holds other than bfloat16, float16 and float32")
        self._arrays = {}
        for path, stated in manifest["parameters"].items():
            file = member(self.directory, f"{path}.safetensors")
            tensors = read_tensors(file)
            if set(tensors) != {path} or _describe(tensors[path].shape, tensors[path].dtype) != stated:
                held = {name: _describe(x.shape, x.dtype) for name, x in tensors.items()}
                raise InputError(f"{file}: holds {held}, {MANIFEST} says {path}: {stated}")
            if tensors[path].dtype.name not in ("bfloat16", "float16", "float32", FLOAT8.name):
                expected = f"bfloat16, float16, float32 or {FLOAT8}"
                raise InputError(f"{file}: {path} is {tensors[path].dtype}, expected {expected}")
            self._arrays[path] = tensors[path]
        if not self._arrays:
            raise InputError(f"{self.directory}/{MANIFEST}: parameters is empty, expected at least one")
        quantised = {path + SCALES for path, array in self._arrays.items() if array.dtype == FLOAT8}
        scales = {path for path in self._arrays if path.endswith(SCALES)}
        problems = {"missing": quantised - scales, "unexpected": scales - quantised}
        refuse_mismatch(f"{self.directory}/{MANIFEST}: the scales are not those of what is {FLOAT8}", problems)
        self.shapes = {path: (array.shape, array.dtype) for path, array in self._arrays.items()}
        self.dtype = main_dtype(self.shapes)

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        return self._arrays[path][index]


def write_native(weights: Weights, directory: Path, advance: Callable[[int], None]) -> None:
    """Writes native.json and the parameters into `directory`, a layer or an expert at a time; `advance` is told the bytes."""
    for path, (shape, dtype) in weights.shapes.items():
        with create_tensors(directory / f"{path}.safetensors", {path: (shape, dtype)}) as write:
            for index in np.ndindex(shape[: stacked_axes(path)]):
                array = weights.read(path, index)
                write(path, array, index)
                advance(array.nbytes)
    manifest = {
        "format": FORMAT,
        "config": weights.config.to_hf(weights.dtype),
        "parameters": {path: _describe(*spec) for path, spec in weights.shapes.items()},
        "hf_dtypes": getattr(weights, "hf_dtypes", {}),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def load(weights: Weights, abstract: Any) -> Any:
    """Reads parameters onto devices; each device reads its own part, in layers, so that the host holds about one parameter.

    Args:
        abstract: a pytree of `jax.ShapeDtypeStruct`, as `jax.eval_shape` makes it; key paths are the parameters' names. A
            leaf is cast to its dtype and placed by its sharding (on the current mesh if that is abstract). Where it is an
            `Fp8Matrix`, the checkpoint's own 8 bits are taken, or those that a matrix of other floats is quantised to as it comes.

    Returns:
        The same pytree with arrays.

    Raises:
        InputError: parameters are missing, unexpected or of another shape; all are listed.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract, is_leaf=lambda node: isinstance(node, Fp8Matrix))
    wanted = {path_name(key): leaf for key, leaf in leaves}
    shapes = {path: shape for path, (shape, _) in weights.shapes.items() if not path.endswith(SCALES)}
    refuse_mismatch(
        f"{weights.directory}: the checkpoint does not match the model",
        {
            "missing": wanted.keys() - shapes.keys(),
            "unexpected": shapes.keys() - wanted.keys(),
            "wrong shape": [
                f"{path} is {list(shapes[path])}, expected {list(leaf.shape)}"
                for path, leaf in wanted.items()
                if path in shapes and shapes[path] != leaf.shape
            ],
        },
    )
    placed = [(_place_fp8 if isinstance(leaf, Fp8Matrix) else _place)(weights, path, leaf) for path, leaf in wanted.items()]
    return tree.unflatten(placed)


def _place(weights: Weights, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    parts: dict[str, np.ndarray] = {}  # devices that hold the same part share it

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if str(index) not in parts:
            parts[str(index)] = read_as(leaf.dtype, weights, path, index)
        return parts[str(index)]

    return jax.make_array_from_callback(leaf.shape, _sharding(leaf), part, dtype=leaf.dtype)


def _place_fp8(weights: Weights, path: str, leaf: Fp8Matrix) -> Fp8Matrix:
    """Values and scales are cut alike, layers and experts apart and no matrix: what is read for one holds the other."""
    parts: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def part(index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
        stack = index[: stacked_axes(path)]
        if str(stack) not in parts:
            parts[str(stack)] = _read_blocks(weights, path, leaf, stack)
        return parts[str(stack)]

    def place(which: int, array: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(array.shape, _sharding(array), lambda index: part(index)[which], dtype=array.dtype)

    return dataclasses.replace(leaf, values=place(0, leaf.values), scales=place(1, leaf.scales))


def _sharding(leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    sharding = leaf.sharding or SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return sharding


def read_as(dtype: np.dtype, weights: Weights, path: str, index: tuple[slice, ...]) -> np.ndarray:
    """`parameter[index]` in `dtype`, an index for each axis: cast, or what its 8 bits stand for, rounded once."""
    shape, stored = weights.shapes[path]
    depth = stacked_axes(path)
    inner = index[depth:]
    array = np.empty([len(range(n)[i]) for n, i in zip(shape, index)], dtype)

    def numbers(axes: slice) -> np.ndarray:
        sizes = shape[depth:][axes]
        return np.arange(math.prod(sizes)).reshape(sizes)[inner[axes]].reshape(-1)

    def read(place: tuple[int, ...], at: tuple[int, ...]) -> None:
        part = weights.read(path, (*at, *inner))
        if stored != FLOAT8:
            copy(array[(*place, ...)], part)
            return
        column_K, row_F = numbers(slice(1)), numbers(slice(1, None))
        scales_HG = weights.read(path + SCALES, at)
        row_F = row_F if len(scales_HG) == math.prod(shape[depth + 1 :]) else row_F // BLOCK
        dequantise(as_matrix(part), scales_HG, row_F, column_K // BLOCK, as_matrix(array[place]))

    _for_each(shape[:depth], index[:depth], read)
    return array


def _read_blocks(weights: Weights, path: str, leaf: Fp8Matrix, index: tuple[slice, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of the layers and experts of an index, in `leaf`'s layout."""
    shape, stored = weights.shapes[path]
    stack = [len(range(n)[i]) for n, i in zip(shape, index)]
    matrix = math.prod(leaf.outputs), leaf.inputs
    values = np.zeros((*stack, *leaf.values.shape[-2:]), leaf.values.dtype)
    scales = np.empty((*stack, *leaf.scales.shape[-2:]), leaf.scales.dtype)
    if stored == FLOAT8 and (held := weights.shapes[path + SCALES][0][-2:]) != blocks_of(matrix):
        expected = f"{list(blocks_of(matrix))}, whole blocks of its own"
        raise InputError(f"{weights.directory}: {path} has scales {list(held)} a matrix, expected {expected}")

    def read(place: tuple[int, ...], at: tuple[int, ...]) -> None:
        w_FK = as_matrix(weights.read(path, at))
        if stored == FLOAT8:
            copy(values[place][: matrix[0], : matrix[1]], w_FK)
            scales[place] = weights.read(path + SCALES, at)
        else:
            quantise(w_FK, values[place], scales[place])

    _for_each(shape[: len(index)], index, read)
    return values, scales


def _for_each(shape: tuple[int, ...], index: tuple[slice, ...], read: Callable[[tuple[int, ...], tuple[int, ...]], None]) -> None:
    """Calls `read` with the place of each element of an index and with its number in the whole, several at a time."""
    numbers = [range(n)[i] for n, i in zip(shape, index)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(read, np.ndindex(*map(len, numbers)), itertools.product(*numbers)))


class PlainWeights:
    """Weights as if they were stored in `dtype`, all of them."""

    def __init__(self, weights: Weights, dtype: str) -> None:
        self.config, self.directory, self.dtype, self._weights = weights.config, weights.directory, dtype, weights
        names = [path for path in weights.shapes if not path.endswith(SCALES)]
        self.shapes = {path: (weights.shapes[path][0], np.dtype(dtype)) for path in names}

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        shape, dtype = self.shapes[path]
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        whole = tuple(i if isinstance(i, slice) else slice(range(n)[i], range(n)[i] + 1) for i, n in zip(index, shape))
        return read_as(dtype, self._weights, path, whole)[tuple(slice(None) if isinstance(i, slice) else 0 for i in index)]


def path_name(path: tuple[Any, ...]) -> str:
    """`moe.attn.w_dkv` of a leaf's key path in a module."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def stacked_axes(path: str) -> int:
    """The number of leading axes that stack: layers (1), layers and experts (2), or none (0)."""
    return 0 if "." not in path else 2 if ".experts." in path else 1


def main_dtype(shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    """The dtype of most elements, 8 bits counting as bfloat16."""
    sizes: dict[str, int] = {}
    for path, (shape, dtype) in shapes.items():
        if not path.endswith(SCALES):
            name = "bfloat16" if dtype == FLOAT8 else dtype.name
            sizes[name] = sizes.get(name, 0) + math.prod(shape)
    return max(sizes, key=sizes.__getitem__)


def member(directory: Path, name: str) -> Path:
    """The file `name` in `directory`. InputError if that leads elsewhere: a path, or a symbolic link out of the directory."""
    if not name.isprintable() or name != Path(name).name or "\\" in name or name in ("", ".."):
        raise InputError(f"{directory}: {name!r} is not a plain file name, expected a file in this directory")
    file = directory / name
    if file.resolve().parent != directory.resolve():
        advice = "copy the checkpoint with its links followed, `cp -rL`, or download it with --local-dir"
        raise InputError(f"{file}: a symbolic link to {file.resolve()}, outside the checkpoint; {advice}")
    return file


@contextlib.contextmanager
def new_directory(path: Path, room: int) -> Iterator[Path]:
    """Yields PATH.partial, to be filled with at most about `room` bytes; it becomes PATH if the block ends well, and goes if not."""
    if os.path.lexists(path):
        raise InputError(f"{path}: exists already, expected a new directory")
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"{path}: cannot make the directory {partial}, a file is in the way") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another conversion is writing it") from None
        for stale in list(partial.iterdir()):  # of a conversion that was killed
            if stale.is_dir() or not (stale.suffix in (".safetensors", ".json", ".jinja") or stale.name.startswith("LICENSE")):
                raise InputError(f"{stale}: not of an interrupted conversion; remove {partial} if it is not needed")
            stale.unlink()
        try:
            if (free := shutil.disk_usage(partial).free) < room:
                raise InputError(f"{path}: needs {room / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free")
            yield partial
            for file in (*partial.iterdir(), partial):
                _sync(file)
            partial.rename(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(path.parent)
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def refuse_mismatch(what: str, problems: Mapping[str, Iterable[str]]) -> None:
    """Raises one InputError that lists every kind of problem, if there is any: all names of each."""
    lists = [(kind, sorted(names)) for kind, names in problems.items()]
    parts = [f"{kind}: {', '.join(names)}" for kind, names in lists if names]
    if parts:
        raise InputError(f"{what}; " + "; ".join(parts))


def _describe(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    return {"dtype": dtype.name, "shape": list(shape)}
