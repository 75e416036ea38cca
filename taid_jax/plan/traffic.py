"""Bytes that the kernels of a compiled program read and write."""

import collections
from collections.abc import Mapping

from taid_jax.plan.program import (
    NOTHING,
    Computation,
    Instruction,
    Part,
    called_by,
    memory_bytes,
    parse_program,
    part_of,
    trip_count,
    type_bytes,
)

_FREE = (
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Custom calls that do nothing when the program runs.
_MARKS = ('"AllocateBuffer"', '"AssumeGatherIndicesInBound"')


def count_traffic(text: str) -> dict[Part, int]:
    """Returns the bytes that one device reads and writes in its memory, by part.

    Each kernel reads its operands and writes its results once: of what it only slices
    the slice, of what it updates in place the update. Loops count as often as they run
    (once without a fixed length), a conditional by its dearest branch. Arrays that a
    TPU's compiler keeps within the core are not memory. A GPU's cache can save some of
    what is read soon after it was written, and kernels may read blocks again.

    Args:
        text: What `compiled.as_text()` gives: the program of one device.
    """
    entry, computations = parse_program(text)
    return dict(_traffic(entry, computations, ""))


def _traffic(
    name: str, computations: Mapping[str, Computation], around: str
) -> collections.Counter[Part]:
    """Returns the traffic of a computation that an instruction of a scope calls."""
    found: collections.Counter[Part] = collections.Counter()
    here = computations.get(name, {})
    for one in here.values():
        scope = one.scope or _scope_within(one, computations) or around
        inner = (_traffic(called, computations, scope) for called in called_by(one))
        if one.opcode == "while":
            times = trip_count(one, here, computations)
            for part, size in sum(inner, collections.Counter()).items():
                found[part] += size * (1 if times is None else times)
        elif one.opcode == "conditional":
            found += max(inner, key=collections.Counter.total)
        elif one.opcode in ("call", "async-start"):
            found += sum(inner, collections.Counter())
        else:
            found[part_of(scope)] += _moved(one, here, computations)
    return found


def _scope_within(one: Instruction, computations: Mapping[str, Computation]) -> str:
    """Returns the scope of the last instruction of a fusion that has one."""
    called = called_by(one) if one.opcode == "fusion" else []
    inner = computations.get(next(iter(called), ""), {})
    return next((each.scope for each in reversed([*inner.values()]) if each.scope), "")


def _moved(
    one: Instruction, here: Computation, computations: Mapping[str, Computation]
) -> int:
    """Returns the bytes that one instruction outside of fusions moves."""
    opcode = one.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    operands = [here.get(name, NOTHING) for name in one.operands]
    given = sum(memory_bytes(operand.type) for operand in operands)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return memory_bytes(one.type)  # It names operands and results.
    if opcode in _SLICES:
        return _placed(operands[0], type_bytes(one.type)) + memory_bytes(one.type)
    if opcode == "dynamic-update-slice":
        return memory_bytes(operands[1].type) + _placed(
            one, type_bytes(operands[1].type)
        )
    if opcode == "scatter":
        # What is added to is read, and written.
        return 3 * memory_bytes(operands[-1].type)
    if opcode == "custom-call" and any(mark in one.rest for mark in _MARKS):
        return 0
    if opcode != "fusion":
        return given + memory_bytes(one.type)
    fused = computations.get(next(iter(called_by(one)), ""), {})
    read = sum(
        _placed(
            operand, min(type_bytes(operand.type), _read(fused, place, computations))
        )
        for place, operand in enumerate(operands)
    )
    return read + min(memory_bytes(one.type), _written(fused, computations))


def _placed(one: Instruction, size: int) -> int:
    """Returns the size when an instruction's array lies in memory, or 0."""
    return size if memory_bytes(one.type) else 0


def _read(
    fused: Computation, place: int, computations: Mapping[str, Computation]
) -> int:
    """Returns the bytes that a fusion reads of its operand at a place."""
    start = f"{place})"
    found = [
        one
        for one in fused.values()
        if one.opcode == "parameter" and one.rest.startswith(start)
    ]
    return sum(_read_by_users(one, fused, computations) for one in found)


def _read_by_users(
    value: Instruction, fused: Computation, computations: Mapping[str, Computation]
) -> int:
    whole, read = type_bytes(value.type), 0
    for user in fused.values():
        places = [i for i, name in enumerate(user.operands) if name == value.name]
        if not places:
            continue
        if user.opcode == "bitcast":
            read += _read_by_users(user, fused, computations)
        elif user.opcode in _SLICES and places == [0]:
            read += type_bytes(user.type)
        elif user.opcode == "dynamic-update-slice" and places == [0]:
            pass  # It is updated in place: nothing of it is read.
        elif user.opcode == "fusion":
            inner = computations.get(next(iter(called_by(user)), ""), {})
            read += sum(_read(inner, place, computations) for place in places)
        else:
            return whole
    return min(whole, read)


def _written(fused: Computation, computations: Mapping[str, Computation]) -> int:
    """Returns the bytes that a fusion writes, which may lie within the core."""
    roots = [[NOTHING, *fused.values()][-1]]
    size = 0
    while roots:
        root = roots.pop()
        if root.opcode in ("tuple", "bitcast"):
            roots += [fused.get(name, NOTHING) for name in root.operands]
        elif root.opcode == "dynamic-update-slice":
            size += type_bytes(fused.get(root.operands[1], NOTHING).type)
        elif root.opcode == "fusion":
            inner = computations.get(next(iter(called_by(root)), ""), {})
            size += _written(inner, computations)
        else:
            size += type_bytes(root.type)
    return size
