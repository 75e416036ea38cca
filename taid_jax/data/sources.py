"""Files to documents: plain text, JSON lines, Parquet, folders, the built-in corpus."""

import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from taid_jax.data.corpus import (
    PYDOC,
    PYDOC_QUESTIONS,
    pydoc_questions,
    pydoc_sections,
)
from taid_jax.data.documents import Completion, Document, Text, make_document
from taid_jax.data.errors import BadRecords, DataError, RecordError
from taid_jax.data.records import MAX_RECORD_BYTES, Piece, read_jsonl, read_parquet

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""`pydoc`, `pydoc-questions`, a file, a folder, or several files and folders."""


def read_documents(
    source: Source,
    *,
    seed: int,
    bad: BadRecords,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> Iterator[Document]:
    """Yields the documents of the source, in order.

    A .txt file is one document. A line of a .jsonl file, or a row of a .parquet file,
    is one document. A folder gives its files with those endings, at any depth, sorted
    by path; hidden files and files with other endings are passed over.

    Args:
        source: `pydoc`, `pydoc-questions`, a file, a folder, or a sequence of them.
        seed: Of the documents' ranks.
        bad: Told of records that cannot be used, and of damaged Parquet files.
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
        for path in find_files(pathlib.Path(entry)):
            yield from read_piece(Piece(str(path)), seed, bad, max_record_bytes)


def describe_source(source: Source) -> str:
    """Returns the source as a message names it."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return ", ".join(str(entry) for entry in source) or "no files"


def find_files(path: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Returns the file, or the files of the folder that can be read, sorted by path.

    Args:
        path: A file, or a folder whose files are found at any depth.
        prefix: What the files of a folder have to be called at the start.

    Raises:
        DataError: If there are none.
    """
    supported = ", ".join(_READERS)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; give a {supported} file, a folder of them, or "
            f"`{PYDOC}` for Python's own documentation"
        )
    if not path.is_dir():
        if path.suffix.lower() not in _READERS:
            raise DataError(
                f"{path} has the ending {path.suffix or '(none)'}; supported are "
                f"{supported}"
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in _READERS
        and file.name.startswith(prefix)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        start = f" and beginning with {prefix!r}" if prefix else ""
        raise DataError(f"the folder {path} holds no file ending in {supported}{start}")
    return files


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
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        yield from _READERS[path.suffix.lower()](piece, seed, bad, max_record_bytes)
    except RecordError as error:
        bad.report(piece.name, error)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}") from error


def _read_text(
    piece: Piece, seed: int, bad: BadRecords, max_record_bytes: int
) -> Iterator[Document]:
    path = pathlib.Path(piece.path)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x} at offset "
            f"{error.start}); save the file as UTF-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty (white space only)")
    yield make_document(str(path), Text(text.replace("\r\n", "\n")), seed)


_READERS: dict[str, Callable[[Piece, int, BadRecords, int], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
