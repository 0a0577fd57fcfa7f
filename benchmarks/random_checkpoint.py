"""A random Hugging Face checkpoint of true shapes: `python -m benchmarks.random_checkpoint --dir=DIR [--preset=v2_lite] [--layers=N]`.

Norms are ones; all else is normal in bfloat16, with the configuration's deviation, so that the router spreads tokens over all
experts as a trained one does. (With weights of one value, or zeros, every token goes to the same few: serving them reads a
fraction of the bytes.) Tensors are stretches of the same noise. There is no tokenizer: give programs token ids.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
from absl import app, flags

from dsv2_jax.config import PRESETS, ModelConfig, preset
from dsv2_jax.hugging_face import CONFIG, INDEX, layout
from dsv2_jax.tensor_files import DTYPES, create_tensors

SHARD_BYTES = 4_000_000_000


def make(directory: Path, config: ModelConfig) -> dict[str, str]:
    """Writes the checkpoint, several shards of it; returns the digest of every tensor."""
    directory.mkdir()
    shapes = {name: tensor.shape for name, tensor in layout(config).items()}
    ends = itertools.accumulate(2 * math.prod(shape) for shape in shapes.values())
    shard_of = {name: f"model-{end // SHARD_BYTES + 1:05}.safetensors" for name, end in zip(shapes, ends)}
    bfloat16 = DTYPES["BF16"]
    longest = max(map(math.prod, shapes.values())) + 2**20  # a tensor begins anywhere in the first 2**20
    noise = np.random.default_rng(0).standard_normal(longest, np.float32)
    noise = (noise * np.float32(config.initializer_range)).astype(bfloat16)
    digests = {}
    for shard, names in itertools.groupby(shapes, key=shard_of.get):
        names = list(names)
        with create_tensors(directory / shard, {name: (shapes[name], bfloat16) for name in names}) as write:
            for name in names:
                start = len(digests) * 7919 % 2**20
                tensor = noise[start : start + math.prod(shapes[name])].reshape(shapes[name])
                if name.endswith("norm.weight"):
                    tensor = np.ones(shapes[name], bfloat16)
                write(name, tensor)
                digests[name] = digest(tensor)
    (directory / CONFIG).write_text(json.dumps(config.to_hf("bfloat16")))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return digests


def digest(tensor: np.ndarray) -> str:
    return hashlib.sha1(memoryview(tensor.reshape(-1).view(np.uint8)), usedforsecurity=False).hexdigest()


def main(_: list[str]) -> None:
    config = preset(FLAGS.preset)
    if Path(FLAGS.dir).exists():
        raise SystemExit(f"--dir={FLAGS.dir} exists, expected a directory to make")
    if FLAGS.layers:
        config = dataclasses.replace(config, num_hidden_layers=FLAGS.layers)
    digests = make(Path(FLAGS.dir), config)
    size = sum(file.stat().st_size for file in Path(FLAGS.dir).iterdir())
    print(f"{FLAGS.dir}: {config.num_hidden_layers} layers, {len(digests)} tensors, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("dir", None, "A directory to make.", required=True)
    flags.DEFINE_enum("preset", "v2_lite", list(PRESETS), "The shapes.")
    flags.DEFINE_integer("layers", None, "All of the preset's if not given.", lower_bound=1)
    app.run(main)
