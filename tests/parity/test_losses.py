import dataclasses

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import recorded  # noqa: E402
from parity.cases import Grid  # noqa: E402
from parity.losses import random_rows  # noqa: E402
from parity.published import Published  # noqa: E402
from parity.rows import failed  # noqa: E402
from parity.subjects import SUBJECTS  # noqa: E402
from parity.torch_exact import exact_loss  # noqa: E402
from taid_jax.loss import distillation_loss  # noqa: E402

BY_NAME = {subject.name: subject for subject in SUBJECTS}
TINY = Grid(scales=(1.0,), vocabs=(7,), dtypes=("float32",))


SYMMETRIC = ("TVD", "JS, weight 0.5", "cross-entropy")


def test_reference_rows_fail_for_another_loss(golden):
    papers = Published("the papers' definitions", loss=exact_loss)
    rows = recorded.reference_rows(golden, papers)
    assert len(failed(rows)) == len(rows)


# Deliberately broken copies. Each has to make the table fail.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Broken:
    """An objective with a defect: a function of its own inputs, or of the right one."""

    right: object
    defect: object

    def __call__(self, student, teacher, labels=None):
        return self.defect(self.right, student, teacher, labels)


def _wrong_sign(right, student, teacher, labels):
    return -right(student, teacher, labels)


def _mean_over_vocabulary(right, student, teacher, labels):
    return right(student, teacher, labels) / student.shape[-1]


def _table_with(name, defect):
    right = BY_NAME[name]
    broken = dataclasses.replace(right, make=lambda: Broken(right.make(), defect))
    return random_rows([0], TINY, [broken])


NAMES = ["TAID, t = 0.4", "reverse KL", "DKD"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("defect", [_wrong_sign, _mean_over_vocabulary])
def test_table_fails_for(name, defect):
    assert failed(_table_with(name, defect))


@pytest.mark.parametrize("name", [n for n in BY_NAME if n not in SYMMETRIC])
def test_table_fails_for_the_other_direction(name):
    def swapped(right, student, teacher, labels):
        return right(teacher, student, labels)

    rows = failed(_table_with(name, swapped))
    assert any("value" in row.quantity for row in rows)


def _padding_counted(objective, student, teacher, mask, labels):
    return distillation_loss(objective, student, teacher, None, jnp.maximum(labels, 0))


def _shift_missing(objective, student, teacher, mask, labels):
    """Labels and mask of the position itself, not of the one that comes next."""
    labels, mask = (jnp.roll(array, 1, axis=-1) for array in (labels, mask))
    return distillation_loss(objective, student, teacher, mask, labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reduce", [_padding_counted, _shift_missing])
def test_table_fails_for_a_mean_with(name, reduce):
    assert failed(random_rows([0], TINY, [BY_NAME[name]], reduce=reduce))


def _probability_mixture(right, student, teacher, labels):
    t = 0.4
    q, p = jax.nn.softmax(student), jax.nn.softmax(teacher)
    target = jax.lax.stop_gradient((1 - t) * q + t * p)
    return -jnp.sum(target * jax.nn.log_softmax(student), -1)


def _anchor_not_detached(right, student, teacher, labels):
    t = 0.4
    target = jax.nn.softmax((1 - t) * student + t * teacher)
    return -jnp.sum(target * jax.nn.log_softmax(student), -1)


def _one_step_off(right, student, teacher, labels):
    # One step of the published default: alpha * sigmoid(0) * (1 - t).
    return dataclasses.replace(right, t=0.4 + 5e-4 * 0.5 * 0.6)(
        student, teacher, labels
    )


@pytest.mark.parametrize(
    "defect", [_probability_mixture, _anchor_not_detached, _one_step_off]
)
def test_table_fails_for_taid_with(defect):
    assert failed(_table_with("TAID, t = 0.4", defect))


def test_table_passes_for_a_plain_copy():
    """The defects above are what fails, not the way they are put in."""

    def copy(right, student, teacher, labels):
        return right(student, teacher, labels)

    assert failed(_table_with("TAID, t = 0.4", copy)) == []
