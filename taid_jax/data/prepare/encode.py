"""One piece of the source to a part: encoded, filtered, in the order of the shuffle."""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow

from taid_jax.data.documents import Document, Text
from taid_jax.data.encoding import Encoder, Tokenizer
from taid_jax.data.errors import BadRecords, Problem
from taid_jax.data.intake import Intake, Limits
from taid_jax.data.prepare.options import PrepareOptions
from taid_jax.data.prepare.pieces import Work
from taid_jax.data.shards import EXAMPLE_FIELDS, example_columns, parquet_bytes
from taid_jax.data.sources import read_piece
from taid_jax.data.tokens import Example
from taid_jax.files import write_whole

PART_ROWS = 1024
"""Rows of a row group of a part: the least that is read to take an example out."""

PART_SCHEMA = pyarrow.schema(
    [
        pyarrow.field(name, kind, nullable=False)
        for name, kind in (
            # Place in the shuffle.
            ("key", pyarrow.uint64()),
            # Number of its document in the piece.
            ("document", pyarrow.int64()),
            ("rank", pyarrow.float64()),
            # Hashes of what the record is called, and of that and all it says; 0
            # without a name.
            ("name", pyarrow.uint64()),
            ("copy", pyarrow.uint64()),
            ("tokens", pyarrow.int64()),
            ("origin", pyarrow.string()),
        )
    ]
    + list(EXAMPLE_FIELDS)
)


class PartRecord(NamedTuple):
    """What is noted of a finished part, beside it.

    Attributes:
        records: How many were read.
        chats: Whether a chat template was used.
        left_out: How many were not taken, by reason.
        problems: Each of those: origin, reason, message.
        shortest_too_long: Tokens of the shortest conversation that was too long.
        examples: Rows of the part.
        unused_keys: How many records had each key that changed nothing.
        notes: What else is to be said of the piece.
    """

    records: int
    chats: bool
    left_out: dict[str, int]
    problems: list[list[str]]
    shortest_too_long: int | None
    examples: int
    unused_keys: dict[str, int]
    notes: list[str]


def part_path(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Returns where a part is put; its record lies beside it, as .json."""
    return folder / f"part-{number:05}.parquet"


def read_part_record(folder: pathlib.Path, number: int) -> PartRecord | None:
    """Returns what is noted of a part, None as long as it is not finished."""
    path = part_path(folder, number)
    record = path.with_suffix(".json")
    if not (path.exists() and record.exists()):
        return None
    return PartRecord(**json.loads(record.read_text(encoding="utf-8")))


class PartWriter:
    """What a process needs to encode pieces.

    Args:
        folder: Where parts are put.
        tokenizer: Of the teacher.
        options: What is asked for.
    """

    def __init__(
        self, folder: pathlib.Path, tokenizer: Tokenizer, options: PrepareOptions
    ):
        self._folder = folder
        self._encoder = Encoder(tokenizer)
        self._options = options

    def write(self, number: int, work: Work) -> None:
        """Encodes a piece into a part, with its record.

        Raises:
            DataError: If the file cannot be read, or a chat template is missing.
        """
        options = self._options
        # Told apart, so that the records read can be counted.
        unread = BadRecords("count", kept=None)
        unused = BadRecords("count", kept=None, filtered=True)
        limits = Limits(options.max_tokens, options.max_prompt, options.max_answer)
        intake = Intake(
            self._encoder,
            limits,
            train_on_prompts=options.train_on_prompts,
            bad=unused,
            merge_system=options.merge_system,
            template_date=options.template_date,
        )
        read, chats = 0, False

        def documents() -> Iterator[Document]:
            nonlocal read, chats
            for document in read_piece(
                work.piece, options.seed, unread, options.max_record_bytes
            ):
                read += 1
                chats = chats or not isinstance(document.content, Text)
                yield document

        table = _part(list(intake.examples(documents())), options.seed)
        problems = sorted([*unread.problems, *unused.problems], key=_place)
        record = PartRecord(
            records=read + unread.count,
            chats=chats,
            left_out=dict(unread.reasons + unused.reasons),
            problems=[list(problem) for problem in problems],
            shortest_too_long=intake.shortest_too_long,
            examples=len(table),
            unused_keys=dict(unread.unused_keys + unused.unused_keys),
            notes=unread.notes,
        )
        path = part_path(self._folder, number)
        write_whole(path, parquet_bytes(table, PART_ROWS))
        text = json.dumps(record._asdict(), ensure_ascii=False)
        write_whole(path.with_suffix(".json"), text.encode())


def _place(problem: Problem) -> int:
    """Returns the number of the line or row, 0 for a whole file."""
    last = problem.origin.rpartition(" ")[2]
    return int(last) if last.isdigit() else 0


def _hash(seed: int, *parts: object) -> int:
    """Returns 64 bits, never 0, that depend on all parts and the seed."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") or 1


def _part(rows: list[tuple[int, Document, Example]], seed: int) -> pyarrow.Table:
    """Returns the part of (number of the document, document, example) rows."""
    columns: dict[str, list[object]] = {
        name: [] for name in ("key", "document", "rank", "name", "copy", "origin")
    }
    window, before = 0, -1
    for number, document, _ in rows:
        window = window + 1 if number == before else 0
        before = number
        name = document.name
        columns["key"].append(_hash(seed, document.content, window))
        columns["document"].append(number)
        columns["rank"].append(document.rank)
        columns["name"].append(0 if name is None else _hash(0, name))
        copy = 0 if name is None else _hash(0, name, document.content)
        columns["copy"].append(copy)
        columns["origin"].append(document.origin)
    examples = [example for *_, example in rows]
    lengths = [len(example.ids) for example in examples]
    values = {
        **columns,
        "tokens": lengths,
        **example_columns(
            examples, [isinstance(document.content, Text) for _, document, _ in rows]
        ),
    }
    table = pyarrow.table(
        [
            pyarrow.array(values[f.name], f.type)
            if isinstance(values[f.name], list)
            else values[f.name]
            for f in PART_SCHEMA
        ],
        schema=PART_SCHEMA,
    )
    # A stable sort: windows and copies stay in order.
    order = np.argsort(np.array(columns["key"], np.uint64), kind="stable")
    return table.take(order)
