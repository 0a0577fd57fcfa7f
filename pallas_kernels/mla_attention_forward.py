"""Attention of training and prefill, forward, on Hopper in Pallas Mosaic GPU; see mla_attention.py.

A program stays on its SM and takes one tile after the other, 128 queries of one head, longest first. Two warpgroups compute, 64
rows each; the third feeds them by TMA with blocks of 128 keys and values, two ahead, from the diagonal backwards. While one
warpgroup exponentiates, the other has the tensor cores. The pipeline runs on from tile to tile: the first scores of a tile
are computed together with the last values of the tile before, which leaves while the next begins.

A tile is one program's alone and summed in a fixed order: the same operands give the same bits, whoever takes it.

On an H200 at its power limit, cuDNN's time through PyTorch over ours, all in the same run: 1.25 at 2 x 4096 x 128 heads, 1.33 at
4 x 4096 x 16 and 1.27 at 1 x 16384 x 64; with one segment id for all, 1.28, 1.27 and 1.28. With the causal mask from the row and
the column of every score, whose numbers were spilled, 1.18 and 1.21 at the first two. Energy sets the pace: in an earlier run a
maximum and a scaling for each block took the three from 589, 536 and 696 TFLOP/s to 530, 508 and 577.
Letters: see reference.py; S the length in whole blocks, K blocks of keys, Q of queries.
"""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import tickets
from pallas_kernels.hopper import COL, PARAMS, ROW, SMS, WGMMA, registers, spread, swizzled, vary_like

BLOCK, HALF = 128, 64  # queries of a tile and keys of a block; rows of a warpgroup
NOPE, ROPE, VALUE = 128, 64, 128
STAGES = 2  # keys and values of two blocks take 160 KiB of 227, queries 48, the way out 16
# Heads whose tiles run side by side, so that those of one head meet its keys and values in L2. At 2 x 4096 x 128 heads all at once
# cost 7%; 2 to 32 were level at all of benchmarks/mla_attention.py's shapes.
GROUP = 16
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
    kernel = plgpu.kernel(
        functools.partial(_program, scale=scale),
        out_type=[
            jax.ShapeDtypeStruct(operands[-1].shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, blocks * BLOCK), jnp.float32),
        ],
        grid=(min(SMS, batch * heads * blocks),),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_attention_forward",
        compiler_params=dataclasses.replace(PARAMS, reduction_scratch_bytes=0),  # rows are reduced within a warp
        scratch_types={"shared": _shared()},
    )
    out_BTNV, lse_BNS = vary_like(q_nope_BTNH, kernel(*operands, *segments))
    return out_BTNV[:, :length], lse_BNS


def _spans(ids_BKS) -> jax.Array:
    """For each block of queries, the blocks of keys from the diagonal backwards: how many there are, and how many without a mask.

    The last is the first of all that can share a segment with the queries, judging by the least and the largest id of a block.
    No mask is needed as long as the queries and the keys are all of one segment. Ids may come in any order.

    Returns:
        [2, B, Q].
    """
    least_BK, most_BK = ids_BKS.min(axis=2), ids_BKS.max(axis=2)
    key = jnp.arange(ids_BKS.shape[1], dtype=jnp.int32)
    query = key[:, None]
    meet_BQK = (least_BK[:, :, None] <= most_BK[:, None]) & (most_BK[:, :, None] >= least_BK[:, None])
    equal_BQK = (least_BK[:, :, None] == most_BK[:, None]) & (most_BK[:, :, None] == least_BK[:, None])
    first_BQ = jnp.where(meet_BQK, key, query).min(axis=2)
    last_unequal_BQ = jnp.where(equal_BQK | (key > query), -1, key).max(axis=2)
    return jnp.stack([key - first_BQ + 1, key - last_unequal_BQ])


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
        tiles=plgpu.SMEM((2, 1 + len(_Tile._fields)), jnp.int32),
        tile_full=plgpu.Barrier(num_barriers=2),
        tile_free=plgpu.Barrier(num_arrivals=2, num_barriers=2),
    )


def _slot(step):
    return lax.rem(step, jnp.int32(STAGES))


def _before(step):
    return _slot(step + STAGES - 1)


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
        plgpu.set_max_registers(registers(2), action="increase")
        _Rows(warpgroup, scale * LOG2_E, segments[:1], out_gmem, lse_gmem, shared).run()


def _feed(tile, q_nope_gmem, q_rope_gmem, k_nope_gmem, k_rope_gmem, v_gmem, shared: _Shared):
    """Takes tickets, a tile ahead, and brings queries, keys and values as soon as there is room."""
    counter = tickets.new_counter()

    def take(turn) -> _Tile:
        at = lax.rem(turn, jnp.int32(2))
        pl.when(turn >= 2)(lambda: plgpu.barrier_wait(shared.tile_free.at[at]))
        tickets.take_ticket(counter, shared.tiles.at[at, pl.ds(0, 1)], first=0)
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
            slot, at = _slot(step + k), pl.ds((this.query - k) * BLOCK, BLOCK)
            pl.when(step + k >= STAGES)(lambda: plgpu.barrier_wait(shared.k_free.at[slot]))
            plgpu.copy_gmem_to_smem(k_nope_gmem.at[this.row, at, this.head], shared.k_nope.at[slot], shared.k_full.at[slot])
            plgpu.copy_gmem_to_smem(k_rope_gmem.at[this.row, at], shared.k_rope.at[slot], shared.k_full.at[slot])

        def values(k):
            slot, at = _slot(step + k), pl.ds((this.query - k) * BLOCK, BLOCK)
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


class _Rows(NamedTuple):
    """What a computing warpgroup does: rows `mine` * 64 and on of each tile."""

    mine: jax.Array
    scale_log2: float  # scores are multiplied with it, and exponentials are of base 2
    ids_gmem: list  # with segments, one
    out_gmem: Any
    lse_gmem: Any
    shared: _Shared

    def run(self):
        def tiles(out_acc):
            first, zero = self.take(jnp.int32(0)), jnp.int32(0)
            plgpu.barrier_wait(self.shared.k_full.at[0])
            probs = plgpu.layout_cast(jnp.zeros((HALF, BLOCK), jnp.bfloat16), WGMMA)
            top = plgpu.layout_cast(jnp.zeros((HALF,), jnp.float32), ROW)
            total = plgpu.layout_cast(jnp.ones((HALF, 8), jnp.float32), WGMMA)
            state = zero, zero, first, first, probs, top, total
            lax.while_loop(lambda s: s[0], lambda s: self.tile(out_acc, *s[1]), (True, state))

        pl.run_scoped(tiles, plgpu.ACC((HALF, VALUE), jnp.float32))
        plgpu.wait_smem_to_gmem(0)

    def take(self, turn, more=True) -> _Tile:
        at = lax.rem(turn, jnp.int32(2))
        pl.when(more)(lambda: plgpu.barrier_wait(self.shared.tile_full.at[at]))
        tile = _Tile(*(self.shared.tiles[at, place] for place in range(1, 1 + len(_Tile._fields))))
        pl.when(more)(lambda: plgpu.barrier_arrive(self.shared.tile_free.at[at]))
        return tile

    def tile(self, out_acc, turn, step, last, tile, probs, top, total):
        """The first block of a tile, together with the end of the last tile; then the other blocks."""
        shared, more = self.shared, tile.more > 0
        plgpu.barrier_wait(shared.q_full.at[self.mine])
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(shared.v_full.at[_before(step)]))
        scores = self.multiply(out_acc, probs, step)
        pl.when((tile.keys == 1) & more)(lambda: plgpu.barrier_arrive(shared.q_free.at[self.mine]))
        # From vectors: the numbers of all the scores would be kept over the loop, and spilled.
        row = spread(plgpu.broadcasted_iota(jnp.int32, (HALF,), 0, layout=ROW) + self.mine * HALF, scores.shape)
        column = spread(plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=COL), scores.shape, 1)
        scores = jnp.where(row >= column, scores, -jnp.inf)
        if self.ids_gmem:
            scores = lax.cond(tile.clear == 0, lambda: self.hide(scores, tile, 0), lambda: scores)
        first_top = scores.max(axis=1) * self.scale_log2
        first_probs, first_total = self.weigh(scores, first_top)
        out = self.summed(out_acc, step, more)

        @pl.when(turn > 0)
        def _():
            plgpu.barrier_arrive(shared.v_free.at[_before(step)])
            self.spare(probs, step)
            self.leave(out, top, total, last)

        out_acc[...] = plgpu.layout_cast(jnp.zeros((HALF, VALUE), jnp.float32), WGMMA)
        state = first_probs, first_top, first_total
        clear = jnp.maximum(tile.clear, 1) if self.ids_gmem else tile.keys
        state = lax.fori_loop(1, clear, functools.partial(self.block, out_acc, step, tile, False), state)
        if self.ids_gmem:  # a loop of the masked blocks' own: to jump over a mask's instructions cost the clear ones 6%
            state = lax.fori_loop(clear, tile.keys, functools.partial(self.block, out_acc, step, tile, True), state)
        return more, (turn + 1, step + tile.keys, tile, self.take(turn + 1, more), *state)

    def block(self, out_acc, step, tile, masked, k, state):
        """Block k of the keys, which is that of step + k, and the values of the block before."""
        shared, step = self.shared, step + k
        probs, top, total = state
        plgpu.barrier_wait(shared.v_full.at[_before(step)])
        scores = self.multiply(out_acc, probs, step)
        pl.when(k == tile.keys - 1)(lambda: plgpu.barrier_arrive(shared.q_free.at[self.mine]))
        if masked:
            scores = self.hide(scores, tile, k)
        new_probs, sums = self.weigh(scores, top)
        # Relative to the largest score of the first block exponentials may grow, up to an overflow: floating point does not mind.
        # So no block needs its maximum, and the sums no scaling, which is a third of the instructions and their energy.
        grown = _above(sums, 2.0**60)

        def again():
            new_top = jnp.maximum(top, scores.max(axis=1) * self.scale_log2)
            return *self.weigh(scores, new_top), new_top

        new_probs, sums, new_top = lax.cond(grown, again, lambda: (new_probs, sums, top))
        out = self.summed(out_acc, step)
        plgpu.barrier_arrive(shared.v_free.at[_before(step)])

        def rescaled():
            self.spare(probs, step)
            factor = jnp.exp2(top - new_top)
            return out * spread(factor, out.shape), total * spread(factor, total.shape)

        out_acc[...], total = lax.cond(grown, rescaled, lambda: (out, total))
        return new_probs, new_top, total + sums

    def multiply(self, out_acc, probs, step):
        """Scores of the block of this step, and the weighted sum of the values of the one before, which may still be running."""
        shared, mine = self.shared, self.mine
        # `mine` in a form that the compiler cannot hoist out of the loop: descriptors kept there would be spilled.
        half = mine + lax.shift_right_logical(step, jnp.int32(31))

        def run(scores_acc):
            plgpu.wgmma(scores_acc, shared.q_nope.at[half], shared.k_nope.at[_slot(step)].transpose((1, 0)))
            plgpu.wgmma(scores_acc, shared.q_rope.at[half], shared.k_rope.at[_slot(step)].transpose((1, 0)))
            plgpu.wgmma(out_acc, probs, shared.v.at[_before(step)])
            return lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores_acc, wait_n=1))

        scores = pl.run_scoped(run, plgpu.ACC((HALF, BLOCK), jnp.float32))
        plgpu.barrier_arrive(shared.k_free.at[_slot(step)])
        return scores

    def summed(self, out_acc, step, more=True):
        """The sum that `multiply` began, once it is done."""
        # This wait ends the basic block of the exponentials. In one block the compiler has them wait for the sum.
        pl.when(more)(lambda: plgpu.barrier_wait(self.shared.k_full.at[_slot(step + 1)]))
        return plgpu.wgmma_accumulator_load(out_acc, wait_n=0)

    def spare(self, probs, step):
        """A use of `probs` after `summed`, that never happens: until there wgmma reads them, which ptxas 13.0 does not know.

        Without a later use it puts the next ones into the same registers, and now and then they are summed in place of these.
        """

        @pl.when(step < 0)
        def _():
            for half in (0, VALUE // 2):
                self.shared.out[self.mine] = probs[:, half : half + VALUE // 2]

    def hide(self, scores, tile, k):
        """Scores of other segments' keys become -inf."""
        ids = self.ids_gmem[0].at[tile.row]
        query_ids = plgpu.load(ids.at[pl.ds(tile.query * BLOCK + self.mine * HALF, HALF)], layout=ROW, optimized=False)
        key_ids = plgpu.load(ids.at[pl.ds((tile.query - k) * BLOCK, BLOCK)], layout=COL, optimized=False)
        return jnp.where(spread(query_ids, scores.shape) == spread(key_ids, scores.shape, 1), scores, -jnp.inf)

    def weigh(self, scores, top):
        """The exponentials relative to `top`; and their sums over every eighth column, all that a thread has of a row."""
        probs = jnp.exp2(scores * self.scale_log2 - spread(top, scores.shape))
        return probs.astype(jnp.bfloat16), functools.reduce(operator.add, (probs[:, i : i + 8] for i in range(0, BLOCK, 8)))

    def leave(self, out, top, total, tile):
        at, total = pl.ds(tile.query * BLOCK + self.mine * HALF, HALF), total.sum(axis=1)
        self.lse_gmem[tile.row, tile.head, at] = top + jnp.log(total) * LOG2_E
        out = (out * spread(1 / total, out.shape)).astype(jnp.bfloat16)
        for half in (0, VALUE // 2):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.shared.out[self.mine] = out[:, half : half + VALUE // 2]
            plgpu.commit_smem()
            out_gmem = self.out_gmem.at[tile.row, at, tile.head, pl.ds(half, VALUE // 2)]
            plgpu.copy_smem_to_gmem(self.shared.out.at[self.mine], out_gmem)


def _above(x, limit: float):
    """Whether a number of this warp's part of x, in layout WGMMA, is above `limit`; the warps of a warpgroup need not agree.

    (Pallas reduces over all of them, through shared memory.)
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA,), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT))
    def vote(_, x):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        largest = functools.reduce(arith.maximumf, (vector.extract(two, [], [i]) for two in x.registers.flat for i in range(2)))
        text = "{ .reg .pred p; setp.gt.f32 p, $1, $2; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
        operands = [largest, arith.constant(f32, limit)]
        return mgpu.FragmentedArray.splat(
            llvm.inline_asm(i32, operands, text, "=r,f,f", has_side_effects=True), (), is_signed=True
        )

    return vote(x) > 0
