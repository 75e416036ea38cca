"""The commands: `taid-jax train | plan | store | evaluate | ...`.

Each is a module with a `main(arguments)` that returns the exit status. Only what the
flags need is imported before they are read, so that `--help` answers at once.
"""

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType

COMMANDS = {
    "train": (
        "distil a teacher into a student",
        "The same command with --resume goes on",
    ),
    "plan": (
        "compile the train step for a machine that need not be there",
        "Nothing was begun",
    ),
    "store": (
        "store what a teacher says of a data set",
        "What is done is kept: the same command goes on from it",
    ),
    "evaluate": ("score a student the way a run does", "Nothing was begun"),
    "generate": (
        "have a model complete the prompts of a file",
        "The same command goes on with the prompts that are left",
    ),
    "prepare": (
        "tokenise conversations for training, once",
        "The same command goes on from here",
    ),
    "report": (
        "make the page of a run anew from its folder",
        "The page is as it was",
    ),
    "compare": (
        "train several methods from the same start, side by side",
        "The same command goes on with the cells that are left",
    ),
    "study": (
        "train small models by every method, and say what each is worth",
        "The same command goes on with the runs that are left",
    ),
}
"""What there is: what it does, and how it goes on once somebody has stopped it."""

_PROCESS = os.getpid()
_way_on: Callable[[], str] = str


def say_way_on(find: Callable[[], str]) -> None:
    """Sets what finds, at that moment, what is said to somebody who stops it."""
    global _way_on
    _way_on = find


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit status.

    Args:
        arguments: Those of this process when None.
    """
    # Before the imports, which take seconds.
    signal.signal(signal.SIGINT, _interrupted)
    # Before JAX is imported: its C++ side is to be silent below errors. A plan catches
    # its warnings, and counts some.
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    plans = name == "plan" or any(flag.split("=")[0] == "--plan" for flag in rest)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1" if plans else "2")
    # Without PyTorch transformers says that there are no models; they are ours.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if name in COMMANDS:
        say_way_on(lambda: COMMANDS[name][1])
        return importlib.import_module(f"taid_jax.cli.{name}").main(rest)
    lines = [f"  {each:10} {what}" for each, (what, _) in COMMANDS.items()]
    usage = "\n".join(["usage: taid-jax COMMAND [--help] ...", "", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return 0
    if name == "--version":
        from taid_jax import __version__

        print(f"taid-jax {__version__}")
        return 0
    print(f"error: no command is called {name[:60]!r}\n{usage}", file=sys.stderr)
    return 2


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ends the process with one line: an exception could come out of any callback.

    Nothing is lost: while there are steps `train` takes the first Ctrl-C itself, and
    what is half written has no name yet.
    """
    if os.getpid() != _PROCESS:  # One that this one has started, which speaks for it.
        os._exit(1)
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # The cursor, which a progress bar hides.
    with contextlib.suppress(RuntimeError, OSError):  # In the midst of a write.
        sys.stdout.flush()
    os.write(2, f"\nstopped by Ctrl-C. {_way_on()}\n".encode())
    os._exit(1)
