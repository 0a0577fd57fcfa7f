import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv2_jax import model
from dsv2_jax.config import tiny
from dsv2_jax.convert import convert, open_checkpoint
from dsv2_jax.fields import InputError
from dsv2_jax.projections import quantised
from dsv2_jax.weights import NativeWeights, load, main_dtype, write_native
from sharding.mesh import make_mesh

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
SHAPES = {
    "embed": ((16, 8), BF16),
    "moe.attn_norm": ((3, 8), F32),
    "moe.attn.w_uk": ((3, 6, 2, 4), BF16),
    "moe.ffn.experts.w_up": ((3, 4, 8, 6), BF16),
}


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {path: np.frombuffer(rng.bytes(int(np.prod(s)) * d.itemsize), d).reshape(s) for path, (s, d) in SHAPES.items()}


@pytest.fixture
def native(tmp_path):
    """A native directory of SHAPES, random bits."""
    held = arrays()
    source = SimpleNamespace(
        config=tiny(), dtype="bfloat16", directory=tmp_path, shapes=SHAPES, read=lambda path, index=(): held[path][index]
    )
    sizes = []
    write_native(source, tmp_path, sizes.append)
    assert sum(sizes) == sum(array.nbytes for array in held.values())
    return tmp_path


def abstract(dtype=None, **sharding):
    """The pytree of SHAPES, nested, with jax arrays' shapes and shardings by parameter name."""
    tree = {"moe": {"attn": {}, "ffn": {"experts": {}}}}
    for path, (shape, own) in SHAPES.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        node[name] = jax.ShapeDtypeStruct(shape, dtype or own, sharding=sharding.get(name))
    return tree


def test_a_native_directory_gives_back_what_was_written(native):
    weights = NativeWeights(native)
    assert weights.config == tiny() and weights.dtype == "bfloat16" and weights.hf_dtypes == {} and weights.directory == native
    assert weights.shapes == SHAPES
    for path, array in arrays().items():
        assert weights.read(path).tobytes() == array.tobytes()
        assert weights.read(path, (1, slice(2, 6, 2))).tobytes() == array[1, 2:6:2].tobytes()


@pytest.mark.parametrize("dtype", [None, np.float32])
def test_load_on_one_device(native, dtype):
    loaded = load(NativeWeights(native), abstract(dtype))
    for path, got in (("embed", loaded["embed"]), ("moe.ffn.experts.w_up", loaded["moe"]["ffn"]["experts"]["w_up"])):
        expected = arrays()[path]
        assert isinstance(got, jax.Array) and got.dtype == (dtype or expected.dtype)
        if dtype is None:
            assert np.asarray(got).tobytes() == expected.tobytes()
        else:
            np.testing.assert_array_equal(np.asarray(got), expected.astype(dtype))


def test_each_device_reads_only_its_part(native):
    """Experts over 4 devices and over 2 with copies: the right values, and no read beyond a device's slice."""
    mesh = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Explicit,) * 2)
    weights = NativeWeights(native)
    reads = []

    def read(path, index=()):
        part = weights.read(path, index)
        reads.append((path, part.size))
        return part

    counted = SimpleNamespace(directory=native, shapes=weights.shapes, read=read)
    shardings = {"w_up": NamedSharding(mesh, P(None, "expert")), "embed": NamedSharding(mesh, P("data", None))}
    loaded = load(counted, abstract(**shardings))
    got = loaded["moe"]["ffn"]["experts"]["w_up"]
    assert got.sharding == shardings["w_up"]
    assert np.asarray(got).tobytes() == arrays()["moe.ffn.experts.w_up"].tobytes()
    assert np.asarray(loaded["embed"]).tobytes() == arrays()["embed"].tobytes()
    total = {path: sum(size for p, size in reads if p == path) for path in SHAPES}
    assert total == {path: np.prod(shape) for path, (shape, _) in SHAPES.items()}  # copies read once
    assert max(size for path, size in reads if path.endswith("w_up")) == 8 * 6  # one layer's one expert: a quarter of a layer


def test_load_places_on_the_current_mesh(native):
    """`eval_shape` under a mesh knows the mesh's axes only."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        embed = jax.eval_shape(lambda: jax.sharding.reshard(jax.numpy.zeros((16, 8), BF16), P("data")))
        loaded = load(NativeWeights(native), abstract() | {"embed": embed})
    assert loaded["embed"].sharding == NamedSharding(mesh, P("data", None))
    assert np.asarray(loaded["embed"]).tobytes() == arrays()["embed"].tobytes()


def test_load_lists_everything_that_does_not_match(native):
    model = abstract()
    model["moe"]["attn"]["w_uv"] = model["moe"]["attn"].pop("w_uk")
    model["embed"] = jax.ShapeDtypeStruct((8, 16), BF16)
    with pytest.raises(InputError) as error:
        load(NativeWeights(native), model)
    expected = "missing: moe.attn.w_uv; unexpected: moe.attn.w_uk; wrong shape: embed is [16, 8], expected [8, 16]"
    assert str(error.value).endswith(expected) and str(native) in str(error.value)


def test_names_come_from_nnx_modules(native):
    from flax import nnx

    class Node(nnx.Module):
        def __init__(self, **children):
            for name, child in children.items():
                setattr(self, name, child)

    def model():
        param = {path: nnx.Param(jax.numpy.zeros(shape, dtype)) for path, (shape, dtype) in SHAPES.items()}
        moe = Node(
            attn_norm=param["moe.attn_norm"],
            attn=Node(w_uk=param["moe.attn.w_uk"]),
            ffn=Node(experts=Node(w_up=param["moe.ffn.experts.w_up"])),
        )
        return Node(embed=param["embed"], moe=moe)

    loaded = load(NativeWeights(native), jax.eval_shape(model))
    assert isinstance(loaded, Node)
    assert np.asarray(loaded.moe.attn.w_uk[...]).tobytes() == arrays()["moe.attn.w_uk"].tobytes()


def manifest(directory, **values):
    file = directory / "native.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


BAD = {
    "format": (lambda d: manifest(d, format=1), "native.json: format is 1, this program reads 2"),
    "config": (lambda d: manifest(d, config=3), "native.json: config is 3, expected an object"),
    "field": (lambda d: manifest(d, config=tiny().to_hf("float32") | {"hidden_size": -1}), "hidden_size is -1"),
    "dtypes": (lambda d: manifest(d, hf_dtypes={"x": "int8"}), "hf_dtypes holds other than"),
    "dtypes list": (lambda d: manifest(d, hf_dtypes={"x": []}), "hf_dtypes holds other than"),
    "path": (lambda d: manifest(d, parameters={"../x": {}}), "'../x.safetensors' is not a plain file name"),
    "stated": (lambda d: manifest(d, parameters={"embed": 3}), "embed.safetensors: holds"),
    "text": (lambda d: (d / "native.json").write_text("{"), "native.json: not valid JSON"),
    "absent": (lambda d: (d / "embed.safetensors").unlink(), "embed.safetensors: no such file"),
    "exchanged": (
        lambda d: shutil.copy(d / "embed.safetensors", d / "moe.attn.w_uk.safetensors"),
        "w_uk.safetensors: holds {'embed'",
    ),
    "truncated": (lambda d: (d / "embed.safetensors").write_bytes((d / "embed.safetensors").read_bytes()[:-1]), "truncated?"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_native_directory_is_named(native, case):
    spoil, message = BAD[case]
    spoil(native)
    with pytest.raises(InputError) as error:
        NativeWeights(native)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_main_dtype_counts_elements():
    assert main_dtype({"a": ((2, 3), F32), "b": ((7,), BF16)}) == "bfloat16"
    assert main_dtype({"a": ((2, 3), F32), "b": ((5,), BF16)}) == "float32"


# -- 8 bits

SMALL = dataclasses.replace(tiny(), num_hidden_layers=3, vocab_size=64, n_routed_experts=8, num_experts_per_tok=2)
# Parts of one Hugging Face tensor are whole blocks, as in the published models.
EVEN = dataclasses.replace(
    SMALL, kv_lora_rank=128, qk_nope_head_dim=128, v_head_dim=128, qk_rope_head_dim=64, num_attention_heads=2
)
EVEN = dataclasses.replace(EVEN, hidden_size=136, intermediate_size=200)


def saved(cfg, directory):
    """A bfloat16 model, and its native directory."""
    rng = np.random.default_rng(0)
    m = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.abstract(cfg, jnp.bfloat16))
    held = {path: np.asarray(leaf) for path, leaf in model.parameters(m).items()}
    directory.mkdir()
    shapes = {path: (array.shape, array.dtype) for path, array in held.items()}
    source = SimpleNamespace(
        config=cfg, dtype="bfloat16", directory=directory, shapes=shapes, read=lambda path, index=(): held[path][index]
    )
    write_native(source, directory, lambda size: None)
    return m


def leaves(weights, dtype="bfloat16", fp8=True):
    return {path: np.asarray(leaf) for path, leaf in model.parameters(model.load(weights, dtype, fp8=fp8)).items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path in one:
        assert (one[path].dtype, one[path].tobytes()) == (other[path].dtype, other[path].tobytes()), path


def test_8_bits_are_the_same_from_every_checkpoint(tmp_path):
    m = saved(EVEN, tmp_path / "native")
    for kind in ("dense", "moe"):
        setattr(m, kind, jax.jit(jax.vmap(quantised))(getattr(m, kind)))
    wanted = {path: np.asarray(leaf) for path, leaf in model.parameters(m).items()}
    assert_same(leaves(open_checkpoint(tmp_path / "native")), wanted)
    convert(tmp_path / "native", tmp_path / "hf", "hf")
    assert_same(leaves(open_checkpoint(tmp_path / "hf")), wanted)

    convert(tmp_path / "native", tmp_path / "hf8", "hf", "fp8")
    convert(tmp_path / "hf8", tmp_path / "native8", "native")
    stored = [leaves(open_checkpoint(tmp_path / name)) for name in ("hf8", "native8")]
    assert_same(*stored)
    rounded = {path for path in wanted if path.endswith(("w_kr", "w_uk", "w_uv"))}  # they lay there in 8 bits
    assert_same(*({path: x for path, x in held.items() if path not in rounded} for held in (stored[0], wanted)))
    for path in rounded:
        error = np.linalg.norm((stored[0][path] - wanted[path]).astype(np.float32)) / np.linalg.norm(
            wanted[path].astype(np.float32)
        )
        assert 0.005 < error < 0.04, path


def test_8_bits_may_be_read_as_other_floats(tmp_path):
    saved(SMALL, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf8", "hf", "fp8")
    convert(tmp_path / "hf8", tmp_path / "native8", "native")
    exact, native = (leaves(open_checkpoint(tmp_path / name), "float32", fp8=False) for name in ("hf8", "native8"))
    assert_same(exact, native)
    rounded = leaves(open_checkpoint(tmp_path / "hf8"), fp8=False)
    assert_same(rounded, {path: array.astype(BF16) for path, array in exact.items()})
    with jax.set_mesh(make_mesh(2, 4)):
        weights, cut = open_checkpoint(tmp_path / "hf8"), P(None, "expert", ("data",), None)
        shape = weights.shapes["moe.ffn.experts.w_up"][0]
        leaf = jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(jax.sharding.get_mesh(), cut))
        narrowed = SimpleNamespace(
            directory=weights.directory,
            read=weights.read,
            shapes={p: s for p, s in weights.shapes.items() if ".w_up" in p and "experts" in p},
        )
        (got,) = jax.tree.leaves(load(narrowed, {"moe": {"ffn": {"experts": {"w_up": leaf}}}}))
        assert np.asarray(got).tobytes() == exact["moe.ffn.experts.w_up"].tobytes()


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
def test_each_device_reads_the_8_bits_of_its_own_experts(tmp_path, stored):
    saved(SMALL, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "hf", "hf", stored)
    weights = open_checkpoint(tmp_path / "hf")
    wanted, reads = leaves(weights), []

    def read(path, index=()):
        part = weights.read(path, index)
        reads.append((path, part.size))
        return part

    counted = SimpleNamespace(config=weights.config, directory=weights.directory, shapes=weights.shapes, read=read)
    with jax.set_mesh(make_mesh(2, 4)):
        loaded = model.load(counted, "bfloat16", fp8=True)
    assert_same({path: np.asarray(leaf) for path, leaf in model.parameters(loaded).items()}, wanted)
    for path, (shape, _) in weights.shapes.items():
        sizes = [size for p, size in reads if p == path]
        assert sum(sizes) == np.prod(shape), path  # copies read once
        assert ".experts." not in path or max(sizes) == np.prod(shape[2:])  # a matrix at a time
    for shard in loaded.moe.ffn.experts.w_up.values.addressable_shards:
        assert shard.data.shape == (2, 2, 128, 128)


def test_blocks_that_begin_within_anothers_are_refused(tmp_path):
    saved(SMALL, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "native8", "native", "fp8")
    weights = open_checkpoint(tmp_path / "native8")
    path = "moe.ffn.experts.w_up"
    shapes = weights.shapes | {f"{path}.scales": ((2, 8, 64, 1), F32)}
    with pytest.raises(InputError, match=rf"{path} has scales \[64, 1\] a matrix, expected \[1, 1\], whole blocks of its own"):
        leaves(SimpleNamespace(config=weights.config, directory=weights.directory, shapes=shapes, read=weights.read))
    (tmp_path / "native8" / f"{path}.scales.safetensors").unlink()
    manifest(tmp_path / "native8", parameters={p: s for p, s in stated(tmp_path / "native8").items() if p != f"{path}.scales"})
    with pytest.raises(InputError, match=rf"the scales are not those of what is float8_e4m3fn; missing: {path}.scales"):
        open_checkpoint(tmp_path / "native8")


def stated(directory):
    return json.loads((directory / "native.json").read_text())["parameters"]
