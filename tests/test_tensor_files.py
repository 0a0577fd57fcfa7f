import errno
import json
import os
import random
import resource
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from dsv2_jax.fields import InputError
from dsv2_jax.tensor_files import DTYPES, copy, create_tensors, read_json, read_tensors


def tensors():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
        "scale_inv": rng.standard_normal((2, 3)).astype(np.float32),
        "q": rng.integers(0, 256, (3, 5), dtype=np.uint8).view(ml_dtypes.float8_e4m3fn),
        "h": rng.standard_normal(7).astype(np.float16),
        "n": np.array(3, np.int64),
    }


def rebuilt(blob, change=None, *, text=None, payload=None):
    """The file `blob` with another header or payload."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    if change:
        change(header)
    text = json.dumps(header).encode() if text is None else text
    return len(text).to_bytes(8, "little") + text + (blob[8 + length :] if payload is None else payload)


def test_reads_what_the_library_writes(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(save(tensors(), metadata={"format": "pt"}))
    read = read_tensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors())
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].tobytes() == tensor.tobytes()
        assert not read[name].flags.writeable and not read[name].flags.owndata


def test_the_library_reads_what_we_write(tmp_path):
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors().items()}
    with create_tensors(tmp_path / "x.safetensors", specs) as write:
        for name, tensor in tensors().items():
            write(name, tensor)
    blob = (tmp_path / "x.safetensors").read_bytes()
    read = dict(safetensors.deserialize(blob))
    for name, tensor in tensors().items():
        assert bytes(read[name]["data"]) == tensor.tobytes() and list(read[name]["shape"]) == list(tensor.shape)
    assert rebuilt(blob) and json.loads(blob[8:].split(b"}}")[0] + b"}}")["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back(tmp_path, dtype):
    bits = np.random.default_rng(1).integers(0, 2, (3, 16), dtype=np.uint8)
    with create_tensors(tmp_path / "x.safetensors", {"x": ((3, 16 // dtype.itemsize), dtype)}) as write:
        for row in (2, 0, 1):
            write("x", bits.view(dtype)[row], (row,))
    assert read_tensors(tmp_path / "x.safetensors")["x"].tobytes() == bits.tobytes()


def edit(name, **values):
    return lambda header: header[name].update(values)


BAD = {  # the change to a good file, what the message must name
    "overlap": (lambda h: h["w"].update(data_offsets=[0, 48]), "tensor 'w' starts at 0, which overlaps"),
    "hole": (lambda h: h.pop("h"), "which leaves a hole"),
    "span": (edit("w", shape=[4, 7]), "tensor 'w': 48 bytes, but BF16 [4, 7] takes 56"),
    "overflow": (edit("w", shape=[2**62, 8]), "tensor 'w'"),
    "negative": (edit("w", shape=[-4, -6]), "tensor 'w': shape is [-4, -6]"),
    "float": (edit("w", shape=[4.0, 6]), "tensor 'w': shape is [4.0, 6]"),
    "bool": (edit("w", shape=[True, 24]), "tensor 'w': shape is [True, 24]"),
    "axes": (edit("w", shape=[1] * 100), "tensor 'w': shape is"),
    "offsets": (edit("w", data_offsets=[48, 0]), "tensor 'w'"),
    "one offset": (edit("w", data_offsets=[0]), "tensor 'w': data_offsets is [0]"),
    "dtype": (edit("w", dtype="Q4"), "tensor 'w': dtype is 'Q4'"),
    "dtype list": (edit("w", dtype=["BF16"]), "tensor 'w': dtype is ['BF16']"),
    "not an entry": (lambda h: h.update(w=3), "tensor 'w': expected exactly"),
    "metadata": (lambda h: h.update(__metadata__={"a": 1}), "__metadata__"),
    "beyond the end": (edit("n", data_offsets=[8, 16]), "tensor 'n'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_names_the_tensor(tmp_path, case):
    change, message = BAD[case]
    (tmp_path / "x.safetensors").write_bytes(rebuilt(save(tensors()), change))
    with pytest.raises(InputError) as error:
        read_tensors(tmp_path / "x.safetensors")
    assert message in str(error.value) and "x.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_bad_file_is_refused(tmp_path):
    blob = save(tensors())
    deep = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    twice = rebuilt(save({"w": tensors()["w"]}))
    entry = twice[8 : 8 + int.from_bytes(twice[:8], "little")][1:-1]
    for name, content, message in (
        ("empty", b"", "0 bytes"),
        ("short", blob[:5], "5 bytes"),
        ("truncated", blob[:-1], "truncated"),
        ("longer", blob + b"x", "its header describes"),
        ("length", (2**63 - 1).to_bytes(8, "little") + blob[8:], "header of 9223372036854775807 bytes"),
        ("no length", bytes(8) + blob[8:], "header of 0 bytes"),
        ("deep", rebuilt(blob, text=deep), "not valid JSON"),
        ("list", rebuilt(blob, text=b"[1, 2]"), "does not start with"),
        ("text", rebuilt(blob, text=b'{"w": \xff}'), "not valid JSON"),
        ("nan", rebuilt(blob, text=b'{"w": NaN}'), "NaN is not an accepted number"),
        ("twice", rebuilt(twice, text=b"{" + entry + b", " + entry + b"}"), "'w' stands twice"),
        ("surrogate", rebuilt(blob, text=b'{"\\ud800": 1}'), "not valid JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_tensors(tmp_path / name)
    with pytest.raises(InputError, match="absent: no such file"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path)


def mutated(blob, rng):
    """`blob` with a few bytes of its header changed, inserted, removed or repeated, sometimes with the length put right."""
    length = int.from_bytes(blob[:8], "little")
    text = bytearray(blob[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(text))
        match rng.randrange(5):
            case 0:
                text[at] ^= 1 << rng.randrange(8)
            case 1:
                text[at] = rng.choice(b'0123456789-eE+.[]{},:"\\ntu ')
            case 2:
                text.insert(at, rng.choice(b'0123456789-eE+.[]{},:"\\ntu '))
            case 3:
                del text[at : at + rng.choice((1, 1, 2, 8))]
            case 4:
                text[at:at] = text[at : at + rng.randrange(40)]
        text = text or bytearray(b" ")
    head = (len(text) if rng.random() < 0.8 else rng.choice((length, rng.randrange(2**20)))).to_bytes(8, "little")
    payload = blob[8 + length :]
    return head + bytes(text) + (payload if rng.random() < 0.9 else payload[: rng.randrange(len(payload))])


def test_we_accept_only_what_the_library_accepts(tmp_path):
    """A few thousand mutated headers (`FUZZ_CASES` for more): never another error than InputError, never more than the library takes."""
    rng, accepted = random.Random(0), 0
    small = save({"a.weight": tensors()["w"], "b": tensors()["h"]}, metadata={"format": "pt"})
    for blob in (save(tensors()), small):
        for _ in range(int(os.environ.get("FUZZ_CASES", 4000)) // 2):
            content = mutated(blob, rng)
            (tmp_path / "x").write_bytes(content)
            try:
                ours = read_tensors(tmp_path / "x")
            except InputError as error:
                assert "\n" not in str(error)
                continue
            accepted += 1
            library = dict(safetensors.deserialize(content))
            assert set(ours) == set(library), content
            for name, tensor in ours.items():
                assert bytes(library[name]["data"]) == tensor.tobytes() and list(library[name]["shape"]) == list(tensor.shape)
    assert accepted > 20  # renamed tensors and the like: the comparison was made


def test_hostile_headers_take_little_memory(tmp_path):
    with (tmp_path / "x").open("wb") as file:  # 1 TB that is not there
        file.write((10**12 - 8).to_bytes(8, "little") + b"{")
        file.truncate(10**12)
    tracemalloc.start()
    with pytest.raises(InputError, match="header of"):
        read_tensors(tmp_path / "x")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_large_and_transposed_arrays_are_written_in_strips(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (700, 3, 2100), np.uint16).view(ml_dtypes.bfloat16)
    with create_tensors(tmp_path / "x", {"x": (array.T.shape, array.dtype), "y": ((2, *array.shape), array.dtype)}) as write:
        write("y", array[::-1], (1,))
        write("x", array.T)
        with pytest.raises(ValueError, match=r"y\[0\] is bfloat16 \(700, 3, 2100\), not float32"):
            write("y", array.astype(np.float32), (0,))
    read = read_tensors(tmp_path / "x")
    assert read["x"].tobytes() == array.T.tobytes()
    assert read["y"][1].tobytes() == array[::-1].tobytes() and not read["y"][0].view(np.uint16).any()


def test_a_write_that_fails_names_the_file(tmp_path):
    """As on a full disk: here the kernel refuses to let a file grow."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        specs = {"x": ((100, 1000), DTYPES["F32"])}
        with pytest.raises(OSError, match=r"x\.safetensors") as error, create_tensors(tmp_path / "x.safetensors", specs) as write:
            write("x", np.ones((100, 1000), np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 7), (300, 1), (257, 513), (3, 300, 270), (2, 5, 1, 260)])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_copy_equals_assignment_for_every_order_of_axes(shape, dtype):
    rng = np.random.default_rng(0)
    source = rng.integers(0, 2**16, shape, dtype=np.uint16).view(ml_dtypes.bfloat16)  # any bits, NaN payloads too
    if dtype is np.float32:
        source = np.nan_to_num(source.astype(np.float32)).astype(ml_dtypes.bfloat16)
    for _ in range(4):
        order = rng.permutation(len(shape))
        target = np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order)).reshape(shape, copy=False)
        copy(target, source)
        if dtype is np.float32:
            np.testing.assert_array_equal(target, source.astype(np.float32))
        else:
            assert target.tobytes() == source.tobytes()
