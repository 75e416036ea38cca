"""What the commands have in common: settings as flags, and where programs are kept."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import tyro
from rich.console import Console

from taid_jax.recipes import read_recipe
from taid_jax.settings import Settings, SettingsError, make_room

EXIT_STATUS = "\n\nExit status: 0 done, 2 bad input, 1 anything else."
"""The end of what every command says of itself."""

Command = TypeVar("Command")


def first_flags(
    arguments: Sequence[str], *names: str, many: bool = False
) -> argparse.Namespace:
    """Returns a few flags that have to be known before the others are read.

    Args:
        arguments: The words of the command line.
        *names: Of the flags.
        many: Whether each has a list of values.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", nargs="*" if many else None)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction)
    return parser.parse_known_args(arguments)[0]


def read_config(arguments: Sequence[str], base: Settings | None = None) -> Settings:
    """Returns the settings of `--pair`, `--config` and `--method`, over `base`.

    Raises:
        SettingsError: If a file cannot be used.
    """
    given = first_flags(arguments, "pair", "config", "method")
    return read_recipe(
        pair=given.pair, config=given.config, method=given.method, base=base
    )


def parse(
    kind: type[Command],
    arguments: Sequence[str],
    description: str | None,
    settings: Settings | None = None,
    *,
    name: str | None = None,
) -> Command:
    """Returns the flags as a `kind`.

    Args:
        kind: A dataclass.
        arguments: The words of the command line.
        description: Of the command.
        settings: What its field `settings` is laid over, when it has one; then it has
            a field `config` too.
        name: Of the command; that of its module when None.

    Raises:
        SystemExit: If they are no flags of it, or ask for help.
        SettingsError: If a setting cannot be used.
    """
    options: dict[str, Any] = {}
    if settings is not None:
        given = [word.split("=")[0][2:].replace("-", "_") for word in arguments]
        if {"teacher", "teacher_store"} <= {*given}:
            raise SettingsError("teacher_store: need no teacher beside it, got both")
        config = first_flags(arguments, "config").config
        options["default"] = cast(Any, kind)(
            settings=make_room(settings, given),
            config=None if config is None else pathlib.Path(config),
        )
    return tyro.cli(
        kind,
        # The file that is run would be named otherwise, which has no such flags.
        prog=f"taid-jax {name or kind.__module__.rpartition('.')[2]}",
        args=arguments,
        description=f"{description}{EXIT_STATUS}",
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )


def say(console: Console, line: object) -> None:
    """Prints a line as it stands, however long it is."""
    console.print(str(line), soft_wrap=True, highlight=False, markup=False)


def keep_compiled() -> None:
    """A second start finds what the first one compiled."""
    import jax

    from taid_jax.models.files.hub import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
