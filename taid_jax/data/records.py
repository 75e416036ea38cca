"""Records of JSON, CSV, Parquet and Arrow files, and files cut into pieces."""

import contextlib
import csv
import gzip
import io
import json
import mmap
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from taid_jax.data.documents import (
    EXPECTED_KEYS,
    ID_KEYS,
    OTHER_FORMATS,
    RECORD_KEYS,
    used_keys,
)
from taid_jax.data.errors import BadRecords, DataError, RecordError

if TYPE_CHECKING:
    import pyarrow

MAX_RECORD_BYTES = 4_000_000
"""A record above it is no conversation that a model could be trained on, and would hold
up the tokenizer: 4 MB are about a million tokens."""

_ROWS = 1024
"""Rows read at a time: enough to hide the cost of a read."""

_ROW_BYTES = 32_000_000
"""Fewer of them where they are larger than this together."""

_CODED_BYTES, _MANY_ROWS = 256_000_000, 10_000
"""The same where there are many rows and columns that hold each value once."""

_UNPACKED_BYTES = 2**30
"""The most that a packed file which is read whole may have in it."""

_VALUE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]]', re.DOTALL)
"""What tells where a value of JSON ends: brackets, but for those of strings."""

Records = Iterator[tuple[str, object]]
"""Where each record stands, and what it holds."""


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


def is_packed(path: pathlib.Path) -> bool:
    """Returns whether a file is one of gzip."""
    return path.suffix.lower() == ".gz"


@contextlib.contextmanager
def unpacked(path: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a file, unpacked if it is packed.

    Raises:
        RecordError: If it is packed and damaged.
    """
    try:
        with gzip.open(path) if is_packed(path) else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RecordError("damaged_file", f"no intact gzip file: {error}") from error


def read_whole(path: pathlib.Path) -> bytes:
    """Returns all of a file, unpacked.

    Raises:
        RecordError: If it is damaged, or has more in it than any text would.
    """
    if not is_packed(path):
        return path.read_bytes()
    with unpacked(path) as file:
        data = file.read(_UNPACKED_BYTES + 1)
    if len(data) > _UNPACKED_BYTES:
        raise RecordError(
            "too_large",
            f"unpacks to more than {_UNPACKED_BYTES:,} bytes; give it unpacked",
        )
    return data


def read_jsonl(piece: Piece, bad: BadRecords, max_record_bytes: int) -> Records:
    """Yields the records of a file of JSON lines, or of a part of it.

    Raises:
        DataError: If the whole file has only blank lines.
        RecordError: If the file is damaged.
    """
    empty = piece.start == 0 and piece.stop is None
    # Bytes, so that one line that is not UTF-8 has a number and spoils no other.
    with unpacked(pathlib.Path(piece.path)) as file:
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
                record = _parse_json(
                    line, "line; a .jsonl file has one JSON object per line"
                )
            except RecordError as error:
                bad.report(origin, error)
                continue
            yield origin, record
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


def _parse_json(data: bytes, what: str) -> object:
    """Returns a value of JSON.

    Args:
        data: Its bytes.
        what: What they are, and what they should have been, for the message.
    """
    noun, _, wanted = what.partition(";")
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise RecordError(
            "not_utf8",
            f"not UTF-8 (byte 0x{data[error.start]:02x} at byte {error.start} of the "
            f"{noun}); save the file as UTF-8",
        ) from error
    except json.JSONDecodeError as error:
        raise RecordError(
            "not_json", f"not JSON ({error.msg}, column {error.colno});{wanted}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not_json", f"not JSON that can be read ({error})") from error


def read_json(piece: Piece, bad: BadRecords, max_record_bytes: int) -> Records:
    """Yields the records of a .json file: those of its list, or one after the other.

    Raises:
        DataError: If the file has none.
        RecordError: If the file is damaged.
    """
    path = pathlib.Path(piece.path)
    with contextlib.ExitStack() as stack:
        if is_packed(path):
            data: Any = read_whole(path)
        else:
            file = stack.enter_context(path.open("rb"))
            data = stack.enter_context(
                contextlib.closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            )
        number = 0
        for start, stop in _values(data):
            number += 1
            origin = f"{piece.name}, record {number}"
            try:
                if stop - start > max_record_bytes:
                    raise _too_large(stop - start, max_record_bytes)
                record = _parse_json(
                    data[start:stop], "record; a .json file has a list of objects"
                )
            except RecordError as error:
                bad.report(origin, error)
                continue
            yield origin, record
        if not number:
            raise DataError(f"{piece.name} is empty (no record in it)")


def _values(data: bytes | mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yields where each value of a list lies, or each of those without a list.

    What stands between them and is no bracket, comma or white space is given too: it is
    something else than a record, and whoever parses it says so.
    """
    place = 3 if data[:3] == b"\xef\xbb\xbf" else 0
    head = re.compile(rb"\s*\[").match(data, place)
    level = 1 if head else 0
    place, depth = head.end() if head else place, level
    between = re.compile(rb"[\s,]*+")
    begun = place
    for found in _VALUE.finditer(data, place):
        if found[0] in (b"{", b"["):
            if depth == level:
                begun = between.match(data, place).end()  # pyright: ignore
                if begun < found.start():
                    yield begun, found.start()
                begun = found.start()
            depth += 1
        elif found[0] in (b"}", b"]"):
            depth -= 1
            if depth == level:
                yield begun, found.end()
                place = found.end()
            elif depth < level:
                break
    # What a list does not close, or what stands behind it.
    if depth < level:
        begun = between.match(data, place).end()  # pyright: ignore
        if begun < found.start():  # pyright: ignore
            yield begun, found.start()  # pyright: ignore
        place = found.end()  # pyright: ignore
    rest = between.match(data, place).end()  # pyright: ignore
    if rest < len(data):
        yield rest, len(data)


def read_csv(piece: Piece, bad: BadRecords, max_record_bytes: int) -> Records:
    """Yields the records of a .csv or .tsv file, whose first row names the columns.

    Raises:
        DataError: If the file has no rows, or none of the columns.
        RecordError: If the file is damaged.
    """
    path = pathlib.Path(piece.path)
    name = path.name.lower().removesuffix(".gz")
    csv.field_size_limit(2**30)
    with unpacked(path) as file:
        # What is no UTF-8 becomes half of a surrogate pair, which its record names.
        text = io.TextIOWrapper(
            cast(Any, file), "utf-8-sig", errors="surrogateescape", newline=""
        )
        rows = csv.reader(text, delimiter="\t" if name.endswith(".tsv") else ",")
        try:
            columns = next(rows, [])
            _check_columns(piece.name, columns)
            if len({*columns}) < len(columns):
                raise DataError(f"{piece.name}: two columns have the same name")
            number = 0
            for number, row in enumerate(filter(None, rows), start=1):
                origin = f"{piece.name}, row {number}"
                size = sum(map(len, row))
                try:
                    if size > max_record_bytes:
                        raise _too_large(size, max_record_bytes)
                    if len(row) != len(columns):
                        raise RecordError(
                            "wrong_shape",
                            f"{len(row)} fields, and {len(columns)} columns have names",
                        )
                except RecordError as error:
                    bad.report(origin, error)
                    continue
                yield origin, dict(zip(columns, row, strict=True))
            if not number:
                raise DataError(f"{piece.name} is empty (0 rows)")
        except csv.Error as error:
            raise RecordError("damaged_file", f"no intact CSV file: {error}") from error


def _check_columns(name: str, columns: Sequence[str]) -> None:
    """Raises DataError if the columns are not those of any format."""
    if not used_keys(dict.fromkeys(columns, "-")):
        found = ", ".join(f"`{column}`" for column in columns[:20]) or "none"
        raise DataError(
            f"{name}: need the columns {EXPECTED_KEYS}; found {found} ({OTHER_FORMATS})"
        )


def read_parquet(piece: Piece, bad: BadRecords, max_record_bytes: int) -> Records:
    """Yields the records of a Parquet file, or of some of its row groups.

    Raises:
        DataError: If the file has no rows, or none of the columns.
        RecordError: If the file is damaged.
    """
    # Imported here: most runs read no Parquet.
    import pyarrow.parquet

    def batches() -> Iterator["pyarrow.RecordBatch | tuple[int, RecordError]"]:
        # Read as it is used: whole columns of large rows would not fit.
        with pyarrow.parquet.ParquetFile(
            piece.path, buffer_size=_BLOCK, pre_buffer=False
        ) as file:
            columns = known_columns(
                piece.name, file.schema_arrow.names, bad if piece.start == 0 else None
            )
            if file.metadata.num_rows == 0:
                raise DataError(f"{piece.name} is empty (0 rows)")
            stop = file.num_row_groups if piece.stop is None else piece.stop
            for group in range(piece.start, stop):
                held = file.metadata.row_group(group)
                size, count = _measure(held, columns)
                each = size // max(1, held.num_rows)
                if each > max_record_bytes and size > _ROW_BYTES:
                    # They would be in memory together, for nothing.
                    error = _too_large(each, max_record_bytes)
                    yield held.num_rows, error
                    continue
                yield from file.iter_batches(count, row_groups=[group], columns=columns)

    return arrow_records(piece, batches(), bad, max_record_bytes)


def _measure(group: Any, columns: Sequence[str]) -> tuple[int, int]:
    """Returns the bytes of a Parquet row group, and how many rows are read together."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    chunks = [c for c in chunks if c.path_in_schema.partition(".")[0] in columns]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    count = _ROW_BYTES // max(1, size // max(1, group.num_rows))
    # A dictionary has each value once, which may be that of every row. A few short
    # rows at a time are slow to read, and there are many of them.
    coded = [c.total_uncompressed_size for c in chunks if c.has_dictionary_page]
    room = _CODED_BYTES if group.num_rows > _MANY_ROWS else _ROW_BYTES
    count = min(count, room // max(coded, default=1))
    return size, max(1, min(_ROWS, count))


def read_arrow(piece: Piece, bad: BadRecords, max_record_bytes: int) -> Records:
    """Yields the records of an Arrow file, in either of its two forms.

    Raises:
        DataError: If the file has no rows, or none of the columns.
        RecordError: If the file is damaged.
    """
    import pyarrow

    def batches() -> Iterator["pyarrow.RecordBatch"]:
        with pyarrow.memory_map(piece.path) as source:
            if source.read(6) == b"ARROW1":
                source.seek(0)
                file = pyarrow.ipc.open_file(source)
                found = map(file.get_batch, range(file.num_record_batches))
            else:
                source.seek(0)
                file = found = pyarrow.ipc.open_stream(source)
            columns = known_columns(piece.name, file.schema.names, bad)
            rows = 0
            for batch in found:
                rows += batch.num_rows
                yield batch.select(columns)
            if not rows:
                raise DataError(f"{piece.name} is empty (0 rows)")

    return arrow_records(piece, batches(), bad, max_record_bytes)


def known_columns(
    name: str, found: Sequence[str], bad: BadRecords | None = None
) -> list[str]:
    """Returns the columns that are read, and tells `bad` of the others.

    Raises:
        DataError: If none of the formats has such columns.
    """
    _check_columns(name, found)
    known = [column for column in found if column in (*RECORD_KEYS, *ID_KEYS)]
    others = [column for column in found if column not in known]
    if others and bad is not None:
        bad.notes.append(f"{name}: columns not used: {', '.join(others[:20])}")
    return known


def arrow_records(
    piece: Piece,
    batches: Iterable["pyarrow.RecordBatch | tuple[int, RecordError]"],
    bad: BadRecords,
    max_record_bytes: int,
) -> Records:
    """Yields the rows of tables as records.

    Args:
        piece: Where they come from.
        batches: The tables; how many rows are left out unread, and why, is one too.
        bad: Told of records that cannot be used.
        max_record_bytes: Rows above it are such records.

    Raises:
        RecordError: If they come from a file that is damaged.
    """
    import pyarrow

    row = piece.first - 1
    try:
        for batch in batches:
            if isinstance(batch, tuple):
                for number in range(row + 1, row + batch[0] + 1):
                    bad.report(f"{piece.name}, row {number}", batch[1])
                row += batch[0]
                continue
            for index in range(batch.num_rows):
                row += 1
                origin = f"{piece.name}, row {row}"
                one = batch.slice(index, 1)
                try:
                    if one.nbytes > max_record_bytes:
                        raise _too_large(one.nbytes, max_record_bytes)
                    record = _row(one)
                except RecordError as error:
                    bad.report(origin, error)
                    continue
                yield origin, record
    except (pyarrow.ArrowException, OSError) as error:
        # What pyarrow says of damaged pages; what the system says has a number.
        if getattr(error, "errno", None):
            raise
        raise RecordError(
            "damaged_file",
            f"no intact {'Arrow' if piece.path.endswith('.arrow') else 'Parquet'} file "
            f"(after row {row}): {error}",
        ) from error


def _row(batch: "pyarrow.RecordBatch") -> object:
    """Returns the only row of a batch."""
    try:
        row = batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RecordError(
            "not_utf8", f"not UTF-8 ({error.reason} at byte {error.start} of a string)"
        ) from error
    return {key: _without_nulls(value) for key, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Returns a value without the keys that a table has in every row, being null."""
    if isinstance(value, Mapping):
        return {
            key: _without_nulls(inner)
            for key, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
