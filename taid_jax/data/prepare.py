"""Raw conversations to shards of token ids: once, before training.

`datasets` reads the source into a table, renders and encodes it in parallel, piece by
piece, and keeps what is done in the folder's `.unfinished`: stopped at any point, it
goes on from there. Then it is decided which examples are kept, and shards are written.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from taid_jax.data.errors import DataError, Problem, nothing_left
from taid_jax.data.options import PRESETS as PRESETS
from taid_jax.data.options import PrepareOptions as PrepareOptions
from taid_jax.data.rows import (
    Facts,
    choose,
    encode_records,
    write_shards,
)
from taid_jax.data.shards import (
    MANIFEST,
    SIDES,
    TRAIN,
    VALIDATION,
    Manifest,
    identify,
    read_manifest,
)
from taid_jax.data.sources import Source, find_source
from taid_jax.data.tokens import Tokenizer
from taid_jax.files import write_whole

if TYPE_CHECKING:
    import datasets

REPORT = "left_out.jsonl"
"""A line for every record that was left out or noted: origin, reason, message."""

_WORK, _ASKED = ".unfinished", "asked.json"
_KEYS_NAMED = 20
_PACKAGES = ("taid-jax", "transformers", "tokenizers", "datasets", "pyarrow", "jinja2")


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

    rows = encode_records(work, sources, tokenizer, options)
    facts = Facts(*(rows.data.column(name).to_numpy() for name in Facts._fields))
    left_out = _problems(rows, np.flatnonzero(facts.reason != ""))
    try:
        if len(left_out) == len(rows):
            raise _nothing_left(options.data, left_out, facts)
        choice = choose(rows, facts, sources.keys(), options)
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
        shards += write_shards(output, side, rows, chosen, facts, options.shard_tokens)
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


def _problems(rows: "datasets.Dataset", places: np.ndarray) -> list[Problem]:
    chosen = rows.select(places)
    return list(map(Problem, *(chosen[name] for name in Problem._fields)))


def _count(problems: Sequence[Problem]) -> dict[str, int]:
    return dict(Counter(problem.reason for problem in problems))


def _nothing_left(data: str, left_out: Sequence[Problem], facts: Facts) -> DataError:
    message = nothing_left(data, _count(left_out))
    too_long = facts.tokens[facts.reason == "too_long"]
    if len(too_long):
        message += f"; the shortest that is too long has {too_long.min()} tokens"
    return DataError(message)


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
