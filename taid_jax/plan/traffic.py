"""Bytes that the kernels of a compiled program read and write."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping

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
# What XLA for GPUs calls libraries' products.
_PRODUCT = 'custom_call_target="__cublas'
# Custom calls that do nothing when the program runs.
_MARKS = ('"AllocateBuffer"', '"AssumeGatherIndicesInBound"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An instruction of a compiled program that reads or writes memory.

    Attributes:
        name: In the program.
        scope: Where in the traced program it comes from; empty when not said.
        bytes: That one run of it reads and writes.
        runs: How often loops run it; once where they have no fixed length.
        product: Whether it holds a matrix product.
    """

    name: str
    scope: str
    bytes: int
    runs: int
    product: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all runs."""
        return self.bytes * self.runs


def count_traffic(text: str) -> dict[Part, int]:
    """Returns the bytes that one device reads and writes in its memory, by part."""
    found: collections.Counter[Part] = collections.Counter()
    for kernel in list_kernels(text):
        found[part_of(kernel.scope)] += kernel.total_bytes
    return dict(found)


def list_kernels(text: str) -> list[Kernel]:
    """Returns what reads and writes memory in a program, in its order.

    Each kernel reads its operands and writes its results once: of what it only slices
    the slice, of what it updates in place the update. Of a conditional the dearest
    branch counts. Arrays that a TPU's compiler keeps within the core are not memory. A
    GPU's cache can save some of what is read soon after it was written, and kernels may
    read blocks again.

    Args:
        text: What `compiled.as_text()` gives: the program of one device.
    """
    entry, computations = parse_program(text)
    return _kernels(entry, computations, "", 1)


def _kernels(
    name: str, computations: Mapping[str, Computation], around: str, runs: int
) -> list[Kernel]:
    """Returns the kernels of a computation that an instruction of a scope calls."""
    found = []
    here = computations.get(name, {})
    for one in here.values():
        scope = one.scope or _scope_within(one, computations) or around
        times = runs
        if one.opcode == "while":
            trips = trip_count(one, here, computations)
            times *= 1 if trips is None else trips
        inner = (
            _kernels(called, computations, scope, times) for called in called_by(one)
        )
        if one.opcode == "conditional":
            found += max(inner, key=_total_bytes)
        elif one.opcode in ("while", "call", "async-start"):
            found += itertools.chain.from_iterable(inner)
        elif moved := _moved(one, here, computations):
            product = _is_product(one, computations)
            found.append(Kernel(one.name, scope, moved, runs, product))
    return found


def _total_bytes(kernels: Iterable[Kernel]) -> int:
    return sum(kernel.total_bytes for kernel in kernels)


def _is_product(one: Instruction, computations: Mapping[str, Computation]) -> bool:
    """Returns whether an instruction is a matrix product, or a fusion with one."""
    if one.opcode in ("dot", "convolution") or _PRODUCT in one.rest:
        return True
    inner = called_by(one) if one.opcode == "fusion" else []
    return any(
        _is_product(each, computations)
        for name in inner
        for each in computations.get(name, {}).values()
    )


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
