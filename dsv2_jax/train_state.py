"""What training changes, and one step of it: objective, gradient, clipping, AdamW, learning rate (paper section 3.1.2).

The master weights are float32 and lie at rest cut over the whole mesh, like their gradients and moments; a step casts them to
the compute dtype inside the differentiated function and gathers them a layer at a time.
Letters: A microbatches, B sequences of one, T positions, L MoE layers, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv2_jax import model
from dsv2_jax.config import ModelConfig
from dsv2_jax.context import Dropping
from dsv2_jax.loss import log_likelihood
from dsv2_jax.model import Decoder
from dsv2_jax.train_config import TrainConfig
from dsv2_jax.weights import Weights, path_name
from dsv2_jax.weights import load as weights_onto
from sharding import specs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
BALANCES = ("expert_balance", "device_balance", "comm_balance")


class TrainState(NamedTuple):
    """A plain pytree: whatever a step reads and writes, but the data."""

    step: jax.Array  # int32 []: steps made, skipped ones too
    params: Decoder  # float32
    opt_state: optax.OptState


def _start(params: Decoder, config: TrainConfig) -> TrainState:
    params = jax.tree.map_with_path(lambda path, w: jax.reshard(w, specs.at_rest(path, w.shape)), params)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(config).init(params))


start = jax.jit(_start, static_argnames="config")
start.__doc__ = """Step 0 with these parameters, laid to rest, and a fresh optimizer."""


def init(model_config: ModelConfig, config: TrainConfig) -> TrainState:
    """Step 0 with random parameters; each device makes its own part."""

    @jax.jit
    def draw(key: jax.Array) -> TrainState:
        return _start(model.draw(model_config, key, "float32"), config)

    return draw(jax.random.key(config.seed))


def load(weights: Weights, model_config: ModelConfig, config: TrainConfig) -> TrainState:
    """Step 0 with a checkpoint's parameters; each device reads its own part."""
    return start(weights_onto(weights, abstract(model_config, config).params), config)


def abstract(model_config: ModelConfig, config: TrainConfig) -> TrainState:
    """Shapes, dtypes and shardings on the current mesh, without the arrays."""
    mesh = jax.sharding.get_mesh()

    def on_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = leaf.sharding.spec if leaf.sharding else specs.replicated  # counts have none
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(on_mesh, jax.eval_shape(functools.partial(start, config=config), model.abstract(model_config, "float32")))


def learning_rate(config: TrainConfig, step: jax.Array) -> jax.Array:
    """float32 []: the rate of step number `step`, counted from 1: a linear rise, then two drops by `decay_factor`."""
    rate = config.learning_rate * jnp.minimum(1.0, step / max(config.warmup_steps, 1))
    drops = sum((step > last).astype(jnp.int32) for last in config.last_steps_before_drops)
    return rate * jnp.asarray([1.0, config.decay_factor, config.decay_factor**2])[drops]


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, for a learning rate of -1. Norms' weights do not decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, _: not path_name(path).endswith("norm"), params),
        ),
    )


class Share(NamedTuple):
    """What part of a step a microbatch is."""

    tokens: jax.Array  # float32 []: the whole step's targets
    sequences: jax.Array | float  # this microbatch's sequences over the step's
    exempt_B: jax.Array  # sequences of which nothing is dropped


def objective(params: Decoder, batch: Batch, config: TrainConfig, share: Share) -> tuple[jax.Array, Metrics]:
    """A microbatch's part of what is minimised, float32 [], and its parts by name, to be added up over a step.

    loss/lm is the mean over `loss_mask` of the targets' negative log-probability; the balance losses are alpha times the sum
    over MoE layers of eq. 23-31's, so 1 * alpha for each perfectly balanced layer. load [L, E] and dropped [L] count pairs.
    """
    decoder = jax.tree.map(lambda w: w.astype(config.dtype), params)  # all of them: what is trained is what is exported
    decoder = specs.gather(decoder, stacks=False)
    dropping = None
    if config.capacity_factor is not None:
        dropping = Dropping(share.exempt_B, config.capacity_factor, config.drop_pool)
    hidden_BTD, _, stats = decoder(
        *_inputs(batch),
        remat=config.remat,
        regather=config.zero == 3,
        dropping=dropping,
        dispatch=config.dispatch,
    )
    with jax.named_scope("loss"):
        lm = -log_likelihood(decoder, hidden_BTD, batch["targets"], batch["loss_mask"] / share.tokens)
    sums = {"loss/lm": lm} | {f"loss/{name}": jnp.zeros(()) for name in BALANCES}
    if stats:  # a model may have no MoE layer
        for name, (alpha, kind) in _balance_terms(decoder.cfg, config).items():
            sums[f"loss/{name}"] = alpha * share.sequences * stats[kind].sum()
    total = sum(sums.values())
    return total, sums | ({"load": stats["load"], "dropped": stats["dropped"]} if stats else {})


def _inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch["tokens"], batch["positions"], batch["segment_ids"]


def _balance_terms(model_config: ModelConfig, config: TrainConfig) -> dict[str, tuple[float, str]]:
    """Of each balance loss, its coefficient and which of `router.balance` it is. The released code's, with seq_aux=false, takes
    all tokens that are computed at a time together, so it alone depends on micro_batch_size."""
    if config.balance == "released":
        kind = "expert_balance" if model_config.seq_aux else "batch_balance"
        return {"expert_balance": (model_config.aux_loss_alpha, kind)}
    return {name: (getattr(config, name), name) for name in BALANCES}


def gradient(state: TrainState, batch: Batch, config: TrainConfig) -> tuple[Decoder, Metrics]:
    """The gradient of a step's objective and its parts, in as many microbatches as `batch["count"]` says, one by one."""
    arrays = {name: array for name, array in batch.items() if array.ndim == 3}
    most, rows, _ = batch["tokens"].shape
    key = jax.random.fold_in(jax.random.key(config.seed), state.step)
    # By the sequence's place in the whole step, so that it does not depend on how the step is cut.
    exempt_AB = jax.random.uniform(key, (most, rows), out_sharding=P(None, specs.BATCH)) < config.exempt_share
    count = batch["count"] if most > 1 else 1
    tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)

    def part(a) -> tuple[Decoder, Metrics]:
        micro, exempt_B = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, a, keepdims=False), (arrays, exempt_AB))
        return jax.grad(objective, has_aux=True)(state.params, micro, config, Share(tokens, 1 / count, exempt_B))

    if most == 1:
        return part(0)
    _, sums = jax.eval_shape(part, 0)
    zeros = jax.tree.map(jnp.zeros_like, state.params), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    return jax.lax.fori_loop(0, count, lambda a, sums: jax.tree.map(jnp.add, sums, part(a)), zeros)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def train_step(state: TrainState, batch: Batch, config: TrainConfig) -> tuple[TrainState, Metrics]:
    """One update, or none if loss or gradient is not finite: then all but the step number stays as it was, bit for bit.

    Metrics are replicated: losses, grad_norm (before clipping), lr, skipped (0 or 1), stop (whether any process asks for the
    end); moe/load [L, E] in pairs, moe/dropped [L] as a share of pairs, and what sums them up.
    """
    grads, sums = gradient(state, batch, config)
    step = state.step + 1
    with jax.named_scope("optimizer"):
        norm, rate = optax.tree.norm(grads), learning_rate(config, step)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss/lm"])
        updates, opt_state = optimizer(config).update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda w, update: w - rate * update, state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
    metrics = {name: value for name, value in sums.items() if name.startswith("loss/")}
    metrics |= {"moe/drop_fraction": jnp.zeros(()), "moe/max_load": jnp.zeros(()), "moe/dead_experts": jnp.zeros(())}
    if "load" in sums:
        load_LE, dropped_L = sums["load"], sums["dropped"] / sums["load"].sum(axis=-1)
        metrics["moe/load"], metrics["moe/dropped"] = load_LE, dropped_L
        metrics["moe/drop_fraction"] = dropped_L.mean()  # all layers have as many pairs
        metrics["moe/max_load"] = (load_LE.max(axis=-1) / load_LE.mean(axis=-1)).max()  # over a fair one, worst layer
        metrics["moe/dead_experts"] = (load_LE == 0).sum(dtype=jnp.float32)
    metrics |= {"grad_norm": norm, "lr": rate, "skipped": 1.0 - finite, "stop": batch["stop"].max()}
    return TrainState(step, params, opt_state), metrics


@functools.partial(jax.jit, static_argnames="config")
def evaluate(params: Decoder, batch: Batch, config: TrainConfig) -> tuple[jax.Array, jax.Array]:
    """The sum of a microbatch's negative log-probabilities, nothing dropped, and how many they are."""
    decoder = specs.gather(jax.tree.map(lambda w: w.astype(config.dtype), params), stacks=False)
    batch = {name: array[0] for name, array in batch.items() if array.ndim == 3}
    hidden_BTD, _, _ = decoder(*_inputs(batch), dispatch=config.dispatch)
    mask_BT = batch["loss_mask"]
    return -log_likelihood(decoder, hidden_BTD, batch["targets"], mask_BT), mask_BT.sum()


def place(microbatches: Sequence[Mapping[str, np.ndarray]], most: int, stop: bool = False) -> Batch:
    """This process's rows of a step's microbatches, as arrays of the whole step on the current mesh.

    Args:
        most: A; where there are fewer microbatches the rest is zeros, and is not computed.
        stop: whether this process asks for the end of training.
    """
    mesh = jax.sharding.get_mesh()

    def on_mesh(rows: np.ndarray, spec: P) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), rows)

    batch = {}
    for name, first in microbatches[0].items():
        rows_ABT = np.zeros((most, *first.shape), first.dtype)
        rows_ABT[: len(microbatches)] = [micro[name] for micro in microbatches]
        batch[name] = on_mesh(rows_ABT, specs.microbatches_ABT)
    flags = np.full(mesh.local_mesh.size, stop, np.int32)
    return batch | {"count": on_mesh(np.int32(len(microbatches)), P()), "stop": on_mesh(flags, specs.per_request_B)}


def abstract_batch(config: TrainConfig) -> Batch:
    """Shapes, dtypes and shardings of what `place` makes."""
    mesh = jax.sharding.get_mesh()

    def leaf(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    shape = (config.microbatches, config.micro_batch, config.seq_len)
    batch = {name: leaf(shape, jnp.int32, specs.microbatches_ABT) for name in ("tokens", "targets", "positions", "segment_ids")}
    batch["loss_mask"] = leaf(shape, jnp.float32, specs.microbatches_ABT)
    return batch | {"count": leaf((), jnp.int32, P()), "stop": leaf((mesh.size,), jnp.int32, specs.per_request_B)}


def arrays(state: TrainState) -> dict[str, Any]:
    """The leaves by dotted name, as in `params.moe.attn.w_dkv` and `opt_state.1.mu.moe.attn.w_dkv`."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
