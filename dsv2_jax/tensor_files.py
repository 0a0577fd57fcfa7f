"""Safetensors files: a strict reader of memory maps, a writer, and the fast copy between them.

A file is the length of its header (8 bytes, little-endian), the header (a JSON object: name -> dtype, shape, data_offsets),
then the data. We read it ourselves because the `safetensors` library cannot give float8 to numpy and accepts what it should
not (duplicate names). What this reader accepts, the library accepts too (tests/test_tensor_files.py).
"""

import contextlib
import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from dsv2_jax.fields import InputError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 16_000_000  # bytes; all names of the 236B model take 5 MB
MAX_JSON = 100_000_000
STRIP = 2**21  # bytes; stays in the cache
BLOCK = 256


def strict_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`. InputError, naming `what`, for anything else, for a repeated key, for NaN and Infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            key.encode()  # half of a surrogate pair is no text
            if isinstance(value, str):
                value.encode()
        if len(pairs) != len(dict(pairs)):
            seen: set[str] = set()
            raise ValueError(f"key {next(k for k, _ in pairs if k in seen or seen.add(k))!r} stands twice")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not an accepted number")

    def integer(digits: str) -> int:
        return refuse(digits) if digits == "-0" else int(digits)  # the library takes it for a float

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse, parse_int=integer)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what}: a JSON {type(value).__name__}, expected an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, strictly read (`strict_json`). InputError if the file is missing or beyond 100 MB."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_JSON}")
    return strict_json(path.read_bytes(), str(path))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as read-only views of a memory map: nothing is read before it is used.

    Raises:
        InputError: the file is missing, or breaks a rule of the format; the message names the file and the tensor.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    if size < 8:
        raise InputError(f"{path}: {size} bytes, expected a safetensors file (truncated?)")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise InputError(f"{path}: header of {length} bytes, expected 2 to {min(size - 8, MAX_HEADER)} in a file of {size} bytes")
    if data[8:9] != b"{":
        raise InputError(f"{path}: the header does not start with '{{', not a safetensors file")
    header = strict_json(data[8 : 8 + length], f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ is not an object of strings")
    tensors = {name: _Entry(path, name, entry) for name, entry in header.items()}
    end = 0
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.end)):
        if entry.start != end:
            what = "overlaps the tensor before it" if entry.start < end else "leaves a hole before it"
            raise InputError(f"{path}: tensor {entry.name!r} starts at {entry.start}, which {what} (expected {end})")
        end = entry.end
    if 8 + length + end != size:
        raise InputError(f"{path}: {size} bytes, its header describes {8 + length + end} (truncated?)")
    return {name: np.ndarray(entry.shape, entry.dtype, data, 8 + length + entry.start) for name, entry in tensors.items()}


class _Entry:
    """One tensor's line of the header, checked by itself."""

    def __init__(self, path: Path, name: str, entry: Any) -> None:
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise InputError(f"{path}: tensor {name!r}: expected exactly dtype, shape and data_offsets")
        code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise InputError(f"{path}: tensor {name!r}: dtype is {code!r}, expected one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 1 <= n < 2**63 for n in shape):
            raise InputError(f"{path}: tensor {name!r}: shape is {str(shape)[:80]}, expected a list of integers >= 1")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n < 2**63 for n in offsets):
            raise InputError(f"{path}: tensor {name!r}: data_offsets is {str(offsets)[:80]}, expected two integers >= 0")
        self.name, self.dtype, self.shape, (self.start, self.end) = name, DTYPES[code], tuple(shape), offsets
        if math.prod(shape) * self.dtype.itemsize != self.end - self.start:
            bytes_ = math.prod(shape) * self.dtype.itemsize
            raise InputError(f"{path}: tensor {name!r}: {self.end - self.start} bytes, but {code} {shape} takes {bytes_}")


@contextlib.contextmanager
def create_tensors(path: Path, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[Callable[..., None]]:
    """Creates a safetensors file of the given shapes and dtypes; yields `write(name, array, index=())`: tensor[index] = array.

    `index` is into the leading axes. Arrays go through a small buffer, contiguous or not. (Writing through a memory map costs a
    page fault and a journal entry every 4 KB, and a full disk would end the process instead of raising OSError.)
    """
    order = sorted(specs, key=lambda name: -specs[name][1].itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists
    end = 0
    for name in order:
        shape, dtype = specs[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(name: str, array: np.ndarray, index: tuple[int, ...] = ()) -> None:
        shape, dtype = specs[name]
        if array.shape != shape[len(index) :] or array.dtype != dtype:
            raise ValueError(f"{name}{list(index)} is {dtype} {shape[len(index) :]}, not {array.dtype} {array.shape}")
        position = int(np.ravel_multi_index(index, shape[: len(index)])) if index else 0
        try:
            file.seek(8 + len(text) + header[name]["data_offsets"][0] + position * array.nbytes)
            array = np.atleast_1d(array)
            rows = max(1, STRIP * len(array) // array.nbytes)
            for i in range(0, len(array), rows):
                strip = buffer[: array[i : i + rows].nbytes].view(dtype).reshape(array[i : i + rows].shape)
                copy(strip, array[i : i + rows])
                file.write(strip.view(np.uint8))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    buffer = np.empty(STRIP, np.uint8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield write


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, bit for bit where the dtypes agree, and quick where one is a transposed view of the other.

    A transposition goes through a small padded buffer: both sides are then touched in runs of a few cache lines. numpy's own
    copy takes strides of 4096 bytes there, which all fall into the same cache sets (measured: 0.4 against 5 GB/s).
    """
    if target.dtype == source.dtype:
        bits = f"u{target.itemsize}"
        target, source = target.view(bits), source.view(bits)
    runs = [min(range(x.ndim), key=lambda axis: (x.strides[axis], -axis), default=0) for x in (source, target)]
    if runs[0] == runs[1]:
        target[...] = source
        return
    source, target = (np.moveaxis(x, runs, (-1, -2)) for x in (source, target))
    buffer = np.empty((BLOCK, BLOCK + 8), source.dtype)
    for lead in np.ndindex(target.shape[:-2]):
        for i in range(0, target.shape[-2], BLOCK):
            for j in range(0, target.shape[-1], BLOCK):
                block = source[lead][i : i + BLOCK, j : j + BLOCK]
                part = buffer[: block.shape[0], : block.shape[1]]
                part[...] = block
                target[lead][i : i + BLOCK, j : j + BLOCK] = part
