"""What there is to do with stores that are there: `merge`, `import` and `inspect`."""

import dataclasses
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taid_jax import cli
from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse, shorten, show
from taid_jax.settings import Checked, setting

if TYPE_CHECKING:
    from taid_jax.store.format import Manifest

_QUANTILES = (1, 5, 25, 50, 75, 95)

Command = TypeVar("Command")
Output = Annotated[pathlib.Path, tyro.conf.arg(metavar="OUTPUT")]
Folder = Annotated[str, tyro.conf.arg(metavar="STORE")]
Folders = Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="PART ...")]
Files = Annotated[tuple[pathlib.Path, ...], tyro.conf.arg(metavar="FILE ...")]


@dataclasses.dataclass(frozen=True)
class Merge:
    """Joins stores of one teacher, such as the shares of several jobs (--part).

    Their files are linked where the file system can, and copied elsewhere; the parts
    may be removed afterwards. A job that was stopped goes on when it is started again.

    Attributes:
        output: The store that they become.
        parts: The stores.
    """

    output: tyro.conf.Positional[Output]
    parts: tyro.conf.Positional[Folders]


@dataclasses.dataclass(frozen=True)
class ImportOptions(Checked):
    """What is stored of what the files have.

    Attributes:
        k: So many of the most probable tokens.
        shard_mib: Size of a file, about, in MiB.
        allow_unknown_keys: Read the model though its config has settings that nobody
            here knows.
    """

    k: int = setting(64, ge=1, lt=2**20)
    shard_mib: int = setting(256, ge=1, le=2**20)
    allow_unknown_keys: bool = False


@dataclasses.dataclass(frozen=True)
class Import:
    """Makes a store of Parquet files that an inference server has filled.

    A row is an example: input_ids, top_ids and top_logprobs; docs/store.md has the
    schema. A job that was stopped begins anew when it is started again.

    Attributes:
        files: All files, in order.
        teacher: The model that gave the outputs, as in training; of its files only
            config and tokenizer are read.
        output: The store.
        options: What is stored.
    """

    files: tyro.conf.Positional[Files]
    teacher: str
    output: pathlib.Path
    options: Annotated[ImportOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=ImportOptions
    )


@dataclasses.dataclass(frozen=True)
class Inspect(Checked):
    """Shows what a store holds, and whether it is sound.

    Attributes:
        store: The folder.
        verify: Compare the checksum of every file.
        tokens: Show what the teacher thinks most probable after so many tokens.
    """

    store: tyro.conf.Positional[Folder]
    verify: bool = False
    tokens: int = setting(8, ge=0, le=10**6)


def run_merge(arguments: Sequence[str]) -> int:
    """Runs `taid-jax store merge` and returns its exit status."""

    def merge(command: Merge, console: Console) -> int:
        from taid_jax.store.merge import merge_stores

        manifest = merge_stores(
            command.output, command.parts, lambda line: _flags.say(console, line)
        )
        _flags.say(console, _stored(manifest, command.output))
        return 0

    return _run(Merge, "merge", arguments, merge)


def run_import(arguments: Sequence[str]) -> int:
    """Runs `taid-jax store import` and returns its exit status."""

    def ingest(command: Import, console: Console) -> int:
        from taid_jax.store.ingest import import_outputs

        manifest = import_outputs(
            command.files,
            command.teacher,
            command.output,
            k=command.options.k,
            shard_bytes=command.options.shard_mib << 20,
            console=console,
            allow_unknown_keys=command.options.allow_unknown_keys,
        )
        _flags.say(console, _stored(manifest, command.output))
        return 0

    return _run(Import, "import", arguments, ingest)


def run_inspect(arguments: Sequence[str]) -> int:
    """Runs `taid-jax store inspect` and returns its exit status."""
    cli.say_way_on(lambda: "Nothing was begun")
    return _run(Inspect, "inspect", arguments, _inspect)


def _run(
    kind: type[Command],
    name: str,
    arguments: Sequence[str],
    action: Callable[[Command, Console], int],
) -> int:
    # The flags have their own lines.
    about = (inspect.getdoc(kind) or "").partition("\n\nAttributes:")[0]
    try:
        command = _flags.parse(kind, arguments, about, name=f"store {name}")
    except InputError as error:
        return refuse(error)
    from taid_jax.train.folder import WriteError

    try:
        return action(command, Console())
    except InputError as error:
        return refuse(error)
    except WriteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _stored(manifest: "Manifest", output: pathlib.Path) -> str:
    return (
        f"{manifest.examples:,} examples, {manifest.tokens:,} tokens are stored in "
        f"{output}; train with --teacher-store {output}"
    )


def _inspect(command: Inspect, console: Console) -> int:
    from taid_jax.store.inspect import favourites, find_faults, mass_quantiles
    from taid_jax.store.read import Store

    folder = pathlib.Path(command.store)
    faults = find_faults(folder) if command.verify else []
    for fault in faults:
        refuse(fault)
    if faults:
        return 2
    store = Store(folder)
    about = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _describe(store.manifest):
        about.add_row(name, Text(shorten(value, 500)))
    if store.manifest.kind == "topk":
        values = mass_quantiles(store, _QUANTILES)
        shown = [f"{p}% {v:.4f}" for p, v in zip(_QUANTILES, values, strict=False)]
        about.add_row("P by quantiles", "  ".join(shown))
    if command.verify:
        about.add_row("checksums", "all files are as they were written")
    console.print(about, highlight=False)
    if command.tokens:
        tokenizer, rows = favourites(store, command.tokens)
        table = Table("example", "after token", "the teacher's favourites")
        for row in rows:
            entries = zip(row.ids, row.probabilities, strict=True)
            shown = [f"{tokenizer.decode([id])!r} {p:.3f}" for id, p in entries]
            table.add_row(str(row.example), str(row.token), Text("  ".join(shown)))
        console.print(table, highlight=False)
    return 0


def _describe(about: "Manifest") -> Iterator[tuple[str, str]]:
    """Yields names and values of what a manifest says."""
    from taid_jax.store.folder import show_size

    total = show_size(sum(file.bytes for file in (*about.shards, *about.others)))
    yield "kind", about.kind
    yield "teacher", f"{about.source} (fingerprint {about.teacher[:16]})"
    yield "tokenizer", f"fingerprint {about.tokenizer[:16]}"
    yield "vocabulary", f"{about.vocab_size:,} entries"
    yield "examples", f"{about.examples:,}"
    yield "tokens", f"{about.tokens:,} of {about.bytes_per_token:,} bytes"
    yield "files", f"{len(about.shards):,} with records, {total} with all others"
    for column in about.columns:
        yield column.name, f"{column.width:,} of {column.dtype} a token"
    if about.draws is not None:
        yield "draws", f"{about.draws:,} of each token"
    for name, value in about.made.items():
        if name == "merged":
            names = [str(piece["store"]) for piece in value]
            yield name, f"of {len(names):,} stores: {', '.join(names)}"
        else:
            yield name, value if isinstance(value, str) else show(value)
    if about.mass is not None:
        yield "stored mass P", f"{about.mass:.4f} on average"
