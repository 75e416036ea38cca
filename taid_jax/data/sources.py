"""Files to documents: plain text, JSON lines, Parquet, folders, the built-in corpus."""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from taid_jax.data.corpus import PYDOC, pydoc_sections
from taid_jax.data.documents import (
    EXPECTED_KEYS,
    RECORD_KEYS,
    Document,
    Text,
    make_document,
    parse_record,
)
from taid_jax.data.errors import BadRecords, DataError

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""`pydoc`, a file, a folder, or several files and folders."""

_PARQUET_ROWS = 1024
"""Rows read at a time: bounds memory, and enough to hide the cost of a read."""


def read_documents(source: Source, *, seed: int, bad: BadRecords) -> Iterator[Document]:
    """Yields the documents of the source, in order.

    A .txt file is one document. A line of a .jsonl file, or a row of a .parquet file,
    is one document. A folder gives its files with those endings, at any depth, sorted
    by path; hidden files and files with other endings are passed over.

    Args:
        source: `pydoc`, a file, a folder, or a sequence of them.
        seed: Of the documents' ranks.
        bad: Told of records that cannot be used.

    Raises:
        DataError: If a file is missing, empty, unreadable or of a kind not supported.
    """
    single = isinstance(source, str | os.PathLike)
    for entry in [source] if single else source:
        if entry == PYDOC:
            for name, text in pydoc_sections():
                yield make_document(f"{PYDOC}, {name}", Text(text), seed)
            continue
        for path in _find_files(pathlib.Path(entry)):
            yield from _read_file(path, seed, bad)


def describe_source(source: Source) -> str:
    """Returns the source as a message names it."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    return ", ".join(str(entry) for entry in source) or "no files"


def _find_files(path: pathlib.Path) -> list[pathlib.Path]:
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
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise DataError(f"the folder {path} holds no file ending in {supported}")
    return files


def _read_file(path: pathlib.Path, seed: int, bad: BadRecords) -> Iterator[Document]:
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        yield from _READERS[path.suffix.lower()](path, seed, bad)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}") from error


def _read_text(path: pathlib.Path, seed: int, bad: BadRecords) -> Iterator[Document]:
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


def _read_jsonl(path: pathlib.Path, seed: int, bad: BadRecords) -> Iterator[Document]:
    empty = True
    # Bytes, so that one line that is not UTF-8 has a number and spoils no other.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            empty = False
            origin = f"{path}, line {number}"
            try:
                content = parse_record(_parse_json(line))
            except DataError as error:
                bad.report(origin, str(error))
                continue
            yield make_document(origin, content, seed)
    if empty:
        raise DataError(f"{path} is empty (blank lines only)")


def _parse_json(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the "
            "line); save the file as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg}, column {error.colno}); a .jsonl file has one JSON "
            "object per line"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON that can be read ({error})") from error


def _read_parquet(path: pathlib.Path, seed: int, bad: BadRecords) -> Iterator[Document]:
    # Imported here: most runs read no Parquet.
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = file.schema_arrow.names
            columns = [name for name in RECORD_KEYS if name in found]
            if not columns or columns in (["prompt"], ["completion"]):
                raise DataError(
                    f"{path}: need the columns {EXPECTED_KEYS}; found "
                    f"{', '.join(f'`{name}`' for name in found) or 'none'}"
                )
            if file.metadata.num_rows == 0:
                raise DataError(f"{path} is empty (0 rows)")
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    origin = f"{path}, row {row}"
                    try:
                        content = parse_record(record)
                    except DataError as error:
                        bad.report(origin, str(error))
                        continue
                    yield make_document(origin, content, seed)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is no intact Parquet file (after row {row}): {error}"
        ) from error


_READERS: dict[str, Callable[[pathlib.Path, int, BadRecords], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
