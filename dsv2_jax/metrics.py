"""What a run reports: metrics.jsonl, one JSON object a logged step, and what is shown meanwhile.

MFU = model FLOPs of forward and backward, causal attention counted half, active parameters with the head, no recomputation
(`ModelConfig.flops_per_token`), over the dense bfloat16 peak of the devices.
"""

import collections
import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError

FILE = "metrics.jsonl"
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # a device, dense bfloat16
SHOWN_EVERY = 5.0  # seconds, where there is no terminal

Record = dict[str, Any]  # numbers, lists of them, or null for what is not known or not finite


def read(path: Path) -> list[Record]:
    """The records of a metrics.jsonl. A torn last line, which a killed writer leaves, is none.

    Raises:
        InputError: no such file, or a line before the last that is not a record; with its number.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected the metrics of a training run")
    lines = path.read_text(errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
            if type(records[-1]["step"]) is not int:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}:{number}: {line[:40]!r}, expected a JSON object with a step") from None
    return records


class MetricsFile:
    """Appends records. Those after `step`, which a resumed run will write again, are removed first."""

    def __init__(self, path: Path, step: int):
        kept = [record for record in read(path) if record["step"] <= step] if path.exists() else []
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as file:
            file.writelines(map(_line, kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        self.kept = kept
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Floats are written so that they read back exactly."""
        self._file.write(_line(record))
        self._file.flush()


def _line(record: Record) -> str:
    return json.dumps({name: _finite(value) for name, value in record.items()}) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def of_step(values: Mapping[str, np.ndarray], with_load: bool) -> Record:
    """A step's metrics as they are logged: numbers, and per layer lists; every expert's load, in pairs, if asked for."""
    record = {name: float(value) for name, value in values.items() if value.ndim == 0 and name != "stop"}
    if "moe/load" in values:
        load_LE = values["moe/load"]
        record["moe/drop_fraction_of_layer"] = values["moe/dropped"].tolist()
        record["moe/dead_experts_of_layer"] = (load_LE == 0).sum(axis=-1).tolist()
        if with_load:
            record["moe/load"] = load_LE.astype(int).tolist()
    return record


class Spikes:
    """Finds losses far above those just before, `DEVIATIONS` standard deviations over the mean of the last `WINDOW`."""

    WINDOW, DEVIATIONS = 128, 6.0

    def __init__(self, records: Iterable[Record]) -> None:
        """`records`: those logged before, which count."""
        losses = (record.get("loss/lm") for record in records if "loss/spike" not in record)
        self._losses = collections.deque((loss for loss in losses if loss is not None), self.WINDOW)

    def check(self, record: Record) -> Record:
        """{"loss/spike": standard deviations} if the record's loss is one, which is then not counted; else {}."""
        loss = record["loss/lm"]
        if not math.isfinite(loss):
            return {}
        if len(self._losses) == self.WINDOW:
            above = (loss - np.mean(self._losses)) / max(np.std(self._losses), 1e-6)
            if above > self.DEVIATIONS:
                return {"loss/spike": float(above)}
        self._losses.append(loss)
        return {}


def speed(model: ModelConfig, seq_len: int, steps: int, tokens: int, seconds: float) -> Record:
    """Throughput of all devices over some steps. MFU is null where the devices' peak is not known."""
    tokens_per_s = tokens / seconds
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    mfu = peak and tokens_per_s * model.flops_per_token(seq_len) / (peak * jax.sharding.get_mesh().size)
    return {"perf/tokens_per_s": tokens_per_s, "perf/mfu": mfu, "perf/step_ms": seconds / steps * 1e3}


@contextlib.contextmanager
def display(first: int, steps: int) -> Iterator[Callable[[Record], None]]:
    """Shows records as they come: a progress bar on a terminal, otherwise a line every few seconds and for the last step."""
    console = rich.console.Console(highlight=False, soft_wrap=True)
    if console.is_terminal:
        columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TextColumn("{task.fields[text]}"))
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task("train", total=steps, completed=first, text="")
            yield lambda record: bar.update(task, completed=record["step"], text=describe(record))
        return
    shown = -SHOWN_EVERY

    def show(record: Record) -> None:
        nonlocal shown
        notable = record["skipped"] or "loss/spike" in record or "loss/eval" in record
        if notable or record["step"] == steps or time.monotonic() - shown >= SHOWN_EVERY:
            shown = time.monotonic()
            print(f"step {record['step']}/{steps}  {describe(record)}", flush=True)

    yield show


def describe(record: Record) -> str:
    """The few figures to watch."""
    mfu = "" if record["perf/mfu"] is None else f"  mfu {record['perf/mfu']:.1%}"
    notes = f"  SPIKE of {record['loss/spike']:.0f} deviations" if "loss/spike" in record else ""
    notes += "  SKIPPED: not finite" if record["skipped"] else ""
    notes += f"  eval {record['loss/eval']:.4f}" if "loss/eval" in record else ""
    return (
        f"loss {record['loss/lm']:.4f}  grad_norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
        f"{record['perf/tokens_per_s']:.0f} tokens/s{mfu}{notes}"
    )
