"""Eight fake CPU devices for every test, and a mesh of one of them unless the test makes its own."""

import os

import jax
import pytest

if "cuda" not in os.environ.get("JAX_PLATFORMS", "cpu"):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)

from sharding.mesh import make_mesh


@pytest.fixture(autouse=True)
def one_device_mesh():
    with jax.set_mesh(make_mesh()):
        yield
