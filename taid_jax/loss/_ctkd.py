"""CTKD: forward KL at a temperature that is learned against the student."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import as_scalar, check_between, check_positive
from taid_jax.loss._divergences import forward
from taid_jax.loss._objective import ExactObjective, register_objective


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
    surprise = jnp.where(pair.student_masked, 0.0, jnp.log(q.total) - q.shifted)
    in_teacher = p.exp / p.total * (surprise - jnp.expand_dims(loss, -1))
    radial = jnp.sum(in_student * q.shifted + in_teacher * p.shifted, axis=-1)
    slope = temperature * (2 * loss - radial)
    moved = jnp.sum(temperature * in_student * tangents[0], axis=-1)
    return temperature**2 * loss, moved + slope * tangents[2]


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


def ctkd_temperature(raw: ArrayLike) -> Float[Array, "..."]:
    """Returns CTKD's temperature, between 1 and 21, of a number without bounds.

    That number is what an optimizer learns: `1 + 20 sigmoid(raw)`.

    Args:
        raw: Any real number, may be traced; the paper starts at 1.

    References:
        Li et al., CTKD, arXiv:2211.16231, section 3.2.

    Examples:
        >>> from taid_jax.loss import ctkd_temperature
        >>> print(f"{ctkd_temperature(0.0):.2f} {ctkd_temperature(1.0):.2f}")
        11.00 15.62
    """
    return 1 + 20 * jax.nn.sigmoid(jnp.asarray(raw, jnp.float32))


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

    Examples:
        >>> from taid_jax.loss import ctkd_strength
        >>> print(ctkd_strength(0), ctkd_strength(5), ctkd_strength(20))
        0.0 0.5 1.0
    """
    check_positive("num_epochs", num_epochs)
    progress = jnp.clip(jnp.asarray(epoch, jnp.float32) / num_epochs, 0.0, 1.0)
    return 0.5 * (1 - jnp.cos(jnp.pi * progress))


@register_objective
@dataclasses.dataclass(frozen=True)
class CTKD(ExactObjective):
    """Forward KL at a temperature T that is learned against the student.

    `T^2 * -sum softmax(u/T) log softmax(s/T)`. The gradient in T comes out reversed,
    times `strength`, so that one minimiser trains both: the student towards the
    teacher, T towards what is hardest for the student.

    Attributes:
        temperature: T, a scalar leaf that receives a gradient. `ctkd_temperature` makes
            it from the number that an optimizer may move freely.
        strength: Of the reversed gradient, in [0, 1], a leaf without gradient; see
            `ctkd_strength`.

    References:
        Li et al., Curriculum Temperature for Knowledge Distillation, arXiv:2211.16231.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import CTKD
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{CTKD(temperature=2.0)(student, teacher):.3f}")
        5.361
    """

    temperature: ArrayLike
    strength: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)
        check_between("strength", self.strength, 0, 1)

    def _losses(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Float[Array, "*tokens"]:
        temperature = _reverse_gradient(
            as_scalar("temperature", self.temperature),
            as_scalar("strength", self.strength),
        )
        return _tempered_cross_entropy(student_logits, teacher_logits, temperature)
