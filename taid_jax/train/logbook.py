"""What a run writes down on the way: lines of metrics, TensorBoard, a clock."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from taid_jax.distributed import broadcast, is_main_process
from taid_jax.evaluate import HeldOut
from taid_jax.train.folder import writing
from taid_jax.train.report import EVALUATIONS, METRICS, Lines, read_lines
from taid_jax.train.step import Metrics
from taid_jax.train.utilisation import Meter

# Made when it is imported, from a description that type checkers do not see.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]

LOGGED = ("loss", "kl_teacher", "t", "delta_t", "learning_rate", "grad_norm")


@runtime_checkable
class Progress(Protocol):
    """Somebody who is shown how it goes."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a logged step."""
        ...

    def evaluation(self, step: int, found: HeldOut) -> None:
        """Shows a held-out evaluation."""
        ...

    def say(self, text: str) -> None:
        """Shows a line of text."""
        ...


class _Board:
    """Events for TensorBoard; those from `first` on that are there are hidden.

    Written here and now: a thread that cannot write would end without a word, and let
    whoever fills its queue wait for ever.
    """

    def __init__(self, folder: pathlib.Path, first: int):
        self._folder = folder
        with writing(folder):
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))
        self._write(Event(step=first, file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(step=first, session_log=start))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        with writing(self._folder):
            self._writer.write_event(event)

    def draw(self, group: str, row: Mapping[str, Any]) -> None:
        """Writes the figures of a row."""
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                summary = scalar(f"{group}/{key}", value)
                self._write(Event(step=row["step"], summary=summary))
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing(self._folder):
            self._writer.close()


class _Files(contextlib.ExitStack):
    """Where rows go; all files are closed together."""

    def __init__(
        self,
        folder: pathlib.Path,
        start: int,
        evaluations: Sequence[Mapping[str, Any]],
    ):
        super().__init__()
        self.metrics = Lines(folder / METRICS, first_dropped=start + 1)
        self.callback(self.metrics.close)
        self.evaluations = Lines(
            folder / EVALUATIONS, first_dropped=start + 1, rows=evaluations
        )
        self.callback(self.evaluations.close)
        self.board = _Board(folder / "tensorboard", start + 1)
        self.callback(self.board.close)


class Logbook:
    """Writes steps and evaluations to files, to TensorBoard and to who is shown them.

    Of several processes the first writes, and all know the rows of evaluations.

    Args:
        folder: Of the run.
        start: Steps done before; what the files say of later ones is cut off.
        last: The last step, which is always written.
        every: Steps between lines of metrics.
        progress: Who is shown how it goes.
        meter: Of the time that steps take.
        evaluations: Rows of the evaluations before; what their file says when None.

    Attributes:
        evaluations: Rows of all evaluations so far, those before a resume too.
        skipped_in_row: Steps in a row, up to the last one, that were not finite.
        not_finite: What the last step was skipped for: loss, gradient or update.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        start: int,
        last: int,
        every: int,
        progress: Progress,
        meter: Meter,
        evaluations: Sequence[Mapping[str, Any]] | None = None,
    ):
        self._every, self._last, self._progress = every, last, progress
        self._files: _Files | None = None
        rows = broadcast(lambda: read_lines(folder / EVALUATIONS))
        rows = [row for row in rows if row["step"] <= start]
        if evaluations is not None:
            if start and json.dumps([*map(dict, evaluations)]) != json.dumps(rows):
                progress.say(f"{EVALUATIONS} is not the checkpoint's: written anew")
            rows = [*map(dict, evaluations)]
        self.evaluations: list[dict[str, Any]] = rows
        if is_main_process():
            self._files = _Files(folder, start, rows)
        self.skipped_in_row = 0
        self.not_finite: str | None = None
        self._meter = meter
        self._logged = start

    def step(self, step: int, metrics: Metrics, tokens: int) -> None:
        """Writes a step down, when it is one of those that are.

        Args:
            step: Its number, from 1.
            metrics: Of the step; this waits for them.
            tokens: Slots of its batch, padding included.
        """
        with self._meter.measured("wait"):
            read = jax.device_get(metrics)
        values = {key: float(value) for key, value in read.items()}
        self._meter.count(values.get("tokens", float(tokens)))
        skipped = bool(values.pop("skipped"))
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self.not_finite = _not_finite(values) if skipped else None
        if skipped:
            self._progress.say(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}: the {self.not_finite} is not finite, step "
                f"skipped ({self.skipped_in_row} in a row)"
            )
        if step % self._every and step != self._last:
            return
        measured = self._meter.take(step - self._logged, tokens)
        self._logged = step
        row: dict[str, Any] = {"step": step}
        row |= {key: values.get(key) for key in LOGGED}
        if "kl_target" in values:
            row["kl_target"] = values["kl_target"]
        row |= {key: value for key, value in values.items() if key not in row}
        row |= {"skipped": skipped, "not_finite": self.not_finite, **measured}
        if self._files:
            self._files.metrics.write(row)
            self._files.board.draw("train", row)
        self._progress.step(row)

    def evaluation(self, step: int, found: HeldOut) -> None:
        """Writes a held-out evaluation down."""
        row = {"step": step, **found._asdict()}
        self.evaluations.append(row)
        if self._files:
            self._files.evaluations.write(row)
            self._files.board.draw("held_out", row)
        self._progress.evaluation(step, found)

    def close(self) -> None:
        """Closes the files."""
        if self._files:
            self._files.close()


def _not_finite(values: Mapping[str, float]) -> str:
    for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
        if not math.isfinite(values[key]):
            return name
    return "update"
