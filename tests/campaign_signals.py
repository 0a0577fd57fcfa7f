"""Ends that a run must survive, counted: `python tests/campaign_signals.py 20` (part of `make campaign`).

SIGTERM and SIGINT at random moments; losses that blow up or are not finite, from a random step on; of two processes one that is
killed.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from campaign_resume import ROOT, command, compare, run, write_text

SIGNALS = (signal.SIGTERM, signal.SIGINT)
FOREVER = 1_000_000  # steps
LEFT_S = 60  # within which a process must leave after it has lost another


def await_line(process: subprocess.Popen, beginning: str) -> None:
    while not process.stdout.readline().startswith(beginning):
        assert process.poll() is None, f"train.py ended by itself with code {process.returncode}: {process.stderr.read()}"


def stopped_at(said: str) -> int:
    """The step that a run which was asked to stop says it has saved."""
    return int(re.search(r"^asked to stop: saved step (\d+) of", said, re.MULTILINE)[1])


def stop(workdir: Path, number: int, moments: random.Random) -> int:
    """Starts a run and sends it a signal, one in five while it compiles; returns the step it has saved."""
    process = subprocess.Popen(command(workdir, FOREVER), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    early = moments.random() < 0.2
    await_line(process, "model:" if early else "compiled")
    time.sleep(moments.uniform(0, 1 if early else 2))
    process.send_signal(number)
    said, errors = process.communicate(timeout=LEFT_S)
    assert (process.returncode, errors) == (0, ""), (process.returncode, errors)
    assert str(stopped_at(said)) in os.listdir(workdir / "checkpoints")
    return stopped_at(said)


def strict(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl, which must be JSON without NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def rate_explodes(after: int, learning_rate: float, factor: float) -> list[str]:
    """The learning rate is multiplied with `factor` after a step, so that the losses from the step after next on are spoiled."""
    fields = [f"learning_rate={learning_rate}", f"decay_factor={factor**0.5}", f"schedule_steps={2 * after}"]
    return [f"--set={field}" for field in [*fields, "warmup_steps=0", "first_decay=0.5", "second_decay=0.5"]]


def not_finite(workdir: Path, after: int, most: int) -> str:
    """A run whose losses are not finite from step `after` + 2 on; returns the line it ends with."""
    explodes = rate_explodes(after, 1e-3, 1e38)
    done = subprocess.run(
        command(workdir, FOREVER, *explodes, f"--set=max_skipped={most}"), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    skipped = [record["step"] for record in strict(workdir) if record["skipped"]]
    assert skipped == list(range(after + 2, after + 2 + most)), skipped
    return done.stderr


def spike(workdir: Path, after: int, moments: random.Random) -> dict[int, float]:
    """A run whose loss leaps after a step, stopped by a signal on its way; returns the spikes it logged."""
    explodes = rate_explodes(after, 1e-5, 1e5)
    process = subprocess.Popen(
        command(workdir, FOREVER, *explodes), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    await_line(process, "compiled")
    time.sleep(moments.uniform(0, 2))
    process.terminate()
    process.communicate(timeout=LEFT_S)
    run(workdir, max(after + 10, strict(workdir)[-1]["step"]), *explodes)
    return {record["step"]: record["loss/spike"] for record in strict(workdir) if "loss/spike" in record}


def start_processes(workdir: Path, steps: int, devices: int, *more: str, own: Sequence[str] = ("", "")) -> list[subprocess.Popen]:
    """A run of two processes with so many fake devices each; `own`: a further flag of each, or none."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    joined = [f"--mesh=data=2,expert={devices}", f"--coordinator=localhost:{port}", "--num_processes=2"]
    lines = [[*command(workdir, steps, *more, *joined), f"--process_id={i}", *filter(None, [own[i]])] for i in range(2)]
    how = {"cwd": ROOT, "env": fake_devices(devices), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(line, **how) for line in lines]


def fake_devices(count: int) -> dict[str, str]:
    """The environment of a process with so many."""
    more = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": more}


def lose(workdir: Path, lost: int) -> float:
    """Kills one process of two while they train; returns after how many seconds the other has left, saying so."""
    processes = start_processes(workdir, FOREVER, 1)
    await_line(processes[0], "step")
    processes[lost].kill()
    began = time.perf_counter()
    try:
        _, errors = processes[1 - lost].communicate(timeout=LEFT_S)
    finally:
        processes[1 - lost].kill()
    processes[lost].communicate()
    assert processes[1 - lost].returncode not in (0, 2)
    assert re.search(r"^error: lost another process of this run|^F.*another task died", errors, re.MULTILINE), errors
    return time.perf_counter() - began


def main(count: int) -> int:
    moments = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        write_text(Path(scratch))
        whole, stopped = Path(scratch, "whole"), Path(scratch, "stopped")
        saved = [stop(stopped, SIGNALS[i % 2], moments) for i in range(count)]
        print(f"signals: {count}, all ended with code 0, at saved steps {saved}", flush=True)
        run(stopped, saved[-1] + 10)
        run(whole, saved[-1] + 10)
        wrong = sum(compare(whole, stopped, saved[-1] + 10))
        for i in range(3):
            after, most = moments.randrange(1, 20), moments.randrange(1, 5)
            print(f"not finite after step {after + 1}: {not_finite(Path(scratch, f'nan{i}'), after, most)}", end="", flush=True)
            after = moments.randrange(130, 160)
            spikes = spike(Path(scratch, f"spike{i}"), after, moments)
            first = min(spikes, default=0)
            print(f"a leap after step {after + 1}: {len(spikes)} spikes, the first at step {first}", flush=True)
            wrong += first != after + 2
            seconds = lose(Path(scratch, f"lost{i}"), i % 2)
            print(f"process {i % 2} of two killed: the other left after {seconds:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20))
