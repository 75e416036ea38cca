import os
import signal

import pytest

from taid_jax.train.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_notes_the_first_and_lets_the_second_through(number):
    came = []
    before = signal.signal(number, lambda *_: came.append("before"))
    try:
        with stop_signals() as signals:
            assert signals.asked(1) is None
            os.kill(os.getpid(), number)
            assert signals.asked(2) == signal.Signals(number).name
            assert not came
            os.kill(os.getpid(), number)
            assert came == ["before"]
        os.kill(os.getpid(), number)
        assert came == ["before", "before"]
    finally:
        signal.signal(number, before)
