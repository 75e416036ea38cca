"""The source as pieces of files that are read side by side."""

import pathlib
import re
from typing import Any, NamedTuple

from taid_jax.data.errors import DataError
from taid_jax.data.manifest import SIDES, TRAIN, VALIDATION
from taid_jax.data.prepare.options import PrepareOptions
from taid_jax.data.records import Piece, cut_jsonl, cut_parquet
from taid_jax.data.sources import find_files
from taid_jax.errors import how_to_install

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_COLUMNS = ("messages", "prompt", "completion", "text", "prompt_id", "id")


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


def list_sources(options: PrepareOptions, work: pathlib.Path) -> list[SourceFile]:
    """Returns the files that are read.

    A data set of the hub is put into the folder `work` as Parquet first, unless it lies
    there already.

    Raises:
        DataError: If there are none.
    """
    wanted = [(TRAIN, options.data, options.split)]
    if options.validation_split or options.validation_data:
        data = options.validation_data or options.data
        wanted.append((VALIDATION, data, options.validation_split))
    files = []
    for side, data, split in wanted:
        path = pathlib.Path(data)
        if path.exists() or not _HUB_NAME.fullmatch(data):
            files += [
                SourceFile(file, str(file), side)
                for file in find_files(path, split or "")
                if file.suffix != ".txt" or file == path
            ]
        else:
            exported = export_data_set(data, split, work / f"{side}.source.parquet")
            files.append(SourceFile(exported, f"{data}:{split or 'all'}", side))
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
        split: Which split; there has to be only one when None.
        path: Where it is put, whole or not at all; not read again if it is there.

    Raises:
        DataError: If `datasets` is not installed, or cannot read it.
    """
    if path.exists():
        return path
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} is no file or folder here; to read it as a data set of the "
            "Hugging Face hub, the package `datasets` is needed: "
            f"{how_to_install('data')}"
        ) from error
    try:
        found: Any = datasets.load_dataset(name, split=split)
    # What a missing network, name or split leads to in there is open-ended.
    except Exception as error:
        raise DataError(
            f"the data set {name} (split {split}) cannot be read: {error}"
        ) from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise DataError(
                f"the data set {name} has the splits {', '.join(map(str, found))}; "
                "choose one by --split"
            )
        found = next(iter(found.values()))
    kept = [column for column in _COLUMNS if column in found.column_names]
    if not kept:
        raise DataError(
            f"the data set {name} has the columns {', '.join(found.column_names)}; "
            "need `messages`, or `prompt` and `completion`, or `text`"
        )
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
