"""The source as pieces of files that are read side by side."""

import pathlib
from typing import NamedTuple

from taid_jax.data.errors import BadRecords, DataError
from taid_jax.data.manifest import SIDES, TRAIN, VALIDATION
from taid_jax.data.prepare.options import PrepareOptions
from taid_jax.data.records import Piece, cut_jsonl, cut_parquet, known_columns
from taid_jax.data.sources import find_files, hub_name, kind_of, load_hub


class SourceFile(NamedTuple):
    """A file of the source.

    Attributes:
        path: Where it lies.
        shown: What it is called in messages and in the manifest.
        side: `train` or `validation`.
    """

    path: pathlib.Path
    shown: str
    side: str


class Work(NamedTuple):
    """A piece and the side that it belongs to."""

    piece: Piece
    side: str


def list_sources(
    options: PrepareOptions, work: pathlib.Path, bad: BadRecords | None = None
) -> list[SourceFile]:
    """Returns the files that are read.

    A data set of the hub is put into the folder `work` as Parquet first, unless it lies
    there already.

    Args:
        options: What is asked for.
        work: Where data sets of the hub are put.
        bad: Told of the files that are passed over.

    Raises:
        DataError: If there are none.
    """
    bad = bad or BadRecords()
    wanted = [(TRAIN, options.data, options.split)]
    if options.validation_split or options.validation_data:
        data = options.validation_data or options.data
        wanted.append((VALIDATION, data, options.validation_split))
    files = []
    for side, data, split in wanted:
        path = pathlib.Path(data)
        if (named := hub_name(data)) is not None:
            name, split = named[0], split or named[1]
            exported = export_data_set(name, split, work / f"{side}.source.parquet")
            files.append(SourceFile(exported, f"{name}:{split or 'train'}", side))
            continue
        for file in find_files(path, split or "", bad=bad):
            # A text beside records is about them.
            if kind_of(file) != ".txt" or file == path:
                files.append(SourceFile(file, str(file), side))
            else:
                bad.skipped_files.append(str(file))
    sides = {file.path: file.side for file in files}
    if len(sides) < len(files):
        raise DataError(
            f"{next(iter(sides))} and others are both trained and validated on; give "
            "another validation_data"
        )
    return files


def export_data_set(name: str, split: str | None, path: pathlib.Path) -> pathlib.Path:
    """Returns a split of a Hugging Face data set as a Parquet file.

    Args:
        name: On the hub, or a folder that `datasets` reads.
        split: Which split; `train`, or the only one, when None.
        path: Where it is put, whole or not at all; not read again if it is there.

    Raises:
        DataError: If it cannot be read.
    """
    if path.exists():
        return path
    found = load_hub(name, split, choose="train")
    kept = known_columns(f"the data set {name}", found.column_names)
    part = path.with_name(path.name + ".partial")
    found.select_columns(kept).to_parquet(part)
    part.replace(path)
    return path


def cut_sources(files: list[SourceFile], piece_bytes: int) -> list[Work]:
    """Returns the pieces of the files, in order; the same files give the same."""
    cutters = {".jsonl": cut_jsonl, ".parquet": cut_parquet}
    return [
        Work(piece._replace(shown=file.shown), file.side)
        for side in SIDES
        for file in files
        if file.side == side
        for piece in (
            cutters[file.path.suffix.lower()](file.path, piece_bytes)
            if file.path.suffix.lower() in cutters
            else [Piece(str(file.path))]
        )
    ]
