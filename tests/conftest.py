"""Eight fake CPU devices for every test (GPUs under `-m gpu`), and a mesh of one device unless the test makes its own."""

import atexit
import gc
import os
import shutil
import tempfile

import jax
import pytest


def pytest_configure(config):
    if config.option.markexpr == "gpu":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several processes run tests
        # Not to try out how each matmul of a reference is fastest: it takes longer than the matmul, and processes disturb each other.
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
        return
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    # Tests compile hundreds of programs and run each for milliseconds: compile fast, also in the commands that tests start.
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    fast += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast}"
    # What is imported stays, and tracing makes many objects that do not: a sixth of the time went into looking for garbage.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


# One compilation cache for the processes that run tests, which inherit it from the first, and the commands that tests start.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dsv2_jax_test_cache_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# XLA's own cache of tuned GPU programs, beside it, is not for several processes: one that makes a file another just made fails.
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")

from sharding.mesh import make_mesh


@pytest.fixture(autouse=True)
def one_device_mesh():
    with jax.set_mesh(make_mesh()):
        yield
