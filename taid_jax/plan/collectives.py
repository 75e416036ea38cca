"""Collectives of a compiled program, counted as often as its loops run them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

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
# `%name (parameters) -> type {`, with ENTRY before it for the whole program.
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
# `%name = type opcode(operands)...`; a tuple's type is in brackets.
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?)(?<= )([a-z][\w-]*)\((.*)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)"
    r"=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NUMBER = re.compile(r"(\d+)\)")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line of a program: `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands; the attributes after them may name computations."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])


_NOTHING = _Instruction("", "", "", "")
_Computation = Mapping[str, _Instruction]
"""Instructions by name, in order; the last one gives the result."""


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What a chip exchanges with others in one step.

    Attributes:
        count: Kind to the number of times it is run.
        bytes: Kind to the bytes of its larger side, operand or result, on one chip.
        sent: Bytes that a chip has to send over its links, with the best algorithm on a
            ring.
        sent_network: Bytes that it has to send where its links do not reach.
        endless: Loops that hold a collective and have no fixed length, counted once.
    """

    count: Mapping[str, int]
    bytes: Mapping[str, int]
    sent: float
    sent_network: float
    endless: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.bytes.values())


def count_collectives(text: str, linked: int | None = None) -> Collectives:
    """Returns the collectives of a program.

    Args:
        text: What `compiled.as_text()` gives: the program of one device.
        linked: How many devices, of those next to each other in the mesh, links join;
            all when None.
    """
    entry, computations = _parse_program(text)
    count: collections.Counter[str] = collections.Counter()
    size: collections.Counter[str] = collections.Counter()
    sent, sent_network, endless = 0.0, 0.0, set()
    pieces: set[tuple[str, str]] = set()
    for computation, times, open_loops, fused in _runs(entry, computations):
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind not in _KINDS:
                continue
            # A collective that runs beside products, as XLA for TPU arranges it, is
            # in the fusions of its start, of its end, and of all that lie between.
            if fused and (channel := _CHANNEL.search(one.rest)):
                if (kind, channel[1]) in pieces:
                    continue
                pieces.add((kind, channel[1]))
            given = sum(
                _bytes(computation[name].type)
                for name in one.operands
                if name in computation
            )
            # An asynchronous start has its operands and buffers in its type as well.
            got = _bytes(one.type) - (given if one.opcode.endswith("-start") else 0)
            moved = max(given, got)
            count[kind] += times
            size[kind] += times * moved
            links, network = _shares_sent(kind, one.rest, linked)
            sent += times * moved * links
            sent_network += times * moved * network
            endless |= open_loops
    return Collectives(dict(count), dict(size), sent, sent_network, len(endless))


def _runs(
    entry: str, computations: Mapping[str, _Computation]
) -> Iterator[tuple[_Computation, int, frozenset[str], bool]]:
    """Yields each call of a computation: it, its runs, open loops, inside a fusion."""
    stack = [(entry, 1, frozenset[str](), False)]
    holds = _holding(computations)
    while stack:
        name, times, open_loops, fused = stack.pop()
        computation = computations[name]
        yield computation, times, open_loops, fused
        for one in computation.values():
            for called in filter(holds.__contains__, _called_by(one)):
                loops = one.opcode == "while"
                trips = _trip_count(one, computation, computations) if loops else 1
                still_open = open_loops | ({one.name} if trips is None else set())
                runs = times * (1 if trips is None else trips)
                stack.append(
                    (called, runs, still_open, fused or one.opcode == "fusion")
                )


def _holding(computations: Mapping[str, _Computation]) -> set[str]:
    """Returns the computations with a collective in them, or in one that they call."""
    callers: dict[str, set[str]] = {name: set() for name in computations}
    found = []
    for name, computation in computations.items():
        for one in computation.values():
            for called in _called_by(one):
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


def _first_group(attributes: str) -> Sequence[int] | None:
    """Returns the devices of the first group of a collective, None where not said.

    Three ways of writing: `{{0,1},{2,3}}`, `[groups,size]<=[...]T(...)`, and
    `mesh['a'=2,'b'=4] {'b'}`, the axes that a group runs along.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {axis: int(n) for axis, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
        along = re.findall(r"'([^']+)'", named[2])
        place = tuple(slice(None) if axis in along else 0 for axis in sizes)
        devices = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        return devices[place].ravel().tolist()
    listed = re.search(
        r"replica_groups=\[\d+,(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", attributes
    )
    if listed:
        shape, order = (
            [int(n) for n in (part or "").split(",") if n]
            for part in listed.groups()[1:]
        )
        devices = np.arange(math.prod(shape) if shape else int(listed[1]))
        devices = devices.reshape(shape or -1).transpose(order or None)
        return devices.ravel()[: int(listed[1])].tolist()
    if written := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in written[1].split(",")]
    return None


def _shares_sent(kind: str, attributes: str, linked: int | None) -> tuple[float, float]:
    """Returns what parts of the larger side a device has to send: by links, by network.

    On a ring of n devices a gather, a scatter and an all-to-all send (n - 1) / n of it,
    a sum is a scatter and a gather, and a permutation sends all. Where a group has g
    devices in each of h places that links do not join, the g exchange by links, and
    each sends its share of what the other places need; an all-to-all has nothing in
    common to share.
    """
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", attributes)
        far = [linked and int(a) // linked != int(b) // linked for a, b in pairs]
        return float(not far or not all(far)), float(any(far))
    twice = 2.0 if kind == "all-reduce" else 1.0
    group = _first_group(attributes)
    if group is None:
        return twice, twice / linked if linked else 0.0
    size = len(group)
    near = sum(not linked or one // linked == group[0] // linked for one in group)
    if kind == "all-to-all":
        return (near - 1) / size, (size - near) / size
    return twice * (near - 1) / near, twice * (size - near) / size / near


def _parse_program(text: str) -> tuple[str, dict[str, dict[str, _Instruction]]]:
    """Returns the name of the entry, and all computations."""
    entry, current = "", ""
    computations: dict[str, dict[str, _Instruction]] = {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            computations[current] = {}
            entry = current if begins[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current][found[1]] = _Instruction(*found.groups())
    return entry, computations


def _called_by(instruction: _Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def _trip_count(
    loop: _Instruction,
    around: _Computation,
    computations: Mapping[str, _Computation],
) -> int | None:
    """Returns how often a loop runs, if that is fixed.

    XLA for CPU and GPU writes it beside the loop. That for TPU does not; but its loops
    compare a counter with a constant, to which each pass adds another: 1 in scans, 2
    where a product is computed piece by piece while the pieces go round a ring both
    ways.
    """
    if told := _TRIPS.search(loop.rest):
        return int(told[1])
    names = dict(re.findall(r"(condition|body)=%?([\w.-]+)", loop.rest))
    condition, body = (
        computations.get(names.get(name, ""), {}) for name in ("condition", "body")
    )
    tests = [one for one in condition.values() if one.opcode == "compare"]
    if len(tests) != 1 or "direction=LT" not in tests[0].rest:
        return None
    sides = [_source(name, condition) for name in tests[0].operands]
    counter, bound = sides if len(sides) == 2 else (_NOTHING, _NOTHING)
    place, end = re.search(r"index=(\d+)", counter.rest), _constant(bound)
    if counter.opcode != "get-tuple-element" or place is None or end is None:
        return None
    begun = _source((loop.operands or [""])[0], around)
    start = _constant(_part(begun, int(place[1]), around)) or 0
    result = [_NOTHING, *body.values()][-1]
    added = _part(result, int(place[1]), body)
    amounts = [_constant(_source(name, body)) for name in added.operands]
    step = next(filter(None, amounts), 1) if added.opcode == "add" else 1
    return max(0, -(-(end - start) // step))


def _part(made: _Instruction, place: int, around: _Computation) -> _Instruction:
    """Returns what was put at a place of a tuple that is made."""
    parts = made.operands if made.opcode == "tuple" else []
    return _source(parts[place], around) if place < len(parts) else _NOTHING


def _source(name: str, around: _Computation) -> _Instruction:
    """Returns the instruction of a name, or what it is a mere copy of."""
    found = around.get(name, _NOTHING)
    while found.opcode in ("copy", "bitcast"):
        found = around.get((found.operands or [""])[0], _NOTHING)
    return found


def _constant(one: _Instruction) -> int | None:
    number = _NUMBER.match(one.rest) if one.opcode == "constant" else None
    return int(number[1]) if number else None
