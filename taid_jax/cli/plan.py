"""Compiles the train step for a machine that need not be there.

Its memory, traffic and least time are shown and written to plan.json in the output
folder. Nothing is loaded, fetched or trained. Models are presets (llama-3-8b, ...),
folders or config.json files.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import Settings


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        settings: All settings of the run that is planned.
        machine: What to compile for, such as v5p:4x4x8 or h100:8x8 (hosts x GPUs), or N
            devices of this machine, local:N.
        config: A YAML file with settings; flags go over it.
        pair: As in training.
        method: As in training.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    machine: tyro.conf.Positional[str] = "local:1"
    config: pathlib.Path | None = None
    pair: str | None = None
    method: str | None = None


def show(settings: Settings, machine: str) -> int:
    """Makes the plan of a run and shows it; returns the exit status.

    Raises:
        InputError: If the settings do not suit the machine.
    """
    from taid_jax.plan import make_plan

    _flags.keep_compiled()
    make_plan(settings, machine, Console())
    return 0


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        base = _flags.read_config(arguments)
        command = _flags.parse(Command, arguments, __doc__, base)
        return show(command.settings, command.machine)
    except InputError as error:
        return refuse(error)
