"""Two objectives in one batch: one for the teacher's texts, one for the student's."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Float32, Int, Shaped

from taid_jax.errors import show
from taid_jax.loss._checks import as_scalar, check_between
from taid_jax.loss._objective import Objective, register_objective

Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]]]


@register_objective
@dataclasses.dataclass(frozen=True)
class ByText:
    """An objective for the texts of the teacher, and another for the student's own.

    The loss of a text is the mean over its tokens that count, with the weight `2 -
    student_weight` if it is the teacher's and `student_weight` if it is the student's;
    that of a batch is the mean over its texts. With the skew KLs this is DistiLLM-2's.

    Rows of logits do not say who wrote them, so it is no `Objective`: `sums` goes over
    a batch twice, each time with the tokens of one kind. In the fused head the others
    cost nothing.

    Attributes:
        teacher_texts: Of the teacher's texts.
        student_texts: Of the student's.
        student_weight: From 0 to 2, scalar, a traced leaf without gradient; see
            `distillm2_weight`.

    Raises:
        TypeError: If the weight is no real number.
        ValueError: If it is out of its range; a traced one cannot be looked at.

    References:
        Ko et al., DistiLLM-2, ICML 2025 (arXiv:2503.07067).

    Examples:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ByText, SkewForwardKL, SkewReverseKL
        >>> from taid_jax.loss import distillation_sums
        >>> student, teacher = jnp.zeros((2, 3, 4)), jnp.eye(3, 4)[None].repeat(2, 0)
        >>> counted = jnp.array([[True, True, True], [True, True, False]])
        >>> from_student = jnp.array([[False] * 3, [True] * 3])
        >>> def over(objective, weights):
        ...     return distillation_sums(objective, student, teacher, weights)
        >>> objective = ByText(SkewForwardKL(), SkewReverseKL(), student_weight=1.5)
        >>> total, sums = objective.sums(over, counted, from_student)
        >>> print(f"{total:.3f}", sums["num_tokens"], sums["tokens"])
        0.813 2.0 5.0
    """

    teacher_texts: Objective
    student_texts: Objective
    student_weight: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_between("student_weight", self.student_weight, 0, 2)

    def sums(
        self,
        over: Callable[[Objective, Float32[Array, "batch length"]], Sums],
        counted: Shaped[Array, "batch length"],
        from_student: Shaped[Array, "..."],
        segment_ids: Int[Array, "..."] | None = None,
    ) -> Sums:
        """Returns the weighted sum over the texts, in nats, and the sums of metrics.

        Args:
            over: `distillation_sums` or `fused_loss`, of the objective and the mask
                that it is given.
            counted: Which tokens count, bool.
            from_student: Who wrote the text of each token, bool, same shape.
            segment_ids: Which text of its row a token belongs to, at most as many as
                the row has tokens; None where a row is one text.

        Returns:
            The sum, scalar float32, and a dict without gradient: `num_tokens`, by which
            sums become means, is the number of texts; `tokens` those that count;
            `teacher_texts_loss` and `student_texts_loss` what each kind adds to the
            sum; `student_weight`; and the metrics of both objectives, to which each
            text adds its mean.

        Raises:
            TypeError: If an array is of the wrong kind of numbers.
            ValueError: If the shapes do not match.
        """
        arrays = {"counted": counted, "from_student": from_student}
        for name, array in arrays.items():
            if not isinstance(array, Array) or array.dtype != bool:
                raise TypeError(f"need an array of bools for {name}, got {show(array)}")
        shapes = [array.shape for array in arrays.values()]
        shapes += [] if segment_ids is None else [segment_ids.shape]
        if counted.ndim != 2 or len({*shapes}) > 1:
            raise ValueError(f"need arrays of one shape (batch, length), got {shapes}")
        weights = _text_weights(counted, segment_ids)
        share = jax.lax.stop_gradient(as_scalar("student_weight", self.student_weight))
        total = jnp.float32(0)
        found: dict[str, Array] = {"tokens": jnp.sum(counted, dtype=jnp.float32)}
        for name, objective, own, weight in (
            ("teacher", self.teacher_texts, ~from_student, 2 - share),
            ("student", self.student_texts, from_student, share),
        ):
            part, sums = over(objective, jnp.where(own, weights, 0.0))
            total += weight * part
            found[f"{name}_texts_loss"] = weight * part
            for key, value in sums.items():
                found[key] = found[key] + value if key in found else value
        found["student_weight"] = share * found["num_tokens"]
        return total, jax.lax.stop_gradient(found)


def _text_weights(
    counted: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"] | None,
) -> Float32[Array, "batch length"]:
    """Returns 1 / (counted tokens of its text) of every token that counts, else 0."""
    number = counted.astype(jnp.int32)
    if segment_ids is None:
        sizes = jnp.sum(number, axis=-1, keepdims=True)
    else:

        def sizes_of(segments: Array, number: Array) -> Array:
            size = jnp.zeros(segments.size + 1, jnp.int32).at[segments].add(number)
            return size[segments]

        sizes = jax.vmap(sizes_of)(segment_ids, number)
    shares = 1.0 / jnp.maximum(sizes, 1).astype(jnp.float32)
    return jnp.where(counted, shares, 0.0)
