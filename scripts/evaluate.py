"""Scores a student the way a run does: KL, perplexities, loss, answers.

The settings are those of training; a run's own are in its settings.json:

    python scripts/evaluate.py --config RUN/settings.json --student RUN/student

scores the exported student on the held-out side of that run's data. Held-out prompts
are answered, for ROUGE-L and exact match, when --eval-prompts is above 0.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

# Before JAX is imported: its C++ side is to be silent below errors.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import tyro
from rich.console import Console
from rich.table import Table

from taid_jax.errors import EXIT_STATUS, InputError, refuse
from taid_jax.models.files.hub import cache_folder
from taid_jax.settings import (
    Settings,
    SettingsError,
    check_file,
    read_settings,
    to_dict,
    with_steps,
)
from taid_jax.sharding import check_batch, make_mesh
from taid_jax.train.evaluate import (
    HeldOut,
    check_finite,
    finished_state,
    make_evaluator,
)
from taid_jax.train.inputs import check_memory, check_models, load_pair, read_data
from taid_jax.train.on_policy.prompts import find_eval_prompts
from taid_jax.train.report import number, write_json


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        settings: As in training; --student is what is scored.
        config: A YAML or JSON file with settings; flags go over it, and the student
            that it names is left out.
        json: Write the scores into this file too.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: pathlib.Path | None = None
    json: pathlib.Path | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Returns the flags, laid over the settings of `--config`.

    Raises:
        SettingsError: If the file cannot be used, or no student is named.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=pathlib.Path)
    config = first.parse_known_args(arguments)[0].config
    base = Settings() if config is None else read_settings(config)
    no_student = dataclasses.replace(
        base.model, student=None, student_layers=None, student_config=None
    )
    base = dataclasses.replace(base, model=no_student)
    command = tyro.cli(
        Command,
        args=arguments,
        default=Command(settings=base, config=config),
        description=f"{__doc__}{EXIT_STATUS}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if command.settings.model.student is None:
        raise SettingsError("student: need the folder of the student to be scored")
    if command.json is not None:
        check_file("json", command.json)
    return command


def score(settings: Settings) -> HeldOut:
    """Returns what is found of the student that the settings name.

    Raises:
        SettingsError: If settings contradict each other or the machine.
        ModelError: If a model cannot be used, or its figures are not finite.
        DataError: If the data cannot be used, or have no prompts that are asked for.
    """
    mesh = make_mesh(settings.run.mesh)
    check_batch(settings.data.batch_size, mesh)
    check_memory(settings, mesh)
    opened = check_models(settings.model, settings.data.seq_len)
    tokenizer = opened.tokenizer
    dataset = read_data(settings, tokenizer)
    settings = with_steps(settings, len(dataset.train))
    prompts = find_eval_prompts(dataset.held_out, settings.evaluation.eval_prompts)
    pair = load_pair(settings, mesh, opened, copies=2)
    for note in pair.notes:
        Console(stderr=True).print(note, soft_wrap=True, highlight=False, markup=False)
    evaluate = make_evaluator(
        settings, pair, dataset, mesh, tokenizer=tokenizer, prompts=prompts
    )
    found = evaluate(finished_state(settings, pair.student_params))
    check_finite(found, str(settings.model.student))
    return found


def show(found: HeldOut, console: Console) -> None:
    """Prints the scores as a table."""
    table = Table("held out", "value", title_justify="left")
    for name, value in found._asdict().items():
        if value is not None:
            text = f"{value:,}" if isinstance(value, int) else number(value)
            table.add_row(name.replace("_", " "), text)
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        command = parse(arguments)
        # A second start finds what the first one compiled.
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        found = score(command.settings)
    except InputError as error:
        return refuse(error)
    show(found, Console())
    if command.json is not None:
        values = {**found._asdict(), "settings": to_dict(command.settings)}
        write_json(command.json, values)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
