"""Raw conversations to shards of token ids: once, before training.

`datasets` reads the source into a table, renders and encodes it in parallel, piece by
piece, and keeps what is done in the folder's `.unfinished`: stopped at any point, it
goes on from there. Then it is decided which examples are kept, and shards are written.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError, Problem, RecordError, nothing_left
from taid_jax.data.intake import Intake, Limits, Outcome, read_documents
from taid_jax.data.options import PRESETS as PRESETS
from taid_jax.data.options import PrepareOptions as PrepareOptions
from taid_jax.data.shards import (
    MANIFEST,
    SHARD_SCHEMA,
    SIDES,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardFile,
    identify,
    read_manifest,
)
from taid_jax.data.sources import Source, find_source, read_source
from taid_jax.data.split import hold_out
from taid_jax.data.tokens import Encoder, Tokenizer
from taid_jax.files import write_whole, written_aside

if TYPE_CHECKING:
    import datasets

REPORT = "left_out.jsonl"
"""A line for every record that was left out or noted: origin, reason, message."""

_WORK, _ASKED = ".unfinished", "asked.json"
_KEYS_NAMED = 20
_PACKAGES = ("taid-jax", "transformers", "tokenizers", "datasets", "pyarrow", "jinja2")

_PIECE = 50_000
"""Records that are encoded between two points from which a preparation goes on."""


def prepare(options: PrepareOptions, tokenizer: Tokenizer) -> Manifest:
    """Prepares a source and returns the manifest of what came out.

    Stopped at any point and called again with the same options, it goes on from the
    last finished piece and gives the same bytes. The number of processes does not
    matter either.

    Args:
        options: What is asked for.
        tokenizer: Of the teacher, with its chat template.

    Raises:
        DataError: If the source cannot be used, nothing of it is left, or the folder
            holds something else.
    """
    output = pathlib.Path(options.output)
    work = output / _WORK
    identity = identify(tokenizer)
    options = dataclasses.replace(options, template_date=_date(options, output))
    asked = {"options": options.lasting(), "tokenizer": identity._asdict()}
    if (done := _look(output, asked)) is not None:
        return done
    sources = _sources(options)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: cannot make {output}: {error.strerror}") from error
    files = [stamp for side in sources for stamp in _stamps(side, sources[side])]
    _same_or_new(work / _ASKED, asked | {"files": files}, output)

    rows = _encoded(work, sources, tokenizer, options)
    facts = _Facts(*(rows.data.column(name).to_numpy() for name in _Facts._fields))
    left_out = _problems(rows, np.flatnonzero(facts.reason != ""))
    try:
        if len(left_out) == len(rows):
            raise _nothing_left(options.data, left_out, facts)
        choice = _choose(rows, facts, sources.keys(), options)
        left_out += choice.left_out
        for side in sources:
            if not (choice.side == side).any():
                counts = dict(Counter(problem.reason for problem in left_out))
                raise DataError(
                    f"{options.data}: nothing is left on the {side} side ({counts})"
                )
    except DataError:
        # So that it can be begun anew with other options; the report tells why.
        _write_report(output, left_out)
        shutil.rmtree(work)
        raise
    shards = []
    for side in SIDES:
        chosen = np.flatnonzero(choice.side == side)
        # A stable sort: windows and copies stay in order.
        chosen = chosen[np.argsort(facts.key[chosen], kind="stable")]
        shards += _write_shards(output, side, rows, chosen, facts, options.shard_tokens)
    _write_report(output, left_out + choice.noted)
    # The first row of every record: texts have several.
    first = np.unique(facts.number, return_index=True)[1]
    unused = Counter(key for keys in rows.select(first)["unused"] for key in keys)
    manifest = Manifest(
        tokenizer=identity,
        chats=bool(facts.chat.any()),
        train_on_prompts=options.train_on_prompts,
        options=options.lasting(),
        sources=[{"name": n, "side": s, "bytes": size} for s, n, size, _ in files],
        records=len(first),
        left_out=_count(left_out),
        noted=_count(choice.noted),
        files=shards,
        versions=_versions(),
        unused_keys=dict(unused.most_common(_KEYS_NAMED)),
        skipped_files=[
            name for each in sources.values() for name in each.skipped_files
        ],
        notes=[note for each in sources.values() for note in each.notes],
    )
    manifest.write(output)
    shutil.rmtree(work)
    return manifest


def _sources(options: PrepareOptions) -> dict[str, Source]:
    """Returns what is read for each side."""
    sources = {TRAIN: find_source(options.data, options.split)}
    if options.validation_split or options.validation_data:
        data = options.validation_data or options.data
        sources[VALIDATION] = find_source(data, options.validation_split)
        for entry in sources[VALIDATION].entries:
            if isinstance(entry, pathlib.Path) and entry in sources[TRAIN].entries:
                raise DataError(
                    f"{entry} would be both trained and validated on; give another "
                    "validation_data"
                )
    return sources


def _stamps(side: str, source: Source) -> Iterator[list[Any]]:
    """Yields the side, the name, the bytes and the age of everything that is read."""
    for entry in source.entries:
        if isinstance(entry, pathlib.Path):
            state = entry.stat()
            yield [side, str(entry), state.st_size, state.st_mtime_ns]
        elif isinstance(entry, tuple):
            yield [side, entry[0], entry[1].data.nbytes, len(entry[1])]
        else:
            yield [side, entry, 0, 0]


_RECORDS = pyarrow.schema(
    [
        ("number", pyarrow.int64()),
        ("side", pyarrow.string()),
        ("origin", pyarrow.string()),
        # Its JSON; or why there is none.
        ("record", pyarrow.string()),
        ("reason", pyarrow.string()),
        ("message", pyarrow.string()),
    ]
)
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


class _Facts(NamedTuple):
    """Columns of all rows, each in one array."""

    number: np.ndarray
    side: np.ndarray
    reason: np.ndarray
    chat: np.ndarray
    key: np.ndarray
    rank: np.ndarray
    name: np.ndarray
    copy: np.ndarray
    tokens: np.ndarray


def _encoded(
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
                    text = json.dumps(record, default=_placeholder)
                    yield row | {"record": text, "reason": "", "message": ""}
                number += 1

    # What it warns of is its own cache.
    datasets.logging.set_verbosity_error()
    try:
        records: Any = datasets.Dataset.from_generator(
            read,
            features=datasets.Features.from_arrow_schema(_RECORDS),
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
    pieces = [
        records.select(range(start, min(start + _PIECE, len(records)))).map(
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
        for start in range(0, len(records), _PIECE)
    ]
    return datasets.concatenate_datasets(pieces)


class _Encode:
    """Turns a batch of records into rows.

    Args:
        tokenizer: Of the teacher.
        options: What is asked for.
    """

    def __init__(self, tokenizer: Tokenizer, options: PrepareOptions):
        self._tokenizer, self._options = tokenizer, options
        self._intake: Intake | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> pyarrow.Table:
        options = self._options
        if self._intake is None:
            threading.Thread(target=_end_with_parent, daemon=True).start()
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


def _placeholder(value: object) -> str:
    """Returns what stands for a value that is no JSON."""
    return f"<{type(value).__name__}>"


def _end_with_parent() -> None:
    # The pool's queues keep a process waiting whose parent was killed.
    import multiprocess

    if parent := multiprocess.parent_process():  # pyright: ignore
        parent.join()
        os._exit(1)


class _Choice(NamedTuple):
    """What becomes of the rows.

    Attributes:
        side: Of every row; empty if it is left out.
        left_out: Records that are left out here.
        noted: Those that are kept though there is something to say.
    """

    side: np.ndarray
    left_out: list[Problem]
    noted: list[Problem]


def _choose(
    rows: "datasets.Dataset",
    facts: _Facts,
    sides: Collection[str],
    options: PrepareOptions,
) -> _Choice:
    """Returns what becomes of the rows.

    A record that says the same under the same name as one before it is left out. One
    that says something else under a name that was there before is kept and noted:
    UltraChat calls a conversation by its prompt. A prompt that is trained and validated
    on is noted too.

    Args:
        rows: All rows.
        facts: Their columns.
        sides: Those that have a source.
        options: What is asked for.

    Raises:
        DataError: If all documents are copies of one, which cannot be split.
    """
    copies = _again(facts.copy, facts.number)
    renamed = _again(facts.name, facts.number) & ~copies
    side = np.where((facts.reason == "") & ~copies, facts.side, "")
    if VALIDATION not in sides and options.held_out_fraction:
        kept = np.flatnonzero(side)
        held_out = hold_out(
            facts.rank[kept],
            facts.tokens[kept],
            options.held_out_fraction,
            options.data,
        )
        side[kept[held_out]] = VALIDATION
    beyond = np.flatnonzero(side == VALIDATION)
    beyond = beyond[np.argsort(facts.key[beyond], kind="stable")]
    beyond = np.sort(beyond[options.validation_limit or len(beyond) :])
    side[beyond] = ""
    trained = np.unique(facts.rank[side == TRAIN])
    shared = (side == VALIDATION) & np.isin(facts.rank, trained)

    def say(which: np.ndarray, reason: str, message: str) -> list[Problem]:
        # Once a record, of which texts have several rows.
        places = np.flatnonzero(which)
        places = places[np.unique(facts.number[places], return_index=True)[1]]
        origins = rows.select(places)["origin"]
        return [Problem(origin, reason, message) for origin in origins]

    copied = "says the same under the same name as one before"
    left_out = say(copies, "copy", copied)
    limit = f"the limit is {options.validation_limit}"
    left_out += [
        Problem(origin, "beyond_limit", limit)
        for origin in rows.select(beyond)["origin"]
    ]
    noted = say(renamed, "same_name", "has the name of one before; kept")
    both = "is validated on; its prompt is trained on too; kept"
    return _Choice(side, left_out, noted + say(shared, "prompt_on_both_sides", both))


def _again(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns which rows have the hash of a record before theirs, 0 left aside."""
    _, first, place = np.unique(hashes, return_index=True, return_inverse=True)
    return (hashes != 0) & (numbers[first][place] != numbers)


def _problems(rows: "datasets.Dataset", places: np.ndarray) -> list[Problem]:
    chosen = rows.select(places)
    return list(map(Problem, *(chosen[name] for name in Problem._fields)))


def _count(problems: Sequence[Problem]) -> dict[str, int]:
    return dict(Counter(problem.reason for problem in problems))


def _nothing_left(data: str, left_out: Sequence[Problem], facts: _Facts) -> DataError:
    message = nothing_left(data, _count(left_out))
    too_long = facts.tokens[facts.reason == "too_long"]
    if len(too_long):
        message += f"; the shortest that is too long has {too_long.min()} tokens"
    return DataError(message)


def _write_shards(
    output: pathlib.Path,
    side: str,
    rows: "datasets.Dataset",
    chosen: np.ndarray,
    facts: _Facts,
    shard_tokens: int,
) -> Iterator[ShardFile]:
    """Writes the chosen rows, in order, into shards of about so many tokens."""
    done = np.cumsum(facts.tokens[chosen])
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
            tokens=int(facts.tokens[places].sum()),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )


def _date(options: PrepareOptions, output: pathlib.Path) -> str:
    """Returns the date that chat templates take for today: that of the beginning."""
    begun: Any = {}
    for path in (output / MANIFEST, output / _WORK / _ASKED):
        if path.is_file():
            with contextlib.suppress(OSError, ValueError):
                begun = json.loads(path.read_text(encoding="utf-8"))
    before = begun.get("options", {}) if isinstance(begun, dict) else {}
    date = options.template_date or before.get("template_date")
    return date or datetime.date.today().isoformat()


def _look(output: pathlib.Path, asked: dict[str, Any]) -> Manifest | None:
    """Returns the manifest if all is done, None if there is something to do.

    Raises:
        DataError: If the folder holds something else.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"output: {output} is not a folder")
    manifest = read_manifest(output)
    if manifest is None:
        names = {entry.name for entry in output.iterdir()} if output.exists() else set()
        if names - {REPORT} and _WORK not in names:
            raise DataError(
                f"output: {output} is not empty; choose another --output. Nothing was "
                "changed"
            )
        return None
    found = {"options": manifest.options, "tokenizer": manifest.tokenizer._asdict()}
    if differing := _differing(found, asked):
        raise DataError(
            f"output: {output} holds data that were prepared otherwise "
            f"({'; '.join(differing)}); choose another --output. Nothing was changed"
        )
    shutil.rmtree(output / _WORK, ignore_errors=True)
    return manifest


def _same_or_new(
    path: pathlib.Path, asked: dict[str, Any], output: pathlib.Path
) -> None:
    """Notes what is being done, or checks that the same was begun before.

    Raises:
        DataError: If something else was begun.
    """
    if not path.exists():
        write_whole(path, json.dumps(asked, indent=2).encode())
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if differing := _differing(begun, asked):
        raise DataError(
            f"{output} holds a preparation that was begun otherwise "
            f"({'; '.join(differing)}); ask for the same, or remove the folder"
        )


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    # Through JSON, as the old ones have been.
    new = json.loads(json.dumps(new))
    found = []
    for group, values in new.items():
        if not isinstance(values, dict):
            if old.get(group) != values:
                found.append(f"{group} of the source have changed")
            continue
        before = old.get(group, {})
        found += [
            f"{group}.{name} was {before.get(name)!r}, now {value!r}"
            for name, value in values.items()
            if before.get(name) != value
        ]
    return found


def _write_report(output: pathlib.Path, problems: Sequence[Problem]) -> None:
    lines = [json.dumps(each._asdict(), ensure_ascii=False) for each in problems]
    text = "".join(line + "\n" for line in lines)
    write_whole(output / REPORT, text.encode("utf-8", "backslashreplace"))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
