"""Signals that ask a run to end: noted, so that it can save first."""

import os
import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


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
