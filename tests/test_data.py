"""Training data: nothing lost in packing, the same batches however they are reached, and bad input named."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dsv2_jax import data as data_lib
from dsv2_jax.data import Documents, find, make_dataset, sample, standard_library
from dsv2_jax.fields import InputError
from dsv2_jax.tokenizer import SMALLEST_VOCABULARY, train

T = 16
# Bytes of each document. With a token a byte, BOS and EOS, a document of n bytes has n + 1 inputs: 15 and 31 end with a row.
LENGTHS = [15, 15, 3, 0, 40, 7, 31, 1, 100, 16, 14, 64]


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    monkeypatch.setattr(data_lib, "SHUFFLED_ROWS", 8)


@pytest.fixture(scope="module")
def tokenizer():
    return train([], SMALLEST_VOCABULARY)


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    return ["".join(generator.choice(list("abc \n"), n)) for n in LENGTHS]


@pytest.fixture
def files(tmp_path, texts):
    """The documents as text files, and as one .jsonl."""
    (tmp_path / "txt").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "txt" / f"{index:02}.txt").write_text(text)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text, "source": "x"}) + "\n" for text in texts))
    return tmp_path


def batches(files, tokenizer, pattern="all.jsonl", **options):
    options = {"batch_size": 4, "seq_len": T, "seed": 0} | options
    data = [str(files / each) for each in pattern.split(",")]
    return make_dataset(data, tokenizer, **options)


def take(dataset, count):
    return [next(dataset) for _ in range(count)]


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def documents_of(batches_, bos):
    """The documents' token ids, put together again from the segments of consecutive rows."""
    found = []
    for batch in batches_:
        for row in range(len(batch["tokens"])):
            tokens, targets, segments = (batch[name][row] for name in ("tokens", "targets", "segment_ids"))
            for segment in range(1, segments.max(initial=0) + 1):
                inside = segments == segment
                if tokens[inside][0] == bos:
                    found.append([bos])
                assert found[-1][-1] == tokens[inside][0]  # a row continues exactly where the last one ended
                np.testing.assert_array_equal(tokens[inside][1:], targets[inside][:-1])
                found[-1] += targets[inside].tolist()
    return found


def expected_documents(tokenizer, texts):
    return [[tokenizer.bos_id, *tokenizer.encode(text, bos=False), tokenizer.eos_id] for text in texts]


# -- packing


@pytest.mark.parametrize("pattern", ["all.jsonl", "txt/*.txt", "**/*.txt"])
def test_one_pass_holds_every_token_once_in_order(files, tokenizer, texts, pattern):
    one_pass = list(batches(files, tokenizer, pattern, repeat=False))
    assert documents_of(one_pass, tokenizer.bos_id) == expected_documents(tokenizer, texts)
    assert sum(batch["loss_mask"].sum() for batch in one_pass) == sum(n + 1 for n in LENGTHS)


def test_shapes_positions_segments_and_padding(files, tokenizer):
    one_pass = list(batches(files, tokenizer, batch_size=8, repeat=False))
    for batch in one_pass:
        assert {name: (value.shape, value.dtype.name) for name, value in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), ((8, T), "int32")),
            "loss_mask": ((8, T), "float32"),
        }
    rows = {name: np.concatenate([batch[name] for batch in one_pass]) for name in one_pass[0]}
    for tokens, positions, segments, mask in zip(*(rows[n] for n in ("tokens", "positions", "segment_ids", "loss_mask"))):
        np.testing.assert_array_equal(mask, segments > 0)
        used = int((segments > 0).sum())
        assert (segments[used:] == 0).all() and (tokens[used:] == 0).all() and (positions[used:] == 0).all()
        starts = np.flatnonzero(np.diff(segments[:used], prepend=0))
        np.testing.assert_array_equal(segments[starts], 1 + np.arange(len(starts)))  # 1, 2, ... in each row
        expected = np.arange(used) - starts[segments[:used] - 1] if used else []
        np.testing.assert_array_equal(positions[:used], expected)
    total = sum(n + 1 for n in LENGTHS)
    filled = (rows["segment_ids"] > 0).sum(axis=1)
    assert list(filled[: total // T]) == [T] * (total // T) and filled.sum() == total  # padding is at the end alone
    assert tokenizer.eos_id not in rows["tokens"] and tokenizer.bos_id not in rows["targets"][rows["loss_mask"] > 0]


def test_each_epoch_is_a_new_order_of_all_documents(files, tokenizer, texts, monkeypatch):
    monkeypatch.setattr(data_lib, "SHUFFLED_ROWS", 1)  # documents are put together again from consecutive rows
    rows_per_epoch = sum(n + 1 for n in LENGTHS) / T
    found = documents_of(take(batches(files, tokenizer), int(3 * rows_per_epoch / 4) + 1), tokenizer.bos_id)
    expected = expected_documents(tokenizer, texts)
    n = len(texts)
    epochs = [found[:n], found[n : 2 * n]]
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected) and epoch != expected
    assert epochs[0] != epochs[1]
    other = documents_of(take(batches(files, tokenizer, seed=1), int(rows_per_epoch / 4) + 2), tokenizer.bos_id)[:n]
    assert sorted(other) == sorted(expected) and other not in epochs  # also not the second epoch of seed 0


def test_a_long_text_file_is_read_in_pieces(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(data_lib, "PIECE_BYTES", 50)
    text = "".join(f"line {i} größer 😀\n" for i in range(40)) + "no line end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("short")
    documents = Documents([tmp_path / "a.txt", tmp_path / "b.txt"])
    pieces = [documents[i] for i in range(len(documents))]
    assert len(pieces) > 10 and "".join(piece for piece, _, _ in pieces) == text + "short"
    assert [begins for _, begins, _ in pieces] == [True] + [False] * (len(pieces) - 2) + [True]
    assert [ends for _, _, ends in pieces] == [False] * (len(pieces) - 2) + [True, True]
    tokens = np.concatenate([b["tokens"][b["loss_mask"] > 0] for b in batches(tmp_path, tokenizer, "*.txt", repeat=False)])
    assert Counter(tokens.tolist())[tokenizer.bos_id] == 2


# -- the position


@pytest.mark.parametrize("pattern", ["all.jsonl", "txt/*.txt", "all.jsonl:0.7,txt/0[4-9].txt:0.3"])
def test_restored_anywhere_equals_uninterrupted(files, tokenizer, pattern):
    """At every position of more than two epochs, mid-document and on every row end; the state passes through JSON."""
    count = 3 * sum(n + 1 for n in LENGTHS) // T // 4
    dataset = batches(files, tokenizer, pattern)
    states, wanted = [json.dumps(dataset.get_state())], []
    for _ in range(count):
        wanted.append(next(dataset))
        states.append(json.dumps(dataset.get_state()))
    assert max(map(len, states)) < 1500
    reused = batches(files, tokenizer, pattern)
    for position, state in enumerate(states):
        reused.set_state(json.loads(state))
        assert json.dumps(reused.get_state()) == state
        assert_same(take(reused, min(5, count - position)), wanted[position : position + 5])
    for position in range(0, count, 5):
        fresh = batches(files, tokenizer, pattern)
        fresh.set_state(json.loads(states[position]))
        assert_same(take(fresh, count - position), wanted[position:])


def test_restored_in_one_pass(files, tokenizer):
    wanted = list(batches(files, tokenizer, repeat=False))
    dataset = batches(files, tokenizer, repeat=False)
    for position in range(len(wanted)):
        other = batches(files, tokenizer, repeat=False)
        other.set_state(dataset.get_state())
        assert_same(list(other), wanted[position:])
        next(dataset)
    with pytest.raises(StopIteration):
        next(dataset)


def test_the_global_batches_are_the_same_for_any_number_of_processes(files, tokenizer):
    wanted = take(batches(files, tokenizer, batch_size=8), 10)
    start = batches(files, tokenizer, batch_size=8)
    take(start, 4)
    for count in (1, 2, 4):
        parts = [batches(files, tokenizer, batch_size=8, process_index=i, process_count=count) for i in range(count)]
        for begin in (0, 4):
            if begin:  # a state of one process goes to any number
                for part in parts:
                    part.set_state(start.get_state())
            taken = [take(part, 6) for part in parts]
            whole = [{name: np.concatenate([b[name] for b in step]) for name in step[0]} for step in zip(*taken)]
            assert_same(whole, wanted[begin : begin + 6])
            assert all(part.get_state() == parts[0].get_state() for part in parts)
    last = [list(batches(files, tokenizer, batch_size=8, repeat=False, process_index=i, process_count=4)) for i in range(4)]
    assert len({len(part) for part in last}) == 1  # every process takes part in the last, padded batch


def test_the_position_counts_rows_so_the_batch_size_may_change(files, tokenizer):
    dataset, larger = batches(files, tokenizer, batch_size=2), batches(files, tokenizer, batch_size=4)
    take(dataset, 7)
    larger.set_state(dataset.get_state())
    np.testing.assert_array_equal(next(larger)["tokens"], np.concatenate([batch["tokens"] for batch in take(dataset, 2)]))


def test_another_run_gives_the_same_batches(files, tokenizer):
    code = (
        "import sys, hashlib; from dsv2_jax import data, tokenizer\n"
        f"t = tokenizer.train([], {SMALLEST_VOCABULARY})\n"
        "d = data.make_dataset(sys.argv[1:], t, batch_size=4, seq_len=16, seed=3)\n"
        "print(hashlib.sha256(b''.join(next(d)['tokens'].tobytes() for _ in range(50))).hexdigest())"
    )
    command = [sys.executable, "-c", code, f"{files}/all.jsonl:2", f"{files}/txt/*.txt:1"]
    root = Path(__file__).parents[1]
    runs = [subprocess.run(command, cwd=root, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != "" and runs[0].stderr == ""  # grain's threads end quietly


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, r"seed \(0 there, 1 here\)"),
        ({"seq_len": 32}, r"seq_len \(16 there, 32 here\)"),
        ({"pattern": "txt/*.txt"}, "data"),
        ({"pattern": "all.jsonl:1"}, "weights"),
        ({"tokenizer": train(["aaaa bbbb"] * 9, 270)}, "tokenizer"),
    ],
)
def test_the_position_of_something_else_is_refused(files, tokenizer, change, named):
    state = batches(files, tokenizer).get_state()
    with pytest.raises(InputError, match=named):
        batches(files, **{"tokenizer": tokenizer} | change).set_state(state)


def test_the_content_counts_and_the_names_do_not(files, tokenizer):
    state = batches(files, tokenizer, "txt/*.txt").get_state()
    (files / "txt").rename(files / "moved")
    batches(files, tokenizer, "moved/*.txt").set_state(state)
    path = files / "moved" / "04.txt"
    path.write_text(path.read_text()[:-1] + "X")  # the size stays
    with pytest.raises(InputError, match="data"):
        batches(files, tokenizer, "moved/*.txt").set_state(state)


# -- what is read


def test_weights_are_shares_of_rows(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 500)
    (tmp_path / "b.jsonl").write_text('{"text": "bb"}\n' * 500)
    mixed = take(batches(tmp_path, tokenizer, "a.txt:0.3,b.jsonl:0.9"), 250)
    (id_a,) = tokenizer.encode("a", bos=False)
    share = np.mean([(row == id_a).any() for batch in mixed for row in batch["tokens"]])
    assert abs(share - 0.25) < 0.01
    assert_same(mixed[:20], take(batches(tmp_path, tokenizer, "a.txt:0.3,b.jsonl:0.9"), 20))
    with pytest.raises(InputError, match="weights have no meaning"):
        batches(tmp_path, tokenizer, "a.txt:0.3,b.jsonl:0.9", repeat=False)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("all.jsonl:zero", "weight 'zero': expected a number above 0"),
        ("all.jsonl:", "weight '': expected"),
        ("all.jsonl:-1", "weight '-1'"),
        ("all.jsonl:0", "weight '0'"),
        ("all.jsonl:nan", "weight 'nan'"),
        ("all.jsonl:inf", "weight 'inf'"),
        ("all.jsonl:1,txt/*.txt", r"txt/\*.txt': no weight; give every item one"),
        ("none.txt", "none.txt': matches no file"),
        ("**/*.md", r"\*\*/\*.md': matches no file"),
        ("txt", "a directory; name its files"),
    ],
)
def test_bad_items_are_named(files, tokenizer, item, message):
    with pytest.raises(InputError, match=message):
        batches(files, tokenizer, item)


def test_a_colon_may_be_part_of_a_name(files, tokenizer):
    (files / "a:1").write_text("abc")
    (documents, weight), *rest = find([str(files / "a:1")])
    assert documents[0] == ("abc", True, True) and weight is None and not rest


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"", "empty line"),
        (b"  ", "empty line"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", 'expected an object with a string "text"'),
        (b'"text"', 'expected an object with a string "text"'),
        (b'{"txt": "a"}', 'expected an object with a string "text"'),
        (b'{"text": 1}', 'expected an object with a string "text"'),
        (b'{"text": "\\ud800"}', "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 2 + line + b'\n{"text": "b"}\n')
    with pytest.raises(InputError, match=rf"x\.jsonl:3: {message}"):
        Documents([path])


def test_text_that_is_not_utf8_is_named_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data_lib, "PIECE_BYTES", 10)
    (tmp_path / "x.txt").write_bytes(b"fine\n" * 10 + b"good\nbad \xff\n")
    with pytest.raises(InputError, match=r"x\.txt:12: not UTF-8 text"):
        Documents([tmp_path / "x.txt"])


def test_no_documents(tmp_path, tokenizer):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(InputError, match="no documents"):
        batches(tmp_path, tokenizer, "x.jsonl")
    (tmp_path / "last.jsonl").write_text('{"text": "a"}\n{"text": "b"}')  # the last line may lack its end
    assert [text for text, _, _ in Documents([tmp_path / "last.jsonl"])] == ["a", "b"]


def test_what_a_batch_needs(files, tokenizer):
    with pytest.raises(InputError, match="batch_size=6: expected a multiple of the number of processes, 4"):
        batches(files, tokenizer, batch_size=6, process_count=4)
    with pytest.raises(InputError, match="seed=-1"):
        batches(files, tokenizer, seed=-1)


def test_the_default_is_the_standard_library():
    paths = standard_library()
    names = [path.name for path in paths]
    assert "argparse.py" in names and "dataclasses.py" in names
    assert not {"site-packages", "test", "idle_test", "__pycache__"} & {part for path in paths for part in path.parts}
    assert paths == standard_library()
    ((documents, weight),) = find(None)
    assert weight is None and len(documents) >= len(paths) and documents.size > 3_000_000


def test_a_sample_is_spread_over_the_documents(files, texts):
    data = [str(files / "all.jsonl")]
    assert list(sample(data)) == texts
    size = (files / "all.jsonl").stat().st_size
    assert list(sample(data, most_bytes=size - 1)) == texts[::2]
