"""How much of a checkpoint each of several processes reads: `python -m benchmarks.load_at_size --checkpoint=DIR [--processes=2]`.

Every process has one CPU device and its share of the routed experts; all else is whole on each. Prints a line a process: the bytes
it read of the checkpoint's, seconds, and its peak anonymous memory (RssAnon, sampled every 20 ms). `benchmarks.random_checkpoint`
makes a checkpoint: V2's shapes with 4 layers are 26 GB.
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from dsv2_jax import model
from dsv2_jax.convert import open_checkpoint
from dsv2_jax.weights import Weights
from sharding.mesh import make_mesh, start_processes

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "A Hugging Face directory or a native one.", required=True)
flags.DEFINE_integer("processes", 2, "How many; they divide the experts.", lower_bound=2)
flags.DEFINE_enum("weights_dtype", "fp8", ["fp8", "bfloat16"], "What is made of the weights.")
flags.DEFINE_integer("process", None, "Set for each process by the first.")
ADDRESS = "localhost:29555"


class Counted:
    """Weights that count the bytes that are read of them."""

    def __init__(self, weights: Weights):
        self._weights, self._lock, self.bytes_read = weights, threading.Lock(), 0

    def __getattr__(self, name: str):
        return getattr(self._weights, name)

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        part = self._weights.read(path, index)
        with self._lock:
            self.bytes_read += part.nbytes
        return part


def main(_: list[str]) -> None:
    if FLAGS.process is not None:
        return load()
    command = [sys.executable, "-m", "benchmarks.load_at_size", *FLAGS.flags_into_string().split("\n")]
    processes = [subprocess.Popen([*command, f"--process={i}"]) for i in range(FLAGS.processes)]
    codes = [process.wait() for process in processes]
    sys.exit(any(codes))


def load() -> None:
    jax.config.update("jax_platforms", "cpu")
    start_processes(ADDRESS, FLAGS.processes, FLAGS.process)
    peak, done = [0], threading.Event()

    def sample():
        while not done.wait(0.02):
            status = Path("/proc/self/status").read_text()
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)

    sampler = threading.Thread(target=sample)
    sampler.start()
    weights = Counted(open_checkpoint(FLAGS.checkpoint))
    whole = sum(np.prod(shape, dtype=np.int64) * dtype.itemsize for shape, dtype in weights.shapes.values())
    began = time.perf_counter()
    with jax.set_mesh(make_mesh(expert=FLAGS.processes)):
        decoder = jax.block_until_ready(model.load(weights, "bfloat16", fp8=FLAGS.weights_dtype == "fp8"))
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    mine = sum(shard.data.nbytes for leaf in jax.tree.leaves(decoder) for shard in leaf.addressable_shards)
    print(
        f"process {FLAGS.process}: read {weights.bytes_read / 1e9:.2f} of {whole / 1e9:.2f} GB in {seconds:.0f} s,"
        f" holds {mine / 1e9:.2f} GB as {FLAGS.weights_dtype}, peak {peak[0] / 1e9:.2f} GB",
        flush=True,
    )


if __name__ == "__main__":
    app.run(main)
