"""A model small enough to train in a test, and a batch for it."""

import functools

import jax
import numpy as np

from dsv2_jax import model, train_state
from dsv2_jax.config import tiny
from dsv2_jax.fields import override
from dsv2_jax.train_config import TrainConfig, train_preset
from dsv2_jax.train_state import TrainState
from sharding.mesh import make_mesh

FIELDS = (
    "vocab_size=64 hidden_size=32 num_hidden_layers=2 num_attention_heads=2 q_lora_rank=16 kv_lora_rank=16 qk_nope_head_dim=8 "
    "qk_rope_head_dim=4 v_head_dim=8 intermediate_size=64 moe_intermediate_size=16 seq_len=16 warmup_steps=1 "
    # a gradient that is clipped, decay that shows, and a first update that is not learning_rate * sign(gradient)
    "learning_rate=1e-2 clip_norm=0.1 weight_decay=1 epsilon=1e-5"
)
MODEL, TRAIN = override([tiny(), train_preset("tiny")], FIELDS.split())


@functools.cache
def initial() -> dict[str, np.ndarray]:
    with jax.set_mesh(make_mesh()):
        return numpy(model.parameters(model.init(MODEL, 0, "float32")))


def new_state(config: TrainConfig = TRAIN) -> TrainState:
    """Step 0, the same on every mesh."""
    like = train_state.abstract(MODEL, config).params
    leaves = [jax.device_put(initial()[name], leaf.sharding) for name, leaf in model.parameters(like).items()]
    return train_state.start(jax.tree.unflatten(jax.tree.structure(like), leaves), config)


def batch(microbatches: int = 1, stop: bool = False) -> train_state.Batch:
    """16 rows of two documents, the end of a row padding, cut into microbatches."""
    tokens = np.random.default_rng(0).integers(2, 64, (16, 17)).astype(np.int32)
    segments = np.tile(np.repeat([1, 2, 0], [6, 8, 2]), (16, 1)).astype(np.int32)
    positions = np.tile([*range(6), *range(8), *range(2)], (16, 1)).astype(np.int32)
    given = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "positions": positions, "segment_ids": segments}
    given["loss_mask"] = (segments > 0).astype(np.float32)
    parts = [dict(zip(given, arrays)) for arrays in zip(*(np.split(a, microbatches) for a in given.values()))]
    return train_state.place(parts, microbatches, stop)


def numpy(arrays: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in arrays.items()}
