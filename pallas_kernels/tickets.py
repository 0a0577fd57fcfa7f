"""The tiles of a persistent kernel, handed out in order, each to the SM that asks first.

Tiles differ in height. Dealt in turn, neighbours that share rows or a weight tile drift apart and miss each other's reads in L2: the
grouped matmul of V2's shape took 449-474 TFLOP/s in turn and 615 by tickets (its tiles in another order than now). One warpgroup of a
program takes tickets, its own number first and then from a counter in global memory, and passes them to the others through a ring in
shared memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.hopper import SMS, drain
from pallas_kernels.lanes import LANES, THREADS, full, gather, iota, scatter, warp_sum_so_far

ATTACHED = 32  # words before what a kernel attaches to a ticket: TMA writes at multiples of 128 bytes
THERE, BOARD, SUMS = 7, 8, 16  # of these: whether there is a tile; where threads tell each other of it, and of all experts
EXPERTS = (ATTACHED - SUMS) // 2 * LANES  # at most: a warp's has two sums


class Blocks(NamedTuple):
    """Rows in expert order, cut into blocks. Vectors: thread i of the warpgroup that made them has those of experts i, i + 128, .."""

    count: jax.Array  # of all blocks
    begin_E: jax.Array  # the number of an expert's first block
    first_E: jax.Array  # its first row
    length_E: jax.Array  # its rows


def cut_rows(rows_gmem, unit: int, per_unit: int, most: int, refs: list) -> Blocks:
    """Experts' rows, padded to `unit` and each unit counted as `per_unit`, in the fewest blocks of at most `most`. For the warpgroup that
    leads. `refs`: as `lead` has them."""
    (experts,), board = rows_gmem.shape, refs[0].at[0]
    expert = iota(pl.cdiv(experts, THREADS) * THREADS)
    rows = jnp.where(expert < experts, gather(rows_gmem, expert), 0)
    length = lax.div(rows + (unit - 1), full(rows, unit)) * per_unit
    counts = _count(length, most), length
    so_far = [warp_sum_so_far(x) for x in counts]
    warp, warps, last = expert >> 5, expert.size // LANES, (expert & (LANES - 1)) == LANES - 1
    # Where there are no blocks, a ticket names the first expert.
    scatter(board, jnp.where(expert < SUMS, expert, -1), full(expert, 0))
    for i, sums in enumerate(so_far):
        scatter(board, jnp.where(last, warp + (SUMS + i * warps), -1), sums)
    plgpu.commit_smem()
    totals = [[board[SUMS + i * warps + w] for w in range(warps)] for i in range(2)]
    begin, first = (
        sums - x + sum(jnp.where(warp > w, total, 0) for w, total in enumerate(of_warps))
        for sums, x, of_warps in zip(so_far, counts, totals)
    )
    return Blocks(sum(totals[0]), begin, first, length)


def _count(length, most: int):
    return lax.div(length + (most - 1), full(length, most))


def look_up(
    blocks: Blocks, columns: int, most: int, cut: Callable, refs: list, ticket: jax.Array, slot: jax.Array
) -> tuple[jax.Array, ...]:
    """The expert, first row, column tile and length of a ticket's tile. Columns are fastest: neighbours share rows.

    The thread that has the expert tells the others, in the ticket's slot: some may still have to read what another's has.

    `cut(length, blocks, index, most)` says where a block begins within an expert of so many rows and blocks, and how long it is.
    """
    block, column = lax.div(ticket, jnp.int32(columns)), lax.rem(ticket, jnp.int32(columns))
    expert, index, many = iota(blocks.begin_E.size), block - blocks.begin_E, _count(blocks.length_E, most)
    here = (index >= 0) & (index < many)
    start, length = cut(blocks.length_E, jnp.maximum(many, 1), index, most)
    board = refs[0].at[slot]
    for field, values in enumerate((expert, blocks.first_E + start, length), BOARD):
        scatter(board, jnp.where(here, field, -1), values)
    plgpu.commit_smem()
    expert, first, length = (board[field] for field in range(BOARD, BOARD + 3))
    return expert, first, column, length


def before(counts_E: jax.Array) -> jax.Array:
    """The sum of the counts of earlier experts: int32 [E]. All compared with all is one small program on the GPU, a running sum two."""
    expert = jnp.arange(counts_E.size, dtype=jnp.int32)
    return jnp.where(expert < expert[:, None], counts_E, 0).sum(axis=1, dtype=jnp.int32)


def ring(readers: int, depth: int, attached: int = 0) -> list:
    """Scratch types: tickets with room for `attached` words, and barriers: it has come; all `readers` are done with its tile.

    `depth` tickets: `lead` may be that many tiles ahead of the end of the slowest reader's tile.
    """
    return [
        plgpu.SMEM((depth, ATTACHED + attached), jnp.int32),
        plgpu.Barrier(num_arrivals=2 if attached else 1, num_barriers=depth),
        plgpu.Barrier(num_arrivals=readers, num_barriers=depth),
    ]


def lead(describe: Callable, count: jax.Array, refs: list, attach: Callable | None = None, in_turn: bool = False) -> None:
    """Takes tickets and passes on those below `count`, ahead of the readers, until they are done with all of them.

    The grid is "sm", SMS programs. `in_turn`: program s has the tickets s, s + SMS, ..: where programs have one tile each, or few that
    take equally long. A counter would have to be set to zero before the launch, which a graph of small kernels may have to wait for.

    `fields = describe(ticket, slot)` finds out what the tile is: no reader should wait for that.
    `attach(fields, words, barrier)` starts one copy that comes along.
    """
    tiles, come, done = refs
    depth = tiles.shape[0]
    program = lax.axis_index("sm")
    counter = None if in_turn else new_counter()

    def take(i):
        slot = lax.rem(i, jnp.int32(depth))
        pl.when(i >= depth)(lambda: plgpu.barrier_wait(done.at[slot]))
        if counter is None:
            return pass_on(slot, program + i * SMS)
        take_ticket(counter, tiles.at[slot, pl.ds(0, 1)], SMS)
        return pass_on(slot, tiles[slot, 0])

    def pass_on(slot, ticket):
        fields = describe(jnp.clip(ticket, 0, jnp.maximum(count - 1, 0)), slot)
        tiles[slot, THERE] = jnp.where(ticket < count, 1, 0)
        for place, field in enumerate(fields, 1):
            tiles[slot, place] = field
        if attach:
            attach(fields, words(refs, slot), come.at[slot])
        plgpu.barrier_arrive(come.at[slot])
        return ticket

    zero = jnp.int32(0)
    first = zero, pass_on(zero, program)  # the first ticket is its own: no need to ask
    last, _ = lax.while_loop(lambda state: state[1] < count, lambda state: (state[0] + 1, take(state[0] + 1)), first)
    drain(done, last + 1, depth)


def follow(tile: Callable, fields: int, init, refs: list):
    """Runs `carry = tile(fields, slot, carry)` for the tiles that `lead` passes on; what `words` holds in the slot stays until `tile` returns."""
    tiles, come, done = refs
    depth = tiles.shape[0]

    def take(i):
        slot = lax.rem(i, jnp.int32(depth))
        plgpu.barrier_wait(come.at[slot])
        return tiles[slot, THERE]

    def step(state):
        i, _, carry = state
        slot = lax.rem(i, jnp.int32(depth))
        carry = tile([tiles[slot, place] for place in range(1, 1 + fields)], slot, carry)
        plgpu.barrier_arrive(done.at[slot])
        return i + 1, take(i + 1), carry

    zero = jnp.int32(0)
    last, _, carry = lax.while_loop(lambda state: state[1] > 0, step, (zero, take(zero), init))
    plgpu.barrier_arrive(done.at[lax.rem(last, jnp.int32(depth))])
    return carry


def words(refs: list, slot: jax.Array):
    """What is attached to the ticket in a slot."""
    return refs[0].at[slot, pl.ds(ATTACHED, refs[0].shape[1] - ATTACHED)]


def new_counter():
    """A counter of the whole grid, zero when a launch begins; every call makes another. (Tests put None here: all in turn.)

    One of two: XLA makes the zeros of many launches in one kernel, but single numbers by a copy for each launch.
    """
    return pl.get_global(plgpu.SemaphoreType.REGULAR((2,))).at[0]


def take_ticket(counter, slot, first: int) -> None:
    """Leaves a ticket, `first` or later, in shared memory: one thread adds 1 to the counter. (Pallas' atomics return nothing.)"""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(_, counter, slot):
        with mgpu.utils.when(mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)):
            add = "atom.relaxed.gpu.global.add.u32 $0, [$1], 1;"
            pointer, i32 = mgpu.utils.memref_ptr(counter), ir.IntegerType.get_signless(32)
            old = llvm.inline_asm(i32, [pointer], add, "=r,l", has_side_effects=True)
            memref.store(arith.addi(old, arith.constant(i32, first)), slot, [arith.constant(ir.IndexType.get(), 0)])
        mgpu.utils.warpgroup_barrier()

    emit(counter, slot)
