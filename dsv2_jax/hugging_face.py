"""Hugging Face checkpoints as `Weights`. The only file that knows their names and layouts; `TABLE` drives reading and writing.

A linear lies there as [out, in], here as [in, out] with heads apart; rotary dimensions keep the checkpoint's interleaved order.
Reading and writing use the same views of a tensor. A tensor of 8-bit floats has its scales beside it, one for each block of
128 x 128 (DeepSeek-V3's format); the parts of it that are ours have scales of their own, see fp8.py.
Letters: V vocabulary, D model, N heads, H and R no-position and rotary part of a head's key, Vd of its value, Q and C compressed
query and key-value, E routed experts, and the hidden sizes I of a dense layer, F of an expert, S of all shared experts together.
"""

import abc
import functools
import itertools
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError
from dsv2_jax.fp8 import BLOCK, FLOAT8, SCALES, STORED, blocks_of, dequantise, quantise
from dsv2_jax.tensor_files import DTYPES, copy, read_json, read_tensors
from dsv2_jax.weights import Weights, main_dtype, member, refuse_mismatch, stacked_axes

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
*.attn.w_o              N*Vd -> D     self_attn.o_proj.weight
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
SCALE_INV = "_scale_inv"  # after a tensor's name: the float32 scales of its blocks, which multiply
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
BFLOAT16, FLOAT16, FLOAT32 = (DTYPES[code] for code in ("BF16", "F16", "F32"))
MAX_EXPERTS = 100_000  # over all layers; the 236B model has 9440
QUANTISATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


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

    def blocks(self) -> np.ndarray:
        """Of a quantised linear: which row of blocks of the tensor each of the part's outputs lies in."""
        return _blocks(self.shape[1:], self.columns.start, self.columns.stop)


@functools.cache
def _blocks(outputs: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    return np.arange(math.prod(outputs)).reshape(outputs)[..., start:stop].reshape(-1) // BLOCK


def _of_its_own(blocks: np.ndarray) -> bool:
    """Whether a part's outputs, counted in blocks from its first, are in the tensor's blocks."""
    return bool((np.repeat(blocks[::BLOCK], BLOCK)[: len(blocks)] == blocks).all())


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
        "N*Vd": config.num_attention_heads * config.v_head_dim,
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


class TensorWeights(abc.ABC):
    """Parameters that are parts of Hugging Face tensors, as `Weights`; a read touches only the tensors it needs.

    A stack of mixed dtypes is widened to float32, and `hf_dtypes` keeps those of the tensors that are narrower. 8 bits stay 8 bits
    where all of a stack is of them, and are dequantised to bfloat16 where not: `mixed` is such a tensor.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtypes: Mapping[str, np.dtype]
    ) -> None:
        self.directory, self.config = directory, config
        self._places = {(part.path, part.index): (name, part) for name, tensor in tensors.items() for part in tensor.parts}
        own: dict[str, set[np.dtype]] = {}
        whole: dict[str, bool] = {}
        for (path, _), (name, part) in self._places.items():
            own.setdefault(path, set()).add(dtypes[name])
            if dtypes[name] == FLOAT8:
                whole[path] = whole.get(path, True) and _of_its_own(part.blocks())
        self.shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        for path, shape in parameter_shapes(tensors).items():
            plain = own[path] if len(own[path]) == 1 else {BFLOAT16 if dtype == FLOAT8 else dtype for dtype in own[path]}
            self.shapes[path] = shape, next(iter(plain)) if len(plain) == 1 else FLOAT32
            if plain == {FLOAT8}:
                depth = stacked_axes(path)
                stack, (inputs, *outputs) = shape[:depth], shape[depth:]
                matrix = math.prod(outputs), inputs
                rows, columns = blocks_of(matrix)
                self.shapes[path + SCALES] = (*stack, rows if whole[path] else matrix[0], columns), FLOAT32
        self.dtype = main_dtype(self.shapes)
        self.hf_dtypes: dict[str, str] = {}
        self.mixed: str | None = None
        for name, tensor in layout(config).items():
            part = tensor.parts[0]
            dtype, common = dtypes[self._places[part.path, part.index][0]], self.shapes[part.path][1]
            if dtype == FLOAT8 != common:
                self.mixed, dtype = name, BFLOAT16
            if dtype != common:
                self.hf_dtypes[name] = dtype.name

    @abc.abstractmethod
    def _open(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """A tensor, and the scales of its blocks if it is of 8 bits."""

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
        name, part = self._places[path.removesuffix(SCALES), index]
        tensor, scales = (a if a is None or part.expert is None else a[part.expert] for a in self._open(name))
        if path.endswith(SCALES):
            blocks = part.blocks()
            return scales[blocks if len(blocks) == self.shapes[path][0][-2] else blocks[::BLOCK]]
        wanted = self.shapes[path][1]
        if tensor.dtype == FLOAT8 != wanted:
            tensor, values = np.empty(tensor.shape, BFLOAT16), tensor
            dequantise(values, scales, *(np.arange(n) // BLOCK for n in values.shape), tensor)
        return part.view(_recast(tensor, wanted))


class HuggingFaceWeights(TensorWeights):
    """A Hugging Face directory. Code (`auto_map`) is never run."""

    def __init__(self, directory: Path) -> None:
        """Raises: InputError, if a tensor is missing, unexpected or of the wrong shape or dtype (all are listed), or for a
        damaged file, a configuration that is not DeepSeek-V2's, another quantisation than `QUANTISATION`, a file outside the
        directory, pickles."""
        directory = Path(directory)
        hf = read_json(member(directory, CONFIG))
        self._held = _open_shards(directory)
        rank = self._held.get("model.layers.0.self_attn.q_a_layernorm.weight")
        if "q_lora_rank" not in hf and rank is not None:
            hf["q_lora_rank"] = rank.size
        config = ModelConfig.from_hf(hf)
        stacked = {
            int(found[1])
            for name in self._held
            if (found := re.fullmatch(r"model\.layers\.(\d{1,9})\.mlp\.experts\.\w+_proj", name))
        }
        tensors = layout(config, stacked)
        _check(directory, tensors, self._held, _is_quantised(hf))
        super().__init__(directory, config, tensors, {name: self._held[name].dtype for name in tensors})

    def _open(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        return self._held[name], self._held.get(name + SCALE_INV)


class QuantisedWeights(TensorWeights):
    """Any weights, as if a Hugging Face checkpoint held all linears of their layers, but the router, in 8 bits."""

    def __init__(self, weights: Weights) -> None:
        self._weights, self._tensors = weights, layout(weights.config)
        check_parameters(weights, self._tensors)
        dtypes = {n: FLOAT8 if _is_linear(t, STORED) else stored_dtype(weights, n, t) for n, t in self._tensors.items()}
        super().__init__(weights.directory, weights.config, self._tensors, dtypes)
        self._last: tuple[str, tuple[np.ndarray, np.ndarray | None]] | None = None

    def _open(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        if self._last is None or self._last[0] != name:  # its parts are read one after the other
            self._last = name, self._quantised(name)
        return self._last[1]

    def _quantised(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        tensor = self._tensors[name]
        array, scales = assemble(self._weights, name, tensor)
        if array.dtype == FLOAT8 or not _is_linear(tensor, STORED):
            return array, scales
        values, scales = np.empty(tensor.shape, FLOAT8), np.empty(blocks_of(tensor.shape), FLOAT32)
        quantise(array, values, scales)
        return values, scales


def _is_linear(tensor: Tensor, names: Collection[str]) -> bool:
    """Whether a tensor is a linear of a layer, of these names."""
    return all(part.linear and part.index and part.path.rpartition(".")[2] in names for part in tensor.parts)


def stored_dtype(weights: Weights, name: str, tensor: Tensor) -> np.dtype:
    """A tensor's own dtype, which only weights that come from Hugging Face's have, or that of its stack."""
    return np.dtype(getattr(weights, "hf_dtypes", {}).get(name, weights.shapes[tensor.parts[0].path][1]))


def assemble(weights: Weights, name: str, tensor: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    """A tensor put together from its parts, in its own dtype, and the scales of its blocks if it is of 8 bits."""
    array = np.empty(tensor.shape, stored_dtype(weights, name, tensor))
    scales = np.empty(blocks_of(tensor.shape), FLOAT32) if array.dtype == FLOAT8 else None
    for part in tensor.parts:
        copy(part.view(array), _recast(weights.read(part.path, part.index), array.dtype))
        if scales is not None:
            own, blocks = weights.read(part.path + SCALES, part.index), part.blocks()
            rows = np.repeat(own, 1 if len(own) == len(blocks) else BLOCK, axis=0)[: len(blocks)]
            scales[blocks] = rows
            if (scales[blocks] != rows).any():
                raise InputError(f"{weights.directory}: {part.path} has several scales in a block of {name}, expected one")
    return array, scales


def check_parameters(weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    """Raises: InputError, if the parameters are not those that the tensors hold."""
    shapes = {f"{path} {list(shape)}" for path, shape in parameter_shapes(tensors).items()}
    held = {f"{path} {list(shape)}" for path, (shape, _) in weights.shapes.items() if not path.endswith(SCALES)}
    what = f"{weights.directory}: the parameters are not those of its configuration"
    refuse_mismatch(what, {"missing": shapes - held, "unexpected": held - shapes})


def _check(directory: Path, tensors: Mapping[str, Tensor], held: Mapping[str, np.ndarray], quantised: bool) -> None:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = dict.fromkeys(shapes, (BFLOAT16, FLOAT16, FLOAT32))
    for name, tensor in tensors.items():
        if quantised and _is_linear(tensor, STORED | {"w_router"}):
            dtypes[name] += (FLOAT8,)
            if name in held and held[name].dtype == FLOAT8:
                shapes[name + SCALE_INV] = (*tensor.shape[:-2], *blocks_of(tensor.shape[-2:]))
                dtypes[name + SCALE_INV] = (FLOAT32,)
    held = {name: tensor for name, tensor in held.items() if not name.endswith(".rotary_emb.inv_freq")}
    both = shapes.keys() & held.keys()
    refuse_mismatch(
        f"{directory}: the tensors are not those of its config.json",
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


def _is_quantised(hf: Mapping[str, Any]) -> bool:
    quantisation = hf.get("quantization_config")
    if quantisation is None:
        return False
    if not isinstance(quantisation, dict):
        raise InputError(f"config.json: quantization_config is {quantisation!r}, expected an object or null")
    absent = QUANTISATION | {"quant_method": None, "weight_block_size": None}
    for field, expected in QUANTISATION.items():
        if (value := quantisation.get(field, absent[field])) != expected:
            raise InputError(f"config.json: quantization_config.{field} is {value!r}, expected {expected!r}")
    return True


def quantisation(weights: Weights) -> dict[str, Any]:
    """What config.json says of quantised weights: the format, and the linears that are not."""
    tensors = layout(weights.config)
    plain = [n for n, t in tensors.items() if t.parts[0].linear and weights.shapes[t.parts[0].path][1] != FLOAT8]
    return QUANTISATION | {"modules_to_not_convert": [name.removesuffix(".weight") for name in plain]}


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
