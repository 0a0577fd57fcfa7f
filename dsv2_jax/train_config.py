"""How a model is trained: the settings, what they mean for batches and the learning rate, and the presets."""

import bisect
import dataclasses
import functools

from dsv2_jax.config import preset
from dsv2_jax.fields import check_types, field_types, require
from sharding.expert_parallel import DISPATCHES


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
    remat: str = "full"  # none | elementwise | full: what the backward pass computes again: all but matmuls, or each layer
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
        require(self, "remat", self.remat in ("none", "elementwise", "full"), "none, elementwise or full")
        require(self, "balance", self.balance in ("paper", "released"), "paper or released")
        require(self, "zero", self.zero in (1, 3), "1 or 3")
        require(self, "dispatch", self.dispatch in (None, *DISPATCHES), f"null or one of {', '.join(DISPATCHES)}")

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
