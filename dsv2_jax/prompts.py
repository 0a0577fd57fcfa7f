"""What the user asks for: prompts from flags or JSONL lines, checked, as token ids with their sampling."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv2_jax.config import ModelConfig
from dsv2_jax.fields import InputError, nearest
from dsv2_jax.sampling import Sampling
from dsv2_jax.tensor_files import strict_json
from dsv2_jax.tokenizer import Tokenizer

KINDS = ("prompt", "token_ids", "messages")
SAMPLING_FIELDS = tuple(f.name for f in dataclasses.fields(Sampling))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request. `given` is the text, ids or messages as they came; `name` says in errors where it came from."""

    name: str
    id: Any
    given: Any
    token_ids: list[int]
    sampling: Sampling


def check_tokens(cfg: ModelConfig, name: str, token_ids: Sequence[int], room: int) -> None:
    """Refuses ids outside the vocabulary, an empty prompt, and one that leaves less than `room` of the context."""
    if not token_ids:
        raise InputError(f"{name}: the prompt is empty, expected at least one token")
    for token in token_ids:
        if type(token) is not int or not 0 <= token < cfg.vocab_size:
            raise InputError(f"{name}: token id {token!r}, expected an integer in [0, {cfg.vocab_size - 1}]")
    if len(token_ids) + room > cfg.max_position_embeddings:
        expected = f"at most {cfg.max_position_embeddings - room}"
        raise InputError(f"{name}: the prompt has {len(token_ids)} tokens, expected {expected} (max_position_embeddings)")


def to_sampling(fields: Mapping[str, Any], others: Sampling) -> Sampling:
    """The sampling of these fields, as flags and JSON give them, and what `others` has for the rest.

    Raises:
        InputError: naming the field, its value and what was expected.
    """
    own = dict(fields)
    for name in ("stop", "stop_token_ids"):
        if isinstance(own.get(name), list):
            own[name] = tuple(own[name])
    if isinstance(own.get("stop"), str):
        own["stop"] = (own["stop"],)
    if isinstance(own.get("logit_bias"), dict):
        own["logit_bias"] = {_token_id(key): bias for key, bias in own["logit_bias"].items()}
    return dataclasses.replace(others, **own)


def _token_id(text: str) -> int | str:
    """The number that is written just so; any other text as it is, for Sampling to refuse."""
    return int(text) if text.isdecimal() and len(text) < 20 and text == str(int(text)) else text


def parse_biases(items: Sequence[str]) -> dict[str, float]:
    """A flag's ID:NUMBER items as JSON would have them."""
    biases: dict[str, float] = {}
    for item in items:
        token, _, number = item.partition(":")
        if token in biases:
            raise InputError(f"--logit_bias={item}: token id {token} is given twice")
        try:
            biases[token] = float(number)
        except ValueError:
            raise InputError(f"--logit_bias={item}: expected ID:NUMBER, as in 123:-5") from None
    return biases


def from_texts(texts: Sequence[str], tokenizer: Tokenizer | None, sampling: Sampling) -> list[Prompt]:
    """One prompt a text."""
    return [_prompt(f"--prompt {n}", n, "prompt", text, tokenizer, sampling) for n, text in enumerate(texts)]


def from_jsonl(path: str, tokenizer: Tokenizer | None, sampling: Sampling) -> list[Prompt]:
    """One prompt a line: {"prompt" | "token_ids" | "messages": ..., "id": anything, and any field of Sampling}.

    Raises:
        InputError: with the file and the number of the first bad line.
    """
    try:
        lines = Path(path).read_bytes().decode().removesuffix("\n").split("\n")  # not splitlines: JSON may hold U+2028
    except UnicodeDecodeError as error:
        raise InputError(f"--input={path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"--input={path}: {error.strerror}") from None
    if lines == [""]:
        raise InputError(f"--input={path}: is empty, expected one JSON object a line")
    return [_from_line(f"{path} line {number}", number - 1, line, tokenizer, sampling) for number, line in enumerate(lines, 1)]


def _from_line(name: str, index: int, line: str, tokenizer: Tokenizer | None, sampling: Sampling) -> Prompt:
    try:
        fields = strict_json(line.encode(), name)
    except InputError as error:
        raise InputError(f"{error}: {line[:60]!r}") from None
    for key in fields:
        if key not in (*KINDS, "id", *SAMPLING_FIELDS):
            raise InputError(f"{name}: unknown key {key!r}{nearest(key, (*KINDS, 'id', *SAMPLING_FIELDS))}")
    kinds = [kind for kind in KINDS if kind in fields]
    if len(kinds) != 1:
        raise InputError(f"{name}: has {', '.join(kinds) or 'no prompt'}, expected exactly one of {', '.join(KINDS)}")
    try:
        sampling = to_sampling({key: fields[key] for key in SAMPLING_FIELDS if key in fields}, sampling)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return _prompt(name, fields.get("id", index), kinds[0], fields[kinds[0]], tokenizer, sampling)


def _prompt(name: str, id: Any, kind: str, given: Any, tokenizer: Tokenizer | None, sampling: Sampling) -> Prompt:
    if kind == "token_ids":
        if not isinstance(given, list):
            raise InputError(f"{name}: token_ids is {str(given)[:60]!r}, expected a list of integers")
        if sampling.stop and tokenizer is None:
            raise InputError(f"{name}: stop strings need a tokenizer, and the checkpoint has no tokenizer.json")
        return Prompt(name, id, given, given, sampling)
    if tokenizer is None:
        raise InputError(f"{name}: {kind} needs a tokenizer, and the checkpoint has no tokenizer.json; use token_ids")
    if kind == "prompt" and not isinstance(given, str):
        raise InputError(f"{name}: prompt is {str(given)[:60]!r}, expected a string")
    try:
        token_ids = tokenizer.encode(given) if kind == "prompt" else tokenizer.render_chat(given)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    return Prompt(name, id, given, token_ids, sampling)
