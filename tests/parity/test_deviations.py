import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity.deviations import deviation_rows  # noqa: E402
from parity.published import Published  # noqa: E402
from parity.torch_exact import exact_loss  # noqa: E402


def test_deviation_rows_fail_when_the_other_side_has_no_defect():
    """A row that passes whatever PyTorch does would show nothing."""

    def right(name, student, teacher, mask, labels, settings):
        return exact_loss(
            name, student.float(), teacher.float(), mask, labels, settings
        )

    rows = deviation_rows(Published("repaired", loss=right))
    # One name per line of the list of deviations.
    assert len({row.name for row in rows}) == 8
    passed = {row.name for row in rows if row.passed}
    # Those of the schedule and of CTKD's temperature are defects of no loss.
    assert all(
        part in " ".join(passed) for part in ("micro-batch", "NaN loss", "temperature")
    )
    assert len(passed) == 3
