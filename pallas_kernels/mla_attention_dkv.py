"""Gradients of attention's keys and values, on Hopper in Pallas Mosaic GPU; see mla_attention_backward.py.

A program holds 128 keys, 64 a warpgroup, and walks over the queries that see them, 64 at a time, for one head after another of
a group: S^T = K Q^T, P^T = exp2(S^T - lse), dV += P^T dO, dP^T = V dO^T, dS^T = P^T (dP^T - delta), dK += dS^T Q. The rope part
of dK stays in registers from head to head, which sums the group in float32. dS leaves for the kernel of dQ.

Registers bind: of 240 a thread, dK takes 96, dV 64, and S^T or dP^T 32. P^T therefore goes into its product from registers,
and dS^T through the shared memory that it leaves from, while the tensor cores have the next scores to compute. The loop over
queries spills nothing where there are no segments; what ptxas reports is outside of it.

Programs come in pairs, clusters of two with neighbouring keys: each brings half of the queries' tiles, to both.

Letters: see mla_attention_backward.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper import COL, PARAMS, ROW, WGMMA, registers, spread, swizzled, vary_like
from pallas_kernels.mla_attention_forward import BLOCK, HALF, LOG2_E, NOPE, ROPE, VALUE

STAGES = 3  # queries and their gradients: 120 KiB of 227, keys and values 80, dS 16
WIDTH = 8  # groups of heads whose programs run side by side, so that those of one group meet its queries in L2


def tiles(blocks: int) -> int:
    """Tiles of 128 keys x 64 queries on and below the diagonal."""
    return blocks * (blocks + 1)


def first_tile(key_block, blocks: int):
    """The tile of a block of keys and the first queries that see it; those of later queries follow."""
    return key_block * (2 * blocks + 1 - key_block)


def dkv(
    chunk,
    count: int,
    ahead_B2K,
    operands: tuple,
    lse_BNS,
    minus_delta_BNS,
    ids: list,
    gradients: tuple,
    *,
    heads: int,
    scale: float,
):
    """Computes dK and dV of a chunk of `count` groups of `heads` heads, into references.

    Args:
        chunk: int32 [1]; heads, and so groups and chunks, count on from row to row of the batch.
        ahead_B2K: for each block of keys the number of blocks of queries, from the diagonal on, that may see it, and how many of
            them, from the diagonal on, need no look at their ids.
        operands: queries' nope and rope, keys' nope and rope, values, and the gradient of the output.
        ids: none, or segment ids [B, S].
        gradients: dk_nope_BTNH, dv_BTNV, and the rope part in float32, [groups, S, R].

    Returns:
        [X, tiles, 2, 64 keys, 64 queries], dS^T in bfloat16 of the chunk's heads. What no query may see is not written.
    """
    blocks = lse_BNS.shape[2] // BLOCK
    kernel = plgpu.kernel(
        functools.partial(_program, groups=count, heads=heads, blocks=blocks, scale=scale),
        out_type=jax.ShapeDtypeStruct((count * heads, tiles(blocks), 2, HALF, HALF), jnp.bfloat16),
        grid=(count * blocks // 2,),
        grid_names=("pair",),
        cluster=(2,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_attention_dkv",
        compiler_params=PARAMS,
        scratch_types={"shared": _shared(bool(ids))},
    )
    return vary_like(operands[0], kernel(chunk, ahead_B2K, *operands, lse_BNS, minus_delta_BNS, *ids, *gradients))


class _Shared(NamedTuple):
    """Shared memory and barriers. `full`: TMA has written; `free`: read, by both warpgroups, or by the one that it is for."""

    k_nope: Any
    k_rope: Any
    v: Any
    q_nope: Any
    q_rope: Any
    dout: Any
    lse: Any
    minus_delta: Any  # dP's accumulator starts with it
    ds: Any
    index: Any  # 0, 1, 2 ...: computed in the loop, the compiler would keep 16 registers of them
    q_ids: Any
    k_ids: Any
    fixed_full: Any  # what stays for all heads
    kv_full: Any
    kv_free: Any
    q_full: Any
    q_free: Any
    q_room: Any  # free in both programs of the pair
    dout_full: Any
    dout_free: Any
    dout_room: Any


def _shared(segments: bool) -> _Shared:
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzled(jnp.bfloat16))
    stage = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    room = plgpu.ClusterBarrier(collective_axes=("member",), num_barriers=STAGES)
    return _Shared(
        k_nope=smem((2, HALF, NOPE)),
        k_rope=smem((2, HALF, ROPE)),
        v=smem((2, HALF, VALUE)),
        q_nope=smem((STAGES, HALF, NOPE)),
        q_rope=smem((STAGES, HALF, ROPE)),
        dout=smem((STAGES, HALF, VALUE)),
        lse=plgpu.SMEM((STAGES, HALF), jnp.float32),
        minus_delta=plgpu.SMEM((STAGES, HALF), jnp.float32),
        ds=smem((2, HALF, HALF)),
        index=plgpu.SMEM((HALF,), jnp.int32),
        q_ids=plgpu.SMEM((STAGES, HALF), jnp.int32) if segments else None,
        k_ids=plgpu.SMEM((2, HALF), jnp.int32) if segments else None,
        fixed_full=plgpu.Barrier(num_arrivals=4 if segments else 2),
        kv_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        kv_free=plgpu.Barrier(num_barriers=2),
        q_full=stage(num_arrivals=4 if segments else 3),
        q_free=stage(num_arrivals=2),
        q_room=room,
        dout_full=stage(num_arrivals=2),
        dout_free=stage(num_arrivals=2),
        dout_room=room,
    )


class _Tile(NamedTuple):
    """A program's 128 keys, and the heads that it serves."""

    row: Any
    group: Any
    rank: Any  # of the group, in this launch
    head: Any  # the first
    member: Any  # 0 or 1, of the pair
    block: Any
    steps: Any  # of the pair: 64 queries each, from the first diagonal on
    end: Any  # of the steps with queries that may see these keys
    clear: Any  # of those, after which ids need a look


def _program(chunk_gmem, ahead_gmem, *refs, groups: int, heads: int, blocks: int, scale: float, shared: _Shared):
    """The third warpgroup feeds, the others compute."""
    warpgroup, member = lax.axis_index("warpgroup"), lax.axis_index("member")
    *operands, ds_gmem = refs
    operands, gradients = operands[:-3], operands[-3:]
    band = lax.div(lax.axis_index("pair"), jnp.int32(WIDTH * blocks // 2))
    width = lax.min(jnp.int32(WIDTH), groups - band * WIDTH)  # the last band may have fewer groups
    place = lax.axis_index("pair") - band * (WIDTH * blocks // 2)
    pair = lax.div(place, width)  # those that most queries see come first
    rank = band * WIDTH + place - pair * width
    group = chunk_gmem[0] * groups + rank
    groups_of_row = jnp.int32(operands[0].shape[2] // heads)
    row, block = lax.div(group, groups_of_row), 2 * pair + member
    end, clear = (2 * (ahead_gmem[row, k, block] + member) for k in range(2))
    steps = 2 * (ahead_gmem[row, 0, 2 * pair + 1] + 1)
    tile = _Tile(row, group, rank, lax.rem(group, groups_of_row) * heads, member, block, steps, end, clear)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _feed(tile, heads, *operands[:8], operands[8:], shared)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(registers(2), action="increase")
        _compute(tile, heads, warpgroup, first_tile(block, blocks), scale, ds_gmem, *gradients, shared, bool(operands[8:]))


def _feed(tile: _Tile, heads: int, q_nope, q_rope, k_nope, k_rope, v, dout, lse, minus_delta, ids: list, shared: _Shared):
    """Brings the keys and values of a head, and its queries as soon as there is room."""

    def keys(half):
        return pl.ds(tile.block * BLOCK + half * HALF, HALF)

    for half in range(2):
        plgpu.copy_gmem_to_smem(k_rope.at[tile.row, keys(half)], shared.k_rope.at[half], shared.fixed_full)
        if ids:
            plgpu.copy_gmem_to_smem(ids[0].at[tile.row, keys(half)], shared.k_ids.at[half], shared.fixed_full)

    @pl.loop(0, heads)
    def _(turn):
        head = tile.head + turn

        @pl.loop(0, tile.steps)
        def _(j):
            step = turn * tile.steps + j
            slot, at = lax.rem(step, jnp.int32(STAGES)), pl.ds((tile.block - tile.member) * BLOCK + j * HALF, HALF)

            def bring(full, free, room, **copies):
                @pl.when(step >= STAGES)
                def _():
                    plgpu.barrier_wait(free.at[slot])
                    plgpu.barrier_arrive(room.at[slot])
                    plgpu.barrier_wait(room.at[slot])

                for name, gmem in copies.items():  # half of it each, to both
                    plgpu.copy_gmem_to_smem(gmem, getattr(shared, name).at[slot], full.at[slot], collective_axes="member")

            @pl.when(j == 1)  # the last head's may still be in use, when its successor's first queries come
            def _():
                for half in range(2):
                    pl.when(turn > 0)(lambda: plgpu.barrier_wait(shared.kv_free.at[half]))
                    plgpu.copy_gmem_to_smem(
                        k_nope.at[tile.row, keys(half), head], shared.k_nope.at[half], shared.kv_full.at[half]
                    )
                    plgpu.copy_gmem_to_smem(v.at[tile.row, keys(half), head], shared.v.at[half], shared.kv_full.at[half])

            queries = {"q_nope": q_nope.at[tile.row, at, head], "q_rope": q_rope.at[tile.row, at, head]}
            if ids:
                queries["q_ids"] = ids[0].at[tile.row, at]
            bring(shared.q_full, shared.q_free, shared.q_room, lse=lse.at[tile.row, head, at], **queries)
            gradients = {"dout": dout.at[tile.row, at, head], "minus_delta": minus_delta.at[tile.row, head, at]}
            bring(shared.dout_full, shared.dout_free, shared.dout_room, **gradients)


def _compute(
    tile: _Tile,
    heads: int,
    mine,
    first,
    scale: float,
    ds_gmem,
    dk_nope_gmem,
    dv_gmem,
    dk_rope_gmem,
    shared: _Shared,
    segments: bool,
):
    """Computes the gradients of keys `mine` * 64 and on."""
    shape = HALF, HALF
    keys = pl.ds(tile.block * BLOCK + mine * HALF, HALF)
    skip = 2 * tile.member + mine

    def slot(step):
        return lax.rem(step, jnp.int32(STAGES))

    def pass_over(begin, count):
        """Lets go queries that see none of these keys. The kernel of dQ knows them."""

        @pl.loop(begin, begin + count)
        def _(step):
            for full, free in ((shared.q_full, shared.q_free), (shared.dout_full, shared.dout_free)):
                plgpu.barrier_wait(full.at[slot(step)])
                plgpu.barrier_arrive(free.at[slot(step)])

    def hide_later(probs):
        """Probabilities of keys that come after the query become 0."""
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=WGMMA)
        return jnp.where(spread(plgpu.load(shared.index, layout=COL), shape, 1) >= key, probs, 0.0)

    def hide_others(probs, step, j):
        """Probabilities of other segments' keys become 0."""

        def by_id(probs):
            q_ids, k_ids = plgpu.load(shared.q_ids.at[slot(step)], layout=COL), plgpu.load(shared.k_ids.at[mine], layout=ROW)
            return jnp.where(spread(q_ids, shape, 1) == spread(k_ids, shape), probs, 0.0)

        return lax.cond(j >= tile.clear, by_id, lambda probs: probs, probs) if segments else probs

    def run(dk_rope_acc):
        @pl.loop(0, heads)
        def _(turn):
            begin = turn * tile.steps

            def run_head(dk_nope_acc, dv_acc):
                def leave(ds, step, half):
                    """dS goes into dK, and to global memory."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    shared.ds[half] = ds
                    plgpu.commit_smem()
                    plgpu.wgmma(dk_nope_acc, shared.ds.at[half], shared.q_nope.at[slot(step)])
                    plgpu.wgmma(dk_rope_acc, shared.ds.at[half], shared.q_rope.at[slot(step)])
                    to = ds_gmem.at[tile.rank * heads + turn, first + step - begin - 2 * tile.member, half]
                    plgpu.copy_smem_to_gmem(shared.ds.at[half], to)

                def attend(j, before, start=False):
                    step = begin + j
                    now = slot(step)
                    # `mine` in a form that the compiler cannot hoist out of the loop: descriptors kept there would be spilled.
                    half = mine + lax.shift_right_logical(step, jnp.int32(24))
                    plgpu.barrier_wait(shared.q_full.at[now])

                    def scores(acc):
                        plgpu.wgmma(acc, shared.k_nope.at[half], shared.q_nope.at[now].transpose((1, 0)))
                        plgpu.wgmma(acc, shared.k_rope.at[half], shared.q_rope.at[now].transpose((1, 0)))
                        if not start:
                            leave(before, step - 1, half)  # runs on under the exponentials
                        lse = lax.optimization_barrier(plgpu.load(shared.lse.at[now], layout=COL))
                        return lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=0 if start else 2)), lse

                    logits, lse = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                    probs = jnp.exp2(logits * (scale * LOG2_E) - spread(lse, shape, 1))
                    probs = hide_others(hide_later(probs) if start else probs, step, j).astype(jnp.bfloat16)
                    plgpu.barrier_wait(shared.dout_full.at[now])

                    def gradients(acc):
                        acc[...] = spread(plgpu.load(shared.minus_delta.at[now], layout=COL), shape, 1)
                        plgpu.wgmma(acc, shared.v.at[half], shared.dout.at[now].transpose((1, 0)))
                        plgpu.wgmma(dv_acc, probs, shared.dout.at[now])
                        return plgpu.wgmma_accumulator_load(acc, wait_n=1)

                    dprobs = pl.run_scoped(gradients, plgpu.ACC(shape, jnp.float32))
                    # Both, so that the probabilities are not unpacked, into 32 registers, before the wait.
                    dprobs, probs = lax.optimization_barrier((dprobs, probs))
                    if not start:
                        plgpu.barrier_arrive(shared.q_free.at[slot(step - 1)])
                    ds = lax.optimization_barrier((probs.astype(jnp.float32) * dprobs).astype(jnp.bfloat16))
                    plgpu.wgmma_wait(0)  # not across the end of the loop: there the compiler would serialise all wgmma
                    plgpu.barrier_arrive(shared.dout_free.at[now])
                    return ds

                pass_over(begin, skip)  # queries that come before all of these keys
                ds = lax.fori_loop(skip + 1, tile.end, attend, attend(skip, None, start=True))
                leave(ds, begin + tile.end - 1, mine)
                return dk_nope_acc[...], dv_acc[...]

            plgpu.barrier_wait(shared.kv_full.at[mine])
            accumulators = plgpu.ACC((HALF, NOPE), jnp.float32), plgpu.ACC((HALF, VALUE), jnp.float32)
            dk_nope, dv = pl.run_scoped(run_head, *accumulators)
            plgpu.barrier_arrive(shared.q_free.at[slot(begin + tile.end - 1)])
            pass_over(begin + tile.end, tile.steps - tile.end)
            shared.k_nope[mine] = (dk_nope * scale).astype(jnp.bfloat16)
            shared.v[mine] = dv.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.k_nope.at[mine], dk_nope_gmem.at[tile.row, keys, tile.head + turn])
            plgpu.copy_smem_to_gmem(shared.v.at[mine], dv_gmem.at[tile.row, keys, tile.head + turn])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(shared.kv_free.at[mine])

        return dk_rope_acc[...]

    shared.index[...] = plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=COL)  # by both warpgroups, the same
    plgpu.commit_smem()
    plgpu.barrier_wait(shared.fixed_full)
    dk_rope = pl.run_scoped(run, plgpu.ACC((HALF, ROPE), jnp.float32))
    dk_rope_gmem[tile.group, keys] = dk_rope * scale
