"""The training step on one GPU and several, beside Hugging Face's.

    python -m benchmarks.training [--case=...]

A slice of V2-Lite, 1 dense and 5 MoE layers at full width, 4 x 4096 tokens a GPU, float32 master weights and AdamW, nothing
dropped; on four GPUs also one MoE layer of V2, for its device-limited exchange. `forced`: every expert gets the same number of
tokens; `natural`: what the router of random weights gives it. Fails where a Pallas kernel was not used. Prints tokens/s, MFU
(README's convention), the ratio to one GPU, the time by named scope and what hides the exchange (CUDA graphs are off for it);
and the share of tokens that another mesh sends to other experts.
"""

import collections
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dsv2_jax import model, moe, train_state
from dsv2_jax.config import v2, v2_lite
from dsv2_jax.metrics import PEAK_FLOPS
from dsv2_jax.train_config import train_preset
from sharding import specs
from sharding.mesh import make_mesh

STEPS, ROWS = 7, 4
REMAT = "elementwise"  # Hugging Face's step keeps everything, and there is room
KERNELS = ("mla_attention_forward", "mla_attention_dkv", "mla_attention_dq", "grouped_matmul", "grouped_wgrad")
MODEL, SEQ_LEN = dataclasses.replace(v2_lite(), num_hidden_layers=6, initializer_range=0.006), 4096
# Each expert gets the same number of tokens if 80 divides the length.
WIDE, WIDE_SEQ_LEN = dataclasses.replace(v2(), num_hidden_layers=2, initializer_range=0.006), 4000
CASES = {  # mesh (data, expert), zero, dispatch, routing
    "1 GPU, forced": ((1, 1), 1, None, "forced"),
    "1 GPU, natural": ((1, 1), 1, None, "natural"),
    "expert=2 all_to_all, forced": ((1, 2), 1, "all_to_all", "forced"),
    "expert=2 all_gather, forced": ((1, 2), 1, "all_gather", "forced"),
    "expert=2 all_to_all, natural": ((1, 2), 1, "all_to_all", "natural"),
    "data=2 zero=1, forced": ((2, 1), 1, None, "forced"),
    "data=2 zero=3, forced": ((2, 1), 3, None, "forced"),
    "expert=4, forced": ((1, 4), 1, None, "forced"),
    "data=2,expert=2, forced": ((2, 2), 1, None, "forced"),
    "V2 expert=4 all_to_all, forced": ((1, 4), 1, "all_to_all", "forced"),
    "V2 expert=4 all_gather, forced": ((1, 4), 1, "all_gather", "forced"),
}
CASE = flags.DEFINE_multi_enum("case", [], list(CASES), "Which; default: all that the GPUs allow, one GPU first.")
PEER = flags.DEFINE_bool("peer", True, "Also Hugging Face's step, on one GPU.")
SCOPES = ("mla", "router", "dropping", "dispatch", "experts", "combine", "shared", "loss", "optimizer")
COMMUNICATION = re.compile(r"nccl|all-to-all|all-gather|reduce-scatter|all-reduce", re.IGNORECASE)


def forced_route(x_BTD, w_router_DE, cfg, slots_BT):
    """Real scores, but experts taken in turn: the same number of tokens each, on every device of the expert axis."""
    routing, t, k = (
        ROUTE(x_BTD, w_router_DE, cfg, slots_BT),
        jnp.arange(x_BTD.shape[1])[:, None],
        jnp.arange(cfg.num_experts_per_tok),
    )
    expert_TK = (t + 11 * k) % cfg.n_routed_experts
    if cfg.topk_method == "group_limited_greedy":  # two experts of each of three groups
        size = cfg.n_routed_experts // cfg.n_group
        expert_TK = (t + 3 * (k // 2)) % cfg.n_group * size + (t // cfg.n_group * 2 + k % 2) % size
    return routing._replace(experts_BTK=routing.experts_BTK * 0 + expert_TK)


ROUTE = moe.route


def measure(mesh_shape, zero, dispatch, routing, wide: bool) -> dict:
    """Seconds a step (median, least, most), and the trace of two more, by scope."""
    config, seq_len = (WIDE, WIDE_SEQ_LEN) if wide else (MODEL, SEQ_LEN)
    moe.route = forced_route if routing == "forced" else ROUTE
    jax.clear_caches()
    rows = ROWS * mesh_shape[0] * mesh_shape[1]
    fields = {"batch_size": rows, "seq_len": seq_len, "zero": zero, "dispatch": dispatch, "capacity_factor": None, "remat": REMAT}
    train = dataclasses.replace(train_preset("v2_lite"), **fields)
    with jax.set_mesh(make_mesh(*mesh_shape)):
        state = train_state.init(config, train)
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, seq_len + 1)).astype(np.int32)
        ones = np.ones((rows, seq_len), np.int32)
        host = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones, "loss_mask": ones.astype(np.float32)}
        batch = train_state.place([host | {"positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1}], 1)
        began = time.perf_counter()
        step = train_state.train_step.lower(state, batch, train).compile()
        compiled = time.perf_counter() - began
        missing = [name for name in KERNELS if name not in step.as_text()]
        assert not missing, f"the step does without {missing}"
        seconds = []
        for i in range(STEPS + 2):
            began = time.perf_counter()
            state, metrics = step(state, batch)
            loss = float(metrics["loss/lm"])
            if i >= 2:
                seconds.append(time.perf_counter() - began)
        assert np.isfinite(loss)
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory):
                for _ in range(2):
                    state, metrics = step(state, batch)
                jax.block_until_ready(state)
            scopes = by_scope(Path(directory), step.as_text(), 2)
        needs = step.memory_analysis()
        memory = (
            needs.argument_size_in_bytes + needs.output_size_in_bytes - needs.alias_size_in_bytes + needs.temp_size_in_bytes
        ) / 1e9
    per_s = rows * seq_len / statistics.median(seconds)
    mfu = per_s * config.flops_per_token(seq_len) / (PEAK_FLOPS["H200"] * rows // ROWS)
    return {"tokens_per_s": per_s, "mfu": mfu, "ms": [1e3 * f(seconds) for f in (statistics.median, min, max)]} | {
        "compiled_s": compiled,
        "scopes": scopes,
        "GB": memory,
        "max_load": float(metrics["moe/max_load"]),
        "loss": loss,
    }


def by_scope(directory: Path, hlo: str, steps: int) -> dict[str, float]:
    """Milliseconds a step of the first GPU: of its kernels by named scope, of communication, and of that what nothing hides."""
    scope_of = {}
    for name, path in re.findall(r"%([\w.\-]+) = .*?op_name=\"([^\"]*)\"", hlo):
        scope_of[name] = next((scope for scope in SCOPES if re.search(rf"\b{scope}\b", path)), "other")
    times: collections.Counter = collections.Counter()
    compute, communication = [], []
    (trace,) = directory.rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        if "GPU:0" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                span = (event.start_ns, event.start_ns + event.duration_ns)
                if COMMUNICATION.search(event.name):
                    communication.append(span)
                    times["communication"] += event.duration_ns
                else:
                    compute.append(span)
                    times[scope_of.get(str(stats.get("hlo_op")), "other")] += event.duration_ns
    times["communication not hidden"] = length(union(communication + compute)) - length(union(compute))
    times["idle"] = max((b for _, b in compute), default=0) - min((a for a, _ in compute), default=0)
    times["idle"] -= length(union(communication + compute))
    return {name: value / 1e6 / steps for name, value in times.most_common()}


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def length(spans: list[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in spans)


def exchange(devices: int) -> float:
    """GB/s that a GPU sends in one exchange of the step's size, alone."""
    with jax.set_mesh(make_mesh(1, devices)):
        shape = (devices * devices * ROWS * SEQ_LEN, MODEL.hidden_size)
        x = jnp.ones(shape, jnp.bfloat16, out_sharding=jax.P(specs.BATCH, None))
        swap = jax.jit(jax.shard_map(lambda x: jax.lax.all_to_all(x, "expert", 0, 0, tiled=True), out_specs=jax.P(specs.BATCH)))
        times = []
        for _ in range(12):
            began = time.perf_counter()
            for _ in range(10):
                y = swap(x)
            jax.block_until_ready(y)
            times.append((time.perf_counter() - began) / 10)
    return ROWS * SEQ_LEN * (devices - 1) * MODEL.hidden_size * 2 / statistics.median(times[2:]) / 1e9


def flips(mesh_shape: tuple[int, int]) -> float:
    """The share of tokens and layers whose experts differ from those on one GPU; the same weights, bfloat16."""
    moe.route = ROUTE
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (4, 1024)).astype(np.int32)
    chosen = []
    for shape in ((1, 1), mesh_shape):
        with jax.set_mesh(make_mesh(*shape)):
            decoder = model.init(MODEL, 0, jnp.bfloat16)
            run = jax.jit(lambda decoder, tokens: decoder(*model.from_zero(tokens))[2]["experts"])
            chosen.append(np.sort(jax.device_get(run(decoder, jax.device_put(tokens, specs.tokens_BT))), axis=-1))
    return float((chosen[0] != chosen[1]).any(axis=-1).mean())


PEER_CODE = f"""
import statistics, time, torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
torch.manual_seed(0)
config = DeepseekV2Config(vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
    num_hidden_layers={MODEL.num_hidden_layers}, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2, n_routed_experts=64,
    routed_scaling_factor=1.0, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128,
    topk_method="greedy", n_group=1, topk_group=1, num_experts_per_tok=6, first_k_dense_replace=1, max_position_embeddings=8192)
config._attn_implementation = "sdpa"
config._experts_implementation = "grouped_mm"
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = DeepseekV2ForCausalLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
ids = torch.randint(0, 102400, ({ROWS}, {SEQ_LEN}), device="cuda")
times = []
for i in range({STEPS + 3}):
    torch.cuda.synchronize(); began = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize(); times.append(time.perf_counter() - began)
print(statistics.median(times[3:]), min(times[3:]), max(times[3:]), torch.cuda.max_memory_allocated() / 1e9)
"""


def main(_: list[str]) -> None:
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="  # a graph's kernels bear no names
    )
    peer = None
    if PEER.value:  # first, and in a process of its own: two frameworks do not share the memory well
        done = subprocess.run([sys.executable, "-c", PEER_CODE], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"Hugging Face's step failed:\n{done.stderr[-3000:]}")
        *seconds, memory = map(float, done.stdout.split()[-4:])
        peer = ROWS * SEQ_LEN / seconds[0]
    gpus = jax.device_count()
    wanted = CASE.value or [name for name, (shape, *_) in CASES.items() if shape[0] * shape[1] <= gpus]
    results, failed = {}, False
    for name in wanted:
        try:
            results[name] = measure(*CASES[name], wide=name.startswith("V2"))
            print(name, json.dumps(results[name]), flush=True)
        except Exception as error:  # the others still count
            failed = True
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:2000]}", flush=True)
    print(
        f"\n{jax.devices()[0].device_kind}; {MODEL.num_hidden_layers} layers, {ROWS} x {SEQ_LEN} tokens a GPU, median of {STEPS} steps"
    )
    print("| step | tokens/s | MFU | ms (least, most) | GB | to Hugging Face | to one GPU |\n|---|---|---|---|---|---|---|")
    if peer:
        ms = ", ".join(f"{1e3 * s:.0f}" for s in seconds)
        mfu = peer * MODEL.flops_per_token(SEQ_LEN) / PEAK_FLOPS["H200"]
        print(f"| Hugging Face, bf16 state | {peer:,.0f} | {mfu:.1%} | {ms} | {memory:.0f} | 1 | |")
    for name, r in results.items():
        (data, expert), *_, routing = CASES[name]
        one = results.get(f"1 GPU, {routing}")
        beside = [f"{r['tokens_per_s'] / peer:.2f}" if peer and data * expert == 1 else "", ""]
        if one and data * expert > 1 and not name.startswith("V2"):
            beside[1] = f"{r['tokens_per_s'] / one['tokens_per_s']:.2f}"
        ms = ", ".join(f"{x:.0f}" for x in r["ms"])
        print(f"| {name} | {r['tokens_per_s']:,.0f} | {r['mfu']:.1%} | {ms} | {r['GB']:.0f} | {' | '.join(beside)} |")
    names = [name for name in results if results[name]["scopes"]]
    print("\n| ms a step, first GPU | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for scope in (*SCOPES, "other", "communication", "communication not hidden", "idle"):
        print(f"| {scope} | " + " | ".join(f"{results[name]['scopes'].get(scope, 0):.1f}" for name in names) + " |")
    for devices in (2, 4):
        if gpus >= devices:
            print(f"exchange among {devices}, alone: {exchange(devices):.0f} GB/s sent by each GPU")
            for shape in ((devices, 1), (1, devices)):
                print(f"tokens sent to other experts than on one GPU, data={shape[0]},expert={shape[1]}: {flips(shape):.4%}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
