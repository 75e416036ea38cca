"""Which examples are kept, on which side, and how they are shared out into shards."""

import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
from jaxtyping import Bool, Float64, Int64, UInt8, UInt64

from taid_jax.data.errors import DataError, Problem
from taid_jax.data.manifest import TRAIN, VALIDATION
from taid_jax.data.prepare.encode import part_path
from taid_jax.data.prepare.options import PrepareOptions
from taid_jax.data.split import hold_out

LEFT_OUT, ON_TRAIN, ON_VALIDATION = 0, 1, 2
CODES = {TRAIN: ON_TRAIN, VALIDATION: ON_VALIDATION}


class Rows(NamedTuple):
    """The rows of all parts, part after part, without their tokens.

    Attributes:
        part: Number of the part.
        key: Place in the shuffle; rising in a part.
        document: Number of the document in its piece.
        rank: Of the document: low ranks are held out.
        name: Hash of what the record is called, 0 without.
        copy: Hash of that and of all it says.
        tokens: Of the example.
    """

    part: Int64[np.ndarray, " rows"]
    key: UInt64[np.ndarray, " rows"]
    document: Int64[np.ndarray, " rows"]
    rank: Float64[np.ndarray, " rows"]
    name: UInt64[np.ndarray, " rows"]
    copy: UInt64[np.ndarray, " rows"]
    tokens: Int64[np.ndarray, " rows"]


class Choice(NamedTuple):
    """What becomes of the rows.

    Attributes:
        side: `(rows,)` uint8: left out, trained on or validated on.
        left_out: How many documents were left out here, by reason.
        noted: How many were kept though there is something to say, by reason.
        problems: Each of those left out or noted, but for those beyond the limit.
    """

    side: UInt8[np.ndarray, " rows"]
    left_out: Counter[str]
    noted: Counter[str]
    problems: list[Problem]


def read_rows(folder: pathlib.Path, parts: int) -> Rows:
    """Returns the rows of the parts in the folder."""
    names = [name for name in Rows._fields if name != "part"]
    tables = [
        pyarrow.parquet.read_table(part_path(folder, number), columns=names)
        for number in range(parts)
    ]
    lengths = [len(table) for table in tables]
    columns = {
        name: np.concatenate([table[name].to_numpy() for table in tables])
        for name in names
    }
    return Rows(part=np.repeat(np.arange(parts), lengths), **columns)


def choose(
    rows: Rows, sides: Sequence[str], options: PrepareOptions, folder: pathlib.Path
) -> Choice:
    """Returns what becomes of the rows.

    A record that says the same under the same name as one before it is left out. One
    that says something else under a name that was there before is kept and noted:
    UltraChat calls a conversation by its prompt. A prompt that is trained and validated
    on is noted too.

    Args:
        rows: All that fit.
        sides: Of every part.
        options: What is asked for.
        folder: Where the parts lie.

    Raises:
        DataError: If nothing is left to train on, or none of what is validated on.
    """
    left_out: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    order = np.lexsort([rows.document, rows.part])
    copies = _again(rows.copy, rows, order)
    renamed = _again(rows.name, rows, order) & ~copies
    given = np.array([CODES[side] for side in sides], np.uint8)[rows.part]
    side = np.where(copies, np.uint8(LEFT_OUT), given)
    if VALIDATION not in sides and options.held_out_fraction and len(rows.part):
        kept = np.flatnonzero(side)
        held_out = hold_out(
            rows.rank[kept], rows.tokens[kept], options.held_out_fraction, options.data
        )
        side[kept[held_out]] = ON_VALIDATION
    if (limit := options.validation_limit) is not None:
        found = np.flatnonzero(side == ON_VALIDATION)
        beyond = found[np.argsort(rows.key[found], kind="stable")][limit:]
        side[beyond] = LEFT_OUT
        if len(beyond):
            left_out["beyond_limit"] = len(beyond)
    trained = np.unique(rows.rank[side == ON_TRAIN])
    shared = (side == ON_VALIDATION) & np.isin(rows.rank, trained)
    problems = []
    for which, reason, count, message in (
        (copies, "copy", left_out, "says the same under the same name as one before"),
        (renamed, "same_name", noted, "has the name of one before; kept"),
        (
            shared,
            "prompt_on_both_sides",
            noted,
            "is validated on; its prompt is trained on too; kept",
        ),
    ):
        places = _first_windows(rows, which)
        if len(places):
            count[reason] = len(places)
            origins = _origins(rows, places, folder)
            problems += [Problem(origin, reason, message) for origin in origins]
    return Choice(side, left_out, noted, problems)


def _again(
    hashes: UInt64[np.ndarray, " rows"], rows: Rows, order: np.ndarray
) -> Bool[np.ndarray, " rows"]:
    """Returns which rows have the hash of a document before theirs, 0 left aside."""
    values, first, place = np.unique(
        hashes[order], return_index=True, return_inverse=True
    )
    first = order[first][place]
    again = np.zeros(len(order), np.bool_)
    same = (rows.part[first] == rows.part[order]) & (
        rows.document[first] == rows.document[order]
    )
    again[order] = (values[place] != 0) & ~same
    return again


def _first_windows(rows: Rows, which: Bool[np.ndarray, " rows"]) -> np.ndarray:
    """Returns one row of every document that has any, in the order of the source."""
    places = np.flatnonzero(which)
    if not len(places):
        return places
    documents = np.stack([rows.part[places], rows.document[places]])
    _, first = np.unique(documents, axis=1, return_index=True)
    return places[first]


def _origins(rows: Rows, places: np.ndarray, folder: pathlib.Path) -> list[str]:
    """Returns where the rows' records stand, in their order."""
    found = []
    starts = np.searchsorted(rows.part, np.arange(rows.part.max(initial=0) + 1))
    for part in np.unique(rows.part[places]).tolist():
        column = pyarrow.parquet.read_table(part_path(folder, part), columns=["origin"])
        inside = places[rows.part[places] == part] - starts[part]
        found += column["origin"].take(inside).to_pylist()
    return found


class Slice(NamedTuple):
    """Rows `start` to `stop` of a part, the last not included."""

    part: int
    start: int
    stop: int


def share_out(rows: Rows, chosen: np.ndarray, shard_tokens: int) -> list[list[Slice]]:
    """Returns the slices of the parts that every shard of one side takes rows from.

    Args:
        rows: All rows.
        chosen: `(rows,)` bool, those of the side.
        shard_tokens: Tokens of a shard, about.
    """
    order = np.flatnonzero(chosen)
    if not len(order):
        return []
    order = order[np.argsort(rows.key[order], kind="stable")]
    done = np.cumsum(rows.tokens[order])
    shards = -(-int(done[-1]) // shard_tokens)
    # As many tokens in each: the shuffle is cut where their sum passes a border.
    borders = np.searchsorted(done, np.arange(1, shards) * done[-1] / shards)
    bounds = rows.key[order][borders]
    parts = rows.part.max(initial=-1) + 1
    edges = np.searchsorted(rows.part, np.arange(parts + 1))
    found = []
    for shard in range(shards):
        slices = []
        for part in range(parts):
            keys = rows.key[edges[part] : edges[part + 1]]
            start = np.searchsorted(keys, bounds[shard - 1]) if shard else 0
            last = shard == shards - 1
            stop = len(keys) if last else np.searchsorted(keys, bounds[shard])
            if start < stop:
                slices.append(Slice(part, int(start), int(stop)))
        found.append(slices)
    return found


def nothing_left(data: str, left_out: Counter[str], shortest: int | None) -> DataError:
    """Returns the error of a source without a usable record."""
    counts = ", ".join(f"{reason}: {count}" for reason, count in left_out.items())
    message = f"{data}: no example is left to train on ({counts or 'no records'})"
    if shortest is not None:
        message += f"; the shortest conversation that is too long has {shortest} tokens"
    return DataError(message)
