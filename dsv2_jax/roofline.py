"""How long a step should take: of training, on so many GPUs, from the configuration alone; of decoding, at the least.

The speeds were measured (benchmarks of one H200 and of two); what was not is marked as assumed, and `dry_run` prints it.
"""

from typing import Any, NamedTuple

import jax

from dsv2_jax.config import ModelConfig
from dsv2_jax.router import reach
from dsv2_jax.train_config import TrainConfig
from sharding.expert_parallel import default_dispatch, slots_per_device

HOST = 8  # GPUs of a host, joined by NVLink
MATMUL_SHARE = 0.40  # of `Gpu.matmul` over a whole step, assumed: Hugging Face's V2-Lite step was measured at 289 TFLOP/s


class Gpu(NamedTuple):
    """A kind of GPU: what it has, and the speeds it reaches, measured on an H200. An H100 is the same chip with other memory."""

    usable: float  # bytes: 95% of what CUDA sees
    specified: float  # bytes/s of memory
    copy: float  # bytes/s of memory
    matmul: float = 725e12  # FLOP/s of one large bfloat16 product
    matmul_fp8: float = 1486e12  # ... of one in 8 bits
    exchange: float = 322e9  # bytes/s a GPU sends over NVLink in an all_to_all
    gather: float = 289e9  # ... in an all_gather
    scatter: float = 264e9  # ... in a sum over devices
    network: float = 50e9  # ... to other hosts, assumed: an InfiniBand adapter of 400 Gb/s each


ATTENTION = 660e12  # FLOP/s of absorbed decode on an H200: what FlashMLA's authors give for it

GPUS = {"h200": Gpu(142.6e9, 4.8e12, 4.28e12), "h100": Gpu(80.7e9, 3.35e12, 2.99e12)}


def counts(model: ModelConfig) -> tuple[int, int, int]:
    """Parameters: of routed experts, of everything else in layers, of embedding, head and last norm."""
    experts = model.stack_size("moe") * (model.n_routed_experts or 0) * 3 * model.hidden_size * model.moe_intermediate_size
    ends = (2 * model.vocab_size + 1) * model.hidden_size
    return experts, model.num_params - experts - ends, ends


class Wire(NamedTuple):
    """Bytes a device sends for one microbatch."""

    rows: float  # tokens to their experts and back, in both passes
    gather: float  # weights over all devices
    scatter: float  # their gradients
    gather_experts: float  # the routed experts, over the data axis
    scatter_experts: float


def wire_bytes(model: ModelConfig, train: TrainConfig, data: int, expert: int) -> Wire:
    """What the program has to send; what the compiled one does send is for `parse_collectives` to tell."""
    width, gathers = 2 if train.dtype == "bfloat16" else 4, 2 if train.zero == 3 else 1
    experts, layers, ends = counts(model)
    slots = train.micro_batch // (data * expert) * train.seq_len
    if experts and expert > 1 and (train.dispatch or default_dispatch(expert)) == "all_to_all":
        slots = slots_per_device(slots, expert, reach(model, expert)[1])
    row = (
        4 * model.hidden_size * width + 2 * 8 * model.num_experts_per_tok
    )  # there and back, twice; ids and weights, at most twice
    over_all, over_data = width * (1 - 1 / (data * expert)), width / expert * (1 - 1 / data)
    return Wire(
        rows=model.stack_size("moe") * (expert - 1) * slots * row,
        gather=(gathers * layers + ends) * over_all,
        scatter=(layers + ends) * over_all,
        gather_experts=gathers * experts * over_data,
        scatter_experts=experts * over_data,
    )


def resident(model: ModelConfig, train: TrainConfig, data: int, expert: int) -> float:
    """The bytes of a device that depend on the mesh: what is cut over it and, under ZeRO-1, a microbatch's gathered weights."""
    experts, layers, _ = counts(model)
    narrow = train.dtype == "bfloat16"
    each = 16 + 2 * narrow + 4 * (train.microbatches > 1)  # weights, moments, gradient; a bfloat16 copy; the gradients' sum
    gathered = (layers + experts / expert) * (2 if narrow else 4)
    return each * model.num_params / (data * expert) + (gathered if train.zero == 1 else 0)


class Step(NamedTuple):
    """Seconds of a step's parts, each by itself."""

    compute: float
    exchange: float  # of rows
    zero: float  # gathers and scatters
    optimizer: float

    @property
    def serial(self) -> float:
        """Nothing hidden."""
        return sum(self)

    @property
    def overlapped(self) -> float:
        """Computation and traffic hide each other."""
        return max(self.compute, self.exchange + self.zero) + self.optimizer


def recomputed(train: TrainConfig) -> float:
    """FLOPs computed for one of the model's: with full remat the forward pass runs twice."""
    return 4 / 3 if train.remat == "full" else 1.0


def predict(model: ModelConfig, train: TrainConfig, data: int, expert: int, gpu: Gpu) -> Step:
    """Work over speed, part by part."""
    wire, count, devices = wire_bytes(model, train, data, expert), train.microbatches, data * expert

    def speed(nvlink: float, stride: int, size: int) -> float:
        """Of a ring through `size` devices, `stride` apart; where it leaves a host, through the adapters of its devices there."""
        return nvlink if stride * size <= HOST else min(nvlink, gpu.network * max(HOST // stride, 1))

    exchange = gpu.exchange if expert <= HOST else min(gpu.exchange, gpu.network * (expert - 1) / (expert - HOST))
    zero = wire.gather / speed(gpu.gather, 1, devices) + wire.scatter / speed(gpu.scatter, 1, devices)
    zero += wire.gather_experts / speed(gpu.gather, expert, data) + wire.scatter_experts / speed(gpu.scatter, expert, data)
    flops = train.batch_size * train.seq_len * model.flops_per_token(train.seq_len) / devices * recomputed(train)
    touched = 32 + 12 * count * (count > 1)  # bytes a parameter: the norm, AdamW; adding up
    return Step(
        compute=flops / (gpu.matmul * MATMUL_SHARE),
        exchange=count * wire.rows / exchange,
        zero=count * zero,
        optimizer=touched * model.num_params / devices / gpu.copy,
    )


def gpu_of(device_kind: str) -> Gpu | None:
    """The kind of GPU that JAX calls so; None: not known."""
    return next((gpu for name, gpu in GPUS.items() if name in device_kind.lower()), None)


class WeightBytes(NamedTuple):
    """Bytes of weights that a decode step may read."""

    experts: float  # all routed ones
    rest: float  # without the embedding, of which a step reads a row a token
    fp8: bool  # whether they multiply in 8 bits


def weight_bytes(model: Any) -> WeightBytes:
    """The model's weights as they are stored."""
    sizes = {path: leaf.nbytes for path, leaf in jax.tree.leaves_with_path(model)}
    experts = sum(size for path, size in sizes.items() if "experts" in jax.tree_util.keystr(path))
    return WeightBytes(experts, sum(sizes.values()) - experts - model.embed.nbytes, model.weights_dtype == "fp8")


class DecodeFloor(NamedTuple):
    """The least seconds a decode step takes."""

    bandwidth: float  # to read weights and cache once
    joint: float  # to read and to multiply, each part bound by the slower of the two


def decode_floor(
    model: ModelConfig, weights: WeightBytes, batch: int, context: int, distinct: float, cache_bytes: int, devices: int, gpu: Gpu
) -> DecodeFloor:
    """Of `batch` requests with `context` tokens each (`cache_bytes` bytes a token), whose tokens use `distinct` experts of a layer.

    Requests and experts are split over the devices, all other weights are read by each.
    """
    used = distinct / model.n_routed_experts if model.n_routed_experts else 0
    read = (weights.rest + weights.experts * used / devices) / gpu.copy
    cache = batch / devices * context * cache_bytes / gpu.copy
    multiply = batch / devices * 2 * (model.active_params - model.vocab_size * model.hidden_size)
    multiply /= gpu.matmul_fp8 if weights.fp8 else gpu.matmul
    heads, latent, rope = model.num_attention_heads, model.kv_lora_rank, model.qk_rope_head_dim
    attend = batch / devices * context * model.num_hidden_layers * 2 * heads * (2 * latent + rope) / ATTENTION
    return DecodeFloor(read + cache, max(read, multiply) + max(cache, attend))
