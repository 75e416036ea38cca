"""Stores what a teacher says of a data set, to train on without the teacher.

    taid-jax store --teacher MODEL --data FILES --output STORE
    taid-jax train --teacher-store STORE --student MODEL --data FILES --output RUN

Flags and --config are those of training: what decides which rows there are counts here,
all else is passed over. A job that was stopped goes on when it is started again. Of
several processes (one per host) each stores its own rows.

    taid-jax store merge STORE PART ...   joins the shares of several jobs (--part)
    taid-jax store import FILE ...        reads Parquet files of an inference server
    taid-jax store inspect STORE          shows what a store holds
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import Settings, SettingsError
from taid_jax.store.options import StoreOptions


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        settings: As in training; --output is the store.
        options: What is stored.
        config: A YAML or JSON file with settings, such as a run's settings.json; flags
            go over it, and the output that it names is left out.
        pair: As in training.
        method: As in training.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    options: Annotated[StoreOptions, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=StoreOptions
    )
    config: pathlib.Path | None = None
    pair: str | None = None
    method: str | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Returns the flags, laid over the settings of `--config`.

    Raises:
        SettingsError: If the file cannot be used, or no output is named.
    """
    given = _flags.first_flags(arguments, "output")
    base = _flags.read_config(arguments)
    command = _flags.parse(Command, arguments, __doc__, base)
    if given.output is None:
        raise SettingsError("output: need the folder of the store")
    if command.settings.model.teaches_itself:
        what = "teacher: need a model to be stored, got self; name the student's model"
        raise SettingsError(what)
    if command.settings.data.teacher_prompt is not None:
        what = "teacher_prompt: need none: a store has the rows of the student"
        raise SettingsError(what)
    if command.settings.model.teacher_store is not None:
        raise SettingsError("teacher_store: need a --teacher to be stored, got a store")
    named = command.settings.model.teachers
    if len(named) > 1:
        raise SettingsError(
            f"teacher: need one to be stored, got {len(named)}; make a store of each, "
            "and train with --teacher-store A B"
        )
    return command


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    if arguments and arguments[0] in ("merge", "import", "inspect"):
        from taid_jax.cli import _stores

        return getattr(_stores, f"run_{arguments[0]}")(arguments[1:])
    try:
        command = parse(arguments)
    except InputError as error:
        return refuse(error)
    return _store(command)


def _store(command: Command) -> int:
    from taid_jax import distributed
    from taid_jax.store.write import store_teacher
    from taid_jax.train.folder import WriteError

    settings, errors = command.settings, Console(stderr=True)
    console = Console()
    _flags.keep_compiled()
    try:
        distributed.initialize(settings.distributed)
        console.quiet = not distributed.is_main_process()
        manifest = store_teacher(settings, command.options, console)
    except InputError as error:
        return refuse(error)
    except (WriteError, distributed.PeerError) as error:
        _flags.say(errors, f"error: {error}")
        return 1
    distributed.shutdown()
    _flags.say(
        console,
        f"{manifest.examples:,} examples, {manifest.tokens:,} tokens are stored in "
        f"{settings.run.output}; train with --teacher-store {settings.run.output} and "
        "the same data settings",
    )
    return 0
