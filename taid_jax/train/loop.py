"""The host loop: batches in, steps out, progress shown, evaluated and saved on the way.

Metrics of a step are read after the next one was dispatched, so that the host never
makes the devices wait.
"""

import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from tensorboardX import SummaryWriter

from taid_jax.evaluate import HeldOut
from taid_jax.settings import Settings
from taid_jax.sharding import place_batch
from taid_jax.train.checkpoint import Checkpoints
from taid_jax.train.report import EVALUATIONS, METRICS, Lines, read_lines
from taid_jax.train.state import DistillState
from taid_jax.train.step import Metrics, TrainStep
from taid_jax.types import Params

LOGGED = ("loss", "kl", "t", "delta_t", "learning_rate", "grad_norm")


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is intact."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal asked for an end; the state was saved first."""


@runtime_checkable
class BatchIterator(Protocol):
    """Batches without end, whose place can be saved."""

    def __next__(self) -> Mapping[str, np.ndarray]:
        """Returns the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Returns its place, as JSON values."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave."""
        ...


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


@dataclasses.dataclass
class Loop:
    """What a run of the loop needs.

    Attributes:
        settings: Of the run.
        folder: Output folder.
        train_step: From `make_train_step`.
        teacher_params: Passed to every step.
        batches: Training batches.
        fingerprint: Of the data, saved beside their iterator's place.
        evaluate: Held-out evaluation of some parameters.
        checkpoints: Where states are saved.
        mesh: Where batches go.
        progress: Who is shown how it goes.
    """

    settings: Settings
    folder: pathlib.Path
    train_step: TrainStep
    teacher_params: Params
    batches: BatchIterator
    fingerprint: str
    evaluate: Callable[[Params], HeldOut]
    checkpoints: Checkpoints
    mesh: Mesh
    progress: Progress

    def run(self, state: DistillState) -> DistillState:
        """Returns the state after the last step.

        Args:
            state: New, or restored; the loop goes on from `state.step`.

        Raises:
            TrainingError: After too many non-finite steps in a row.
            Interrupted: When SIGTERM or SIGINT came; the state is saved.
        """
        run = self.settings.run
        start = int(state.step)
        self._metrics = Lines(self.folder / METRICS, first_dropped=start + 1)
        self._evaluations = Lines(self.folder / EVALUATIONS, first_dropped=start + 1)
        evaluated = {row["step"]: row for row in read_lines(self.folder / EVALUATIONS)}
        self._best = min((row["kl"] for row in evaluated.values()), default=math.inf)
        self._writer = SummaryWriter(
            str(self.folder / "tensorboard"), purge_step=start + 1
        )
        self._skipped_in_row = 0
        pending: tuple[int, Metrics] | None = None
        try:
            with _stop_signals() as stop:
                if 0 not in evaluated and start == 0:
                    self._evaluate(0, state)
                self._clock = time.perf_counter()
                self._logged = start
                for step in range(start + 1, run.steps + 1):
                    batch = place_batch(next(self.batches), self.mesh)
                    state, metrics = self.train_step(state, self.teacher_params, batch)
                    if pending:
                        self._log(*pending, batch)
                    pending = (step, metrics)
                    last = step == run.steps
                    evaluating = last or _due(step, run.eval_every)
                    saving = last or _due(step, run.save_every)
                    if evaluating or saving or stop:
                        self._log(*pending, batch)
                        pending = None
                        self._pause(step, state, evaluating, saving or bool(stop))
                    if stop and not last:
                        raise Interrupted(
                            f"stopped by {stop[0]} after step {step} of {run.steps}; "
                            "the state is saved, go on with --resume"
                        )
            return state
        finally:
            self.checkpoints.wait()
            self._metrics.close()
            self._evaluations.close()
            self._writer.close()

    def _pause(
        self, step: int, state: DistillState, evaluating: bool, saving: bool
    ) -> None:
        """Evaluates and saves, with the clock of tokens per second stopped."""
        paused = time.perf_counter()
        kl = None
        if evaluating:
            kl = self._evaluate(step, state)
            saving = saving or kl < self._best
            self._best = min(self._best, kl)
        if saving:
            place = {
                "iterator": self.batches.get_state(),
                "fingerprint": self.fingerprint,
            }
            self.checkpoints.save(step, state, place, self.settings, kl=kl)
        self._clock += time.perf_counter() - paused

    def _evaluate(self, step: int, state: DistillState) -> float:
        found = self.evaluate(state.params)
        self._evaluations.write({"step": step, **found._asdict()})
        for key in ("kl", "student_perplexity", "teacher_perplexity"):
            self._writer.add_scalar(f"held_out/{key}", getattr(found, key), step)
        self.progress.evaluation(step, found)
        return found.kl

    def _log(self, step: int, metrics: Metrics, batch: Mapping[str, jax.Array]) -> None:
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if values.pop("skipped"):
            self._skipped_in_row += 1
            self.progress.say(
                f"step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}: not finite, step skipped "
                f"({self._skipped_in_row} in a row)"
            )
            if self._skipped_in_row >= self.settings.run.max_skipped:
                raise TrainingError(
                    f"stopped at step {step}: {self._skipped_in_row} steps in a row "
                    "had a loss or gradient that is not finite. The last good "
                    f"checkpoint is in {self.checkpoints.folder}. A lower "
                    "--learning-rate or --dtype float32 may help; --max-skipped sets "
                    "the limit"
                )
            skipped = True
        else:
            self._skipped_in_row = 0
            skipped = False
        if step % self.settings.run.log_every and step != self.settings.run.steps:
            return
        now = time.perf_counter()
        tokens = batch["input_ids"].size * (step - self._logged)
        rate = tokens / max(now - self._clock, 1e-9)
        self._clock, self._logged = now, step
        row: dict[str, Any] = {"step": step}
        row |= {key: values.get(key) for key in LOGGED}
        row |= {key: value for key, value in values.items() if key not in row}
        row |= {"skipped": skipped, "tokens_per_second": rate}
        self._metrics.write(row)
        for key, value in row.items():
            if isinstance(value, float) and math.isfinite(value):
                self._writer.add_scalar(f"train/{key}", value, step)
        self.progress.step(row)


def _due(step: int, every: int) -> bool:
    """Returns whether something is done at this step; never when `every` is 0."""
    return every > 0 and step % every == 0


class _stop_signals:  # noqa: N801 - read as a with-statement
    """Within it, the first SIGTERM or SIGINT is noted in the list that it gives.

    A second one acts as it did before.
    """

    def __enter__(self) -> list[str]:
        self._seen: list[str] = []
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break  # Not the main thread: whoever owns it decides.
        return self._seen

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.append(signal.Signals(number).name)
        signal.signal(number, self._before[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
