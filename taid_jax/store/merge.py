"""Stores that belong together, joined into one."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from taid_jax.errors import parsing, shorten
from taid_jax.files import written_aside
from taid_jax.settings import SettingsError
from taid_jax.store.folder import Entry, begin_store, finish_store, tidy, writing
from taid_jax.store.format import (
    HEAD,
    INDEX,
    TEACHER,
    File,
    Manifest,
    StoreError,
    describe_file,
    read_manifest,
    stored_mass,
)
from taid_jax.store.read import Store

_ALIKE = ("kind", "columns", "vocab_size", "teacher", "tokenizer", "draws")
_SHARD = re.compile(r"outputs-[0-9-]+\.arrayrecord")
_PART = re.compile(r"([0-9]{1,7})/([0-9]{1,7})")


def merge_stores(
    output: pathlib.Path, parts: Sequence[pathlib.Path], say: Callable[[str], None]
) -> Manifest:
    """Joins stores, and returns the manifest of the one that they become.

    Files with records are linked where the file system can, and copied elsewhere: the
    parts may be removed afterwards. An example that comes again, at the same place of a
    row, is that of the first part that has it.

    Raises:
        StoreError: If a part is no store, or they do not belong together.
        SettingsError: If the output is something else.
        WriteError: If it cannot be written.
    """
    if not parts:
        raise SettingsError("parts: need at least one store to join, got none")
    output = output.expanduser().absolute()
    stores = [Store(part) for part in parts]
    first = stores[0].manifest
    for store in stores[1:]:
        _check_alike(stores[0], store)
    made, missing = _made_of(stores)
    for line in missing:
        say(line)
    plain = json.loads(json.dumps(dataclasses.asdict(first)))
    facts = {name: plain[name] for name in (*_ALIKE, "source")} | {"made": made}
    with contextlib.ExitStack() as hold:
        if not begin_store(output, facts, hold):
            chosen = _choose(stores)
            files = _name_files(stores, chosen)
            for (part, shard), name in files.items():
                file = stores[part].manifest.shards[shard]
                _place(stores[part].folder, file, output / name)
            for file in first.others:
                if file.name == HEAD or file.name.startswith(f"{TEACHER}/"):
                    _place(stores[0].folder, file, output / file.name)
            tokens, mass = _totals(stores, chosen, say)
            shards = [
                dataclasses.replace(stores[part].manifest.shards[shard], name=name)
                for (part, shard), name in files.items()
            ]
            entries = list(_entries(stores, chosen, list(files)))
            finish_store(output, facts, entries, shards, tokens, mass)
        tidy(output)
        return read_manifest(output)


def _check_alike(one: Store, other: Store) -> None:
    """Raises unless two stores belong together."""
    pairs = {
        name: (getattr(one.manifest, name), getattr(other.manifest, name))
        for name in _ALIKE
    }
    # The same weights in another dtype have another head.
    pairs[HEAD] = (_sums(one).get(HEAD), _sums(other).get(HEAD))
    wrong = [
        f"{name} ({shorten(str(a), 100)} and {shorten(str(b), 100)})"
        for name, (a, b) in pairs.items()
        if a != b
    ]
    if wrong:
        raise StoreError(
            f"{one.folder} and {other.folder} do not belong together: they differ in "
            f"{', '.join(wrong)}. Join stores of one teacher, made with the same "
            "--kind, --k and --dtype"
        )


def _sums(store: Store) -> Mapping[str, str]:
    return {file.name: file.sha256 for file in store.manifest.others}


def _made_of(stores: Sequence[Store]) -> tuple[dict[str, Any], list[str]]:
    """Returns what the new store is made of, and a line on each job with parts missing.

    What all parts have in common stands for the whole, as in a store that one job made.
    """
    pieces: list[dict[str, Any]] = []
    for store in stores:
        about = store.manifest
        with parsing(f"{store.folder} does not say what it was made of", StoreError):
            pieces += about.made.get("merged") or [
                {
                    "store": store.folder.name,
                    "examples": about.examples,
                    "tokens": about.tokens,
                    "index": _sums(store)[INDEX],
                    "made": dict(about.made),
                }
            ]
    with parsing("a store does not say what it was made of", StoreError):
        mades = [dict(piece["made"]) for piece in pieces]
    shared = {
        name: value
        for name, value in mades[0].items()
        if all(name in made and made[name] == value for made in mades)
    }
    lines, there = [], []
    jobs: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
    for made in mades:
        if found := _PART.fullmatch(str(made.pop("part", ""))):
            job = json.dumps(made, sort_keys=True)
            jobs[job, int(found[2])].add(int(found[1]))
    for (_, count), found in jobs.items():
        lacking = [str(n) for n in range(1, count + 1) if n not in found]
        if lacking:
            there += [f"{number}/{count}" for number in sorted(found)]
            lines.append(
                f"note: of {count} parts of the job {len(lacking)} are missing: "
                f"{shorten(', '.join(lacking), 200)}"
            )
    shared.pop("part", None)
    if there:
        shared["part"] = shorten(" and ".join(there), 100)
    return {**shared, "merged": pieces}, lines


class _Chosen(NamedTuple):
    """Which examples count, by part and number in its index; and which do not."""

    part: Int64[np.ndarray, " examples"]
    number: Int64[np.ndarray, " examples"]
    dropped: Int64[np.ndarray, "again 2"]


def _choose(stores: Sequence[Store]) -> _Chosen:
    """Returns the first example of each key and place in a row."""
    sizes = [len(store) for store in stores]
    part = np.repeat(np.arange(len(stores)), sizes)
    number = np.concatenate([np.arange(size) for size in sizes])
    keys = np.concatenate([store.keys for store in stores])
    starts = np.concatenate([store.starts for store in stores])
    order = np.lexsort((number, part, starts, keys[:, 1], keys[:, 0]))
    same = np.zeros(len(order), bool)
    here, before = order[1:], order[:-1]
    same[1:] = (keys[here] == keys[before]).all(-1) & (starts[here] == starts[before])
    kept, again = np.sort(order[~same]), np.sort(order[same])
    return _Chosen(
        part[kept], number[kept], np.stack([part[again], number[again]], axis=1)
    )


def _name_files(stores: Sequence[Store], chosen: _Chosen) -> dict[tuple[int, int], str]:
    """Returns the names of all files whose records count, by part and shard."""
    names = [[file.name for file in store.manifest.shards] for store in stores]
    every = {name for some in names for name in some}
    free = (
        name
        for name in (f"outputs-{n:05}.arrayrecord" for n in itertools.count())
        if name not in every
    )
    files: dict[tuple[int, int], str] = {}
    taken: set[str] = set()
    for part, store in enumerate(stores):
        places = store.places[chosen.number[chosen.part == part]]
        for shard in np.unique(places[:, 0]).tolist():
            name = names[part][shard]
            if name in taken or not _SHARD.fullmatch(name):
                name = next(free)
            taken.add(name)
            files[part, shard] = name
    return files


def _place(folder: pathlib.Path, file: File, path: pathlib.Path) -> None:
    """Puts a file of a part where the new store has it, whole or not at all."""
    source, aside = folder / file.name, path.with_name(path.name + ".partial")
    if path.is_file() and path.stat().st_size == file.bytes:
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # It may be a link to a part's file, which nothing must be written to.
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:  # Another disk, or a file system without links.
            with written_aside(path) as copy:
                shutil.copyfile(source, copy)
                if describe_file(copy).sha256 != file.sha256:
                    raise StoreError(
                        f"{source} has other contents than its manifest says; store "
                        "that part again"
                    ) from None
        else:
            aside.replace(path)


def _totals(
    stores: Sequence[Store], chosen: _Chosen, say: Callable[[str], None]
) -> tuple[int, float]:
    """Returns how many tokens there are, and the sum of the stored mass over them."""
    abouts = [store.manifest for store in stores]
    tokens = sum(about.tokens for about in abouts)
    mass = sum((about.mass or 0.0) * about.tokens for about in abouts)
    for part, number in chosen.dropped.tolist():
        columns = stores[part].columns(number)
        tokens -= len(columns[abouts[part].columns[0].name])
        if abouts[part].kind == "topk":
            mass -= float(stored_mass(columns["teacher_tail"]).sum())
    if count := len(chosen.dropped):
        say(f"note: {count:,} examples come again in a later part, and count once")
    return tokens, mass


def _entries(
    stores: Sequence[Store], chosen: _Chosen, files: Sequence[tuple[int, int]]
) -> Iterator[Entry]:
    """Yields the examples as the new index has them."""
    shards = {place: number for number, place in enumerate(files)}
    for part, store in enumerate(stores):
        keys = store.keys.astype(">u8")
        for number in chosen.number[chosen.part == part].tolist():
            shard, record = store.places[number].tolist()
            where = shards[part, shard], record, int(store.starts[number])
            yield keys[number].tobytes(), *where
