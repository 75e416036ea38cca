"""Objectives of other methods: next-token cross-entropy, CTKD and DKD."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._cross_entropy import (
    by_label,
    forward,
    label_cross_entropy,
    label_entries,
)
from taid_jax.loss._exact import Parts, exact
from taid_jax.loss._objective import (
    STATIC,
    as_scalar,
    check_between,
    check_positive,
    check_shapes,
    check_static,
    need_labels,
    register_objective,
)

_LARGEST = float(jnp.finfo(jnp.float32).max)


@register_objective
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy to the labels, in nats per token.

    It ignores the teacher, whose logits may be None.
    """

    needs_teacher: ClassVar[bool] = False

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."] | None = None,
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        labels = need_labels("CrossEntropy", student_logits, labels)
        check_shapes(student_logits, teacher_logits, labels, needs_teacher=False)
        return label_cross_entropy(student_logits.astype(jnp.float32), labels)


@jax.custom_jvp
def _tempered_cross_entropy(
    student_logits: Array, teacher_logits: Array, temperature: Array
) -> Array:
    pair = softmax.normalise_pair(student_logits, teacher_logits, temperature)
    return temperature**2 * forward(pair)[0]


@_tempered_cross_entropy.defjvp
def _tempered_cross_entropy_jvp(
    primals: tuple[Array, Array, Array], tangents: tuple[Array, Array, Array]
) -> tuple[Array, Array]:
    student_logits, teacher_logits, temperature = primals
    pair = softmax.normalise_pair(student_logits, teacher_logits, temperature)
    loss, gradient = forward(pair)
    in_student = gradient()
    # The temperature divides both rows, so its slope needs the teacher's gradient too,
    # which goes nowhere else.
    q, p = pair.student, pair.teacher
    surprise = jnp.where(pair.excluded, 0.0, jnp.log(q.total) - q.shifted)
    in_teacher = p.exp / p.total * (surprise - jnp.expand_dims(loss, -1))
    radial = jnp.sum(in_student * q.shifted + in_teacher * p.shifted, axis=-1)
    slope = temperature * (2 * loss - radial)
    change = jnp.sum(temperature * in_student * tangents[0], axis=-1)
    return temperature**2 * loss, change + slope * tangents[2]


@jax.custom_jvp
def _reverse_gradient(value: Array, strength: Array) -> Array:
    del strength
    return value


@_reverse_gradient.defjvp
def _reverse_gradient_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    value, strength = primals
    return value, -strength * tangents[0]


def ctkd_strength(
    epoch: ArrayLike, num_epochs: float | int = 10.0
) -> Float[Array, "..."]:
    """Returns the strength of CTKD's reversed gradient, rising from 0 to 1 by a cosine.

    Args:
        epoch: Epochs trained so far, may be a fraction and traced.
        num_epochs: Epochs until the strength is 1, where it stays; positive.

    Raises:
        ValueError: If `num_epochs` is not positive and finite.

    References:
        Li et al., CTKD, arXiv:2211.16231, section 3.3.
    """
    check_positive("num_epochs", num_epochs)
    progress = jnp.clip(jnp.asarray(epoch, jnp.float32) / num_epochs, 0.0, 1.0)
    return 0.5 * (1 - jnp.cos(jnp.pi * progress))


@register_objective
@dataclasses.dataclass(frozen=True)
class CTKD:
    """Forward KL at a temperature that is learned against the student.

    `T^2 * -sum softmax(u/T) log softmax(s/T)` with `T = 1 + 20 sigmoid(g)`. The
    gradient in g comes out reversed, times `strength`, so that one minimiser trains
    both: the student towards the teacher, g towards what is hardest for the student.

    Attributes:
        temperature: g, a scalar leaf that the train state holds and updates; starts at
            1. Any real number, since T is between 1 and 21.
        strength: Of the reversed gradient, in [0, 1], a leaf without gradient; see
            `ctkd_strength`.

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation, arXiv:2211.16231.
    """

    temperature: ArrayLike = 1.0
    strength: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_between("temperature", self.temperature, -_LARGEST, _LARGEST)
        check_between("strength", self.strength, 0, 1)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(student_logits, teacher_logits, labels)
        raw = _reverse_gradient(
            as_scalar("temperature", self.temperature),
            as_scalar("strength", self.strength),
        )
        return _tempered_cross_entropy(
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            1 + 20 * jax.nn.sigmoid(raw),
        )

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `kl`, KL(teacher || student) of every token at temperature 1."""
        check_shapes(student_logits, teacher_logits, labels)
        pair = softmax.normalise_pair(
            student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
        )
        return {"kl": softmax.kl(pair)}


@register_objective
@dataclasses.dataclass(frozen=True)
class DKD:
    """Forward KL split at the label: `alpha TCKD + beta NCKD`, times `temperature^2`.

    TCKD is the KL of (label, everything else) and NCKD the KL among everything else,
    each with its own weight instead of the teacher's confidence.

    Attributes:
        alpha: Weight of TCKD, at least 0; static.
        beta: Weight of NCKD, at least 0; static.
        temperature: Divides both rows of logits; a traced leaf without gradient.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Zhao et al., Decoupled Knowledge Distillation, arXiv:2203.08679.
    """

    alpha: float | int = dataclasses.field(default=1.0, metadata=STATIC)
    beta: float | int = dataclasses.field(default=0.5, metadata=STATIC)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_static("alpha", self.alpha, 0, 1e6)
        check_static("beta", self.beta, 0, 1e6)
        check_positive("temperature", self.temperature)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        labels = need_labels("DKD", student_logits, labels)
        check_shapes(student_logits, teacher_logits, labels)
        return exact(
            functools.partial(_dkd, self.alpha, self.beta),
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            as_scalar("temperature", self.temperature),
            labels,
        )

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `kl`, KL(teacher || student) of every token at temperature 1."""
        check_shapes(student_logits, teacher_logits, labels)
        pair = softmax.normalise_pair(
            student_logits.astype(jnp.float32), teacher_logits.astype(jnp.float32)
        )
        return {"kl": softmax.kl(pair)}


def _dkd(
    alpha: float | int,
    beta: float | int,
    student_logits: Array,
    teacher_logits: Array,
    temperature: Array,
    labels: Array,
) -> Parts:
    is_label = label_entries(labels, student_logits.shape[-1])
    rest = softmax.normalise_pair(
        jnp.where(is_label, -jnp.inf, student_logits),
        jnp.where(is_label, -jnp.inf, teacher_logits),
        temperature,
        softmax.filled,
    )
    label = softmax.normalise_pair(
        softmax.row_max(jnp.where(is_label, student_logits, -jnp.inf)),
        softmax.row_max(jnp.where(is_label, teacher_logits, -jnp.inf)),
        temperature,
        softmax.filled,
    )
    binary = _label_and_rest(label, rest, temperature)
    value = temperature**2 * (alpha * softmax.kl(binary) + beta * softmax.kl(rest))

    def gradient() -> Float[Array, "*tokens vocab"]:
        _, in_binary = forward(binary)
        _, in_rest = forward(rest)
        at_label, at_rest = jnp.split(alpha * in_binary(), 2, axis=-1)
        q = rest.student.exp / rest.student.total
        in_logits = jnp.where(is_label, at_label, at_rest * q + beta * in_rest())
        return temperature * in_logits

    return by_label(labels, student_logits.shape[-1], (value, gradient))


def _label_and_rest(
    label: softmax.Pair, rest: softmax.Pair, temperature: Array
) -> softmax.Pair:
    """Returns the softmaxes of two entries: the label, and all others as one."""

    def logits(label: softmax.Row, rest: softmax.Row) -> Float[Array, "*tokens 2"]:
        parts = [
            jnp.where(
                softmax.row_max(row.exp) == 0,
                softmax.FLOOR,
                row.top / temperature + jnp.log(row.total),
            )
            for row in (label, rest)
        ]
        return jnp.concatenate(parts, axis=-1)

    student = logits(label.student, rest.student)
    binary = softmax.normalise_pair(student, logits(label.teacher, rest.teacher))
    # Where student and teacher nearly agree, two rounded logarithms leave few digits of
    # their difference; how much the label rises against the rest is known better.
    rise = (label.shift - rest.shift) / temperature - softmax.exact_constant(rest)
    zero = jnp.zeros_like(rise)
    label_logit, rest_logit = jnp.split(student, 2, axis=-1)
    difference = jnp.where(
        label_logit >= rest_logit,
        jnp.concatenate([zero, -rise], axis=-1),
        jnp.concatenate([rise, zero], axis=-1),
    )
    missing = jnp.logical_or(label.excluded, label.silent)
    known = jnp.logical_and(jnp.abs(rise) < softmax.NEAR, jnp.logical_not(missing))
    return binary._replace(difference=jnp.where(known, difference, binary.difference))
