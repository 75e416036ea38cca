"""Raw conversations to shards of token ids: once, before training.

`datasets` reads the source into a table, renders and encodes it in parallel, piece by
piece, and keeps what is done in the folder's `.unfinished`: stopped at any point, it
goes on from there. Then it is decided which examples are saved, and shards are written.
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
from taid_jax.data.rows import Facts, choose, encode_records, read_facts, write_shards
from taid_jax.data.shards import (
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

    Raises:
        DataError: If the source cannot be used, nothing of it is left, or the folder
            holds something else.
    """
    output = pathlib.Path(options.output)
    work = output / _WORK
    done, begun = _look(output)
    today = datetime.date.today().isoformat()
    date = begun.get("options", {}).get("template_date", today)
    date = options.template_date or date
    options = dataclasses.replace(options, template_date=date)
    identity = identify(tokenizer)
    asked: dict[str, Any] = {
        "options": options.lasting(),
        "tokenizer": identity._asdict(),
    }
    sources = {} if done else _sources(options)
    files = [stamp for side in sources for stamp in _stamps(side, sources[side])]
    asked |= {} if done else {"files": files}
    if differing := _differing(begun, asked):
        state = "data that were prepared" if done else "a preparation that was begun"
        raise DataError(
            f"output: {output} holds {state} otherwise ({'; '.join(differing)}); ask "
            "for the same, or choose another --output. Nothing was changed"
        )
    if done:
        shutil.rmtree(work, ignore_errors=True)
        return done
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"output: cannot make {output}: {error.strerror}") from error
    write_whole(work / _ASKED, json.dumps(asked, indent=2).encode())

    rows = encode_records(work, sources, tokenizer, options)
    facts = read_facts(rows)
    left_out = _problems(rows, np.flatnonzero(facts["reason"] != ""))
    try:
        if len(left_out) == len(rows):
            raise _nothing_left(options.data, left_out, facts)
        choice = choose(rows, facts, sources.keys(), options)
        left_out += choice.left_out
        for side in sources:
            if not (choice.side == side).any():
                where = f"nothing is left on the {side} side"
                raise DataError(f"{options.data}: {where} ({_count(left_out)})")
    except DataError:
        # So that it can be begun anew with other options; the report tells why.
        _write_report(output, left_out)
        shutil.rmtree(work)
        raise
    shards = []
    for side in SIDES:
        chosen = np.flatnonzero(choice.side == side)
        # A stable sort: windows and copies stay in order.
        chosen = chosen[np.argsort(facts["key"][chosen], kind="stable")]
        shards += write_shards(output, side, rows, chosen, facts, options.shard_tokens)
    _write_report(output, left_out + choice.noted)
    # The first row of every record: texts have several.
    first = np.unique(facts["number"], return_index=True)[1]
    unused = Counter(key for keys in rows.select(first)["unused"] for key in keys)
    manifest = Manifest(
        tokenizer=identity,
        chats=bool(facts["chat"].any()),
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
    too_long = facts["tokens"][facts["reason"] == "too_long"]
    if len(too_long):
        message += f"; the shortest that is too long has {too_long.min()} tokens"
    return DataError(message)


def _look(output: pathlib.Path) -> tuple[Manifest | None, dict[str, Any]]:
    """Returns the manifest, if all is done, and what was asked for at the beginning.

    Raises:
        DataError: If the folder holds something else.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"output: {output} is not a folder")
    if (done := read_manifest(output)) is not None:
        asked = {"options": done.options, "tokenizer": done.tokenizer._asdict()}
        return done, asked
    if (path := output / _WORK / _ASKED).is_file():
        return None, json.loads(path.read_text(encoding="utf-8"))
    names = {entry.name for entry in output.iterdir()} if output.exists() else set()
    if names - {REPORT, _WORK}:
        raise DataError(
            f"output: {output} is not empty; choose another --output. Nothing was "
            "changed"
        )
    return None, {}


def _differing(begun: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Returns what is asked for otherwise than at the beginning, if there was one."""
    if not begun:
        return []
    # Through JSON, as what was asked for then has been.
    asked = json.loads(json.dumps(asked))
    files = asked.pop("files", None)
    found = [
        f"{group}.{name} was {begun[group].get(name)!r}, now {value!r}"
        for group, values in asked.items()
        for name, value in values.items()
        if begun[group].get(name) != value
    ]
    changed = begun.get("files") != files
    return [*found, *(["files of the source have changed"] if changed else [])]


def _write_report(output: pathlib.Path, problems: Sequence[Problem]) -> None:
    lines = [json.dumps(each._asdict(), ensure_ascii=False) for each in problems]
    text = "".join(line + "\n" for line in lines)
    write_whole(output / REPORT, text.encode("utf-8", "backslashreplace"))


def _versions() -> dict[str, str]:
    found: dict[str, str] = dict.fromkeys(_PACKAGES, "not installed")
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
