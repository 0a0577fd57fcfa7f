"""PyTorch's side of parity: writes tiny checkpoints, and the activations of a checkpoint, to files.

A script of its own for a Python that has torch and transformers (tests/reference_requirements.txt). It imports nothing of
this package; torch is imported where it is used, because the tests build the same checkpoints without it.

    python -I dsv2_jax/parity_reference.py families OUT
    python -I dsv2_jax/parity_reference.py activations --hf DIR ... --tokens FILE.npz --out DIR --dtype float32 bfloat16 rounded

The reference is transformers' native deepseek_v2, with DeepSeek's released code ruling where native ignores a field (`native_module`).
"""

import argparse
import functools
import json
import os
import zlib
from pathlib import Path

import numpy as np

DTYPES = ("float32", "bfloat16", "rounded")  # rounded: weights rounded to bfloat16, computed in float32

# -- checkpoints

# Small, but no two sizes are equal by chance, the number of heads is odd, and 300 tokens lie far past the original window.
_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 256,
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "q_lora_rank": 56,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "intermediate_size": 112,
    "moe_intermediate_size": 40,
    "n_routed_experts": 32,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "max_position_embeddings": 2560,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}
_LITE = _V2 | {
    "hidden_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "q_lora_rank": None,
    "n_routed_experts": 16,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "routed_scaling_factor": 1.0,
}


def _yarn(**changes):
    return {"rope_scaling": _V2["rope_scaling"] | changes}


FAMILIES = {
    "v2": _V2,
    "lite": _LITE,
    "v2_5": _V2 | _yarn(mscale=1.0, mscale_all_dim=1.0) | {"torch_dtype": "bfloat16"},
    "esft": _LITE | {"rope_scaling": None, "max_position_embeddings": 512},
    # With an epsilon large enough to show: the two latent norms must not take it.
    "unequal_mscale": _LITE | _yarn(mscale=0.707, mscale_all_dim=1.0, beta_fast=2) | {"rms_norm_eps": 0.01},
    "norm_topk_prob": _V2 | {"norm_topk_prob": True},
    "moe_layer_freq": _V2 | {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "no_shared_experts": _LITE | {"n_shared_experts": None},
    "v2_chat": _V2 | {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"},  # its first upload's names
    "coder_lite": {k: v for k, v in _LITE.items() if k != "q_lora_rank"} | {"topk_method": "gready"},  # null dropped by dumpers
    "stacked": _V2,  # saved in the layout transformers 5 holds in memory, with the config.json it writes
}


def weight_shapes(hf: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint in the published layout. Linears are [out, in]."""
    d, heads, c = hf["hidden_size"], hf["num_attention_heads"], hf["kv_lora_rank"]
    nope, rope, v = hf["qk_nope_head_dim"], hf["qk_rope_head_dim"], hf["v_head_dim"]
    query_rank = hf.get("q_lora_rank")

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        up, down = (width, d), (d, width)
        return {f"{prefix}.gate_proj.weight": up, f"{prefix}.up_proj.weight": up, f"{prefix}.down_proj.weight": down}

    shapes = {
        "model.embed_tokens.weight": (hf["vocab_size"], d),
        "model.norm.weight": (d,),
        "lm_head.weight": (hf["vocab_size"], d),
    }
    for layer in range(hf["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": (d,), f"{at}.post_attention_layernorm.weight": (d,)}
        if query_rank is None:
            shapes[f"{at}.self_attn.q_proj.weight"] = (heads * (nope + rope), d)
        else:
            shapes[f"{at}.self_attn.q_a_proj.weight"] = (query_rank, d)
            shapes[f"{at}.self_attn.q_a_layernorm.weight"] = (query_rank,)
            shapes[f"{at}.self_attn.q_b_proj.weight"] = (heads * (nope + rope), query_rank)
        shapes[f"{at}.self_attn.kv_a_proj_with_mqa.weight"] = (c + rope, d)
        shapes[f"{at}.self_attn.kv_a_layernorm.weight"] = (c,)
        shapes[f"{at}.self_attn.kv_b_proj.weight"] = (heads * (nope + v), c)
        shapes[f"{at}.self_attn.o_proj.weight"] = (d, heads * v)
        if layer < hf["first_k_dense_replace"] or layer % hf["moe_layer_freq"]:
            shapes |= mlp(f"{at}.mlp", hf["intermediate_size"])
            continue
        shapes[f"{at}.mlp.gate.weight"] = (hf["n_routed_experts"], d)
        for expert in range(hf["n_routed_experts"]):
            shapes |= mlp(f"{at}.mlp.experts.{expert}", hf["moe_intermediate_size"])
        if hf["n_shared_experts"]:
            shapes |= mlp(f"{at}.mlp.shared_experts", hf["n_shared_experts"] * hf["moe_intermediate_size"])
    return shapes


def random_weight(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A float32 tensor of bfloat16 values that depends on its name and the seed alone.

    The spread is on purpose: with the customary std of 0.02 and norms of 1, attention is flat and the routers are nearly tied,
    so that a wrong softmax scale, a missing norm or a swapped expert hardly shows. Routed experts are kept small, because V2
    scales them by 16: one near-tie that bfloat16 decides otherwise would drown every other error.
    """
    x = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, np.float32)
    if "norm" in name:
        x = np.exp(0.4 * x)
    elif "embed_tokens" not in name:
        gain = 1.3
        if ".gate." in name:  # the router
            gain = 2.0
        elif "o_proj" in name or "down_proj" in name:
            gain = 0.1 if ".experts." in name else 0.5
        x *= np.float32(gain / shape[-1] ** 0.5)
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


def write_checkpoint(directory: Path, hf: dict, seed: int) -> None:
    """Writes config.json and one safetensors file in the published layout, float32; no torch."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf))
    weights = {name: random_weight(name, shape, seed) for name, shape in weight_shapes(hf).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def write_families(out: Path) -> None:
    """Writes every family to OUT/{name}, as transformers itself saves it: several shards, per expert except `stacked`."""
    for seed, (name, hf) in enumerate(FAMILIES.items()):
        write_checkpoint(out / name, hf, seed)
        model = load(out / name, hf["torch_dtype"])
        (out / name / "model.safetensors").unlink()
        model.save_pretrained(out / name, save_original_format=name != "stacked", max_shard_size="500KB")
        if name != "stacked":
            (out / name / "config.json").write_text(json.dumps(hf))  # as published: transformers 5 writes other keys


# -- the reference model


@functools.cache
def native_module():
    """transformers' deepseek_v2 module, patched in the three places where it ignores a field that DeepSeek's released code reads.

    The two equal each other on every published checkpoint.
    """
    import torch
    import transformers
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as native

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 15):
        raise SystemExit(f"transformers is {transformers.__version__}, expected >= 5.15: older ones lack YaRN's softmax factor")
    transformers.utils.logging.disable_progress_bar()

    class Router(native.DeepseekV2TopkRouter):
        def __init__(self, config):
            super().__init__(config)
            self.normalize = config.norm_topk_prob and config.num_experts_per_tok > 1
            if self.normalize:  # the released code normalises instead of scaling; native always scales
                self.routed_scaling_factor = 1.0

        def forward(self, x):
            logits, weights, experts = super().forward(x)
            if self.normalize:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            return logits, weights, experts

    class NoSharedExperts(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    class Moe(native.DeepseekV2Moe):
        def __init__(self, config):
            super().__init__(config)
            if config.n_shared_experts == 0:  # the released code allows null; native always builds them
                self.shared_experts = NoSharedExperts()

    class Layer(native.DeepseekV2DecoderLayer):
        def __init__(self, config, layer_idx):
            super().__init__(config, layer_idx)
            if layer_idx % config.moe_layer_freq:  # the released code keeps these layers dense; native does not look
                self.mlp = native.DeepseekV2MLP(config)

    native.DeepseekV2TopkRouter, native.DeepseekV2Moe, native.DeepseekV2DecoderLayer = Router, Moe, Layer
    return native


def load(directory: Path, dtype: str):
    """The checkpoint as a `DeepseekV2ForCausalLM` in eval mode; exits if a tensor is missing, left over or of another shape."""
    import torch

    model, report = native_module().DeepseekV2ForCausalLM.from_pretrained(
        directory,
        config=native_config(json.loads((Path(directory) / "config.json").read_text())),
        dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    wrong = [*report["missing_keys"], *(k for k in report["unexpected_keys"] if "inv_freq" not in k), *report["mismatched_keys"]]
    if wrong:
        raise SystemExit(f"{directory}: transformers found missing, unexpected or mismatched tensors: {wrong}")
    return (model.float() if dtype == "rounded" else model).eval()


def native_config(hf: dict):
    """transformers' configuration of a config.json, with the released configuration class's defaults, not native's."""
    from transformers import DeepseekV2Config

    hf = {"q_lora_rank": None, "n_routed_experts": None, "n_shared_experts": None, "moe_layer_freq": 1} | hf
    hf = {k: v for k, v in hf.items() if k not in ("model_type", "auto_map", "architectures", "transformers_version")}
    if hf.get("topk_method") == "gready":  # the released class's spelling
        hf["topk_method"] = "greedy"
    if hf["n_routed_experts"] is None:  # every layer is dense; native wants an int
        hf |= {"n_routed_experts": 1, "num_experts_per_tok": 1, "first_k_dense_replace": hf["num_hidden_layers"]}
    hf["n_shared_experts"] = hf["n_shared_experts"] or 0
    return DeepseekV2Config(**hf)


# -- activations


def activations(model, sequences: list[np.ndarray], new_tokens: int) -> dict[str, np.ndarray]:
    """What a model computes for each sequence of token ids [T]; arrays are named by the sequence's index.

    Returns:
        hidden_{i} [L, T, D] and logits_{i} [T, V], float32; greedy_{i} [new_tokens], decoded through the cache with EOS ignored;
        experts_{i} [moe layers, T, K] in no order; moe_layers [moe layers].
    """
    import torch

    hidden, experts, moe_layers, hooks = [], [], [], []
    for index, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(lambda module, args, output: hidden.append(output[0].float().numpy())))
        if hasattr(layer.mlp, "gate"):
            moe_layers.append(index)
            hooks.append(layer.mlp.gate.register_forward_hook(lambda module, args, output: experts.append(output[2].numpy())))
    result = {"moe_layers": np.array(moe_layers, np.int32)}
    with torch.inference_mode():
        chosen = model.config.num_experts_per_tok
        for i, tokens in enumerate(sequences):
            hidden.clear()
            experts.clear()
            logits = model(torch.tensor(tokens[None]).long(), use_cache=False).logits[0]
            result[f"logits_{i}"] = logits.float().numpy()
            result[f"hidden_{i}"] = np.stack(hidden)
            result[f"experts_{i}"] = np.array(experts, np.int32).reshape(len(moe_layers), len(tokens), chosen)
        for hook in hooks:
            hook.remove()
        for i, tokens in enumerate(sequences):
            step, cache, written = torch.tensor(tokens[None]).long(), None, []
            for _ in range(new_tokens):
                output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
                written.append(step.item())
            result[f"greedy_{i}"] = np.array(written, np.int32)
    return result


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    families = commands.add_parser("families", help="write a tiny random checkpoint of every family")
    families.add_argument("out", type=Path)
    run = commands.add_parser("activations", help="write OUT/{name of DIR}-{dtype}.npz for every checkpoint and dtype")
    run.add_argument("--hf", type=Path, nargs="+", required=True)
    run.add_argument("--tokens", type=Path, required=True, help="npz of sequence_0, sequence_1, ...: int32 [T]; new_tokens: int")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--dtype", nargs="+", choices=DTYPES, required=True)
    args = parser.parse_args()
    if args.command == "families":
        write_families(args.out)
        return
    tokens = np.load(args.tokens)
    sequences = [tokens[f"sequence_{i}"] for i in range(len(tokens.files) - 1)]
    args.out.mkdir(parents=True, exist_ok=True)
    for directory in args.hf:
        for dtype in args.dtype:
            arrays = activations(load(directory, dtype), sequences, int(tokens["new_tokens"]))
            np.savez(args.out / f"{directory.name}-{dtype}.npz", **arrays)


if __name__ == "__main__":
    main()
