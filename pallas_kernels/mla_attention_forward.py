"""Attention of training and prefill, forward, on Hopper in Pallas Mosaic GPU; see mla_attention.py.

A program stays on its SM and takes one tile after the other, 128 queries of one head, longest first. Two warpgroups compute, 64
rows each; the third feeds them by TMA with blocks of 128 keys and values, two ahead, from the diagonal backwards. While one
warpgroup exponentiates, the other has the tensor cores. The pipeline runs on from tile to tile: the first scores of a tile
are computed together with the last values of the tile before, which leaves while the next begins.

A tile is one program's alone and summed in a fixed order: the same operands give the same bits, whoever takes it.
Letters: see reference.py; S the length in whole blocks, K blocks of keys, Q of queries.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tickets
from pallas_kernels.hopper import COL, PARAMS, ROW, SMS, WGMMA, spread, swizzled

BLOCK, HALF = 128, 64  # queries of a tile and keys of a block; rows of a warpgroup
NOPE, ROPE, VALUE = 128, 64, 128
STAGES = 2  # keys and values of two blocks take 160 KiB of 227, queries 48, the way out 16
GROUP = 16  # heads whose tiles run side by side, so that those of one head meet its keys and values in L2
LOG2_E = math.log2(math.e)


def forward(
    q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV, segment_ids_BT, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """`reference.mla_attention` in bfloat16 at head dimensions 128, 64 and 128, with what a backward pass needs.

    Args:
        segment_ids_BT: None where all positions are of one segment.

    Returns:
        [B, T, N, V], and the base-2 logarithm of the sum of a row's exponentials, float32 [B, N, S] (beyond T finite, and of no
        meaning).
    """
    batch, length, heads, _ = q_nope_BTNH.shape
    blocks = pl.cdiv(length, BLOCK)
    operands = [q_nope_BTNH, q_rope_BTNR, k_nope_BTNH, k_rope_BTR, v_BTNV]
    missing = blocks * BLOCK - length
    if segment_ids_BT is None:
        segments = []
    else:
        ids_BS = jnp.pad(segment_ids_BT.astype(jnp.int32), ((0, 0), (0, missing)), mode="edge")
        segments = [ids_BS, _spans(ids_BS.reshape(batch, blocks, BLOCK))]
    if length % 8 or length < BLOCK:  # TMA counts in 8 rows; it reads those beyond the end as zeros, and does not write them
        operands = [jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2)) for x in operands]
    varies = jax.typeof(q_nope_BTNH).manual_axis_type
    out_BTNV, lse_BNS = plgpu.kernel(
        functools.partial(_program, scale=scale),
        out_type=[
            jax.ShapeDtypeStruct(operands[-1].shape, jnp.bfloat16, manual_axis_type=varies),
            jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), jnp.float32, manual_axis_type=varies),
        ],
        grid=(min(SMS, batch * heads * blocks),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_attention_forward",
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=0),  # rows are reduced within a warp
        scratch_types={"shared": _shared()},
    )(*operands, *segments)
    return out_BTNV[:, :length], lse_BNS


def _spans(ids_BKS) -> jax.Array:
    """For each block of queries, the blocks of keys from the diagonal backwards: how many there are, and how many without a mask.

    The last is the first of all that can share a segment with the queries, judging by the least and the largest id of a block.
    No mask is needed as long as the queries and the keys are all of one segment. Ids may come in any order.

    Returns:
        [2, B, Q].
    """
    least_BK, most_BK = ids_BKS.min(axis=2), ids_BKS.max(axis=2)
    block_K = jnp.arange(ids_BKS.shape[1], dtype=jnp.int32)
    meet_BQK = (least_BK[:, :, None] <= most_BK[:, None]) & (most_BK[:, :, None] >= least_BK[:, None])
    first_BQ = jnp.argmax(meet_BQK, axis=2).astype(jnp.int32)
    equal_BQK = (least_BK[:, :, None] == most_BK[:, None]) & (most_BK[:, :, None] == least_BK[:, None])
    unequal_BQK = ~equal_BQK & (block_K[:, None] >= block_K)
    return jnp.stack([block_K - first_BQ + 1, block_K - jnp.where(unequal_BQK, block_K, -1).max(axis=2)])


class _Tile(NamedTuple):
    more: Any  # 0: there are no more tiles, and this is some other's first block of keys, with which the last values are summed
    head: Any
    row: Any  # of the batch
    query: Any  # block of queries
    keys: Any  # number of blocks, from the diagonal backwards
    clear: Any  # as many of them need no look at the ids


class _Shared(NamedTuple):
    """Shared memory and barriers. `full`: TMA has written; `free`: read, by both warpgroups, or of the queries by the one they are for."""

    q_nope: Any
    q_rope: Any
    k_nope: Any
    k_rope: Any
    v: Any
    out: Any
    q_full: Any
    q_free: Any
    k_full: Any
    k_free: Any
    v_full: Any
    v_free: Any
    turn: Any  # a warpgroup's own, to use the tensor cores
    tiles: Any  # their ticket and the fields of `_Tile`, from the feeding warpgroup to the others
    tile_full: Any
    tile_free: Any


def _shared() -> _Shared:
    smem = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=swizzled(jnp.bfloat16))
    barriers = functools.partial(plgpu.Barrier, num_barriers=STAGES)
    return _Shared(
        q_nope=smem((2, HALF, NOPE)),
        q_rope=smem((2, HALF, ROPE)),
        k_nope=smem((STAGES, BLOCK, NOPE)),
        k_rope=smem((STAGES, BLOCK, ROPE)),
        v=smem((STAGES, BLOCK, VALUE)),
        out=smem((2, HALF, VALUE // 2)),  # no room for whole rows
        q_full=plgpu.Barrier(num_arrivals=2, num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2),
        k_full=barriers(num_arrivals=2),
        k_free=barriers(num_arrivals=2),
        v_full=barriers(),
        v_free=barriers(num_arrivals=2),
        turn=plgpu.Barrier(num_barriers=2),
        tiles=plgpu.SMEM((2, 1 + len(_Tile._fields)), jnp.int32),
        tile_full=plgpu.Barrier(num_barriers=2),
        tile_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
    )


def _program(*refs, scale: float, shared: _Shared):
    """Takes tiles until there are no more: the third warpgroup feeds, the others compute."""
    operands, (*segments, out_gmem, lse_gmem) = refs[:5], refs[5:]
    batch, heads, length = lse_gmem.shape
    rows = batch * length // BLOCK  # tiles of a head
    warpgroup = lax.axis_index("warpgroup")

    def tile(ticket) -> _Tile:
        index = lax.min(ticket, jnp.int32(heads * rows - 1))
        group = lax.div(index, jnp.int32(GROUP * rows))
        width = lax.min(jnp.int32(GROUP), heads - group * GROUP)  # the last group may have fewer heads
        index -= group * (GROUP * rows)
        rank = lax.div(index, width)
        row, query = lax.rem(rank, jnp.int32(batch)), length // BLOCK - 1 - lax.div(rank, jnp.int32(batch))  # longest first
        keys, clear = (segments[1][k, row, query] for k in range(2)) if segments else (query + 1, query + 1)
        more = ticket < heads * rows
        return _Tile(more.astype(jnp.int32), group * GROUP + index - rank * width, row, query, jnp.where(more, keys, 1), clear)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        _feed(tile, *operands, shared)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(240, action="increase")
        _attend(warpgroup, scale * LOG2_E, segments[:1], out_gmem, lse_gmem, shared)


def _feed(tile, q_nope_gmem, q_rope_gmem, k_nope_gmem, k_rope_gmem, v_gmem, shared: _Shared):
    """Takes tickets, a tile ahead, and brings queries, keys and values as soon as there is room."""
    counter = tickets.new_counter()

    def take(turn) -> _Tile:
        at = lax.rem(turn, jnp.int32(2))
        pl.when(turn >= 2)(lambda: plgpu.barrier_wait(shared.tile_free.at[at]))
        tickets.take_ticket(counter, shared.tiles.at[at, pl.ds(0, 1)], turn)
        this = tile(shared.tiles[at, 0])
        for place, field in enumerate(this, 1):
            shared.tiles[at, place] = field
        plgpu.barrier_arrive(shared.tile_full.at[at])
        return this

    def feed_tile(state):
        turn, this, step = state
        upcoming = lax.cond(this.more > 0, lambda: take(turn + 1), lambda: this)

        def queries(half):
            at = pl.ds(this.query * BLOCK + half * HALF, HALF)
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(shared.q_free.at[half]))
            plgpu.copy_gmem_to_smem(q_nope_gmem.at[this.row, at, this.head], shared.q_nope.at[half], shared.q_full.at[half])
            plgpu.copy_gmem_to_smem(q_rope_gmem.at[this.row, at, this.head], shared.q_rope.at[half], shared.q_full.at[half])

        def keys(k):
            slot, at = lax.rem(step + k, jnp.int32(STAGES)), pl.ds((this.query - k) * BLOCK, BLOCK)
            pl.when(step + k >= STAGES)(lambda: plgpu.barrier_wait(shared.k_free.at[slot]))
            plgpu.copy_gmem_to_smem(k_nope_gmem.at[this.row, at, this.head], shared.k_nope.at[slot], shared.k_full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope_gmem.at[this.row, at], shared.k_rope.at[slot], shared.k_full.at[slot])

        def values(k):
            slot, at = lax.rem(step + k, jnp.int32(STAGES)), pl.ds((this.query - k) * BLOCK, BLOCK)
            pl.when(step + k >= STAGES)(lambda: plgpu.barrier_wait(shared.v_free.at[slot]))
            plgpu.copy_gmem_to_smem(v_gmem.at[this.row, at, this.head], shared.v.at[slot], shared.v_full.at[slot])

        queries(0)
        keys(0)
        queries(1)
        pl.when(this.more > 0)(lambda: values(0))

        @pl.loop(1, this.keys)
        def _(k):
            keys(k)
            values(k)

        return this.more > 0, (turn + 1, upcoming, step + this.keys)

    zero = jnp.int32(0)
    lax.while_loop(lambda s: s[0], lambda s: feed_tile(s[1]), (True, (zero, take(zero), zero)))


def _attend(mine, scale_log2, ids_gmem, out_gmem, lse_gmem, shared: _Shared):
    """Computes rows `mine` * 64 and on of each tile."""

    def slot(step):
        return lax.rem(step, jnp.int32(STAGES))

    def before(step):
        return slot(step + STAGES - 1)

    def multiply(out_acc, probs, step):
        """Scores of the block of this step, and the weighted sum of the values of the one before, which may still be running."""
        now = slot(step)
        # `mine` in a form that the compiler cannot hoist out of the loop: descriptors kept there would be spilled.
        half = mine + lax.shift_right_logical(step, jnp.int32(31))

        def run(scores_acc):
            plgpu.barrier_wait(shared.turn.at[mine])
            plgpu.wgmma(scores_acc, shared.q_nope.at[half], shared.k_nope.at[now].transpose((1, 0)))
            plgpu.wgmma(scores_acc, shared.q_rope.at[half], shared.k_rope.at[now].transpose((1, 0)))
            plgpu.wgmma(out_acc, probs, shared.v.at[before(step)])
            plgpu.barrier_arrive(shared.turn.at[1 - mine])
            return lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores_acc, wait_n=1))

        scores = pl.run_scoped(run, plgpu.ACC((HALF, BLOCK), jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[now])
        return scores

    def summed(out_acc, probs, step, more=True):
        """The sum that `multiply` began, once it is done."""
        # This wait ends the basic block of the exponentials. In one block the compiler has them wait for the sum.
        pl.when(more)(lambda: plgpu.barrier_wait(shared.k_full.at[slot(step + 1)]))
        out = plgpu.wgmma_accumulator_load(out_acc, wait_n=0)

        # Never. wgmma reads `probs` until here, which ptxas 13.0 does not know: without a later use it puts the next ones into the
        # same registers, and now and then they are summed in place of these.
        @pl.when(step < 0)
        def _():
            for half in (0, VALUE // 2):
                shared.out[mine] = probs[:, half : half + VALUE // 2]

        return out

    def hide(scores, tile, k):
        """Scores of other segments' keys become -inf; those of clear blocks have none."""

        def by_id(scores):
            ids = ids_gmem[0].at[tile.row]
            query_ids = plgpu.load(ids.at[pl.ds(tile.query * BLOCK + mine * HALF, HALF)], layout=ROW, optimized=False)
            key_ids = plgpu.load(ids.at[pl.ds((tile.query - k) * BLOCK, BLOCK)], layout=COL, optimized=False)
            return jnp.where(spread(query_ids, scores.shape) == spread(key_ids, scores.shape, 1), scores, -jnp.inf)

        return lax.cond(k >= tile.clear, by_id, lambda scores: scores, scores) if ids_gmem else scores

    def weigh(scores, top):
        probs = jnp.exp2(scores * scale_log2 - spread(top, scores.shape))
        return probs.astype(jnp.bfloat16), probs.sum(axis=1)

    def leave(out, top, total, tile):
        at = pl.ds(tile.query * BLOCK + mine * HALF, HALF)
        lse_gmem[tile.row, tile.head, at] = top + jnp.log(total) * LOG2_E
        out = (out * spread(1 / total, out.shape)).astype(jnp.bfloat16)
        for half in (0, VALUE // 2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared.out[mine] = out[:, half : half + VALUE // 2]
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(shared.out.at[mine], out_gmem.at[tile.row, at, tile.head, pl.ds(half, VALUE // 2)])

    def take(turn, more=True) -> _Tile:
        at = lax.rem(turn, jnp.int32(2))
        pl.when(more)(lambda: plgpu.barrier_wait(shared.tile_full.at[at]))
        this = _Tile(*(shared.tiles[at, place] for place in range(1, 1 + len(_Tile._fields))))
        pl.when(more)(lambda: plgpu.barrier_arrive(shared.tile_free.at[at]))
        return this

    def attend_tile(out_acc, state):
        turn, step, last, this, probs, top, total = state
        more = this.more > 0
        upcoming = take(turn + 1, more)
        plgpu.barrier_wait(shared.q_full.at[mine])
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(shared.v_full.at[before(step)]))
        scores = multiply(out_acc, probs, step)
        pl.when((this.keys == 1) & more)(lambda: plgpu.barrier_arrive(shared.q_free.at[mine]))
        row = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=WGMMA)
        scores = hide(jnp.where(row + mine * HALF >= column, scores, -jnp.inf), this, 0)
        first_top = scores.max(axis=1) * scale_log2
        first_probs, first_total = weigh(scores, first_top)
        out = summed(out_acc, probs, step, more)

        @pl.when(turn > 0)
        def _():
            plgpu.barrier_arrive(shared.v_free.at[before(step)])
            leave(out, top, total, last)

        out_acc[...] = plgpu.layout_cast(jnp.zeros((HALF, VALUE), jnp.float32), WGMMA)

        def attend_block(k, carry):
            probs, top, total = carry
            plgpu.barrier_wait(shared.v_full.at[before(step + k)])
            scores = multiply(out_acc, probs, step + k)
            pl.when(k == this.keys - 1)(lambda: plgpu.barrier_arrive(shared.q_free.at[mine]))
            scores = hide(scores, this, k)
            new_top = jnp.maximum(top, scores.max(axis=1) * scale_log2)
            factor = jnp.exp2(top - new_top)
            new_probs, sums = weigh(scores, new_top)
            out = summed(out_acc, probs, step + k)
            plgpu.barrier_arrive(shared.v_free.at[before(step + k)])
            out_acc[...] = out * spread(factor, out.shape)
            return new_probs, new_top, total * factor + sums

        carry = lax.fori_loop(1, this.keys, attend_block, (first_probs, first_top, first_total))
        return more, (turn + 1, step + this.keys, this, upcoming, *carry)

    def run(out_acc):
        first, zero = take(jnp.int32(0)), jnp.int32(0)
        plgpu.barrier_wait(shared.k_full.at[0])
        probs = plgpu.layout_cast(jnp.zeros((HALF, BLOCK), jnp.bfloat16), WGMMA)
        ones = plgpu.layout_cast(jnp.ones((HALF,), jnp.float32), ROW)
        state = zero, zero, first, first, probs, ones, ones
        lax.while_loop(lambda s: s[0], lambda s: attend_tile(out_acc, s[1]), (True, state))

    pl.when(mine == 1)(lambda: plgpu.barrier_arrive(shared.turn.at[0]))
    pl.run_scoped(run, plgpu.ACC((HALF, VALUE), jnp.float32))
    pl.when(mine == 0)(lambda: plgpu.barrier_wait(shared.turn.at[0]))
    plgpu.wait_smem_to_gmem(0)
