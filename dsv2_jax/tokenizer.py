"""Text to token ids and back: a checkpoint's tokenizer.json, its chat template, streaming, and training a new tokenizer.

Read through `tokenizers` alone: transformers 5 rebuilds the published byte-level tokenizers with other rules and loses spaces.
"""

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from dsv2_jax.fields import InputError

# As published, with fullwidth bars and U+2581: their ASCII look-alikes do not match.
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
FILES = ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json")  # the last is written last: without it nothing loads
SMALLEST_VOCABULARY = 256 + 2  # every byte, BOS and EOS

# The template of V2-Chat, V2-Lite-Chat and Coder-V2-Instruct; no space after "Assistant:", where the model writes its own.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# A token never crosses these pieces: a line end; a digit; a run of CJK; an optional space with a word or with punctuation;
# the spaces before such a piece's own.
PIECES = (
    r"[\r\n]|\p{N}|[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]+"
    r"|[^\S\r\n]?(?:\p{L}+|[\p{P}\p{S}]+)|[^\S\r\n]+(?!\S)"
)


class Tokenizer:
    """A tokenizer.json with the BOS rule, EOS and chat template of the tokenizer_config.json beside it.

    Attributes:
        files: name -> content of the files it is made of; `save` writes these bytes.
        vocab_size: one more than the largest token id; a model's own vocab_size may be larger.
        bos_id, eos_id: token ids, or None where the configuration names none.
    """

    def __init__(self, files: dict[str, bytes], source: str) -> None:
        self.files = files
        self._source = source
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # the library raises plain Exception
            raise InputError(f"{source}/tokenizer.json: not a tokenizer ({error})") from None
        config = self._read_config(files.get("tokenizer_config.json", b"{}"))
        self._backend.no_truncation()
        self._backend.no_padding()
        self._special_ids = {i for i, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        self._bos_token, self.bos_id = self._named_token(config, "bos_token")
        self._eos_token, self.eos_id = self._named_token(config, "eos_token")
        adds_bos = config.get("add_bos_token")
        if adds_bos is None:  # then the tokenizer.json itself says, or the Llama family's default
            adds_bos = self._backend.encode("").ids[:1] == [self.bos_id] or "Llama" in str(config.get("tokenizer_class"))
        self._adds_bos = bool(adds_bos) and self.bos_id is not None
        self._template = self._find_template(config)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Tokenizer | None":
        """The tokenizer in a checkpoint's directory, None where there is no tokenizer.json; InputError if it is malformed."""
        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            return None
        return cls({name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()}, str(directory))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the tokenizer's files; a reader sees none or all of them, however the writer ends."""
        for name in FILES:
            if name in self.files:
                temporary = Path(directory) / f"{name}.tmp"
                temporary.write_bytes(self.files[name])
                temporary.replace(Path(directory) / name)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The text's token ids, after one BOS if the checkpoint asks for it; never EOS: a prompt is to be continued."""
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):
            raise InputError(f"text {text[:40]!r}: not valid Unicode (a lone surrogate)") from None
        return [self.bos_id, *ids] if bos and self._adds_bos and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def is_silent(self, token: int) -> bool:
        """Whether `decode` skips this id: a special token, or one of the model's ids that has no token."""
        return token in self._special_ids or self._backend.id_to_token(token) is None

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The token ids of a conversation up to where the assistant speaks, by the checkpoint's own template, sandboxed.

        Args:
            messages: [{"role": ..., "content": ...}, ...], both strings; the template says which roles there are.
        Raises:
            InputError: no template, a malformed message, or anything the template raises.
        """
        if self._template is None:
            raise InputError(f"{self._source}: no chat_template in tokenizer_config.json, which chat needs")
        if not isinstance(messages, list | tuple) or not messages:
            raise InputError('messages: expected a list of {"role": ..., "content": ...}')
        for index, message in enumerate(messages):
            fields = message if isinstance(message, dict) else {}
            if set(fields) != {"role", "content"} or not all(isinstance(value, str) for value in fields.values()):
                raise InputError(f'messages[{index}]: expected {{"role": string, "content": string}}')
        try:
            text = _compile(self._template).render(
                messages=messages, add_generation_prompt=True, bos_token=self._bos_token, eos_token=self._eos_token
            )
        except Exception as error:  # the template is a program of the checkpoint's: whatever it raises is its own
            raise InputError(f"{self._source}: chat_template: {type(error).__name__}: {error}") from None
        return self.encode(text, bos=False)

    def _read_config(self, content: bytes) -> dict[str, Any]:
        try:
            config = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self._source}/tokenizer_config.json: not JSON ({error})") from None
        if not isinstance(config, dict):
            raise InputError(f"{self._source}/tokenizer_config.json: expected an object")
        return config

    def _named_token(self, config: dict[str, Any], field: str) -> tuple[str, int | None]:
        token = config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return "", None
        token_id = self._backend.token_to_id(token) if isinstance(token, str) else None
        if token_id is None:
            raise InputError(f"{self._source}/tokenizer_config.json: {field}={token!r}: not a token of tokenizer.json")
        return token, token_id

    def _find_template(self, config: dict[str, Any]) -> str | None:
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode(errors="replace")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, named; tool use and the like have their own
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            template = named.get("default")
        if template is not None and not isinstance(template, str):
            raise InputError(f"{self._source}/tokenizer_config.json: chat_template: expected a string or named templates")
        return template


@functools.cache
def _compile(template: str) -> jinja2.Template:
    """Compiles a chat template with the names and whitespace rules that published templates rely on, without Python's insides."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    return environment.from_string(template)


class TextStream:
    """Text from token ids one at a time: whole characters only, nothing that may yet begin a stop string.

    The pieces joined, with `flush` at the end, equal `decode` of all ids, up to the stop string that ended first. Whether and
    where a stop string matches does not depend on how the text falls into tokens. A token's cost does not grow with the text.

    Attributes:
        stopped: the stop string that was found, else None; it and what follows are never returned.
    """

    _LONGEST_WINDOW = 16  # tokens; a character needs at most four

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if not all(stops):
            raise InputError("stop: expected text, got an empty string")
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._window: list[int] = []  # the latest ids, beginning with some that give the others their context
        self._context = 0  # how many of them do that
        self._shown = 0  # how many characters of the window's text have been passed on
        self._held = ""  # text that may begin a stop string
        self.stopped: str | None = None

    def feed(self, token: int) -> str:
        """The text that has become certain with this token id."""
        if self._tokenizer.is_silent(token):
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        certain = len(text) - text.endswith("\ufffd")  # only the last one can still become a character
        piece, self._shown = text[self._shown : certain], certain
        if certain == len(text):
            self._window = self._window[self._context :]
            self._context, self._shown = len(self._window), len(self._tokenizer.decode(self._window))
        elif len(self._window) > self._LONGEST_WINDOW:  # bytes that never become a character
            before = self._tokenizer.decode(self._window[:-1])
            if before + self._tokenizer.decode([token]) == text:  # no character spans the two
                self._window, self._context, self._shown = [token], 0, certain - len(before)
        return self._until_stop(piece)

    def flush(self) -> str:
        """The rest: the bytes of an unfinished character as U+FFFD, and text held for a stop string that did not come."""
        rest = self._until_stop(self._tokenizer.decode(self._window)[self._shown :]) + self._held
        self._window, self._context, self._shown, self._held = [], 0, 0, ""
        return rest

    def _until_stop(self, piece: str) -> str:
        if self.stopped is not None:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            _, start, self.stopped = min(found)
            self._held = ""
            return text[:start]
        longest = min(len(text), max(map(len, self._stops), default=1) - 1)
        held = next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer after DeepSeek's: no unknown token, digits apart, BOS 0, EOS 1; the same for the same texts.

    Args:
        texts: what to learn merges from.
        vocab_size: how many tokens at most; little text yields fewer, and the model's further ids stay without a token.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(f"vocab_size={vocab_size}: a byte-level tokenizer needs at least {SMALLEST_VOCABULARY}")
    backend = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    # For other readers of the file: `encode` adds BOS by itself.
    backend.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B"], special_tokens=[(BOS, 0)]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "tokenizer.json": backend.to_str(pretty=True).encode(),
    }
    return Tokenizer(files, "trained tokenizer")
