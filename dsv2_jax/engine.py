"""The inference engine: continuous batching over a paged latent cache.

A step sends up to three programs to the devices, each compiled once for a fixed set of shapes: `prefill` of prompts from their
beginning, packed into one row a device (naive attention); `prefill` of further chunks over what the cache holds of their requests
(absorbed); and `decode` of one token of every request that is past its prompt. `next_tokens` follows each of them. Chunks bound how
long a decode step waits for prompts. Devices compute ahead: a step reads the tokens of the one before.

Each device has its own requests and pages (`pages.PagePool`), the routed experts are shared. Where pages run out, the request that
came last gives up its own and is computed again later. What a request gets does not depend on the others.
Letters: B rows of all devices, T positions, P pages of a row, R answers a program samples, S seats of all devices, V vocabulary.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv2_jax import cache as latent_cache
from dsv2_jax.fields import InputError
from dsv2_jax.model import Decoder
from dsv2_jax.pages import PagePool
from dsv2_jax.prompts import check_tokens
from dsv2_jax.rotation import rotated
from dsv2_jax.sampling import MAX_LOGPROBS, History, Sampled, Sampling, SamplingArrays, check, to_arrays, to_history
from dsv2_jax.steps import Batch, begin_history, decode, fences, next_tokens, prefill
from pallas_kernels.latent_pages import PAGE
from sharding import specs

PREFILL = 8192  # tokens of prompts from their beginning that a device computes in a step, at most
EXTEND = 2048  # tokens of further chunks
ROW = 64  # the shortest row of tokens
LEAST = 8  # rows of a decode step: a matrix times one row, XLA would write out all products before it adds them up
SHARE = 16  # a packed row holds at most a prompt for so many of its positions


def bucket(n: int, least: int = 1) -> int:
    """The power of two, at least `least`, that holds n."""
    return max(least, 1 << (n - 1).bit_length())


def decode_rows(answers: int, max_batch: int) -> int:
    """The rows of a decode step: of few sizes, since each is a program that takes a quarter of a minute to compile, or half.

    They are `max_batch` and a quarter, a sixteenth, .. of it, all rounded up to a multiple of LEAST.
    """
    rows = -(-max_batch // LEAST) * LEAST
    while (fewer := -(-rows // (4 * LEAST)) * LEAST) >= answers and fewer < rows:
        rows = fewer
    return rows


class Output(NamedTuple):
    """A new token of an answer."""

    request: int
    answer: int  # which of the request's `n`
    token: int
    logprob: float
    top: list[tuple[int, float]]  # the most likely tokens and their log-probabilities, as many as were asked for
    finish_reason: str | None  # "stop": EOS or a stop token; "length": max_new_tokens or the end of the context; None: it goes on


@dataclasses.dataclass(eq=False)
class _Answer:
    """One answer on its way."""

    request: int
    index: int
    sampling: Sampling
    prompt: list[int]
    budget: int  # new tokens, at most
    stops: frozenset[int]  # tokens that end it
    new: list[int] = dataclasses.field(default_factory=list)  # those that have been read
    ahead: int = 0  # tokens that are being computed and have not been read
    stored: int = 0  # tokens whose latents the cache has, or will have after the programs on their way
    decoding: bool = False  # past its prompt: its last token lies in its seat
    ended: bool = False
    device: int = -1
    seat: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.new

    @property
    def launched(self) -> int:
        """New tokens, read or on their way."""
        return len(self.new) + self.ahead

    @property
    def missing(self) -> int:
        """Tokens that a prefill has still to store."""
        return 0 if self.decoding else len(self.prompt) + len(self.new) - self.stored


@dataclasses.dataclass
class Counters:
    """What an engine has done."""

    prompt_tokens: int = 0  # computed
    reused_tokens: int = 0  # found in the cache
    new_tokens: int = 0
    preemptions: int = 0


class Engine:
    """Runs requests together, on all devices of the mesh that is current when it is made and used. Not for several threads.

        engine = Engine(model, eos_id=1)
        request = engine.add_request(token_ids, Sampling(max_new_tokens=100))
        for output in engine.stream(request): ...

    Args:
        eos_id: the token that ends an answer, unless the request ignores it.
        cache_dtype: one of `cache.FORMATS`; None: the model's dtype.
        cache_tokens: for how many tokens each device has pages; None: as many as its memory leaves room for.
        max_batch: answers that each device works on at a time.

    Raises: InputError, where the format does not fit the model, or there is no room for a page.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        eos_id: int | None = None,
        cache_dtype: str | None = None,
        cache_tokens: int | None = None,
        max_batch: int = 256,
    ):
        self.cache_dtype = cache_dtype or str(model.embed.dtype)
        self.model, self.cfg, self.eos_id = rotated(model) if cache_dtype == "int6" else model, model.cfg, eos_id
        fits = latent_cache.tokens_that_fit(self.cfg, self.cache_dtype, max_batch)
        self.num_pages = (fits if cache_tokens is None else cache_tokens) // PAGE
        if self.num_pages < 1:
            raise InputError(
                f"cache_tokens is {fits if cache_tokens is None else cache_tokens}, expected at least {PAGE}, a page"
            )
        self._devices, self._max_batch = jax.sharding.get_mesh().size, max_batch
        seats = self._devices * max_batch
        self._pages = latent_cache.empty(self.cfg, self.num_pages, self.cache_dtype)
        self._tokens = place(np.zeros(seats, np.int32))  # the last token of the request in each seat
        self._history: History | None = None  # made when a request first needs it
        self._pools = [PagePool(self.num_pages) for _ in range(self._devices)]
        self._free_seats = [list(range(max_batch)) for _ in range(self._devices)]
        self._tables = np.zeros((self._devices, max_batch, -(-self.cfg.max_position_embeddings // PAGE)), np.int32)
        self._fences = fences(model, max_batch, self._tables.shape[2])  # to be held, not read
        self._waiting: collections.deque[_Answer] = collections.deque()
        self._running: list[_Answer] = []  # those with a seat, in the order in which they came to it
        self._flights: collections.deque[tuple[Sampled, list[_Answer | None]]] = collections.deque()
        self._outputs: list[Output] = []  # read, and not yet given out
        self._rows: list[_Answer | None] = []  # of the last decode step, and what they ask
        self._rows_asked = _Asked(None, 0, False)
        self.used_experts: jax.Array | None = None  # how many the last decode step uses of each MoE layer's [L], on the device
        self._numbers = itertools.count()
        self.counters = Counters()

    # -- requests

    def add_request(self, token_ids: Sequence[int], sampling: Sampling, name: str = "request") -> int:
        """Queues a request, and returns its number. `name` is what errors call it.

        Raises: InputError, for what cannot be computed; nothing is queued then.
        """
        check_tokens(self.cfg, name, token_ids, room=1)
        check(sampling, self.cfg.vocab_size, name)
        budget = min(sampling.max_new_tokens, self.cfg.max_position_embeddings - len(token_ids))
        if (needed := len(token_ids) + budget) > self.num_pages * PAGE:
            raise InputError(
                f"{name}: prompt and answer take up to {needed} tokens of cache, expected at most {self.num_pages * PAGE}"
            )
        request = next(self._numbers)
        stops = frozenset(sampling.stop_token_ids) | ({self.eos_id} if not sampling.ignore_eos else set())
        self._waiting += [_Answer(request, index, sampling, list(token_ids), budget, stops) for index in range(sampling.n)]
        return request

    def abort(self, request: int, answer: int | None = None) -> None:
        """Ends a request, or one of its answers, wherever it is; it gives no more output."""
        for one in [*self._waiting, *self._running]:
            if one.request == request and answer in (None, one.index):
                self._end(one)
        self._outputs = [o for o in self._outputs if o.request != request or answer not in (None, o.answer)]

    @property
    def busy(self) -> bool:
        """Whether there is anything left to compute or to give out."""
        return bool(self._waiting or self._running or self._flights or self._outputs)

    @property
    def seats(self) -> int:
        """Answers that are worked on at a time."""
        return self._devices * self._max_batch

    @property
    def cache_tokens(self) -> int:
        """Tokens that the pages of all devices hold."""
        return self._devices * self.num_pages * PAGE

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the cache for a token, in all layers."""
        return latent_cache.bytes_per_token(self.cfg, self.cache_dtype)

    def describe(self) -> str:
        """What there is room for, in words."""
        size = f"{self.cache_dtype}, {self.bytes_per_token:,} bytes each"
        return f"cache: {self.cache_tokens:,} tokens ({size}), {self.seats} answers at a time"

    @property
    def free_pages(self) -> int:
        """Pages of all devices that no request holds."""
        return sum(pool.free for pool in self._pools)

    def stream(self, request: int) -> Iterator[Output]:
        """The outputs of one request, as they come; those of others that run beside it are not given out."""
        while any(one.request == request for one in (*self._waiting, *self._running)):
            yield from [output for output in self.step() if output.request == request]

    def step(self) -> list[Output]:
        """Sends the next programs to the devices, and returns the tokens of those sent before."""
        before = list(self._flights)
        self._send_prefills()
        self._send_decode()
        while self._flights and any(self._flights[0] is flight for flight in before):
            self._read()
        outputs, self._outputs = self._outputs, []
        return outputs

    # -- places

    def _admit(self) -> _Answer | None:
        """Gives the next answer of the queue a seat and pages for what is known of it; None if there are none to give."""
        answer = self._waiting[0]
        tokens = answer.tokens
        whole = len(tokens) // PAGE + 1  # pages, the next token's among them
        best: tuple[int, list[int]] | None = None
        for device, pool in enumerate(self._pools):
            known = pool.match(tokens[:-1]) if self._free_seats[device] else []  # one token at least has to be computed
            keep = sum(one.device == device for one in self._running)  # each may need a page before one of them ends
            fits = self._free_seats[device] and pool.free - (whole - len(known)) >= keep
            if fits and (not best or (len(known), pool.free) > (len(best[1]), self._pools[best[0]].free)):
                best, (device, known) = (device, known), best or (device, [])
            self._pools[device].release(known)  # of the device that is not chosen
        if not best:
            return None
        self._waiting.popleft()
        answer.device, known = best
        answer.pages = known + self._pools[answer.device].take(whole - len(known))
        answer.seat = self._free_seats[answer.device].pop()
        answer.stored = len(known) * PAGE
        self.counters.reused_tokens += answer.stored
        self._tables[answer.device, answer.seat, :whole] = answer.pages
        self._running.append(answer)
        self._begin_history(answer)
        return answer

    def _begin_history(self, answer: _Answer) -> None:
        vocab = self.cfg.vocab_size
        if self._history is None:
            if not answer.sampling.needs_history:
                return
            seats = self._devices * self._max_batch
            dtypes = (bool, jnp.int32, jnp.float32)
            self._history = History(*(jnp.zeros((seats, vocab), dtype, out_sharding=specs.logits_BV) for dtype in dtypes))
        seat_D = np.full(self._devices, -1, np.int32)
        seat_D[answer.device] = answer.seat
        new = to_history([answer.sampling], [answer.prompt], [answer.new], vocab)
        self._history = begin_history(self._history, place(seat_D), new)

    def _leave(self, answer: _Answer) -> None:
        """Gives back seat and pages; what these hold stays known."""
        pool = self._pools[answer.device]
        pool.publish(answer.pages, answer.tokens[: answer.stored])
        pool.release(answer.pages)
        self._free_seats[answer.device].append(answer.seat)
        self._running.remove(answer)
        answer.pages, answer.stored, answer.decoding = [], 0, False

    def _end(self, answer: _Answer) -> None:
        answer.ended = True
        if answer.pages:
            self._leave(answer)
        else:
            self._waiting.remove(answer)

    def _grow(self, answer: _Answer) -> None:
        """Sees that there is a page for the answer's next token. Where there is none, the answer that came last makes room."""
        while not answer.ended and answer.decoding and answer.stored // PAGE == len(answer.pages):
            if page := self._pools[answer.device].take(1):
                self._tables[answer.device, answer.seat, len(answer.pages)] = page[0]
                answer.pages += page
                continue
            while self._flights:  # to compute an answer again, all of it must be known; and some may end
                self._read()
            if self._pools[answer.device].free:
                continue
            last = next(one for one in reversed(self._running) if one.device == answer.device)
            self._leave(last)
            self._waiting.appendleft(last)
            self.counters.preemptions += 1

    # -- programs

    def _send_prefills(self) -> None:
        fresh: list[list[_Chunk]] = [[] for _ in self._pools]
        room = [PREFILL] * self._devices

        def begin(answer: _Answer) -> bool:
            """Puts an answer's beginning into its device's row of this step, if there is room."""
            left = room[answer.device]
            if left < min(answer.missing, PREFILL // 4):
                return False
            fresh[answer.device].append(self._chunk(answer, left))
            room[answer.device] -= max(answer.stored, SHARE)
            return True

        further = [answer for answer in self._running if answer.missing and answer.stored]
        begun = [begin(answer) for answer in self._running if answer.missing and not answer.stored]
        while self._waiting and all(begun) and (answer := self._admit()):
            if answer.stored:
                further.append(answer)
            else:
                begun.append(begin(answer))
        if any(fresh):  # a row a device
            length = bucket(max(max(len(chunks) * SHARE, sum(chunk.stop for chunk in chunks)) for chunks in fresh), ROW)
            self._send_chunks(fresh, 1, length, length // SHARE)
        if further:  # a row an answer, as long as there is room for all of a device
            by_device = [[answer for answer in further if answer.device == device] for device in range(self._devices)]
            most = bucket(max(map(len, by_device)))
            length = min(bucket(max(answer.missing for answer in further), ROW), max(EXTEND // most, ROW))
            rows = EXTEND // length
            self._send_chunks([[self._chunk(one, length) for one in answers[:rows]] for answers in by_device], rows, length, rows)

    def _chunk(self, answer: _Answer, most: int) -> "_Chunk":
        """The next tokens of a prompt, from now on stored, and known to other prompts."""
        start, answer.stored = answer.stored, answer.stored + min(answer.missing, most)
        self.counters.prompt_tokens += answer.stored - start
        self._pools[answer.device].publish(answer.pages, answer.tokens[: answer.stored])
        return _Chunk(answer, start, answer.stored)

    def _send_chunks(self, chunks: list[list["_Chunk"]], rows: int, length: int, samples: int) -> None:
        """Sends each device's chunks, in `rows` rows of it: one row holds them all, or each has its own and attends over pages."""
        tokens_BT, positions_BT, segments_BT = np.zeros((3, self._devices * rows, length), np.int32)
        slots_BT = np.full((self._devices * rows, length), -1, np.int32)
        last_R, seat_R = np.zeros(self._devices * samples, np.int32), np.full(self._devices * samples, -1, np.int32)
        answers: list[_Answer | None] = [None] * len(seat_R)
        table_BP = None
        if rows > 1 or any(chunk.start for mine in chunks for chunk in mine):
            pages = table_width(max(-(-chunk.stop // PAGE) for mine in chunks for chunk in mine), self._tables.shape[2])
            table_BP = np.zeros((self._devices * rows, pages), np.int32)
            positions_BT[:] = -1
        for device, mine in enumerate(chunks):
            first = 0
            for index, (answer, start, stop) in enumerate(mine):
                row, place_T = device * rows, slice(first, first + stop - start)
                if table_BP is not None:
                    row, place_T = row + index, slice(0, stop - start)
                    table_BP[row] = self._tables[device, answer.seat, : table_BP.shape[1]]
                tokens_BT[row, place_T] = answer.tokens[start:stop]
                positions_BT[row, place_T] = np.arange(start, stop)
                segments_BT[row, place_T] = index + 1
                slots_BT[row, place_T] = self._tables[device, answer.seat, positions_BT[row, place_T] // PAGE] * PAGE
                slots_BT[row, place_T] += positions_BT[row, place_T] % PAGE
                first += stop - start
                if not answer.missing:
                    sample = device * samples + index
                    last_R[sample], seat_R[sample] = (row - device * rows) * length + place_T.stop - 1, answer.seat
                    answers[sample] = answer
                    answer.decoding = True
        batch = Batch(tokens_BT, positions_BT, segments_BT, slots_BT, table_BP, last_R, seat_R)
        self._send(prefill(self.model, self._pages, jax.tree.map(place, batch)), answers, _Asked.by(answers))

    def _send_decode(self) -> None:
        for answer in list(self._running):
            if answer.decoding and answer.launched < answer.budget:
                self._grow(answer)
        by_device: list[list[_Answer]] = [[] for _ in self._pools]
        for answer in self._running:
            if answer.decoding and answer.launched < answer.budget:
                by_device[answer.device].append(answer)
        if not any(by_device):
            return
        rows = decode_rows(max(map(len, by_device)), self._max_batch)
        pages = table_width(max(len(answer.pages) for answers in by_device for answer in answers), self._tables.shape[2])
        rows_BX = np.full((self._devices, rows, 2 + pages), -1, np.int32)
        for device, mine in enumerate(by_device):
            seats = [answer.seat for answer in mine]
            rows_BX[device, : len(mine), 0] = seats
            rows_BX[device, : len(mine), 1] = [answer.stored for answer in mine]
            rows_BX[device, :, 2:] = 0
            rows_BX[device, : len(mine), 2:] = self._tables[device, seats, :pages]
            for answer in mine:
                answer.stored += 1
        answers = [answer for mine in by_device for answer in mine + [None] * (rows - len(mine))]
        if answers != self._rows:
            self._rows, self._rows_asked = answers, _Asked.by(answers)
        rows_BX = rows_BX.reshape(-1, 2 + pages)
        if self._devices > 1:  # each has its own
            rows_BX = place(rows_BX)
        *sent, self.used_experts = decode(self.model, self._pages, self._tokens, rows_BX)
        self._send(sent, answers, self._rows_asked)

    def _send(self, sent: Sequence[Any], answers: list[_Answer | None], asked: "_Asked") -> None:
        """Chooses the next tokens of answers from what a program gave, pages and `Last`, and notes that they are on their way."""
        self._pages, last = sent
        history = self._history if asked.history else None
        w_head_DV = self.model.w_head[...]
        self._tokens, history, sampled = next_tokens(w_head_DV, self._tokens, history, last, asked.how, asked.top)
        self._history = history or self._history
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        for answer in answers:
            if answer:
                answer.ahead += 1
        self._flights.append((sampled, answers))

    def _read(self) -> None:
        """Takes in the tokens of the oldest program on its way, waiting for it."""
        sampled, answers = self._flights.popleft()
        tokens, logprobs = np.asarray(sampled.tokens_B).tolist(), np.asarray(sampled.logprobs_B).tolist()
        tops = [] if sampled.top_ids_BK is None else [np.asarray(x) for x in (sampled.top_ids_BK, sampled.top_logprobs_BK)]
        for row, answer in enumerate(answers):
            if answer is None or answer.ended:
                continue
            token, asked = tokens[row], answer.sampling.logprobs
            answer.ahead -= 1
            answer.new.append(token)
            self.counters.new_tokens += 1
            reason = None
            if token in answer.stops:
                reason = "stop"
            elif len(answer.new) == answer.budget:
                reason = "length"
            top = list(zip(*(x[row, :asked].tolist() for x in tops))) if asked else []
            self._outputs.append(Output(answer.request, answer.index, token, logprobs[row], top, reason))
            if reason:
                self._end(answer)


class _Chunk(NamedTuple):
    """Tokens `start` to `stop` of an answer's."""

    answer: _Answer
    start: int
    stop: int


def table_width(pages: int, most: int) -> int:
    """The number of columns, one of few, of a table for requests of so many pages: 16 and its products with 4, or `most`."""
    width = 16
    while width < pages:
        width *= 4
    return min(width, most)


class _Asked(NamedTuple):
    """What the answers of a program ask of their samples."""

    how: SamplingArrays | None  # on the devices; None: the likeliest token
    top: int  # of how many tokens log-probabilities are computed
    history: bool  # whether any has penalties or biases

    @classmethod
    def by(cls, answers: Sequence[_Answer | None]) -> "_Asked":
        samplings = [answer.sampling if answer else Sampling() for answer in answers]
        top = MAX_LOGPROBS if any(one.logprobs for one in samplings) else 0
        history = any(one.needs_history for one in samplings)
        if not history and all(one.temperature == 0 for one in samplings):
            return cls(None, top, history)
        arrays = to_arrays(samplings, [answer.index if answer else 0 for answer in answers])
        return cls(jax.tree.map(place, arrays), top, history)


def place(array: np.ndarray) -> jax.Array:
    """A host array on the mesh, its first axis that of the devices' rows."""
    return jax.device_put(array, jax.NamedSharding(jax.sharding.get_mesh(), specs.per_request_B))
