"""The loss and its gradient, which are made together, against plain autodiff; on one device and on eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv2_jax import loss
from sharding import specs
from sharding.mesh import make_mesh
from tests.kernel_cases import close


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Head:
    w_head: jax.Array


def operands(dtype):
    rng = np.random.default_rng(0)
    hidden_BTD = jnp.asarray(rng.normal(size=(8, 37, 16)), dtype)
    targets_BT = jnp.asarray(rng.integers(0, 50, (8, 37)), jnp.int32)
    weights_BT = jnp.asarray(rng.integers(0, 2, (8, 37)) * rng.random((8, 37)), jnp.float32)
    head = Head(jnp.asarray(rng.normal(size=(16, 50)), dtype))
    return head, jax.device_put(hidden_BTD, specs.activations_BTD), targets_BT, weights_BT


@pytest.mark.parametrize("chunk", [10, 1024])
@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)], ids=str)
def test_value_and_gradient_are_those_of_plain_autodiff(monkeypatch, chunk, mesh):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    head, hidden_BTD, targets_BT, weights_BT = operands(jnp.float32)

    def plain(head, hidden_BTD):
        log_probs_BTV = jax.nn.log_softmax(hidden_BTD @ head.w_head, axis=-1)
        return 3 * (weights_BT * jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]).sum()

    wanted = jax.value_and_grad(plain, argnums=(0, 1))(head, hidden_BTD)
    with jax.set_mesh(make_mesh(*mesh)):
        head = jax.device_put(head, specs.replicated)
        hidden_BTD = jax.device_put(hidden_BTD, specs.activations_BTD)
        rows = [jax.device_put(a, specs.tokens_BT) for a in (targets_BT, weights_BT)]
        ours = jax.jit(jax.value_and_grad(lambda *a: 3 * loss.log_likelihood(*a, *rows), argnums=(0, 1)))
        got = ours(head, hidden_BTD)
        log_probs_BT = jax.jit(loss.log_probs)(head, hidden_BTD, rows[0])
    jax.tree.map(close, got, wanted)
    close(3 * (weights_BT * jax.device_get(log_probs_BT)).sum(), wanted[0])


def test_huge_logits_do_not_overflow():
    head, hidden_BTD, targets_BT, _ = operands(jnp.float32)
    logits_BTV = hidden_BTD @ head.w_head * 1e4
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV, axis=-1), targets_BT[..., None], -1)[..., 0]
    close(loss.log_probs(head, hidden_BTD * 1e4, targets_BT), wanted)


def test_bfloat16_gradients_are_sums_in_float32(monkeypatch):
    """Many chunks: a sum of their gradients that is rounded each time would be off by far more than one rounding."""
    monkeypatch.setattr(loss, "CHUNK", 1)  # as many as there can be: 13
    head, *rest = operands(jnp.bfloat16)
    head32 = Head(head.w_head.astype(jnp.float32))
    rest32 = [rest[0].astype(jnp.float32), *rest[1:]]
    got = jax.jit(jax.grad(loss.log_likelihood))(head, *rest).w_head
    wanted = jax.jit(jax.grad(loss.log_likelihood))(head32, *rest32).w_head
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), wanted, 4e-3)
