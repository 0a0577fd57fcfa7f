"""Frozen dataclasses whose fields are checked by their annotations, and overrides `FIELD=VALUE` of them; what bad input raises."""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """Bad input from the user: one clear line naming the thing, its value and what was expected; exit code 2."""


def override(configs: Iterable[Any], assignments: Iterable[str]) -> list[Any]:
    """Applies `FIELD=VALUE` strings to the dataclasses that have the field, typed by its annotation, all at once.

    A field of a nested dataclass is reached with a dot: `rope_scaling.factor=40`. `null` or `none` gives None.

    Raises:
        InputError: unknown field (with the nearest name), unreadable value, or a value the dataclass refuses.
    """
    configs = list(configs)
    changes: list[dict[str, Any]] = [{} for _ in configs]
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: expected FIELD=VALUE")
        owner = next((i for i, c in enumerate(configs) if name.split(".")[0] in field_types(type(c))), None)
        if owner is None:
            names = [n for c in configs for n in field_types(type(c))]
            raise InputError(f"--set {assignment}: unknown field {name!r}{nearest(name, names)}")
        head, _, rest = name.partition(".")
        now = changes[owner].get(head, getattr(configs[owner], head))
        types = field_types(type(configs[owner]))
        changes[owner][head] = _replace_inner(now, head, rest, text) if rest else _parse(name, text, types[head])
    return [dataclasses.replace(config, **changed) for config, changed in zip(configs, changes)]


def _replace_inner(inner: Any, head: str, name: str, text: str) -> Any:
    types = field_types(type(inner)) if dataclasses.is_dataclass(inner) else {}
    if name not in types:
        raise InputError(f"--set {head}.{name}={text}: {head} has no field {name!r}{nearest(name, types)}")
    return dataclasses.replace(inner, **{name: _parse(f"{head}.{name}", text, types[name])})


def _parse(name: str, text: str, allowed: tuple[type, ...]) -> Any:
    if type(None) in allowed and text.lower() in ("null", "none"):
        return None
    if bool in allowed and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in allowed:
            try:
                return kind(text)
            except ValueError:
                continue
    if str in allowed:
        return text
    raise InputError(f"--set {name}={text}: expected {_describe(allowed)}")


def nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


@functools.cache
def field_types(cls: type) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    return {n: typing.get_args(h) if isinstance(h, types.UnionType) else (h,) for n, h in fields.items()}


def _describe(allowed: tuple[type, ...]) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)


def check_types(config: Any) -> None:
    """Refuses wrong types and makes ints of float fields into floats. JSON has no other slack."""
    for name, allowed in field_types(type(config)).items():
        value = getattr(config, name)
        if float in allowed and isinstance(value, int) and not isinstance(value, bool):
            if abs(value) > 2**53:
                raise InputError(f"{type(config).__name__}.{name} is {str(value)[:40]}, expected a number that a float holds")
            object.__setattr__(config, name, float(value))
        elif not any(type(value) is kind for kind in allowed):
            raise InputError(
                f"{type(config).__name__}.{name} is {value!r} ({type(value).__name__}), expected {_describe(allowed)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{type(config).__name__}.{name} is {value!r}, expected a finite number")


def require(config: Any, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{type(config).__name__}.{name} is {getattr(config, name)!r}, expected {expected}")
