"""The host loop: batches in, steps out, progress shown, evaluated and saved on the way.

Metrics of a step are read after the next one was dispatched, so that the host never
makes the devices wait.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import signal
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from taid_jax.errors import ModelError
from taid_jax.settings import Settings
from taid_jax.sharding import place_batch
from taid_jax.train.checkpoint import Checkpoints
from taid_jax.train.evaluate import HeldOut, check_finite, selection_metric
from taid_jax.train.folder import way_on
from taid_jax.train.metrics import MetricsLogger
from taid_jax.train.on_policy.texts import OnPolicyBatches
from taid_jax.train.report import ConsoleProgress, Progress
from taid_jax.train.state import DistillState, nonfinite_leaves
from taid_jax.train.step import Metrics, TrainStep
from taid_jax.train.throughput import Throughput
from taid_jax.types import Params


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


class stop_signals:  # noqa: N801 - read as a with-statement
    """Within it, the first SIGTERM or SIGINT is noted and does nothing else.

    A second one acts as it did before. Of several processes any may get it: JAX tells
    the others and chooses the step at which all of them stop.
    """

    def __enter__(self) -> "stop_signals":
        self._seen: list[str] = []
        self._before = {}
        self._several = jax.process_count() > 1
        # Among several, SIGTERM is JAX's.
        numbers = (signal.SIGTERM, signal.SIGINT)[self._several :]
        for number in numbers:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break  # Not the main thread: whoever owns it decides.
        return self

    def asked(self, step: int) -> str | None:
        """Returns what asked for an end after this step, if anything did.

        To be called once after each step, on every process.

        Args:
            step: Its number.
        """
        if self._several:
            now = multihost_utils.reached_preemption_sync_point(step)
            return "a signal to one of the processes" if now else None
        return self._seen[0] if self._seen else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen.append(signal.Signals(number).name)
        signal.signal(number, self._before[number])
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Loop:
    """What a run of the loop needs.

    Attributes:
        settings: Of the run.
        folder: Output folder.
        train_step: From `make_train_step`.
        teacher_params: Passed to every step.
        batches: Training batches, of the data or of completions.
        fingerprint: Of the data, saved beside their iterator's place.
        evaluate: Held-out evaluation of a state, which it leaves as it is.
        checkpoints: Where states are saved.
        mesh: Where batches go.
        progress: Who is shown how it goes.
        throughput: Of the steps.
        models: What identifies teacher and student, saved with every checkpoint.
        evaluations: Rows of the evaluations before, from the checkpoint.
    """

    settings: Settings
    folder: pathlib.Path
    train_step: TrainStep
    teacher_params: Params
    batches: BatchIterator | OnPolicyBatches
    fingerprint: str
    evaluate: Callable[[DistillState], HeldOut]
    checkpoints: Checkpoints
    mesh: Mesh
    progress: Progress = dataclasses.field(
        default_factory=lambda: ConsoleProgress(Console(quiet=True), 1)
    )
    throughput: Throughput = dataclasses.field(default_factory=Throughput)
    models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()

    def run(self, state: DistillState) -> DistillState:
        """Returns the state after the last step.

        Args:
            state: New, or restored; the loop goes on from `state.step`.

        Raises:
            TrainingError: After too many non-finite steps in a row.
            ModelError: If teacher or student is not finite at the start.
            Interrupted: When SIGTERM or SIGINT came; the state is saved.
            WriteError: If something cannot be written.
        """
        run = self.settings.run
        start = int(state.step)
        self._log = MetricsLogger(
            self.folder,
            start=start,
            last=run.steps,
            every=run.log_every,
            progress=self.progress,
            throughput=self.throughput,
            evaluations=self.evaluations,
        )
        rows = self._log.evaluations
        best_by = self.settings.evaluation.selection_metric
        # The untrained student is never exported, however good it is.
        trained = (selection_metric(row, best_by) for row in rows if row["step"] > 0)
        self._best = min(trained, default=math.inf)
        pending: tuple[int, Metrics] | None = None
        try:
            # A first signal does not disturb the save in flight at the end either.
            with stop_signals() as signals, contextlib.ExitStack() as left:
                left.callback(self.checkpoints.wait)
                if start == 0 and not rows:
                    self._evaluate(0, state)
                self.throughput.start()
                for step in range(start + 1, run.steps + 1):
                    batch = self._next_batch(step, state)
                    tokens = batch["input_ids"].size
                    with self.throughput.measured("dispatch"):
                        state, metrics = self.train_step(
                            state, self.teacher_params, batch
                        )
                    if isinstance(self.batches, OnPolicyBatches):
                        metrics |= self.batches.metrics()
                    if pending:
                        self._write(*pending, tokens)
                    pending = (step, metrics)
                    last = step == run.steps
                    evaluating = last or _due(step, run.eval_every)
                    stop = signals.asked(step)
                    saving = last or _due(step, run.save_every) or stop is not None
                    if evaluating or saving:
                        self._write(*pending, tokens)
                        pending = None
                        self._pause(step, state, evaluating, saving)
                    if stop and not last:
                        self.checkpoints.wait()
                        raise Interrupted(
                            f"stopped by {stop} after step {step} of {run.steps}. "
                            + way_on(self.folder)
                        )
                if rows[-1]["step"] != run.steps:
                    # Made shorter, to a checkpoint that was not evaluated.
                    self._evaluate(run.steps, state)
            return state
        finally:
            self._log.close()

    def _next_batch(self, step: int, state: DistillState) -> dict[str, jax.Array]:
        """Returns what a step trains on: a batch of the data, or of completions."""
        if isinstance(self.batches, OnPolicyBatches):
            teacher = state.teacher_of(self.teacher_params)
            rows = self.batches.batch(state.params, teacher, step, self.throughput)
        else:
            with self.throughput.measured("data"):
                rows = next(self.batches)
        with self.throughput.measured("data"):
            return place_batch(rows, self.mesh)

    def _pause(
        self, step: int, state: DistillState, evaluating: bool, saving: bool
    ) -> None:
        """Evaluates and saves."""
        found = None
        if evaluating:
            found = self._evaluate(step, state)
            saving = saving or found < self._best
            self._best = min(self._best, found)
        if saving and (wrong := nonfinite_leaves((state.params, state.opt_state))):
            self.progress.say(
                f"step {step}: the student or its optimizer has numbers that are not "
                f"finite ({wrong[0]}); no checkpoint is made of that"
            )
        elif saving:
            place = {
                "iterator": self.batches.get_state(),
                "fingerprint": self.fingerprint,
                "models": dict(self.models),
                "evaluations": self._log.evaluations,
            }
            with self.throughput.measured("save"):
                self.checkpoints.save(step, state, place, self.settings, metric=found)

    def _evaluate(self, step: int, state: DistillState) -> float:
        """Returns the figure that decides what is kept; the lowest is the best."""
        with self.throughput.measured("evaluate"):
            found = self.evaluate(state)
        if step == 0:
            check_finite(found)
            if wrong := nonfinite_leaves(state.params):
                raise ModelError(
                    f"the student has weights that are not finite: {wrong}"
                )
        if isinstance(self.batches, OnPolicyBatches) and found.loss is not None:
            self.batches.observe(found.loss)
        self._log.evaluation({"step": step, **found._asdict()})
        return selection_metric(found, self.settings.evaluation.selection_metric)

    def _write(self, step: int, metrics: Metrics, tokens: int) -> None:
        """Writes a step down, and ends the run when too many were not finite."""
        self._log.step(step, metrics, tokens)
        skipped = self._log.skipped_in_row
        if skipped >= self.settings.run.max_consecutive_nonfinite:
            self.checkpoints.wait()
            raise TrainingError(
                f"stopped at step {step}: {skipped} steps in a row "
                "had a loss, gradient or update that is not finite, the last one its "
                f"{self._log.not_finite}. A lower --learning-rate or --dtype float32 "
                "may help, for an update usual values of --b2, --eps and "
                "--weight-decay; --max-consecutive-nonfinite sets the limit. "
                + way_on(self.folder)
            )


def _due(step: int, every: int) -> bool:
    """Returns whether something is done at this step; never when `every` is 0."""
    return every > 0 and step % every == 0
