"""Signals that ask a run to end: noted, so that it can save first."""

import signal
from types import FrameType


class stop_signals:  # noqa: N801 - read as a with-statement
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
