"""DistiLLM-2: two completions of a prompt, and another skew KL for each of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from taid_jax.errors import show
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import (
    as_scalar,
    check_between,
    check_positive,
    check_shapes,
    check_static,
    need_labels,
)
from taid_jax.loss._mix import CrossEntropy
from taid_jax.loss._mixtures import skew_forward, skew_reverse
from taid_jax.loss._objective import STATIC, ExactObjective, Parts, register_objective
from taid_jax.loss._reduce import select_tokens
from taid_jax.types import IGNORE_INDEX

LEAST_SKEW = 0.01
"""By ports of the authors' code, which also add `_MARGIN` to what they divide by."""

_MARGIN = 1e-5


def distillm2_weight(step: ArrayLike, num_steps: float | int) -> Float[Array, "..."]:
    """Returns the weight of the student's texts, rising from 1 to 1.5.

    It has risen after half of the steps: teach from the teacher's texts first, correct
    the student's later.

    Args:
        step: Steps trained so far, may be traced.
        num_steps: Steps in all; positive.

    Raises:
        ValueError: If `num_steps` is not positive and finite.

    References:
        Ko et al., DistiLLM-2, ICML 2025 (arXiv:2503.07067).

    Examples:
        >>> from taid_jax.loss import distillm2_weight
        >>> print(*(distillm2_weight(step, 100) for step in (0, 25, 50, 100)))
        1.0 1.25 1.5 1.5
    """
    check_positive("num_steps", num_steps)
    progress = jnp.asarray(step, jnp.float32) / num_steps
    return 1 + 0.5 * jnp.clip(2 * progress, 0.0, 1.0)


@register_objective
@dataclasses.dataclass(frozen=True)
class _Skewed(ExactObjective):
    """Skew forward KL, or skew reverse KL where the student wrote the text.

    Attributes:
        skew: `(*tokens, 1)`.
        from_student: `(*tokens, 1)`.
    """

    skew: Float[Array, "*tokens 1"]
    from_student: Bool[Array, "*tokens 1"]

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        pair = softmax.normalise_pair(student_logits, teacher_logits)
        forward, in_forward = skew_forward(pair, self.skew)
        reverse, in_reverse = skew_reverse(pair, self.skew)

        def gradient() -> Float[Array, "*tokens vocab"]:
            return jnp.where(self.from_student, in_reverse(), in_forward())

        own = jnp.squeeze(self.from_student, -1)
        return jnp.where(own, reverse, forward), gradient


@register_objective
@dataclasses.dataclass(frozen=True)
class SequenceWeighted:
    """DistiLLM-2's loss of teacher's and student's completions in one batch.

    A text of the teacher is taught by `SkewForwardKL`, one of the student by
    `SkewReverseKL`, each as the mean over its tokens, with the weights `2 -
    student_weight` and `student_weight`. It needs whole sequences, so it is a loss of
    logits and no `Objective`: the fused head does not take it. With one skew for all
    texts `ByText` is the same loss in the fused head, which the trainer uses.

    Where a margin is given, each sequence has a skew of its own: with p and q the
    geometric means of the probabilities that teacher and student give to its tokens,

        1 - (1 - skew) teacher_margin / (p - q + 1e-5),   from 0.01 to skew

    and the same of `student_margin` and `q - p` for a text of the student.

    Attributes:
        student_weight: From 0 to 2, scalar, a traced leaf without gradient; see
            `distillm2_weight`.
        skew: As in the skew KLs, from 0.01 to 0.99: of all sequences, or their largest;
            static.
        teacher_margin: The mean of `margins` over the teacher's texts before training,
            a scalar leaf without gradient. None: the skew is `skew`.
        student_margin: The same of the student's texts.

    Raises:
        TypeError: If a setting is no real number.
        ValueError: If one is out of its range; traced ones cannot be looked at.

    References:
        Ko et al., DistiLLM-2, ICML 2025 (arXiv:2503.07067).

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import SequenceWeighted
        >>> student, teacher = jnp.zeros((2, 3, 4)), jnp.eye(3, 4)[None].repeat(2, 0)
        >>> labels = jnp.array([[0, 1, 2], [0, 1, -100]])
        >>> from_student = jnp.array([False, True])
        >>> loss = SequenceWeighted(student_weight=1.5)
        >>> losses = loss(student, teacher, labels, from_student)
        >>> print([f"{x:.3f}" for x in losses])
        ['0.681', '0.132']
    """

    student_weight: ArrayLike = 1.0
    skew: float | int = dataclasses.field(default=0.1, metadata=STATIC)
    teacher_margin: ArrayLike | None = None
    student_margin: ArrayLike | None = None

    def __post_init__(self) -> None:
        check_between("student_weight", self.student_weight, 0, 2)
        check_static("skew", self.skew, LEAST_SKEW, 1 - LEAST_SKEW)
        for name in ("teacher_margin", "student_margin"):
            if getattr(self, name) is not None:
                check_between(name, getattr(self, name), -1, 1)

    def __call__(
        self,
        student_logits: Float[Array, "batch length vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."],
        from_student: Bool[Array, "..."],
    ) -> Float[Array, " batch"]:
        """Returns the weighted loss of every sequence, float32; 0 without a token.

        Args:
            student_logits: Any float dtype; the gradient flows here.
            teacher_logits: Same shape; receives no gradient.
            labels: Aligned with the logits; `IGNORE_INDEX` where a token does not
                count, as in the prompt.
            from_student: Who wrote each text.

        Raises:
            TypeError: If an argument is no array, or of the wrong kind of numbers.
            ValueError: If the shapes do not match.
        """
        rows = _checked(student_logits, teacher_logits, labels, from_student)
        student, teacher, labels = rows
        skew = jnp.full(from_student.shape, self.skew, jnp.float32)
        for name, own in (("teacher_margin", False), ("student_margin", True)):
            if getattr(self, name) is not None:
                margin = as_scalar(name, getattr(self, name))
                found = _margins(*rows, from_student) + _MARGIN
                fitted = jnp.clip(
                    1 - (1 - self.skew) * margin / found, LEAST_SKEW, self.skew
                )
                skew = jnp.where(from_student == own, fitted, skew)
        losses = _Skewed(
            *(jnp.reshape(x, (-1, 1, 1)) for x in (skew, from_student))
        )._losses(student, teacher, None)
        weight = as_scalar("student_weight", self.student_weight)
        weight = jnp.where(from_student, weight, 2 - weight)
        return weight * _mean(losses, labels)

    def margins(
        self,
        student_logits: Float[Array, "batch length vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."],
        from_student: Bool[Array, "..."],
    ) -> Float[Array, " batch"]:
        """Returns `p - q` of every text of the teacher, `q - p` of the student's.

        Their means before training are `teacher_margin` and `student_margin`. Arguments
        and errors are those of a call; there is no gradient.
        """
        rows = _checked(student_logits, teacher_logits, labels, from_student)
        return _margins(*rows, from_student)


def _checked(
    student_logits: Array, teacher_logits: Array, labels: Array, from_student: Array
) -> tuple[Array, Array, Array]:
    """Returns float32 logits, 0 where no token counts, and int32 labels."""
    labels = need_labels("SequenceWeighted", student_logits, labels)
    check_shapes(student_logits, teacher_logits, labels)
    if not isinstance(from_student, Array) or from_student.dtype != bool:
        raise TypeError(
            f"need an array of bools for from_student, got {show(from_student)}"
        )
    if student_logits.ndim != 3 or from_student.shape != student_logits.shape[:1]:
        raise ValueError(
            "need logits of shape (batch, length, vocab) and from_student of shape "
            f"(batch,), got {student_logits.shape} and {from_student.shape}"
        )
    counted = labels != IGNORE_INDEX
    student, teacher = (
        select_tokens(x.astype(jnp.float32), counted)
        for x in (student_logits, teacher_logits)
    )
    return student, jax.lax.stop_gradient(teacher), labels


def _mean(
    values: Float[Array, "batch length"], labels: Int[Array, "batch length"]
) -> Float[Array, " batch"]:
    """Returns the mean over the tokens of every sequence that count."""
    counted = labels != IGNORE_INDEX
    total = jnp.sum(select_tokens(values, counted), axis=-1)
    return total / jnp.maximum(jnp.sum(counted, axis=-1, dtype=jnp.float32), 1.0)


def _margins(
    student: Array, teacher: Array, labels: Array, from_student: Array
) -> Float[Array, " batch"]:
    student = jax.lax.stop_gradient(student)
    q, p = (
        jnp.exp(-_mean(CrossEntropy()(x, None, labels), labels))
        for x in (student, teacher)
    )
    return jnp.where(from_student, q - p, p - q)
