"""This program against arrays that PyTorch wrote (golden/write_golden.py); `make parity` does the same live, and more."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv2_jax import completion, convert, model
from dsv2_jax.config import ModelConfig
from dsv2_jax.parity_reference import write_checkpoint
from dsv2_jax.rope import cos_sin, inverse_frequencies, softmax_scale
from sharding.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ("v2", "esft", "unequal_mscale", "norm_topk_prob", "moe_layer_freq", "no_shared_experts")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_float32_equals_pytorch(name, tmp_path):
    golden = np.load(GOLDEN / f"{name}.npz")
    write_checkpoint(tmp_path / name, json.loads(str(golden["config"])), int(golden["seed"]))
    sequences = [golden["tokens_0"], golden["tokens_1"]]
    with jax.set_mesh(make_mesh()):
        decoder = model.load(convert.open_checkpoint(tmp_path / name), "float32")
        for i, tokens in enumerate(sequences):
            trace = model.trace(decoder, tokens[None])
            stored = golden[f"logits_{i}"].shape[0]
            assert np.abs(trace.logits[0, -stored:] - golden[f"logits_{i}"]).max() <= 5e-4
            for ours, reference in zip(trace.hidden, golden[f"hidden_{i}"], strict=True):
                assert np.linalg.norm(ours[0, -stored:] - reference) <= 1e-5 * np.linalg.norm(reference)
            assert sorted(trace.experts) == golden["moe_layers"].tolist()
            for layer, reference in zip(golden["moe_layers"].tolist(), golden[f"experts_{i}"]):
                np.testing.assert_array_equal(np.sort(trace.experts[layer][0], -1), reference)
        greedy = [golden["greedy_0"].tolist(), golden["greedy_1"].tolist()]
        assert completion.greedy(decoder, [tokens.tolist() for tokens in sequences], len(greedy[0])) == greedy


@pytest.mark.parametrize("name", ["plain", "v2", "v2_5", "unequal"])
def test_rope_equals_pytorch(name):
    golden = np.load(GOLDEN / "rope.npz")
    cfg = ModelConfig.from_hf(json.loads(str(golden[f"{name}.config"])))
    np.testing.assert_allclose(inverse_frequencies(cfg), golden[f"{name}.inv_freq"], rtol=3e-7)
    assert softmax_scale(cfg) == pytest.approx(float(golden[f"{name}.softmax_scale"]), rel=1e-12)
    cos, sin = cos_sin(cfg, np.zeros((1, 1), np.int32))
    np.testing.assert_allclose(cos, float(golden[f"{name}.ratio"]), rtol=1e-7)
    assert not sin.any()
