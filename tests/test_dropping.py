"""Dropping against a slow and obvious reference, pair by pair, on several meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding import specs
from sharding.dropping import kept
from sharding.mesh import make_mesh

B, T, K = 8, 6, 3


def reference(affinity, group, exempt, num_groups, budget, pool):
    keep = np.zeros((B, T, K), bool)
    for first in range(0, B, pool):
        for g in range(num_groups):
            pairs = [i for i in np.ndindex(B, T, K) if first <= i[0] < first + pool and group[i] == g]
            pairs.sort(key=lambda i: (not exempt[i[0]], -affinity[i], i))  # exempt ones first, then by affinity, then by place
            for rank, i in enumerate(pairs):
                keep[i] = rank < budget or exempt[i[0]]
    return keep


AFFINITIES = {
    "spread": lambda rng: rng.random((B, T, K)),
    "a few values": lambda rng: rng.integers(0, 3, (B, T, K)) / 7,
    "all equal": lambda rng: np.full((B, T, K), 0.25),
    "zeros and tiny ones": lambda rng: np.where(rng.random((B, T, K)) < 0.5, 0, 1e-40),  # subnormal
}


@pytest.mark.parametrize("affinities", AFFINITIES)
@pytest.mark.parametrize("mesh_shape", [(1, 1), (8, 1), (2, 4)])
@pytest.mark.parametrize("pool", [1, 2, 4, 8])
def test_the_same_pairs_are_kept_as_by_the_reference(affinities, mesh_shape, pool):
    rng = np.random.default_rng(pool)
    num_groups = 4
    affinity = AFFINITIES[affinities](rng).astype(np.float32)
    group = rng.integers(0, num_groups, (B, T, K)).astype(np.int32)
    group[:, :3] = 0  # one group is over its budget, others are under
    exempt = np.arange(B) % 4 == 1
    budget = pool * T * K // num_groups
    with jax.set_mesh(make_mesh(*mesh_shape)):
        affinity_BTK, group_BTK = (jax.reshard(jnp.asarray(a), specs.activations_BTD) for a in (affinity, group))
        exempt_B = jax.reshard(jnp.asarray(exempt), specs.per_request_B)
        run = jax.jit(lambda *a: kept(*a, num_groups=num_groups, budget=budget, pool=pool))
        got = np.asarray(run(affinity_BTK, group_BTK, exempt_B))
    wanted = reference(affinity, group, exempt, num_groups, budget, pool)
    assert 0 < (~wanted).sum() < wanted.size
    np.testing.assert_array_equal(got, wanted)


def test_exempt_sequences_may_exceed_the_budget_and_leave_nothing():
    group = np.zeros((B, T, K), np.int32)
    affinity = np.random.default_rng(0).random((B, T, K)).astype(np.float32)
    exempt = np.arange(B) < 3
    run = jax.jit(lambda *a: kept(*a, num_groups=2, budget=2 * T * K, pool=8))
    got = np.asarray(run(*map(jnp.asarray, (affinity, group, exempt))))
    assert got[:3].all() and not got[3:].any()


def test_a_pool_that_does_not_divide_the_batch_is_refused():
    with pytest.raises(ValueError, match="pool=3"):
        kept(jnp.zeros((B, T, K)), jnp.zeros((B, T, K), jnp.int32), jnp.zeros(B, bool), num_groups=2, budget=1, pool=3)
