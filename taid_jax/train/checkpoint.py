"""Checkpoints by Orbax: the student's state, the place in the data, the settings."""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import math
import operator
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from taid_jax.distributed import is_main_process
from taid_jax.errors import InputError, explain, parsing
from taid_jax.settings import Settings, from_dict, to_dict
from taid_jax.train.folder import WriteError
from taid_jax.train.state import DistillState

DIGESTS = "digests.json"
"""In each checkpoint: size and sha256 of all its other files."""

UNVERIFIED = f"has no {DIGESTS}, so that nothing tells whether it is sound"

_ORBAX = "_CHECKPOINT_METADATA"
# Written once more after the digests, when Orbax gives the checkpoint its name.
_LATER = (DIGESTS, _ORBAX, "commit_success.txt")
_ITEMS = {"state", "run"}


class CheckpointError(InputError):
    """There is no checkpoint to go on from, or it is another run's."""


class SavedRun(NamedTuple):
    """What a checkpoint says of its run, beside the state.

    Attributes:
        settings: Those that it was made with.
        place: Where the iterators stood, and which data and models.
    """

    settings: Settings
    place: dict[str, Any]


def write_digests(folder: pathlib.Path, step: int) -> None:
    """Writes down step, size and sha256 of all files in the folder of a checkpoint."""
    files = {
        path.relative_to(folder).as_posix(): _digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).as_posix() not in _LATER
    }
    text = json.dumps({"files": files, "sha256": _sum(files, step)}, indent=1)
    (folder / DIGESTS).write_text(text, encoding="utf-8")


def find_fault(folder: pathlib.Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None: it is as it was written.

    Every file is read. What is not in the list of digests is passed over.

    Args:
        folder: Of one checkpoint, named by its step.
    """
    try:
        if not folder.is_dir():
            return "is no folder"
        if not any(folder.iterdir()):
            return "is empty"
        if not (folder / DIGESTS).exists():
            return UNVERIFIED
        with parsing(DIGESTS):
            written = read_json_file(folder / DIGESTS)
            files = dict(written["files"])
            if written["sha256"] != _sum(files, int(folder.name)):
                return f"is damaged: {DIGESTS} is altered, or another checkpoint's"
        with parsing(_ORBAX):
            about = read_json_file(folder / _ORBAX)
            times = {type(about[name]) for name in about if name.endswith("_nsecs")}
            if not set(about["item_handlers"]) >= _ITEMS or not times <= {int}:
                return f"is damaged: {_ORBAX} is altered"
        with concurrent.futures.ThreadPoolExecutor() as pool:
            faults = pool.map(
                lambda name: compare_file(folder / name, files[name]), files
            )
            for name, fault in zip(files, faults, strict=True):
                if fault:
                    return f"is damaged: {name} {fault}"
    except (OSError, InputError) as error:
        return f"is damaged: {explain(error)}"
    return None


def compare_file(path: pathlib.Path, written: list[Any]) -> str | None:
    """Returns what is wrong with a file whose size and sha256 were written down."""
    try:
        size = path.stat().st_size
        if size != written[0]:
            return f"has {size:,} bytes instead of {written[0]:,}"
        return None if _digest(path) == written else "is altered"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {explain(error)}"


def _digest(path: pathlib.Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def read_json_file(path: pathlib.Path) -> Any:
    """Returns what a file of JSON says; anything but a file is an InputError."""
    if not path.is_file():  # A pipe would be waited for.
        raise InputError(f"{path} is no file" if path.exists() else f"no {path}")
    return json.loads(path.read_bytes())


def _sum(files: Mapping[str, Any], step: int) -> str:
    text = json.dumps([step, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_run(folder: pathlib.Path) -> SavedRun:
    """Returns what the folder of one checkpoint says of its run.

    Raises:
        CheckpointError: If it cannot be read.
    """
    with parsing(str(folder / "run"), CheckpointError):
        found = read_json_file(folder / "run" / "metadata")
        return SavedRun(from_dict(found["settings"]), dict(found["place"]))


class _NoTracebacks(logging.Filter):
    """Keeps off the screen what of a failed save is raised as an exception as well.

    Orbax logs it; and TensorStore's other writes come back when nobody waits any more.
    """

    def __init__(self):
        super().__init__()
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        logging.getLogger("absl").addFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.exc_info

    def _unraisable(self, what: Any) -> None:
        late = isinstance(what.exc_value, RuntimeError) and what.object is None
        if not (late and str(what.exc_value) == "Event loop is closed"):
            self._hook(what)

    def remove(self) -> None:
        """Shows everything again."""
        logging.getLogger("absl").removeFilter(self)
        if sys.unraisablehook == self._unraisable:
            sys.unraisablehook = self._hook


_selection = operator.itemgetter("selection")


def _saved(state: DistillState) -> dict[str, Any]:
    """Returns what is kept of a state: no average where it has none."""
    return {k: v for k, v in state._asdict().items() if v is not None}


class Checkpoints:
    """The checkpoints of one output folder: the last few, and the best.

    Saving runs in the background and becomes visible by a rename, so that a killed
    process leaves the last good checkpoint as it was. Digests of its files are written
    before the rename. `with Checkpoints(...)` waits for a save in flight, however the
    block ends.

    Args:
        folder: Made if it is missing.
        keep: How many of the last are kept, beside the best. What falls behind is
            deleted when the next save is whole, so that one more may lie there, after a
            kill for as long as it takes to the next save.

    Raises:
        CheckpointError: If what is there cannot be read.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2):
        self.folder = pathlib.Path(folder).absolute()
        self._saving: int | None = None
        self._closed = self._failed = False
        self._silence = _NoTracebacks()
        options = ocp.CheckpointManagerOptions(
            create=True,
            # Only with this is it written, so that a resumed run knows the best.
            best_fn=_selection,
            best_mode="min",
            preservation_policy=managers.AnyPreservationPolicy(
                [
                    managers.LatestN(keep),
                    managers.BestN(
                        get_metric_fn=_selection,
                        reverse=True,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        with parsing(f"the checkpoints in {self.folder}", CheckpointError):
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=options,
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "run": ocp.JsonCheckpointHandler(),
                },
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What went wrong before is what has to be told.
        with contextlib.suppress(*([] if kind is None else [WriteError])):
            self.close()

    def _seal(self) -> None:
        """Writes the digests of a checkpoint that is whole but for its name.

        Raises:
            WriteError: If a part of it failed: it gets no name then.
        """
        if self._failed:
            raise WriteError(f"checkpoint {self._saving} is not whole")
        if is_main_process() and self._saving is not None:
            (half,) = self.folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_digests(half, self._saving)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            # TensorStore says it at the end of a long message.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            why = os.strerror(int(code[1])) if code else explain(error)
            raise WriteError(
                f"checkpoint {self._saving} cannot be written to {self.folder}: {why}"
            ) from error

    def latest_step(self) -> int | None:
        """Returns the step of the last whole checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        state: DistillState,
        place: dict[str, Any],
        settings: Settings,
        *,
        metric: float | None = None,
    ) -> None:
        """Starts saving; the state may be donated as soon as this returns.

        Args:
            step: Steps that the state has seen.
            state: What is saved; the teacher is not.
            place: Where the iterators stand, and which data and models; JSON.
            settings: Of the run.
            metric: The selection metric where it was evaluated; lower is better.
        """
        self.wait()
        self._saving = step
        if metric is None or not math.isfinite(metric):
            metric = math.inf  # Orbax wants a figure of each.
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_saved(state)),
                    run=ocp.args.JsonSave(
                        {"settings": to_dict(settings), "place": place}
                    ),
                ),
                metrics={"selection": metric},
                force=True,
            )

    def wait(self) -> None:
        """Blocks until what was started is on disk.

        Raises:
            WriteError: If it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder.

        Raises:
            WriteError: As `wait`.
        """
        if self._closed:
            return
        self._closed = True
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()
        if not self._failed:  # Else more is to come, when nobody waits any more.
            self._silence.remove()

    def _check_shapes(self, template: DistillState, step: int) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(_saved(template))
        wanted = {
            jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
            for path, leaf in leaves
        }
        saved = {
            leaf.name: tuple(leaf.shape)
            for leaf in jax.tree.leaves(self._manager.item_metadata(step)["state"])
        }
        differences = [
            f"{name}: saved {saved.get(name, 'not at all')}, "
            f"here {wanted.get(name, 'not at all')}"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"checkpoint {step} in {self.folder} does not fit this model and "
                "optimizer:\n  " + "\n  ".join(differences)
            )

    def restore(self, template: DistillState, step: int) -> DistillState:
        """Returns the state of a checkpoint.

        Args:
            template: A state, or its shapes with shardings: where each array goes.
            step: Which checkpoint.

        Raises:
            CheckpointError: If it cannot be read, or its arrays are not the template's;
                all differences are listed.
        """
        with parsing(f"checkpoint {step} in {self.folder}", CheckpointError):
            self._check_shapes(template, step)
            state = ocp.args.StandardRestore(_saved(template))
            found = self._manager.restore(step, args=ocp.args.Composite(state=state))
        return template._replace(**found["state"])
