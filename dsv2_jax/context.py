"""What every layer needs to know of the tokens, and how it is to run."""

from typing import NamedTuple

import jax

from pallas_kernels.decode_schedule import Schedule


class Dropping(NamedTuple):
    """Token dropping of a training step (paper section 2.2.4)."""

    exempt_B: jax.Array  # sequences of which nothing is dropped
    capacity_factor: float  # a group's budget, in shares of the mean load
    pool: int  # consecutive sequences that share it


class Context(NamedTuple):
    """The tokens' places, and the rotary angles there; `dropping` and `dispatch` matter in MoE layers alone, and what follows
    only where there is a cache (see `cache.Cache`)."""

    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    cos_BTJ: jax.Array
    sin_BTJ: jax.Array
    dropping: Dropping | None = None
    dispatch: str | None = None  # of `sharding.expert_parallel.DISPATCHES`
    slots_BT: jax.Array | None = None  # where the cache keeps a token; -1: nowhere, as it only fills up the batch
    table_BP: jax.Array | None = None  # the pages a request attends over; None: these tokens attend to each other alone
    schedule: Schedule | None = None  # of attention over pages
