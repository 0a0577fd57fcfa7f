"""Damaged checkpoints, counted: `python tests/campaign_corruption.py 1000` (part of `make campaign`; tests/test_checkpoint.py does a few).

A small checkpoint is damaged in one place and read by all that reads one: that must be told, in a line that names a file or an
array, or do no harm. A save that finds no room must say so, and leave the earlier steps as they were.
"""

import collections
import contextlib
import errno
import faulthandler
import grp  # noqa: F401 (a library imports it late, when nobody may read where Python lies)
import itertools
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
import orbax.checkpoint as ocp
from training_cases import MODEL, TRAIN, numpy

from dsv2_jax import checkpoint, train_state
from dsv2_jax.checkpoint import Checkpoints, WorkdirWeights
from dsv2_jax.fields import InputError
from sharding.mesh import make_mesh

CONFIG = {"model": MODEL.to_hf("float32"), "train": {"dtype": "float32"}}
OLD, NEW, NEXT = 1, 2, 3  # steps: the second is damaged, the third meets a full disk
NOBODY = 65534
HANG_S = 120
TMPFS_SIZE = 4 << 20


def state_at(step: int) -> train_state.TrainState:
    """A state of arbitrary numbers, the same on every mesh."""
    rng = np.random.default_rng(step)
    like = train_state.abstract(MODEL, TRAIN)
    state = jax.tree.map(lambda leaf: jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding), like)
    return state._replace(step=jax.device_put(np.int32(step), like.step.sharding))


def save(workdir: Path, *steps: int, keep: int = 3) -> Checkpoints:
    checkpoints = Checkpoints(workdir, CONFIG, keep)
    for step in steps:
        checkpoints.save(state_at(step), {"position": step})
    checkpoints.wait()
    return checkpoints


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def must_fail(code: int, action, *args) -> None:
    """The control of an injected fault: what it should forbid does fail."""
    try:
        action(*args)
    except OSError as error:
        assert error.errno == code, error
    else:
        raise AssertionError(f"the injected fault does not fire: expected {errno.errorcode[code]}")


# -- damages: each spoils `file`, or more, and returns what is not as it was


def flip_bit(step: Path, file: Path, chance: random.Random) -> list[Path]:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return [file]


def zero_block(step: Path, file: Path, chance: random.Random) -> list[Path]:
    content = bytearray(file.read_bytes())
    block = slice(start := 4096 * chance.randrange(-(-len(content) // 4096)), start + 4096)
    content[block] = bytes(len(content[block]))
    file.write_bytes(content)
    return [file]


def truncate(step: Path, file: Path, chance: random.Random) -> list[Path]:
    os.truncate(file, chance.randrange(file.stat().st_size))
    return [file]


def delete(step: Path, file: Path, chance: random.Random) -> list[Path]:
    file.unlink()
    return [file]


def swap(step: Path, file: Path, chance: random.Random) -> list[Path]:
    other = chance.choice([other for other in files(step) if other != file])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return [file, other]


def make_stale(step: Path, file: Path, chance: random.Random) -> list[Path]:
    """A file, or a whole item, is what it was in the older step. Data files have random names: any of the same directory."""
    place = file.relative_to(step)
    if chance.random() < 0.5:
        place = Path(place.parts[0])
    old = step.with_name(str(OLD)) / place
    if old.is_dir():
        shutil.rmtree(step / place)
        shutil.copytree(old, step / place)
    else:
        shutil.copyfile(old if old.exists() else chance.choice(files(old.parent)), step / place)
    return [step / place]


def forbid(step: Path, file: Path, chance: random.Random) -> list[Path]:
    file.chmod(0)
    return [file]


DAMAGES = {
    "bit flip": flip_bit,
    "zeroed block": zero_block,
    "truncation": truncate,
    "deletion": delete,
    "swapped files": swap,
    "stale file": make_stale,
    "permission denied": forbid,
}


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As somebody whom permissions bind: root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


class Damaged:
    """A workdir with two steps, of which the newer is damaged, read and mended again and again."""

    def __init__(self, scratch: Path) -> None:
        self.whole, self.workdir = scratch / "whole", scratch / "damaged"
        save(self.whole, OLD, NEW)
        shutil.copytree(self.whole, self.workdir)
        self.step = self.workdir / "checkpoints" / str(NEW)
        self.abstract = train_state.abstract(MODEL, TRAIN)
        self.expected = numpy(train_state.arrays(state_at(NEW)))
        self.readers = {"restore": self.restore, "weights": self.weights, "verify": self.verify}
        with unprivileged():  # the control: what is not damaged is read
            assert all(read() for read in self.readers.values()) and self.orbax()

    # Each reader says whether what it read is what was saved, or raises.

    def restore(self) -> bool:
        config = checkpoint.read_config(self.workdir, NEW)
        state, data = Checkpoints(self.workdir, CONFIG, keep=3).restore(NEW, self.abstract)
        return data == {"position": NEW} and config == CONFIG and same(numpy(train_state.arrays(state)), self.expected)

    def weights(self) -> bool:
        weights = WorkdirWeights(self.workdir)
        read = {checkpoint.PARAMS + path: weights.read(path) for path in weights.shapes}
        return same(read, {name: array for name, array in self.expected.items() if name.startswith(checkpoint.PARAMS)})

    def verify(self) -> bool:
        return bool(checkpoint.verify(self.workdir, NEW))

    def orbax(self) -> bool:
        """The storage library without our checksums: the control that a damage matters."""
        try:
            state = ocp.StandardCheckpointer().restore(self.step / "state", train_state.arrays(self.abstract))
        except Exception:
            return True
        return same(numpy(state), self.expected)

    def case(self, kind: str, chance: random.Random) -> tuple[dict[str, str], list[str]]:
        """Damages, reads and mends: the outcome of each reader, and in words what must not be."""
        there = files(self.step)  # half by number, half by size
        sizes = [file.stat().st_size for file in there]
        file = chance.choice(there) if chance.random() < 0.5 else chance.choices(there, sizes)[0]
        spoiled = DAMAGES[kind](self.step, file, chance)
        outcomes, wrong = {}, []
        with unprivileged() if kind == "permission denied" else contextlib.nullcontext():
            if kind == "permission denied":
                must_fail(errno.EACCES, file.read_bytes)
            for name, read in self.readers.items():
                try:
                    outcomes[name], told = ("harmless" if read() else "silent wrong"), None
                except Exception as error:
                    told = f"{type(error).__name__}: {error}"
                    outcomes[name] = "told" if isinstance(error, InputError) and self.names(told, spoiled) else "unclear"
                if outcomes[name] in ("silent wrong", "unclear"):
                    wrong.append(f"{kind} of {spoiled}: {name} {outcomes[name]}: {told}")
            outcomes["orbax"] = "harmless" if self.orbax() else "silent wrong"
        if outcomes["verify"] != outcomes["restore"]:
            wrong.append(f"{kind} of {spoiled}: {outcomes}")
        shutil.rmtree(self.step)
        shutil.copytree(self.whole / "checkpoints" / str(NEW), self.step)
        return outcomes, wrong

    def names(self, message: str, spoiled: list[Path]) -> bool:
        """Whether a message is one line that names a damaged file or an array."""
        named = any(str(path) in message for path in spoiled) or any(f": {name}" in message for name in self.expected)
        return named and "\n" not in message


# -- no room: each fault yields when it is on


@contextlib.contextmanager
def file_size_limit(workdir: Path, chance: random.Random) -> Iterator[None]:
    """No file may grow beyond a size; works for everybody."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = chance.randrange(1, max(file.stat().st_size for file in files(workdir)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        must_fail(errno.EFBIG, (workdir / "control").write_bytes, bytes(size + 1))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def full_disk(workdir: Path, chance: random.Random) -> Iterator[None]:
    """The disk, a small one, is full but for some room, from none to a little more than a step needs."""
    ballast = workdir / "ballast"
    room = chance.randrange(2 * sum(file.stat().st_size for file in files(workdir / "checkpoints" / str(NEW))))
    ballast.write_bytes(bytes(max(shutil.disk_usage(workdir).free - room, 0)))
    try:
        must_fail(errno.ENOSPC, (workdir / "control").write_bytes, bytes(TMPFS_SIZE))
        (workdir / "control").unlink()
        yield
    finally:
        ballast.unlink()


def save_case(fault, workdir: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Saves a step where there is no room, or little: the outcome, and in words what must not be."""
    told = None
    with fault(workdir, chance):
        try:
            save(workdir, NEXT)
        except (OSError, InputError) as error:
            told = f"{type(error).__name__}: {error}"
        except Exception as error:
            told = f"unclear: {type(error).__name__}: {error}"
    outcome = "harmless" if told is None else "unclear" if told.startswith("unclear") or str(workdir) not in told else "told"
    wrong = [f"{fault.__name__}: {told}"] if outcome == "unclear" else []
    steps = [OLD, NEW, NEXT] if told is None else [OLD, NEW]
    try:
        assert checkpoint.latest_step(workdir) == steps[-1], "a step that was not saved counts"
        for step in steps:
            checkpoint.verify(workdir, step)
        if told:
            save(workdir, NEXT)  # there is room again
        checkpoint.verify(workdir, NEXT)
    except Exception as error:
        wrong.append(f"{fault.__name__}: after {told!r}: {error}")
    shutil.rmtree(workdir / "checkpoints" / str(NEXT), ignore_errors=True)
    return outcome, wrong


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Makes `directory` a small disk where that is permitted; yields whether it is."""
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={TMPFS_SIZE}", "tmpfs"]
    mounted = shutil.which("mount") and not subprocess.run(["mount", *options, directory], stderr=subprocess.DEVNULL).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            subprocess.run(["umount", directory], check=True)


def campaign(cases: int, seed: int) -> tuple[dict[str, collections.Counter], list[str]]:
    """Counts of outcomes by kind, as `restore told`, and in words what must not be."""
    counts: dict[str, collections.Counter] = {}
    wrong: list[str] = []
    chance = random.Random(seed)
    for library in ("absl", "asyncio"):  # a failing Orbax complains at length, and abandons its coroutines
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as directory, small_disk(Path(directory, "disk")) as mounted:
        scratch = Path(directory)
        scratch.chmod(0o755)
        damaged = Damaged(scratch)
        faults = {"file size limit": (file_size_limit, scratch / "limited")}
        faults |= {"disk full": (full_disk, scratch / "disk" / "run")} if mounted else {}
        for _, workdir in faults.values():
            shutil.copytree(damaged.whole, workdir)
        for kind in itertools.islice(itertools.cycle([*DAMAGES, *faults]), cases):
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            if kind in DAMAGES:
                outcomes, more = damaged.case(kind, chance)
            else:
                outcome, more = save_case(*faults[kind], chance)
                outcomes = {"save": outcome}
            faulthandler.cancel_dump_traceback_later()
            counts.setdefault(kind, collections.Counter()).update(f"{who} {outcome}" for who, outcome in outcomes.items())
            counts[kind]["cases"] += 1
            wrong += more
    return counts, wrong


def main(cases: int) -> int:
    jax.config.update("jax_platforms", "cpu")
    warnings.simplefilter("ignore")
    sys.unraisablehook = lambda _: None  # abandoned coroutines, by the hundred
    with jax.set_mesh(make_mesh()):
        counts, wrong = campaign(cases, seed=0)
    heads = ["cases", "restore told", "restore harmless", "weights told", "weights harmless", "verify told", "verify harmless"]
    heads += ["save told", "save harmless", "orbax silent wrong"]
    print("kind".ljust(18), *heads, sep=" | ")
    for kind, counted in counts.items():
        print(kind.ljust(18), *(str(counted[head]).rjust(len(head)) for head in heads), sep=" | ")
    silent = sum(
        n for counted in counts.values() for head, n in counted.items() if head.endswith("silent wrong") and "orbax" not in head
    )
    unclear = sum(n for counted in counts.values() for head, n in counted.items() if head.endswith("unclear"))
    print(f"cases: {cases}, silently wrong: {silent}, unclear: {unclear}, wrong in all: {len(wrong)}")
    print(*wrong[:20], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
