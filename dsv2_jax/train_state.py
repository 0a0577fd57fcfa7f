"""What training changes, and one step of it: objective, gradient, clipping, AdamW, learning rate (paper section 3.1.2).

The master weights are float32; a step casts them to the compute dtype inside the differentiated function, so that gradients
and optimizer are float32. Letters: B batch, T positions.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from dsv2_jax import model
from dsv2_jax.config import ModelConfig, TrainConfig
from dsv2_jax.loss import log_probs
from dsv2_jax.model import Decoder
from dsv2_jax.weights import path_name
from sharding import specs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """A plain pytree: whatever a step reads and writes, but the data."""

    step: jax.Array  # int32 []: updates made
    params: Decoder  # float32
    opt_state: optax.OptState


@functools.partial(jax.jit, static_argnames="config")
def start(params: Decoder, config: TrainConfig) -> TrainState:
    """Step 0 with these parameters and a fresh optimizer, sharded alike."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config).init(params))


def abstract(model_config: ModelConfig, config: TrainConfig) -> TrainState:
    """Shapes, dtypes and shardings on the current mesh, without the arrays."""
    mesh = jax.sharding.get_mesh()

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else specs.replicated  # counts have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, jax.eval_shape(functools.partial(start, config=config), model.abstract(model_config, "float32")))


def learning_rate(config: TrainConfig, step: jax.Array) -> jax.Array:
    """float32 []: the rate of the update number `step`, counted from 1: a linear rise, then two drops by `decay_factor`."""
    rate = config.learning_rate * jnp.minimum(1.0, step / max(config.warmup_steps, 1))
    drops = sum((step > share * config.schedule_steps).astype(jnp.int32) for share in (config.first_decay, config.second_decay))
    return rate * jnp.asarray([1.0, config.decay_factor, config.decay_factor**2])[drops]


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm. Norms' weights do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda updates: learning_rate(config, updates + 1),
            config.beta1,
            config.beta2,
            config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, _: not path_name(path).endswith("norm"), params),
        ),
    )


def objective(params: Decoder, batch: Batch, config: TrainConfig) -> tuple[jax.Array, Metrics]:
    """What is minimised, float32 [], and its parts by name.

    loss/lm is the mean over `loss_mask` of the targets' negative log-probability; loss/expert_balance is alpha_1 times the sum
    over MoE layers of eq. 23's loss, so 1 * alpha_1 for each perfectly balanced layer. moe/max_load is the fullest expert's
    load over a fair one's, the largest of all layers.
    """
    decoder = jax.tree.map(lambda w: w.astype(config.dtype), params)  # all of them: what is trained is what is exported
    hidden_BTD, _, stats = decoder(batch["tokens"], batch["positions"], batch["segment_ids"], remat=config.remat == "full")
    mask_BT = batch["loss_mask"]
    lm = -(log_probs(decoder, hidden_BTD, batch["targets"]) * mask_BT).sum() / jnp.maximum(mask_BT.sum(), 1.0)
    losses = {"loss/lm": lm}
    loads = {}
    if stats:  # a model may have no MoE layer
        losses["loss/expert_balance"] = config.expert_balance * stats["expert_balance"].sum()
        loads["moe/max_load"] = (stats["load"].max(axis=-1) / stats["load"].mean(axis=-1)).max()
    return sum(losses.values()), losses | loads


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> tuple[TrainState, Metrics]:
    """One update. The gradient norm is that before clipping."""
    grads, metrics = jax.grad(objective, has_aux=True)(state.params, batch, config)
    updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
    step = state.step + 1
    metrics |= {"grad_norm": optax.tree.norm(grads), "lr": learning_rate(config, step)}
    return TrainState(step, optax.apply_updates(state.params, updates), opt_state), metrics


def place(batch: Mapping[str, np.ndarray]) -> Batch:
    """This process's rows of a batch, as arrays of the whole batch on the current mesh."""
    sharding = NamedSharding(jax.sharding.get_mesh(), specs.tokens_BT)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def arrays(state: TrainState) -> dict[str, Any]:
    """The leaves by dotted name, as in `params.moe.attn.w_dkv` and `opt_state.1.0.mu.moe.attn.w_dkv`."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
