"""Which worker attends to which blocks of which request: all blocks of a batch, laid end to end, cut into even ranges.

Computed on the device from the positions, once a step for all layers. Letters: B requests, T query tokens of each, N heads,
W workers, W1 their W + 1 limits. A block is a page of 64 tokens; a tile is 64 rows, a row being a head of a query token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hopper import SMS

BLOCK = 64  # tokens
ROWS = 64  # of a tile
OVERHEAD = 4  # what beginning and ending a request costs a worker, in blocks; a cut this near to a request's ends moves there
LEAST = 4  # blocks that a worker has at least, with their overhead, where a request has more tiles than one
UNEVEN = 16  # no request is cut if no worker then has more than this part of a fair share too much


class Schedule(NamedTuple):
    """Worker w attends to the blocks from limit w up to limit w + 1, a limit being a request and a block of it.

    A limit with block > 0 cuts its request in two; one with block 0 falls between requests. Every request, also one of no
    blocks, begins in exactly one range, so its output is written. The last limit is request B, block 0. Of a request's blocks
    the first `open` ones are seen whole by all of its queries: no mask. Limits `first` .. `first + cuts - 1` cut it.
    """

    request_W1: jax.Array
    block_W1: jax.Array
    blocks_B: jax.Array
    open_B: jax.Array
    first_B: jax.Array
    cuts_B: jax.Array


def num_tiles(tokens: int, num_heads: int) -> int:
    """Tiles that the rows of a request fill."""
    return -(-tokens * num_heads // ROWS)


def make_schedule(positions_BT: jax.Array, num_heads: int) -> Schedule:
    """An even split of all blocks that queries at these positions see; -1 is the position of a query that sees nothing.

    Nearly even, where no request needs to be cut for that: 128 and 256 requests of one length took 2 to 7% less time (H200, 16 heads).
    Each SM is one worker on one tile of every request in its range, so that W is the number of SMs over the number of tiles.
    """
    tiles = num_tiles(positions_BT.shape[1], num_heads)
    workers = max(1, SMS // tiles)
    blocks_B = (positions_BT.max(axis=1).astype(jnp.int32) + BLOCK) // BLOCK
    ends_B = jnp.cumsum(blocks_B + OVERHEAD, dtype=jnp.int32)
    share, rest = jnp.divmod(ends_B[-1], workers)
    # A part of 64 rows takes as long to add as some blocks to attend to: with 128 heads one request of 1,101 tokens took 31 us in 18 parts
    # and 17 in 5, over 6-bit latents 79 and 40 (H200). Of one tile, 16 rows, more parts were as fast or faster.
    least = LEAST if tiles > 1 else 1
    share, rest = jnp.maximum(share, least), jnp.where(share < least, 0, rest)
    index_W1 = jnp.arange(workers + 1, dtype=jnp.int32)
    cost_W1 = jnp.minimum(index_W1 * share + jnp.minimum(index_W1, rest), ends_B[-1])
    request_W1 = jnp.minimum(jnp.searchsorted(ends_B, cost_W1, side="right", method="compare_all"), len(blocks_B) - 1).astype(
        jnp.int32
    )
    # A request's blocks lie between the two halves of its overhead; a cut in a half moves to the nearer end.
    size_W1 = blocks_B[request_W1]
    block_W1 = jnp.maximum(cost_W1 - (ends_B[request_W1] - size_W1) + OVERHEAD // 2, 0)
    passed_W1 = (block_W1 >= size_W1) & (cost_W1 > 0)
    request_W1, block_W1 = jnp.where(passed_W1, request_W1 + 1, request_W1), jnp.where(passed_W1, 0, block_W1)
    # Requests of about one length need no cut, whose parts would have to be added, if they suit the number of workers. (Of more tiles
    # than one, it is their products that take the time: all workers are needed.)
    groups = max(n for n in range(1, workers + 1) if len(blocks_B) % n == 0)
    longest = (blocks_B + OVERHEAD).reshape(groups, -1).sum(axis=1).max()
    fair = share + (rest > 0)
    whole = (workers == SMS) & (longest <= fair + fair // UNEVEN)
    whole_W1 = jnp.minimum(index_W1, groups) * (len(blocks_B) // groups)
    request_W1, block_W1 = jnp.where(whole, whole_W1, request_W1), jnp.where(whole, 0, block_W1)
    place_W1 = 2 * request_W1 + (block_W1 > 0)
    place_B = 2 * jnp.arange(len(blocks_B), dtype=jnp.int32) + 1  # of the limits that cut a request
    first_B, after_B = (
        jnp.searchsorted(place_W1, place_B, side=side, method="compare_all").astype(jnp.int32) for side in ("left", "right")
    )
    open_B = (positions_BT.min(axis=1).astype(jnp.int32) + 1) // BLOCK
    return Schedule(request_W1, block_W1, blocks_B, open_B, first_B, after_B - first_B)


class Piece(NamedTuple):
    """Blocks begin .. end - 1 of a request, the part of it in one worker's range: the first part of `cuts + 1`, or the `part`th."""

    request: jax.Array
    begin: jax.Array
    end: jax.Array
    part: jax.Array
    cuts: jax.Array


def pieces(schedule_gmem: Schedule, worker, visit, carry):
    """Inside a kernel: carries `visit(piece, carry)` over the pieces of a worker."""
    first, last = schedule_gmem.request_W1[worker], schedule_gmem.request_W1[worker + 1]
    first_block, last_block = schedule_gmem.block_W1[worker], schedule_gmem.block_W1[worker + 1]

    def step(i, carry):
        request = first + i
        begin = jnp.where(i == 0, first_block, 0)
        end = jnp.where(request == last, last_block, schedule_gmem.blocks_B[request])
        part = jnp.where(begin > 0, worker + 1 - schedule_gmem.first_B[request], 0)
        return visit(Piece(request, begin, end, part, schedule_gmem.cuts_B[request]), carry)

    return lax.fori_loop(0, last - first + (last_block > 0).astype(jnp.int32), step, carry)


RADIX = 8  # of the tree that adds up the parts of a request; three levels serve up to 512 workers


def merge(piece: Piece, visit, carry):
    """Inside a kernel: carries `visit(offset, carry)` over the parts, `offset` workers ahead, that a part adds to its own result.

    Part p adds p + 1 .. p + 7 if 8 divides it, then p + 8, .. p + 56 if 64 does, then p + 64, ..: its result then covers all
    parts up to the next of its rank, and part 0's the whole request. A worker only waits for later ones, which run on programs
    that started earlier, if programs take workers from the last to the first.
    """
    rest = piece.cuts - piece.part
    counts, stride = [], 1
    for _ in range(3):
        count = jnp.minimum(lax.div(rest, jnp.int32(stride)), RADIX - 1)
        stride *= RADIX
        counts.append(jnp.where(lax.rem(piece.part, jnp.int32(stride)) == 0, count, 0))

    def step(i, carry):
        second, third = i - counts[0], i - counts[0] - counts[1]
        offset = jnp.where(second < 0, i + 1, jnp.where(third < 0, RADIX * (second + 1), RADIX**2 * (third + 1)))
        return visit(offset, carry)

    return lax.fori_loop(0, sum(counts), step, carry)
