import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import schedule  # noqa: E402
from parity.rows import failed  # noqa: E402
from taid_jax.schedule import TAIDScheduler  # noqa: E402


class OneStepOff:
    """A schedule that is told the next step's number."""

    def __init__(self, **settings):
        self._right = TAIDScheduler(**settings)

    def init(self):
        return self._right.init()

    def update(self, state, loss, step):
        return self._right.update(state, loss, step + 1)


class SeedsWithoutWaiting(OneStepOff):
    """A schedule that already moves on the first loss."""

    def init(self):
        state = self._right.init()
        return self._right.update(state, state.t, 0)

    def update(self, state, loss, step):
        return self._right.update(state, loss, step)


@pytest.mark.parametrize("broken", [OneStepOff, SeedsWithoutWaiting])
def test_table_fails_for(broken, golden):
    assert failed(schedule.recorded_rows(golden, broken))
    assert failed(schedule.random_rows([0], steps=100, make=broken))
