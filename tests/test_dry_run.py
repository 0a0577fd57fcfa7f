"""The dry run: what is read off a compiled program, what is predicted from the configuration, and that the two agree."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from training_cases import MODEL, TRAIN

from dsv2_jax import dry_run, train_state
from dsv2_jax.collectives import first_group, parse_collectives
from dsv2_jax.config import preset
from dsv2_jax.fields import InputError
from dsv2_jax.roofline import GPUS, counts, predict, resident, wire_bytes
from dsv2_jax.train_config import train_preset
from sharding.mesh import make_mesh

H200 = GPUS["h200"]


def sent_by_kind(found, certain=True):
    sums = collections.Counter()
    for one in found:
        if one.certain == certain:
            sums[one.kind, one.group] += one.sent
    return sums


def test_collectives_of_a_program_written_by_hand():
    """In a scan of 5 inside a loop of unknown length: 5 x 3 times with 3 microbatches; a further loop's once for each of them."""

    def step(x_NF, count, more):
        def body(x_NF, _):
            rows_NF = lax.all_to_all(x_NF, "expert", 0, 0, tiled=True)
            whole_MF = lax.all_gather(rows_NF * 2, "expert", tiled=True)
            x_NF = jnp.sin(lax.psum_scatter(whole_MF, "expert", tiled=True)) + lax.psum(x_NF, "data").sum()
            return lax.fori_loop(0, more, lambda _, x: jnp.cos(lax.all_to_all(x, "expert", 0, 0, tiled=True)), x_NF), None

        return lax.fori_loop(0, count, lambda _, x: lax.scan(body, x, None, length=5)[0], x_NF)

    mesh = make_mesh(data=2, expert=4)
    with jax.set_mesh(mesh):
        island = jax.shard_map(step, in_specs=(P(("data", "expert"), None), P(), P()), out_specs=P(("data", "expert"), None))
        x_NF = jax.device_put(jnp.ones((64, 32)), jax.NamedSharding(mesh, P(("data", "expert"), None)))
        hlo = jax.jit(island).lower(x_NF, 2, 1).compile().as_text()
    local, row, column = 8 * 32 * 4, (0, 1, 2, 3), (0, 4)
    assert sent_by_kind(parse_collectives(hlo, microbatches=3)) == {
        ("all-to-all", row): 15 * local * 3 / 4,
        ("all-gather", row): 15 * local * 3,
        ("reduce-scatter", row): 15 * local * 3,
        ("all-reduce", column): 15 * local * 2 / 2,
    }
    assert sent_by_kind(parse_collectives(hlo, microbatches=3), certain=False) == {("all-to-all", row): 15 * local * 3 / 4}
    assert not sent_by_kind(parse_collectives(hlo))  # then nothing says how long the outer loop is


GPU_HLO = """HloModule step, is_scheduled=true, num_partitions=4

%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %s = bf16[] add(%a, %b)
}

%wrapped (p: bf16[2,8]) -> bf16[2,8] {
  ROOT %x = bf16[2,8]{1,0} all-to-all(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
}

%then (p: f32[4]) -> f32[4] {
  ROOT %permute = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (p: bf16[2,8]) -> bf16[2,8] {
  %gather-start = ((bf16[2]{0}, bf16[3]{0:S(1)}), (bf16[8]{0}, /*index=1*/bf16[12]{0})) all-gather-start(%p, %q), replica_groups=mesh['data'=2,'expert'=2] {'data','expert'}, dimensions={0}
  %single = (bf16[2]{0}, bf16[8]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %gather-done = (bf16[8]{0}, bf16[12]{0}) all-gather-done(%gather-start), metadata={op_name="all-gather(no)"}
  %async-start = ((bf16[2,8]), bf16[2,8], u32[]) async-start(%p), calls=%wrapped
  %async-done = bf16[2,8] async-done(%async-start), calls=%wrapped
  %scatter = f32[5]{0} reduce-scatter(%p), replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}, to_apply=%add
  %all = pred[6] all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %c = f32[4] conditional(%p, %p), branch_computations={%then, %then}
}
"""


def test_a_gpus_notation_is_read():
    found = [(one.kind, one.group, one.payload, one.sent) for one in parse_collectives(GPU_HLO)]
    assert found == [
        ("all-gather", (0, 1, 2, 3), 40, 30),
        ("all-gather", (0, 1, 2, 3), 16, 12),
        ("all-to-all", (0, 1), 32, 16),
        ("reduce-scatter", (0, 2), 40, 20),
        ("all-reduce", (0, 1, 2, 3), 6, 9),
        ("collective-permute", (0, 1, 2, 3), 16, 16),
        ("collective-permute", (0, 1, 2, 3), 16, 16),
    ]


@pytest.mark.parametrize(
    "text, group",
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[4,2]<=[8]", (0, 1)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['data'=2,'expert'=4] {'data'}", (0, 4)),
        ("mesh['axis_0'=8] {'axis_0':(2)2}", (0, 2)),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", (0, 4)),
    ],
)
def test_replica_groups(text, group):
    assert first_group(text) == group


# Two layers of each kind, so that they stay in loops; wide, so that weights outweigh statistics.
WIDE = dataclasses.replace(MODEL, num_hidden_layers=4, first_k_dense_replace=2, hidden_size=4096, intermediate_size=8192)
SHARDED = dataclasses.replace(TRAIN, batch_size=8, zero=3, dispatch="all_to_all", remat="full", capacity_factor=None)


def test_predicted_bytes_are_the_compiled_programs():
    """A sum over devices is an all-reduce on a CPU, which sends twice what a scatter does. Losses are summed besides."""
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        state, batch = train_state.abstract(WIDE, SHARDED), train_state.abstract_batch(SHARDED)
        hlo = train_state.train_step.lower(state, batch, SHARDED).compile().as_text()
    sent = collections.Counter()
    for one in parse_collectives(hlo):
        sent[one.kind] += one.sent
    wire = wire_bytes(WIDE, SHARDED, data=2, expert=4)
    assert sent["all-to-all"] == wire.rows
    assert sent["all-gather"] == pytest.approx(wire.gather + wire.gather_experts, rel=1e-4)
    assert sent["all-reduce"] / 2 == pytest.approx(wire.scatter + wire.scatter_experts, rel=1e-4)


def test_the_report_says_what_was_compiled_and_writes_it(tmp_path, capsys):
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        dry_run.report(WIDE, SHARDED, "h200", tmp_path / "run")
        weights = dry_run.bytes_at_rest(train_state.abstract(WIDE, SHARDED).params)
    written = (tmp_path / "run" / dry_run.FILE).read_text()
    assert capsys.readouterr().out.strip() == written.strip()
    for told in [
        f"{WIDE.num_params:,} parameters",
        "bytes are approximate",
        "| all-to-all | 4 on 1 host |",
        f"{weights / 2**30:.2f}",
    ]:
        assert told in written
    assert all(f"| {gpus} (data=" in written for gpus in dry_run.PLANNED)


def test_bytes_at_rest_are_those_of_the_arrays():
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        abstract = train_state.abstract(MODEL, TRAIN)
        arrays = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), abstract)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arrays))
    assert dry_run.bytes_at_rest(abstract) == held < sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) / 4


V2 = dry_run.full_batch(dataclasses.replace(train_preset("v2"), zero=3), 64)


@pytest.mark.parametrize(
    "field, part",
    [("matmul", "compute"), ("exchange", "exchange"), ("network", "zero"), ("gather", "zero"), ("copy", "optimizer")],
)
def test_twice_the_speed_is_half_the_time(field, part):
    """The network is a part of ZeRO's time, where hosts are joined; NVLink all of it where there is one."""
    hosts = 1 if field == "gather" else 8
    before = predict(preset("v2"), V2, hosts, 8, H200._replace(scatter=1e30))
    after = predict(preset("v2"), V2, hosts, 8, H200._replace(scatter=1e30, **{field: 2 * getattr(H200, field)}))
    assert 0.5 <= getattr(after, part) / getattr(before, part) < 0.56
    assert all(getattr(after, name) == getattr(before, name) for name in before._fields if name != part)


def test_a_prediction_by_hand():
    """Of V2 on 64 GPUs: experts of 222.7e9 parameters, an eighth on each GPU, gathered twice and scattered once over 8 hosts."""
    wire, step = wire_bytes(preset("v2"), V2, 8, 8), predict(preset("v2"), V2, 8, 8, H200)
    assert wire.gather_experts == 2 * wire.scatter_experts == pytest.approx(2 * 222.7175e9 / 8 * 2 * 7 / 8, rel=1e-5)
    assert wire.rows == 59 * 7 * 1920 * (4 * 2 * 5120 + 16 * 6)  # 1.25 * 3/8 of 4096 slots
    assert step.compute == pytest.approx(9216 * 4096 / 64 * preset("v2").flops_per_token(4096) * 4 / 3 / 290e12)
    dense = (2 * 11.97531e9 + 1.04858e9) * 2 * 63 / 64 / 289e9 + (11.97531e9 + 1.04858e9) * 2 * 63 / 64 / 264e9
    assert step.zero == pytest.approx(144 * (dense + 1.5 * wire.gather_experts / 50e9), rel=1e-4)
    assert max(step) < step.overlapped < step.serial == sum(step)


def test_one_gpu_exchanges_nothing_and_more_steps_gather_less():
    one = wire_bytes(preset("v2_lite"), dry_run.full_batch(train_preset("v2_lite"), 8), 1, 1)
    assert set(one) == {0}
    assert (
        wire_bytes(preset("v2"), dataclasses.replace(V2, zero=1), 8, 8).gather_experts
        == wire_bytes(preset("v2"), V2, 8, 8).scatter_experts
    )
    everywhere = dataclasses.replace(V2, dispatch="all_gather")
    assert wire_bytes(preset("v2"), everywhere, 8, 8).rows == pytest.approx(wire_bytes(preset("v2"), V2, 8, 8).rows * 4096 / 1920)


def test_what_lies_at_rest_is_cut_over_all_devices():
    with jax.set_mesh(make_mesh(data=2, expert=4)):
        state = train_state.abstract(WIDE, SHARDED)
    at_rest = dry_run.bytes_at_rest(state) + dry_run.bytes_at_rest(state.params)
    assert resident(WIDE, SHARDED, 2, 4) == pytest.approx(at_rest, rel=0.01)
    experts, layers, _ = counts(WIDE)
    gathered = resident(WIDE, dataclasses.replace(SHARDED, zero=1), 2, 4) - resident(WIDE, SHARDED, 2, 4)
    assert gathered == 4 * (layers + experts / 4)


def test_it_fits_up_to_what_xla_may_use():
    assert dry_run.fit(H200.usable, H200).endswith(", fits")
    assert dry_run.fit(H200.usable + 1, H200).endswith("does not fit")
    fitting, too_large = (dry_run.plan(preset("v2"), V2, "h200", (8, 8), peak * 2**30) for peak in (110, 200))
    assert "| 110.0, fits |" in fitting and "| 39.2, fits |" in fitting  # 22 bytes a parameter over 1024 instead of 64
    assert "| 200.0, does not fit |" in too_large and "| over 3.4 |" in too_large


@pytest.mark.parametrize(
    "arguments, told",
    [
        ((8, "h20"), "--gpu=h20: unknown GPU, did you mean 'h200'.; known: h200, h100"),
        ((8, "h200", (4, 4)), "data=4,expert=4: 16 devices, expected the 8 of --gpus"),
        ((None, "h200"), "needs --gpus or --mesh"),
        ((None, "h200", (3, 4)), "--gpus=12"),
        ((12, "h200"), "--gpus=12: expected a multiple of 8"),
    ],
)
def test_impossible_machines_are_refused(arguments, told):
    with pytest.raises(InputError, match=told):
        dry_run.absent_mesh(*arguments)


def test_a_microbatch_that_the_devices_do_not_divide_is_refused(tmp_path):
    train = dataclasses.replace(SHARDED, micro_batch_size=4)
    with (
        jax.set_mesh(make_mesh(data=2, expert=4)),
        pytest.raises(InputError, match="micro_batch_size is 4, expected a multiple of the 8"),
    ):
        dry_run.report(WIDE, train, "h200", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mesh_of_absent_gpus():
    mesh = dry_run.absent_mesh(8, "h200")
    assert dict(mesh.shape) == {"data": 1, "expert": 8}
    assert dry_run.default_shape(1024) == (128, 8) and dry_run.default_shape(4) == (1, 4)
