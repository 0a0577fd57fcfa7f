"""What the timing of the engine is held against."""

import jax.numpy as jnp
import pytest

from dsv2_jax import config, model, roofline
from dsv2_jax.bench import Load, parse_load
from dsv2_jax.fields import InputError


class Stored:
    """A model's weights by their bytes, of which none exist."""

    def __init__(self, abstract, weights_dtype):
        sizes = {name: leaf.size * leaf.dtype.itemsize for name, leaf in model.parameters(abstract).items()}
        experts = sum(size for name, size in sizes.items() if ".experts." in name)
        rest = sum(sizes.values()) - experts - sizes["embed"]
        self.weights = roofline.WeightBytes(experts, rest, weights_dtype == "fp8")


@pytest.mark.parametrize("batch, milliseconds", [(1, 1.15), (64, 7.67), (256, 9.10), (512, 11.0)])
def test_the_floor_of_v2_lite_is_what_was_reckoned_by_hand(batch, milliseconds):
    """1024-token prompts in bfloat16 on an H200 at 4.3 TB/s, all 64 experts used where many tokens are."""
    cfg = config.v2_lite()
    weights = Stored(model.abstract(cfg, jnp.bfloat16), "bfloat16").weights
    distinct = 64 * (1 - (1 - 6 / 64) ** batch)
    floor = roofline.decode_floor(cfg, weights, batch, 1024, distinct, 31104, 1, roofline.GPUS["h200"])
    assert floor.bandwidth * 1e3 == pytest.approx(milliseconds, rel=0.02)
    assert floor.joint >= floor.bandwidth


def test_loads_are_read_or_refused():
    assert parse_load("64x1024x256") == Load(64, 1024, 256)
    for text in ("64x1024", "0x1x1", "axbxc", "1x2x3x4", ""):
        with pytest.raises(InputError, match="expected BATCHxPROMPTxNEW"):
            parse_load(text)
