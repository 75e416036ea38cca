"""What a run writes down on the way: lines of metrics, evaluations, TensorBoard."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from taid_jax.distributed import is_main_process
from taid_jax.train.folder import writing
from taid_jax.train.report import EVALUATIONS, METRICS, Lines, Progress, read_lines
from taid_jax.train.step import Metrics
from taid_jax.train.throughput import Throughput

LOGGED = ("loss", "kl_teacher", "t", "delta_t", "learning_rate", "grad_norm")

# Made when it is imported, from a description that type checkers do not see.
Event: Any = vars(event_pb2)["Event"]
SessionLog: Any = vars(event_pb2)["SessionLog"]


class _TensorBoard:
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
        """Writes the figures of a row; what is not finite is left out."""
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                summary = scalar(f"{group}/{key}", value)
                self._write(Event(step=row["step"], summary=summary))
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()


class MetricsLogger(contextlib.ExitStack):
    """Writes steps and evaluations to files, to TensorBoard and to who is shown them.

    Of several processes the first writes, and all know the rows of evaluations.
    Closing it closes the files.

    Args:
        folder: Of the run.
        start: Steps done before; what the files say of later ones is cut off.
        last: The last step, which is always written.
        every: Steps between lines of metrics.
        progress: Who is shown how it goes.
        throughput: Of the steps.
        evaluations: Rows of the evaluations before, from the checkpoint.

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
        throughput: Throughput,
        evaluations: Sequence[Mapping[str, Any]] = (),
    ):
        super().__init__()
        self._every, self._last, self._progress = every, last, progress
        self._throughput, self._logged = throughput, start
        self.skipped_in_row = 0
        self.not_finite: str | None = None
        self.evaluations: list[dict[str, Any]] = [*map(dict, evaluations)]
        self._writes = is_main_process()
        if self._writes:
            first, rows = start + 1, self.evaluations
            found = [r for r in read_lines(folder / EVALUATIONS) if r["step"] <= start]
            if start and json.dumps(found) != json.dumps(rows):
                progress.say(f"{EVALUATIONS} is not the checkpoint's: written anew")
            self._metrics_file = Lines(folder / METRICS, first_dropped=first)
            self.callback(self._metrics_file.close)
            self._evaluations_file = Lines(
                folder / EVALUATIONS, first_dropped=first, rows=rows
            )
            self.callback(self._evaluations_file.close)
            self._board = _TensorBoard(folder / "tensorboard", first)
            self.callback(self._board.close)

    def step(self, step: int, metrics: Metrics, tokens: int) -> None:
        """Writes a step down, when it is one of those that are, or was skipped.

        Args:
            step: Its number, from 1.
            metrics: Of the step; this waits for them.
            tokens: Slots of its batch, padding included.
        """
        with self._throughput.measured("wait"):
            read = jax.device_get(metrics)
        values = {key: float(value) for key, value in read.items()}
        self._throughput.count(values.get("tokens", float(tokens)))
        skipped = bool(values.pop("skipped"))
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        self.not_finite = _what_is_not_finite(values) if skipped else None
        if skipped:
            self._progress.say(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}: the {self.not_finite} is not finite, step "
                f"skipped ({self.skipped_in_row} in a row)"
            )
        if step % self._every and step != self._last and not skipped:
            return
        measured = self._throughput.take(step - self._logged, tokens)
        self._logged = step
        row: dict[str, Any] = {"step": step}
        row |= {key: values.get(key) for key in LOGGED}
        if "kl_target" in values:
            row["kl_target"] = values["kl_target"]
        row |= {key: value for key, value in values.items() if key not in row}
        row |= {"skipped": skipped, "not_finite": self.not_finite, **measured}
        if self._writes:
            self._metrics_file.write(row)
            self._board.draw("distill", row)
        self._progress.step(row)

    def evaluation(self, row: dict[str, Any]) -> None:
        """Writes a held-out evaluation down: its `step` and its figures."""
        self.evaluations.append(row)
        if self._writes:
            self._evaluations_file.write(row)
            self._board.draw("held_out", row | _cross_entropies(row))
        self._progress.evaluation(row)


def _cross_entropies(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns those of both models, nats per token, by names that stand together."""
    return {
        f"cross_entropy/{model}": math.log(row[f"{model}_perplexity"])
        for model in ("student", "teacher")
    }


def _what_is_not_finite(values: Mapping[str, float]) -> str:
    for name, key in (("loss", "loss"), ("gradient", "grad_norm")):
        if not math.isfinite(values[key]):
            return name
    return "update"
