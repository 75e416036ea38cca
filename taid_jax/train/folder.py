"""The output folder of a run: who may have it, and what is written into it."""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from taid_jax.errors import InputError, explain, shorten, show
from taid_jax.files import HALF_WRITTEN, LOCK, hold_folder
from taid_jax.settings import RunSettings, SettingsError

CHECKPOINTS = "checkpoints"
SETTINGS = "settings.json"
SET_ASIDE = "set_aside"
"""What a resumed run cannot use is moved here; nothing is deleted."""

# What a run makes; some of it at its end only.
_FILES = re.compile(
    r"((settings|report|shown)\.json|(metrics|evaluations)\.jsonl|curves\.png|"
    r"report\.html)(\.partial)?"
)
_FOLDERS = re.compile(rf"{CHECKPOINTS}|tensorboard|student|{SET_ASIDE}")
_DONE = ("report.json", "curves.png", "student")
# Of nobody: a plan of this run may lie there already.
_HARMLESS = ("plan.json", LOCK)
_STEP = re.compile(r"0|[1-9][0-9]*")


class WriteError(RuntimeError):
    """Something of a run cannot be written; what was saved before is as it was."""


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Names the file in what an operating system says of a write that failed.

    Raises:
        WriteError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        why = error.strerror or explain(error)
        raise WriteError(f"{path} cannot be written: {why}") from error


def step_folders(folder: pathlib.Path) -> dict[int, pathlib.Path]:
    """Returns what has a checkpoint's name in a folder of checkpoints, the last first.

    Whether it is sound is another question; see `checkpoint.find_fault`.
    """
    try:
        names = [entry.name for entry in folder.iterdir()]
    except OSError:
        return {}
    steps = sorted((int(name) for name in names if _STEP.fullmatch(name)), reverse=True)
    return {step: folder / str(step) for step in steps}


def way_on(output: str | pathlib.Path) -> str:
    """Returns what of a run is saved, and how to go on; true at any moment."""
    folder = pathlib.Path(output).absolute() / CHECKPOINTS
    last = next(iter(step_folders(folder)), None)
    if last is None:
        return "No checkpoint was saved yet: the same command with --resume starts anew"
    return (
        f"The last good checkpoint is {last} in {folder}: the same command with "
        "--resume goes on from it"
    )


class RunFolder:
    """The output folder of a run, held by one living process.

    `check` changes nothing, so that a run can first look at all that it reads. `claim`
    makes the folder and holds it by a lock of the operating system on a file in it,
    which ends with the process, however it ends. Over NFS that needs a server that
    has locks; where there are none, a line says so.

    Args:
        settings: Of the run.

    Attributes:
        path: Absolute.
        notes: Lines about what was found and done, for the user.
    """

    def __init__(self, settings: RunSettings):
        self.path = pathlib.Path(settings.output).absolute()
        self.notes: list[str] = []
        self._resume = settings.resume
        self._lock: int | None = None

    def has_checkpoints(self) -> bool:
        """Returns whether there is anything that a run could go on from."""
        return bool(step_folders(self.path / CHECKPOINTS))

    def check(self) -> None:
        """Looks whether a run may begin here, or go on.

        Raises:
            SettingsError: If the folder cannot be written, or has something in it that
                a run would have to overwrite.
        """
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                self.path.stat()  # A name that no file can have is refused here.
            parent = self.path
            while not parent.exists():
                parent = parent.parent
            if not parent.is_dir():
                raise SettingsError(f"output: {parent} is not a folder")
            # Without a name: nothing is left behind, whatever ends the process.
            tempfile.TemporaryFile(dir=parent).close()
            names = [] if parent != self.path else os.listdir(self.path)
        except (OSError, ValueError) as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(
                f"output: {show(str(self.path))} cannot be written: {explain(error)}"
            ) from error
        names = sorted(name for name in names if name not in _HARMLESS)
        if not names or (self._resume and self.has_checkpoints()):
            return
        done = [name for name in names if name in _DONE]
        ours = (_FILES, _FOLDERS, HALF_WRITTEN)
        foreign = [
            name for name in names if not any(kind.fullmatch(name) for kind in ours)
        ]
        begun = not done and (not foreign or SETTINGS in names)
        if self._resume and begun:
            return
        if self.has_checkpoints():
            what, way = "is not empty", "Go on with what is there by --resume"
        elif begun:
            what = "has what a run left that ended before its first checkpoint"
            way = "--resume starts it anew"
        else:
            shown = shorten(", ".join((done + foreign)[:3]))
            what = f"is not empty (it has {shown}) and has no checkpoint for --resume"
            way = "Move that away"
        raise SettingsError(
            f"output: {self.path} {what}. {way}, or choose another --output; nothing "
            "was changed"
        )

    def claim(self) -> None:
        """Makes the folder if it is not there, and holds it.

        Raises:
            SettingsError: If it cannot be made, another living process holds it, or
                something came into it since `check`.
        """
        if self._lock is not None:
            return
        try:
            handle, note = hold_folder(self.path)
        except InputError as error:
            raise SettingsError(str(error)) from error
        if note:
            self.notes.append(note)
        self._lock = handle
        try:
            self.check()
            self._tidy()
        except BaseException:
            self.close()
            raise

    def _tidy(self) -> None:
        """Clears what a killed process left half done out of the way."""
        for entry in list(self.path.iterdir()):
            if HALF_WRITTEN.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
            elif _FILES.fullmatch(entry.name) and not entry.is_file():
                self.set_aside(entry, "is no file")
            elif _FOLDERS.fullmatch(entry.name) and not entry.is_dir():
                self.set_aside(entry, "is no folder")
        for half in (self.path / CHECKPOINTS).glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(half, ignore_errors=True)

    def set_aside(self, path: pathlib.Path, why: str) -> None:
        """Moves something that cannot be used, and notes it."""
        place = self.path / SET_ASIDE / path.name
        number = 1
        while os.path.lexists(place):
            number += 1
            place = place.with_name(f"{path.name}-{number}")
        self.notes.append(f"{path} {why}; it is moved to {place}")
        with writing(place):
            place.parent.mkdir(exist_ok=True)
            path.rename(place)

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
