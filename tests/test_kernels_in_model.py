"""On a Hopper GPU the model runs on the kernels: its programs, lowered for one, call each by name."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dsv2_jax import cache, model, steps, train_state
from dsv2_jax.config import v2_lite
from dsv2_jax.train_config import train_preset
from pallas_kernels import dispatch
from sharding import specs

KERNELS = {
    *(
        "mla_attention_forward",
        "mla_attention_dkv",
        "mla_attention_dq",
        "mla_decode",
        "absorb_queries",
        "add_parts",
        "few_tokens",
    ),
    *(
        "top_experts_mosaic_gpu",
        "expert_order_mosaic_gpu",
        "grouped_matmul_mosaic_gpu",
        "grouped_wgrad",
        "grouped_matmul_fp8",
        "quantise_rows",
    ),
}
ONE_LAYER = dataclasses.replace(v2_lite(), num_hidden_layers=1, first_k_dense_replace=0, vocab_size=256)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")


def kernels(function, *args) -> set[str]:
    text = function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return {name for name in KERNELS if name in text}


def test_training():
    config = dataclasses.replace(train_preset("v2_lite"), batch_size=1, seq_len=128, remat="elementwise")
    state, batch = train_state.abstract(ONE_LAYER, config), train_state.abstract_batch(config)
    attention = {"mla_attention_forward", "mla_attention_dkv", "mla_attention_dq"}
    experts = {"expert_order_mosaic_gpu", "grouped_matmul_mosaic_gpu", "grouped_wgrad"}  # routing is XLA's
    assert kernels(jax.jit(train_state.gradient, static_argnums=2), state, batch, config) == attention | experts


@pytest.mark.parametrize(
    "fp8, cache_dtype, experts",
    [(False, dtype, {"expert_order_mosaic_gpu", "grouped_matmul_mosaic_gpu"}) for dtype in ("bfloat16", "fp8", "int6")]
    + [(True, "bfloat16", {"expert_order_mosaic_gpu", "grouped_matmul_fp8", "quantise_rows"})],
)
def test_prefill_and_decode(fp8, cache_dtype, experts):
    decoder = model.abstract(ONE_LAYER, jnp.bfloat16, fp8)
    experts = experts | {"top_experts_mosaic_gpu"}

    def integers(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), specs.per_request_B))

    pages = jax.eval_shape(lambda: cache.empty(ONE_LAYER, 8, cache_dtype))
    if cache_dtype == "bfloat16":  # the formats' writes and reads have tests of their own
        fresh = steps.Batch(*[integers(1, 64)] * 4, None, integers(4), integers(4))
        assert kernels(steps.prefill, decoder, pages, fresh) == {"mla_attention_forward"} | experts
    if cache_dtype == "bfloat16" and not fp8:
        further = steps.Batch(*[integers(2, 64)] * 4, integers(2, 16), integers(2), integers(2))
        assert kernels(steps.prefill, decoder, pages, further) == {"mla_decode", "absorb_queries"} | experts
    attention = {"mla_decode", "absorb_queries"}
    assert kernels(steps.decode, decoder, pages, integers(64), integers(64, 2 + 16)) == attention | experts
    if cache_dtype == "bfloat16" and not fp8:  # of few requests the parts are added apart
        assert kernels(steps.decode, decoder, pages, integers(8), integers(8, 2 + 16)) == attention | {"add_parts"} | experts
