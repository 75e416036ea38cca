"""One call from files to a data set: read, encode, split, pack."""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from taid_jax.data.batches import ExampleSet, TokenColumns
from taid_jax.data.documents import Document
from taid_jax.data.errors import (
    BadRecordPolicy,
    DataError,
    LeftOut,
    RecordError,
    nothing_left,
)
from taid_jax.data.intake import Intake, Limits, fields_read, read_documents
from taid_jax.data.packing import TokenTable, check_buckets, make_table, pack_rows
from taid_jax.data.shards import read_manifest, read_shards
from taid_jax.data.sources import Names, find_source, read_source
from taid_jax.data.split import cut_only_text, hold_out
from taid_jax.data.teacher_field import TeacherField
from taid_jax.data.teacher_prompt import TeacherPrompt
from taid_jax.data.tokens import Encoder, Tokenizer

_NAMED = 20
"""So many files that are passed over, and keys that are not used, are named."""


@dataclasses.dataclass(frozen=True)
class SideInfo:
    """How much one side of a data set holds.

    Attributes:
        documents: Documents with at least one example.
        examples: Windows of text and conversations.
        rows: Rows of `seq_len` tokens, or of a bucket's.
        tokens: Tokens in them, padding left out.
        counted_tokens: Tokens that are predicted and counted.
        fill: Share of the rows' slots that is not padding.
    """

    documents: int
    examples: int
    rows: int
    tokens: int
    counted_tokens: int
    fill: float


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What became of the source; `dataclasses.asdict` makes it ready for JSON.

    Attributes:
        train: What is trained on.
        held_out: What is not.
        dropped: How many records were left out, by reason: the keys of
            `errors.REASONS` (see `problems`) and `errors.FILTERS`.
        problems: The first records that could not be used, with file and line.
        unused_keys: How many records had each key that neither a format of data nor
            the chat template uses.
        num_skipped_files: Files of the source that were passed over.
        skipped_files: The first of them.
        notes: What else is to be said of the source, such as which split was taken.
        fingerprint: 16 hexadecimal digits; other examples or sides, other digits.
    """

    train: SideInfo
    held_out: SideInfo
    dropped: dict[str, int]
    problems: tuple[str, ...]
    unused_keys: dict[str, int]
    num_skipped_files: int
    skipped_files: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Both sides of a data set and what is known of it."""

    train: ExampleSet
    held_out: ExampleSet
    info: DatasetInfo

    def with_columns(self, columns: TokenColumns) -> "Dataset":
        """Returns the same data set, whose batches have these columns too."""
        train, held_out = (
            dataclasses.replace(side, columns=columns)
            for side in (self.train, self.held_out)
        )
        return Dataset(train, held_out, self.info)


def load_dataset(
    source: Names,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    held_out_fraction: float = 0.1,
    split_seed: int = 0,
    train_on_prompts: bool = False,
    pack: bool = True,
    buckets: Sequence[int] = (),
    bad_records: BadRecordPolicy = "raise",
    merge_system: bool = False,
    template_date: str | None = None,
    prompts_suffice: bool = False,
    teacher_field: TeacherField | None = None,
    teacher_prompt: str | None = None,
    teacher_len: int | None = None,
) -> Dataset:
    """Reads a source, encodes it and splits it into train and held-out rows.

    Text is cut into windows of `seq_len` tokens that predict every token once
    (`cut_windows`). A conversation of more than `seq_len` tokens is left out and
    counted, because half of one would teach answers to unseen questions.

    A folder that `scripts/prepare_data.py` has made is encoded and split already: its
    validation side is held out.

    Args:
        source: `pydoc` for Python's own documentation; a file of text or of records
            (docs/data.md lists kinds and keys); a folder of them, or of prepared data;
            OWNER/NAME or OWNER/NAME:SPLIT of the Hugging Face hub; or a list of any of
            these but prepared data.
        tokenizer: The teacher's, which must be the student's too.
        seq_len: Tokens of a row, >= 2.
        held_out_fraction: Share of the documents that is held out, in [0, 1).
        split_seed: Of the split alone. Leave it when the seed of training changes, so
            that runs are compared on documents that none of them was trained on.
        train_on_prompts: Count every token, as the published recipe of TAID does, and
            not only the assistant's.
        pack: Several examples in a row, kept apart by segments; else one, with padding.
        buckets: Lengths of batches that are not packed, rising; `seq_len` is the last
            of them in any case.
        bad_records: `raise` ends at the first record that cannot be used; `count`
            leaves it out and names it in `info`.
        merge_system: Put a system turn that the chat template refuses before the first
            turn of the user.
        template_date: What chat templates take for today, `YYYY-MM-DD`; today when
            None.
        prompts_suffice: Take records that are asked and not answered, as examples that
            end with the prompt. Not of a folder of prepared data, which has none.
        teacher_field: Says of each record which of several teachers it learns from:
            batches then have `teacher_weights`. Not of prepared data either.
        teacher_prompt: What the teacher sees in place of the prompt: see
            `TeacherPrompt`. Not of prepared data.
        teacher_len: Tokens of a row of the teacher then, `seq_len` when None.

    Raises:
        DataError: If a file or record cannot be used, or nothing is left.
    """
    if seq_len < 2:
        raise DataError(f"need seq_len >= 2, got {seq_len}")
    if not 0 <= held_out_fraction < 1:
        raise DataError(f"need 0 <= held_out_fraction < 1, got {held_out_fraction}")
    if not 0 <= split_seed < 2**63:
        raise DataError(f"need 0 <= split_seed < 2**63, got {split_seed}")
    lengths = check_buckets(buckets, seq_len) if buckets else ()
    if pack and lengths:
        raise DataError("buckets are for rows that are not packed; give --no-pack too")
    encoder = Encoder(tokenizer)
    left_out = LeftOut(bad_records)
    manifest = read_manifest(source) if isinstance(source, str | os.PathLike) else None
    asked = None if teacher_prompt is None else TeacherPrompt(teacher_prompt)
    teacher_len = None if asked is None else teacher_len or seq_len
    skipped_files, notes = [], []
    if manifest is not None:
        of_records = {"teacher_prompt": teacher_prompt, "teacher_field": teacher_field}
        for name in (name for name, value in of_records.items() if value is not None):
            raise DataError(
                f"{name}: {source} is prepared data, whose records are tokens "
                "already; give the files that it was made of"
            )
        table, held_out = read_shards(
            pathlib.Path(source),  # pyright: ignore
            manifest,
            tokenizer,
            seq_len,
            train_on_prompts=train_on_prompts,
            left_out=left_out,
        )
        # Shuffled when they were made.
        encoded = _Encoded(table, held_out, np.flatnonzero(held_out))
    else:
        intake = Intake(
            encoder,
            Limits(seq_len, teacher=teacher_len),
            train_on_prompts=train_on_prompts,
            merge_system=merge_system,
            template_date=template_date,
            prompts_suffice=prompts_suffice,
        )
        found = find_source(source)
        documents = read_documents(
            read_source(found, also=fields_read(asked, teacher_field)),
            split_seed,
            prompts_suffice=prompts_suffice,
            teacher_prompt=asked,
            teacher_field=teacher_field,
        )
        encoded = _encode(found.shown, documents, intake, held_out_fraction, left_out)
        skipped_files, notes = found.skipped_files, found.notes
        weights = encoded.teacher_weights
        if teacher_field is not None and weights is not None:
            notes = [_say_teachers(found.shown, weights, teacher_field), *notes]
    table = encoded.table
    none = ExampleSet(
        table,
        [],
        seq_len,
        encoder.pad_id,
        pack,
        lengths,
        teacher_weights=encoded.teacher_weights,
        teacher_len=teacher_len,
    )
    sides, rooms = [], none.rooms()
    for examples in (np.flatnonzero(~encoded.held_out), encoded.held_out_order):
        if pack:
            places = pack_rows(rooms[examples].tolist(), seq_len)
        else:
            places = [(place,) for place in range(len(examples))]
        rows = [tuple(examples[list(row)].tolist()) for row in places]
        sides.append(dataclasses.replace(none, rows=rows))
    train, held = sides
    info = DatasetInfo(
        train=_describe(train),
        held_out=_describe(held),
        dropped=dict(left_out.reasons),
        problems=tuple(f"{each.origin}: {each.message}" for each in left_out.problems),
        unused_keys=dict(Counter(encoded.unused_keys).most_common(_NAMED)),
        num_skipped_files=len(skipped_files),
        skipped_files=tuple(skipped_files[:_NAMED]),
        notes=tuple(notes[:_NAMED]),
        fingerprint=_fingerprint(table, train, held),
    )
    return Dataset(train, held, info)


class _Encoded(NamedTuple):
    """Examples, which are held out, and the order of those that are."""

    table: TokenTable
    held_out: Bool[np.ndarray, " examples"]
    held_out_order: Int[np.ndarray, " held_out"]
    unused_keys: Mapping[str, int] = types.MappingProxyType({})
    teacher_weights: Float32[np.ndarray, "documents teachers"] | None = None


def _say_teachers(
    shown: str, weights: Float32[np.ndarray, "documents teachers"], field: TeacherField
) -> str:
    """Returns a line about how many records name their teachers.

    Raises:
        DataError: If none does.
    """
    default = np.asarray(field.weights, np.float32)
    named = int((weights != default).any(axis=1).sum())
    if not named:
        raise DataError(
            f"teacher_field: no record of {shown} says by `{field.key}` "
            "anything else than --teacher-weights; leave it out, or give the right key"
        )
    means = ", ".join(
        f"{name} {share:.1%}"
        for name, share in zip(field.teachers, weights.mean(axis=0), strict=True)
    )
    return (
        f"{named:,} of {len(weights):,} documents say by `{field.key}` which teachers "
        f"they learn from; on average {means}"
    )


def _encode(
    shown: str,
    documents: Iterator[tuple[str, Document | RecordError]],
    intake: Intake,
    held_out_fraction: float,
    left_out: LeftOut,
) -> _Encoded:
    first = list(itertools.islice(documents, 2))
    if held_out_fraction:
        first = cut_only_text(first, held_out_fraction)
    pairs, ranks, too_long, teachers = [], [], [], []
    unused_keys: Counter[str] = Counter()
    for outcome in intake.outcomes(itertools.chain(first, documents)):
        unused_keys.update(outcome.unused_keys)
        if outcome.error is None:
            pairs += [(len(ranks), example) for example in outcome.examples]
            ranks.append(outcome.document.rank)  # pyright: ignore
            teachers.append(outcome.document.teacher_weights)  # pyright: ignore
            continue
        left_out.add(outcome.origin, outcome.error)
        if outcome.error.reason == "too_long":
            too_long.append(outcome.tokens)
    if not pairs:
        message = nothing_left(shown, left_out.reasons)
        if too_long:
            message += (
                f"; the shortest conversation has {min(too_long)} tokens: raise "
                "seq_len, or shorten the conversations"
            )
        elif left_out.reasons["teacher_too_long"]:
            message += "; the teacher's rows are too short: raise teacher_seq_len"
        elif left_out.reasons["all_masked"]:
            message += (
                "; every token is masked: check the answers, or train on prompts too"
            )
        for problem in left_out.problems[:1]:
            message += f"; the first problem: {problem.origin}: {problem.message}"
        raise DataError(message)
    table = make_table(pairs)
    rank = np.array(ranks)[table.documents]
    held_out = hold_out(rank, table.lengths, held_out_fraction, shown)
    # By rank, so that the first few are a fair sample: the order of files would put one
    # file's documents first. The windows of a document stay together.
    order = np.flatnonzero(held_out)
    order = order[np.argsort(rank[order], kind="stable")]
    weights = np.array(teachers, np.float32) if teachers[0] else None
    return _Encoded(table, held_out, order, unused_keys, weights)


def _describe(side: ExampleSet) -> SideInfo:
    numbers = [number for row in side.rows for number in row]
    tokens = int(side.table.lengths[numbers].sum()) if numbers else 0
    counted = sum(int(side.table[number].counted.sum()) for number in numbers)
    # Tokens that all rows have room for.
    lengths = np.array(side.buckets or (side.seq_len,))
    slots = int(lengths[np.searchsorted(lengths, side.tokens_of_rows())].sum())
    return SideInfo(
        documents=len(np.unique(side.table.documents[numbers])) if numbers else 0,
        examples=len(numbers),
        rows=len(side),
        tokens=tokens,
        counted_tokens=counted,
        fill=tokens / slots if slots else 0.0,
    )


def _fingerprint(table: TokenTable, *sides: ExampleSet) -> str:
    rows = [side.rows for side in sides]
    digest = hashlib.blake2b(f"{table.digest()} {rows}".encode(), digest_size=8)
    if sides[0].teacher_weights is not None:
        digest.update(sides[0].teacher_weights.tobytes())
    return digest.hexdigest()
