"""What a run writes down on the way: lines of metrics, TensorBoard, a clock."""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from tensorboardX import SummaryWriter

from taid_jax.evaluate import HeldOut
from taid_jax.train.report import EVALUATIONS, METRICS, Lines, read_lines
from taid_jax.train.step import Metrics

LOGGED = ("loss", "kl", "t", "delta_t", "learning_rate", "grad_norm")


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


class Logbook:
    """Writes steps and evaluations to files, to TensorBoard and to who is shown them.

    Args:
        folder: Of the run.
        start: Steps done before; what the files say of later ones is cut off.
        last: The last step, which is always written.
        every: Steps between lines of metrics.
        progress: Who is shown how it goes.

    Attributes:
        evaluations: Rows of all evaluations so far, those before a resume too.
        skipped_in_row: Steps in a row, up to the last one, that were not finite.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        start: int,
        last: int,
        every: int,
        progress: Progress,
    ):
        self._every, self._last, self._progress = every, last, progress
        self._metric_lines = Lines(folder / METRICS, first_dropped=start + 1)
        self._evaluation_lines = Lines(folder / EVALUATIONS, first_dropped=start + 1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self.evaluations: list[dict[str, Any]] = read_lines(folder / EVALUATIONS)
        self.skipped_in_row = 0
        self._clock = time.perf_counter()
        self._logged = start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the clock of tokens per second stands still."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._clock += time.perf_counter() - began

    def step(self, step: int, metrics: Metrics, tokens: int) -> None:
        """Writes a step down, when it is one of those that are.

        Args:
            step: Its number, from 1.
            metrics: Of the step; this waits for them.
            tokens: Slots of its batch, padding included.
        """
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        skipped = bool(values.pop("skipped"))
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if skipped:
            self._progress.say(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}: not finite, step skipped "
                f"({self.skipped_in_row} in a row)"
            )
        if step % self._every and step != self._last:
            return
        now = time.perf_counter()
        rate = tokens * (step - self._logged) / max(now - self._clock, 1e-9)
        self._clock, self._logged = now, step
        row: dict[str, Any] = {"step": step}
        row |= {key: values.get(key) for key in LOGGED}
        row |= {key: value for key, value in values.items() if key not in row}
        row |= {"skipped": skipped, "tokens_per_second": rate}
        self._metric_lines.write(row)
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(f"train/{key}", value, step)
        self._progress.step(row)

    def evaluation(self, step: int, found: HeldOut) -> None:
        """Writes a held-out evaluation down."""
        row = {"step": step, **found._asdict()}
        self.evaluations.append(row)
        self._evaluation_lines.write(row)
        for key, value in row.items():
            if key not in ("step", "tokens") and value is not None:
                self._board.add_scalar(f"held_out/{key}", value, step)
        self._progress.evaluation(step, found)

    def close(self) -> None:
        """Closes the files."""
        self._metric_lines.close()
        self._evaluation_lines.close()
        self._board.close()
