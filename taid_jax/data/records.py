"""Lines of JSON and rows of Parquet to documents, and files cut into pieces."""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, TYPE_CHECKING, NamedTuple

from taid_jax.data.documents import (
    EXPECTED_KEYS,
    ID_KEYS,
    RECORD_KEYS,
    Document,
    make_document,
    parse_record,
    record_name,
)
from taid_jax.data.errors import BadRecords, DataError, RecordError

if TYPE_CHECKING:
    import pyarrow

MAX_RECORD_BYTES = 4_000_000
"""A record above it is no conversation that a model could be trained on, and would hold
up the tokenizer: 4 MB are about a million tokens."""

_PARQUET_ROWS = 1024
"""Rows read at a time: bounds memory, and enough to hide the cost of a read."""


_BLOCK = 1 << 20
"""Bytes read at a time where only lines are looked for."""


class Piece(NamedTuple):
    """A file, or a part of one that can be read alone.

    Attributes:
        path: The file.
        start: First byte of JSON lines, first row group of Parquet.
        stop: The one after the last; the end of the file when None.
        first: Number of its first line or row, from 1.
        shown: What the file is called in messages; its path when empty.
    """

    path: str
    start: int = 0
    stop: int | None = None
    first: int = 1
    shown: str = ""

    @property
    def name(self) -> str:
        """What the file is called in messages."""
        return self.shown or self.path


def cut_jsonl(path: pathlib.Path, size: int) -> list[Piece]:
    """Returns pieces of about `size` bytes that end with a line.

    The same file gives the same pieces. It is read once, to count lines.
    """
    end = path.stat().st_size
    pieces, start, first = [], 0, 1
    with path.open("rb") as file:
        while start < end:
            file.seek(min(start + size, end) - 1)
            _pass_line(file)
            stop = file.tell()
            pieces.append(Piece(str(path), start, stop, first))
            file.seek(start)
            left = stop - start
            while block := file.read(min(_BLOCK, left)):
                first += block.count(b"\n")
                left -= len(block)
            start = stop
    # The reader says that it is empty.
    return pieces or [Piece(str(path))]


def cut_parquet(path: pathlib.Path, size: int) -> list[Piece]:
    """Returns pieces of row groups of about `size` bytes, at least one group each.

    A file that cannot be read is one piece, whose reader says what is wrong.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException:
        return [Piece(str(path))]
    pieces, start, first, rows, bytes_ = [], 0, 1, 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        bytes_ += metadata.row_group(group).total_byte_size
        if bytes_ >= size or group == metadata.num_row_groups - 1:
            pieces.append(Piece(str(path), start, group + 1, first))
            start, first, rows, bytes_ = group + 1, first + rows, 0, 0
    return pieces or [Piece(str(path))]


def read_jsonl(
    piece: Piece, seed: int, bad: BadRecords, max_record_bytes: int
) -> Iterator[Document]:
    """Yields the documents of a file of JSON lines, or of a part of it.

    Raises:
        DataError: If the whole file has only blank lines.
    """
    empty = piece.start == 0 and piece.stop is None
    # Bytes, so that one line that is not UTF-8 has a number and spoils no other.
    with pathlib.Path(piece.path).open("rb") as file:
        file.seek(piece.start)
        number = piece.first - 1
        while piece.stop is None or file.tell() < piece.stop:
            line = file.readline(max_record_bytes + 1)
            if not line:
                break
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            empty = False
            origin = f"{piece.name}, line {number}"
            try:
                if len(line) > max_record_bytes and not line.endswith(b"\n"):
                    raise _too_large(len(line) + _pass_line(file), max_record_bytes)
                yield _document(origin, _parse_json(line), seed)
            except RecordError as error:
                bad.report(origin, error)
    if empty:
        raise DataError(f"{piece.name} is empty (blank lines only)")


def _pass_line(file: IO[bytes]) -> int:
    """Goes on to the next line and returns the bytes that it passed over."""
    passed = 0
    while block := file.readline(_BLOCK):
        passed += len(block)
        if block.endswith(b"\n"):
            break
    return passed


def _too_large(size: int, limit: int) -> RecordError:
    return RecordError(
        "too_large",
        f"a record of {size:,} bytes; the limit is {limit:,}: split it into several",
    )


def _document(origin: str, record: object, seed: int) -> Document:
    content = parse_record(record)
    name = record_name(record) if isinstance(record, Mapping) else None
    return make_document(origin, content, seed, name)


def _parse_json(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RecordError(
            "not_utf8",
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the "
            "line); save the file as UTF-8",
        ) from error
    except json.JSONDecodeError as error:
        raise RecordError(
            "not_json",
            f"not JSON ({error.msg}, column {error.colno}); a .jsonl file has one JSON "
            "object per line",
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", f"not JSON that can be read ({error})") from error


def read_parquet(
    piece: Piece, seed: int, bad: BadRecords, max_record_bytes: int
) -> Iterator[Document]:
    """Yields the documents of a Parquet file, or of some of its row groups.

    Raises:
        DataError: If the file has no rows, or none of the columns.
        RecordError: If the file is damaged.
    """
    # Imported here: most runs read no Parquet.
    import pyarrow
    import pyarrow.parquet

    row = piece.first - 1
    try:
        with pyarrow.parquet.ParquetFile(piece.path) as file:
            found = file.schema_arrow.names
            known = [name for name in RECORD_KEYS if name in found]
            if not known or known in (["prompt"], ["completion"]):
                raise DataError(
                    f"{piece.name}: need the columns {EXPECTED_KEYS}; found "
                    f"{', '.join(f'`{name}`' for name in found) or 'none'}"
                )
            if file.metadata.num_rows == 0:
                raise DataError(f"{piece.name} is empty (0 rows)")
            columns = [*known, *(name for name in ID_KEYS if name in found)]
            stop = file.num_row_groups if piece.stop is None else piece.stop
            groups = range(piece.start, stop)
            for batch in file.iter_batches(
                _PARQUET_ROWS, row_groups=groups, columns=columns
            ):
                for index in range(batch.num_rows):
                    row += 1
                    origin = f"{piece.name}, row {row}"
                    one = batch.slice(index, 1)
                    try:
                        if one.nbytes > max_record_bytes:
                            raise _too_large(one.nbytes, max_record_bytes)
                        yield _document(origin, _row(one), seed)
                    except RecordError as error:
                        bad.report(origin, error)
    except pyarrow.ArrowException as error:
        raise RecordError(
            "damaged_file", f"no intact Parquet file (after row {row}): {error}"
        ) from error


def _row(batch: "pyarrow.RecordBatch") -> object:
    """Returns the only row of a batch."""
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RecordError(
            "not_utf8", f"not UTF-8 ({error.reason} at byte {error.start} of a string)"
        ) from error
