"""Writes the golden arrays beside this file, with PyTorch: `python tests/golden/write_golden.py` in the environment of
tests/reference_requirements.txt. Weights are not stored: `random_weight` draws them again from names and a seed.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from dsv2_jax import parity_reference as reference

CHECKPOINTS = ("v2", "esft", "unequal_mscale", "norm_topk_prob", "moe_layer_freq", "no_shared_experts")
LENGTHS = (2, 131)  # the original window is 64 tokens
NEW_TOKENS = 8
STORED = 16  # the last positions of each sequence; experts of all
MSCALES = {"plain": None, "v2": (0.707, 0.707), "v2_5": (1.0, 1.0), "unequal": (0.707, 1.0)}


def write_checkpoint_runs() -> None:
    """{checkpoint}.npz: config (JSON), seed, new_tokens, and per sequence tokens, logits, hidden, experts, greedy."""
    for seed, name in enumerate(CHECKPOINTS):
        hf = reference.FAMILIES[name]
        rng = np.random.default_rng(seed)
        sequences = [rng.integers(0, hf["vocab_size"], length, dtype=np.int32) for length in LENGTHS]
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / name
            reference.write_checkpoint(directory, hf, seed)
            arrays = reference.activations(reference.load(directory, "float32"), sequences, NEW_TOKENS)
        for i, tokens in enumerate(sequences):
            arrays[f"tokens_{i}"] = tokens
            arrays[f"logits_{i}"] = arrays[f"logits_{i}"][-STORED:]
            arrays[f"hidden_{i}"] = arrays[f"hidden_{i}"][:, -STORED:]
            arrays[f"experts_{i}"] = np.sort(arrays[f"experts_{i}"]).astype(np.uint8)
        np.savez_compressed(HERE / f"{name}.npz", config=json.dumps(hf), seed=seed, **arrays)


def write_rope() -> None:
    """rope.npz: V2's published rotary embedding, and the same under other mscales: inv_freq, softmax_scale, ratio of cos and sin."""
    native, arrays = reference.native_module(), {}
    for name, mscales in MSCALES.items():
        hf = reference.FAMILIES["v2"] | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "max_position_embeddings": 163840}
        hf["rope_scaling"] = mscales and hf["rope_scaling"] | {
            "original_max_position_embeddings": 4096,
            "mscale": mscales[0],
            "mscale_all_dim": mscales[1],
        }
        config = reference.native_config(hf)
        rotary = native.DeepseekV2RotaryEmbedding(config)
        arrays[f"{name}.config"] = json.dumps(hf)
        arrays[f"{name}.inv_freq"] = rotary.inv_freq.numpy()
        arrays[f"{name}.ratio"] = rotary.attention_scaling
        arrays[f"{name}.softmax_scale"] = native.DeepseekV2Attention(config, 0).scaling
    np.savez_compressed(HERE / "rope.npz", **arrays)


if __name__ == "__main__":
    write_checkpoint_runs()
    write_rope()
