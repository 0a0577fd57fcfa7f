"""What serving costs: the engine, timed on random prompts of given number and length, beside what the hardware allows."""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from dsv2_jax import roofline
from dsv2_jax.engine import Engine
from dsv2_jax.fields import InputError
from dsv2_jax.sampling import Sampling
from dsv2_jax.steps import compilations

SPREAD = 0.9  # of the experts that uniform routing would touch; with fewer, a step reads less and every figure flatters


class Load(NamedTuple):
    """Requests that come at once: how many, the tokens of each one's prompt, and of its answer."""

    batch: int
    prompt: int
    new: int


def parse_load(text: str) -> Load:
    """The load in `64x1024x256`.

    Raises: InputError, where it is none.
    """
    sizes = text.split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"--grid={text}: expected BATCHxPROMPTxNEW, as in 64x1024x256")
    return Load(*map(int, sizes))


def bench(engine: Engine, loads: Sequence[Load], output: IO[bytes] | None) -> None:
    """Prints a table with a row for each load, and writes each as a JSON line to `output`.

    Every load runs twice before it is timed, so that all its programs exist; compiling while timing is an error. `decode`: steps in
    which all requests decode and none is prefilled. "experts" is the number of distinct experts a layer reads in such a step.

    Raises: InputError, if a load does not fit, or if the router sends tokens to fewer experts than SPREAD of what uniform routing would.
    """
    cfg = engine.cfg
    for load in loads:
        name = f"--grid={'x'.join(map(str, load))}"
        if load.prompt + load.new > cfg.max_position_embeddings:
            raise InputError(
                f"{name}: expected at most {cfg.max_position_embeddings} tokens, prompt and answer (max_position_embeddings)"
            )
        if load.batch > engine.seats:
            raise InputError(f"{name}: expected a batch of at most {engine.seats} (--max_batch)")
    columns = (
        "batch|prompt|new|first token ms|prompt tok/s|ms/step|new tok/s|of bandwidth|of roofline|whole run tok/s|experts/layer"
    )
    table = Table(*columns.split("|"))
    results = []
    for load in loads:
        results.append(measure(engine, load))
        table.add_row(*_cells(results[-1]))
        if output:
            output.write((json.dumps(results[-1]) + "\n").encode())
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}, weights {engine.model.weights_dtype}, {engine.describe()}"
    )
    console.print(table)
    for result in results:
        if (share := result["experts_per_layer"] / result["experts_if_uniform"]) < SPREAD:
            raise InputError(
                f"batch {result['batch']}: a layer's tokens went to {share:.0%} of the experts that uniform routing would use,"
                f" expected at least {SPREAD:.0%}; the figures above flatter"
            )


def measure(engine: Engine, load: Load) -> dict[str, Any]:
    """Times a load; the keys of the result are the JSON's."""
    for _ in range(2):
        _run(engine, load)
    compiled = compilations()
    prompts_alone = _run(engine, load._replace(new=1))
    whole = _run(engine, load)
    if compilations() != compiled:
        raise AssertionError(f"{compilations() - compiled} programs were compiled while {load} was timed")
    step = statistics.median(whole.steps) if whole.steps else None
    cfg, context = engine.cfg, load.prompt + load.new // 2
    distinct = whole.distinct or cfg.num_experts_per_tok or 1
    result = {
        **load._asdict(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "weights_dtype": engine.model.weights_dtype,
        "cache_dtype": engine.cache_dtype,
        "cache_bytes_per_token": engine.bytes_per_token,
        "cache_tokens": engine.cache_tokens,
        "time_to_first_token_ms": statistics.median(whole.first) * 1e3,
        "prompt_tokens_per_s": load.batch * load.prompt / prompts_alone.seconds,
        "ms_per_step": step and step * 1e3,
        "steps_timed": len(whole.steps),
        "new_tokens_per_s": step and load.batch / step,
        "whole_run_new_tokens_per_s": load.batch * load.new / whole.seconds,
        "experts_per_layer": distinct,
        "experts_if_uniform": _uniform(cfg.n_routed_experts, cfg.num_experts_per_tok, load.batch) if whole.distinct else distinct,
        "share_of_bandwidth": None,
        "share_of_roofline": None,
    }
    gpu = roofline.gpu_of(jax.devices()[0].device_kind)
    if gpu and step:
        floor = roofline.decode_floor(
            cfg,
            roofline.weight_bytes(engine.model),
            load.batch,
            context,
            distinct,
            engine.bytes_per_token,
            jax.device_count(),
            gpu,
        )
        result |= {"share_of_bandwidth": floor.bandwidth / step, "share_of_roofline": floor.joint / step}
    return result


class _Run(NamedTuple):
    seconds: float
    first: list[float]  # seconds to each request's first token
    steps: list[float]  # seconds of steps in which all requests decode
    distinct: float | None  # experts a layer reads in such a step, the mean over both; None: there are none


def _run(engine: Engine, load: Load) -> _Run:
    sampling = Sampling(max_new_tokens=load.new, ignore_eos=True)
    prompts = np.random.default_rng().integers(0, engine.cfg.vocab_size, (load.batch, load.prompt)).tolist()  # no prompt twice
    for prompt in prompts:
        engine.add_request(prompt, sampling)
    first, steps, used = [], [], []
    start = before = time.perf_counter()
    begun, prefilled = set(), -1
    while engine.busy:
        outputs = engine.step()
        now = time.perf_counter()
        first += [now - start for output in outputs if output.request not in begun]
        begun |= {output.request for output in outputs}
        # A step's tokens are those of the programs sent in the step before.
        if len(outputs) == load.batch and prefilled == engine.counters.prompt_tokens:
            steps.append(now - before)
            used += [engine.used_experts] if engine.used_experts is not None else []
        before, prefilled = now, engine.counters.prompt_tokens
    return _Run(time.perf_counter() - start, first, steps[1:], float(np.mean(used)) if used else None)


def _uniform(experts: int, each: int, tokens: int) -> float:
    """The number of experts that tokens touch in the mean, if each takes any `each` of them."""
    return experts * (1 - (1 - each / experts) ** tokens)


def _cells(result: dict[str, Any]) -> list[str]:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.0%}"

    def number(value: float | None, digits: int = 0) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return [
        *(str(result[name]) for name in Load._fields),
        number(result["time_to_first_token_ms"], 1),
        number(result["prompt_tokens_per_s"]),
        number(result["ms_per_step"], 2),
        number(result["new_tokens_per_s"], 1),
        percent(result["share_of_bandwidth"]),
        percent(result["share_of_roofline"]),
        number(result["whole_run_new_tokens_per_s"], 1),
        f"{result['experts_per_layer']:.1f} of {result['experts_if_uniform']:.1f}",
    ]
