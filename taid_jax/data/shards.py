"""Examples in Parquet files: written by the preparation, read by training."""

import dataclasses
import io
import pathlib
from collections.abc import Sequence

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool

from taid_jax.data.encoding import Tokenizer, cut_windows
from taid_jax.data.errors import BadRecords, DataError
from taid_jax.data.identity import differences, identify
from taid_jax.data.manifest import (
    SIDES,
    TRAIN,
    Manifest,
    read_shard_file,
)
from taid_jax.data.tokens import Example, TokenTable, make_table

_IDS = pyarrow.list_(pyarrow.field("element", pyarrow.int32(), nullable=False))

EXAMPLE_FIELDS = (
    pyarrow.field("input_ids", _IDS, nullable=False),
    # First token of every run of counted tokens, and the one after its last.
    pyarrow.field("counted", _IDS, nullable=False),
    pyarrow.field("prompt", pyarrow.int32(), nullable=False),
    pyarrow.field("answer_end", pyarrow.int32(), nullable=False),
    # Text, which may be cut into shorter windows.
    pyarrow.field("text", pyarrow.bool_(), nullable=False),
)
SHARD_SCHEMA = pyarrow.schema(EXAMPLE_FIELDS)

_ROW_GROUP = 4096


def example_columns(
    examples: Sequence[Example], text: Sequence[bool]
) -> dict[str, pyarrow.Array]:
    """Returns the columns of `EXAMPLE_FIELDS`.

    Args:
        examples: The rows.
        text: Whether each is running text.
    """
    inside = [example.counted.astype(np.int8) for example in examples]
    runs = [np.flatnonzero(np.diff(row, prepend=0, append=0)) for row in inside]
    return {
        "input_ids": _lists([example.ids for example in examples]),
        "counted": _lists(runs),
        "prompt": pyarrow.array([e.prompt for e in examples], pyarrow.int32()),
        "answer_end": pyarrow.array([e.answer_end for e in examples], pyarrow.int32()),
        "text": pyarrow.array(list(text), pyarrow.bool_()),
    }


def _lists(rows: Sequence[np.ndarray]) -> pyarrow.Array:
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    values = np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, values, type=_IDS)


def parquet_bytes(table: pyarrow.Table, row_group: int = _ROW_GROUP) -> bytes:
    """Returns the table as a Parquet file; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(
        table,
        buffer,
        row_group_size=row_group,
        compression="zstd",
        use_dictionary=False,
    )
    return buffer.getvalue()


def read_prepared(
    folder: pathlib.Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    train_on_prompts: bool,
    bad: BadRecords,
) -> tuple[TokenTable, Bool[np.ndarray, " examples"]]:
    """Returns the examples of a folder of shards, and which are validated on.

    All of it is held in memory, five bytes a token: a billion tokens are 5 GB on every
    host.

    Args:
        folder: Where they lie.
        manifest: Of the folder.
        tokenizer: Of the run, which must give the ids that the shards hold.
        seq_len: Longer conversations are left out, longer windows of text are cut.
        train_on_prompts: Count every token.
        bad: Told of what is left out.

    Raises:
        DataError: If the shards were made with another tokenizer or chat template, hold
            no answers and those alone are asked for, or a file is missing or damaged.
    """
    found = differences(manifest.tokenizer, identify(tokenizer), chats=manifest.chats)
    if found:
        raise DataError(
            f"{folder} was prepared with another tokenizer than the teacher's; what "
            f"differs: {'; '.join(found)}. Prepare the data again with --tokenizer set "
            "to this teacher, or give the teacher that they were prepared for"
        )
    if manifest.train_on_prompts and not train_on_prompts:
        raise DataError(
            f"{folder} was prepared with --train-on-prompts, and does not tell which "
            "tokens are answers; train with --train-on-prompts, or prepare it again "
            "without"
        )
    tables, validation = [], []
    for side in SIDES:
        for file in manifest.files:
            if file.side != side:
                continue
            data = read_shard_file(folder, file)
            try:
                columns = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
                examples = _examples(columns.cast(SHARD_SCHEMA))
            except (pyarrow.ArrowException, ValueError) as error:
                raise DataError(
                    f"{folder / file.name} is not a shard of this format ({error}); "
                    "prepare the data again"
                ) from error
            origin = f"{folder / file.name}, row"
            fitting, texts = _fit(*examples, seq_len, origin, bad)
            for table in (fitting, texts):
                tables.append(table)
                validation.append(np.full(len(table), side != TRAIN))
    table = _join(tables)
    if not len(table):
        raise DataError(
            f"{folder} has no example of at most {seq_len} tokens; raise seq_len"
        )
    if train_on_prompts:
        table = dataclasses.replace(table, counted=np.ones_like(table.counted))
        table.counted[table.starts[:-1]] = False
    return table, np.concatenate(validation)


def _values(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the numbers of a column of lists, end to end, and where each begins."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy()[offsets[0] : offsets[-1]]
    return values, (offsets - offsets[0]).astype(np.int64)


def _examples(columns: pyarrow.Table) -> tuple[TokenTable, np.ndarray]:
    """Returns the rows of a shard as a table, and which of them are text."""
    ids, starts = _values(columns["input_ids"])
    borders, runs = _values(columns["counted"])
    rows = np.repeat(starts[:-1], np.diff(runs))
    # +1 where a run begins, -1 after its end: the sum so far is 1 inside.
    steps = np.zeros(len(ids) + 1, np.int8)
    np.add.at(steps, rows + borders, np.where(np.arange(len(borders)) % 2, -1, 1))
    table = TokenTable(
        ids=ids.copy(),
        counted=np.cumsum(steps[:-1], dtype=np.int8) == 1,
        starts=starts,
        documents=np.arange(len(columns)),
        prompts=columns["prompt"].to_numpy().astype(np.int64),
        answer_ends=columns["answer_end"].to_numpy().astype(np.int64),
    )
    return table, columns["text"].to_numpy()


def _fit(
    table: TokenTable, text: np.ndarray, seq_len: int, origin: str, bad: BadRecords
) -> tuple[TokenTable, TokenTable]:
    """Returns the examples that fit, and the windows of the texts that did not."""
    fits = table.lengths <= seq_len
    windows = []
    for number in np.flatnonzero(~fits).tolist():
        if text[number]:
            cut = cut_windows(table[number], seq_len)
            windows += [(number, window) for window in cut if len(window.ids) > 1]
        else:
            size = len(table[number].ids)
            detail = f"{size} tokens, the limit is {seq_len}"
            bad.leave_out(f"{origin} {number + 1}", "too_long", detail)
    if fits.all():
        return table, make_table([])
    kept = np.flatnonzero(fits).tolist()
    return make_table((number, table[number]) for number in kept), make_table(windows)


def _join(tables: Sequence[TokenTable]) -> TokenTable:
    """Returns the tables end to end, their documents numbered anew."""
    documents, before = [], 0
    for table in tables:
        documents.append(table.documents + before)
        before += int(table.documents.max(initial=-1)) + 1
    bounds = np.cumsum([0, *(len(table.ids) for table in tables)])
    starts = [t.starts[:-1] + b for t, b in zip(tables, bounds[:-1], strict=True)]
    return TokenTable(
        ids=np.concatenate([table.ids for table in tables]),
        counted=np.concatenate([table.counted for table in tables]),
        starts=np.concatenate([*starts, bounds[-1:]]),
        documents=np.concatenate(documents),
        prompts=np.concatenate([table.prompts for table in tables]),
        answer_ends=np.concatenate([table.answer_ends for table in tables]),
    )
