"""The device mesh: its axes, and how one is made.

| axis | what is split over it |
|---|---|
| data | the batch |
| expert | the batch, and the routed experts |

Every axis is `AxisType.Explicit` and always present; an unused one has size 1, so one code path serves one device and many.
"""

import math
from collections.abc import Sequence

import jax

AXES = ("data", "expert")


def make_mesh(data: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of `data` x `expert` devices, the first ones of `devices` (default: all of this program's).

    Raises:
        ValueError: there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, expert)
    if math.prod(shape) > len(devices):
        raise ValueError(f"mesh data={data},expert={expert} needs {math.prod(shape)} devices, there are {len(devices)}")
    return jax.make_mesh(shape, AXES, devices=devices[: math.prod(shape)])
