"""Files to documents: text, records, folders, data sets of the Hub, the corpus."""

import contextlib
import os
import pathlib
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from taid_jax.data.corpus import (
    PYDOC,
    PYDOC_QUESTIONS,
    pydoc_questions,
    pydoc_sections,
)
from taid_jax.data.documents import (
    Completion,
    Document,
    Text,
    make_document,
    parse_record,
    record_name,
    unused_keys,
)
from taid_jax.data.errors import BadRecords, DataError, RecordError
from taid_jax.data.records import (
    MAX_RECORD_BYTES,
    Piece,
    Records,
    arrow_records,
    known_columns,
    read_arrow,
    read_csv,
    read_json,
    read_jsonl,
    read_parquet,
    read_whole,
)
from taid_jax.errors import explain

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""`pydoc`, `pydoc-questions`, a file, a folder, a data set of the Hub, or several."""

_RECORD_READERS: dict[str, Callable[[Piece, BadRecords, int], Records]] = {
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".arrow": read_arrow,
}
_KINDS = (".txt", *_RECORD_READERS)
_PACKED_KINDS = (".txt", ".jsonl", ".json", ".csv", ".tsv")
_SUPPORTED = f"{', '.join(_KINDS)} (all but .parquet and .arrow also as .gz)"

_ABOUT_DATA = ("dataset_info", "dataset_infos", "dataset_dict", "state", "manifest")
"""Files of JSON that say something about data beside them."""

_SPLIT = re.compile(
    r"(?:^|[^a-z0-9])(train|training|test|testing|validation|valid|val|dev|eval)"
    r"(?:[^a-z0-9]|$)"
)
_TRAIN = ("train", "training")

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?")


def read_documents(
    source: Source,
    *,
    seed: int,
    bad: BadRecords,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Document]:
    """Yields the documents of the source, in order.

    A .txt file is one document, elsewhere each record is one. A folder gives its files,
    at any depth, sorted by path: see `find_files`.

    Args:
        source: `pydoc`, `pydoc-questions`, a file, a folder, a data set of the Hub as
            `owner/name` or `owner/name:split`, or a sequence of them.
        seed: Of the documents' ranks.
        bad: Told of records that cannot be used, damaged files, and what is not used.
        max_record_bytes: Lines and rows above it are such records.

    Raises:
        DataError: If a file is missing, empty, unreadable or of a kind not supported.
    """
    single = isinstance(source, str | os.PathLike)
    for entry in [source] if single else source:
        if entry == PYDOC:
            for name, text in pydoc_sections():
                yield make_document(f"{PYDOC}, {name}", Text(text), seed)
            continue
        if entry == PYDOC_QUESTIONS:
            for name, question, answer in pydoc_questions():
                content = Completion(question, answer)
                yield make_document(f"{PYDOC_QUESTIONS}, {name}", content, seed)
            continue
        if (named := hub_name(entry)) is not None:
            records = _hub_records(*named, bad, max_record_bytes)
            yield from _documents(records, seed, bad)
            continue
        for path in find_files(pathlib.Path(entry), bad=bad):
            yield from read_piece(Piece(str(path)), seed, bad, max_record_bytes)


def describe_source(source: Source) -> str:
    """Returns the source as a message names it."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return ", ".join(str(entry) for entry in source) or "no files"


def kind_of(path: pathlib.Path) -> str | None:
    """Returns the ending that says how a file is read, None if none can read it."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last == ".gz":
        return inner if inner in _PACKED_KINDS else None
    return last if last in _KINDS else None


def find_files(
    path: pathlib.Path, prefix: str = "", *, bad: BadRecords | None = None
) -> list[pathlib.Path]:
    """Returns the file, or the files of the folder that can be read, sorted by path.

    Where files or folders are called as splits are (`train-00000.parquet`, `test/`),
    those of `train` alone are taken. Hidden files, those of other kinds and of other
    splits are passed over.

    Args:
        path: A file, or a folder whose files are found at any depth.
        prefix: What the files of a folder have to be called at the start.
        bad: Told of the files that are passed over.

    Raises:
        DataError: If there are none.
    """
    bad = bad or BadRecords()
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # A name too long, or with a NUL.
        raise DataError(f"{str(path)[:200]!r} cannot be a file: {error}") from error
    if not exists:
        raise DataError(
            f"{path} does not exist; give a file ({_SUPPORTED}), a folder of them, "
            f"OWNER/NAME of the Hugging Face hub, or `{PYDOC}` for Python's own "
            "documentation"
        )
    if not is_folder:
        if kind_of(path) is None:
            raise DataError(
                f"{path} has the ending {path.suffix or '(none)'}; supported are "
                f"{_SUPPORTED}"
            )
        if not path.is_file():
            raise DataError(f"{path} is neither a file nor a folder")
        return [path]
    files, others = [], []
    for file in sorted(path.rglob("*")):
        if not file.is_file() or not file.name.startswith(prefix):
            continue
        inner = file.relative_to(path)
        hidden = any(part.startswith(".") for part in inner.parts)
        about = file.suffix == ".json" and file.stem in _ABOUT_DATA
        readable = kind_of(file) and not hidden and not about
        (files if readable else others).append(file)
    if not files:
        start = f" and beginning with {prefix!r}" if prefix else ""
        raise DataError(
            f"the folder {path} holds no file ending in {_SUPPORTED}{start}"
        )
    splits = {file: _split_of(file.relative_to(path)) for file in files}
    train = [file for file in files if splits[file] in _TRAIN]
    if not prefix and train and set(splits.values()) - {None, *_TRAIN}:
        named = sorted({name for name in splits.values() if name} - set(_TRAIN))
        bad.notes.append(
            f"{path}: {len(train)} files of the split train are read, and none of "
            f"{', '.join(named)}"
        )
        others += [file for file in files if file not in train]
        files = train
    bad.skipped_files += [str(file) for file in sorted(others)]
    return files


def _split_of(path: pathlib.Path) -> str | None:
    """Returns the split that a file's name, or the folder's that it is in, tells."""
    for part in reversed(path.parts):
        if found := _SPLIT.search(part.lower()):
            return found[1]
    return None


def read_piece(
    piece: Piece, seed: int, bad: BadRecords, max_record_bytes: int
) -> Iterator[Document]:
    """Yields the documents of a file, or of a part of it.

    Args:
        piece: Which part.
        seed: Of the documents' ranks.
        bad: Told of records that cannot be used.
        max_record_bytes: Lines and rows above it are such records.

    Raises:
        DataError: If the file is empty or cannot be read.
    """
    path = pathlib.Path(piece.path)
    if kind_of(path) == ".txt":
        yield _read_text(path, seed)
    else:
        records = read_records(piece, bad, max_record_bytes)
        yield from _documents(records, seed, bad)


def read_records(
    piece: Piece, bad: BadRecords, max_record_bytes: int = MAX_RECORD_BYTES
) -> Records:
    """Yields where each record of a file stands, and what it holds.

    Args:
        piece: The file, or a part of it; not of text.
        bad: Told of records that cannot be used.
        max_record_bytes: Lines and rows above it are such records.

    Raises:
        DataError: If the file is empty or cannot be read.
    """
    path = pathlib.Path(piece.path)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        yield from _RECORD_READERS[kind_of(path) or ""](piece, bad, max_record_bytes)
    except RecordError as error:
        bad.report(piece.name, error)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}") from error


def _documents(records: Records, seed: int, bad: BadRecords) -> Iterator[Document]:
    """Yields what records say; those that say nothing are reported."""
    for origin, record in records:
        try:
            content = parse_record(record)
        except RecordError as error:
            bad.report(origin, error)
            continue
        known = record if isinstance(record, Mapping) else {}
        bad.unused_keys.update(unused_keys(known))
        yield make_document(origin, content, seed, record_name(known))


def _read_text(path: pathlib.Path, seed: int) -> Document:
    try:
        data = read_whole(path)
    except RecordError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); save the file as UTF-8"
        ) from error
    if not text.strip():
        size = "0 bytes" if not data else "white space only"
        raise DataError(f"{path} is empty ({size})")
    return make_document(str(path), Text(text.replace("\r\n", "\n")), seed)


def hub_name(entry: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Returns the data set of the Hub, and its split, that a source names; else None.

    What is there as a file or folder, or ends as files do, is none.
    """
    named = _HUB_NAME.fullmatch(entry) if isinstance(entry, str) else None
    if named is None or kind_of(pathlib.Path(named[0])) is not None:
        return None
    try:
        there = pathlib.Path(named[0]).exists()
    except OSError:  # A name too long for the file system.
        return None
    return None if there else (named["name"], named["split"])


def load_hub(name: str, split: str | None, *, choose: str | None = None) -> Any:
    """Returns a split of a data set, as `datasets` reads it; no code of it is run.

    Args:
        name: On the hub, or a folder that `datasets` reads.
        split: Which split; there has to be only one when None.
        choose: The split that is taken among several when none is named.

    Raises:
        DataError: If it cannot be read.
    """
    import datasets

    try:
        with _without_waiting():
            found: Any = datasets.load_dataset(name, split=split)
    # What a missing network, name or split leads to in there is open-ended.
    except Exception as error:
        raise DataError(
            f"{name} is no file or folder here, and as a data set of the Hugging Face "
            f"hub (split {split or 'not named'}) cannot be read: {explain(error)}"
        ) from error
    if isinstance(found, dict):
        if choose in found:
            return found[choose]
        if len(found) != 1:
            raise DataError(
                f"the data set {name} has the splits {', '.join(map(str, found))}; "
                "choose one by --split, or as OWNER/NAME:SPLIT"
            )
        found = next(iter(found.values()))
    return found


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """Where no network leads to the Hub, has its libraries look in their cache alone.

    They would try again for half a minute, also where the name is that of a lost file.
    """
    import huggingface_hub.constants as hub

    usual = hub.HF_HUB_OFFLINE
    try:
        if not urllib.request.getproxies():
            host = urllib.parse.urlsplit(hub.ENDPOINT).hostname
            socket.getaddrinfo(host, None)
    except OSError:
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = usual


def _hub_records(
    name: str, split: str | None, bad: BadRecords, max_record_bytes: int
) -> Records:
    found = load_hub(name, split, choose="train")
    shown = f"{name}:{found.split or split or 'all'}"
    if split is None:
        bad.notes.append(f"{name}: the split {found.split or 'all'} is read")
    columns = known_columns(shown, found.column_names, bad)
    batches = (
        batch
        for table in found.select_columns(columns).with_format("arrow").iter(256)
        for batch in table.to_batches()
    )
    return arrow_records(Piece(shown), batches, bad, max_record_bytes)
