"""Makes the page report.html of a run anew, from the files of its folder.

    taid-jax report runs/default

A run makes it at its start, and at its end, also where that was none of its own. This
is for one that goes on, or was killed.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import tyro

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        folder: Of the run.
    """

    folder: Annotated[pathlib.Path, tyro.conf.Positional]


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        command = _flags.parse(Command, arguments, __doc__)
        from taid_jax.settings import SettingsError
        from taid_jax.train.folder import WriteError
        from taid_jax.train.html import PAGE, run_page, write_page

        path = command.folder / PAGE
        try:
            write_page(path, run_page(command.folder))
        except WriteError as error:
            raise SettingsError(f"output: {error}") from error
    except InputError as error:
        return refuse(error)
    print(path)
    return 0
