"""Packaging. `pip install -e .` on a CPU machine, `pip install -e .[cuda13]` on an NVIDIA GPU machine."""

from setuptools import setup

setup(
    name="dsv2-jax",
    version="0.1.0",
    description="DeepSeek-V2 in JAX: trained, converted and served on sharded NVIDIA GPUs, with the numbers of the PyTorch weights",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=["dsv2_jax", "sharding", "pallas_kernels"],
    install_requires=[
        "jax>=0.11.2,<0.13",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "numpy>=2.1",
        "ml_dtypes>=0.5",
        "tensorstore>=0.1.70",
        "absl-py>=2.1",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "jinja2>=3.1",
        "rich>=13",
    ],
    extras_require={
        "train": ["grain>=0.2.18"],
        "plot": ["matplotlib>=3.9"],
        "test": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.9", "grain>=0.2.18", "matplotlib>=3.9"],
        "k8s": ["jax[k8s]>=0.11.2,<0.13"],
        "cuda13": ["jax[cuda13]>=0.11.2,<0.13"],
    },
)
