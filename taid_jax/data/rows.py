"""A table of rows from records: encoded in parallel, chosen, written as shards."""

import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError, Problem, RecordError
from taid_jax.data.intake import Intake, Limits, Outcome, read_documents
from taid_jax.data.options import PrepareOptions
from taid_jax.data.shards import SHARD_SCHEMA, TRAIN, VALIDATION, ShardFile
from taid_jax.data.sources import Source, read_source
from taid_jax.data.split import hold_out
from taid_jax.data.template import placeholder
from taid_jax.data.tokens import Encoder, Tokenizer
from taid_jax.files import written_aside

if TYPE_CHECKING:
    import datasets

PIECE = 50_000
"""Records that are encoded between two points from which a preparation goes on."""


_ROWS = pyarrow.schema(
    [
        # Of the record, and on which side it is given.
        ("number", pyarrow.int64()),
        ("side", pyarrow.string()),
        ("origin", pyarrow.string()),
        # Why it is left out; empty if it is not.
        ("reason", pyarrow.string()),
        ("message", pyarrow.string()),
        ("unused", pyarrow.list_(pyarrow.string())),
        ("chat", pyarrow.bool_()),
        # Place in the shuffle; of the document.
        ("key", pyarrow.int64()),
        ("rank", pyarrow.float64()),
        # Hashes of what the record is called, and of that and all it says; 0 without a
        # name.
        ("name", pyarrow.int64()),
        ("copy", pyarrow.int64()),
        ("tokens", pyarrow.int64()),
        *SHARD_SCHEMA,
    ]
)


Facts = Mapping[str, np.ndarray]
"""Columns of all rows, each in one array."""


def read_facts(rows: "datasets.Dataset") -> Facts:
    """Returns the columns that it is decided by which rows are saved."""
    names = (
        "number",
        "side",
        "reason",
        "chat",
        "key",
        "rank",
        "name",
        "copy",
        "tokens",
    )
    return {name: rows.data.column(name).to_numpy() for name in names}


def encode_records(
    work: pathlib.Path,
    sources: Mapping[str, Source],
    tokenizer: Tokenizer,
    options: PrepareOptions,
) -> "datasets.Dataset":
    """Returns a row for every example, and for every record that is left out.

    What is in the folder is not made again.
    """
    # Imported here, as wherever it takes seconds: `--help` needs none of it.
    import datasets
    import multiprocess
    from datasets.exceptions import DatasetGenerationError

    def read() -> Iterator[dict[str, Any]]:
        number = 0
        for side, source in sources.items():
            for origin, record in read_source(source, options.max_record_bytes):
                row = {"number": number, "side": side, "origin": origin}
                if isinstance(record, RecordError):
                    problem = {"reason": record.reason, "message": _text(str(record))}
                    yield row | problem | {"record": ""}
                else:
                    text = json.dumps(record, default=placeholder)
                    yield row | {"record": text, "reason": "", "message": ""}
                number += 1

    texts = ("side", "origin", "record", "reason", "message")
    # What it warns of is its own cache.
    datasets.logging.set_verbosity_error()
    try:
        records: Any = datasets.Dataset.from_generator(
            read,
            # The record is JSON; or there is a reason why there is none.
            features=datasets.Features(
                {"number": datasets.Value("int64")}
                | {name: datasets.Value("string") for name in texts}
            ),
            cache_dir=str(work),
            fingerprint="records",
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise
    jobs = min(options.workers, len(records))
    if jobs > 1:
        # Not forked: the tokenizers have threads.
        multiprocess.set_start_method("spawn", force=True)  # pyright: ignore
        multiprocess.get_context("spawn").Manager = _manager  # pyright: ignore
    pieces = [
        records.select(range(start, min(start + PIECE, len(records)))).map(
            _Encode(tokenizer, options),
            batched=True,
            batch_size=128,
            num_proc=jobs if jobs > 1 else None,
            remove_columns=["record"],
            features=datasets.Features.from_arrow_schema(_ROWS),
            load_from_cache_file=True,
            cache_file_name=str(work / f"rows-{start}.arrow"),
            new_fingerprint=f"rows-{start}",
            desc=f"encoding, from record {start:,}",
        )
        for start in range(0, len(records), PIECE)
    ]
    return datasets.concatenate_datasets(pieces)


class _Encode:
    """Turns a batch of records into rows."""

    def __init__(self, tokenizer: Tokenizer, options: PrepareOptions):
        self._tokenizer, self._options = tokenizer, options
        self._intake: Intake | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a process of the pool, as soon as it has its task.
        self.__dict__.update(state)
        _watch_parent()

    def __call__(self, batch: Mapping[str, list[Any]]) -> pyarrow.Table:
        options = self._options
        if self._intake is None:
            self._intake = Intake(
                Encoder(self._tokenizer),
                Limits(options.max_tokens, options.max_prompt, options.max_answer),
                train_on_prompts=options.train_on_prompts,
                merge_system=options.merge_system,
                template_date=options.template_date,
            )
        records = (
            (origin, RecordError(reason, message) if reason else json.loads(record))
            for origin, record, reason, message in zip(
                *(batch[name] for name in ("origin", "record", "reason", "message")),
                strict=True,
            )
        )
        columns: dict[str, list[Any]] = {name: [] for name in _ROWS.names}
        given = zip(batch["number"], batch["side"], strict=True)
        documents = read_documents(records, options.seed)
        try:
            outcomes = list(self._intake.outcomes(documents))
        except DataError as error:
            # Plain, because not every subclass can be sent to another process.
            raise DataError(str(error)) from None
        for (number, side), outcome in zip(given, outcomes, strict=True):
            for row in _rows_of(outcome, options.seed):
                for name, value in (row | {"number": number, "side": side}).items():
                    columns[name].append(value)
        return pyarrow.table(columns, schema=_ROWS)


def _rows_of(outcome: Outcome, seed: int) -> Iterator[dict[str, Any]]:
    """Yields a row for each example of a record, or one that says why there is none."""
    error, document = outcome.error, outcome.document
    row = {
        "origin": _text(outcome.origin),
        "reason": error.reason if error else "",
        "message": _text(str(error)) if error else "",
        "unused": list(map(_text, outcome.unused_keys)),
        "chat": False,
        **dict.fromkeys(("key", "name", "copy"), 0),
        "rank": 0.0,
        "tokens": outcome.tokens,
        "input_ids": [],
        "loss_mask": [],
        "prompt": 0,
        "answer_end": 0,
        "text": False,
    }
    if isinstance(document, Document):
        is_text = isinstance(document.content, Text)
        row |= {"rank": document.rank, "text": is_text, "chat": not is_text}
    if error or not isinstance(document, Document):
        yield row
        return
    if document.name is not None:
        row["name"] = _hash(0, document.name)
        row["copy"] = _hash(0, document.name, document.content)
    for window, example in enumerate(outcome.examples):
        yield row | {
            "key": _hash(seed, document.content, window),
            "tokens": len(example.ids),
            "input_ids": example.ids,
            "loss_mask": example.counted,
            "prompt": example.prompt,
            "answer_end": example.answer_end,
        }


def _hash(seed: int, *parts: object) -> int:
    """Returns 63 bits, never 0, that depend on all parts and the seed."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(text, digest_size=8, salt=salt).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


def _text(text: str) -> str:
    """Returns text that a table can hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _manager() -> Any:
    """Returns the server of the pool's queue, which ends with its parent as well."""
    import multiprocess
    from multiprocess.managers import SyncManager

    context = multiprocess.get_context("spawn")  # pyright: ignore
    manager = SyncManager(ctx=context)
    manager.start(_watch_parent)
    return manager


def _watch_parent() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # The pool's queues keep a process waiting whose parent was killed.
    import multiprocess

    if parent := multiprocess.parent_process():  # pyright: ignore
        parent.join()
        os._exit(1)


class Choice(NamedTuple):
    """What becomes of the rows."""

    side: np.ndarray
    left_out: list[Problem]
    noted: list[Problem]


def choose(
    rows: "datasets.Dataset",
    facts: Facts,
    sides: Collection[str],
    options: PrepareOptions,
) -> Choice:
    """Returns what becomes of the rows.

    A record that says the same under the same name as one before it is left out. One
    that says something else under a name that was there before is saved and noted:
    UltraChat calls a conversation by its prompt. A prompt that is trained and validated
    on is noted too.

    Raises:
        DataError: If all documents are copies of one, which cannot be split.
    """
    copies = _again(facts["copy"], facts["number"])
    renamed = _again(facts["name"], facts["number"]) & ~copies
    side = np.where((facts["reason"] == "") & ~copies, facts["side"], "")
    if VALIDATION not in sides and options.held_out_fraction:
        sound = np.flatnonzero(side)
        held_out = hold_out(
            facts["rank"][sound],
            facts["tokens"][sound],
            options.held_out_fraction,
            options.data,
        )
        side[sound[held_out]] = VALIDATION
    beyond = np.flatnonzero(side == VALIDATION)
    beyond = beyond[np.argsort(facts["key"][beyond], kind="stable")]
    beyond = np.sort(beyond[options.validation_limit or len(beyond) :])
    side[beyond] = ""
    trained = np.unique(facts["rank"][side == TRAIN])
    shared = (side == VALIDATION) & np.isin(facts["rank"], trained)

    def say(which: np.ndarray, reason: str, message: str) -> list[Problem]:
        # Once a record, of which texts have several rows.
        places = np.flatnonzero(which)
        places = places[np.unique(facts["number"][places], return_index=True)[1]]
        origins = rows.select(places)["origin"]
        return [Problem(origin, reason, message) for origin in origins]

    copied = "says the same under the same name as one before"
    left_out = say(copies, "copy", copied)
    limit = f"the limit is {options.validation_limit}"
    left_out += [
        Problem(origin, "beyond_limit", limit)
        for origin in rows.select(beyond)["origin"]
    ]
    noted = say(renamed, "same_name", "has the name of one before; saved")
    both = "is validated on; its prompt is trained on too; saved"
    return Choice(side, left_out, noted + say(shared, "prompt_on_both_sides", both))


def _again(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns which rows have the hash of a record before theirs, 0 left aside."""
    _, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    return (hashes != 0) & (numbers[first][place] != numbers)


def write_shards(
    output: pathlib.Path,
    side: str,
    rows: "datasets.Dataset",
    chosen: np.ndarray,
    facts: Facts,
    shard_tokens: int,
) -> Iterator[ShardFile]:
    """Writes the chosen rows, in order, into shards of about so many tokens."""
    done = np.cumsum(facts["tokens"][chosen])
    total = int(done[-1]) if len(done) else 0
    count = -(-total // shard_tokens)
    borders = np.searchsorted(done, np.arange(1, count) * total / max(1, count))
    for number, places in enumerate(np.split(chosen, borders)[:count]):
        path = output / f"{side}-{number:05}.parquet"
        table = rows.select(places).select_columns(SHARD_SCHEMA.names)
        with written_aside(path) as aside:
            table.to_parquet(aside)
        data = path.read_bytes()
        yield ShardFile(
            name=path.name,
            side=side,
            examples=len(places),
            tokens=int(facts["tokens"][places].sum()),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
