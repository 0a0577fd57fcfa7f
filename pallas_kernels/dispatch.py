"""Which implementation of a kernel runs: the Hopper one in Pallas, or the one that XLA compiles for any machine."""

import jax

HOPPER = ("H100", "H200", "H800", "H20", "GH200")


def choose(implementation: str | None, unsupported: str | None, peers: tuple[str, ...] = ()) -> str:
    """The implementation to use: what was asked for, or "pallas" where it can run, else "xla".

    Args:
        implementation: None, "xla", "pallas" or one of `peers`.
        unsupported: why these operands do not fit the Pallas kernel; None where they do.
        peers: further names that the caller implements.

    Raises: ValueError, for an unknown name and for "pallas" where it cannot run, with the reason.
    """
    names = ("xla", "pallas", *peers)
    if implementation not in (None, *names):
        raise ValueError(f"implementation is {implementation!r}, expected None or one of {', '.join(names)}")
    kind = device_kind()
    if unsupported is None and not any(name in kind for name in HOPPER):
        unsupported = f"the device is {kind}, expected a Hopper GPU ({', '.join(HOPPER)})"
    if implementation == "pallas" and unsupported:
        raise ValueError(f"implementation is 'pallas', which cannot run: {unsupported}")
    return implementation or ("xla" if unsupported else "pallas")


def device_kind() -> str:
    """The kind of the current mesh's devices, present or, where a program is compiled for absent ones, not."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
