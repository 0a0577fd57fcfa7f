"""Collectives of a compiled program, read off its HLO text: what each device sends, and how often."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Collective(NamedTuple):
    """One collective of the compiled step, as every device takes part in it."""

    kind: str
    group: tuple[int, ...]  # the first group of devices that exchange, as places in the mesh
    payload: int  # bytes: of the gathered array, of the array that is summed, of all messages
    times: int  # in a step
    certain: bool  # False in a loop of unknown length, which counts as one iteration

    @property
    def sent(self) -> float:
        """Bytes a device sends in a step; in a ring, where arrays are gathered or summed."""
        share = 1.0 if self.kind == "collective-permute" else 1 - 1 / len(self.group)
        return self.times * self.payload * share * (2 if self.kind == "all-reduce" else 1)


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
COLLECTIVE = re.compile(rf" = (?P<type>.+?) (?P<kind>{KINDS})(?P<start>-start)?\(")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{(.*?)\}")
LENGTH = re.compile(r'known_trip_count":\{"n":"(\d+)"')


def parse_collectives(hlo: str, microbatches: int = 1) -> list[Collective]:
    """The collectives in the text of a compiled module; those in loops times the loops' lengths, of all branches each.

    Args:
        microbatches: how often an outermost loop runs whose length the text does not tell.
    """
    computations, entry, lines = {}, "", []
    for line in hlo.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            lines = computations[header[2]] = []
            entry = header[2] if header[1] else entry
        lines.append(line)
    devices = int(count[1]) if (count := re.search(r"num_partitions=(\d+)", hlo)) else 1

    def walk(name: str, times: int, certain: bool, in_loop: bool) -> Iterator[Collective]:
        for line in computations[name]:
            if match := COLLECTIVE.search(line):
                yield _collective(match, line, devices)._replace(times=times, certain=certain)
            inner = times, certain, in_loop
            if " while(" in line:
                known = LENGTH.search(line)
                length = int(known[1]) if known else 1 if in_loop else microbatches
                inner = times * length, certain and bool(known or length > 1), True
            if "-done(" not in line and "-update(" not in line:  # which name again what their start calls
                for one, several in CALLED.findall(line):
                    for called in re.findall(r"[\w.\-]+", one or several):
                        yield from walk(called, *inner)

    return list(walk(entry, 1, True, False))


def _collective(match: re.Match, line: str, devices: int) -> Collective:
    kind, result = match["kind"], re.sub(r"\{[^}]*\}|/\*.*?\*/", "", match["type"])  # without layouts and comments
    nested = result.startswith("((")
    if match["start"] and nested:
        result = result.partition(")")[2]  # the operands stand first
    arrays = re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", result)
    if match["start"] and kind == "all-gather" and not nested and len(arrays) == 2:
        arrays = arrays[1:]  # operand and result
    payload = 0
    for dtype, dims in arrays:
        bits = int(re.sub(r"\D", "", dtype) or 8)
        payload += math.prod(int(size) for size in dims.split(",") if size) * bits // 8
    if match["start"] and kind == "collective-permute":
        payload //= 2  # operand and result
    given = re.search(r"replica_groups=(.+?), [a-z]", line)
    group = first_group(given[1]) if given else ()
    group = group or tuple(range(devices))
    return Collective(kind, group, payload * len(group) if kind == "reduce-scatter" else payload, 1, True)


def first_group(text: str) -> tuple[int, ...]:
    """The first of an HLO's replica groups, in any of its notations: `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)`, `mesh['x'=8] {'x'}`."""
    if mesh := re.match(r"mesh\[(.*?)\] \{(.*)\}", text):
        used = {name: (int(before or 1), part) for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[2])}
        shape, index = [], []
        for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1]):  # an axis may be used in part: 'x':(devices before)part
            before, part = used.get(name, (1, 1))
            shape += [before, int(part or size), int(size) // before // int(part or size)]
            index += [0, slice(None), 0]
        return tuple(np.arange(math.prod(shape)).reshape(shape)[tuple(index)].ravel().tolist())
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        return tuple(np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape)[0].tolist())
    return tuple(map(int, re.findall(r"\d+", text.partition("}")[0])))
