"""Trains several methods from the same start, on the same batches, and compares them.

    taid-jax compare --config scripts/recipes/smoke.yaml --seeds 0 1 2
    taid-jax compare --pair zephyr_pythia --methods sft taid

A cell is one method with one seed, in a process of its own. A cell that is finished is
not run again, and one that was stopped goes on from its last checkpoint: the same
command goes on where the last one ended. The output folder gets comparison.md (a table
of means and standard deviations over the seeds), comparison.json, comparison.csv (a row
for every cell), comparison.png and comparison.html, which shows table and curves and
links the pages of the cells.
"""

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.errors import InputError, parsing, refuse, show
from taid_jax.settings import SettingsError, check_text, parse_yaml

METHODS = (
    "sft",
    "fkl",
    "rkl",
    "tvd",
    "adaptive_kl",
    "gkd",
    "distillm",
    "ctkd",
    "dkd",
    "taid_linear",
    "taid",
)
"""The methods of the published comparison, as the recipes call them."""


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        config: Settings that all cells share, over those of the pair.
        pair: Settings of a pair of models that are shipped, or a file.
        output: Gets a folder per cell, the table and the picture.
        methods: Settings of methods that are shipped, or files.
        seeds: Of data order and random weights.
        set: Settings over those of all cells, such as `steps=20 seq_len=64`.
        only_table: Run nothing; make the table of what is finished.
    """

    config: pathlib.Path | None = None
    pair: str | None = None
    output: pathlib.Path = pathlib.Path("runs/comparison")
    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    only_table: bool = False


def parse_overrides(texts: Sequence[str]) -> dict[str, object]:
    """Returns the settings of `name=value` texts; values are read as YAML.

    Raises:
        SettingsError: If a text is no such pair.
    """
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise SettingsError(f"set: need NAME=VALUE, got {show(text)}")
        if name in values:
            raise SettingsError(f"set: {name} is given twice")
        if name in ("seed", "output"):
            raise SettingsError(f"set: {name} has a flag of its own here")
        with parsing(f"set: cannot read {show(text)}", SettingsError):
            values[name] = parse_yaml(value)
    return values


def run_logged(arguments: Sequence[str], log: pathlib.Path, console: Console) -> int:
    """Runs a command in a process of its own and returns its exit status.

    Args:
        arguments: Of `taid-jax`.
        log: What it prints is appended.
        console: Where its last lines are shown when it fails.
    """
    with log.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, "-m", "taid_jax.cli", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if status:
        last = log.read_text(encoding="utf-8").strip().splitlines()[-3:]
        first = f"{log.parent.name}: exit status {status}, see {log}"
        _flags.say(console, "\n".join([first, *last]))
    return status


def compare(command: Command, console: Console, errors: Console) -> int:
    """Runs the cells that wait, writes the table and returns the exit status.

    Raises:
        SettingsError: If the cells cannot be what is asked for.
    """
    from taid_jax.cli._comparison import plan_cells, write_results

    if command.config is None and command.pair is None:
        raise SettingsError("config: need --config or --pair, got neither")
    for name in ("output", "config", "pair"):
        check_text(name, str(getattr(command, name)))
    for method in command.methods:
        check_text("methods", method)
    if command.output.exists() and not command.output.is_dir():
        raise SettingsError(f"output: {command.output} is not a folder")
    overrides = parse_overrides(command.set)
    cells = plan_cells(
        command.config,
        command.methods,
        command.seeds,
        command.output,
        overrides,
        pair=command.pair,
    )
    waiting = [cell for cell in cells if cell.report() is None]
    statuses = []
    for number, cell in enumerate([] if command.only_table else waiting, start=1):
        console.print(f"cell {number} of {len(waiting)}: {cell.folder.name}")
        words, log = ["train", *cell.prepare()], cell.folder / "log.txt"
        statuses.append(run_logged(words, log, errors))
        if statuses[-1] == 2:  # The same input would be as bad for the next one.
            return 2
    if any(cell.report() for cell in cells):
        print(write_results(cells, command.output))
    return 1 if any(statuses) else 0


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        command = _flags.parse(Command, arguments, __doc__)
        return compare(command, Console(), Console(stderr=True))
    except InputError as error:
        return refuse(error)
