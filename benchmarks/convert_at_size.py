"""Conversion at real size against a plain file copy: `python -m benchmarks.convert_at_size --dir=DIR [--layers=12] [--pairs=1]`.

Makes a checkpoint of V2-Lite's true shapes with random weights (12 layers: 14 GB), then for each direction copies the input's files
and converts it, in turn, both from a cold page cache and until the bytes are on the disk. Stages are deleted as it goes: DIR
needs room for three. At the end every tensor's bytes are compared with the first checkpoint's. Peak anonymous memory is that
of the converting process (RssAnon, sampled every 20 ms), Python and its libraries included.
"""

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from benchmarks.random_checkpoint import digest, make
from dsv2_jax.config import v2_lite
from dsv2_jax.tensor_files import read_tensors

DIR = flags.DEFINE_string("dir", None, "Where to write; needs 3.3 GB a layer.", required=True)
LAYERS = flags.DEFINE_integer("layers", 12, "Layers of the checkpoint.", lower_bound=2)
PAIRS = flags.DEFINE_integer("pairs", 1, "How often copy and conversion are timed in each direction.", lower_bound=1)


def cold(directory: Path) -> None:
    """Asks the kernel to forget the files of a directory."""
    for file in directory.iterdir():
        with file.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path) -> float:
    """Seconds to copy a directory's files and have them on the disk."""
    cold(source)
    start = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as handle:
            os.fsync(handle.fileno())
    return time.perf_counter() - start


def converted(source: Path, target: Path, to: str) -> tuple[float, int]:
    """Seconds of a whole convert command, and its peak anonymous memory in bytes."""
    cold(source)
    command = [sys.executable, "-m", "dsv2_jax.convert", f"--input={source}", f"--output={target}", f"--to={to}"]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        if "RssAnon:" in status:
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - start, peak


def main(_: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=DIR.value) as scratch:
        stages = [Path(scratch) / name for name in ("source", "native", "hf")]
        digests = make(stages[0], dataclasses.replace(v2_lite(), num_hidden_layers=LAYERS.value))
        size = sum(file.stat().st_size for file in stages[0].iterdir())
        print(
            f"{LAYERS.value} layers, {len(digests)} tensors, {size / 1e9:.2f} GB, {len(list(stages[0].glob('*.safetensors')))} shards"
        )
        print(
            f"{'stage':14} {'copy GB/s':>10} {'convert GB/s':>13} {'convert / copy':>15} {'spread':>13} {'peak anonymous MB':>18}",
            flush=True,
        )
        for source, target, to in ((*stages[:2], "native"), (*stages[1:], "hf")):
            copies, conversions, peaks = [], [], []
            for _ in range(PAIRS.value):
                shutil.rmtree(target, ignore_errors=True)
                copies.append(copied(source, Path(scratch) / "copy"))
                shutil.rmtree(Path(scratch) / "copy")
                seconds, peak = converted(source, target, to)
                conversions.append(seconds)
                peaks.append(peak)
            ratios = [copy / conversion for copy, conversion in zip(copies, conversions)]
            speeds = [size / 1e9 / statistics.median(times) for times in (copies, conversions)]
            print(
                f"{source.name + ' -> ' + to:14} {speeds[0]:10.3f} {speeds[1]:13.3f} {statistics.median(ratios):15.2f} "
                f"{f'{min(ratios):.2f}-{max(ratios):.2f}':>13} {max(peaks) / 1e6:18.0f}",
                flush=True,
            )
            shutil.rmtree(source)
        found = {name: digest(x) for file in stages[2].glob("*.safetensors") for name, x in read_tensors(file).items()}
        if found != digests:
            wrong = [name for name in digests.keys() | found.keys() if digests.get(name) != found.get(name)]
            raise SystemExit(f"{len(wrong)} of {len(digests)} tensors differ: {', '.join(sorted(wrong)[:8])}")
        print(f"all {len(found)} tensors byte-identical after there and back")


if __name__ == "__main__":
    app.run(main)
