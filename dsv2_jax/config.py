"""What is configured: the model (`ModelConfig`), the run (`TrainConfig`), and their presets.

Field names are those of the published config.json, so that a name found there can be used with `--set`. The presets equal
the published configurations; `num_params` and `active_params` give the paper's counts to the digit (tests/test_config.py).
"""

import bisect
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained; the defaults are the 236B model's (paper section 3.1.2). Immutable, validated, hashable."""

    dtype: str = "bfloat16"  # of weights and activations in a step; the master weights are always float32
    seed: int = 0
    batch_size: int = 9216  # sequences
    micro_batch_size: int | None = None  # sequences that are computed at a time; null: the whole batch, or a ramp's first
    ramp_from: int | None = None  # the first batch size; it grows to batch_size in proportion to the tokens seen
    ramp_tokens: float = 225e9  # ... over so many tokens
    seq_len: int = 4096
    learning_rate: float = 2.4e-4  # the highest
    warmup_steps: int = 2000
    schedule_steps: int = 214_500  # the schedule's length, whatever --steps is; 8.1T tokens without a ramp
    first_decay: float = 0.6  # shares of the schedule's tokens after which the learning rate is multiplied with decay_factor
    second_decay: float = 0.9
    decay_factor: float = 0.316
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # not of norms
    clip_norm: float = 1.0
    balance: str = "paper"  # paper: the three losses below; released: the released code's, by the model's aux_loss_alpha, seq_aux
    expert_balance: float = 0.003  # alpha_1
    device_balance: float = 0.05  # alpha_2
    comm_balance: float = 0.02  # alpha_3
    capacity_factor: float | None = 1.0  # of a group's budget of token-expert pairs (section 2.2.4); null: nothing is dropped
    drop_pool: int = 8  # consecutive sequences that share a budget
    exempt_share: float = 0.1  # of sequences, of which nothing is dropped
    remat: str = "full"  # none | full: recompute each layer in the backward pass
    zero: int = 1  # 1 | 3: of a layer's gathered weights, keep them for the backward pass | gather them again
    dispatch: str | None = None  # all_to_all | all_gather; null: the faster one at this mesh
    max_skipped: int = 10  # steps in a row whose loss or gradient is not finite, after which training ends
    checkpoint_every: int = 500  # steps; the last one always
    keep_checkpoints: int = 2
    fall_back: bool = False  # go on from the newest checkpoint that is undamaged, the later ones moved aside
    log_every: int = 1
    load_every: int = 100  # steps; every expert's load is logged
    eval_every: int = 500  # steps; the loss on --eval_data

    def __post_init__(self) -> None:
        check_types(self)
        for name, kinds in field_types(TrainConfig).items():
            if kinds == (int,) and name not in ("seed", "warmup_steps", "zero"):
                require(self, name, 1 <= getattr(self, name) < 2**31, "in [1, 2147483647]")
        for name in ("learning_rate", "decay_factor", "epsilon", "clip_norm", "ramp_tokens"):
            require(self, name, getattr(self, name) > 0, "> 0")
        require(self, "seed", 0 <= self.seed < 2**32, "in [0, 4294967295]")
        for name in ("warmup_steps", "weight_decay", "expert_balance", "device_balance", "comm_balance"):
            require(self, name, getattr(self, name) >= 0, ">= 0")
        first = self.ramp_from is None or 1 <= self.ramp_from <= self.batch_size
        require(self, "ramp_from", first, f"null or in [1, batch_size={self.batch_size}]")
        sizes = [self.batch_size] if self.ramp_from is None else [self.batch_size, self.ramp_from]
        divides = self.micro_batch >= 1 and all(size % self.micro_batch == 0 for size in sizes)
        require(self, "micro_batch_size", divides, f"null or a divisor of {' and '.join(map(str, sizes))}")
        require(self, "capacity_factor", self.capacity_factor is None or self.capacity_factor > 0, "null or > 0")
        if self.capacity_factor is not None:
            pools = self.micro_batch % self.drop_pool == 0
            told = f"a divisor of the {self.micro_batch} sequences computed at a time (capacity_factor=null drops nothing)"
            require(self, "drop_pool", pools, told)
        require(self, "exempt_share", 0 <= self.exempt_share <= 1, "in [0, 1]")
        for name in ("beta1", "beta2"):
            require(self, name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        require(self, "first_decay", 0 <= self.first_decay <= self.second_decay, "in [0, second_decay]")
        require(self, "dtype", self.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
        require(self, "remat", self.remat in ("none", "full"), "none or full")
        require(self, "balance", self.balance in ("paper", "released"), "paper or released")
        require(self, "zero", self.zero in (1, 3), "1 or 3")
        require(self, "dispatch", self.dispatch in (None, "all_to_all", "all_gather"), "null, all_to_all or all_gather")

    # -- batches

    @property
    def micro_batch(self) -> int:
        """Sequences computed at a time."""
        return self.micro_batch_size if self.micro_batch_size is not None else self.ramp_from or self.batch_size

    @property
    def microbatches(self) -> int:
        """Of a full batch."""
        return self.batch_size // self.micro_batch

    @functools.cached_property
    def _ramp(self) -> list[int]:
        """Sequences seen before each step of the ramp, and before the first step after it."""
        seen = [0]
        while self.ramp_from is not None and len(seen) <= self.schedule_steps:
            size = self._ramp_size(seen[-1])
            if size == self.batch_size:
                break
            seen.append(seen[-1] + size)
        return seen

    def _ramp_size(self, seen: int) -> int:
        size = self.ramp_from + (self.batch_size - self.ramp_from) * seen * self.seq_len / self.ramp_tokens
        return int(min(size, self.batch_size)) // self.micro_batch * self.micro_batch

    def sequences_before(self, step: int) -> int:
        """Sequences that the steps before number `step`, counted from 1, have used."""
        ramp = self._ramp
        return ramp[step - 1] if step <= len(ramp) else ramp[-1] + (step - len(ramp)) * self.batch_size

    def batch_at(self, step: int) -> int:
        """Sequences of step number `step`."""
        return self.sequences_before(step + 1) - self.sequences_before(step)

    @property
    def last_steps_before_drops(self) -> tuple[int, ...]:
        """The steps after which the learning rate falls: the last that begin within their share of the schedule's tokens."""
        total = self.sequences_before(self.schedule_steps + 1)
        steps = range(1, self.schedule_steps + 1)
        shares = (self.first_decay, self.second_decay)
        return tuple(bisect.bisect_left(steps, round(share * total), key=self.sequences_before) for share in shares)


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


def train_preset(name: str) -> TrainConfig:
    """How the named model is trained: as in the paper (appendix B for Lite), or in two minutes on two CPU cores."""
    preset(name)  # refuses an unknown one
    v2 = {"ramp_from": 2304, "schedule_steps": 223_190}  # 8.1T tokens, the ramp going up in steps of 2304
    lite = {"batch_size": 4608, "learning_rate": 4.2e-4, "schedule_steps": 302_000, "first_decay": 0.8, "expert_balance": 0.001}
    lite |= {"device_balance": 0.0, "comm_balance": 0.0, "capacity_factor": None}  # a layer's experts lie on one device
    tiny = {"dtype": "float32", "batch_size": 16, "seq_len": 128, "learning_rate": 6e-3, "warmup_steps": 30}
    tiny |= {"schedule_steps": 300, "remat": "none", "checkpoint_every": 50, "load_every": 10, "eval_every": 50}
    return TrainConfig(**{"v2": v2, "v2_lite": lite, "tiny": tiny}[name])


def finetuning() -> TrainConfig:
    """How training goes on from a checkpoint: the paper's rate (section 4.1) held constant, at a batch that one machine runs, the
    released code's balance loss, nothing dropped."""
    released = {"balance": "released", "capacity_factor": None}
    steps = {"warmup_steps": 20, "schedule_steps": 1000, "checkpoint_every": 100}
    return TrainConfig(batch_size=8, learning_rate=5e-6, decay_factor=1.0, **steps, **released)
