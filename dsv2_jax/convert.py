"""Conversion between Hugging Face and native checkpoints: `python -m dsv2_jax.convert --input=CHECKPOINT --output=DIR --to=native|hf`.

The only file that knows Hugging Face names and layouts; `TABLE` drives both directions. A linear lies there as [out, in], here
as [in, out] with heads apart; rotary dimensions keep the checkpoint's interleaved order. Reading and writing use the same
views of a tensor, and a conversion holds one tensor at a time besides memory maps.
Letters: V vocabulary, D model, N heads, H and R no-position and rotary part of a head's key, Vd of its value, Q and C compressed
query and key-value, E routed experts, and the hidden sizes I of a dense layer, F of an expert, S of all shared experts together.
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.progress
from absl import flags

from dsv2_jax import cli
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.tensor_files import DTYPES, copy, create_tensors, read_json, read_tensors
from dsv2_jax.weights import (
    MANIFEST,
    NativeWeights,
    Weights,
    main_dtype,
    member,
    new_directory,
    refuse_mismatch,
    stacked_axes,
    write_native,
)

# Ours (the paper's names; * is dense and moe), our axes ("in -> out" of a linear), the tensor in a Hugging Face checkpoint (under
# model.layers.{layer}. for a layer's), and its name where transformers 5 stacked a layer's experts: [E, out, in].
# Rows of one tensor share it: they are consecutive parts of our last axis, for each head.
TABLE = """
embed                   V D           model.embed_tokens.weight
final_norm              D             model.norm.weight
w_head                  D -> V        lm_head.weight
*.attn_norm             D             input_layernorm.weight
*.attn.w_q              D -> N H+R    self_attn.q_proj.weight
*.attn.w_dq             D -> Q        self_attn.q_a_proj.weight
*.attn.q_norm           Q             self_attn.q_a_layernorm.weight
*.attn.w_uq             Q -> N H+R    self_attn.q_b_proj.weight
*.attn.w_dkv            D -> C        self_attn.kv_a_proj_with_mqa.weight
*.attn.w_kr             D -> R        self_attn.kv_a_proj_with_mqa.weight
*.attn.kv_norm          C             self_attn.kv_a_layernorm.weight
*.attn.w_uk             C -> N H      self_attn.kv_b_proj.weight
*.attn.w_uv             C -> N Vd     self_attn.kv_b_proj.weight
*.attn.w_o              N Vd -> D     self_attn.o_proj.weight
*.ffn_norm              D             post_attention_layernorm.weight
dense.ffn.w_gate        D -> I        mlp.gate_proj.weight
dense.ffn.w_up          D -> I        mlp.up_proj.weight
dense.ffn.w_down        I -> D        mlp.down_proj.weight
moe.ffn.w_router        D -> E        mlp.gate.weight
moe.ffn.experts.w_gate  D -> F        mlp.experts.{expert}.gate_proj.weight  mlp.experts.gate_up_proj
moe.ffn.experts.w_up    D -> F        mlp.experts.{expert}.up_proj.weight    mlp.experts.gate_up_proj
moe.ffn.experts.w_down  F -> D        mlp.experts.{expert}.down_proj.weight  mlp.experts.down_proj
moe.ffn.shared.w_gate   D -> S        mlp.shared_experts.gate_proj.weight
moe.ffn.shared.w_up     D -> S        mlp.shared_experts.up_proj.weight
moe.ffn.shared.w_down   S -> D        mlp.shared_experts.down_proj.weight
"""
ROWS = [re.split(r"  +", line) for line in TABLE.strip().splitlines()]

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SIDE_FILES = ("generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "LICENSE*")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
FLOAT8, BFLOAT16, FLOAT16, FLOAT32 = (DTYPES[code] for code in ("F8_E4M3", "BF16", "F16", "F32"))
SHARD_BYTES = 5_000_000_000
MAX_EXPERTS = 100_000  # over all layers; the 236B model has 9440


# -- the layout


class Part(NamedTuple):
    """The part of a Hugging Face tensor that is one of our parameters, at one layer and expert."""

    path: str
    linear: bool
    shape: tuple[int, ...]  # the whole tensor in our axes
    columns: slice  # the part in the last of them
    index: tuple[int, ...] = ()  # into our stack: (layer,), (layer, expert) or ()
    expert: int | None = None  # into a tensor that stacks a layer's experts

    def view(self, tensor: np.ndarray) -> np.ndarray:
        """The part as it is in our layout: a view of `tensor`, which is one expert's where experts are stacked."""
        return (tensor.T if self.linear else tensor).reshape(self.shape, copy=False)[..., self.columns]


class Tensor(NamedTuple):
    """A tensor of a Hugging Face checkpoint: its shape in the file, and what it holds."""

    shape: tuple[int, ...]
    parts: list[Part]


def layout(config: ModelConfig, stacked: Collection[int] = ()) -> dict[str, Tensor]:
    """All tensors of a Hugging Face checkpoint by name, layer by layer. `stacked`: layers whose experts are stacked."""
    experts = range(config.n_routed_experts or 0)
    if (count := config.num_hidden_layers * max(1, len(experts))) > MAX_EXPERTS:
        raise InputError(f"config.json: num_hidden_layers times n_routed_experts is {count}, expected at most {MAX_EXPERTS}")
    plain, stacking = _tensors(config, 2), _tensors(config, -1)
    tensors = {name: tensor for name, tensor in plain.items() if not stacked_axes(tensor.parts[0].path)}
    counts = {"dense": 0, "moe": 0}
    for layer in range(config.num_hidden_layers):
        kind = "moe" if config.is_moe(layer) else "dense"
        for name, (shape, parts) in (stacking if layer in stacked else plain).items():
            if parts[0].path.partition(".")[0] not in ("*", kind):
                continue
            name = f"model.layers.{layer}.{name}"
            parts = [part._replace(path=part.path.replace("*", kind), index=(counts[kind],)) for part in parts]
            if stacked_axes(parts[0].path) == 1:
                tensors[name] = Tensor(shape, parts)
            elif layer in stacked:
                parts = [part._replace(index=(*part.index, e), expert=e) for part in parts for e in experts]
                tensors[name] = Tensor((len(experts), *shape), parts)
            else:
                for e in experts:
                    tensors[name.format(expert=e)] = Tensor(shape, [part._replace(index=(*part.index, e)) for part in parts])
        counts[kind] += 1
    return tensors


def _tensors(config: ModelConfig, column: int) -> dict[str, Tensor]:
    """The table's tensors for the sizes of `config`, under the names of `column`."""
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "H": config.qk_nope_head_dim,
        "R": config.qk_rope_head_dim,
        "H+R": config.qk_head_dim,
        "Vd": config.v_head_dim,
        "Q": config.q_lora_rank,
        "C": config.kv_lora_rank,
        "E": config.n_routed_experts,
        "I": config.intermediate_size,
        "F": config.moe_intermediate_size,
        "S": config.n_shared_experts and config.n_shared_experts * config.moe_intermediate_size,
    }
    tensors = {}
    for name, rows in itertools.groupby(ROWS, key=lambda row: row[column]):
        axes = {path: [[sizes[a] for a in side.split()] for side in text.split(" -> ")] for path, text, *_ in rows}
        first, *_ = axes
        if any(None in side for side in axes[first]) or (first == "*.attn.w_q" and config.q_lora_rank):
            continue  # this model has no such tensor
        linear = len(axes[first]) == 2
        widths = [sides[-1][-1] for sides in axes.values()]
        *outer, _ = itertools.chain(*axes[first])
        shape = (*outer, sum(widths))
        stops = list(itertools.accumulate(widths))
        parts = [Part(path, linear, shape, slice(stop - width, stop)) for path, width, stop in zip(axes, widths, stops)]
        inputs = math.prod(axes[first][0])
        tensors[name] = Tensor((math.prod(shape) // inputs, inputs) if linear else shape, parts)
    return tensors


def parameter_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Our parameters that a layout holds: path -> shape, layers and experts stacked."""
    shapes = {}
    for tensor in tensors.values():
        for part in tensor.parts:  # indices rise: the last one tells the size of the stack
            width = part.columns.stop - part.columns.start
            shapes[part.path] = (*(i + 1 for i in part.index), *part.shape[:-1], width)
    return shapes


# -- reading


class HuggingFaceWeights:
    """A Hugging Face directory as `Weights`; a read touches only the tensors it needs.

    float8 blocks are dequantised to bfloat16. A stack of mixed dtypes is widened to float32, and `hf_dtypes` keeps those of the
    tensors that are narrower. Code (`auto_map`) is never run.
    """

    def __init__(self, directory: Path) -> None:
        """Raises: InputError, if a tensor is missing, unexpected or of the wrong shape or dtype (all are listed), or for a
        damaged file, a configuration that is not DeepSeek-V2's, a file outside the directory, pickles."""
        self.directory = Path(directory)
        hf = read_json(member(self.directory, CONFIG))
        self._tensors = _open_shards(self.directory)
        rank = self._tensors.get("model.layers.0.self_attn.q_a_layernorm.weight")
        if "q_lora_rank" not in hf and rank is not None:
            hf["q_lora_rank"] = rank.size
        self.config = ModelConfig.from_hf(hf)
        self._block = _float8_block(hf)
        stacked = {
            int(found[1])
            for name in self._tensors
            if (found := re.fullmatch(r"model\.layers\.(\d{1,9})\.mlp\.experts\.\w+_proj", name))
        }
        tensors = layout(self.config, stacked)
        self._check(tensors)
        self._places = {(part.path, part.index): (name, part) for name, tensor in tensors.items() for part in tensor.parts}
        own: dict[str, set[np.dtype]] = {}
        for (path, _), (name, _) in self._places.items():
            own.setdefault(path, set()).add(self._dtype(name))
        self.shapes = {
            p: (shape, next(iter(own[p])) if len(own[p]) == 1 else FLOAT32) for p, shape in parameter_shapes(tensors).items()
        }
        self.dtype = main_dtype(self.shapes)
        self.hf_dtypes = {}
        for name, tensor in layout(self.config).items():
            part = tensor.parts[0]
            dtype = self._dtype(self._places[part.path, part.index][0])
            if dtype != self.shapes[part.path][1]:
                self.hf_dtypes[name] = dtype.name

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        shape, dtype = self.shapes[path]
        depth = stacked_axes(path)
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        inner = index[depth:]
        rows = [np.arange(n)[i] for n, i in zip(shape, index[:depth])]
        if all(row.ndim == 0 for row in rows):
            return self._piece(path, tuple(map(int, rows)))[inner]
        array = np.empty((*(row.size for row in rows), *np.broadcast_to(0, shape[depth:])[inner].shape), dtype)
        for at in np.ndindex(array.shape[:depth]):
            copy(array[(*at, ...)], self._piece(path, tuple(int(row.flat[i]) for row, i in zip(rows, at)))[inner])
        return array[tuple(slice(None) if row.ndim else 0 for row in rows)]

    def _piece(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        name, part = self._places[path, index]
        tensor, scale = self._tensors[name], self._tensors.get(f"{name}_scale_inv")
        if part.expert is not None:
            tensor, scale = tensor[part.expert], None if scale is None else scale[part.expert]
        if scale is not None:
            tensor = _dequantise(tensor, scale, self._block)
        return part.view(_recast(tensor, self.shapes[path][1]))

    def _dtype(self, name: str) -> np.dtype:
        dtype = self._tensors[name].dtype
        return BFLOAT16 if dtype == FLOAT8 else dtype

    def _check(self, tensors: Mapping[str, Tensor]) -> None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        dtypes = dict.fromkeys(shapes, (BFLOAT16, FLOAT16, FLOAT32))
        for name in tensors:
            shape = shapes[name]
            if self._block and len(shape) >= 2 and name in self._tensors and self._tensors[name].dtype == FLOAT8:
                shapes[f"{name}_scale_inv"] = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], self._block)))
                dtypes[name], dtypes[f"{name}_scale_inv"] = (FLOAT8,), (FLOAT32,)
        held = {name: tensor for name, tensor in self._tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
        both = shapes.keys() & held.keys()
        refuse_mismatch(
            f"{self.directory}: the tensors are not those of its config.json",
            {
                "missing": shapes.keys() - held.keys(),
                "unexpected": held.keys() - shapes.keys(),
                "wrong shape": [
                    f"{name} is {list(held[name].shape)}, expected {list(shapes[name])}"
                    for name in both
                    if held[name].shape != shapes[name]
                ],
                "wrong dtype": [
                    f"{name} is {held[name].dtype}, expected {' or '.join(dtype.name for dtype in dtypes[name])}"
                    for name in both
                    if held[name].dtype not in dtypes[name]
                ],
            },
        )


def _open_shards(directory: Path) -> dict[str, np.ndarray]:
    """All tensors by name, wherever they lie, as views of memory maps."""
    files = {file.name for file in directory.iterdir()}
    if INDEX in files:
        weight_map = read_json(member(directory, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise InputError(f"{directory / INDEX}: expected weight_map, an object of tensor name to file name")
        shards = sorted(set(weight_map.values()))
    elif SINGLE in files:
        weight_map, shards = None, [SINGLE]
    elif pickles := sorted(name for name in files if Path(name).suffix in PICKLES):
        advice = "pickle files can run code and are never read; save the model as safetensors, e.g. save_pretrained(DIR)"
        raise InputError(f"{directory / pickles[0]}: {advice}")
    else:
        raise InputError(f"{directory}: no {INDEX} and no {SINGLE}, expected one of them")
    for shard in shards:
        if not member(directory, shard).name.endswith(".safetensors"):
            raise InputError(f"{directory / INDEX}: weight_map names {shard!r}, expected safetensors files")
    unlisted = {name for name in files if name.startswith("model") and name.endswith(".safetensors")}.difference(shards)
    refuse_mismatch(f"{directory}: the shards are not those of {INDEX}", {"missing": set(shards) - files, "unexpected": unlisted})
    tensors: dict[str, np.ndarray] = {}
    strays = []
    for shard in shards:
        for name, tensor in read_tensors(member(directory, shard)).items():
            if weight_map is not None and weight_map.get(name) != shard:
                strays.append(f"{name} in {shard}")
            else:
                tensors[name] = tensor
    lost = [f"{name} in {weight_map[name]}" for name in (weight_map or {}).keys() - tensors.keys()]
    refuse_mismatch(f"{directory}: the shards do not hold what {INDEX} says", {"missing": lost, "unexpected": strays})
    return tensors


def _float8_block(hf: Mapping[str, Any]) -> tuple[int, int] | None:
    quantization = hf.get("quantization_config")
    if quantization is None:
        return None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != "fp8":
        raise InputError(f"config.json: quantization_config.quant_method is {method!r}, expected 'fp8' or no quantization_config")
    block = quantization.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n >= 1 for n in block):
        raise InputError(f"config.json: quantization_config.weight_block_size is {block!r}, expected two integers, as [128, 128]")
    return block[0], block[1]


def _dequantise(tensor: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """bfloat16 of float8 [out, in] times its float32 scales, one a block; the last block of a row or column may be partial."""
    result = np.empty(tensor.shape, BFLOAT16)
    for i, scale_row in enumerate(scale):
        strip = slice(i * block[0], (i + 1) * block[0])
        result[strip] = tensor[strip].astype(np.float32) * np.repeat(scale_row, block[1])[: tensor.shape[1]]
    return result


def _recast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A widened array, or one narrowed to what it was before: exact, NaN payloads included."""
    if array.dtype == dtype:
        return array
    if (array.dtype, dtype) == (BFLOAT16, FLOAT32):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(FLOAT32)
    if (array.dtype, dtype) == (FLOAT32, BFLOAT16):
        return (array.view(np.uint32) >> 16).astype(np.uint16).view(BFLOAT16)
    with np.errstate(invalid="ignore"):
        return array.astype(dtype)


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
    shapes = {f"{path} {list(shape)}" for path, shape in parameter_shapes(tensors).items()}
    held = {f"{path} {list(shape)}" for path, (shape, _) in weights.shapes.items()}
    what = f"{weights.directory}: the parameters are not those of its configuration"
    refuse_mismatch(what, {"missing": shapes - held, "unexpected": held - shapes})
    own = getattr(weights, "hf_dtypes", {})  # only a converted checkpoint has them
    specs = {n: (t.shape, np.dtype(own.get(n, weights.shapes[t.parts[0].path][1]))) for n, t in tensors.items()}
    ends = list(itertools.accumulate(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()))
    shards = [
        list(names) for _, names in itertools.groupby(specs, key=dict(zip(specs, (end // SHARD_BYTES for end in ends))).get)
    ]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, shard)
        with create_tensors(directory / shard, {name: specs[name] for name in names}) as write:
            for name in names:
                array = np.empty(*specs[name])
                for part in tensors[name].parts:
                    source = weights.read(part.path, part.index)
                    copy(part.view(array), _recast(source, array.dtype))
                    advance(source.nbytes)
                write(name, array)
    (directory / INDEX).write_text(_json({"metadata": {"total_size": ends[-1]}, "weight_map": weight_map}))


def hf_config(weights: Weights) -> dict[str, Any]:
    """The config.json to write: the one beside the weights where there is one, without what no longer holds, else a new one."""
    try:
        hf = {"q_lora_rank": weights.config.q_lora_rank} | read_json(member(weights.directory, CONFIG))
        ours = "model_type" in hf and ModelConfig.from_hf(hf) == weights.config
    except InputError:  # none, or the config.json of something else
        ours = False
    if not ours:
        return weights.config.to_hf(weights.dtype)
    kept = {key: value for key, value in hf.items() if key not in ("quantization_config", "auto_map")}
    return kept | {"dtype" if "dtype" in kept else "torch_dtype": weights.dtype}


def convert(source: Path | str, target: Path | str, to: str) -> None:
    """Writes the checkpoint `source` to the new directory `target`, `to` "native" or "hf", whole or not at all.

    Raises:
        InputError: `source` is no valid checkpoint, `target` exists, or the disk has too little room.
        OSError: the disk filled up meanwhile.
    """
    weights, target, start = open_checkpoint(source), Path(os.path.abspath(target)), time.monotonic()
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
    cli.run(lambda: convert(INPUT.value, OUTPUT.value, TO.value))
