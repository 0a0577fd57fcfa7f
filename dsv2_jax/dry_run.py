"""Training on GPUs that are not there: the step compiled for them, what it needs of each, and how fast it should run.

`absent_mesh` stands in for the GPUs. With the CUDA wheels XLA compiles for the named GPU, and needs neither GPU nor driver;
without them it compiles for fake CPU devices, and bytes are approximate. Nothing of the model's size is ever allocated.
"""

import collections
import dataclasses
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from dsv2_jax import train_state
from dsv2_jax.collectives import Collective, parse_collectives
from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError, nearest
from dsv2_jax.metrics import PEAK_FLOPS
from dsv2_jax.roofline import GPUS, HOST, MATMUL_SHARE, Gpu, Step, predict, recomputed, resident
from dsv2_jax.train_config import TrainConfig
from sharding.mesh import make_mesh

FILE = "plan.md"
PLANNED = (8, 64, 1024)  # GPUs

# What XLA asks of a GPU, but for its memory.
TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f}
  runtime_version: "13.0.0" driver_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
device_description_str: "NVIDIA {name}"
"""


def default_shape(gpus: int) -> tuple[int, int]:
    """(data, expert) for so many GPUs, the expert axis within a host."""
    expert = math.gcd(gpus, HOST)
    return gpus // expert, expert


def absent_mesh(gpus: int | None, gpu: str, shape: tuple[int, int] | None = None) -> jax.sharding.Mesh:
    """A mesh of devices to compile for. To be called before anything asks JAX for its devices.

    Args:
        gpus: how many; more than HOST fill hosts. None: as many as `shape` has.
        gpu: one of GPUS.
        shape: (data, expert); None is `default_shape`.

    Raises:
        InputError: an unknown GPU, neither a number nor a shape, hosts that are not full, or a shape of another number of devices.
    """
    if gpu not in GPUS:
        raise InputError(f"--gpu={gpu}: unknown GPU{nearest(gpu, GPUS)}; known: {', '.join(GPUS)}")
    gpus = math.prod(shape) if gpus is None and shape else gpus
    if gpus is None:
        raise InputError("--dry_run needs --gpus or --mesh")
    if gpus > HOST and gpus % HOST:
        raise InputError(f"--gpus={gpus}: expected a multiple of {HOST}, the GPUs of a host, or fewer")
    data, expert = shape or default_shape(gpus)
    if data * expert != gpus:
        raise InputError(f"--mesh=data={data},expert={expert}: {data * expert} devices, expected the {gpus} of --gpus")
    jax.config.update("jax_platforms", "cpu")
    target = TARGET.format(bandwidth=GPUS[gpu].specified, memory=GPUS[gpu].usable / 0.95, name=gpu.upper())
    hosts = f"1x{max(gpus // HOST, 1)}x{min(gpus, HOST)}"  # NVLink domains beyond a host x hosts x GPUs of a host
    try:
        devices = topologies.get_topology_desc(platform="cuda", target_config=target, topology=hosts).devices
        jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent GPUs cannot be read back
    except NotImplementedError:  # no CUDA wheels
        jax.config.update("jax_num_cpu_devices", gpus)
        devices = jax.devices()
    return make_mesh(data, expert, devices)


def full_batch(train: TrainConfig, micro_batch: int) -> TrainConfig:
    """The recipe after its ramp, with so many sequences at a time; the batch is rounded up to whole microbatches."""
    batch = -(-train.batch_size // micro_batch) * micro_batch
    return dataclasses.replace(train, ramp_from=None, micro_batch_size=micro_batch, batch_size=batch)


def bytes_at_rest(tree: Any) -> int:
    """What a device holds of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# -- what is printed, in Markdown


def table(*rows: Iterable[Any]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(list(rows[0])) + "|", *lines[1:]])


def fit(size: float, gpu: Gpu) -> str:
    return f"{size / 2**30:.1f}, {'fits' if size <= gpu.usable else 'does not fit'}"


def traffic(collectives: Iterable[Collective]) -> str:
    """Collectives by kind and group."""
    sums = collections.defaultdict(lambda: np.zeros(2))
    for one in collectives:
        hosts = len({place // HOST for place in one.group})
        kind = one.kind if one.certain else f"{one.kind}, in loops whose length the data decides: one iteration"
        sums[kind, f"{len(one.group)} on {hosts} host{'s' * (hosts > 1)}"] += one.times, one.sent
    rows = ((*key, f"{times:.0f}", f"{sent / 1e9:.3f}") for key, (times, sent) in sorted(sums.items()))
    return table(("collective", "devices", "times a step", "GB a device sends a step"), *rows)


def plan(model: ModelConfig, train: TrainConfig, gpu: str, shape: tuple[int, int], peak: float) -> str:
    """Predicted steps on PLANNED GPUs, and on the `shape` that was compiled and takes `peak` bytes of each."""
    kind, each = GPUS[gpu], train.micro_batch // math.prod(shape)
    free = dataclasses.replace(train, capacity_factor=None)  # dropping pools would ask for certain microbatches
    parts = [f"{part} s" for part in Step._fields]
    rows = [["GPUs", "sequences", "microbatches", "GiB a GPU", *parts, "step s", "MFU", "tokens/s"]]
    for data, expert in sorted({shape, *map(default_shape, PLANNED)}, key=math.prod):
        gpus = data * expert
        if model.n_routed_experts and model.n_routed_experts % expert:
            continue
        here = full_batch(free, each * gpus)
        step, tokens = predict(model, here, data, expert, kind), here.batch_size * here.seq_len
        size = fit(peak - resident(model, train, *shape) + resident(model, here, data, expert), kind)
        if peak > kind.usable:  # XLA then does all to save memory, which says little of other meshes
            size = fit(peak, kind) if (data, expert) == shape else f"over {16 * model.num_params / gpus / 2**30:.1f}"
        mfu = tokens * model.flops_per_token(here.seq_len) / (gpus * PEAK_FLOPS[gpu.upper()])
        row = [f"{gpus} (data={data}, expert={expert})", here.batch_size, here.microbatches, size]
        row += [f"{seconds:.4g}" for seconds in step] + [f"{step.overlapped:.4g} to {step.serial:.4g}"]
        row += [f"{mfu / step.overlapped:.1%} to {mfu / step.serial:.1%}"]
        rows.append([*row, f"{tokens / step.overlapped:,.0f} to {tokens / step.serial:,.0f}"])
    return f"""## Plan

{table(*rows)}

Assumed:

- A whole step computes at {MATMUL_SHARE:.0%} of the {kind.matmul / 1e12:.0f} TFLOP/s of one large matmul, \
{recomputed(train):.2f} times the model's FLOPs, with evenly used experts.
- {HOST} GPUs of a host are joined by NVLink: {kind.exchange / 1e9:.0f} GB/s sent by each for rows, {kind.gather / 1e9:.0f} for gathers, \
{kind.scatter / 1e9:.0f} for sums, as measured on two. Each sends {kind.network / 1e9:.0f} GB/s to other hosts.
- The optimizer reads and writes at {kind.copy / 1e12:.2f} TB/s.
- The better end of a range: traffic and computation hide each other; the worse: neither hides any of the other.
- {each} sequence(s) of {train.seq_len} tokens a GPU at a time; the recipe's full batch, in whole microbatches.
- Memory of other meshes: the compiled program's, with what is cut over the GPUs cut over that many; or, if it does not fit, over \
what weights, gradients and moments take. XLA may use \
{kind.usable / 2**30:.1f} GiB a GPU (`XLA_PYTHON_CLIENT_MEM_FRACTION=0.95`).
"""


def report(model: ModelConfig, train: TrainConfig, gpu: str, directory: Path | None) -> None:
    """Compiles the step at the recipe's full batch on the current mesh; prints what it needs and the plan, and writes DIR/plan.md.

    Where `micro_batch_size` is null, the fewest sequences at a time are taken.

    Raises:
        InputError: a `micro_batch_size` that the mesh's devices do not divide.
    """
    mesh = jax.sharding.get_mesh()
    fewest = mesh.size if train.capacity_factor is None else math.lcm(mesh.size, train.drop_pool)
    train = full_batch(train, train.micro_batch_size or fewest)
    if train.micro_batch % mesh.size:
        raise InputError(f"TrainConfig.micro_batch_size is {train.micro_batch}, expected a multiple of the {mesh.size} devices")
    state, batch = train_state.abstract(model, train), train_state.abstract_batch(train)
    began = time.perf_counter()
    compiled = train_state.train_step.lower(state, batch, train).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + kept
    held = {"weights, float32": bytes_at_rest(state.params), "optimizer state": bytes_at_rest(state.opt_state)}
    held |= {"gradients, float32": bytes_at_rest(state.params), "batch": bytes_at_rest(batch)}
    held |= {"activations and other temporaries": peak - sum(held.values())}
    how = "for this GPU"
    if mesh.devices.flat[0].platform == "cpu":
        how = (
            "for fake CPU devices, so **bytes are approximate**: bfloat16 travels, and partly lies, as float32 there. "
            "With `pip install -e .[cuda13]` they are the GPU's, and no GPU is needed"
        )
    shape, flops = tuple(mesh.shape.values()), model.flops_per_token(train.seq_len)
    text = f"""# Dry run: {mesh.size} {gpu.upper()}, data={shape[0]}, expert={shape[1]}

Compiled in {seconds:.0f} s {how}.

- {model.num_params:,} parameters, {model.active_params:,} active.
- {flops:.4g} FLOP a token, forward and backward, causal attention counted half; {flops * recomputed(train):.4g} computed.
- A step is {train.batch_size} sequences of {train.seq_len} tokens, {train.microbatches} microbatch(es).

{table(("bytes a GPU", "GiB"), *((name, f"{size / 2**30:.2f}") for name, size in held.items()), ("peak", fit(peak, GPUS[gpu])))}

{traffic(parse_collectives(compiled.as_text(), train.microbatches))}

{plan(model, train, gpu, shape, peak)}"""
    print(text)
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_text(text)
