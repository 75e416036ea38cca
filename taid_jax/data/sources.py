"""What is read: files of a folder, data sets of the Hub, Python's documentation."""

import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from taid_jax.data.corpus import (
    PYDOC,
    PYDOC_QUESTIONS,
    pydoc_questions,
    pydoc_sections,
)
from taid_jax.data.errors import DataError
from taid_jax.data.options import MAX_RECORD_BYTES
from taid_jax.data.records import (
    SUPPORTED,
    Records,
    kind_of,
    known_columns,
    read_file,
    table_records,
)
from taid_jax.errors import explain

Names = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""`pydoc`, `pydoc-questions`, a file, a folder, a data set of the Hub, or several."""

_ABOUT_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "manifest")
"""Files of JSON that say something about data beside them."""

_SPLIT = re.compile(
    r"(?:^|[^a-z0-9])(train|training|test|testing|validation|valid|val|dev|eval)"
    r"(?:[^a-z0-9]|$)"
)
_TRAIN = ("train", "training")

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")


class Source(NamedTuple):
    """What names of files, folders and data sets stand for; found once.

    Attributes:
        shown: As messages name it.
        entries: Files, names of the built-in corpus, and (name, data set of the Hub).
        skipped_files: The files of folders that are passed over.
        notes: What else is to be said, such as which split is taken.
    """

    shown: str
    entries: list[pathlib.Path | str | tuple[str, Any]]
    skipped_files: list[str]
    notes: list[str]


def find_source(names: Names, split: str | None = None) -> Source:
    """Returns what is read for a name, or for several.

    Args:
        names: `pydoc`, `pydoc-questions`, a file, a folder (all that can be read of it,
            at any depth, sorted by path), a data set of the Hub as `owner/name` or
            `owner/name:split`, or a sequence of them.
        split: Split of a data set; of a folder, how its files' names begin.

    Raises:
        DataError: If something is missing or of a kind that is not supported.
    """
    several = [names] if isinstance(names, str | os.PathLike) else names
    source = Source(", ".join(map(str, several)) or "no files", [], [], [])
    for name in several:
        if name in (PYDOC, PYDOC_QUESTIONS):
            source.entries.append(str(name))
        elif hub := _hub_name(name):
            wanted = split or hub[1]
            found = _load_hub(hub[0], wanted)
            taken = found.split or wanted or "all"
            if wanted is None:
                source.notes.append(f"{hub[0]}: the split {taken} is read")
            source.entries.append((f"{hub[0]}:{taken}", found))
        else:
            _find_files(pathlib.Path(name), split or "", source)
    return source


def read_source(
    source: Source,
    max_record_bytes: int = MAX_RECORD_BYTES,
    *,
    also: Sequence[str] = (),
) -> Records:
    """Yields where each record stands and what it holds, in order.

    Args:
        source: From `find_source`.
        max_record_bytes: Records above it are handed on as errors, unread.
        also: Columns of tables that are read beside those that say what a record is.

    Raises:
        DataError: If a file is empty or cannot be read.
    """
    for entry in source.entries:
        if isinstance(entry, pathlib.Path):
            yield from read_file(entry, max_record_bytes, also=also)
        elif isinstance(entry, tuple):
            name, found = entry
            columns = known_columns(found.column_names, also)
            tables = found.select_columns(columns).with_format("arrow").iter(256)
            batches = (batch for table in tables for batch in table.to_batches())
            rows = table_records(batches, found.column_names, max_record_bytes)
            yield from ((f"{name}, row {number}", record) for number, record in rows)
        elif entry == PYDOC:
            for name, text in pydoc_sections():
                yield f"{PYDOC}, {name}", {"text": text}
        else:
            for name, prompt, answer in pydoc_questions():
                record = {"prompt": prompt, "completion": answer}
                yield f"{PYDOC_QUESTIONS}, {name}", record


def _find_files(path: pathlib.Path, prefix: str, source: Source) -> None:
    """Adds the file, or the files of the folder that can be read, sorted by path.

    Where files or folders are called as splits are (`train-00000.parquet`, `test/`),
    those of `train` alone are taken. Hidden files, those of other kinds and of other
    splits are passed over.
    """
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # A name too long, or with a NUL.
        raise DataError(f"{str(path)[:200]!r} cannot be a file: {error}") from error
    if not exists:
        raise DataError(
            f"{path} does not exist; give a file ({SUPPORTED}), a folder of them, "
            f"OWNER/NAME of the Hugging Face hub, or `{PYDOC}` for Python's own "
            "documentation"
        )
    if not is_folder:
        if kind_of(path) is None:
            raise DataError(
                f"{path} has the ending {path.suffix or '(none)'}; supported are "
                f"{SUPPORTED}"
            )
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder")
        source.entries.append(path)
        return
    files, others = [], []
    for file in sorted(path.rglob("*")):
        if not file.is_file() or not file.name.startswith(prefix):
            continue
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        about = file.suffix == ".json" and file.stem in _ABOUT_DATA
        readable = kind_of(file) and not hidden and not about
        (files if readable else others).append(file)
    if not files:
        start = f" and beginning with {prefix!r}" if prefix else ""
        raise DataError(f"the folder {path} holds no file ending in {SUPPORTED}{start}")
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    train = [file for file in files if splits[file] in _TRAIN]
    left = {name for name in splits.values() if name} - {*_TRAIN}
    if not prefix and train and left:
        source.notes.append(
            f"{path}: {len(train)} files of the split train are read, and none of "
            f"{', '.join(sorted(left))}"
        )
        others += [file for file in files if file not in train]
        files = train
    source.entries.extend(files)
    source.skipped_files.extend(map(str, sorted(others)))


def _split_of(path: pathlib.Path) -> str | None:
    """Returns the split that a file's name, or the folder's that it is in, tells."""
    found: Iterator[Any] = (_SPLIT.search(part.lower()) for part in path.parts[::-1])
    return next((match[1] for match in found if match), None)


def _hub_name(name: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Returns the data set of the Hub that a name stands for, and its split; or None.

    What is there as a file or folder, or ends as files do, is none.
    """
    named = _HUB_NAME.fullmatch(name) if isinstance(name, str) else None
    if named is None or kind_of(pathlib.Path(named[0])) is not None:
        return None
    try:
        there = pathlib.Path(named[0]).exists()
    except OSError:  # A name too long for the file system.
        return None
    return None if there else (named["name"], named["split"])


def _load_hub(name: str, split: str | None) -> Any:
    """Returns a split of a data set, as `datasets` reads it; no code of it is run.

    Where no split is named it is `train`, or the only one.
    """
    import datasets

    try:
        found: Any = datasets.load_dataset(name, split=split)
    # What a missing network, name or split leads to in there is open-ended.
    except Exception as error:
        raise DataError(
            f"{name} is no file or folder here, and as a data set of the Hugging Face "
            f"hub (split {split or 'not named'}) cannot be read: {explain(error)}"
        ) from error
    if not isinstance(found, dict):
        return found
    if "train" not in found and len(found) > 1:
        raise DataError(
            f"the data set {name} has the splits {', '.join(map(str, found))}; "
            "choose one by --split, or as OWNER/NAME:SPLIT"
        )
    return found.get("train") or next(iter(found.values()))
