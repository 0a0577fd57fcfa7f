"""Configurations against the published files and counts; every refusal names the field."""

import dataclasses

import pytest

from dsv2_jax import config
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError, override

# config.json of DeepSeek-V2 and what V2-Lite changes, as published (spec section 1.1).
V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 5120,
    "num_hidden_layers": 60, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3,
    "topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 16.0, "scoring_func": "softmax",
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
    "tie_word_embeddings": False, "bos_token_id": 100000, "eos_token_id": 100001, "initializer_range": 0.02, "pretraining_tp": 1,
    "use_cache": True, "torch_dtype": "bfloat16", "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM"},
}  # fmt: skip
LITE = V2 | {
    "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "routed_scaling_factor": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "name, hf, total, active, kv",
    [("v2", V2, 235_741_434_880, 20_851_512_320, 34_560), ("v2_lite", LITE, 15_706_484_224, 2_451_435_008, 15_552)],
)
def test_presets_are_the_published_models(name, hf, total, active, kv):
    cfg = config.preset(name)
    assert ModelConfig.from_hf(hf) == cfg
    assert ModelConfig.from_hf(cfg.to_hf("bfloat16")) == cfg
    assert (cfg.num_params, cfg.active_params, cfg.kv_elements_per_token) == (total, active, kv)


def test_flops_per_token_reproduce_a_published_ratio():
    # Hugging Face's 62.6K tokens/s on six V2-Lite layers at 4096 are 289 TFLOP/s by the same convention (measured on H200).
    cfg = dataclasses.replace(config.v2_lite(), num_hidden_layers=6)
    assert 62.6e3 * cfg.flops_per_token(4096) == pytest.approx(289e12, rel=0.002)


def test_families():
    yarn = V2["rope_scaling"]
    v25 = ModelConfig.from_hf(V2 | {"rope_scaling": yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}})
    assert (v25.rope_scaling.mscale, v25.rope_scaling.mscale_all_dim) == (1.0, 1.0)
    esft = ModelConfig.from_hf(LITE | {"rope_scaling": None, "max_position_embeddings": 4096})
    assert esft.rope_scaling is None and esft.max_position_embeddings == 4096
    assert ModelConfig.from_hf(LITE | {"topk_method": "gready"}) == config.v2_lite()
    assert ModelConfig.from_hf({k: v for k, v in LITE.items() if k != "q_lora_rank"}) == config.v2_lite()
    assert ModelConfig.from_hf(V2 | {"model_type": "deepseek"}) == config.v2()
    unequal = ModelConfig.from_hf(V2 | {"rope_scaling": yarn | {"mscale": 1.0}})
    assert (unequal.rope_scaling.mscale, unequal.rope_scaling.mscale_all_dim) == (1.0, 0.707)
    # absent mscales: the released code's defaults
    bare = ModelConfig.from_hf(V2 | {"rope_scaling": {k: v for k, v in yarn.items() if "mscale" not in k}}).rope_scaling
    assert (bare.mscale, bare.mscale_all_dim) == (1.0, 0.0)


def test_transformers_5_spelling():
    renamed = {k: v for k, v in V2.items() if k not in ("rope_scaling", "rope_theta")}
    yarn = {k: v for k, v in V2["rope_scaling"].items() if k != "type"} | {"rope_type": "yarn", "rope_theta": 10000.0}
    assert ModelConfig.from_hf(renamed | {"rope_parameters": yarn}) == config.v2()
    plain = ModelConfig.from_hf(renamed | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}})
    assert (plain.rope_scaling, plain.rope_theta) == (None, 500.0)


def test_layer_kinds():
    cfg = config.tiny()
    assert cfg.runs == (("dense", 0, 1), ("moe", 0, 3))
    every_other = dataclasses.replace(cfg, num_hidden_layers=6, moe_layer_freq=2, first_k_dense_replace=1)
    assert [every_other.is_moe(i) for i in range(6)] == [False, False, True, False, True, False]
    assert every_other.runs == (("dense", 0, 2), ("moe", 0, 1), ("dense", 2, 1), ("moe", 1, 1), ("dense", 3, 1))
    assert dataclasses.replace(cfg, n_routed_experts=None).runs == (("dense", 0, 4),)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"hidden_size": "5120"}, "hidden_size is '5120'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 2**63}, "hidden_size is 9223372036854775808"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_experts_per_tok": 61}, "num_experts_per_tok is 61, expected <= 60"),
        ({"topk_group": 9}, "topk_group is 9, expected <= n_group=8"),
        ({"n_group": 7}, "n_group is 7, expected a divisor of n_routed_experts=160"),
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63, expected even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling type is 'linear'"),
        ({"rope_scaling": V2["rope_scaling"] | {"factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "no original_max_position_embeddings"),
        ({"rope_scaling": 4}, "rope_scaling is 4"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
    ],
)
def test_impossible_values_are_refused_by_name(change, told):
    with pytest.raises(InputError, match=told.replace("(", r"\(")):
        ModelConfig.from_hf(V2 | change)


def test_missing_fields_are_listed():
    with pytest.raises(InputError, match="missing vocab_size, hidden_size"):
        ModelConfig.from_hf({})


def test_overrides():
    (cfg,) = override([config.v2()], ["num_hidden_layers=3", "q_lora_rank=null", "rope_scaling.factor=8", "norm_topk_prob=true"])
    assert (cfg.num_hidden_layers, cfg.q_lora_rank, cfg.rope_scaling.factor, cfg.norm_topk_prob) == (3, None, 8.0, True)


@pytest.mark.parametrize(
    "assignment, told",
    [
        ("hiden_size=4", "unknown field 'hiden_size', did you mean 'hidden_size'"),
        ("hidden_size", "expected FIELD=VALUE"),
        ("hidden_size=big", "expected int"),
        ("hidden_size=null", "expected int"),
        ("norm_topk_prob=1", "expected bool"),
        ("rope_scaling.facto=8", "has no field 'facto', did you mean 'factor'"),
        ("rope_scaling=8", "expected Yarn or null"),
        ("topk_group=9", "topk_group is 9"),
    ],
)
def test_bad_overrides_are_refused(assignment, told):
    with pytest.raises(InputError, match=told):
        override([config.v2()], [assignment])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'v2_lite'"):
        config.preset("v2-lite")
