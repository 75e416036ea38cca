"""TAID: cross-entropy of the student to a teacher interpolated from the student."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Real, Shaped

from taid_jax.loss import _one_pass as one_pass
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import as_scalar, check_between
from taid_jax.loss._divergences import forward
from taid_jax.loss._objective import ExactObjective, Parts, register_objective
from taid_jax.loss._reduce import distillation_loss


class Interpolated(ExactObjective):
    """Cross-entropy to a distribution between the student's and the teacher's.

    It carries no gradient. The metrics are `kl_teacher` and `kl_target`, KL(target ||
    student).
    """

    t: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("t", self.t, 0, 1)

    def _interpolate(self, pair: softmax.Pair, t: Array) -> softmax.Pair:
        """Returns the pair of the student and what lies between; t is float32."""
        raise NotImplementedError

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Array, labels: Array | None
    ) -> Parts:
        pair = softmax.normalise_pair(student_logits, teacher_logits)
        return forward(self._interpolate(pair, jnp.asarray(self.t)))

    def _metrics(
        self, student_logits: Array, teacher_logits: Array
    ) -> dict[str, Float[Array, "*tokens"]]:
        pair = softmax.normalise_pair(student_logits, teacher_logits)
        target = self._interpolate(pair, as_scalar("t", self.t))
        return {"kl_teacher": softmax.kl(pair), "kl_target": softmax.kl(target)}


def interpolate(pair: softmax.Pair, t: Array) -> softmax.Pair:
    """Returns the pair of the student and the interpolated teacher."""
    # Mixed after each is shifted to its largest, where the entries that matter are
    # small numbers: a float32 of 100 has an error of 4e-6, as much as its probability.
    mixture = (1 - t) * pair.student.shifted + t * pair.teacher.shifted
    mixture = jnp.where(pair.student_masked, softmax.FLOOR, mixture)
    return with_target(pair, mixture, t * pair.difference, t * pair.offset)


def with_target(
    pair: softmax.Pair, mixture: Array, difference: Array, offset: Array
) -> softmax.Pair:
    """Returns the pair of the student and the softmax of a mixture.

    Args:
        pair: The student and the teacher.
        mixture: Logits less their largest, -inf where the student has it.
        difference: See `Pair.difference`.
        offset: That of a mixture whose largest logit is 0; see `softmax.log_mass`.
    """
    top = softmax.filled(softmax.row_max(mixture))
    target = softmax.normalise(mixture, top=top)
    offset = target.top + offset
    return pair._replace(
        teacher=target,
        target=target,
        mass=jnp.ones_like(pair.mass),
        difference=difference,
        constant=offset + jnp.log(target.total / pair.student.total),
        offset=offset,
    )


def _plain_values(
    student_logits: Array, teacher_logits: Array, t: Array
) -> tuple[Array, Array, Array]:
    pair = softmax.normalise_pair(student_logits, teacher_logits)
    target = interpolate(pair, t)
    return forward(target)[0], softmax.kl(pair), softmax.kl(target)


def _plain_gradient(student_logits: Array, teacher_logits: Array, t: Array) -> Array:
    pair = softmax.normalise_pair(student_logits, teacher_logits)
    return forward(interpolate(pair, t))[1]()


def _with_derivative(function: Callable, plain: Callable) -> Callable:
    """Returns a function with the derivative of another, equal one."""
    result = jax.custom_jvp(function)

    @result.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        return result(*primals), jax.jvp(plain, primals, tangents)[1]

    return result


_values = _with_derivative(one_pass.taid_values, _plain_values)
_gradient = _with_derivative(one_pass.taid_gradient, _plain_gradient)


@register_objective
@dataclasses.dataclass(frozen=True)
class TAID(Interpolated):
    """Cross-entropy to the interpolated teacher, in nats per token.

    The target is `softmax((1 - t) * student + t * teacher)` and carries no gradient.
    The gradient in the student's logits, `q - p_t`, is formed without subtracting two
    softmaxes that nearly agree, so it is exact also at small t and for a teacher close
    to the student.

    Attributes:
        t: Interpolation in [0, 1], scalar, a traced leaf without gradient; 0 is the
            student, 1 the teacher.

    Its metrics are `kl_teacher` and `kl_target`, KL(p_t || student), which is 0 at
    t = 0.

    Raises:
        TypeError: If `t` is no real number.
        ValueError: If `t` is outside [0, 1] or NaN; a traced one cannot be looked at.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TAID
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{TAID(t=0.5)(student, teacher):.3f}")
        1.408
        >>> print([f"{g:.3f}" for g in jax.grad(TAID(t=0.5))(student, teacher)])
        ['0.332', '-0.089', '-0.243']
    """

    t: ArrayLike

    def _interpolate(self, pair: softmax.Pair, t: Array) -> softmax.Pair:
        return interpolate(pair, t)

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Array, labels: Array | None
    ) -> Parts:
        if not one_pass.is_wanted():
            return super()._value_and_gradient(student_logits, teacher_logits, labels)
        rows = student_logits, teacher_logits, jnp.asarray(self.t)
        return _values(*rows)[0], lambda: _gradient(*rows)

    def _metrics(
        self, student_logits: Array, teacher_logits: Array
    ) -> dict[str, Float[Array, "*tokens"]]:
        if not one_pass.is_wanted():
            return super()._metrics(student_logits, teacher_logits)
        t = as_scalar("t", self.t)
        _, kl_teacher, kl_target = _values(student_logits, teacher_logits, t)
        return {"kl_teacher": kl_teacher, "kl_target": kl_target}


def taid_loss(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "..."],
    mask: Shaped[Array, "..."] | None = None,
    *,
    t: Real[ArrayLike, ""],
) -> Float[Array, ""]:
    """Returns the mean cross-entropy to the interpolated teacher, in nats per token.

    Args:
        student_logits: Unnormalised log-probabilities, `(*tokens, vocab)`, any float
            dtype.
        teacher_logits: Same shape; receives no gradient.
        mask: `(*tokens,)`, bool or number; a token counts by its weight. All count when
            None.
        t: Interpolation in [0, 1], scalar, traced; 0 is the student, 1 the teacher.

    Returns:
        Scalar float32; 0 when no token counts.

    Raises:
        ValueError: If the shapes do not match, or `t` is outside [0, 1] and not traced.
        TypeError: If an argument is of the wrong kind.

    References:
        Shing et al., TAID, ICLR 2025 (arXiv:2501.16937), section 3.1.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import taid_loss
        >>> student = jnp.array([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
        >>> teacher = jnp.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
        >>> mask = jnp.array([True, False])
        >>> print(f"{taid_loss(student, teacher, mask, t=0.5):.3f}")
        1.408
    """
    return distillation_loss(TAID(t), student_logits, teacher_logits, mask)
