"""How far this program is from PyTorch, on the same checkpoints.

    python -m dsv2_jax.parity             every published family, as tiny random checkpoints (`make parity`)
    python -m dsv2_jax.parity --hf=DIR    a Hugging Face directory, layer by layer

Compared are the residual stream after every layer, the experts chosen, the logits, and tokens decoded greedily through the
cache, in float32 and in bfloat16. PyTorch runs first, in a Python of its own (`parity_reference.py`), and leaves its activations
in files. The exit code is 0 if every bar holds, else 1; a reference that cannot run is a failure too.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from dsv2_jax import cli, completion, convert, model
from dsv2_jax.fields import InputError
from dsv2_jax.parity_reference import FAMILIES
from sharding.mesh import make_mesh

LENGTHS = (2, 37, 331)  # the families' original window is 64 tokens, so the last one reaches far past it
NEW_TOKENS = 16
LOGITS_BAR = 5e-4  # float32: largest absolute difference
BFLOAT16_BAR = 1.2  # our error over PyTorch's own, both against float32, of the median token's logits
# With these tokens no router logit of the families comes nearer to a tie than 3e-5, ten times what float32 rounding moves it.
TOKEN_SEED = 3

Arrays = dict[str, np.ndarray]  # named as in `parity_reference.activations`


class Difference(NamedTuple):
    """One run against another, over all sequences. Relative is ||a - b|| / ||b||."""

    logits_max: float  # largest |a - b|
    logits: float  # relative
    token: float  # relative, of one token's logits, the median over tokens: not moved by a near-tie that fell the other way
    layers: list[float]  # relative, of the residual stream
    experts: dict[int, int]  # by MoE layer: tokens whose set of experts differs
    tokens: int
    greedy: int  # decoded tokens that differ

    @property
    def flips(self) -> int:
        return sum(self.experts.values())

    @property
    def routings(self) -> int:
        return self.tokens * len(self.experts)


class Result(NamedTuple):
    """A checkpoint's three differences; the bfloat16 ones are to PyTorch's float32."""

    float32: Difference
    bfloat16: Difference
    torch_bfloat16: Difference

    @property
    def float32_holds(self) -> bool:
        return self.float32.logits_max <= LOGITS_BAR and not self.float32.flips and not self.float32.greedy

    @property
    def bfloat16_holds(self) -> bool:
        return self.bfloat16.token <= BFLOAT16_BAR * self.torch_bfloat16.token


def difference(a: Arrays, b: Arrays) -> Difference:
    """Compares two runs of the same checkpoint on the same sequences."""

    def joined(run: Arrays, name: str, axis: int) -> np.ndarray:
        return np.concatenate([run[key] for key in sorted(run) if key.startswith(name)], axis)

    def error(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    axes = {"logits": 0, "hidden": 1, "experts": 1, "greedy": 0}
    logits, hidden, experts, greedy = ((joined(a, name, axis), joined(b, name, axis)) for name, axis in axes.items())
    differs = (np.sort(experts[0], -1) != np.sort(experts[1], -1)).any(-1)
    return Difference(
        float(np.abs(logits[0] - logits[1]).max()),
        error(*logits),
        float(np.median(np.linalg.norm(logits[0] - logits[1], axis=-1) / np.linalg.norm(logits[1], axis=-1))),
        [error(*layer) for layer in zip(*hidden)],
        dict(zip(b["moe_layers"].tolist(), differs.sum(-1).tolist())),
        differs.shape[1],
        int((greedy[0] != greedy[1]).sum()),
    )


def activations(weights: convert.Weights, dtype: str, sequences: list[np.ndarray]) -> Arrays:
    """What this program computes for each sequence of token ids [T], in the reference's form."""
    decoder = model.load(weights, dtype)
    result = {}
    for i, tokens in enumerate(sequences):
        trace = model.trace(decoder, tokens[None])
        result[f"logits_{i}"] = np.asarray(trace.logits[0])
        result[f"hidden_{i}"] = np.stack([np.asarray(x_BTD[0], np.float32) for x_BTD in trace.hidden])
        chosen = [trace.experts[layer][0] for layer in sorted(trace.experts)]
        result[f"experts_{i}"] = np.array(chosen, np.int32).reshape(len(chosen), len(tokens), weights.config.num_experts_per_tok)
    result["moe_layers"] = np.array(sorted(trace.experts), np.int32)
    written = completion.greedy(decoder, [tokens.tolist() for tokens in sequences], NEW_TOKENS)
    return result | {f"greedy_{i}": np.array(tokens, np.int32) for i, tokens in enumerate(written)}


def run_reference(*arguments: str | Path, threads: int | None = None) -> None:
    """Runs parity_reference.py with PyTorch's Python; exits with 1 if that does not work."""
    python = os.environ.get("TORCH_PYTHON") or Path(__file__).parents[1] / ".venv-reference/bin/python"
    command = [python, "-I", Path(__file__).with_name("parity_reference.py"), *arguments]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    print(f"PyTorch writes {arguments[0]} ...", flush=True)
    try:
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        sys.exit(f"parity: FAILED: cannot run {python} ({error.strerror}): `make parity` installs it, TORCH_PYTHON names another")
    if done.returncode:
        sys.stderr.write(done.stderr)
        why = "killed, probably for want of memory" if done.returncode == -9 else f"exit code {done.returncode}"
        sys.exit(f"parity: FAILED: the reference stopped ({why})")


def compare(directories: list[Path], scratch: Path, exact: bool) -> dict[str, Result]:
    """Runs both programs on checkpoints; returns the results by the checkpoints' names.

    Args:
        scratch: an empty folder for files in between.
        exact: the weights are bfloat16 values, so one float32 run of PyTorch serves both dtypes. Else a second one is made with
            weights rounded to bfloat16: what is measured is the error of computing in bfloat16, not that of rounding the weights.
    """
    opened = {directory: convert.open_checkpoint(directory) for directory in directories}
    configs = [weights.config for weights in opened.values()]
    longest = min(cfg.max_position_embeddings for cfg in configs) - NEW_TOKENS
    if longest < 1:
        raise InputError(f"max_position_embeddings is {longest + NEW_TOKENS}, expected more than {NEW_TOKENS}")
    vocab = min(cfg.vocab_size for cfg in configs)
    rng = np.random.default_rng(TOKEN_SEED)
    sequences = [rng.integers(0, vocab, min(length, longest), dtype=np.int32) for length in LENGTHS]
    np.savez(scratch / "tokens.npz", new_tokens=NEW_TOKENS, **{f"sequence_{i}": tokens for i, tokens in enumerate(sequences)})
    dtypes = ["float32", "bfloat16"] + ([] if exact else ["rounded"])
    files = ["--hf", *directories, "--tokens", scratch / "tokens.npz", "--out", scratch / "activations"]
    threads = 1 if len(directories) > 1 else None  # the tiny ones only get slower with more
    run_reference("activations", *files, "--dtype", *dtypes, threads=threads)

    def result(directory: Path) -> Result:
        torch = {dtype: dict(np.load(scratch / f"activations/{directory.name}-{dtype}.npz")) for dtype in dtypes}
        base = torch["float32" if exact else "rounded"]
        with jax.set_mesh(make_mesh()):
            return Result(
                difference(activations(opened[directory], "float32", sequences), torch["float32"]),
                difference(activations(opened[directory], "bfloat16", sequences), base),
                difference(torch["bfloat16"], base),
            )

    print("This program runs on the same checkpoints ...\n", flush=True)
    with ThreadPoolExecutor(2) as pool:  # nearly all the time goes into compiling
        return dict(zip([directory.name for directory in directories], pool.map(result, directories)))


def table(header: str, rows: list[list]) -> None:
    """Prints rows under a header whose columns are separated by `|`; the first column is aligned to the left."""
    cells = [header.split("|"), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *rest in cells:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]).rstrip())
    print(flush=True)


def report(results: dict[str, Result]) -> None:
    """Prints one line a checkpoint and dtype."""
    print(f"float32 against PyTorch (bars: logits within {LOGITS_BAR}, no other expert, no other token)")
    rows = []
    for name, result in results.items():
        run, verdict = result.float32, "ok" if result.float32_holds else "FAILED"
        worst = int(np.argmax(run.layers))
        errors = [f"{run.logits_max:.1e}", f"{run.layers[worst]:.1e}", worst]
        rows.append([name, *errors, run.flips, run.routings, run.greedy, verdict])
    table("checkpoint|logits max abs|worst layer rel|layer|experts differing|of|greedy differing|", rows)
    print(f"bfloat16 against PyTorch's float32 (bar: the median token's error at most {BFLOAT16_BAR} times PyTorch's)")
    rows = []
    for name, result in results.items():
        run, torch, verdict = result.bfloat16, result.torch_bfloat16, "ok" if result.bfloat16_holds else "FAILED"
        errors = [f"{run.token:.4f}", f"{torch.token:.4f}", f"{run.token / torch.token:.2f}"]
        errors += [f"{run.logits:.4f}", f"{torch.logits:.4f}"]
        rows.append([name, *errors, run.flips, torch.flips, run.routings, run.greedy, torch.greedy, verdict])
    table("checkpoint|median token|PyTorch|ratio|all logits|PyTorch|experts flipped|PyTorch|of|greedy differing|PyTorch|", rows)


def report_layers(result: Result) -> None:
    """Prints one line a layer."""
    run, ours, torch = result
    print("The residual stream after each layer: relative errors, and how many tokens' sets of experts differ")
    rows = []
    for layer, error in enumerate(run.layers):
        kind, tokens = ("moe", run.tokens) if layer in run.experts else ("dense", "")
        errors = [f"{ours.layers[layer]:.4f}", f"{torch.layers[layer]:.4f}", f"{ours.layers[layer] / torch.layers[layer]:.2f}"]
        flips = [difference.experts.get(layer, "") for difference in result]
        rows.append([layer, kind, f"{error:.1e}", *errors, *flips, tokens])
    table("layer|kind|float32|bfloat16|PyTorch bfloat16|ratio|differ in float32|bfloat16|PyTorch bfloat16|of tokens", rows)


def main() -> None:
    hf = flags.FLAGS.hf
    print(f"Sequences of {LENGTHS} tokens; {NEW_TOKENS} more are decoded greedily through the cache.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if hf is None:
            run_reference("families", scratch / "families", threads=1)
            results = compare([scratch / "families" / name for name in FAMILIES], scratch, exact=True)
        else:
            directory = Path(hf).resolve()
            if not (directory / "config.json").is_file():
                raise InputError(f"--hf={hf}: no config.json there, expected a Hugging Face directory")
            results = compare([directory], scratch, exact=convert.open_checkpoint(directory).dtype == "bfloat16")
            report_layers(results[directory.name])
    report(results)
    held = all(result.float32_holds and result.bfloat16_holds for result in results.values())
    print("parity: every bar holds" if held else "parity: FAILED")
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    flags.DEFINE_string("hf", None, "a Hugging Face directory to compare on; without it, tiny random checkpoints of every family")
    cli.run(main)
