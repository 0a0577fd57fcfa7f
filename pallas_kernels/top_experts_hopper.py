"""The experts of few tokens on Hopper, in one launch: a decode step waits for them in every layer.

A warp has a token, its lanes every 32nd expert. Logits are compared as integers of the same order: a warp finds the largest of those
in one instruction.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import PARAMS, vary_like
from pallas_kernels.lanes import LANES, THREADS, full, gather, iota, scatter, warp_max, warp_min, warp_sum

TOKENS = THREADS // LANES  # of a program
OUT = jnp.iinfo(jnp.int32).min  # below any number's integer


@functools.partial(jax.jit, static_argnums=(2, 3, 4))  # lowered once a shape
def top_experts(
    logits_PNE: jax.Array, slots_N: jax.Array, choices: int, groups: int, top_groups: int
) -> tuple[jax.Array, jax.Array]:
    """ids and affinities [N, K] of `top_experts.top_experts`."""
    parts, tokens, experts = logits_PNE.shape
    columns = pl.cdiv(experts, LANES)  # of a lane

    def body(logits_gmem, slots_gmem, ids_gmem, affinities_gmem):
        thread = iota(THREADS)
        lane, token = thread & (LANES - 1), lax.axis_index("program") * TOKENS + (thread >> 5)
        expert = [lane + j * LANES for j in range(columns)]
        here = [(token < tokens) & (e < experts) for e in expert]
        places = [jnp.where(inside, token * experts + e, -1) for inside, e in zip(here, expert)]
        words = [
            [gather(logits_gmem, jnp.where(place < 0, -1, place + part * tokens * experts)) for part in range(parts)]
            for place in places
        ]
        slot = gather(slots_gmem, token)
        logit = [sum(lax.bitcast_convert_type(word, jnp.float32) for word in of_one) for of_one in words]
        rank = [jnp.where(inside, _ordered(_finite(x)), OUT) for inside, x in zip(here, logit)]
        best = warp_max(functools.reduce(jnp.maximum, rank))
        power = [jnp.where(inside, jnp.exp(x - _number(best)), 0.0) for inside, x in zip(here, logit)]
        total = warp_sum(sum(power))
        total = jnp.where((total >= 1.0) & (total < jnp.inf), total, jnp.nan)  # of logits that are not all finite
        if groups > 1:
            of_group = [lax.div(e, jnp.full_like(e, experts // groups)) for e in expert]
            group_rank = full(lane, OUT)
            for g in range(groups):
                largest = functools.reduce(jnp.maximum, [jnp.where(own == g, r, OUT) for own, r in zip(of_group, rank)])
                group_rank = jnp.where(lane == g, warp_max(largest), group_rank)
            allowed = full(lane, 0)
            for _ in range(top_groups):
                first = warp_min(jnp.where(group_rank == warp_max(group_rank), lane, LANES))
                group_rank = jnp.where(lane == first, OUT, group_rank)
                allowed |= jnp.left_shift(1, first)
            rank = [jnp.where((allowed >> own) & 1 == 1, r, OUT) for own, r in zip(of_group, rank)]
        id_, chosen = full(lane, 0), full(lane, 0)
        for k in range(choices):
            largest = warp_max(functools.reduce(jnp.maximum, rank))
            first = functools.reduce(jnp.minimum, [jnp.where(r == largest, e, experts) for r, e in zip(rank, expert)])
            first = warp_min(first)
            rank = [jnp.where(e == first, OUT, r) for r, e in zip(rank, expert)]
            id_, chosen = jnp.where(lane == k, first, id_), jnp.where(lane == k, largest, chosen)
        place = jnp.where((lane < choices) & (token < tokens), token * choices + lane, -1)
        scatter(ids_gmem, place, jnp.where(slot < 0, experts, id_))
        scatter(affinities_gmem, place, jnp.exp(_number(chosen) - _number(best)) / total)

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((tokens * choices,), dtype) for dtype in (jnp.int32, jnp.float32)],
        grid=(pl.cdiv(tokens, TOKENS),),
        grid_names=("program",),
        kernel_name="top_experts",
        compiler_params=dataclasses.replace(
            PARAMS, approx_math=False
        ),  # affinities as XLA has them, which it computes in prefill
    )
    ids_P, affinities_P = vary_like(logits_PNE, kernel(logits_PNE.reshape(-1), slots_N))
    return ids_P.reshape(tokens, choices), affinities_P.reshape(tokens, choices)


def _finite(x):
    """As `jnp.nan_to_num`."""
    largest = float(jnp.finfo(jnp.float32).max)
    return jnp.clip(jnp.where(x != x, 0.0, x), -largest, largest)


def _ordered(x):
    """Integers in the order of numbers; both zeros are the same."""
    return _turned(lax.bitcast_convert_type(jnp.where(x == 0.0, 0.0, x), jnp.int32))


def _number(ordered):
    return lax.bitcast_convert_type(_turned(ordered), jnp.float32)


def _turned(word):
    """The integer whose order among integers is that of a float32's bits among numbers; and back."""
    return word ^ ((word >> 31) & 0x7FFFFFFF)
