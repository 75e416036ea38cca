import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import run  # noqa: E402
from parity.rows import failed  # noqa: E402
from taid_jax.train.objective import make_scheduler  # noqa: E402
from taid_jax.train.step import make_train_step  # noqa: E402


def _quantities_that_fail(folder, **broken):
    return {row.quantity for row in failed(run.recorded_rows(folder, last=4, **broken))}


def test_table_fails_for_t_one_step_off(golden):
    class OneStepOff:
        def __init__(self, settings, steps):
            self._right = make_scheduler(settings, steps)
            self.init = self._right.init

        def update(self, state, loss, step):
            return self._right.update(state, loss, step + 1)

    found = _quantities_that_fail(golden / "run_taid", make_schedule=OneStepOff)
    assert {"loss", "t_used", "t_after"} <= found


def _with_batches(change):
    """Returns a `make_train_step` whose step sees changed batches."""

    def make_step(*args, **kwargs):
        step = make_train_step(*args, **kwargs)
        return lambda state, teacher, batch: step(state, teacher, change(dict(batch)))

    return make_step


def test_table_fails_for_labels_that_are_not_shifted(golden):
    def not_shifted(batch):
        # The step shifts by one; this undoes it.
        shifted = np.roll(np.asarray(batch["labels"]), 1, axis=1)
        shifted[:, 0] = -100
        return {**batch, "labels": shifted}

    change = _with_batches(not_shifted)
    for name in ("run_sft", "run_taid"):
        assert "loss" in _quantities_that_fail(golden / name, make_step=change)


def test_table_fails_for_padding_that_is_counted(golden):
    def counted(batch):
        labels = np.asarray(batch["labels"])
        padding = np.asarray(batch["attention_mask"]) == 0
        return {**batch, "labels": np.where(padding, 0, labels).astype(np.int32)}

    change = _with_batches(counted)
    assert "loss" in _quantities_that_fail(golden / "run_sft", make_step=change)
