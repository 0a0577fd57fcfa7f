"""kill -9 during training, counted: `python tests/campaign_resume.py 25` (part of `make campaign`; tests/test_train.py does two).

A run that is killed at random moments, and started again each time, must end with the losses and the state of one that is not,
bit for bit.
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
SMALL = (
    "vocab_size=300 num_hidden_layers=2 hidden_size=32 q_lora_rank=16 kv_lora_rank=16 qk_nope_head_dim=8 qk_rope_head_dim=4 "
    "v_head_dim=8 num_attention_heads=2 intermediate_size=64 moe_intermediate_size=16 batch_size=8 seq_len=32 checkpoint_every=3"
)


def write_text(directory: Path) -> None:
    """text.txt: something to train on."""
    (directory / "text.txt").write_text("".join(path.read_text() for path in sorted((ROOT / "dsv2_jax").glob("m*.py"))))


def command(workdir: Path, steps: int, *more: str) -> list[str]:
    """A small run on the text.txt beside its workdir."""
    flags = ["--preset=tiny", f"--workdir={workdir}", f"--data={workdir.parent}/text.txt", f"--steps={steps}"]
    return [sys.executable, "train.py", *flags, *(f"--set={field}" for field in SMALL.split()), *more]


def losses(workdir: Path) -> list[tuple[int, str, str]]:
    """Step, loss and gradient norm of every line of metrics.jsonl, exact."""
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss/lm"].hex(), record["grad_norm"].hex()) for record in records]


def final_state(workdir: Path, step: int) -> dict[str, bytes]:
    """Every array of a checkpoint, parameters and optimizer, as bytes; and the place in the data."""
    directory = workdir / "checkpoints" / str(step)
    state = ocp.StandardCheckpointer().restore(directory.absolute() / "state")
    return {name: np.asarray(value).tobytes() for name, value in state.items()} | {
        "data": (directory / "data" / "metadata").read_bytes()
    }


def kill(workdir: Path, kills: int, moments: random.Random) -> list[int]:
    """Starts a run and kills it, again and again; returns the newest complete checkpoint at each kill (0: none yet).

    One kill in five comes while the program starts, the others within two seconds of training, most of which save something.
    """
    stood = []
    for _ in range(kills):
        process = subprocess.Popen(command(workdir, 1_000_000), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if moments.random() < 0.2:
            time.sleep(moments.uniform(0, 4))
        else:
            while not process.stdout.readline().startswith("compiled"):
                assert process.poll() is None, f"train.py ended by itself with code {process.returncode}"
            time.sleep(moments.uniform(0, 2))
        process.kill()
        process.communicate()
        names = [path.name for path in (workdir / "checkpoints").glob("*")]
        stood.append(max((int(name) for name in names if name.isdigit()), default=0))
    return stood


def run(workdir: Path, steps: int, *more: str) -> None:
    """Trains to `steps`."""
    subprocess.run(command(workdir, steps, *more), cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def compare(whole: Path, killed: Path, steps: int) -> tuple[int, int]:
    """Prints what was compared; returns how many lines and arrays differ."""
    lines = list(itertools.zip_longest(losses(whole), losses(killed)))
    a, b = final_state(whole, steps), final_state(killed, steps)
    differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    wrong = sum(x != y for x, y in lines)
    print(f"lines of metrics.jsonl: {len(lines)}, different: {wrong}")
    print(f"arrays of the final state: {len(a)}, different: {len(differing)} {' '.join(differing)}", flush=True)
    return wrong, len(differing)


def main(kills: int) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        write_text(Path(scratch))
        whole, killed = Path(scratch, "whole"), Path(scratch, "killed")
        stood = kill(killed, kills, random.Random(0))
        print(f"kills: {kills}, at checkpoints {stood}", flush=True)
        steps = stood[-1] + 10
        run(killed, steps)
        run(whole, steps)
        return 1 if any(compare(whole, killed, steps)) else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 25))
