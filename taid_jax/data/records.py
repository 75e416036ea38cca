"""Files to records, each with the place where it stands; bad ones with what is wrong.

The readers hand bad records on as a `RecordError` in the record's place, so that the
others of a file are read, and whoever asked decides what becomes of them.
"""

import contextlib
import csv
import gzip
import io
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, cast

from taid_jax.data.documents import ID_KEYS, RECORD_KEYS
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.options import MAX_RECORD_BYTES

if TYPE_CHECKING:
    import pyarrow

_WHOLE_BYTES = 2**30
"""The most bytes of a file that is read whole: text and JSON that is no line a record.
"""

_ROWS, _ROW_BYTES = 1024, 256_000_000
"""Rows of a table that are read at a time: so many, or fewer where they may be large.
"""

_BLOCK = 1 << 20

Record = object | RecordError
Records = Iterator[tuple[str, Record]]
"""Where each record stands, and what it holds or what is wrong with it."""

_Numbered = Iterator[tuple[int, Record]]
"""The same with the numbers of lines, rows or values, from 1."""


def kind_of(path: pathlib.Path) -> str | None:
    """Returns the ending that says how a file is read, None if none can read it."""
    *_, inner, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last == ".gz":
        return inner if inner in KINDS and inner not in _TABLES else None
    return last if last in KINDS else None


def read_file(
    path: pathlib.Path,
    max_record_bytes: int = MAX_RECORD_BYTES,
    *,
    also: Sequence[str] = (),
) -> Records:
    """Yields the records of a file; a text is one record.

    Args:
        path: Its ending is one of `KINDS`.
        max_record_bytes: Records above it are handed on as errors, unread.
        also: Columns of a table that are read beside those that say what a record is.

    Raises:
        DataError: If the file is empty or cannot be read.
    """
    kind = kind_of(path) or ""
    found = False
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty (0 bytes)")
        if kind == ".txt":
            yield str(path), {"text": _read_text(path)}
            return
        unit, reader = _READERS[kind]
        more = {"also": also} if kind in _TABLES else {}
        for number, record in reader(path, max_record_bytes, **more):
            found = True
            yield f"{path}, {unit} {number}", record
    except RecordError as error:
        yield str(path), error
        return
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        damage = f"no intact gzip file: {error}"
        yield str(path), RecordError("damaged_file", damage)
        return
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path} cannot be read: {reason}") from error
    if not found:
        raise DataError(f"{path} is empty (0 {unit}s)")


@contextlib.contextmanager
def _unpacked(path: pathlib.Path) -> Iterator[IO[bytes]]:
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        yield cast(IO[bytes], file)


def _read_whole(path: pathlib.Path) -> bytes:
    with _unpacked(path) as file:
        data = file.read(_WHOLE_BYTES + 1)
    if len(data) > _WHOLE_BYTES:
        raise RecordError(
            "too_large",
            f"more than {_WHOLE_BYTES:,} bytes; give it as several files, or as .jsonl",
        )
    return data


def _read_text(path: pathlib.Path) -> str:
    try:
        data = _read_whole(path)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1  # pyright: ignore
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{error.object[error.start]:02x} "
            f"at offset {error.start}); save the file as UTF-8"
        ) from error
    except RecordError as error:
        raise DataError(f"{path}: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty (white space only)")
    return text.replace("\r\n", "\n")


def _too_large(size: int, limit: int) -> RecordError:
    return RecordError(
        "too_large",
        f"a record of {size:,} bytes; the limit is {limit:,}: split it into several",
    )


def _read_jsonl(path: pathlib.Path, limit: int) -> _Numbered:
    # Bytes, so that one line that is not UTF-8 has a number and spoils no other.
    with _unpacked(path) as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) > limit and not line.endswith(b"\n"):
                size = len(line)
                while block := file.readline(_BLOCK):
                    size += len(block)
                    if block.endswith(b"\n"):
                        break
                yield number, _too_large(size, limit)
            elif line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> Record:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return RecordError(
            "not_utf8",
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start} of the "
            "line); save the file as UTF-8",
        )
    except (ValueError, RecursionError) as error:
        return RecordError(
            "not_json", f"not JSON ({error}); a .jsonl file has one object a line"
        )


def _read_json(path: pathlib.Path, limit: int) -> _Numbered:
    """Yields the values of a list, or those that follow one another.

    Behind one that is no JSON it goes on at the next line that begins as the first
    record does. Where none does, the rest of the file is left out.
    """
    # What is no UTF-8 becomes half of a surrogate pair, which its record names.
    text = _read_whole(path).decode("utf-8-sig", "surrogateescape")
    between = re.compile(r"[\s,]*")
    head = re.match(r"\s*\[", text)
    end = len(text.rstrip()) - (1 if head and text.rstrip().endswith("]") else 0)
    place = between.match(text, head.end() if head else 0).end()  # pyright: ignore
    indent = text[text.rfind("\n", 0, place) + 1 : place]
    beginning = "\n" + ("" if indent.strip() else indent) + "{"
    decoder, number = json.JSONDecoder(), 0
    while place < end:
        number += 1
        try:
            record, stop = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            if (place := text.find(beginning, place)) < 0:
                rest = f"not JSON from here on ({error}): the rest is left out"
                yield number, RecordError("damaged_file", rest)
                return
            line = text.count("\n", 0, place) + 2
            message = f"not JSON ({error}); the next record begins in line {line}"
            yield number, RecordError("not_json", message)
            place += len(beginning) - 1
            continue
        size = stop - place
        yield number, _too_large(size, limit) if size > limit else record
        place = between.match(text, stop).end()  # pyright: ignore
    if head and end == len(text.rstrip()):
        rest = "the list does not end: the file is cut short, and its rest is missing"
        yield number + 1, RecordError("damaged_file", rest)


def _read_csv(path: pathlib.Path, limit: int) -> _Numbered:
    name = path.name.lower().removesuffix(".gz")
    csv.field_size_limit(2**30)
    with _unpacked(path) as file:
        text = io.TextIOWrapper(
            cast(Any, file), "utf-8-sig", errors="surrogateescape", newline=""
        )
        rows = csv.reader(text, delimiter="\t" if name.endswith(".tsv") else ",")
        try:
            columns = next(rows, [])
            if len({*columns}) < len(columns):
                raise DataError(f"{path}: two columns have the same name")
            for number, row in enumerate(filter(None, rows), start=1):
                if (size := sum(map(len, row))) > limit:
                    yield number, _too_large(size, limit)
                elif len(row) != len(columns):
                    fields = f"{len(row)} fields, and {len(columns)} columns have names"
                    yield number, RecordError("wrong_shape", fields)
                else:
                    yield number, dict(zip(columns, row, strict=True))
        except csv.Error as error:
            raise RecordError("damaged_file", f"no intact CSV file: {error}") from error


def _read_parquet(
    path: pathlib.Path, limit: int, *, also: Sequence[str] = ()
) -> _Numbered:
    # Imported here: most runs read no Parquet.
    import pyarrow.parquet

    def batches() -> Iterator["pyarrow.RecordBatch | int"]:
        # Read as it is used: whole columns of large rows would not fit.
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=_BLOCK, pre_buffer=False
        ) as file:
            columns = known_columns(file.schema_arrow.names, also)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                chunks = [
                    chunk
                    for chunk in map(group.column, range(group.num_columns))
                    if chunk.path_in_schema.partition(".")[0] in columns
                ]
                size = sum(chunk.total_uncompressed_size for chunk in chunks)
                if size > max(_ROW_BYTES, limit * group.num_rows):
                    # They would be in memory together, for nothing.
                    yield from [size // group.num_rows] * group.num_rows
                    continue
                # A column that holds each value once may have it in every row.
                most = [
                    c.total_uncompressed_size * c.has_dictionary_page for c in chunks
                ]
                most = max(1, size // max(1, group.num_rows), *most)
                count = min(_ROWS, _ROW_BYTES // most)
                yield from file.iter_batches(
                    max(1, count), row_groups=[number], columns=columns
                )

    with _intact("Parquet"):
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
        yield from table_records(batches(), names, limit)


def _read_arrow(
    path: pathlib.Path, limit: int, *, also: Sequence[str] = ()
) -> _Numbered:
    import pyarrow

    with _intact("Arrow"), pyarrow.memory_map(str(path)) as source:
        whole = source.read(6) == b"ARROW1"  # Else a stream.
        source.seek(0)
        if whole:
            file = pyarrow.ipc.open_file(source)
            found = map(file.get_batch, range(file.num_record_batches))
        else:
            file = found = pyarrow.ipc.open_stream(source)
        columns = known_columns(file.schema.names, also)
        batches = (batch.select(columns) for batch in found)
        yield from table_records(batches, file.schema.names, limit)


@contextlib.contextmanager
def _intact(kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        # What pyarrow says of damaged pages; what the system says has a number.
        if getattr(error, "errno", None):
            raise
        damage = f"no intact {kind} file: {error}"
        raise RecordError("damaged_file", damage) from error


def known_columns(names: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    """Returns the columns that records are made of; all where there are none."""
    known = (*RECORD_KEYS, *ID_KEYS, *also)
    return [name for name in names if name in known] or [*names]


def table_records(
    batches: Iterable["pyarrow.RecordBatch | int"], names: Sequence[str], limit: int
) -> _Numbered:
    """Yields the rows of tables as records.

    Args:
        batches: The tables; in place of a row that is not read, its bytes.
        names: Of all columns; rows have the others as keys that say nothing.
        limit: Rows of more bytes are handed on as errors.
    """
    row = 0
    for batch in batches:
        if isinstance(batch, int):
            row += 1
            yield row, _too_large(batch, limit)
            continue
        others = dict.fromkeys(set(names) - {*batch.schema.names}, "not read")
        for index in range(batch.num_rows):
            row += 1
            one = batch.slice(index, 1)
            if one.nbytes > limit:
                yield row, _too_large(one.nbytes, limit)
                continue
            try:
                yield row, others | _without_nulls(one.to_pylist()[0])
            except UnicodeDecodeError as error:
                where = f"{error.reason} at byte {error.start} of a string"
                yield row, RecordError("not_utf8", f"not UTF-8 ({where})")


def _without_nulls(value: Any, *, inner: bool = False) -> Any:
    """Returns a row without the inner nulls that a table has for absent keys."""
    if isinstance(value, Mapping):
        return {
            key: _without_nulls(each, inner=True)
            for key, each in value.items()
            if each is not None or not inner
        }
    if isinstance(value, list):
        return [_without_nulls(each, inner=True) for each in value]
    return value


_READERS: dict[str, tuple[str, Callable[..., _Numbered]]] = {
    ".jsonl": ("line", _read_jsonl),
    ".parquet": ("row", _read_parquet),
    ".json": ("record", _read_json),
    ".csv": ("row", _read_csv),
    ".tsv": ("row", _read_csv),
    ".arrow": ("row", _read_arrow),
}
_TABLES = (".parquet", ".arrow")
KINDS = (".txt", *_READERS)
"""Endings of files that can be read; those of text also packed, with .gz."""
SUPPORTED = f"{', '.join(KINDS)} (all but .parquet and .arrow also as .gz)"
