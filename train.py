"""Trains DeepSeek-V2: `python train.py --preset=tiny --workdir=DIR`. Run again, it goes on from its latest checkpoint.

Writes DIR/config.json (the resolved configuration), DIR/metrics.jsonl, DIR/checkpoints/ and the tokenizer's files.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from dsv2_jax import checkpoint, cli, convert, data, metrics, model, train_state
from dsv2_jax.config import ModelConfig, TrainConfig, finetuning, preset, train_preset
from dsv2_jax.fields import InputError, override
from dsv2_jax.tensor_files import read_json
from dsv2_jax.tokenizer import Tokenizer
from dsv2_jax.tokenizer import train as train_tokenizer
from dsv2_jax.weights import Weights
from sharding.mesh import make_mesh

PRESET = flags.DEFINE_string("preset", None, "tiny, v2_lite or v2: the model and how to train it; with --init_from the latter.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
STEPS = flags.DEFINE_integer("steps", None, "Steps in total; default: the schedule's.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", None, "Of the initial weights and of the data's order.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE, any field of the model's or the training's configuration.")
DATA = flags.DEFINE_list("data", None, "Text files, .jsonl, globs, path:weight; default: Python's standard library.")
INIT_FROM = flags.DEFINE_string("init_from", None, "Checkpoint to start from: its model and tokenizer, a fresh optimizer.")

MAY_CHANGE = ("checkpoint_every", "keep_checkpoints", "log_every")  # when a run goes on


class Run(NamedTuple):
    """What the flags, the workdir and the checkpoint to start from come to."""

    workdir: Path
    model: ModelConfig
    train: TrainConfig
    tokenizer: Tokenizer
    weights: Weights | None  # to start from
    step: int  # of the checkpoint to go on from; 0: a new run

    @property
    def config(self) -> dict[str, Any]:
        return {"model": self.model.to_hf(self.train.dtype), "train": dataclasses.asdict(self.train)}


def resolve() -> Run:
    """Reads everything a run is made of and writes nothing."""
    workdir = Path(WORKDIR.value)
    weights = convert.open_checkpoint(INIT_FROM.value) if INIT_FROM.value else None
    if not weights and not PRESET.value:
        raise InputError("--preset or --init_from is needed, to say what to train")
    model_config = weights.config if weights else preset(PRESET.value)
    train_config = train_preset(PRESET.value) if PRESET.value else finetuning()
    seed = [] if SEED.value is None else [f"seed={SEED.value}"]
    model_config, train_config = override([model_config, train_config], SET.value + seed)
    if train_config.seq_len > model_config.max_position_embeddings:
        limit = f"max_position_embeddings={model_config.max_position_embeddings}"
        raise InputError(f"TrainConfig.seq_len is {train_config.seq_len}, expected <= {limit}")
    step = checkpoint.latest_step(workdir) or 0
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
    run = Run(workdir, model_config, train_config, tokenizer, weights, step)
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


def prepare(run: Run) -> tuple[train_state.TrainState, data.Batches, checkpoint.Checkpoints]:
    """The state, the data at its place and the checkpoints; the workdir comes to be when nothing can be wrong any more."""
    batches = data.make_dataset(
        DATA.value,
        run.tokenizer,
        batch_size=run.train.batch_size,
        seq_len=run.train.seq_len,
        seed=run.train.seed,
    )
    if not run.step:
        params = (
            model.load(run.weights, "float32", run.model) if run.weights else model.init(run.model, run.train.seed, "float32")
        )
        state = train_state.start(params, run.train)
        run.workdir.mkdir(parents=True, exist_ok=True)
        run.tokenizer.save(run.workdir)
    checkpoints = checkpoint.Checkpoints(run.workdir, run.config, run.train.keep_checkpoints)
    if run.step:
        state, place = checkpoints.restore(run.step, train_state.abstract(run.model, run.train))
        batches.set_state(place)
    temporary = run.workdir / "config.json.tmp"
    temporary.write_text(json.dumps(run.config, indent=2) + "\n")
    temporary.replace(run.workdir / "config.json")
    return state, batches, checkpoints


def train(run: Run, steps: int) -> None:
    """Trains from the run's step to `steps`; the figures of a step are fetched while the next one runs."""
    config = run.train
    state, batches, checkpoints = prepare(run)
    print("model:", *(f"{name}={value}" for name, value in dataclasses.asdict(run.model).items()))
    print("train:", *(f"{name}={value}" for name, value in dataclasses.asdict(config).items()))
    print(f"{run.model.num_params:,} parameters, {run.model.active_params:,} active, on {jax.devices()[0].device_kind}")
    if run.step >= steps:
        print(f"{run.workdir} is at step {run.step} of {steps}: nothing to do")
        return
    batch = train_state.place(next(batches))
    began = time.perf_counter()
    train_step = train_state.train_step.lower(state, batch, config).compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s; from step {run.step} to {steps}", flush=True)

    file, logged, began = metrics.MetricsFile(run.workdir / metrics.FILE, run.step), run.step, time.perf_counter()

    def log(step: int, values: train_state.Metrics) -> None:
        nonlocal logged, began
        if step % config.log_every and step != steps:
            return
        values, now = jax.device_get(values), time.perf_counter()
        tokens = config.batch_size * config.seq_len
        record = {"step": step, "tokens": step * tokens} | {name: float(value) for name, value in values.items()}
        record |= metrics.speed(run.model, config.seq_len, tokens, (now - began) / (step - logged))
        logged, began = step, now
        file.write(record)
        show(record)

    with metrics.display(run.step, steps) as show:
        unlogged = None
        for step in range(run.step + 1, steps + 1):
            checkpoints.check()
            last = step % config.checkpoint_every == 0 or step == steps
            if last and unlogged:  # this step is waited for, so the one before must not share its time
                log(*unlogged)
                unlogged = None
            state, values = train_step(state, batch)
            if unlogged:
                log(*unlogged)
            unlogged = (step, values)
            if last:
                log(*unlogged)  # a step in a checkpoint is never run again
                unlogged = None
                checkpoints.save(state, batches.get_state())
            batch = train_state.place(next(batches))
        checkpoints.wait()


def main() -> None:
    run = resolve()
    with jax.set_mesh(make_mesh()):
        train(run, STEPS.value or run.train.schedule_steps)


if __name__ == "__main__":
    cli.run(main)
