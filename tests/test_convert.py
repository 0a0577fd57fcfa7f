import dataclasses
import functools
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from dsv2_jax.config import PRESETS, ModelConfig, Yarn, tiny
from dsv2_jax.convert import convert, hf_config, open_checkpoint
from dsv2_jax.fields import InputError
from dsv2_jax.fp8 import FLOAT8, blocks_of, quantise
from dsv2_jax.hugging_face import layout
from dsv2_jax.tensor_files import copy
from dsv2_jax.weights import new_directory

BF16 = ml_dtypes.bfloat16
SMALL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "intermediate_size": 36,
    "moe_intermediate_size": 14,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
FAMILIES = {
    "v2": ModelConfig(
        **SMALL, q_lora_rank=9, n_routed_experts=4, rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=64)
    ),
    "lite": ModelConfig(**SMALL, q_lora_rank=None, n_routed_experts=4),
    "every second layer": ModelConfig(**SMALL | {"num_hidden_layers": 6}, q_lora_rank=9, n_routed_experts=4, moe_layer_freq=2),
    "no shared experts": ModelConfig(**SMALL | {"n_shared_experts": None}, q_lora_rank=None, n_routed_experts=4),
    "all dense": ModelConfig(**SMALL, q_lora_rank=9, n_routed_experts=None),
    "all experts": ModelConfig(**SMALL | {"first_k_dense_replace": 0}, q_lora_rank=None, n_routed_experts=4),
}


def published(cfg):
    """Names and shapes of a published checkpoint, written out from the specification and not from the table under test."""
    d, n, c, e = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.moe_intermediate_size
    shapes = {"model.embed_tokens.weight": (cfg.vocab_size, d), "model.norm.weight": (d,), "lm_head.weight": (cfg.vocab_size, d)}

    def mlp(name, width):
        shapes.update(
            {f"{name}.gate_proj.weight": (width, d), f"{name}.up_proj.weight": (width, d), f"{name}.down_proj.weight": (d, width)}
        )

    for layer in range(cfg.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = shapes[f"{at}.post_attention_layernorm.weight"] = (d,)
        if cfg.q_lora_rank is None:
            shapes[f"{at}.self_attn.q_proj.weight"] = (n * cfg.qk_head_dim, d)
        else:
            shapes[f"{at}.self_attn.q_a_proj.weight"] = (cfg.q_lora_rank, d)
            shapes[f"{at}.self_attn.q_a_layernorm.weight"] = (cfg.q_lora_rank,)
            shapes[f"{at}.self_attn.q_b_proj.weight"] = (n * cfg.qk_head_dim, cfg.q_lora_rank)
        shapes[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (c + cfg.qk_rope_head_dim, d)
        shapes[f"{at}.self_attn.kv_a_layernorm.weight"] = (c,)
        shapes[f"{at}.self_attn.kv_b_proj.weight"] = (n * (cfg.qk_nope_head_dim + cfg.v_head_dim), c)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, n * cfg.v_head_dim)
        if not cfg.is_moe(layer):
            mlp(f"{at}.mlp", cfg.intermediate_size)
            continue
        shapes[f"{at}.mlp.gate.weight"] = (cfg.n_routed_experts, d)
        for expert in range(cfg.n_routed_experts):
            mlp(f"{at}.mlp.experts.{expert}", e)
        if cfg.n_shared_experts:
            mlp(f"{at}.mlp.shared_experts", cfg.n_shared_experts * e)
    return shapes


def random_tensors(cfg, dtype=BF16, seed=0, finite=False):
    """Random bits, NaN patterns among them unless `finite`, in the published layout."""
    rng = np.random.default_rng(seed)
    if finite:
        return {name: rng.standard_normal(shape).astype(dtype) for name, shape in published(cfg).items()}
    size = np.dtype(dtype).itemsize
    return {
        name: np.frombuffer(rng.bytes(int(np.prod(shape)) * size), dtype).reshape(shape) for name, shape in published(cfg).items()
    }


def stacked(tensors, layers):
    """The layout of transformers 5 in memory, for the experts of `layers`."""
    result = dict(tensors)
    for layer in layers:
        at = f"model.layers.{layer}.mlp.experts"
        count = sum(name.startswith(at) for name in tensors) // 3
        take = {kind: [result.pop(f"{at}.{e}.{kind}_proj.weight") for e in range(count)] for kind in ("gate", "up", "down")}
        result[f"{at}.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in zip(take["gate"], take["up"])])
        result[f"{at}.down_proj"] = np.stack(take["down"])
    return result


def write(directory, cfg, tensors, shards=3, seed=0, **config):
    """A checkpoint with its tensors dealt to shards at random; one shard is written without an index."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(cfg.to_hf("bfloat16") | config))
    (directory / "tokenizer.json").write_text('{"any": "thing"}')
    (directory / "tokenization_deepseek.py").write_text("raise SystemExit('remote code ran')")
    (directory / "LICENSE").write_text("a licence")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    rng = random.Random(seed)
    weight_map = {
        name: f"model-{rng.randrange(shards) + 1:05}-of-{shards:06}.safetensors"
        for name in rng.sample(list(tensors), len(tensors))
    }
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def read_back(directory):
    """name -> (dtype, shape, bytes) of an exported directory, read by the library."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in set(index["weight_map"].values()):
        for name, tensor in safetensors.deserialize((directory / shard).read_bytes()):
            assert index["weight_map"][name] == shard and name not in tensors
            tensors[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in tensors.values())
    return tensors


CODES = {np.dtype(BF16): "BF16", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32", FLOAT8: "F8_E4M3"}


def stored(tensors):
    return {name: (CODES[tensor.dtype], tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


def there_and_back(source, tmp_path, weights_dtype=None):
    convert(source, tmp_path / "native", "native", weights_dtype)
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert not list(tmp_path.glob("*.partial"))
    return read_back(tmp_path / "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_byte_identical(tmp_path, family):
    cfg = FAMILIES[family]
    dtype = {"v2": BF16, "lite": np.float16, "every second layer": np.float32}.get(family, BF16)
    tensors = random_tensors(cfg, dtype)
    source = write(tmp_path / "source", cfg, tensors, shards=1 if family == "lite" else 4)
    assert there_and_back(source, tmp_path) == stored(tensors)
    for name in ("native", "hf"):
        weights = open_checkpoint(tmp_path / name)
        assert weights.config == cfg and weights.dtype == np.dtype(dtype).name
        assert (tmp_path / name / "tokenizer.json").read_text() == '{"any": "thing"}'
        assert (tmp_path / name / "LICENSE").exists() and not list((tmp_path / name).glob("*.py"))


def test_every_parameter_is_where_the_paper_puts_it(tmp_path):
    cfg = FAMILIES["every second layer"]
    tensors = random_tensors(cfg, finite=True)
    weights = open_checkpoint(write(tmp_path / "source", cfg, tensors))
    h, r, v, n, c = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.num_attention_heads, cfg.kv_lora_rank
    layers = {"dense": [0, 1, 3, 5], "moe": [2, 4]}
    for kind, numbers in layers.items():
        for l, number in enumerate(numbers):
            at = {name.split(".", 3)[3]: x for name, x in tensors.items() if name.startswith(f"model.layers.{number}.")}
            read = functools.partial(weights.read, index=(l,))
            kv_b = at["self_attn.kv_b_proj.weight"].reshape(n, h + v, c)
            q_b = at["self_attn.q_b_proj.weight"].reshape(n, h + r, cfg.q_lora_rank)
            for ours, theirs in {
                "attn_norm": at["input_layernorm.weight"],
                "ffn_norm": at["post_attention_layernorm.weight"],
                "attn.w_dq": at["self_attn.q_a_proj.weight"].T,
                "attn.q_norm": at["self_attn.q_a_layernorm.weight"],
                "attn.w_uq": q_b.transpose(2, 0, 1),
                "attn.w_dkv": at["self_attn.kv_a_proj_with_mqa.weight"][:c].T,
                "attn.w_kr": at["self_attn.kv_a_proj_with_mqa.weight"][c:].T,
                "attn.kv_norm": at["self_attn.kv_a_layernorm.weight"],
                "attn.w_uk": kv_b[:, :h].transpose(2, 0, 1),
                "attn.w_uv": kv_b[:, h:].transpose(2, 0, 1),
                "attn.w_o": at["self_attn.o_proj.weight"].T,
            }.items():
                np.testing.assert_array_equal(read(f"{kind}.{ours}"), theirs)
            mlp = {"moe": "mlp.shared_experts", "dense": "mlp"}[kind]
            for side in ("gate", "up", "down"):
                ffn = "ffn.shared" if kind == "moe" else "ffn"
                np.testing.assert_array_equal(read(f"{kind}.{ffn}.w_{side}"), at[f"{mlp}.{side}_proj.weight"].T)
                if kind == "moe":
                    experts = np.stack([at[f"mlp.experts.{e}.{side}_proj.weight"].T for e in range(4)])
                    np.testing.assert_array_equal(read(f"moe.ffn.experts.w_{side}"), experts)
            if kind == "moe":
                np.testing.assert_array_equal(read("moe.ffn.w_router"), at["mlp.gate.weight"].T)
    np.testing.assert_array_equal(weights.read("embed"), tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights.read("final_norm"), tensors["model.norm.weight"])
    np.testing.assert_array_equal(weights.read("w_head"), tensors["lm_head.weight"].T)


@pytest.mark.parametrize("stack", [False, True])
def test_any_slice_equals_the_slice_of_the_whole(tmp_path, stack):
    cfg = FAMILIES["every second layer"]
    tensors = random_tensors(cfg, finite=True)
    source = write(tmp_path / "source", cfg, stacked(tensors, [2]) if stack else tensors)
    convert(source, tmp_path / "native", "native")
    hf, native = open_checkpoint(source), open_checkpoint(tmp_path / "native")
    assert hf.shapes == native.shapes and hf.dtype == native.dtype == "bfloat16"
    rng = random.Random(0)
    for path, (shape, dtype) in hf.shapes.items():
        whole = hf.read(path)
        assert whole.shape == shape and whole.dtype == dtype and whole.tobytes() == native.read(path).tobytes()
        for _ in range(20):
            index = []
            for size in shape[: rng.randrange(len(shape) + 1)]:
                start, stop = sorted(rng.sample(range(size + 1), 2))
                index.append(rng.choice((slice(start, stop), slice(None), slice(None, None, 2), start, start - size)))
            for weights in (hf, native):
                part = weights.read(path, tuple(index))
                assert part.shape == whole[tuple(index)].shape and part.tobytes() == whole[tuple(index)].tobytes()


def test_stacked_experts_come_back_one_by_one(tmp_path):
    cfg = FAMILIES["v2"]
    tensors = random_tensors(cfg)
    source = write(tmp_path / "source", cfg, stacked(tensors, [2]))  # layer 1 as published: both layouts in one checkpoint
    assert there_and_back(source, tmp_path) == stored(tensors)
    convert(source, tmp_path / "direct", "hf")
    assert read_back(tmp_path / "direct") == stored(tensors)


def test_each_tensor_keeps_its_dtype_in_a_mixture(tmp_path):
    cfg = FAMILIES["v2"]
    rng = random.Random(0)
    tensors = {
        n: random_tensors(cfg, rng.choice((BF16, np.float16, np.float32)), seed)[n] for seed, n in enumerate(published(cfg))
    }
    source = write(tmp_path / "source", cfg, tensors)
    assert there_and_back(source, tmp_path) == stored(tensors)  # any bits
    shapes = open_checkpoint(source).shapes
    assert {dtype.name for _, dtype in shapes.values()} >= {"float32"}
    assert not any(dtype == np.float16 and path.startswith("moe.ffn.experts") for path, (_, dtype) in shapes.items())


def test_only_the_stack_that_mixes_is_widened(tmp_path):
    cfg = FAMILIES["v2"]
    tensors = random_tensors(cfg)
    name = "model.layers.2.mlp.gate.weight"
    tensors[name] = tensors[name].astype(np.float32)
    weights = open_checkpoint(write(tmp_path / "source", cfg, tensors))
    assert {path for path, (_, dtype) in weights.shapes.items() if dtype != BF16} == {"moe.ffn.w_router"}
    assert weights.hf_dtypes == {"model.layers.1.mlp.gate.weight": "bfloat16"} and weights.dtype == "bfloat16"


# -- float8

QUANTISED = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
# 128 divides no width, and the parts of kv_a_proj and kv_b_proj begin within blocks; or all that the published models' does.
UNEVEN = dataclasses.replace(FAMILIES["v2"], hidden_size=130, kv_lora_rank=140, moe_intermediate_size=134, intermediate_size=300)
EVEN = dataclasses.replace(
    UNEVEN,
    kv_lora_rank=256,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    moe_intermediate_size=128,
    n_routed_experts=3,
)


def is_linear(name):
    return "_proj" in name


def in_8_bits(tensor, rng):
    """(float8 tensor, scales) with random contents, blocks over the last two axes."""
    q = rng.integers(0, 256, tensor.shape, dtype=np.uint8)
    q[(q & 0x7F) == 0x7F] = 0  # the NaN patterns
    grid = (*tensor.shape[:-2], *(-(-n // 128) for n in tensor.shape[-2:]))
    return q.view(FLOAT8), rng.uniform(0.001, 0.1, grid).astype(np.float32)


def float8_tensors(tensors):
    """The same with all linears of the layers, but the router, in 8 bits."""
    rng, result = np.random.default_rng(0), {}
    for name, tensor in tensors.items():
        result[name] = tensor
        if is_linear(name):
            result[name], result[f"{name}_scale_inv"] = in_8_bits(tensor, rng)
    return result


def plain(values, scales):
    """float32 of 8 bits, written out."""
    rows, columns = values.shape[-2:]
    return values.astype(np.float32) * scales.repeat(128, -2)[..., :rows, :].repeat(128, -1)[..., :columns]


def dequantised(tensors, dtype):
    names = [name for name in tensors if not name.endswith("_scale_inv")]
    return {
        n: plain(t, tensors[f"{n}_scale_inv"]).astype(dtype) if is_linear(n) else t for n, t in ((n, tensors[n]) for n in names)
    }


@pytest.mark.parametrize("cfg", [UNEVEN, EVEN, dataclasses.replace(EVEN, q_lora_rank=None)], ids=["uneven", "even", "lite"])
def test_float8_there_and_back_is_byte_identical(tmp_path, cfg):
    tensors = float8_tensors(random_tensors(cfg))
    config = {"quantization_config": QUANTISED | {"modules_to_not_convert": ["lm_head"], "some_future_field": 1}}
    source = write(tmp_path / "source", cfg, tensors, **config)
    assert there_and_back(source, tmp_path) == stored(tensors)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    convert(source, tmp_path / "again", "hf", "fp8")  # nothing is left to quantise
    assert read_back(tmp_path / "again") == stored(tensors)


@pytest.mark.parametrize("stack", [False, True])
@pytest.mark.parametrize("dtype", [BF16, np.float32])
def test_float8_blocks_equal_a_plain_dequantisation(tmp_path, stack, dtype):
    tensors = random_tensors(UNEVEN, dtype, finite=True)
    tensors = float8_tensors(stacked(tensors, [1, 2]) if stack else tensors)
    source = write(tmp_path / "source", UNEVEN, tensors, shards=5, quantization_config=QUANTISED)
    expected = dequantised(tensors, dtype)
    if stack:
        for layer in (1, 2):
            at = f"model.layers.{layer}.mlp.experts"
            gate_up, down = expected.pop(f"{at}.gate_up_proj"), expected.pop(f"{at}.down_proj")
            for e in range(4):
                expected[f"{at}.{e}.gate_proj.weight"], expected[f"{at}.{e}.up_proj.weight"] = np.split(gate_up[e], 2)
                expected[f"{at}.{e}.down_proj.weight"] = down[e]
    assert there_and_back(source, tmp_path, np.dtype(dtype).name) == stored(expected)
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    convert(source, tmp_path / "kept", "native")  # 8 bits stay, and stand for the same
    convert(tmp_path / "kept", tmp_path / "direct", "hf", np.dtype(dtype).name)
    assert read_back(tmp_path / "direct") == stored(expected)


def test_stacked_experts_of_8_bits_come_back_one_by_one(tmp_path):
    tensors = float8_tensors(stacked(random_tensors(EVEN), [2]))
    expected = dict(tensors)
    at = "model.layers.2.mlp.experts"
    for suffix, (name, halves) in itertools.product(("", "_scale_inv"), {"gate_up": 2, "down": 1}.items()):
        experts = expected.pop(f"{at}.{name}_proj{suffix}")
        for e, expert in enumerate(experts):
            for side, half in zip(name.split("_"), np.split(expert, halves)):
                expected[f"{at}.{e}.{side}_proj.weight{suffix}"] = half
    source = write(tmp_path / "source", EVEN, tensors, quantization_config=QUANTISED)
    assert there_and_back(source, tmp_path) == stored(expected)

    uneven = float8_tensors(stacked(random_tensors(UNEVEN), [2]))
    source = write(tmp_path / "uneven", UNEVEN, uneven, quantization_config=QUANTISED)
    with pytest.raises(InputError, match=r"w_up has several scales in a block of model.*up_proj.weight, expected one"):
        convert(source, tmp_path / "direct", "hf")


@pytest.mark.parametrize("cfg", [UNEVEN, EVEN], ids=["uneven", "even"])
def test_convert_quantises_every_tensor_by_itself(tmp_path, cfg):
    tensors = random_tensors(cfg, finite=True)
    source, expected = write(tmp_path / "source", cfg, tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        values, scales = np.empty(tensors[name].shape, FLOAT8), np.empty(blocks_of(tensors[name].shape), np.float32)
        quantise(tensors[name], values, scales)
        expected[name], expected[f"{name}_scale_inv"] = values, scales
    assert there_and_back(source, tmp_path, "fp8") == stored(expected)
    convert(source, tmp_path / "direct", "hf", "fp8")
    assert read_back(tmp_path / "direct") == stored(expected)
    written = json.loads((tmp_path / "direct" / "config.json").read_text())
    kept = written["quantization_config"].pop("modules_to_not_convert")
    assert written["quantization_config"] == QUANTISED and written["torch_dtype"] == "bfloat16"
    assert set(kept) == {"lm_head", "model.layers.1.mlp.gate", "model.layers.2.mlp.gate"}


def test_a_stack_of_8_bits_and_others_is_read_and_not_copied(tmp_path):
    cfg = FAMILIES["lite"]
    tensors = random_tensors(cfg, finite=True)
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = in_8_bits(tensors[name], np.random.default_rng(0))
    source = write(tmp_path / "source", cfg, tensors, quantization_config=QUANTISED)
    w_o = plain(tensors[name], tensors[f"{name}_scale_inv"]).astype(BF16).T
    assert open_checkpoint(source).read("moe.attn.w_o", (1,)).tobytes() == w_o.tobytes()
    with pytest.raises(InputError, match=f"{name} is float8_e4m3fn and the same tensor of another layer or expert is not"):
        convert(source, tmp_path / "out", "hf")
    convert(source, tmp_path / "out", "hf", "bfloat16")


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "wrong dtype: .*kv_b_proj.weight is float8_e4m3fn, expected bfloat16 or float16 or float32$"),
        (QUANTISED | {"weight_block_size": None}, r"weight_block_size is None, expected \[128, 128\]"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, r"weight_block_size is None, expected \[128, 128\]"),
        (QUANTISED | {"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\], expected \[128, 128\]"),
        (QUANTISED | {"activation_scheme": "static"}, "activation_scheme is 'static', expected 'dynamic'"),
        (QUANTISED | {"fmt": "e5m2"}, "fmt is 'e5m2', expected 'e4m3'"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq', expected 'fp8'"),
        ("fp8", "quantization_config is 'fp8', expected an object or null"),
    ],
)
def test_other_quantisations_are_refused(tmp_path, config, message):
    cfg = FAMILIES["lite"]
    tensors = random_tensors(cfg)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = in_8_bits(tensors[name], np.random.default_rng(0))
    source = write(tmp_path / "source", cfg, tensors, **{} if config is None else {"quantization_config": config})
    with pytest.raises(InputError, match=message):
        open_checkpoint(source)


KV_B = "model.layers.0.self_attn.kv_b_proj.weight"
BAD_FLOAT8 = {
    "no scale": (lambda t: t.pop(f"{KV_B}_scale_inv"), f"missing: {KV_B}_scale_inv"),
    "one scale": (
        lambda t: t.update({f"{KV_B}_scale_inv": np.ones((), np.float32)}),
        f"wrong shape: {KV_B}_scale_inv is \\[\\], expected \\[1, 1\\]",
    ),
    "another name": (
        lambda t: rename(t, f"{KV_B}_scale_inv", f"{KV_B}_scale"),
        f"missing: {KV_B}_scale_inv; unexpected: {KV_B}_scale",
    ),
    "scale of bfloat16": (
        lambda t: t.update({f"{KV_B}_scale_inv": np.ones((1, 1), BF16)}),
        f"wrong dtype: {KV_B}_scale_inv is bfloat16, expected float32",
    ),
    "e5m2": (
        lambda t: t.update({KV_B: t[KV_B].view(ml_dtypes.float8_e5m2)}),
        f"wrong dtype: {KV_B} is float8_e5m2, expected bfloat16 or float16 or float32 or float8_e4m3fn",
    ),
    "embedding": (
        lambda t: t.update({"model.embed_tokens.weight": np.zeros((48, 24), FLOAT8)}),
        "wrong dtype: model.embed_tokens.weight is float8_e4m3fn, expected bfloat16 or float16 or float32$",
    ),
    "static activations": (
        lambda t: t.update({f"{KV_B.removesuffix('weight')}input_scale": np.ones((), np.float32)}),
        "unexpected: .*kv_b_proj.input_scale",
    ),
}


@pytest.mark.parametrize("case", BAD_FLOAT8)
def test_bad_float8_tensors_are_named(tmp_path, case):
    spoil, message = BAD_FLOAT8[case]
    cfg = FAMILIES["lite"]
    tensors = random_tensors(cfg)
    tensors[KV_B], tensors[f"{KV_B}_scale_inv"] = in_8_bits(tensors[KV_B], np.random.default_rng(0))
    spoil(tensors)
    with pytest.raises(InputError, match=message) as error:
        open_checkpoint(write(tmp_path / "source", cfg, tensors, quantization_config=QUANTISED))
    assert "\n" not in str(error.value)


# -- config.json


def test_the_export_keeps_the_config_it_came_with(tmp_path):
    cfg = FAMILIES["v2"]
    extra = {"auto_map": {"AutoModel": "modeling_deepseek.X"}, "ep_size": 1, "some_future_field": [1], "torch_dtype": "float16"}
    source = write(tmp_path / "source", cfg, random_tensors(cfg), **extra)
    there_and_back(source, tmp_path)
    original = json.loads((source / "config.json").read_text())
    del original["auto_map"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == original | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize("family", ["v2", "lite"])
def test_an_absent_q_lora_rank_is_told_by_the_tensors(tmp_path, family):
    cfg = FAMILIES[family]
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    config = json.loads((source / "config.json").read_text())
    del config["q_lora_rank"]
    (source / "config.json").write_text(json.dumps(config))
    weights = open_checkpoint(source)
    assert weights.config == cfg
    assert hf_config(weights)["q_lora_rank"] == cfg.q_lora_rank


def test_a_config_of_something_else_is_not_exported(tmp_path):
    cfg = FAMILIES["lite"]
    weights = open_checkpoint(write(tmp_path / "source", cfg, random_tensors(cfg)))
    for text in ('{"model": {"preset": "tiny"}}', json.dumps(tiny().to_hf("float32")), "no json"):
        (tmp_path / "source" / "config.json").write_text(text)
        assert hf_config(weights) == cfg.to_hf("bfloat16")


# -- bad input: the message names the thing, nothing stays behind


def spoil_tensors(change):
    def spoil(directory):
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return spoil


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


def spoil_config(**values):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | values))

    return spoil


def only_pickles(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04cposix\nsystem\n")


GATE = "model.layers.1.mlp.gate.weight"
BAD = {
    "missing": (spoil_tensors(lambda t: t.pop(GATE)), f"missing: {GATE}"),
    "several": (
        spoil_tensors(
            lambda t: (t.pop(GATE), t.update(extra=np.zeros(2, BF16)), t.update({"model.norm.weight": np.zeros(3, BF16)}))
        ),
        f"missing: {GATE}; unexpected: extra; wrong shape: model.norm.weight is [3], expected [24]",
    ),
    "many": (
        spoil_tensors(lambda t: [t.pop(n) for n in list(t) if ".experts." in n and ".2." in n]),
        "model.layers.2.mlp.experts.2.up_proj.weight",
    ),
    "unexpected": (spoil_tensors(lambda t: t.update(extra=np.zeros(2, BF16))), "unexpected: extra"),
    "bias": (spoil_tensors(lambda t: t.update({"lm_head.bias": np.zeros(48, BF16)})), "unexpected: lm_head.bias"),
    "renamed": (
        spoil_tensors(lambda t: rename(t, GATE, GATE.replace("gate", "gate_proj"))),
        f"missing: {GATE}; unexpected: model.layers.1.mlp.gate_proj.weight",
    ),
    "shape": (spoil_tensors(lambda t: t.update({GATE: t[GATE].T.copy()})), f"wrong shape: {GATE} is [24, 4], expected [4, 24]"),
    "dtype": (
        spoil_tensors(lambda t: t.update({GATE: t[GATE].view(np.int16)})),
        f"wrong dtype: {GATE} is int16, expected bfloat16 or",
    ),
    "an expert too many": (
        spoil_tensors(lambda t: t.update({"model.layers.1.mlp.experts.4.up_proj.weight": np.zeros((14, 24), BF16)})),
        "unexpected: model.layers.1.mlp.experts.4.up_proj.weight",
    ),
    "both layouts": (
        spoil_tensors(lambda t: t.update({"model.layers.1.mlp.experts.down_proj": np.zeros((4, 24, 14), BF16)})),
        "unexpected: model.layers.1.mlp.experts.0.down_proj.weight",
    ),
    "truncated": (lambda d: os.truncate(d / "model.safetensors", 5000), "model.safetensors: header of"),
    "cut": (lambda d: os.truncate(d / "model.safetensors", (d / "model.safetensors").stat().st_size - 1), "model.safetensors: "),
    "pickles": (only_pickles, "pytorch_model-00001-of-00002.bin: pickle files can run code"),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors.index.json and no model.safetensors"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "config text": (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config twice": (lambda d: (d / "config.json").write_text('{"a": 1, "a": 2}'), "'a' stands twice"),
    "config NaN": (lambda d: (d / "config.json").write_text('{"rope_theta": NaN}'), "NaN"),
    "config list": (lambda d: (d / "config.json").write_text("[]"), "a JSON list, expected an object"),
    "field type": (spoil_config(hidden_size="24"), "hidden_size is '24'"),
    "another size": (spoil_config(hidden_size=26), "wrong shape: "),
    "more layers": (spoil_config(num_hidden_layers=5), "missing: model.layers.3.input_layernorm.weight"),
    "fewer layers": (spoil_config(num_hidden_layers=2), "unexpected: model.layers.2.input_layernorm.weight"),
    "endless layers": (spoil_config(num_hidden_layers=2**31 - 1), "num_hidden_layers times n_routed_experts is"),
    "endless experts": (spoil_config(n_routed_experts=2**31 - 1), "num_hidden_layers times n_routed_experts is"),
    "another model": (spoil_config(model_type="llama"), "model_type is 'llama'"),
    "tied": (spoil_config(tie_word_embeddings=True), "tie_word_embeddings is True"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, case):
    spoil, message = BAD[case]
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg, finite=True), shards=1)
    spoil(source)
    for to in ("native", "hf"):
        with pytest.raises(InputError) as error:
            convert(source, tmp_path / "out", to)
        assert message in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["source"]


def test_rotary_buffers_are_the_one_thing_skipped(tmp_path):
    cfg = FAMILIES["lite"]
    tensors = random_tensors(cfg)
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32) for layer in range(3)}
    assert there_and_back(write(tmp_path / "source", cfg, tensors | buffers), tmp_path) == stored(tensors)


def spoil_index(change):
    def spoil(directory):
        file = directory / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return spoil


def outside_link(directory):
    shard = next(directory.glob("model-*.safetensors"))
    os.rename(shard, directory.parent / "elsewhere")
    shard.symlink_to(directory.parent / "elsewhere")


BAD_INDEX = {
    "parent": (spoil_index(lambda m: m.update({GATE: "../x.safetensors"})), "'../x.safetensors' is not a plain file name"),
    "absolute": (spoil_index(lambda m: m.update({GATE: "/etc/passwd"})), "'/etc/passwd' is not a plain file name"),
    "folder": (spoil_index(lambda m: m.update({GATE: "a/x.safetensors"})), "'a/x.safetensors' is not a plain file name"),
    "dots": (spoil_index(lambda m: m.update({GATE: ".."})), "'..' is not a plain file name"),
    "backslash": (spoil_index(lambda m: m.update({GATE: "..\\x.safetensors"})), "is not a plain file name"),
    "nul": (spoil_index(lambda m: m.update({GATE: "x\0.safetensors"})), "is not a plain file name"),
    "empty": (spoil_index(lambda m: m.update({GATE: ""})), "'' is not a plain file name"),
    "number": (spoil_index(lambda m: m.update({GATE: 3})), "expected weight_map"),
    "pickle": (
        spoil_index(lambda m: m.update({GATE: "pytorch_model.bin"})),
        "weight_map names 'pytorch_model.bin', expected safetensors",
    ),
    "config": (spoil_index(lambda m: m.update({GATE: "config.json"})), "weight_map names 'config.json', expected safetensors"),
    "absent shard": (spoil_index(lambda m: m.update({GATE: "model-9.safetensors"})), "missing: model-9.safetensors"),
    "absent tensor": (
        spoil_index(lambda m: m.update({"x": "model-00001-of-000003.safetensors"})),
        "missing: x in model-00001-of-000003",
    ),
    "unlisted tensor": (spoil_index(lambda m: m.pop(GATE)), f"unexpected: {GATE} in model-0000"),
    "another shard": (
        spoil_index(lambda m: m.update({GATE: next(shard for shard in m.values() if shard != m[GATE])})),
        f"unexpected: {GATE} in model-0000",
    ),
    "unlisted shard": (lambda d: (d / "model.safetensors").write_bytes(b""), "unexpected: model.safetensors"),
    "link": (outside_link, "outside the checkpoint; copy the checkpoint with its links followed, `cp -rL`"),
    "no map": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "expected weight_map"),
    "index twice": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        "stands twice",
    ),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_bad_index_is_named(tmp_path, case):
    spoil, message = BAD_INDEX[case]
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    spoil(source)
    with pytest.raises(InputError) as error:
        open_checkpoint(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_hub_cache_of_links_is_refused_and_a_link_within_is_not(tmp_path):
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg), shards=1)
    (tmp_path / "snapshot").mkdir()
    for file in source.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../source/{file.name}")
    with pytest.raises(InputError, match="--local-dir"):
        open_checkpoint(tmp_path / "snapshot")
    os.rename(source / "model.safetensors", source / "blob")
    (source / "model.safetensors").symlink_to("blob")
    (tmp_path / "link").symlink_to(source)
    assert open_checkpoint(tmp_path / "link").config == cfg


def test_what_is_no_checkpoint_is_told_what_one_is(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("absent", "no such directory"), ("file", "no such directory"), ("empty", "not a checkpoint")):
        with pytest.raises(InputError, match=f"{name}: {message}, expected a directory with config.json"):
            open_checkpoint(tmp_path / name)


# -- the output appears whole or not at all


def test_the_output_must_be_new(tmp_path):
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: exists already"):
        convert(source, tmp_path / "out", "native")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="a file is in the way"):
        convert(source, tmp_path / "file" / "out", "native")
    (tmp_path / "new.partial" / "mine").mkdir(parents=True)
    with pytest.raises(InputError, match=r"new\.partial/mine: not of an interrupted conversion"):
        convert(source, tmp_path / "new", "native")
    assert (tmp_path / "new.partial" / "mine").is_dir()


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_full_disk_leaves_nothing(tmp_path, to):
    """As on a full disk: here the kernel refuses to let a file grow."""
    cfg = dataclasses.replace(FAMILIES["lite"], vocab_size=5000)
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"safetensors"):
            convert(source, tmp_path / "out", to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["source"]


def test_too_little_room_is_told_first(tmp_path, monkeypatch):
    cfg = dataclasses.replace(FAMILIES["lite"], vocab_size=300_000)
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    with pytest.raises(InputError, match=r"out: needs 0\.03 GB, the disk has 0\.00 GB free"):
        convert(source, tmp_path / "out", "native")
    assert os.listdir(tmp_path) == ["source"]


def test_kill_leaves_nothing_that_loads_and_the_next_run_cleans_up(tmp_path):
    """`KILLS` for more: SIGKILL at a random time while tensors are being written."""
    cfg = dataclasses.replace(tiny(), num_hidden_layers=8, hidden_size=256, n_routed_experts=64)
    tensors = random_tensors(cfg)
    source = write(tmp_path / "source", cfg, tensors)
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    rng, interrupted = random.Random(0), 0
    for trial in range(int(os.environ.get("KILLS", 3))):
        shutil.rmtree(partial, ignore_errors=True)
        process = start(f"--input={source}", f"--output={out}", f"--to={('native', 'hf')[trial % 2]}")
        while process.poll() is None and not any(partial.glob("*.safetensors")):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        if out.exists():  # it was quicker: then it is whole
            assert open_checkpoint(out).config == cfg
            shutil.rmtree(out)
            continue
        interrupted += 1
        if not any((partial / last).exists() for last in ("native.json", "model.safetensors.index.json")):
            with pytest.raises(InputError):
                open_checkpoint(partial)
    assert interrupted
    partial.mkdir(exist_ok=True)
    (partial / "moe.stale.safetensors").write_text("of a run that was killed")
    convert(source, out, "hf")
    assert not partial.exists() and not list(out.glob("*stale*")) and read_back(out) == stored(tensors)


def test_two_conversions_do_not_write_one_output(tmp_path):
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg))
    with new_directory(tmp_path / "out", 0) as directory:
        (directory / "x").write_text("of the first")
        with pytest.raises(InputError, match="out: another conversion is writing it"):
            convert(source, tmp_path / "out", "native")
    assert (tmp_path / "out" / "x").read_text() == "of the first"


def start(*flags):
    command = [sys.executable, "-m", "dsv2_jax.convert", *flags]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_command(tmp_path):
    cfg = FAMILIES["lite"]
    source = write(tmp_path / "source", cfg, random_tensors(cfg))

    process = start(f"--input={source}", f"--output={tmp_path / 'native'}", "--to=native")
    printed, complaint = process.communicate()
    assert process.returncode == 0, complaint
    assert "convert: 50%" in printed and "MB/s" in printed and open_checkpoint(tmp_path / "native").config == cfg
    for flags, message in (
        ([f"--input={source}", f"--output={tmp_path / 'native'}", "--to=hf"], "native: exists already"),
        ([f"--input={source}", f"--output={tmp_path / 'x'}", "--to=gguf"], "--to"),
        ([f"--input={source}", f"--output={tmp_path / 'x'}", "--to=hf", "--weights_dtype=int8"], "--weights_dtype"),
        ([f"--input={source}", "--to=hf"], "--output"),
    ):
        process = start(*flags)
        _, complaint = process.communicate()
        assert process.returncode == 2 and message in complaint and complaint.count("\n") == 1


def test_the_table_counts_the_published_tensors():
    for name, count in (("v2_lite", 5291), ("v2", 29102)):
        cfg = PRESETS[name]()
        tensors = layout(cfg)
        assert len(tensors) == count
        assert {n: t.shape for n, t in tensors.items()} == published(cfg)
        assert sum(int(np.prod(t.shape)) for t in tensors.values()) == cfg.num_params


def test_views_write_where_they_read():
    """A part's view into an empty tensor, filled, gives the tensor back: reading and writing are one function."""
    cfg = FAMILIES["v2"]
    for name, tensor in layout(cfg, stacked=[2]).items():
        whole = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
        target = np.full_like(whole, -1)
        for part in tensor.parts:
            pick = (lambda x, part=part: x) if part.expert is None else (lambda x, part=part: x[part.expert])
            copy(part.view(pick(target)), part.view(pick(whole)))
        np.testing.assert_array_equal(target, whole, err_msg=name)
