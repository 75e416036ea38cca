import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

torch = pytest.importorskip("torch", reason="parity needs PyTorch: '.[parity]'")
# Of parity itself: `python -m parity` shows the rows, and CI runs both.
pytestmark = pytest.mark.parity

from parity import recorded  # noqa: E402
from parity.cases import Grid  # noqa: E402
from parity.losses import random_rows  # noqa: E402
from parity.rows import failed  # noqa: E402
from parity.subjects import SUBJECTS  # noqa: E402
from taid_jax.loss import distillation_loss  # noqa: E402

BY_NAME = {subject.name: subject for subject in SUBJECTS}
TINY = Grid(scales=(1.0,), vocabs=(7,), dtypes=("float32",))


FEW = [BY_NAME[name] for name in ("TAID, t = 0.4", "reverse KL", "DKD")]
SCALES = (0.1, 3.0, 30.0)


def test_reference_rows_fail_for_another_loss(golden):
    from parity.torch_exact import exact_loss

    rows = recorded.reference_rows(golden, exact_loss, "the papers' definitions")
    assert len(failed(rows)) == len(rows)


# Deliberately broken copies. Each has to make the table fail.


def _log_softmaxes(student, teacher):
    return jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)


def _kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)


def _swapped_forward(student, teacher):
    log_q, log_p = _log_softmaxes(student, teacher)
    return _kl(log_q, log_p)


def _swapped_reverse(student, teacher):
    log_q, log_p = _log_softmaxes(student, teacher)
    return -jnp.sum(jnp.exp(log_p) * log_q, -1)


def _swapped_taid(t, student, teacher):
    mixture = (1 - t) * jax.lax.stop_gradient(student) + t * teacher
    return _swapped_forward(student, mixture)


def _swapped_mixture(weight, kind, student, teacher):
    """Teacher and student change places in the mixture's weights."""
    log_q, log_p = _log_softmaxes(student, teacher)
    mixture = jnp.log((1 - weight) * jnp.exp(log_p) + weight * jnp.exp(log_q))
    if kind == "forward":
        return -jnp.sum(jnp.exp(log_p) * mixture, -1)
    if kind == "reverse":
        return _kl(log_q, mixture)
    return (1 - weight) * _kl(log_p, mixture) + weight * _kl(log_q, mixture)


def _swapped_ctkd(temperature, student, teacher):
    inner = _swapped_forward(student / temperature, teacher / temperature)
    return temperature**2 * inner


def _swapped_adaptive(student, teacher):
    from taid_jax.loss import AdaptiveKL

    both = _swapped_forward(student, teacher) + _swapped_reverse(student, teacher)
    return both - AdaptiveKL()(student, teacher, None)


def _swapped_dkd(student, teacher, labels):
    log_q, log_p = _log_softmaxes(student, teacher)
    label = jax.nn.one_hot(labels, student.shape[-1], dtype=bool)

    def parts(log_all):
        others = jnp.where(label, -1e30, log_all)
        mass = jax.nn.logsumexp(others, -1)
        return (
            jnp.sum(jnp.where(label, log_all, 0.0), -1),
            mass,
            others - mass[..., None],
        )

    q_label, q_rest, q_others = parts(log_q)
    p_label, p_rest, p_others = parts(log_p)
    target = jnp.exp(q_label) * (q_label - p_label) + jnp.exp(q_rest) * (
        q_rest - p_rest
    )
    return target + 0.5 * _kl(q_others, p_others)


SWAPPED = {
    "TAID, t = 0.4": functools.partial(_swapped_taid, 0.4),
    "forward KL": _swapped_forward,
    "reverse KL": _swapped_reverse,
    "JS": functools.partial(_swapped_mixture, 0.1, "both"),
    "skew forward KL": functools.partial(_swapped_mixture, 0.1, "forward"),
    "skew reverse KL": functools.partial(_swapped_mixture, 0.9, "reverse"),
    "adaptive KL": _swapped_adaptive,
    "CTKD": functools.partial(_swapped_ctkd, 15.62),
}


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


@pytest.mark.parametrize("name", SWAPPED)
def test_table_fails_for_the_other_direction(name):
    def swapped(right, student, teacher, labels):
        return SWAPPED[name](student, teacher)

    assert failed(_table_with(name, swapped))


def test_table_fails_for_the_other_direction_of_dkd():
    def swapped(right, student, teacher, labels):
        return _swapped_dkd(student, teacher, labels)

    assert failed(_table_with("DKD", swapped))


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
