"""The preparation from beginning to end, and from where it was stopped."""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from taid_jax.data.encoding import Tokenizer
from taid_jax.data.errors import BadRecords, DataError, Problem
from taid_jax.data.identity import identify
from taid_jax.data.manifest import (
    MANIFEST,
    SIDES,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardFile,
    read_manifest,
)
from taid_jax.data.prepare.choose import (
    CODES,
    Rows,
    choose,
    nothing_left,
    read_rows,
    share_out,
)
from taid_jax.data.prepare.encode import PartRecord, PartWriter, read_part_record
from taid_jax.data.prepare.merge import side_path, write_shard
from taid_jax.data.prepare.options import PrepareOptions
from taid_jax.data.prepare.parallel import run_all
from taid_jax.data.prepare.pieces import SourceFile, Work, cut_sources, list_sources
from taid_jax.files import write_whole

REPORT = "left_out.jsonl"
"""A line for every record that was left out or noted: origin, reason, message."""

_WORK = ".unfinished"
_PLAN = "plan.json"
_ASKED = "asked.json"
_KEYS_NAMED = 20
_PACKAGES = ("taid-jax", "transformers", "tokenizers", "pyarrow", "numpy", "jinja2")

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many of it are done, and how many there are."""


def prepare(
    options: PrepareOptions,
    tokenizer: Tokenizer,
    *,
    progress: Progress = lambda what, done, total: None,
) -> Manifest:
    """Prepares a source and returns the manifest of what came out.

    Stopped at any point and called again with the same options, it goes on from the
    last finished part and gives the same bytes. The number of processes does not matter
    either.

    Args:
        options: What is asked for.
        tokenizer: Of the teacher, with its chat template.
        progress: Told how it goes.

    Raises:
        DataError: If the source cannot be used, nothing of it is left, or the folder
            holds something else.
    """
    output = pathlib.Path(options.output)
    work = output / _WORK
    identity = identify(tokenizer)
    options = dataclasses.replace(options, template_date=_date(options, output))
    lasting = {"options": options.lasting(), "tokenizer": identity._asdict()}
    done = _look(output, lasting)
    if done is not None:
        return done
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: cannot make {output}: {error.strerror}") from error
    _same_or_new(work / _ASKED, lasting, output)
    source = BadRecords()
    files = list_sources(options, work, source)
    _same_or_new(work / _PLAN, {"files": [_stamp(file) for file in files]}, output)

    pieces = cut_sources(files, options.piece_bytes)
    records = _encode(work, pieces, tokenizer, options, progress)
    left_out = sum((Counter(record.left_out) for record in records), Counter())
    problems = [Problem(*each) for record in records for each in record.problems]
    rows = read_rows(work, len(pieces))
    try:
        if not len(rows.part):
            shortest = [r.shortest_too_long for r in records if r.shortest_too_long]
            raise nothing_left(options.data, left_out, min(shortest, default=None))
        choice = choose(rows, [piece.side for piece in pieces], options, work)
        for side in SIDES:
            asked = side == TRAIN or VALIDATION in {piece.side for piece in pieces}
            if asked and not (choice.side == CODES[side]).any():
                raise DataError(
                    f"{options.data}: nothing is left on the {side} side "
                    f"({dict(left_out + choice.left_out)})"
                )
    except DataError:
        # So that it can be begun anew with other options; the report tells why.
        _write_report(output, problems)
        shutil.rmtree(work)
        raise
    shards = _merge(work, output, rows, choice.side, options, progress)
    _write_report(output, problems + choice.problems)
    manifest = Manifest(
        tokenizer=identity,
        chats=any(record.chats for record in records),
        train_on_prompts=options.train_on_prompts,
        options=options.lasting(),
        sources=[
            {"name": file.shown, "side": file.side, "bytes": file.path.stat().st_size}
            for file in files
        ],
        records=sum(record.records for record in records),
        left_out=dict(left_out + choice.left_out),
        noted=dict(choice.noted),
        files=shards,
        versions=_versions(),
        unused_keys=dict(
            sum(
                (Counter(record.unused_keys) for record in records), Counter()
            ).most_common(_KEYS_NAMED)
        ),
        skipped_files=source.skipped_files,
        notes=[*source.notes, *(note for record in records for note in record.notes)],
    )
    manifest.write(output)
    shutil.rmtree(work)
    return manifest


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


def _look(output: pathlib.Path, lasting: dict[str, Any]) -> Manifest | None:
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
    if differing := _differing(found, lasting):
        raise DataError(
            f"output: {output} holds data that were prepared otherwise "
            f"({'; '.join(differing)}); choose another --output. Nothing was changed"
        )
    shutil.rmtree(output / _WORK, ignore_errors=True)
    return manifest


def _same_or_new(
    path: pathlib.Path, values: dict[str, Any], output: pathlib.Path
) -> None:
    """Notes what is being done, or checks that the same was begun before.

    Raises:
        DataError: If something else was begun.
    """
    if not path.exists():
        write_whole(path, json.dumps(values, indent=2).encode())
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if differing := _differing(begun, values):
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


def _stamp(file: SourceFile) -> list[Any]:
    state = file.path.stat()
    return [file.shown, file.side, state.st_size, state.st_mtime_ns]


def _write_part(writer: PartWriter, number: int, work: Work) -> None:
    writer.write(number, work)


def _encode(
    work: pathlib.Path,
    pieces: Sequence[Work],
    tokenizer: Tokenizer,
    options: PrepareOptions,
    progress: Progress,
) -> list[PartRecord]:
    """Returns the records of all parts, after making those that are not there."""
    missing = [
        (number, piece)
        for number, piece in enumerate(pieces)
        if read_part_record(work, number) is None
    ]
    done = len(pieces) - len(missing)
    progress("pieces encoded", done, len(pieces))
    for _ in run_all(
        _write_part,
        missing,
        workers=options.workers,
        make_ready=PartWriter,
        ready_arguments=(work, tokenizer, options),
    ):
        done += 1
        progress("pieces encoded", done, len(pieces))
    records = [read_part_record(work, number) for number in range(len(pieces))]
    return [record for record in records if record is not None]


def _no_matter() -> None:
    """Makes nothing ready."""


def _write_one(
    ready: None, work: pathlib.Path, output: pathlib.Path, *arguments: Any
) -> ShardFile:
    return write_shard(work, output, *arguments)


def _merge(
    work: pathlib.Path,
    output: pathlib.Path,
    rows: Rows,
    sides: np.ndarray,
    options: PrepareOptions,
    progress: Progress,
) -> list[ShardFile]:
    """Returns the shards, in order, after writing those that are not there."""
    edges = np.searchsorted(rows.part, np.arange(rows.part.max() + 2))
    for part, (start, stop) in enumerate(itertools.pairwise(edges)):
        with side_path(work, part).open("wb") as file:
            np.save(file, sides[start:stop], allow_pickle=False)
    tasks = []
    for side in SIDES:
        found = share_out(rows, sides == CODES[side], options.shard_tokens)
        tasks += [
            (work, output, side, f"{side}-{number:05}.parquet", slices)
            for number, slices in enumerate(found)
        ]
    progress("shards written", 0, len(tasks))
    written: dict[str, ShardFile] = {}
    for file in run_all(
        _write_one,
        tasks,
        workers=options.workers,
        make_ready=_no_matter,
        ready_arguments=(),
    ):
        written[file.name] = file
        progress("shards written", len(written), len(tasks))
    return [written[task[3]] for task in tasks]


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
