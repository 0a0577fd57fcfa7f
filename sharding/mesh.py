"""The device mesh: its axes, how one is made, and how the processes of many hosts find each other.

| axis | what is split over it |
|---|---|
| data | the batch; at rest, parameters and optimizer state |
| expert | the batch and the routed experts; at rest, parameters and optimizer state |

Every axis is `AxisType.Explicit` and always present; an unused one has size 1, so one code path serves one device and many.
Devices of one host are neighbours on the expert axis, whose exchanges need the faster links.
"""

import faulthandler
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "expert")
HEARTBEAT_S = 30  # after which a process that is silent, or does not leave with the others, counts as lost


def make_mesh(data: int = 1, expert: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` x `expert` devices, the first ones of `devices` (default: all of this program's), in their order.

    Raises:
        ValueError: there are fewer devices than the mesh needs.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, expert)
    if math.prod(shape) > len(devices):
        raise ValueError(f"mesh data={data},expert={expert} needs {math.prod(shape)} devices, there are {len(devices)}")
    return Mesh(np.array(devices[: math.prod(shape)]).reshape(shape), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def parse_mesh(text: str) -> tuple[int, int]:
    """The sizes in `data=2,expert=4`; an axis that is not named has size 1.

    Raises:
        ValueError: an unknown axis, one named twice, or a size that is not a number above 0.
    """
    sizes: dict[str, int] = {}
    for item in text.split(","):
        name, _, size = item.partition("=")
        if name not in AXES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"{item!r}: expected an axis of {', '.join(AXES)} and its size, as in data=2,expert=4")
        sizes[name] = int(size)
    return sizes.get("data", 1), sizes.get("expert", 1)


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of its job: those named, or those that Slurm or Kubernetes started; alone, does nothing.

    Under Slurm a process has one GPU, so a node runs as many tasks as it has GPUs.

    Raises:
        ValueError: what is named does not say how to join, or Kubernetes' package is missing.
    """
    named = coordinator, num_processes, process_id
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdecimal()) or None in named or process_id >= num_processes:
            told = f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}"
            raise ValueError(f"{told}: expected HOST:PORT, the number of processes, and which of them this is, from 0")
    slurm = (
        int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ
    )  # a step's own, not a batch script's
    kubernetes = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    if coordinator or slurm or kubernetes:
        faulthandler.disable()  # a process that has lost another aborts with one line that says so, and needs no traceback
        waits = {"heartbeat_timeout_seconds": HEARTBEAT_S, "shutdown_timeout_seconds": HEARTBEAT_S}
        jax.distributed.initialize(coordinator, num_processes, process_id, **waits)
