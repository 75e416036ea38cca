"""Scores a student the way a run does: KL, perplexities, loss, answers.

The settings are those of training; a run's own are in its settings.json:

    taid-jax evaluate --config RUN/settings.json --student RUN/student

scores the exported student on the held-out side of that run's data. Held-out prompts
are answered, for ROUGE-L and exact match, when --eval-prompts is above 0.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import (
    ModelSettings,
    Settings,
    SettingsError,
    check_file,
    to_dict,
    with_steps,
)

if TYPE_CHECKING:
    from taid_jax.train.evaluate import HeldOut


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
        SettingsError: If the file cannot be used, no student is named, or the teacher
            is not a model of its own.
    """
    base = _flags.read_config(arguments)
    model, own = base.model, {}
    if model.teaches_itself:
        # What is scored is not what it began as, which taught it.
        named = _flags.first_flags(arguments, "teacher").teacher
        if model.teacher_ema is not None and named is None:
            raise SettingsError(
                "teacher: need a model to compare with: the moving average that taught "
                f"this student is not exported; --teacher {model.student} compares "
                "with its start"
            )
        own = {"teacher": model.student, "teacher_ema": None}
    named = _flags.first_flags(arguments, "teacher", "teacher-store", many=True)
    if 1 in (len(each or ()) for each in (named.teacher, named.teacher_store)):
        # What the run says of several teachers has no effect with one alone.
        names = ("teacher_weights", "teacher_mean", "teacher_field")
        own |= {name: getattr(ModelSettings, name) for name in names}
    # Of a run from a store a student has to be named in any case.
    student = _flags.first_flags(arguments, "student").student
    model = dataclasses.replace(
        model, student=student, student_layers=None, student_config=None, **own
    )
    base = dataclasses.replace(base, model=model)
    command = _flags.parse(Command, arguments, __doc__, base)
    if command.settings.model.student is None:
        raise SettingsError("student: need the folder of the student to be scored")
    if command.settings.model.teaches_itself:
        raise SettingsError("teacher: need a model to compare with, got self")
    if command.json is not None:
        check_file("json", command.json)
    return command


def score(settings: Settings) -> "HeldOut":
    """Returns what is found of the student that the settings name.

    Raises:
        SettingsError: If settings contradict each other or the machine.
        ModelError: If a model cannot be used, or its figures are not finite.
        DataError: If the data cannot be used, or have no prompts that are asked for.
    """
    import jax

    with jax.default_matmul_precision(settings.model.matmul_precision):
        return _score(settings)


def _score(settings: Settings) -> "HeldOut":
    from taid_jax.sharding import check_batch, make_mesh
    from taid_jax.train.evaluate import check_finite, finished_state, make_evaluator
    from taid_jax.train.inputs import check_memory, check_models, read_data
    from taid_jax.train.on_policy.build import with_answers
    from taid_jax.train.on_policy.prompts import find_eval_prompts
    from taid_jax.train.pair import load_pair

    mesh = make_mesh(settings.run.mesh)
    check_batch(settings.data.batch_size, mesh)
    opened = check_models(
        settings.model, settings.data.seq_len, settings.data.teacher_len
    )
    check_memory(settings, mesh, opened.stores)
    tokenizer = opened.tokenizer
    dataset = read_data(settings, tokenizer, opened.stores)
    settings = with_steps(settings, len(dataset.train))
    prompts = find_eval_prompts(dataset.held_out, settings.evaluation.eval_prompts)
    pair = load_pair(settings, mesh, opened, copies=2)
    dataset = with_answers(settings, pair, dataset, tokenizer, mesh)
    for note in pair.notes:
        _flags.say(Console(stderr=True), note)
    evaluator = make_evaluator(
        settings, pair, dataset, mesh, tokenizer=tokenizer, prompts=prompts
    )
    found = evaluator(finished_state(settings, pair.student_params))
    check_finite(found, str(settings.model.student))
    return found


def show(found: "HeldOut", console: Console) -> None:
    """Prints the scores as a table."""
    from taid_jax.train.report import number

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
        _flags.keep_compiled()
        found = score(command.settings)
    except InputError as error:
        return refuse(error)
    show(found, Console())
    if command.json is not None:
        from taid_jax.train.report import write_json

        values = {**found._asdict(), "settings": to_dict(command.settings)}
        write_json(command.json, values)
    return 0
