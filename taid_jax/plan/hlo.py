"""Reading the text of a compiled program: computations, calls, lengths of loops."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

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
class Instruction:
    """A line of a program: `%name = type opcode(rest`."""

    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands; the attributes after them may name computations."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])


Computations = Mapping[str, Sequence[Instruction]]


def parse_program(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """Returns the name of the entry, and the instructions of each computation."""
    entry, current = "", ""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = begins[2]
            computations[current] = []
            entry = current if begins[1] else entry
        elif current and (found := _INSTRUCTION.match(line)):
            computations[current].append(Instruction(*found.groups()))
    return entry, computations


def called_by(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = _CALLED.findall(instruction.rest)
    for branches in _BRANCHES.findall(instruction.rest):
        names += re.findall(r"%?([\w.-]+)", branches)
    return names


def trip_count(
    loop: Instruction, around: Sequence[Instruction], computations: Computations
) -> int | None:
    """Returns how often a loop runs, if that is fixed.

    XLA for CPU and GPU writes it beside the loop. That for TPU does not; but its loops
    compare a counter with a constant, to which each turn adds another: 1 in scans, 2
    where a product is computed piece by piece while the pieces go round a ring both
    ways.

    Args:
        loop: The `while`.
        around: The computation that it stands in.
        computations: All of the program.
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


def _step(body: Sequence[Instruction], place: int) -> int:
    """Returns what a turn adds to the counter; 1 where it cannot be seen."""
    turned = _field(body[-1], place, body, is_tuple=True) if body else None
    if turned is None or turned.opcode != "add":
        return 1
    amounts = [_constant(_source(name, body)) for name in turned.operands]
    return next((amount for amount in amounts if amount), 1)


def _field(
    instruction: Instruction,
    place: int,
    around: Sequence[Instruction],
    *,
    is_tuple: bool = False,
) -> Instruction | None:
    """Returns what was put at a place of the tuple that is made, or that is taken."""
    made = instruction if is_tuple else None
    if made is None and instruction.operands:
        made = _source(instruction.operands[0], around)
    if made is None or made.opcode != "tuple" or place >= len(made.operands):
        return None
    return _source(made.operands[place], around)


def _source(name: str, around: Sequence[Instruction]) -> Instruction | None:
    """Returns the instruction of a name, or what it is a mere copy of."""
    by_name = {one.name: one for one in around}
    found = by_name.get(name)
    while found is not None and found.opcode in ("copy", "bitcast"):
        found = by_name.get(found.operands[0]) if found.operands else None
    return found


def _constant(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    number = _NUMBER.match(one.rest)
    return int(number[1]) if number else None


def _element(one: Instruction) -> int | None:
    """Returns the place that a `get-tuple-element` takes."""
    found = re.search(r"index=(\d+)", one.rest)
    return int(found[1]) if one.opcode == "get-tuple-element" and found else None
