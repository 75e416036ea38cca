"""Which examples share a row."""

import bisect
from collections.abc import Sequence

Rows = list[tuple[int, ...]]
"""The examples of every row, by their numbers."""


def pack_rows(lengths: Sequence[int], capacity: int) -> Rows:
    """Returns rows that hold every example once, whole, in few rows.

    Best-fit decreasing: the longest first, each into the fullest row that still has
    room for it. (First-fit takes the first row with room; taking the fullest needs no
    search through the rows, only through the distinct amounts of room left.) The same
    lengths always give the same rows.

    Args:
        lengths: Tokens of every example, from 1 to `capacity`.
        capacity: Tokens of a row.

    Returns:
        Rows in the order of their lowest-numbered example, examples in rising order.

    Raises:
        ValueError: If an example does not fit into a row.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> the rows that have it
    rooms: list[int] = []  # the keys of by_room, rising
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for example in longest_first:
        length = lengths[example]
        if not 1 <= length <= capacity:
            raise ValueError(
                f"need examples of 1 to {capacity} tokens, got {length} in {example}"
            )
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        rows[row].append(example)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(row)
    return sorted(tuple(sorted(row)) for row in rows)
