"""Training data: documents found, tokenized, shuffled and packed into batches, with a position that a checkpoint can hold.

The global sequence of batches depends on the data's content, the tokenizer, the seed, the row length and the batch size alone:
every process runs the same pipeline and keeps its share of the rows. grain shuffles, packs, mixes, prefetches and counts.
"""

import array
import glob
import hashlib
import json
import math
import os
import sysconfig
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv2_jax.fields import InputError
from dsv2_jax.tokenizer import Tokenizer

PIECE_BYTES = 1 << 20  # a text file longer than this is read as consecutive pieces, so that one huge file shuffles and streams
SHUFFLED_ROWS = 1024  # rows that are mixed with one another; to restore a position they are read again
TOKENIZE_THREADS = min(8, os.cpu_count() or 1)
# Directories of the standard library that hold no prose or code worth learning from.
SKIPPED = {"__pycache__", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}

Batch = dict[str, np.ndarray]


class Documents:
    """Random access to the documents of files; every line is read once, at the start, and a bad one is an InputError.

    A `.jsonl` file holds one document a line, under "text"; any other file is one UTF-8 document. Items are `(text, begins,
    ends)`: a piece of a long text file may not begin or not end its document.

    Attributes:
        digest: of the content and order of the documents, whatever their files are called.
        size: bytes.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._first = array.array("q")  # of each file: the index of its first document
        self._starts = array.array("q")  # of each document: its first byte
        self._sizes = [path.stat().st_size for path in files]
        digest = hashlib.sha256()
        for path, size in zip(self._files, self._sizes):
            self._first.append(len(self._starts))
            digest.update(f"{path.suffix == '.jsonl'} {size} ".encode())
            with path.open("rb") as file:
                self._scan(path, file, digest.update)
        if not self._starts:
            raise InputError(f"data: {', '.join(map(str, files))}: no documents")
        self.digest = digest.hexdigest()[:16]
        self.size = sum(self._sizes)

    def _scan(self, path: Path, file: Any, update: Callable[[bytes], None]) -> None:
        """Notes where each document starts, having checked it."""
        lines = start = 0
        pieces = file if path.suffix == ".jsonl" else iter(lambda: file.read(PIECE_BYTES) + file.readline(), b"")
        for piece in pieces:
            try:
                text = piece.decode()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}:{lines + 1 + piece[: error.start].count(b'\n')}: not UTF-8 text") from None
            if path.suffix == ".jsonl":
                _json_text(text, f"{path}:{lines + 1}")
            update(piece)
            self._starts.append(start)
            start += len(piece)
            lines += piece.count(b"\n")
        if start == 0 and path.suffix != ".jsonl":
            self._starts.append(0)  # an empty file is an empty document

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[str, bool, bool]:
        number = bisect_right(self._first, index) - 1
        path, first = self._files[number], self._first[number]
        last = (self._first[number + 1] if number + 1 < len(self._first) else len(self)) - 1
        start = self._starts[index]
        stop = self._starts[index + 1] if index < last else self._sizes[number]
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(stop - start).decode()
        if path.suffix == ".jsonl":
            return _json_text(text, str(path)), True, True
        return text, index == first, index == last


def _json_text(line: str, where: str) -> str:
    """The "text" of one JSON line."""
    if not line.strip():
        raise InputError(f'{where}: empty line, expected {{"text": ...}}')
    try:
        record = json.loads(line)
        text = record["text"]
        text.encode()  # a lone surrogate can be written in JSON and is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    except (TypeError, KeyError, AttributeError):
        raise InputError(f'{where}: expected an object with a string "text"') from None
    return text


def standard_library() -> list[Path]:
    """The Python standard library's own source files in the order of their relative paths: real text found on any machine."""
    root = sysconfig.get_path("stdlib")
    found = []
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in SKIPPED]
        # _sysconfigdata describes the machine that Python was built on
        found += [Path(directory, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    if not found:
        raise InputError(f"data: no Python source files below {root}; name some with --data")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def find(data: Sequence[str] | None) -> list[tuple[Documents, float | None]]:
    """The documents of `--data` items, and their weights.

    Args:
        data: files, globs (`**` too) or `path:weight`; None is the Python standard library.
    Returns:
        One (documents, weight) for each item; or, without weights, a single one of all files with the weight None.
    Raises:
        InputError: an item that matches no file or has no valid weight; a bad line, with file and number.
    """
    if data is None:
        return [(Documents(standard_library()), None)]
    items = [_split_weight(item) for item in data]
    weighted = [weight is not None for _, weight in items]
    if any(weighted) and not all(weighted):
        raise InputError(f"data item {items[weighted.index(False)][0]!r}: no weight; give every item one (path:0.3) or none")
    matches = [_match(pattern) for pattern, _ in items]
    if any(weighted):
        return [(Documents(files), weight) for files, (_, weight) in zip(matches, items)]
    return [(Documents([path for files in matches for path in files]), None)]


def _split_weight(item: str) -> tuple[str, float | None]:
    pattern, colon, number = item.rpartition(":")
    if not colon or os.path.exists(item):
        return item, None
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise InputError(f"data item {item!r}: weight {number!r}: expected a number above 0")
    return pattern, weight


def _match(pattern: str) -> list[Path]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise InputError(f"data item {pattern!r}: a directory; name its files, as in {os.path.join(pattern, '**', '*.txt')!r}")
    names = [pattern] if os.path.isfile(pattern) else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not names:
        raise InputError(f"data item {pattern!r}: matches no file")
    return [Path(name) for name in names]


def sample(data: Sequence[str] | None, most_bytes: int = 32 << 20) -> Iterator[str]:
    """Texts to train a tokenizer on: every document, or of more data every second, third, ... one."""
    sources = find(data)
    step = -(-sum(documents.size for documents, _ in sources) // most_bytes) or 1
    return (documents[index][0] for documents, _ in sources for index in range(0, len(documents), step))


class Batches:
    """An iterator of batches that can say where it stands and go back there.

    A batch is a dict of [B, T] arrays: int32 `tokens`, `targets` (each token's successor in its document), `positions` (from
    0 at each segment's start) and `segment_ids` (1, 2, ... in each row, 0 is padding); float32 `loss_mask`, 0 at padding.
    """

    def __init__(self, rows: Any, identity: dict[str, Any]) -> None:
        self._iterator = iter(rows)
        self._identity = identity
        weakref.finalize(self, self.__dict__.clear)  # ends grain's threads, also at exit: its destructor fails any later

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position after the batches returned so far: small, JSON; the same in every process and for any batch size."""
        return {"identity": self._identity, "position": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` gave, here or under another number of processes.

        Raises:
            InputError: the state is of other data, weights, tokenizer, seed or row length, which are then named.
        """
        saved = state["identity"]
        differ = [
            f"{name} ({saved.get(name)} there, {now} here)" for name, now in self._identity.items() if saved.get(name) != now
        ]
        if differ:
            raise InputError(f"cannot resume at the checkpoint's place in the data, which differs: {', '.join(differ)}")
        self._iterator.set_state(_tuples(state["position"]))


def make_dataset(
    data: Sequence[str] | None,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    repeat: bool = True,
) -> Batches:
    """Batches of packed documents, tokenized in background threads.

    A document is BOS, text, EOS; its tokens but the last are inputs, its tokens but the first their targets. Documents follow
    one another without padding; one that does not fit continues in the next row as a segment of its own. Rows are shuffled
    among SHUFFLED_ROWS neighbours. Weights are shares of rows (to within a percent, as grain rounds them).

    Args:
        data: `--data` items, see `find`.
        batch_size: rows B of the global batch; this process gets B / process_count of them, contiguous.
        seq_len: T.
        repeat: without end, in a new order each epoch; else one pass in file order, whose last batch is filled with padding.
    """
    try:
        import grain
    except ImportError:
        raise InputError("training data needs grain: pip install grain") from None
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise InputError("tokenizer_config.json: bos_token and eos_token are needed to mark the documents of training data")
    if batch_size % process_count:
        raise InputError(f"batch_size={batch_size}: expected a multiple of the number of processes, {process_count}")
    if seed < 0:
        raise InputError(f"seed={seed}: expected at least 0")
    sources = find(data)
    weights = [weight for _, weight in sources]
    if not repeat and weights[0] is not None:
        raise InputError("data: weights have no meaning in one pass over everything")

    def tokenize(document: tuple[str, bool, bool]) -> Batch:
        text, begins, ends = document
        ids = [tokenizer.bos_id] * begins + tokenizer.encode(text, bos=False) + [tokenizer.eos_id] * ends
        ids = np.array(ids, np.int32)
        return {"tokens": ids[:-1], "targets": ids[1:]}

    def pack(documents: Documents) -> Any:
        dataset = grain.MapDataset.source(documents)
        if repeat:
            dataset = dataset.seed(seed).shuffle().repeat()
        options = grain.ReadOptions(num_threads=TOKENIZE_THREADS, prefetch_buffer_size=2 * TOKENIZE_THREADS)
        rows = grain.experimental.ConcatThenSplitIterDataset(
            dataset.map(tokenize).to_iter_dataset(options), length_struct={"tokens": seq_len, "targets": seq_len}
        )
        # Else a batch is consecutive rows of one or two documents, and the loss follows the document.
        return grain.experimental.WindowShuffleIterDataset(rows, window_size=SHUFFLED_ROWS, seed=seed) if repeat else rows

    share = batch_size // process_count

    def collate(rows: list[Batch]) -> Batch:
        padding = {name: np.zeros_like(value) for name, value in rows[0].items()}
        rows = [*rows, *[padding] * (batch_size - len(rows))][process_index * share : (process_index + 1) * share]
        names = {"tokens": "tokens", "targets": "targets", "positions": "tokens_positions", "segment_ids": "tokens_segment_ids"}
        batch = {ours: np.stack([row[theirs] for row in rows]) for ours, theirs in names.items()}
        return batch | {"loss_mask": (batch["segment_ids"] > 0).astype(np.float32)}

    packed = [pack(documents) for documents, _ in sources]
    rows = packed[0] if len(packed) == 1 else grain.IterDataset.mix(packed, weights)
    batches = grain.experimental.ThreadPrefetchIterDataset(rows.batch(batch_size, batch_fn=collate), prefetch_buffer_size=2)
    identity = {
        "data": [documents.digest for documents, _ in sources],
        "weights": weights,
        "tokenizer": hashlib.sha256(tokenizer.files["tokenizer.json"]).hexdigest()[:16],
        "seed": seed,
        "seq_len": seq_len,
    }
    return Batches(batches, identity)


def _tuples(state: Any) -> Any:
    """JSON's lists as the tuples they were: grain compares slices with tuples, and would take a list for a remainder."""
    if isinstance(state, dict):
        return {key: _tuples(value) for key, value in state.items()}
    return tuple(map(_tuples, state)) if isinstance(state, list) else state
