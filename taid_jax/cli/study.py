"""Trains small models by every method, and says what each is worth.

    taid-jax study --output runs/study            hours, even on a few cores
    taid-jax study --quick --output runs/quick    a part of it

Teachers of several sizes are trained from random weights on Python's own sources,
what they say of the texts is stored, and students learn from that by every method,
each with the best learning rate of the same grid, from the same starts and on the same
batches. The page says what came out, with intervals. What is stored takes 4 GiB. What
is done is not done again: the same command goes on where the last one ended.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.errors import InputError, parsing, refuse
from taid_jax.settings import SettingsError, check_text


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        output: Gets the models, a folder per run, and the page.
        quick: One teacher, trained less, one student and four methods.
        jobs: Runs at a time, each on a core of its own; as many as there are cores when
            0.
        page: The page, .md; what it is made from goes into the folder of its name
            without .md. `study.md` in the output when None.
        only_page: Run nothing; make the page of what is finished in the output, or if
            there is no output of what is in the page's folder.
        sources: A folder with the .py files that are the text; Python's standard
            library when None.
    """

    output: pathlib.Path = pathlib.Path("runs/study")
    quick: bool = False
    jobs: int = 0
    page: pathlib.Path | None = None
    only_page: bool = False
    sources: pathlib.Path | None = None


def write(page: pathlib.Path, results: dict[str, Any] | None, console: Console) -> None:
    """Writes results, pictures and the page.

    Args:
        page: The page; the folder of its name without .md gets all else.
        results: From `run_study`; those that the folder has when None.
        console: Where it is said.

    Raises:
        SettingsError: If there are no results.
    """
    from taid_jax.files import write_whole
    from taid_jax.study.page import LANGUAGE, make_page, result_files
    from taid_jax.train.report import write_json

    folder = page.with_suffix("")
    with parsing(f"page: cannot write {page}", SettingsError):
        folder.mkdir(parents=True, exist_ok=True)
    if results is not None:
        write_json(folder / LANGUAGE, results)
    elif not any(result_files(folder)):
        raise SettingsError(
            f"page: {folder} has no results; leave --only-page out to make them"
        )
    with parsing(f"page: cannot use the results in {folder}", SettingsError):
        write_whole(page, make_page(folder).encode())
    _flags.say(console, f"the page is {page}")


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    from taid_jax.study.plan import StudyError

    console, errors = Console(), Console(stderr=True)
    try:
        command = _flags.parse(Command, arguments, __doc__)
        page = command.page or command.output / "study.md"
        for name in ("output", "page", "sources"):
            check_text(name, str(getattr(command, name) or ""))
        if page.suffix != ".md":
            raise SettingsError(f"page: need a name that ends in .md, got {page}")
        if command.jobs < 0:
            raise SettingsError(f"jobs: need at least 0, got {command.jobs}")
        results = None
        if not command.only_page or command.output.is_dir():
            from taid_jax.cli._study import run_study
            from taid_jax.study.plan import FULL, QUICK
            from taid_jax.study.texts import python_sources

            results = run_study(
                QUICK if command.quick else FULL,
                command.output,
                0 if command.only_page else command.jobs or os.cpu_count() or 1,
                command.sources or python_sources(),
                console,
            )
        write(page, results, console)
    except InputError as error:
        return refuse(error)
    except StudyError as error:
        _flags.say(errors, f"error: {error}")
        return 1
    return 0
