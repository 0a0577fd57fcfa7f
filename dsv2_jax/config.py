"""The model's configuration and its presets. How a model is trained: train_config.py.

Field names are those of the published config.json, so that a name found there can be used with `--set`. The presets equal
the published configurations; `num_params` and `active_params` give the paper's counts to the digit (tests/test_config.py).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from dsv2_jax.fields import InputError, check_types, field_types, nearest, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN context extension of the rotary frequencies (paper section 3.1.4; arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0  # enters only cos and sin, as the ratio m(mscale) / m(mscale_all_dim)
    mscale_all_dim: float = 0.0  # enters the softmax scale, squared

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "factor", 1 <= self.factor <= 1e6, "in [1, 1e6]")
        require(self, "original_max_position_embeddings", self.original_max_position_embeddings >= 1, ">= 1")
        require(self, "beta_fast", self.beta_fast > 0, "> 0")
        require(self, "beta_slow", 0 < self.beta_slow <= self.beta_fast, "in (0, beta_fast]")
        require(self, "mscale", self.mscale >= 0, ">= 0")
        require(self, "mscale_all_dim", self.mscale_all_dim >= 0, ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a DeepSeek-V2 model. Immutable, validated, hashable (a static argument of `jax.jit`)."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None  # None: queries are not compressed (V2-Lite)
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int  # of the dense layers
    moe_intermediate_size: int  # of one expert
    n_routed_experts: int | None  # None: every layer is dense
    n_shared_experts: int | None  # they are stored and computed as one MLP of n_shared_experts * moe_intermediate_size
    num_experts_per_tok: int
    n_group: int = 1  # the paper's devices D: experts of a group are contiguous
    topk_group: int = 1  # the paper's M: groups a token may reach
    topk_method: str = "greedy"  # greedy | group_limited_greedy
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    rope_theta: float = 10000.0
    rope_scaling: Yarn | None = None
    max_position_embeddings: int = 163840
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    aux_loss_alpha: float = 0.001  # of the released code; the paper's coefficients are TrainConfig's
    seq_aux: bool = True
    bos_token_id: int | None = 100000
    eos_token_id: int | None = 100001

    def __post_init__(self) -> None:
        check_types(self)
        for name, kinds in field_types(ModelConfig).items():
            if kinds == (int,) and name != "first_k_dense_replace":
                require(self, name, 1 <= getattr(self, name) < 2**31, "in [1, 2147483647]")
        for name in ("q_lora_rank", "n_routed_experts", "n_shared_experts"):
            value = getattr(self, name)
            require(self, name, value is None or 1 <= value < 2**31, "null or in [1, 2147483647]")
        require(self, "qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, "even (rotary pairs)")
        require(self, "first_k_dense_replace", self.first_k_dense_replace >= 0, ">= 0")
        require(self, "rope_theta", self.rope_theta > 1, "> 1")
        for name in ("rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            require(self, name, 0 < getattr(self, name) < math.inf, "a finite number > 0")
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 0, "null or >= 0")  # re-saved small models keep the large ids
        require(self, "topk_method", self.topk_method in ("greedy", "group_limited_greedy"), "greedy or group_limited_greedy")
        if self.n_routed_experts is not None:
            require(
                self,
                "n_group",
                self.n_routed_experts % self.n_group == 0,
                f"a divisor of n_routed_experts={self.n_routed_experts}",
            )
            require(self, "topk_group", self.topk_group <= self.n_group, f"<= n_group={self.n_group}")
            reachable = self.n_routed_experts
            if self.topk_method == "group_limited_greedy":
                reachable = self.n_routed_experts // self.n_group * self.topk_group
            require(
                self,
                "num_experts_per_tok",
                self.num_experts_per_tok <= reachable,
                f"<= {reachable}, the experts a token can reach",
            )

    # -- layers

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (0-based) is a mixture of experts; else it is a dense feed-forward layer."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @functools.cached_property
    def runs(self) -> tuple[tuple[str, int, int], ...]:
        """Layers in order as runs of one kind: (stack "dense" or "moe", first index within that stack, number of layers)."""
        runs, seen = [], {"dense": 0, "moe": 0}
        for layer in range(self.num_hidden_layers):
            kind = "moe" if self.is_moe(layer) else "dense"
            if runs and runs[-1][0] == kind:
                runs[-1][2] += 1
            else:
                runs.append([kind, seen[kind], 1])
            seen[kind] += 1
        return tuple(tuple(run) for run in runs)

    def stack_size(self, kind: str) -> int:
        """Number of layers in the "dense" or the "moe" stack."""
        return sum(length for run_kind, _, length in self.runs if run_kind == kind)

    # -- sizes

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Cached elements of one token over all layers: (d_c + d_h^R) l, paper table 1."""
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers

    @property
    def num_params(self) -> int:
        return self._count(self.n_routed_experts or 0) + self.vocab_size * self.hidden_size

    @property
    def active_params(self) -> int:
        """Parameters one token uses, the head included and the input embedding (a table look-up) not."""
        return self._count(self.num_experts_per_tok)

    def _count(self, routed_experts: int) -> int:
        d, n, q = self.hidden_size, self.num_attention_heads, self.q_lora_rank
        query = d * n * self.qk_head_dim if q is None else d * q + q + q * n * self.qk_head_dim
        kv_up = self.kv_lora_rank * n * (self.qk_nope_head_dim + self.v_head_dim)
        kv_down = d * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        attention = query + kv_down + kv_up + n * self.v_head_dim * d + 2 * d  # with the layer's two norms
        moe = 3 * d * self.moe_intermediate_size * (routed_experts + (self.n_shared_experts or 0)) + d * (
            self.n_routed_experts or 0
        )
        layers = self.stack_size("dense") * 3 * d * self.intermediate_size + self.stack_size("moe") * moe
        return self.num_hidden_layers * attention + layers + d + self.vocab_size * d

    def flops_per_token(self, seq_len: int) -> int:
        """Model FLOPs of forward and backward for one token of a sequence of `seq_len`.

        The README's MFU convention: active parameters with the head, causal attention counted half, no recomputation.
        """
        attention = self.num_attention_heads * (self.qk_head_dim + self.v_head_dim) * seq_len  # forward: 2 FLOP/MAC, half masked
        return 6 * self.active_params + 3 * self.num_hidden_layers * attention

    # -- config.json

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a published or re-saved config.json. Absent fields take the released configuration class's defaults.

        An absent `q_lora_rank` means null: dumpers drop nulls, and every published model with compression states its rank.

        Raises:
            InputError: a field has the wrong type, an impossible value, or asks for something DeepSeek-V2 is not.
        """
        model_type = hf.get("model_type", "deepseek_v2")
        if model_type not in ("deepseek_v2", "deepseek"):  # "deepseek": the first upload of V2, renamed the same day
            raise InputError(f"config.json: model_type is {model_type!r}, expected 'deepseek_v2'")
        refused = {
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "tie_word_embeddings": (False, None),
            "hidden_act": ("silu", None),
            "scoring_func": ("softmax", None),
            "num_key_value_heads": (hf.get("num_attention_heads"), None),
        }
        for name, allowed in refused.items():
            if hf.get(name) not in allowed:
                raise InputError(f"config.json: {name} is {hf[name]!r}, expected {allowed[0]!r} (all DeepSeek-V2 models have it)")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # transformers 5 renamed it and put theta inside
        if not isinstance(rope, Mapping):
            raise InputError(f"config.json: rope_scaling is {rope!r}, expected an object or null")
        values = {f.name: hf[f.name] for f in dataclasses.fields(cls) if f.name in hf}
        values.setdefault("q_lora_rank", None)
        values.setdefault("n_routed_experts", None)
        values.setdefault("n_shared_experts", None)
        values.setdefault("max_position_embeddings", 2048)
        if values["n_routed_experts"] is None:
            values.setdefault("num_experts_per_tok", 1)
            values.setdefault("moe_intermediate_size", 1407)
        for name in ("n_group", "topk_group", "num_experts_per_tok"):  # null in dense and in greedy configurations
            if values.get(name, 0) is None:
                values[name] = 1
        if values.get("topk_method") == "gready":  # the released class's spelling
            values["topk_method"] = "greedy"
        if isinstance(values.get("eos_token_id"), list):
            raise InputError(f"config.json: eos_token_id is {values['eos_token_id']!r}, expected one id")
        values["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
        values["rope_scaling"] = _yarn_from_hf(rope)
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise InputError(f"config.json: missing {', '.join(missing)}")
        return cls(**values)

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """A config.json that `from_hf` reads back to an equal configuration. `dtype`: of the weights beside it."""
        hf: dict[str, Any] = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2"}
        hf |= dataclasses.asdict(self)
        if self.rope_scaling:
            hf["rope_scaling"] = {"type": "yarn"} | dataclasses.asdict(self.rope_scaling)
        return hf | {
            "num_key_value_heads": self.num_attention_heads,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "scoring_func": "softmax",
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": dtype,
        }


def _yarn_from_hf(rope: Mapping[str, Any]) -> Yarn | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise InputError(f"config.json: rope_scaling type is {kind!r}, expected 'yarn' or null")
    names = {f.name for f in dataclasses.fields(Yarn)}
    for name in ("factor", "original_max_position_embeddings"):
        if rope.get(name) is None:
            raise InputError(f"config.json: rope_scaling has no {name}, expected a number")
    unsupported = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}
    for name, only in unsupported.items():
        if rope.get(name, only) not in (only, None):
            raise InputError(f"config.json: rope_scaling.{name} is {rope[name]!r}, expected {only!r} or absent")
    return Yarn(**{name: rope[name] for name in names if rope.get(name) is not None})


def v2() -> ModelConfig:
    """DeepSeek-V2, 236B parameters of which 21B are active (paper section 3.1.2)."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        n_group=8,
        topk_group=3,
        topk_method="group_limited_greedy",
        routed_scaling_factor=16.0,
        first_k_dense_replace=1,
        rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    )


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite, 15.7B parameters of which 2.4B are active (paper appendix B)."""
    return dataclasses.replace(
        v2(),
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
    )


def tiny() -> ModelConfig:
    """Every mechanism of the 236B model at a size that trains visibly in two minutes on two CPU cores."""
    return dataclasses.replace(
        v2(),
        vocab_size=2048,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=384,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=4.0,
        rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=512, mscale=0.707, mscale_all_dim=0.707),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )


PRESETS = {"tiny": tiny, "v2_lite": v2_lite, "v2": v2}


def preset(name: str) -> ModelConfig:
    """The named model configuration; InputError names the nearest preset."""
    if name not in PRESETS:
        raise InputError(f"--preset={name}: unknown preset{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}")
    return PRESETS[name]()
