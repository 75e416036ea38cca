"""Parquet files with the most probable tokens of a teacher, checked row by row."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Float64, Int64

from taid_jax.errors import parsing, shorten
from taid_jax.store.format import StoreError

IDS, TOP_IDS, TOP_LOGPROBS = "input_ids", "top_ids", "top_logprobs"

_SLACK = 1e-3
"""So much may a probability, or the log of one, be above what it can be."""

_ROWS, _BYTES, _BLOCK = 256, 2**25, 2**20
"""Rows that are in memory at once: so many, or fewer where they are large."""


class Example(NamedTuple):
    """What a row says.

    Attributes:
        ids: The example.
        counts: How many entries each token has.
        top_ids: Of the entries, those of the first token first.
        top_logprobs: Their log-probabilities.
    """

    ids: Int64[np.ndarray, " tokens"]
    counts: Int64[np.ndarray, " tokens"]
    top_ids: Int64[np.ndarray, " entries"]
    top_logprobs: Float64[np.ndarray, " entries"]


def count_rows(files: Sequence[pathlib.Path]) -> tuple[int, int]:
    """Returns how many examples and tokens there are, after looking at each schema.

    Raises:
        StoreError: If a file is no Parquet, lacks columns, or has no rows.
    """
    if not files:
        raise StoreError("need at least one Parquet file, got none")
    examples = tokens = 0
    for path in files:
        with parsing(f"{path} cannot be read as Parquet", StoreError):
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, about = file.schema_arrow, file.metadata
            for number in range(about.num_row_groups):
                group = about.row_group(number)
                columns = [group.column(n) for n in range(group.num_columns)]
                tokens += sum(
                    column.num_values
                    for column in columns
                    if column.path_in_schema.startswith(f"{IDS}.")
                )
        for name, (depth, wanted, is_it) in _TYPES.items():
            kind = schema.field(name).type if schema.names.count(name) == 1 else None
            came = "no such column" if kind is None else shorten(str(kind), 100)
            for _ in range(depth):
                kind = kind.value_type if kind is not None and _is_list(kind) else None
            if kind is None or not is_it(kind):
                raise StoreError(f"{path}: {name} needs {wanted}, got {came}")
        if not about.num_rows:
            raise StoreError(f"{path} has no rows; leave it out")
        examples += about.num_rows
    return examples, tokens


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
    )


_TYPES = {
    IDS: (1, "a list of integers in each row", pa.types.is_integer),
    TOP_IDS: (2, "a list of lists of integers in each row", pa.types.is_integer),
    TOP_LOGPROBS: (2, "a list of lists of numbers in each row", pa.types.is_floating),
}


def read_examples(files: Sequence[pathlib.Path], vocab_size: int) -> Iterator[Example]:
    """Yields the examples of all files.

    Raises:
        StoreError: If a row cannot be used; names file and row.
    """
    for path in files:
        row, batches = 0, _batches(path)
        while True:
            with parsing(f"{path} cannot be read after row {row}", StoreError):
                batch = next(batches, None)
            if batch is None:
                break
            for place in range(batch.num_rows):
                row += 1
                ids, top_ids, top_logprobs = (
                    batch.column(name)[place] for name in _TYPES
                )
                try:
                    yield _check(ids, top_ids, top_logprobs, vocab_size)
                except _RowError as wrong:
                    raise StoreError(f"{path}, row {row}: {wrong}") from None


def _batches(path: pathlib.Path) -> Iterator[pa.RecordBatch]:
    """Yields a few rows at a time, however large the groups of rows are."""
    inner = {pa.types.is_integer: pa.int64(), pa.types.is_floating: pa.float64()}
    fields = []
    for name, (depth, _, is_it) in _TYPES.items():
        kind = inner[is_it]
        for _ in range(depth):
            kind = pa.large_list(kind)
        fields.append((name, kind))
    schema = pa.schema(fields)
    with pyarrow.parquet.ParquetFile(
        path, buffer_size=_BLOCK, pre_buffer=False
    ) as file:
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            each = group.total_byte_size // max(1, group.num_rows)
            count = min(_ROWS, max(1, _BYTES // max(1, each)))
            for batch in file.iter_batches(
                count, row_groups=[number], columns=[*_TYPES]
            ):
                yield batch.select([*_TYPES]).cast(schema)


class _RowError(Exception):
    """What is wrong with a row."""


def _check(ids: Any, top_ids: Any, top_logprobs: Any, vocab_size: int) -> Example:
    """Returns a row as arrays.

    Raises:
        _RowError: If it cannot be used.
    """
    given = {IDS: ids, TOP_IDS: top_ids, TOP_LOGPROBS: top_logprobs}
    for name, value in given.items():
        if not value.is_valid:
            raise _RowError(f"{name} is null")
    lengths = {name: len(value.values) for name, value in given.items()}
    if len({*lengths.values()}) > 1 or not lengths[IDS]:
        found = ", ".join(f"{name} {size}" for name, size in lengths.items())
        raise _RowError(f"need one entry for each token in all columns, got {found}")
    if ids.values.null_count:
        raise _RowError(f"{IDS} has a null in it")
    tokens = _array(ids.values)
    if len(wrong := np.flatnonzero((tokens < 0) | (tokens >= vocab_size))):
        raise _RowError(
            f"{IDS} has {tokens[wrong[0]]} at token {wrong[0] + 1}, and the teacher "
            f"ids from 0 to {vocab_size - 1}"
        )
    counts, others = (
        _array(value.values.value_lengths().fill_null(0))
        for value in (top_ids, top_logprobs)
    )
    if len(wrong := np.flatnonzero(counts != others)):
        at = wrong[0]
        raise _RowError(
            f"token {at + 1} has {counts[at]} {TOP_IDS} and {others[at]} {TOP_LOGPROBS}"
        )
    if len(wrong := np.flatnonzero(counts[:-1] == 0)):
        raise _RowError(
            f"token {wrong[0] + 1} has no {TOP_IDS}; only the last token may have none"
        )
    token = np.repeat(np.arange(len(tokens)), counts)
    flat, logprobs = (value.values.flatten() for value in (top_ids, top_logprobs))
    for name, values in ((TOP_IDS, flat), (TOP_LOGPROBS, logprobs)):
        if values.null_count:
            at = token[_array(values.is_null()).argmax()]
            raise _RowError(f"{name} has a null among those of token {at + 1}")
    example = Example(tokens, counts, _array(flat), _array(logprobs))
    _check_entries(example, token, vocab_size)
    return example


def _array(values: pa.Array) -> Any:
    return values.to_numpy(zero_copy_only=False)


def _check_entries(
    example: Example, token: Int64[np.ndarray, " entries"], vocab_size: int
) -> None:
    """Raises unless the entries are parts of distributions.

    Raises:
        _RowError: With the first token of which that is not so.
    """
    ids, logprobs = example.top_ids, example.top_logprobs
    if len(wrong := np.flatnonzero((ids < 0) | (ids >= vocab_size))):
        raise _RowError(
            f"{TOP_IDS} has {ids[wrong[0]]} at token {token[wrong[0]] + 1}, and the "
            f"teacher ids from 0 to {vocab_size - 1}"
        )
    order = np.lexsort((ids, token))
    again = (np.diff(ids[order]) == 0) & (np.diff(token[order]) == 0)
    if len(wrong := np.flatnonzero(again)):
        place = order[wrong[0]]
        raise _RowError(f"{TOP_IDS} has {ids[place]} twice at token {token[place] + 1}")
    if len(wrong := np.flatnonzero(~(logprobs <= _SLACK))):
        raise _RowError(
            f"need log-probabilities of at most 0, got {logprobs[wrong[0]]} at token "
            f"{token[wrong[0]] + 1}"
        )
    mass = np.bincount(token, np.exp(logprobs), len(example.ids))
    if len(wrong := np.flatnonzero(mass > 1 + _SLACK)):
        raise _RowError(
            f"the probabilities of token {wrong[0] + 1} add up to "
            f"{mass[wrong[0]]:.4f}; need natural logarithms of probabilities over the "
            "whole vocabulary"
        )
