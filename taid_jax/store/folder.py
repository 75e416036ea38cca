"""The folder of a store while it is made: begun, gone on with, finished."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Int, Shaped
from rich.console import Console
from safetensors.numpy import save

from taid_jax.errors import InputError, explain, parsing, show
from taid_jax.files import LOCK, hold_folder, write_whole, written_aside
from taid_jax.settings import SettingsError
from taid_jax.store.format import (
    HEAD,
    INDEX,
    KEY_BYTES,
    MANIFEST,
    TEACHER,
    Column,
    File,
    Kind,
    Manifest,
    StoreError,
    describe_file,
    example_key,
    fault_of,
    pack_record,
    read_manifest,
    stored_mass,
    unpack_record,
    write_manifest,
)
from taid_jax.train.folder import WriteError

JOB = "job.json"
"""What an unfinished store is a store of."""

DONE = ".done.json"
"""End of the name of what is known of a file that is whole."""

_WRITER = "group_size:1,uncompressed"

Entry = tuple[bytes, int, int, int]
"""Of an example: its key, shard, record, and place in its row."""


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    flat = [{**facts, **facts.get("made", {}), "made": None} for facts in (one, other)]
    return [name for name in flat[0] if flat[0][name] != flat[1].get(name)]


def begin_store(
    folder: pathlib.Path, facts: Mapping[str, Any], hold: contextlib.ExitStack
) -> bool:
    """Makes the folder ready; returns whether all is done already.

    Of a store of which files are missing or cut, these are to be made again.

    Raises:
        SettingsError: If it is another store's, or something else is in it.
    """
    job = folder / JOB
    manifest = ends = None
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        ends = _plain(dataclasses.asdict(manifest))
    elif folder.exists() and not folder.is_dir():
        raise SettingsError(f"output: {folder} is no folder")
    elif folder.is_dir():
        begun = {LOCK, f"{JOB}.partial"}  # All that is there after an early kill.
        names = {path.name for path in folder.iterdir()} - begun
        if names and JOB not in names:
            raise SettingsError(
                f"output: {folder} is not empty (it has {show(min(names))}) and no "
                "store; choose another --output"
            )
    handle, note = hold_folder(folder)
    hold.callback(os.close, handle)
    if note:
        sys.stderr.write(f"note: {note}\n")
    if ends is None and job.exists():
        with parsing(f"{job} cannot be read", SettingsError):
            begun = json.loads(job.read_bytes())
    else:
        begun = ends
    if begun is not None and (wrong := _differences(facts, begun)):
        raise SettingsError(
            f"output: {folder} holds another store: {', '.join(wrong)} differ. Give "
            "the same settings to go on with it, or choose another --output"
        )
    lacking = set() if manifest is None else _lacking(folder, manifest)
    if ends is None or lacking:
        write_whole(job, json.dumps(facts, indent=1).encode())
    if manifest is not None and lacking:
        _reopen(folder, manifest, lacking)
    return ends is not None and not lacking


def _lacking(folder: pathlib.Path, manifest: Manifest) -> set[str]:
    """Returns the files that are not there, or not of their size."""
    files = (*manifest.shards, *manifest.others)
    return {file.name for file in files if fault_of(folder, file, contents=False)}


def _reopen(folder: pathlib.Path, manifest: Manifest, lacking: set[str]) -> None:
    """Makes a store one that is not finished: all but what it lacks is done."""
    for file in manifest.shards:
        if file.name not in lacking:
            _note(folder / file.name, file, _mass_of(folder / file.name, manifest))
    if any(name.startswith(f"{TEACHER}/") for name in lacking):
        shutil.rmtree(folder / TEACHER, ignore_errors=True)
    (folder / MANIFEST).unlink()


def _mass_of(path: pathlib.Path, manifest: Manifest) -> float:
    """Returns the probability of the stored ids of a file, summed over tokens."""
    total = 0.0
    if manifest.kind == "topk":
        reader = ArrayRecordReader(str(path))
        for number in range(reader.num_records()):
            (record,) = reader.read([number])
            columns = unpack_record(record, record[:KEY_BYTES], manifest.columns)
            total += float(stored_mass(columns["teacher_tail"]).sum())
    return total


def _note(path: pathlib.Path, file: File, mass: float) -> None:
    """Writes what is known of a file that is whole."""
    values = {"file": dataclasses.asdict(file), "mass": mass}
    write_whole(path.with_name(path.name + DONE), json.dumps(values).encode())


def made_before(folder: pathlib.Path) -> Mapping[str, Any]:
    """Returns what the store in a folder, begun or finished, was made of, if any is."""
    for path in (folder / MANIFEST, folder / JOB):
        with contextlib.suppress(InputError), parsing(str(path)):
            if path.is_file():
                return dict(json.loads(path.read_bytes())["made"])
    return {}


def _plain(values: Any) -> Any:
    """Returns values as they come back from JSON: tuples as lists."""
    return json.loads(json.dumps(values))


class Sink:
    """A file of records while it is written; it gets its name when it is whole.

    Attributes:
        file: What it is, once it is whole.
        tokens: In it so far.
        mass: Probability of the stored ids, summed over them, of kind "topk".
    """

    file: File

    def __init__(self, path: pathlib.Path, kind: Kind):
        self._path, self._kind = path, kind
        self._records = self.tokens = 0
        self.mass = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Sink":
        self._stack.enter_context(writing(self._path))
        part = self._stack.enter_context(written_aside(self._path))
        self._writer = ArrayRecordWriter(str(part), _WRITER)
        return self

    def write(
        self,
        ids: Int[np.ndarray, " tokens"],
        columns: Sequence[Shaped[np.ndarray, "tokens _"]],
    ) -> None:
        """Adds the record of an example; columns as in `pack_record`."""
        self._writer.write(pack_record(example_key(ids), columns))
        self._records += 1
        self.tokens += len(ids)
        if self._kind == "topk":
            self.mass += float(stored_mass(columns[2]).sum())

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            with writing(self._path):
                self._writer.close()
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            with writing(self._path):
                self.file = describe_file(self._path, self._records)
                _note(self._path, self.file, self.mass)


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Says which file cannot be written, whatever the writer of records raises.

    Raises:
        WriteError: In place of it.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, WriteError | InputError):
            raise
        raise WriteError(
            f"{path} cannot be written: {explain(error)}. What is done is kept: the "
            "same command goes on from it"
        ) from error


def show_size(count: int) -> str:
    """Returns so many bytes in words."""
    return (
        f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"
    )


def announce(
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    console: Console,
    *,
    examples: int,
    tokens: int,
    files: int | None = None,
    beside: int = 0,
) -> None:
    """Says how much will be stored, and refuses what the disk has no room for.

    The folder need not be there yet; `files` are those with records, where their number
    is known, and `beside` the bytes that are no records.

    Raises:
        StoreError: With how much is missing.
    """
    width = sum(Column(**column).bytes_per_token for column in facts["columns"])
    total = tokens * width + examples * KEY_BYTES + beside
    there = next(each for each in (folder, *folder.parents) if each.exists())
    free = shutil.disk_usage(there).free
    spread = "" if files is None else f" in {files} files"
    console.print(
        f"{facts['kind']}: {examples:,} examples, {tokens:,} tokens of {width:,} "
        f"bytes, {show_size(total)}{spread}; {show_size(free)} are free",
        soft_wrap=True,
        highlight=False,
    )
    need = total - sum(path.stat().st_size for path in folder.glob("outputs-*"))
    if need > free:
        raise StoreError(
            f"output: the store needs {show_size(need)} more and {folder} has "
            f"{show_size(free)}. Give another disk, --store-dtype bfloat16, --kind "
            "topk or a share of the work (--part) on each of several"
        )


def finish_store(
    folder: pathlib.Path,
    facts: Mapping[str, Any],
    entries: Sequence[Entry],
    shards: Sequence[File],
    tokens: int,
    mass: float,
) -> Manifest:
    """Writes index and manifest: the store is whole then.

    Args:
        folder: Of the store; all else is there.
        facts: As `begin_store` was given them.
        entries: Of all examples; shards by their place in `shards`.
        shards: The files with records.
        tokens: Of all examples.
        mass: Probability of the stored ids, summed over tokens, of kind "topk".
    """
    with writing(folder / INDEX):
        write_index(folder, entries)
        manifest = Manifest(
            kind=facts["kind"],
            columns=tuple(Column(**column) for column in facts["columns"]),
            vocab_size=facts["vocab_size"],
            teacher=facts["teacher"],
            tokenizer=facts["tokenizer"],
            source=facts["source"],
            examples=len(entries),
            tokens=tokens,
            shards=tuple(shards),
            others=describe_others(folder),
            made=facts["made"],
            mass=mass / tokens if facts["kind"] == "topk" and tokens else None,
            draws=facts["draws"],
        )
        write_manifest(folder, manifest)
    return manifest


def describe_others(folder: pathlib.Path) -> tuple[File, ...]:
    """Returns the files of a store beside its shards."""
    paths = [folder / INDEX, folder / HEAD, *sorted((folder / TEACHER).rglob("*"))]
    return tuple(
        describe_file(path, name=path.relative_to(folder).as_posix())
        for path in paths
        if path.is_file()
    )


def write_index(folder: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes where each example is: keys, shards, records, and places in their rows."""
    keys = np.frombuffer(b"".join(key for key, *_ in entries), ">u8").reshape(-1, 2)
    keys = keys.astype(np.uint64)
    numbers = np.array([rest for _, *rest in entries], np.uint32).reshape(-1, 3)
    order = np.lexsort((numbers[:, 2], keys[:, 1], keys[:, 0]))
    numbers = numbers[order]
    index = {"keys": keys[order], "places": numbers[:, :2], "starts": numbers[:, 2]}
    index = {name: np.ascontiguousarray(array) for name, array in index.items()}
    write_whole(folder / INDEX, save(index))


def tidy(folder: pathlib.Path) -> None:
    """Removes what a job needs only until its manifest is there."""
    for path in (*folder.glob(f"*{DONE}"), folder / JOB, *folder.glob("*.partial")):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
