"""Conversion between checkpoints: `python -m dsv2_jax.convert --input=CHECKPOINT --output=DIR --to=native|hf [--weights_dtype=fp8]`.

A checkpoint is a Hugging Face directory, a native one or a training run's. Without --weights_dtype every tensor keeps its bits,
there and back. A conversion holds one tensor at a time besides memory maps.
"""

import contextlib
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import rich.progress
from absl import flags

from dsv2_jax import cli
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.fp8 import FLOAT8, SCALES, blocks_of
from dsv2_jax.hugging_face import (
    CONFIG,
    FLOAT32,
    INDEX,
    PICKLES,
    SCALE_INV,
    HuggingFaceWeights,
    Part,
    QuantisedWeights,
    assemble,
    check_parameters,
    layout,
    quantisation,
    stored_dtype,
)
from dsv2_jax.tensor_files import create_tensors, read_json
from dsv2_jax.weights import MANIFEST, NativeWeights, PlainWeights, Weights, member, new_directory, write_native

SIDE_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "LICENSE*")
SHARD_BYTES = 5_000_000_000
WEIGHTS_DTYPES = ("fp8", "bfloat16", "float32")


def open_checkpoint(path: Path | str) -> Weights:
    """Opens a Hugging Face directory, a native directory or a training run's (its latest step); tells which by what lies there."""
    directory = Path(path)
    if (directory / MANIFEST).exists():
        return NativeWeights(directory)
    if (directory / "checkpoints").is_dir():
        from dsv2_jax.checkpoint import WorkdirWeights  # Orbax takes a second to import

        return WorkdirWeights(directory)
    if directory.is_dir() and any(f.name == CONFIG or f.suffix in PICKLES | {".safetensors"} for f in directory.iterdir()):
        return HuggingFaceWeights(directory)
    kinds = f"{CONFIG} and safetensors (Hugging Face), {MANIFEST} (native) or checkpoints/ (a training run)"
    raise InputError(
        f"{path}: {'not a checkpoint' if directory.is_dir() else 'no such directory'}, expected a directory with {kinds}"
    )


# -- writing


def write_hf(weights: Weights, directory: Path, advance: Callable[[int], None]) -> None:
    """Writes shards of about 5 GB, one tensor an expert, and their index into `directory`; `advance` is told the bytes."""
    tensors = layout(weights.config)
    check_parameters(weights, tensors)
    specs = {}
    for name, tensor in tensors.items():
        specs[name] = tensor.shape, stored_dtype(weights, name, tensor)
        if specs[name][1] == FLOAT8:
            specs[name + SCALE_INV] = blocks_of(tensor.shape), FLOAT32
    ends = list(itertools.accumulate(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()))
    shards = [
        list(names) for _, names in itertools.groupby(specs, key=dict(zip(specs, (end // SHARD_BYTES for end in ends))).get)
    ]
    weight_map = {}
    assembled = functools.lru_cache(1)(lambda name: assemble(weights, name, tensors[name]))  # a tensor, then its scales
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, shard)
        with create_tensors(directory / shard, {name: specs[name] for name in names}) as write:
            for name in names:
                tensor = name.removesuffix(SCALE_INV)
                write(name, assembled(tensor)[tensor != name])
                if tensor == name:
                    advance(_held(weights, tensors[name].parts))
    (directory / INDEX).write_text(_json({"metadata": {"total_size": ends[-1]}, "weight_map": weight_map}))


def _held(weights: Weights, parts: Iterable[Part]) -> int:
    """Bytes of parts and of their scales, as the weights hold them."""
    of = [(part, path) for part in parts for path in (part.path, part.path + SCALES) if path in weights.shapes]
    return sum(math.prod(weights.shapes[path][0][len(part.index) :]) * weights.shapes[path][1].itemsize for part, path in of)


def hf_config(weights: Weights) -> dict[str, Any]:
    """The config.json to write: the one beside the weights where there is one, without what no longer holds, else a new one."""
    try:
        hf = {"q_lora_rank": weights.config.q_lora_rank} | read_json(member(weights.directory, CONFIG))
        ours = "model_type" in hf and ModelConfig.from_hf(hf) == weights.config
    except InputError:  # none, or the config.json of something else
        ours = False
    hf = hf if ours else weights.config.to_hf(weights.dtype)
    kept = {key: value for key, value in hf.items() if key not in ("quantization_config", "auto_map")}
    kept |= {"dtype" if "dtype" in kept else "torch_dtype": weights.dtype}
    if any(dtype == FLOAT8 for _, dtype in weights.shapes.values()):
        came = None if isinstance(weights, QuantisedWeights) else hf.get("quantization_config")
        kept["quantization_config"] = came or quantisation(weights)
    return kept


def convert(source: Path | str, target: Path | str, to: str, weights_dtype: str | None = None) -> None:
    """Writes the checkpoint `source` to the new directory `target`, `to` "native" or "hf", whole or not at all.

    Args:
        weights_dtype: None keeps every tensor's; "fp8" quantises the layers' linears; another is that of all tensors.

    Raises:
        InputError: `source` is no valid checkpoint, `target` exists, or the disk has too little room.
        OSError: the disk filled up meanwhile.
    """
    weights, target, start = open_checkpoint(source), Path(os.path.abspath(target)), time.monotonic()
    if weights_dtype == "fp8":
        weights = QuantisedWeights(weights)
    elif weights_dtype:
        weights = PlainWeights(weights, weights_dtype)
    elif mixed := getattr(weights, "mixed", None):
        advice = f"expected one dtype in a stack; --weights_dtype={'|'.join(WEIGHTS_DTYPES)} makes it one"
        raise InputError(f"{source}: {mixed} is {FLOAT8} and the same tensor of another layer or expert is not, {advice}")
    total = sum(math.prod(shape) * dtype.itemsize for shape, dtype in weights.shapes.values())
    with new_directory(target, total) as directory:
        (directory / CONFIG).write_text(_json(hf_config(weights)))
        for file in {file for pattern in SIDE_FILES for file in weights.directory.glob(pattern)}:
            if file.is_file() and file.suffix != ".py":
                shutil.copyfile(member(weights.directory, file.name), directory / file.name)
        with _progress(total) as advance:
            (write_native if to == "native" else write_hf)(weights, directory, advance)
    seconds = time.monotonic() - start
    print(f"{target}: {_size(total)} in {seconds:.1f} s, {_size(total / seconds)}/s")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every tenth elsewhere. Yields what is to be told the bytes done."""
    if sys.stdout.isatty():
        columns = rich.progress.BarColumn(), rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn()
        with rich.progress.Progress(*columns, rich.progress.TimeRemainingColumn()) as bar:
            task = bar.add_task("convert", total=total)
            yield lambda size: bar.advance(task, size)
        return
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        if done * 10 // total > (done - size) * 10 // total:
            print(f"convert: {done * 100 // total}% of {_size(total)}", flush=True)

    yield advance


if __name__ == "__main__":
    INPUT = flags.DEFINE_string(
        "input", None, "Checkpoint: a Hugging Face or native directory, or a training run's.", required=True
    )
    OUTPUT = flags.DEFINE_string("output", None, "Directory to write; must not exist.", required=True)
    TO = flags.DEFINE_enum("to", None, ["native", "hf"], "Format to write.", required=True)
    WEIGHTS_DTYPE = flags.DEFINE_enum("weights_dtype", None, WEIGHTS_DTYPES, "Of the output; each tensor's own if not given.")
    cli.run(lambda: convert(INPUT.value, OUTPUT.value, TO.value, WEIGHTS_DTYPE.value))
