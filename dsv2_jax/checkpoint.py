"""Training checkpoints: DIR/checkpoints/<step>/, written in the background by Orbax, complete or not there at all.

A step holds three items, committed by one rename: `state` (every array of the TrainState, by dotted name), `data` (the place in
the data) and `config` (the resolved configuration). Parameters are stored in chunks of one layer, or of one layer's expert, so
that `WorkdirWeights` reads them as slices and never holds the model.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.train_state import TrainState, arrays
from dsv2_jax.weights import stacked_axes

PARAMS = "params."  # how the names of parameters begin among the arrays of a state


def latest_step(workdir: Path) -> int | None:
    """The newest complete step, or None. What an interrupted writer left has another name and does not count."""
    return max(ocp.path.step.checkpoint_steps(workdir / "checkpoints"), default=None)


def read_config(workdir: Path, step: int) -> dict[str, Any]:
    """The resolved configuration a step was trained with: {"model": ..., "train": ...}. InputError if it cannot be read."""
    directory = workdir / "checkpoints" / str(step)
    with _readable(directory):
        return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore((directory / "config").absolute())


@contextlib.contextmanager
def _readable(directory: Path) -> Iterator[None]:
    """Tells what the storage library cannot read as an InputError that names the step."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError)):  # Orbax raises plain ones too
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise InputError(f"{directory}: not a checkpoint of train.py, or a damaged one ({reason})") from error


class Checkpoints:
    """Writes and restores the steps of one run; keeps the newest `keep` of them."""

    def __init__(self, workdir: Path, config: Mapping[str, Any], keep: int):
        self._config = dict(config)
        self._directory = workdir / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

    def save(self, state: TrainState, data: Mapping[str, Any]) -> None:
        """Copies the state to the host and returns; the files are written in the background, after those of an earlier save."""
        tensors = arrays(state)
        _require_space(self._directory, sum(tensor.nbytes for tensor in tensors.values()))
        chunks = {name: ocp.SaveArgs(shard_axes=_stacked(name)) for name in tensors}
        with self._os_errors():
            self._manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tensors, save_args=chunks),
                    data=ocp.args.JsonSave(data),
                    config=ocp.args.JsonSave(self._config),
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

        Raises: InputError, if it cannot be read.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(arrays(abstract)), data=ocp.args.JsonRestore())
        with _readable(self._directory / str(step)):
            restored = self._manager.restore(step, args=args)
        leaves = restored["state"]
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[name] for name in arrays(abstract)]), restored["data"]

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Raises an error of the operating system, such as a full disk, as what it is: the storage library hides it in its text."""
        try:
            yield
        except ValueError as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if not code:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(self._directory)) from error


def _require_space(directory: Path, size: int) -> None:
    """Refuses a save that may not fit, before anything is written; the oldest step goes only when the new one is complete."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise InputError(f"{directory}: no space left: a checkpoint needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")


def _stacked(name: str) -> tuple[int, ...]:
    """The axes along which an array is stored one by one: layers and experts, of parameters."""
    return tuple(range(stacked_axes(name.removeprefix(PARAMS)))) if name.startswith(PARAMS) else ()


class WorkdirWeights:
    """The parameters of a run's latest step as `dsv2_jax.weights.Weights`: read slice by slice, in the run's compute dtype."""

    def __init__(self, workdir: Path):
        """Raises: InputError, if there is no complete step, or it cannot be read."""
        step = latest_step(workdir)
        if step is None:
            raise InputError(f"{workdir}: no complete checkpoint in {workdir / 'checkpoints'}, expected one step at least")
        self.directory = workdir
        config = read_config(workdir, step)
        self.config = ModelConfig.from_hf(config["model"])
        self.dtype = config["train"]["dtype"]
        directory = workdir / "checkpoints" / str(step)
        with _readable(directory):
            self._arrays = _open_arrays(directory / "state")
        self.shapes = {path: (array.shape, np.dtype(self.dtype)) for path, array in self._arrays.items()}

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        with _readable(self.directory):
            return self._arrays[path][index].read().result().astype(self.dtype)


def _open_arrays(directory: Path) -> dict[str, tensorstore.TensorStore]:
    """The parameters in a step's `state`, by path; nothing is read but their metadata."""
    context = tensorstore.Context()
    store = {"driver": "ocdbt", "base": f"file://{directory.absolute()}/"}
    keys = tensorstore.KvStore.open(store, context=context).result().list().result()
    suffix = "/.zarray"
    names = [key.removesuffix(suffix) for key in map(bytes.decode, keys) if key.startswith(PARAMS) and key.endswith(suffix)]
    specs = {name.removeprefix(PARAMS): {"driver": "zarr", "kvstore": store | {"path": f"{name}/"}} for name in names}
    opening = {path: tensorstore.open(spec, context=context, open=True) for path, spec in specs.items()}
    return {path: array.result() for path, array in opening.items()}
