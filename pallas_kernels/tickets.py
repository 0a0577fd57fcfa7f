"""The tiles of a persistent kernel, handed out in order, each to the SM that asks first.

Tiles differ in height. Dealt in turn, neighbours that share rows or a weight tile drift apart and miss each other's reads in L2: the
grouped matmul of V2's shape took 449-474 TFLOP/s in turn and 615 by tickets (its tiles in another order than now). One warpgroup of a
program takes tickets, its own number first and then from a counter in global memory, and passes them to the others through a ring in
shared memory.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref

from pallas_kernels.dispatch import choose
from pallas_kernels.hopper import PARAMS, SMS, drain, vary_like
from pallas_kernels.lanes import THREADS, full, gather, iota, scatter

AT_ONCE = 8  # experts of which a loop compares blocks with a thread's
ATTACHED = 32  # words before what a kernel attaches to a ticket: TMA writes at multiples of 128 bytes


def table(rows_E: jax.Array, unit: int, per_unit: int, most: int, capacity: int, cut: Callable) -> jax.Array:
    """Experts' rows, padded to `unit` and each unit counted as `per_unit`, in the fewest blocks of at most `most`.

    Returns int32 [4, capacity]: the number of blocks; and the expert, the first row and the length of each. What lies past the last
    is of no meaning, but names some expert.

    `cut(length, blocks, index, most)` says where a block begins within an expert of so many rows and blocks, and how long it is.
    """
    make = _table_hopper if choose(None, None) == "pallas" else _table_xla
    return make(rows_E.astype(jnp.int32), unit, per_unit, most, capacity, cut)


def _table_xla(rows_E, unit, per_unit, most, capacity, cut):
    lengths_E = pl.cdiv(rows_E, unit) * per_unit
    blocks_E = pl.cdiv(lengths_E, most)
    ends_E = before(blocks_E) + blocks_E
    block = jnp.arange(capacity, dtype=jnp.int32)
    expert = jnp.minimum((block[:, None] >= ends_E).sum(axis=1, dtype=jnp.int32), blocks_E.size - 1)
    begin, length = cut(lengths_E[expert], jnp.maximum(blocks_E, 1)[expert], block - (ends_E - blocks_E)[expert], most)
    first = before(lengths_E)[expert] + begin
    return jnp.stack([jnp.full_like(first, ends_E[-1]), expert, first, length])


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))  # two products of the same rows have it once
def _table_hopper(rows_E, unit, per_unit, most, capacity, cut):
    """A block a thread, which looks for the expert whose it is: one small program, where XLA makes three that wait for each other."""
    (experts,) = rows_E.shape

    def body(rows_gmem, table_gmem, lengths_smem):
        block = iota(THREADS) + lax.axis_index("program") * THREADS
        every = iota(lengths_smem.shape[0])
        rows = jnp.where(every < experts, gather(rows_gmem, every), 0)
        scatter(lengths_smem, every, lax.div(rows + (unit - 1), jnp.full_like(rows, unit)) * per_unit)
        plgpu.commit_smem()

        def pass_by(group, carry):
            begin, row, *own = carry
            for e in (group * AT_ONCE + i for i in range(AT_ONCE)):
                length = gather(lengths_smem, full(block, e))  # the same in all threads
                blocks = lax.div(length + (most - 1), full(block, most))
                here = (block >= begin) & (block < begin + blocks)
                own = [jnp.where(here, its, x) for its, x in zip((full(block, e), row, length, blocks, block - begin), own)]
                begin, row = begin + blocks, row + length
            return begin, row, *own

        groups = pl.cdiv(experts, AT_ONCE)
        count, _, expert, row, length, blocks, index = lax.fori_loop(0, groups, pass_by, tuple(full(block, 0) for _ in range(7)))
        start, length = cut(length, jnp.maximum(blocks, 1), index, most)
        for field, values in enumerate((count, expert, row + start, length)):
            scatter(table_gmem, jnp.where(block < capacity, block + field * capacity, -1), values)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((4 * capacity,), jnp.int32),
        grid=(pl.cdiv(capacity, THREADS),),
        grid_names=("program",),
        kernel_name="ticket_table",
        scratch_types=[plgpu.SMEM((pl.cdiv(experts, THREADS) * THREADS,), jnp.int32)],
        compiler_params=PARAMS,
    )
    return vary_like(rows_E, kernel(rows_E)).reshape(4, capacity)


def look_up(table_gmem, columns: int, ticket: jax.Array) -> tuple[jax.Array, ...]:
    """The expert, first row, column tile and length of a ticket's tile. Columns are fastest: neighbours share rows."""
    block, column = lax.div(ticket, jnp.int32(columns)), lax.rem(ticket, jnp.int32(columns))
    expert, first, length = (table_gmem[field, block] for field in (1, 2, 3))
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

    `fields = describe(ticket)` reads what the tile is from global memory: no reader should wait for that.
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
            tiles[slot, 0] = program + i * SMS
        else:
            take_ticket(counter, tiles.at[slot, pl.ds(0, 1)], SMS)
        return pass_on(slot, tiles[slot, 0])

    def pass_on(slot, ticket):  # which lies in its slot
        fields = describe(jnp.clip(ticket, 0, jnp.maximum(count - 1, 0)))
        for place, field in enumerate(fields, 1):
            tiles[slot, place] = field
        if attach:
            attach(fields, words(refs, slot), come.at[slot])
        plgpu.barrier_arrive(come.at[slot])
        return ticket

    zero = jnp.int32(0)
    tiles[0, 0] = program  # the first ticket is its own: no need to ask
    first = zero, pass_on(zero, program)
    last, _ = lax.while_loop(lambda state: state[1] < count, lambda state: (state[0] + 1, take(state[0] + 1)), first)
    drain(done, last + 1, depth)


def follow(tile: Callable, fields: int, init, count: jax.Array, refs: list):
    """Runs `carry = tile(fields, slot, carry)` for the tiles that `lead` passes on; what `words` holds in the slot stays until `tile` returns."""
    tiles, come, done = refs
    depth = tiles.shape[0]

    def take(i):
        slot = lax.rem(i, jnp.int32(depth))
        plgpu.barrier_wait(come.at[slot])
        return tiles[slot, 0]

    def step(state):
        i, _, carry = state
        slot = lax.rem(i, jnp.int32(depth))
        carry = tile([tiles[slot, place] for place in range(1, 1 + fields)], slot, carry)
        plgpu.barrier_arrive(done.at[slot])
        return i + 1, take(i + 1), carry

    zero = jnp.int32(0)
    last, _, carry = lax.while_loop(lambda state: state[1] < count, step, (zero, take(zero), init))
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
