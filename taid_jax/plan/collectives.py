"""Collectives of a compiled program, counted as often as its loops run them."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from taid_jax.plan.program import (
    Computation,
    Part,
    called_by,
    parse_program,
    part_of,
    trip_count,
    type_bytes,
)

_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What a chip exchanges with others in one step.

    Attributes:
        count: Kind to the number of times it is run.
        bytes: Kind to the bytes of its larger side, operand or result, on one chip.
        sent: Bytes that a chip has to send over its links, with the best algorithm on a
            ring.
        sent_network: Bytes that it has to send where its links do not reach.
        parts: Part of the step to what of the two it has to send.
        endless: Loops that hold a collective and have no fixed length, counted once.
    """

    count: Mapping[str, int]
    bytes: Mapping[str, int]
    sent: float
    sent_network: float
    parts: Mapping[Part, tuple[float, float]]
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
    entry, computations = parse_program(text)
    count: collections.Counter[str] = collections.Counter()
    size: collections.Counter[str] = collections.Counter()
    sent: dict[Part, tuple[float, float]] = {}
    endless: set[str] = set()
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
                type_bytes(computation[name].type)
                for name in one.operands
                if name in computation
            )
            # An asynchronous start has its operands and buffers in its type as well.
            got = type_bytes(one.type) - (given if one.opcode.endswith("-start") else 0)
            moved = max(given, got)
            count[kind] += times
            size[kind] += times * moved
            links, network = _shares_sent(kind, one.rest, linked)
            part = part_of(one.scope)
            before = sent.get(part, (0.0, 0.0))
            moved *= times
            sent[part] = before[0] + moved * links, before[1] + moved * network
            endless |= open_loops
    by_links, by_network = (sum(part[i] for part in sent.values()) for i in (0, 1))
    return Collectives(
        dict(count), dict(size), by_links, by_network, sent, len(endless)
    )


def _runs(
    entry: str, computations: Mapping[str, Computation]
) -> Iterator[tuple[Computation, int, frozenset[str], bool]]:
    """Yields each call of a computation: it, its runs, open loops, inside a fusion."""
    stack = [(entry, 1, frozenset[str](), False)]
    holds = _holding(computations)
    while stack:
        name, times, open_loops, fused = stack.pop()
        computation = computations[name]
        yield computation, times, open_loops, fused
        for one in computation.values():
            for called in filter(holds.__contains__, called_by(one)):
                loops = one.opcode == "while"
                trips = trip_count(one, computation, computations) if loops else 1
                still_open = open_loops | ({one.name} if trips is None else set())
                runs = times * (1 if trips is None else trips)
                stack.append(
                    (called, runs, still_open, fused or one.opcode == "fusion")
                )


def _holding(computations: Mapping[str, Computation]) -> set[str]:
    """Returns the computations with a collective in them, or in one that they call."""
    callers: dict[str, set[str]] = {name: set() for name in computations}
    found = []
    for name, computation in computations.items():
        for one in computation.values():
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
