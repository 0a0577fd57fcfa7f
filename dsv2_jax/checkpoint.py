"""Training checkpoints: DIR/checkpoints/<step>/, written in the background by Orbax, complete or not there at all.

A step holds four items, committed by one rename: `state` (every array of the TrainState, by dotted name), `data` (the place in
the data), `config` (the resolved configuration) and `manifest`, which says what the others are: shape, dtype and checksums of
every array, digests of `data` and `config`, and a digest of itself. What is read is what was saved, or an InputError.

Layers and experts, of parameters and of what the optimizer holds for them, are stored one by one and each has its checksum: a
chunk. `WorkdirWeights` reads parameters as chunks and never holds the model. The checksum of a chunk is computed where the chunk
lies, on devices or on the host, and is the same however it is split.

`python -m dsv2_jax.checkpoint verify DIR` reads all steps of a run and says which are good; it needs no accelerator.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from dsv2_jax import cli
from dsv2_jax.checksum import checksums, chunk_checksum
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.tensor_files import read_json
from dsv2_jax.train_state import TrainState, arrays
from dsv2_jax.weights import refuse_mismatch, stacked_axes

FORMAT = 2  # of the manifest
PARAMS = "params."  # how the names of parameters begin among the arrays of a state


def _stacked(names: Mapping[str, Any]) -> dict[str, int]:
    """How many axes of each array number its chunks: layers and experts, of a parameter and of what bears its name."""
    paths = [name.removeprefix(PARAMS) for name in names if name.startswith(PARAMS)]
    return {name: max((stacked_axes(path) for path in paths if name.endswith(f".{path}")), default=0) for name in names}


# -- manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _make_manifest(step: int, tensors: Mapping[str, jax.Array], items: Mapping[str, Any]) -> dict[str, Any]:
    stacked = _stacked(tensors)
    manifest = {
        "format": FORMAT,
        "step": step,
        "items": {name: _digest(json.loads(json.dumps(item))) for name, item in items.items()},
        "arrays": {
            name: {
                "shape": list(tensor.shape),
                "dtype": tensor.dtype.name,
                "stacked": stacked[name],
                "checksums": checksums(tensor, stacked[name]).astype(">u4").tobytes().hex(),
            }
            for name, tensor in tensors.items()
        },
    }
    return manifest | {"digest": _digest(manifest)}


def _read_manifest(directory: Path) -> dict[str, Any]:
    """Refuses checkpoints of versions that wrote no manifest."""
    file = directory / "manifest" / "metadata"
    with _readable(directory):
        if not file.is_file():
            raise InputError(f"{directory}: not a checkpoint of this version of train.py, or a damaged one: there is no {file}")
        manifest = read_json(file)
    if manifest.pop("digest", None) != _digest(manifest):
        raise InputError(f"{file}: damaged: its digest is not that of its content")
    if manifest["format"] != FORMAT:
        raise InputError(f"{file}: format is {manifest['format']!r}, this program reads {FORMAT}")
    if manifest["step"] != int(directory.name):
        raise InputError(f"{file}: of step {manifest['step']}, expected {directory.name}")
    return manifest


def _read_item(directory: Path, manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    file = directory / name / "metadata"
    with _readable(directory):
        item = read_json(file)
    if _digest(item) != manifest["items"][name]:
        raise InputError(f"{file}: damaged, or of another step: its digest is not the manifest's")
    return item


def _chunk_name(name: str, chunk: Iterable[int]) -> str:
    return ", ".join([name, *(f"{axis} {i}" for axis, i in zip(("layer", "expert"), chunk))])


def _describe(name: str, shape: Iterable[int], dtype: Any) -> str:
    return f"{name} {np.dtype(dtype).name}{list(shape)}"


@contextlib.contextmanager
def _readable(what: Path | str) -> Iterator[None]:
    """Tells what cannot be read as an InputError that names `what`; the libraries below raise errors of every type."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).partition(" [tensorstore_spec")[0]
        raise InputError(f"{what}: cannot be read: {reason or type(error).__name__}") from error


# -- steps


def _steps(workdir: Path) -> list[int]:
    """All complete steps, newest first."""
    directory = workdir / "checkpoints"
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted((int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir()), reverse=True)


def latest_step(workdir: Path) -> int | None:
    """The newest complete step, or None. What an interrupted writer left has another name and does not count."""
    return next(iter(_steps(workdir)), None)


def read_config(workdir: Path, step: int) -> dict[str, Any]:
    """The resolved configuration a step was trained with: {"model": ..., "train": ...}. InputError if it cannot be read."""
    directory = workdir / "checkpoints" / str(step)
    return _read_item(directory, _read_manifest(directory), "config")


class Checkpoints:
    """Writes and restores the steps of one run; keeps the newest `keep` of them."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], keep: int):
        self._config = dict(config)
        self._workdir, self._directory = workdir, workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Copies the state to the host and returns; the files are written in the background, after those of an earlier save.

        Raises: InputError, if there is no room for it, or a step that is not older; OSError, if an earlier save failed.
        """
        tensors = arrays(state)
        _require_space(self._directory, sum(tensor.nbytes for tensor in tensors.values()))
        step, newest = int(tensors["step"]), latest_step(self._workdir)
        if newest is not None and newest >= step:  # Orbax would save nothing and say nothing
            raise InputError(f"{self._directory}: holds step {newest}, so step {step} cannot be saved")
        chunks = {name: ocp.SaveArgs(shard_axes=tuple(range(axes))) for name, axes in _stacked(tensors).items()}
        items = {"data": data, "config": self._config}
        manifest = _make_manifest(step, tensors, items)
        with self._os_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tensors, save_args=chunks),
                    manifest=ocp.args.JsonSave(manifest),
                    **{name: ocp.args.JsonSave(item) for name, item in items.items()},
                ),
            )

    def check(self) -> None:
        """Raises what went wrong in the background since the last save; does not wait."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete, or raises why it is not."""
        with self._os_errors():
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, placed as `abstract` says whatever mesh wrote it, and the place in the data.

        Raises: InputError, if it cannot be read, is not what was saved, or is not a state like `abstract`.
        """
        directory, fault = self._directory / str(step), None
        wanted = arrays(abstract)
        try:
            saved = _Arrays(directory)
            data = _read_item(directory, saved.manifest, "data")
            there = {_describe(name, store.shape, store.dtype.numpy_dtype) for name, store in saved.stores.items()}
            here = {_describe(name, leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
            refuse_mismatch(f"{directory}: not a state of this run", {"missing": here - there, "unexpected": there - here})
            state = {name: saved.place(name, leaf.sharding) for name, leaf in wanted.items()}
        except InputError as error:
            fault = error
        if _anywhere(fault is not None):
            raise fault or InputError(f"{directory}: another process could not read its part")
        sums = {name: checksums(state[name], expected.ndim - 1) for name, expected in saved.checksums.items()}
        differ = {name: (sums[name] != expected).any(axis=-1) for name, expected in saved.checksums.items()}
        wrong = [_chunk_name(name, chunk) for name, chunks in differ.items() for chunk in np.argwhere(chunks)]
        if wrong:
            count = f"{len(wrong)} of {sum(chunks.size for chunks in differ.values())} chunks are not"
            raise InputError(f"{directory}: damaged: {wrong[0]} is not what was saved; {count}")
        return jax.tree.unflatten(jax.tree.structure(abstract), state.values()), data

    def move_aside(self, after: int) -> list[Path]:
        """Renames steps newer than `after` to <step>.damaged, so that the run can go on from there. Returns their new paths."""
        moved = []
        if jax.process_index() == 0:
            for step in _steps(self._workdir):
                if step > after:
                    place = self._directory / f"{step}.damaged"
                    while place.exists():
                        place = place.with_name(f"{place.name}.damaged")
                    moved.append((self._directory / str(step)).rename(place))
        multihost_utils.sync_global_devices("damaged steps are out of the way")
        self._manager.reload()
        return moved

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Raises an error of the operating system, such as a full disk, as what it is: the storage library hides it in its text."""
        try:
            yield
        except (OSError, ValueError) as error:
            told = re.search(r"os_error_code='(\d+)'", str(error))
            code = int(told[1]) if told else getattr(error, "errno", None)
            if code is None or getattr(error, "filename", None):
                raise
            raise OSError(code, os.strerror(code), str(self._directory)) from error


def _anywhere(holds: bool) -> bool:
    """Whether it holds in any process; all must ask."""
    return bool(np.any(multihost_utils.process_allgather(np.bool_(holds))))


def _require_space(directory: Path, size: int) -> None:
    """Refuses a save that may not fit, before anything is written; the oldest step goes only when the new one is complete."""
    free = shutil.disk_usage(directory).free
    if _anywhere(free < size):  # all processes go on, or none
        raise InputError(f"{directory}: no space left: a checkpoint needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


# -- reading without a device


class _Arrays:
    """The arrays of a step whose names begin with `prefix`, read chunk by chunk; opening reads the manifest and their metadata."""

    def __init__(self, directory: Path, prefix: str = ""):
        self.directory = directory
        self.manifest = _read_manifest(directory)
        stated = {name: array for name, array in self.manifest["arrays"].items() if name.startswith(prefix)}
        context = tensorstore.Context()
        store = {"driver": "ocdbt", "base": f"file://{(directory / 'state').absolute()}/"}
        specs = {name: {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}} for name in stated}
        opening = {name: tensorstore.open(spec, context=context, open=True) for name, spec in specs.items()}
        self.stores: dict[str, tensorstore.TensorStore] = {}
        self.checksums: dict[str, np.ndarray] = {}  # as the function `checksums` gives them
        for name, array in stated.items():
            with _readable(f"{directory}: {name}"):
                self.stores[name] = opening[name].result()
            held, said = self.stores[name], _describe(name, array["shape"], array["dtype"])
            if (found := _describe(name, held.shape, held.dtype.numpy_dtype)) != said:
                raise InputError(f"{directory}: damaged: holds {found}, the manifest says {said}")
            sums = np.frombuffer(bytes.fromhex(array["checksums"]), ">u4").astype(np.uint32)
            self.checksums[name] = sums.reshape(*array["shape"][: array["stacked"]], 2)

    def read(self, name: str, chunk: tuple[int, ...]) -> np.ndarray:
        """One chunk. InputError if it is not what was saved."""
        with _readable(f"{self.directory}: {_chunk_name(name, chunk)}"):
            array = self.stores[name][chunk].read().result()
        if (chunk_checksum(array) != self.checksums[name][chunk]).any():
            raise InputError(f"{self.directory}: damaged: {_chunk_name(name, chunk)} is not what was saved")
        return array

    def place(self, name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        """All of an array on devices, unchecked; each process reads what lies on its own."""
        store = self.stores[name]
        parts = {index: store[index].read() for index in sharding.addressable_devices_indices_map(store.shape).values()}
        with _readable(f"{self.directory}: {name}"):
            return jax.make_array_from_callback(store.shape, sharding, lambda index: parts[index].result())


class WorkdirWeights:
    """The parameters of a run's latest step as `dsv2_jax.weights.Weights`: read slice by slice, in the run's compute dtype."""

    def __init__(self, workdir: Path):
        """Raises: InputError, if there is no complete step, or it cannot be read."""
        step = latest_step(workdir)
        if step is None:
            raise InputError(f"{workdir}: no complete checkpoint in {workdir / 'checkpoints'}, expected one step at least")
        self.directory = workdir
        self._arrays = _Arrays(workdir / "checkpoints" / str(step), PARAMS)
        config = _read_item(self._arrays.directory, self._arrays.manifest, "config")
        self.config = ModelConfig.from_hf(config["model"])
        self.dtype = config["train"]["dtype"]
        stores = self._arrays.stores.items()
        self.shapes = {name.removeprefix(PARAMS): (store.shape, np.dtype(self.dtype)) for name, store in stores}

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """As in `Weights`; chunks are read whole, and are what was saved, or an InputError names the one that is not."""
        name = PARAMS + path
        (*chunks, _), shape = self._arrays.checksums[name].shape, self._arrays.stores[name].shape
        inner = index[len(chunks) :]
        numbers = np.arange(math.prod(chunks)).reshape(chunks)[index[: len(chunks)]]
        array = np.empty(np.broadcast_to(0, shape)[index].shape, self.dtype)
        rows = array.reshape(numbers.size, *array.shape[numbers.ndim :])

        def read(row: int, number: int) -> None:
            rows[row, ...] = self._arrays.read(name, np.unravel_index(number, chunks))[inner]

        with ThreadPoolExecutor() as pool:
            list(pool.map(read, range(numbers.size), numbers.flat))
        return array


# -- verifying


def verify(workdir: Path, step: int, part: int = 0, parts: int = 1) -> str:
    """Reads a step chunk by chunk, or one part of it of many, and says what it is. InputError if it is not what was saved."""
    saved = _Arrays(workdir / "checkpoints" / str(step))
    for name in saved.manifest["items"]:
        _read_item(saved.directory, saved.manifest, name)
    chunks = [(name, chunk) for name, sums in saved.checksums.items() for chunk in np.ndindex(sums.shape[:-1])][part::parts]

    def fault(place: tuple[str, tuple[int, ...]]) -> str | None:
        try:
            saved.read(*place)
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        faults = [text for text in pool.map(fault, chunks) if text]
    if faults:
        raise InputError(f"{faults[0]}; {len(faults)} of {len(chunks)} chunks are damaged")
    size = sum(store.size * store.dtype.numpy_dtype.itemsize for store in saved.stores.values())
    return f"{len(saved.stores)} arrays, {size / 1e9:.2f} GB, good"


def newest_good_step(workdir: Path) -> int | None:
    """The newest step that is what was saved, or None where there is no step. Each process reads its part; all return the same.

    Raises:
        InputError: there are steps, and none is good.
    """
    for step in _steps(workdir):
        try:
            damaged = not verify(workdir, step, jax.process_index(), jax.process_count())
        except InputError:
            damaged = True
        if not _anywhere(damaged):
            return step
    if _steps(workdir):
        raise InputError(f"{workdir}: all checkpoints are damaged; `python -m dsv2_jax.checkpoint verify {workdir}` says how")
    return None


def main(command: str, workdir: str) -> None:
    """Prints a line a step, newest first. InputError if one is damaged, or there is none."""
    if command != "verify":
        raise InputError(f"unknown command {command!r}, expected verify")
    steps, damaged = _steps(Path(workdir)), []
    for step in steps:
        try:
            told = verify(Path(workdir), step)
        except InputError as error:
            told = str(error)
            damaged.append(step)
        print(f"step {step}: {told}", flush=True)
    if not steps:
        raise InputError(f"{workdir}: no complete checkpoint in {Path(workdir) / 'checkpoints'}, expected one step at least")
    if damaged:
        newest = next((step for step in steps if step not in damaged), "none")
        raise InputError(f"{workdir}: damaged: step {', '.join(map(str, damaged))}; the newest good step: {newest}")


if __name__ == "__main__":
    cli.run(main, ["verify", "DIR"])
