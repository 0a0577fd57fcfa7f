"""The choice of experts against a loop over tokens: every implementation, and the Hopper kernel in Pallas' interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, top_experts_hopper
from pallas_kernels.top_experts import top_experts
from tests import lanes_interpreted

SHAPES = {  # tokens, experts, choices, groups, top groups
    "lite, one token": (1, 64, 6, 1, 1),
    "lite, eight tokens": (8, 64, 6, 1, 1),
    "lite": (256, 64, 6, 1, 1),
    "v2": (512, 160, 6, 8, 3),
    "few experts": (77, 16, 4, 8, 3),
    "one choice": (30, 5, 1, 1, 1),
    "all experts": (9, 33, 33 - 1, 1, 1),
}


def logits(rng, parts, tokens, experts):
    """Parts of logits, of which some are equal: every eighth token's are of few values."""
    logits_PNE = rng.normal(size=(parts, tokens, experts)).astype(np.float32)
    logits_PNE[:, ::8] = np.round(logits_PNE[:, ::8])
    return logits_PNE


def naive(logits_E, choices, groups, top_groups):
    """Section 2.2.2 for one token: the groups with the highest affinity of any of their experts, then the top experts in them."""
    size = len(logits_E) // groups
    best = sorted(range(groups), key=lambda g: -logits_E[g * size : (g + 1) * size].max())[:top_groups]
    ids = sorted((e for e in range(len(logits_E)) if e // size in best), key=lambda e: -logits_E[e])[:choices]
    scores_E = np.exp(logits_E.astype(np.float64) - logits_E.max())
    return ids, scores_E[ids] / scores_E.sum()


class TopExpertsCases:
    """`choose` has `top_experts`' signature."""

    choose = None

    @pytest.mark.parametrize("parts", [1, 8])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_the_largest_of_the_best_groups(self, shape, parts):
        tokens, experts, *limits = SHAPES[shape]
        logits_PNE = logits(np.random.default_rng(0), parts, tokens, experts)
        slots_N = np.where(np.arange(tokens) % 5 == 4, -1, np.arange(tokens))
        run = jax.jit(type(self).choose, static_argnums=(2, 3, 4))
        ids_NK, affinities_NK = run(jnp.asarray(logits_PNE), jnp.asarray(slots_N, jnp.int32), *limits)
        # The order of adding the parts decides what is equal: XLA's, for up to 8, is that of the parts.
        sums_NE = functools.reduce(np.add, logits_PNE)
        for n in range(tokens):
            ids, affinities = naive(sums_NE[n], *limits)
            assert ids_NK[n].tolist() == ([experts] * limits[0] if slots_N[n] < 0 else ids), n
            if slots_N[n] >= 0:
                np.testing.assert_allclose(affinities_NK[n], affinities, rtol=2e-6)

    @pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("where", [[3], range(16), [0, 1, 2, 3, 4, 5, 8, 9, 12, 13]])
    def test_logits_that_are_not_finite_still_give_different_experts_of_few_groups(self, worst, where):
        logits_E = np.linspace(0, 1, 16, dtype=np.float32)
        logits_E[list(where)] = worst
        ids_NK, affinities_NK = type(self).choose(jnp.asarray(logits_E)[None, None], jnp.zeros(1, jnp.int32), 4, 8, 3)
        ids_K = np.asarray(ids_NK[0])
        assert len(set(ids_K)) == 4 and len(set(ids_K // 2)) <= 3
        assert ids_K.min() >= 0 and ids_K.max() < 16
        with np.errstate(invalid="ignore"):
            assert np.isnan(affinities_NK).all() == (not np.isfinite(np.exp(logits_E - logits_E.max())).all())

    def test_zeros_of_both_signs_are_equal(self):
        logits_PNE = jnp.asarray([[[-0.0, 0.0, -1.0, -0.0]]])
        assert type(self).choose(logits_PNE, jnp.zeros(1, jnp.int32), 3, 1, 1)[0].tolist() == [[0, 1, 3]]


class TestXla(TopExpertsCases):
    choose = staticmethod(functools.partial(top_experts, implementation="xla"))


@pytest.mark.gpu
class TestPallas(TopExpertsCases):
    choose = staticmethod(functools.partial(top_experts, implementation="pallas"))


class TestInterpreter(TopExpertsCases):
    """The kernel but for its PTX, which the interpreter does not run."""

    @staticmethod
    def choose(*args):
        return top_experts_hopper.top_experts.__wrapped__(*args)  # traced anew: nothing of other tests

    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch):
        lanes_interpreted.install(monkeypatch, top_experts_hopper)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            yield

    @pytest.mark.parametrize("parts", [2])
    @pytest.mark.parametrize("shape", ["lite, eight tokens", "few experts", "all experts"])
    def test_the_largest_of_the_best_groups(self, shape, parts):
        super().test_the_largest_of_the_best_groups(shape, parts)


@pytest.mark.parametrize("shape", ["lite", "v2"])
def test_lowers_for_cuda_inside_shard_map(shape, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    tokens, experts, *limits = SHAPES[shape]
    mesh, batch = jax.sharding.get_abstract_mesh(), ("data", "expert")

    def operand(spec, dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

    run = jax.jit(jax.shard_map(lambda *x: top_experts(*x, *limits), out_specs=P(batch)))
    logits_PNE = operand(P(None, batch), jnp.float32, 8, tokens * mesh.size, experts)
    text = run.trace(logits_PNE, operand(P(batch), jnp.int32, tokens * mesh.size)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.reduce" not in text  # it is the kernel alone


@pytest.mark.parametrize(
    "tokens, experts, limits, slots, message",
    [
        (1025, 64, (6, 1, 1), True, "1025 tokens"),
        (8, 257, (6, 1, 1), True, "257 experts"),
        (8, 64, (6, 1, 1), False, "no slots"),
        (8, 64, (40, 1, 1), True, "40 experts are to be chosen"),
        (8, 16, (6, 8, 2), True, "6 experts are to be chosen"),
        (8, 64, (6, 64, 32), True, "64 groups"),
        (8, 64, (6, 7, 3), True, "7 groups of 64 experts"),
    ],
)
def test_the_kernel_says_what_it_needs(tokens, experts, limits, slots, message, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    slots_N = jnp.zeros(tokens, jnp.int32) if slots else None
    with pytest.raises(ValueError, match=message):
        top_experts(jnp.zeros((8, tokens, experts)), slots_N, *limits, implementation="pallas")
