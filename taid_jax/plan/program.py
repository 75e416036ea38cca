"""A compiled program, read from its text: computations, loops, bytes of types."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Literal

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}

_ARRAY = re.compile(r"\b([a-z]+\d+(?:e\d+m\d+\w*)?|pred)\[([\d,]*)\]")
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
_SCOPE = re.compile(r'op_name="([^"]*)"')
# `bf16[8,256]{1,0:T(8,128)(2,1)S(1)}`: memory space 1 of a TPU is within the core.
_PLACED = re.compile(_ARRAY.pattern + r"(?:\{[^}]*S\((\d+)\)\})?")
_NUMBER = re.compile(r"(\d+)\)")


Part = Literal["teacher", "student forward", "backward", "head", "optimizer"]
"""Parts of a step; what computes a layer again is backward, the rest optimizer."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program: `%name = type opcode(rest`, operands and attributes."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands; the attributes after them may name computations."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def scope(self) -> str:
        """Where in the traced program it comes from; empty when not said."""
        found = _SCOPE.search(self.rest)
        return found[1] if found else ""


NOTHING = Instruction("", "", "", "")
Computation = Mapping[str, Instruction]
"""Instructions by name, in order; the last one gives the result."""


def parse_program(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """Returns the name of the entry, and all computations."""
    entry, current = "", ""
    computations: dict[str, dict[str, Instruction]] = {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            computations[current] = {}
            entry = current if begins[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current][found[1]] = Instruction(*found.groups())
    return entry, computations


def called_by(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def trip_count(
    loop: Instruction,
    around: Computation,
    computations: Mapping[str, Computation],
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
    sides = [source(name, condition) for name in tests[0].operands]
    counter, bound = sides if len(sides) == 2 else (NOTHING, NOTHING)
    place, end = re.search(r"index=(\d+)", counter.rest), _constant(bound)
    if counter.opcode != "get-tuple-element" or place is None or end is None:
        return None
    begun = source((loop.operands or [""])[0], around)
    start = _constant(_part(begun, int(place[1]), around)) or 0
    result = [NOTHING, *body.values()][-1]
    added = _part(result, int(place[1]), body)
    amounts = [_constant(source(name, body)) for name in added.operands]
    step = next(filter(None, amounts), 1) if added.opcode == "add" else 1
    return max(0, -(-(end - start) // step))


def _part(made: Instruction, place: int, around: Computation) -> Instruction:
    """Returns what was put at a place of a tuple that is made."""
    parts = made.operands if made.opcode == "tuple" else []
    return source(parts[place], around) if place < len(parts) else NOTHING


def source(name: str, around: Computation) -> Instruction:
    """Returns the instruction of a name, or what it is a mere copy of."""
    found = around.get(name, NOTHING)
    while found.opcode in ("copy", "bitcast"):
        found = around.get((found.operands or [""])[0], NOTHING)
    return found


def _constant(one: Instruction) -> int | None:
    number = _NUMBER.match(one.rest) if one.opcode == "constant" else None
    return int(number[1]) if number else None


def type_bytes(text: str) -> int:
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


def memory_bytes(text: str) -> int:
    """Returns the bytes of the arrays in a type that lie in the device's memory."""
    return sum(
        type_bytes(found[0])
        for found in _PLACED.finditer(text)
        if found[3] in (None, "0")
    )


def part_of(scope: str) -> Part:
    """Returns the part of the step that a name scope of `train.step` belongs to.

    Args:
        scope: Such as `jit(step)/transpose(jvp(student))/while/body/dot_general`.
    """
    names = set(re.findall(r"\w+", scope))
    if "teacher" in names:
        return "teacher"
    if "head" in names:
        return "head"
    if "student" not in names:
        return "optimizer"
    # A `transpose` without a bracket is an operation.
    return "backward" if "transpose(" in scope else "student forward"
