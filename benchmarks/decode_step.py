"""The decode step by itself: its two programs with random weights, without the engine around them, and when each kernel of it runs.

    python -m benchmarks.decode_step 1x1100 256x1100
    python -m benchmarks.decode_step --weights_dtype=fp8 --cache_dtype=int6 1792x4160
    python -m benchmarks.decode_step --trace=step.txt 1x1100

A load is requests and the tokens that each has. Printed are the least and the median time of the step, without and with the choice of
tokens, of rounds that take turns. `--trace` writes the kernels of some steps of the last load: begin and duration in us, and name.
"""

import glob
import gzip
import json
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dsv2_jax import cache, config, engine, model, steps
from dsv2_jax.rotation import rotated
from pallas_kernels.latent_pages import PAGE
from sharding.mesh import make_mesh

ROUNDS, STEPS, TRACED = 6, 50, 4
FLAGS = flags.FLAGS
flags.DEFINE_enum("preset", "v2_lite", list(config.PRESETS), "The model's size.")
flags.DEFINE_enum("weights_dtype", "bfloat16", ["bfloat16", "fp8"], "Of the layers' matrices.")
flags.DEFINE_enum("cache_dtype", "bfloat16", list(cache.FORMATS), "Of the latent cache.")
flags.DEFINE_string("trace", None, "A file for the kernels of the last load's steps.")


class DecodeStep:
    """Requests that stay where they are: each step reads the same tokens, writes to the same place, and has the last one's choice as input."""

    def __init__(self, decoder: model.Decoder, cache_dtype: str, requests: int, context: int):
        self.model, self.w_head = decoder, decoder.w_head[...]
        own = context // PAGE + 1  # pages of a request, and page 0 is nobody's
        self.pages = cache.empty(decoder.cfg, requests * own + 1, cache_dtype)
        rows = -(-requests // engine.LEAST) * engine.LEAST
        most = -(-decoder.cfg.max_position_embeddings // PAGE)
        rows_BX = np.zeros((rows, 2 + engine.table_width(own, most)), np.int32)
        rows_BX[:, :2] = -1
        rows_BX[:requests, 0], rows_BX[:requests, 1] = np.arange(requests), context
        rows_BX[:requests, 2 : 2 + own] = 1 + np.arange(requests * own).reshape(requests, own)
        self.rows = engine.place(rows_BX)
        self.tokens = engine.place(np.random.default_rng(0).integers(0, decoder.cfg.vocab_size, rows).astype(np.int32))

    def run(self, count: int, choose: bool) -> float:
        """Milliseconds a step, the mean of so many."""
        begin = time.perf_counter()
        for _ in range(count):
            self.pages, last, _ = steps.decode(self.model, self.pages, self.tokens, self.rows)
            if choose:
                self.tokens, _, _ = steps.next_tokens(self.w_head, self.tokens, None, last, None, 0)
        jax.block_until_ready((self.pages, self.tokens))
        return (time.perf_counter() - begin) / count * 1e3

    def trace(self, path: str) -> None:
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                self.run(TRACED, choose=True)
            (found,) = glob.glob(f"{directory}/**/*.trace.json.gz", recursive=True)
            with gzip.open(found) as file:
                events = json.load(file)["traceEvents"]
        threads = [event for event in events if event.get("name") == "thread_name"]
        streams = {(event["pid"], event["tid"]) for event in threads if "Stream" in event["args"]["name"]}
        kernels = sorted(
            (event["ts"], event["dur"], event["name"])
            for event in events
            if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams
        )
        with open(path, "w") as file:
            file.writelines(f"{begin - kernels[0][0]:10.2f} {duration:8.2f} {name}\n" for begin, duration, name in kernels)


def main(argv: list[str]) -> None:
    loads = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in argv[1:]]
    if not loads or None in loads:
        raise app.UsageError(f"{' '.join(argv[1:])!r}: expected REQUESTSxTOKENS, as 256x1100")
    loads = [tuple(map(int, load.groups())) for load in loads]
    fp8, cache_dtype = FLAGS.weights_dtype == "fp8", FLAGS.cache_dtype
    with jax.set_mesh(make_mesh(1, 1)):
        decoder = model.init(config.preset(FLAGS.preset), 0, jnp.bfloat16, fp8)
        decoder = rotated(decoder) if cache_dtype == "int6" else decoder
        print(f"{jax.devices()[0].device_kind}, {FLAGS.preset}, weights {FLAGS.weights_dtype}, cache {cache_dtype}")
        print("requests  tokens  step ms (median)  with choice (median)   tokens/s")
        for requests, context in loads:
            step = DecodeStep(decoder, cache_dtype, requests, context)
            fences = steps.fences(decoder, len(step.rows), step.rows.shape[1] - 2)
            step.run(STEPS, choose=True)
            alone, both = zip(*((step.run(STEPS, choose=False), step.run(STEPS, choose=True)) for _ in range(ROUNDS)))
            texts = [f"{min(times):8.3f} ({statistics.median(times):.3f})" for times in (alone, both)]
            print(f"{requests:8} {context:7} {texts[0]:>17} {texts[1]:>21} {requests / min(both) * 1e3:10.1f}", flush=True)
            if FLAGS.trace and (requests, context) == loads[-1]:
                step.trace(FLAGS.trace)
            del step, fences


if __name__ == "__main__":
    app.run(main)
