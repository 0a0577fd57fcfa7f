"""Trains DeepSeek-V2: `python train.py --preset=tiny --workdir=DIR`. Run again, it goes on from its latest checkpoint.

Writes DIR/config.json (the resolved configuration), DIR/metrics.jsonl, DIR/checkpoints/ and the tokenizer's files. On many hosts
the same line runs in every process; process 0 alone prints.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from dsv2_jax import checkpoint, cli, convert, data, dry_run, metrics, train_state
from dsv2_jax.config import ModelConfig, preset
from dsv2_jax.fields import InputError, override
from dsv2_jax.router import reach
from dsv2_jax.signals import StopRequest
from dsv2_jax.tensor_files import read_json
from dsv2_jax.tokenizer import Tokenizer
from dsv2_jax.tokenizer import train as train_tokenizer
from dsv2_jax.train_config import TrainConfig, finetuning, train_preset
from dsv2_jax.weights import Weights
from sharding.mesh import make_mesh, parse_mesh, start_processes

PRESET = flags.DEFINE_string("preset", None, "tiny, v2_lite or v2: the model and how to train it; with --init_from the latter.")
RECIPE = flags.DEFINE_string("recipe", None, "v2 or v2_lite: train as the paper did; default: the preset's.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
STEPS = flags.DEFINE_integer("steps", None, "Steps in total; default: the schedule's.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", None, "Of the initial weights, of the data's order and of what is exempt from dropping.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE, any field of the model's or the training's configuration.")
DATA = flags.DEFINE_list("data", None, "Text files, .jsonl, globs, path:weight; default: Python's standard library.")
EVAL_DATA = flags.DEFINE_list("eval_data", None, "Held-out text, as --data without weights; all of it every eval_every steps.")
INIT_FROM = flags.DEFINE_string("init_from", None, "Checkpoint to start from: its model and tokenizer, a fresh optimizer.")
MESH = flags.DEFINE_string("mesh", None, "As data=2,expert=4; default: all devices on data.")
ZERO = flags.DEFINE_integer("zero", None, "1: gathered weights are kept for the backward pass. 3: gathered again. Default 1.")
DISPATCH = flags.DEFINE_string("dispatch", None, "How tokens reach experts: all_to_all or all_gather; default: the faster one.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; Slurm and Kubernetes jobs need none.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator.", lower_bound=0)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", None, "FIRST:LAST; the trace goes to DIR/profile.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step and print what it needs; trains nothing, needs no GPU.")
GPUS = flags.DEFINE_integer("gpus", None, "With --dry_run: how many; default: the mesh's.", lower_bound=1)
GPU = flags.DEFINE_string("gpu", "h200", "With --dry_run: which.")

# When a run goes on; none changes what is computed, but for rounding.
MAY_CHANGE = {"checkpoint_every", "keep_checkpoints", "fall_back", "log_every", "load_every", "eval_every", "max_skipped"}
MAY_CHANGE |= {"zero", "dispatch", "remat"}


class Run(NamedTuple):
    """What the flags, the workdir and the checkpoint to start from come to."""

    workdir: Path
    model: ModelConfig
    train: TrainConfig
    tokenizer: Tokenizer
    weights: Weights | None  # to start from
    step: int  # of the checkpoint to go on from; 0: a new run
    profile: range  # the steps to trace

    @property
    def config(self) -> dict[str, Any]:
        return {"model": self.model.to_hf(self.train.dtype), "train": dataclasses.asdict(self.train)}


def resolve_configs(weights: Weights | None) -> tuple[ModelConfig, TrainConfig]:
    """The configurations that the flags come to."""
    if not weights and not PRESET.value:
        raise InputError("--preset or --init_from is needed, to say what to train")
    if RECIPE.value not in (None, "v2", "v2_lite"):
        raise InputError(f"--recipe={RECIPE.value}: expected v2 or v2_lite")
    recipe = RECIPE.value or PRESET.value
    model_config = weights.config if weights else preset(PRESET.value)
    train_config = train_preset(recipe) if recipe else finetuning()
    # The paper's (section 3.1.2); the published config.json says 0.02.
    first = [] if weights or recipe == "tiny" else ["initializer_range=0.006"]
    last = [f"{flag.name}={flag.value}" for flag in (SEED, ZERO, DISPATCH) if flag.value is not None]
    model_config, train_config = override([model_config, train_config], first + SET.value + last)
    if train_config.seq_len > model_config.max_position_embeddings:
        limit = f"max_position_embeddings={model_config.max_position_embeddings}"
        raise InputError(f"TrainConfig.seq_len is {train_config.seq_len}, expected <= {limit}")
    return model_config, train_config


def parse_shape() -> tuple[int, int]:
    """--mesh as (data, expert)."""
    try:
        return parse_mesh(MESH.value)
    except ValueError as error:
        raise InputError(f"--mesh={MESH.value}: {error}") from None


def mesh_shape(model_config: ModelConfig, config: TrainConfig, devices: int) -> tuple[int, int]:
    """The sizes of the axes data and expert, fit for the model and the batch."""
    data_axis, expert_axis = parse_shape() if MESH.value else (devices, 1)
    size = data_axis * expert_axis
    if size > devices:
        raise InputError(f"--mesh={MESH.value}: needs {size} devices, there are {devices}")
    if size < devices and jax.process_count() > 1:
        raise InputError(f"--mesh={MESH.value}: {size} devices, expected all {devices} of the {jax.process_count()} processes")
    if config.micro_batch % size:
        told = f"a multiple of the mesh's {size} devices (--mesh, micro_batch_size)"
        raise InputError(f"the {config.micro_batch} sequences computed at a time: expected {told}")
    if model_config.n_routed_experts is not None:
        reach(model_config, expert_axis)
    return data_axis, expert_axis


def profiled_steps() -> range:
    """The steps of --profile_steps."""
    if PROFILE_STEPS.value is None:
        return range(0)
    first, colon, last = PROFILE_STEPS.value.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(f"--profile_steps={PROFILE_STEPS.value}: expected FIRST:LAST, two step numbers, as in 10:13")
    return range(int(first), int(last) + 1)


def resolve() -> Run:
    """Reads everything a run is made of and writes nothing."""
    if WORKDIR.value is None:
        raise InputError("--workdir is needed")
    workdir = Path(WORKDIR.value)
    weights = convert.open_checkpoint(INIT_FROM.value) if INIT_FROM.value else None
    model_config, train_config = resolve_configs(weights)
    latest = checkpoint.newest_good_step if train_config.fall_back else checkpoint.latest_step
    step = latest(workdir) or 0
    if not step and workdir.exists():
        refuse_foreign(workdir)
    source = workdir if step else weights and weights.directory
    tokenizer = Tokenizer.load(source) if source else train_tokenizer(data.sample(DATA.value), model_config.vocab_size)
    if tokenizer is None:
        raise InputError(f"{source}: no tokenizer.json in it, which training needs")
    if tokenizer.vocab_size > model_config.vocab_size:
        raise InputError(f"vocab_size is {model_config.vocab_size}, expected at least the tokenizer's {tokenizer.vocab_size}")
    if not weights:
        model_config = dataclasses.replace(model_config, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    run = Run(workdir, model_config, train_config, tokenizer, weights, step, profiled_steps())
    if step:
        refuse_other(run)
    return run


def refuse_foreign(workdir: Path) -> None:
    """Refuses to begin a run where something else lies."""
    if not workdir.is_dir():
        raise InputError(f"--workdir={workdir}: a file, expected a directory")
    if (workdir / "config.json").exists() and "train" not in read_json(workdir / "config.json"):
        raise InputError(f"--workdir={workdir}: has a config.json that is not train.py's, expected a new directory")


def refuse_other(run: Run) -> None:
    """Refuses to go on with checkpoints of another configuration."""
    saved = checkpoint.read_config(run.workdir, run.step)
    there = dataclasses.asdict(ModelConfig.from_hf(saved["model"])) | saved["train"]
    here = dataclasses.asdict(run.model) | dataclasses.asdict(run.train)
    differ = [name for name in here if name not in MAY_CHANGE and there.get(name) != here[name]]
    if differ:
        fields = ", ".join(f"{name} ({there.get(name)!r} there, {here[name]!r} here)" for name in differ)
        raise InputError(f"--workdir={run.workdir}: holds checkpoints of another configuration: {fields}")


def batches_of(run: Run, source: list[str] | None, **more: Any) -> data.Batches:
    """This process's rows of the microbatches of `source`."""
    return data.make_dataset(
        source,
        run.tokenizer,
        batch_size=run.train.micro_batch,
        seq_len=run.train.seq_len,
        seed=run.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        **more,
    )


def prepare(run: Run) -> tuple[train_state.TrainState, data.Batches, checkpoint.Checkpoints]:
    """The state, the data at its place and the checkpoints; the workdir comes to be when nothing can be wrong any more."""
    batches = batches_of(run, DATA.value)
    if EVAL_DATA.value:
        batches_of(run, EVAL_DATA.value, repeat=False)  # refuses bad data now, not at the first evaluation
    if not run.step:
        state = train_state.load(run.weights, run.model, run.train) if run.weights else train_state.init(run.model, run.train)
        run.workdir.mkdir(parents=True, exist_ok=True)
        if is_first():
            run.tokenizer.save(run.workdir)
    checkpoints = checkpoint.Checkpoints(run.workdir, run.config, run.train.keep_checkpoints)
    if run.step:
        state, place = checkpoints.restore(run.step, train_state.abstract(run.model, run.train))
        batches.set_state(place)
        if run.train.fall_back and (moved := checkpoints.move_aside(run.step)):
            say("damaged checkpoints moved aside:", *moved)
    if is_first():
        temporary = run.workdir / "config.json.tmp"
        temporary.write_text(json.dumps(run.config, indent=2) + "\n")
        temporary.replace(run.workdir / "config.json")
    return state, batches, checkpoints


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def say(*words: Any) -> None:
    """Prints, in process 0 alone."""
    if is_first():
        print(*words, flush=True)


class Reporter:
    """Tells of steps: metrics.jsonl, what is shown, loss spikes, and how many steps in a row were skipped."""

    def __init__(self, run: Run, steps: int, show: Callable[[metrics.Record], None]) -> None:
        self.run, self.steps, self.show = run, steps, show
        self.file = metrics.MetricsFile(run.workdir / metrics.FILE, run.step) if is_first() else None
        self.spikes = metrics.Spikes(self.file.kept if self.file else [])
        self.skipped = 0  # steps in a row
        self.logged, self.began = run.step, time.perf_counter()

    def __call__(self, step: int, values: train_state.Metrics, evaluate: Callable[[], float] | None = None) -> bool:
        """Waits for the step, evaluates, and tells of it; returns whether some process asks for the end."""
        config = self.run.train
        stop, skipped = jax.device_get((values["stop"], values["skipped"]))
        self.skipped = self.skipped + 1 if skipped else 0
        last = step == self.steps
        if step % config.log_every and not (evaluate or skipped or stop or last):
            return bool(stop)
        now = time.perf_counter()
        sequences = [config.sequences_before(number + 1) for number in (self.logged, step)]
        tokens = [count * config.seq_len for count in sequences]
        with_load = step % config.load_every == 0 or last
        record = {"step": step, "tokens": tokens[1]} | metrics.of_step(jax.device_get(values), with_load)
        record |= metrics.speed(self.run.model, config.seq_len, step - self.logged, tokens[1] - tokens[0], now - self.began)
        if evaluate:
            record["loss/eval"] = evaluate()
        self.logged, self.began = step, time.perf_counter()
        if is_first():
            record |= self.spikes.check(record)
            self.file.write(record)
            self.show(record)
        return bool(stop)


def train(run: Run, steps: int) -> None:
    """Trains from the run's step to `steps`; a step's figures are fetched while the next one runs."""
    config, stop = run.train, StopRequest()
    state, batches, checkpoints = prepare(run)
    mesh = jax.sharding.get_mesh()
    say("model:", *(f"{name}={value}" for name, value in dataclasses.asdict(run.model).items()))
    say("train:", *(f"{name}={value}" for name, value in dataclasses.asdict(config).items()))
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    where = f"{mesh.size} x {jax.devices()[0].device_kind} ({axes}), {jax.process_count()} processes"
    say(f"{run.model.num_params:,} parameters, {run.model.active_params:,} active, on {where}")
    if run.step >= steps:
        return say(f"{run.workdir} is at step {run.step} of {steps}: nothing to do")
    profile = range(max(run.profile.start, run.step + 1), min(run.profile.stop, steps + 1))
    if run.profile and not profile:
        say(f"--profile_steps={PROFILE_STEPS.value}: none of them comes, nothing is traced")

    def next_batch(step: int) -> tuple[list[data.Batch], train_state.Batch]:
        microbatches = list(itertools.islice(batches, config.batch_at(step) // config.micro_batch))
        return microbatches, train_state.place(microbatches, config.microbatches, bool(stop))

    rows, batch = next_batch(run.step + 1)
    began = time.perf_counter()
    train_step = train_state.train_step.lower(state, batch, config).compile()
    say(f"compiled in {time.perf_counter() - began:.1f} s; from step {run.step} to {steps}")
    with metrics.display(run.step, steps) as show:
        report = Reporter(run, steps, show)
        pending = None  # a step that runs and is not told of yet, with its data

        def tell(evaluate: Callable[[], float] | None = None) -> bool:
            nonlocal pending
            (number, values, rows), pending = pending, None
            ends = report(number, values, evaluate)
            if report.skipped >= config.max_skipped:
                give_up(run, report.skipped, state, rows)
            return ends

        for step in range(run.step + 1, steps + 1):
            checkpoints.check()
            if step in profile[:1]:
                jax.profiler.start_trace(str(run.workdir / "profile"))
            saves = step % config.checkpoint_every == 0 or step == steps
            evaluates = EVAL_DATA.value is not None and (step % config.eval_every == 0 or step == steps)
            waits = saves or evaluates or step in profile[-1:]
            # A step that is waited for must not share its time; none may follow one that may be skipped once too often.
            ends = pending is not None and (waits or report.skipped == config.max_skipped - 1) and tell()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = train_step(state, batch)
            ends |= pending is not None and tell()
            pending = (step, values, rows)
            if waits or ends:  # a step in a checkpoint is never run again, so it is told of first
                ends |= tell(functools.partial(evaluate, run, state) if evaluates else None)
            if step in profile and (ends or step == profile[-1]):
                jax.profiler.stop_trace()
            if saves or ends:
                checkpoints.save(state, batches.get_state())
            if ends and step < steps:
                checkpoints.wait()
                return say(f"asked to stop: saved step {step} of {steps}; the same line goes on from there")
            if step < steps:
                rows, batch = next_batch(step + 1)
        checkpoints.wait()


def evaluate(run: Run, state: train_state.TrainState) -> float:
    """The mean loss of all tokens of --eval_data, nothing dropped."""
    sums = [
        train_state.evaluate(state.params, train_state.place([rows], 1), run.train)
        for rows in batches_of(run, EVAL_DATA.value, repeat=False)
    ]
    loss, tokens = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return float(loss / tokens)


def give_up(run: Run, skipped: int, state: train_state.TrainState, rows: list[data.Batch]) -> None:
    """Ends a run whose steps are all skipped; the parameters are still those that the first of them met."""
    place = run.workdir / "nonfinite"
    if is_first():
        shutil.rmtree(place, ignore_errors=True)  # of an earlier attempt
        place.mkdir()
    multihost_utils.sync_global_devices("room for the state")
    np.savez(place / f"batch_{jax.process_index()}.npz", **{name: np.stack([part[name] for part in rows]) for name in rows[0]})
    told = f"step {int(state.step)}: loss or gradient was not finite in {skipped} steps in a row; "
    try:
        saved = checkpoint.Checkpoints(place, run.config, keep=1)
        saved.save(state, {})
        saved.wait()
    except InputError as error:
        raise InputError(f"{told}the last batch is in {place}, the state could not be saved: {error}") from None
    raise InputError(f"{told}the state and the last batch are in {place}")


def refuse_unlike(started: dict[str, Any]) -> None:
    """Refuses processes that do not all start with the same; they would wait for each other, or train on a mixture."""
    if jax.process_count() > 1:
        digests = np.stack([np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8) for value in started.values()])
        everywhere = multihost_utils.process_allgather(digests)
        differ = [name for name, same in zip(started, (everywhere == everywhere[0]).all(axis=(0, 2))) if not same]
        if differ:
            raise InputError(f"{', '.join(differ)}: not the same in all {jax.process_count()} processes of this run")


def main() -> None:
    for flag, needed in ((NUM_PROCESSES, COORDINATOR), (PROCESS_ID, COORDINATOR), (GPUS, DRY_RUN)):
        if flag.value is not None and not needed.value:
            raise InputError(f"--{flag.name} is of use with --{needed.name} alone")
    if DRY_RUN.value:
        return plan()
    cli.cache_compilations()
    try:
        start_processes(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    except ValueError as error:
        raise InputError(f"cannot join the other processes: {error}") from None
    refuse_unlike({flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])} | {PROCESS_ID.name: None})
    run = resolve()
    refuse_unlike({"configuration": run.config, "tokenizer": run.tokenizer.files, "newest checkpoint": run.step})
    with jax.set_mesh(make_mesh(*mesh_shape(run.model, run.train, jax.device_count()))):
        try:
            train(run, STEPS.value or run.train.schedule_steps)
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
                raise
            told = " ".join(str(error).split())[:300]
            print(f"error: lost another process of this run, or its device ({told}); start all again to go on", file=sys.stderr)
            os._exit(1)  # an orderly end would wait for the others


def plan() -> None:
    """The dry run."""
    weights = convert.open_checkpoint(INIT_FROM.value) if INIT_FROM.value else None
    model_config, train_config = resolve_configs(weights)
    mesh = dry_run.absent_mesh(GPUS.value, GPU.value, parse_shape() if MESH.value else None)
    with jax.set_mesh(mesh):
        if model_config.n_routed_experts is not None:
            reach(model_config, mesh.shape["expert"])
        dry_run.report(model_config, train_config, GPU.value, Path(WORKDIR.value) if WORKDIR.value else None)


if __name__ == "__main__":
    cli.run(main)
