"""Slices of parts to one shard."""

import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet

from taid_jax.data.manifest import ShardFile
from taid_jax.data.prepare.choose import CODES, Slice
from taid_jax.data.prepare.encode import PART_ROWS, part_path
from taid_jax.data.shards import SHARD_SCHEMA, parquet_bytes
from taid_jax.files import write_whole


def side_path(work: pathlib.Path, part: int) -> pathlib.Path:
    """Returns where it is noted on which side a part's rows are."""
    return work / f"side-{part:05}.npy"


def write_shard(
    work: pathlib.Path,
    output: pathlib.Path,
    side: str,
    name: str,
    slices: Sequence[Slice],
) -> ShardFile:
    """Writes a shard unless it is finished, and returns what is known of it.

    Args:
        work: Folder of the parts.
        output: Folder of the shards.
        side: Which rows are taken.
        name: Of the shard.
        slices: Where its rows are.
    """
    note = work / f"{name}.json"
    if note.exists():
        file = ShardFile(**json.loads(note.read_text(encoding="utf-8")))
        path = output / name
        if path.exists() and path.stat().st_size == file.bytes:
            return file
    tables = [_rows(work, side, piece) for piece in slices]
    table = pyarrow.concat_tables(tables)
    order = np.argsort(table["key"].to_numpy(), kind="stable")
    table = table.select([*SHARD_SCHEMA.names, "tokens"]).take(order)
    data = parquet_bytes(table.select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA))
    file = ShardFile(
        name=name,
        side=side,
        examples=len(table),
        tokens=int(table["tokens"].to_numpy().sum()),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    write_whole(output / name, data)
    write_whole(note, json.dumps(file.__dict__).encode())
    return file


def _rows(work: pathlib.Path, side: str, piece: Slice) -> pyarrow.Table:
    """Returns a slice's rows that are on the side."""
    first = piece.start // PART_ROWS
    groups = range(first, -(-piece.stop // PART_ROWS))
    columns = ["key", "tokens", *SHARD_SCHEMA.names]
    with pyarrow.parquet.ParquetFile(part_path(work, piece.part)) as file:
        table = file.read_row_groups(list(groups), columns=columns)
    before = first * PART_ROWS
    table = table.slice(piece.start - before, piece.stop - piece.start)
    sides = np.load(side_path(work, piece.part), allow_pickle=False)
    return table.filter(pyarrow.array(sides[piece.start : piece.stop] == CODES[side]))
