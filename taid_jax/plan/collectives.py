"""Collectives of a compiled program, counted as often as its loops run them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

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


_Computations = Mapping[str, Sequence[_Instruction]]


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
    entry, computations = _parse_program(text)
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
    entry: str, computations: _Computations
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
            for called in _called_by(one):
                if called not in holds:
                    continue
                trips, still_open = 1, open_loops
                if one.opcode == "while":
                    known = _trip_count(one, computations[computation], computations)
                    trips = 1 if known is None else known
                    still_open |= {one.name} if known is None else set()
                inside = fused or one.opcode == "fusion"
                stack.append((called, times * trips, still_open, inside))


def _holding(computations: _Computations) -> set[str]:
    """Returns the computations with a collective in them, or in one that they call."""
    callers: dict[str, set[str]] = {name: set() for name in computations}
    found = []
    for name, instructions in computations.items():
        for one in instructions:
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


def _parse_program(text: str) -> tuple[str, dict[str, list[_Instruction]]]:
    """Returns the name of the entry, and the instructions of each computation."""
    entry, current = "", ""
    computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            computations[current] = []
            entry = current if begins[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(_Instruction(*found.groups()))
    return entry, computations


def _called_by(instruction: _Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def _trip_count(
    loop: _Instruction, around: Sequence[_Instruction], computations: _Computations
) -> int | None:
    """Returns how often a loop runs, if that is fixed.

    XLA for CPU and GPU writes it beside the loop. That for TPU does not; but its loops
    compare a counter with a constant, to which each turn adds another: 1 in scans, 2
    where a product is computed piece by piece while the pieces go round a ring both
    ways.
    """
    if told := _TRIPS.search(loop.rest):
        return int(told[1])
    names = dict(re.findall(r"(condition|body)=%?([\w.-]+)", loop.rest))
    condition = computations.get(names.get("condition", ""), ())
    tests = [one for one in condition if one.opcode == "compare"]
    if len(tests) != 1 or "direction=LT" not in tests[0].rest:
        return None
    sides = [_source(name, condition) for name in tests[0].operands]
    if len(sides) != 2 or sides[0] is None:
        return None
    bound, place = _constant(sides[1]), _element(sides[0])
    if bound is None or place is None:
        return None
    start = _constant(_field(loop, place, around)) or 0
    step = _step(computations.get(names.get("body", ""), ()), place)
    return max(0, -(-(bound - start) // step))


def _step(body: Sequence[_Instruction], place: int) -> int:
    """Returns what a turn adds to the counter; 1 where it cannot be seen."""
    turned = _field(body[-1], place, body, is_tuple=True) if body else None
    if turned is None or turned.opcode != "add":
        return 1
    amounts = [_constant(_source(name, body)) for name in turned.operands]
    return next((amount for amount in amounts if amount), 1)


def _field(
    instruction: _Instruction,
    place: int,
    around: Sequence[_Instruction],
    *,
    is_tuple: bool = False,
) -> _Instruction | None:
    """Returns what was put at a place of the tuple that is made, or that is taken."""
    made = instruction if is_tuple else None
    if made is None and instruction.operands:
        made = _source(instruction.operands[0], around)
    if made is None or made.opcode != "tuple" or place >= len(made.operands):
        return None
    return _source(made.operands[place], around)


def _source(name: str, around: Sequence[_Instruction]) -> _Instruction | None:
    """Returns the instruction of a name, or what it is a mere copy of."""
    by_name = {one.name: one for one in around}
    found = by_name.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = by_name.get(found.operands[0]) if found.operands else None
    return found


def _constant(one: _Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    number = _NUMBER.match(one.rest)
    return int(number[1]) if number else None


def _element(one: _Instruction) -> int | None:
    """Returns the place that a `get-tuple-element` takes."""
    found = re.search(r"index=(\d+)", one.rest)
    return int(found[1]) if one.opcode == "get-tuple-element" and found else None
