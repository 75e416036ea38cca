"""Rows of examples to batches of one shape, endless and resumable for training."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped

from taid_jax.data.errors import DataError
from taid_jax.data.packing import (
    EMPTY,
    BucketBatches,
    Rows,
    TokenTable,
    bucket_of,
    make_table,
    pack_rows,
)
from taid_jax.data.tokens import Example
from taid_jax.types import IGNORE_INDEX

NumpyBatch = dict[str, Shaped[np.ndarray, "batch *length"]]
"""`input_ids`, `labels`, and `segment_ids` with `positions`, or `attention_mask`; where
they are asked for `prompt_lengths` and `answer_ends`, both `(batch,)`; the columns of a
store, `(batch, length, width)`; and `teacher_weights`, `(batch, length, teachers)`
float32. All int32 but the last two. Where the teacher has rows of its own these are
there with `teacher_` before their names, and `teacher_index`: the place in the
teacher's row that predicts the same token as this one, -1 without any."""


@runtime_checkable
class TokenColumns(Protocol):
    """What else the tokens of an example have, such as the outputs of a teacher."""

    def blank(self, shape: tuple[int, int]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns the columns of a batch without tokens, `(*shape, width)` each."""
        ...

    def read(
        self, ids: Int32[np.ndarray, " tokens"], start: int
    ) -> Mapping[str, Shaped[np.ndarray, "tokens _"]]:
        """Returns the columns of an example, `(tokens, width)` each.

        Args:
            ids: Its tokens.
            start: The place of the first in its row.
        """
        ...


def pad_left(
    rows: Sequence[Sequence[int] | np.ndarray], width: int | None = None
) -> tuple[Int32[np.ndarray, "rows width"], Int32[np.ndarray, "rows width"]]:
    """Returns prompts to generate from and their mask, padded with 0 on the left.

    Args:
        rows: Token ids of every prompt, at most `width`.
        width: Of the arrays; the longest row's when None.
    """
    width = max(map(len, rows)) if width is None else width
    ids, mask = np.zeros((2, len(rows), width), np.int32)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    return ids, mask


@dataclasses.dataclass(frozen=True)
class ExampleSet:
    """One side of a data set, ready to be made into batches.

    Attributes:
        table: The examples of both sides.
        rows: The examples of every row of this side.
        seq_len: Tokens of a row.
        pad_id: What fills a row up.
        packed: Whether batches have segments and positions, or an attention mask.
        buckets: Lengths of batches, rising, the last of them `seq_len`; all are of
            `seq_len` when empty.
        columns: What batches have beside the examples themselves.
        teacher_weights: Of each document, how much each of several teachers counts:
            then batches have them for every token, 0 at padding.
        teacher_len: Tokens of a row of the teacher; None where it has the student's.
    """

    table: TokenTable
    rows: Rows
    seq_len: int
    pad_id: int
    packed: bool
    buckets: tuple[int, ...] = ()
    columns: TokenColumns | None = None
    teacher_weights: Float32[np.ndarray, "documents teachers"] | None = None
    teacher_len: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def of_examples(
        self, examples: Sequence[Example], rows: Rows | None = None
    ) -> "ExampleSet":
        """Returns other examples as batches like these hold them.

        Args:
            examples: At most `seq_len` tokens each.
            rows: Which of them share a row, by their places; as few rows as packing
                allows when None.
        """
        found = dataclasses.replace(self, table=make_table(enumerate(examples)))
        if rows is None:
            places = [(place,) for place in range(len(examples))]
            packed = self.packed
            rows = pack_rows(found.rooms().tolist(), self.seq_len) if packed else places
        # Whose documents these are is not known.
        return dataclasses.replace(found, rows=rows, teacher_weights=None)

    def rooms(self) -> Int64[np.ndarray, " examples"]:
        """Returns the tokens of a row that each example of the table takes.

        More than its own, where it takes a larger share of the teacher's row: what fits
        into one then fits into both.
        """
        teacher = self.table.teacher
        return self.room(
            self.table.lengths, None if teacher is None else teacher.lengths
        )

    def room(self, own: Any, teacher: Any) -> Any:
        """Returns the same of lengths, numbers or arrays; None without a teacher's."""
        if self.teacher_len is None or teacher is None:
            return own
        return np.maximum(own, -(-teacher * self.seq_len // self.teacher_len))

    def placed(self, index: int) -> Iterator[tuple[int, int]]:
        """Yields first token and number of each example of a row; none if `EMPTY`."""
        start = 0
        for number in self.rows[index] if index != EMPTY else ():
            yield start, number
            start += int(self.table.starts[number + 1] - self.table.starts[number])

    def tokens_of_rows(self) -> list[int]:
        """Returns the tokens of every row, padding left out."""
        lengths = self.table.lengths.tolist()
        return [sum(lengths[number] for number in row) for row in self.rows]

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        size: int,
        length: int | None = None,
    ) -> NumpyBatch:
        """Returns the rows as int32 arrays of shape (size, length).

        Labels are aligned with inputs: the model's output at position i predicts
        `labels[i + 1]`. They are -100 at padding, at the first token of every segment
        and wherever a token does not count. `segment_ids` are 1, 2, ... in a row and 0
        at padding; `positions` begin at 0 in every segment.

        Args:
            indices: Numbers of the rows, at most `size`.
            size: Rows of the batch; those that are left, and those whose number is
                `EMPTY`, are padding throughout.
            length: Tokens of a row, enough for all; `seq_len` when None.
        """
        shape = (size, length or self.seq_len)
        input_ids = np.full(shape, self.pad_id, np.int32)
        labels = np.full(shape, IGNORE_INDEX, np.int32)
        segments = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int32)
        steps = np.arange(self.seq_len, dtype=np.int32)
        more = {} if self.columns is None else self.columns.blank(shape)
        weights = self.teacher_weights
        if weights is not None:
            more["teacher_weights"] = np.zeros((*shape, weights.shape[1]), np.float32)
        for row, index in enumerate(indices):
            for segment, (start, number) in enumerate(self.placed(int(index)), start=1):
                ids, counted, *_ = self.table[number]
                span = slice(start, start + len(ids))
                input_ids[row, span] = ids
                labels[row, span] = np.where(counted, ids, IGNORE_INDEX)
                segments[row, span] = segment
                positions[row, span] = steps[: len(ids)]
                if self.columns is not None:
                    for name, values in self.columns.read(ids, start).items():
                        more[name][row, span] = values
                if weights is not None:
                    of_document = weights[self.table.documents[number]]
                    more["teacher_weights"][row, span] = of_document
        if self.packed:
            extra = {"segment_ids": segments, "positions": positions}
        else:
            # One example per row: its segment number, 1, is the mask.
            extra = {"attention_mask": segments}
        if self.teacher_len is not None:
            more |= self._teacher_rows(indices, labels)
        return {"input_ids": input_ids, "labels": labels, **extra, **more}

    def _teacher_rows(
        self, indices: Sequence[int] | np.ndarray, labels: np.ndarray
    ) -> NumpyBatch:
        """Returns the teacher's side of a batch, whose labels are those of the student.

        A row has the same examples on both sides, and they the same tokens that count.
        """
        teacher = dataclasses.replace(
            self,
            table=self.table.teacher or make_table([]),
            seq_len=self.teacher_len,
            teacher_len=None,
            teacher_weights=None,
        )
        rows = teacher.batch(indices, len(labels))
        index = np.full(labels.shape, -1, np.int32)
        for at, mine, theirs in zip(index, labels, rows.pop("labels"), strict=True):
            counted = np.flatnonzero(theirs != IGNORE_INDEX)
            at[np.flatnonzero(mine != IGNORE_INDEX) - 1] = counted - 1
        return {"teacher_index": index} | {f"teacher_{k}": v for k, v in rows.items()}

    def prompts(self, indices: Sequence[int] | np.ndarray, size: int) -> NumpyBatch:
        """Returns where the last answer of each row's first example begins and ends.

        `prompt_lengths`, `(size,)` int32, are the tokens before it; `answer_ends`,
        `(size,)` int32, the place after its last token. Both are 0 where the example's
        answer is not known, and in rows that are left.
        """
        found = np.zeros((2, size), np.int32)
        for row, index in enumerate(indices):
            if index != EMPTY:
                first = self.rows[index][0]
                found[:, row] = self.table.prompts[first], self.table.answer_ends[first]
        return {"prompt_lengths": found[0], "answer_ends": found[1]}


def row_order(examples: ExampleSet, seed: int) -> grain.MapDataset[int]:
    """Returns the numbers of all rows, epoch after epoch, each in an order of its own.

    Without end, and any place is found at once.

    Raises:
        DataError: If there are no rows or the seed is out of range.
    """
    if not len(examples):
        raise DataError("nothing to train on: the data set has no rows")
    if not 0 <= seed < 2**32:
        raise DataError(f"need 0 <= seed < 2**32, got {seed}")
    order = grain.MapDataset.source(range(len(examples))).seed(seed).shuffle()
    # Without end, but for a length that grain cannot round up past an int64, as it does
    # with batches of one row.
    return order.repeat(2**62 // len(examples))


def train_iterator(
    examples: ExampleSet,
    batch_size: int,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator[NumpyBatch]:
    """Returns an endless iterator over this process's part of every batch.

    Every epoch has a new order, drawn from the seed; a batch may hold the end of one
    epoch and the start of the next, so every row comes once an epoch and all batches
    have one shape. The global batch does not depend on the number of processes: process
    p takes the p-th part of its rows.

    With buckets a batch has one of their lengths, the same on all processes, and an
    epoch ends with its last batch, some of whose rows may be empty (`BucketBatches`).

    The iterator's `get_state()` is a small dict that goes through JSON; after
    `set_state` with it, the next batch is the one that would have come next. States are
    equal on all processes.

    Args:
        examples: The rows to train on.
        batch_size: Rows of a batch, over all processes.
        seed: Of the order, 0 <= seed < 2**32.
        process_index: This process, such as `jax.process_index()`.
        process_count: How many share the batch, such as `jax.process_count()`.
        prefetch: Batches made ahead, in one thread; 0 makes them when asked.

    Raises:
        DataError: If there is nothing to train on, the seed is out of range or the
            batch does not divide by the processes.
    """
    order = row_order(examples, seed)
    part = _part_of_batch(batch_size, process_index, process_count)
    size = part.stop - part.start

    # Only numbers of rows are drawn and cut; the process builds its own rows and no
    # others.
    if examples.buckets:
        tokens = examples.tokens_of_rows()
        draws = BucketBatches(tokens, examples.buckets, batch_size, seed)
        batches = grain.MapDataset.source(draws).map(
            lambda draw: examples.batch(draw.rows[part], size, draw.length)
        )
    else:
        batches = order.batch(batch_size).map(
            lambda numbers: examples.batch(numbers[part], size)
        )
    options = grain.ReadOptions(
        num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch
    )
    return iter(batches.to_iter_dataset(options))


def held_out_batches(
    examples: ExampleSet,
    batch_size: int,
    *,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    with_prompts: bool = False,
) -> list[NumpyBatch]:
    """Returns what `held_out_iterator` gives, all of it at once."""
    return list(
        held_out_iterator(
            examples,
            batch_size,
            limit=limit,
            process_index=process_index,
            process_count=process_count,
            with_prompts=with_prompts,
        )
    )


def held_out_iterator(
    examples: ExampleSet,
    batch_size: int,
    *,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    with_prompts: bool = False,
) -> Iterator[NumpyBatch]:
    """Returns this process's part of the held-out batches, always in the same order.

    Each is made when it is asked for. Every row comes once. All batches have one shape:
    the last is filled up with rows that are padding throughout and count nothing. With
    buckets a batch has the length of the shortest that holds its rows.

    Args:
        examples: The rows to evaluate on.
        batch_size: Rows of a batch, over all processes.
        limit: At most this many batches; all when None.
        process_index: This process.
        process_count: How many share the batch.
        with_prompts: Add `prompt_lengths` and `answer_ends`: see `ExampleSet.prompts`.

    Raises:
        DataError: If the batch does not divide by the processes.
    """
    part = _part_of_batch(batch_size, process_index, process_count)
    numbers = range(len(examples))
    tokens = examples.tokens_of_rows() if examples.buckets else []

    def one(start: int) -> NumpyBatch:
        rows = numbers[start : start + batch_size]
        longest = max((tokens[row] for row in rows), default=0) if tokens else 0
        length = bucket_of(longest, examples.buckets) if tokens else None
        own, size = rows[part], part.stop - part.start
        extra = examples.prompts(own, size) if with_prompts else {}
        return examples.batch(own, size, length) | extra

    return map(one, numbers[::batch_size][:limit])


def _part_of_batch(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1 or batch_size % process_count:
        raise DataError(
            f"need a batch size that is a multiple of the {process_count} processes, "
            f"got {batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise DataError(
            f"need 0 <= process_index < {process_count}, got {process_index}"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
