"""Collectives of a compiled program, counted as often as its loops run them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from taid_jax.plan.hlo import Instruction, called_by, parse_program, trip_count

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}

_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What a chip exchanges with others in one step.

    Attributes:
        count: Kind to the number of times it is run.
        bytes: Kind to the bytes of its larger side, operand or result, on one chip.
        sent: Bytes that a chip has to send, with the best algorithm on a ring.
        endless: Loops that hold a collective and have no fixed length, counted once.
    """

    count: Mapping[str, int]
    bytes: Mapping[str, int]
    sent: float
    endless: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.bytes.values())


def count_collectives(text: str) -> Collectives:
    """Returns the collectives of a program.

    Args:
        text: What `compiled.as_text()` gives: the program of one device.
    """
    entry, computations = parse_program(text)
    count: collections.Counter[str] = collections.Counter()
    size: collections.Counter[str] = collections.Counter()
    sent, endless = 0.0, set()
    pieces: set[tuple[str, str]] = set()
    for computation, times, open_loops, fused in _runs(entry, computations):
        types = {one.name: one.type for one in computations[computation]}
        for one in computations[computation]:
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            # A collective that runs beside products, as XLA for TPU arranges it, is
            # in the fusions of its start, of its end, and of all that lie between.
            if fused and (channel := _CHANNEL.search(one.rest)):
                if (kind, channel[1]) in pieces:
                    continue
                pieces.add((kind, channel[1]))
            given = sum(_bytes(types.get(name, "")) for name in one.operands)
            # An asynchronous start has its operands and buffers in its type as well.
            got = _bytes(one.type) - (given if one.opcode.endswith("-start") else 0)
            moved = max(given, got)
            count[kind] += times
            size[kind] += times * moved
            sent += times * moved * _share_sent(kind, _group_size(one.rest))
            endless |= open_loops
    return Collectives(dict(count), dict(size), sent, len(endless))


def _runs(
    entry: str, computations: Mapping[str, list[Instruction]]
) -> Iterator[tuple[str, int, frozenset[str], bool]]:
    """Yields each call of a computation: name, runs, open loops, inside a fusion."""
    stack: list[tuple[str, int, frozenset[str], bool]] = [
        (entry, 1, frozenset(), False)
    ]
    holds = _holding(computations)
    while stack:
        computation, times, open_loops, fused = stack.pop()
        yield computation, times, open_loops, fused
        for one in computations[computation]:
            for called in called_by(one):
                if called not in holds:
                    continue
                trips, still_open = 1, open_loops
                if one.opcode == "while":
                    known = trip_count(one, computations[computation], computations)
                    trips = 1 if known is None else known
                    still_open |= {one.name} if known is None else set()
                inside = fused or one.opcode == "fusion"
                stack.append((called, times * trips, still_open, inside))


def _holding(computations: Mapping[str, list[Instruction]]) -> set[str]:
    """Returns the computations with a collective in them, or in one that they call."""
    callers: dict[str, set[str]] = {name: set() for name in computations}
    found = []
    for name, instructions in computations.items():
        for one in instructions:
            for called in called_by(one):
                callers.setdefault(called, set()).add(name)
            if one.opcode.removesuffix("-start") in _KINDS:
                found.append(name)
    holds: set[str] = set()
    while found:
        name = found.pop()
        if name not in holds:
            holds.add(name)
            found += callers[name]
    return holds


def _bytes(text: str) -> int:
    """Returns the bytes of all arrays in a type."""
    return sum(
        _bits(dtype) * math.prod(int(n) for n in shape.split(",") if n) // 8
        for dtype, shape in _ARRAY.findall(text)
    )


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 0


def _group_size(attributes: str) -> int | None:
    """Returns how many chips take part in a collective, None when it is not said.

    Three ways of writing: `{{0,1},{2,3}}`, `[groups,size]<=[...]`, and
    `mesh['a'=2,'b'=4] {'b'}`, the axes that a group runs along.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        along = re.findall(r"'([^']+)'", named[2])
        return math.prod(int(sizes.get(axis, 1)) for axis in along)
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(listed[1])
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(written[1].split(","))
    return None


def _share_sent(kind: str, group: int | None) -> float:
    """Returns what part of the larger side a chip has to send, at the least.

    On a ring of n chips a gather, a scatter and an all-to-all send (n - 1) / n of it,
    a sum is a scatter and a gather, and a permutation sends all.
    """
    if kind == "collective-permute":
        return 1.0
    share = 1.0 if group is None else (group - 1) / group
    return 2 * share if kind == "all-reduce" else share
