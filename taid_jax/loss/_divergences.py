"""Divergences between the student's and the teacher's distribution, as objectives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import check_positive
from taid_jax.loss._objective import (
    ExactObjective,
    Parts,
    bounded,
    register_objective,
)


class Divergence(ExactObjective):
    """An objective of both softmaxes at a temperature, times its square.

    Both the value and the gradient carry the factor, which keeps the size of the
    gradient about the same at every temperature (Hinton et al. 2015, section 2.1).
    """

    temperature: Any = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("temperature", self.temperature)

    def _divergence(self, pair: softmax.Pair) -> Parts:
        """Returns the divergence at temperature 1."""
        raise NotImplementedError

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        temperature = jnp.asarray(self.temperature, jnp.float32)
        value, gradient = self._divergence(
            softmax.normalise_pair(student_logits, teacher_logits, temperature)
        )
        return temperature**2 * value, lambda: temperature * gradient()


def forward(pair: softmax.Pair) -> Parts:
    """Returns the cross-entropy to the target, `-sum p log q`, and `q - p`.

    The gradient is `q * expm1(log p - log q)` where the two are close and a subtraction
    elsewhere. `log p - log q` comes from the logits' difference less the logarithm of
    `sum q exp(difference)`, which keeps all of its digits when both are small.
    """
    student, target = pair.student, pair.target
    mean = softmax.row_sum(target.exp * student.shifted) / target.total
    value = softmax.per_token(pair.mass * (jnp.log(student.total) - mean))

    def gradient() -> Float[Array, "*tokens vocab"]:
        log_ratio = pair.difference - softmax.log_mass(pair)
        q, p = student.exp / student.total, target.exp / target.total
        return -pair.mass * softmax.step(q, p, log_ratio)

    return value, gradient


def reverse(pair: softmax.Pair) -> Parts:
    """Returns `sum q (log q - log p)` over entries of finite `log p`, in its parts."""
    q, masked = pair.student, pair.teacher_masked
    masked_mass = softmax.row_sum(jnp.where(masked, q.exp, 0.0)) / q.total
    difference = jnp.where(masked, 0.0, pair.difference)
    mean = softmax.row_sum(q.exp * difference) / q.total
    value = softmax.per_token((1 - masked_mass) * pair.constant - mean)

    def gradient() -> Float[Array, "*tokens vocab"]:
        # Without masked entries this is q * (mean - difference): the constant drops out
        # before it can cost digits.
        dropped = masked_mass - jnp.where(masked, 1.0, 0.0)
        centred = (1 + pair.constant) * dropped + (mean - difference)
        return q.exp / q.total * centred

    return value, gradient


@register_objective
@dataclasses.dataclass(frozen=True)
class ForwardKL(Divergence):
    """Cross-entropy to the teacher, `-sum p log q`: KL without the teacher's entropy.

    Attributes:
        temperature: Divides both rows of logits; the loss is multiplied by its square.
            A traced leaf without gradient.

    Raises:
        TypeError: If a setting is no real number.
        ValueError: If the temperature is not positive and finite; a traced one cannot
            be looked at.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ForwardKL
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{ForwardKL()(student, teacher):.3f}")
        1.983
    """

    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        return forward(pair)


@register_objective
@dataclasses.dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(student || teacher), `sum q (log q - log p)`.

    Entries to which the teacher gives probability 0 are left out of the sum.

    Attributes:
        temperature: As in `ForwardKL`.

    References:
        Gu et al., MiniLLM, arXiv:2306.08543.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import ReverseKL
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{ReverseKL()(student, teacher):.3f}")
        1.150
    """

    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        return reverse(pair)


@register_objective
@dataclasses.dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """Forward and reverse KL, weighted by how head and tail of the teacher differ.

    The head is the most probable teacher entries that hold `head_threshold` of its
    mass. Forward KL weighs the head's share of `sum |p - q|`, reverse KL the tail's;
    the weights carry no gradient.

    Attributes:
        head_threshold: Mass of the head, in (0, 1]; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for
        Large Language Models, arXiv:2404.02657.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import AdaptiveKL
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{AdaptiveKL(head_threshold=0.5)(student, teacher):.3f}")
        1.567
    """

    head_threshold: float | int = bounded(1e-6, 1, default=0.5)
    temperature: ArrayLike = 1.0

    def _divergence(self, pair: softmax.Pair) -> Parts:
        head = _head_entries(pair.teacher, self.head_threshold)
        difference = jnp.abs(softmax.probability_difference(pair))
        in_head = softmax.row_sum(jnp.where(head, difference, 0.0))
        both = in_head + softmax.row_sum(jnp.where(head, 0.0, difference))
        # Equal distributions: half and half, and no gradient either way.
        weight = jnp.where(both == 0, 0.5, in_head / jnp.where(both == 0, 1.0, both))
        (forward_value, forward_gradient) = forward(pair)
        (reverse_value, reverse_gradient) = reverse(pair)
        column = softmax.per_token(weight)
        value = column * forward_value + (1 - column) * reverse_value

        def gradient() -> Float[Array, "*tokens vocab"]:
            return weight * forward_gradient() + (1 - weight) * reverse_gradient()

        return value, gradient


def _head_entries(
    teacher: softmax.Row, threshold: float | int
) -> Bool[Array, "*tokens vocab"]:
    """Returns the most probable entries that together hold `threshold` of the mass.

    The smallest such set; entries as probable as its last one belong to it, so that it
    does not depend on the order of the vocabulary. The least probability in it is found
    by bisection: thirty sums over the vocabulary take less than sorting it, and stay
    sums when it is sharded.
    """
    # Floats that are not negative have the order of their bits.
    bits = jax.lax.bitcast_convert_type(teacher.exp, jnp.int32)
    needed = threshold * teacher.total
    one = jax.lax.bitcast_convert_type(jnp.float32(1), jnp.int32)
    low = jnp.zeros_like(needed, jnp.int32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        held = softmax.row_sum(jnp.where(bits >= middle, teacher.exp, 0.0))
        enough = held >= needed
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # The bits of numbers in [0, 1] are below 2**30: thirty halvings leave one.
    low, _ = jax.lax.fori_loop(0, 30, halve, (low, low + one + 1))
    return bits >= low


@register_objective
@dataclasses.dataclass(frozen=True)
class TotalVariation(Divergence):
    """Total variation distance, `0.5 sum |p - q|`.

    References:
        Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation,
        arXiv:2307.15190.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TotalVariation
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 2.0])
        >>> print(f"{TotalVariation()(student, teacher):.3f}")
        0.575
    """

    def _divergence(self, pair: softmax.Pair) -> Parts:
        difference = softmax.probability_difference(pair)
        value = 0.5 * softmax.row_sum(jnp.abs(difference))

        def gradient() -> Float[Array, "*tokens vocab"]:
            # q (sign - sum q sign) / 2, with the mass on the other side of each entry
            # in place of a difference that cancels when one side has nearly all of it.
            q = pair.student.exp / pair.student.total
            above = ~(difference > 0)
            mass_above = softmax.row_sum(jnp.where(above, q, 0.0))
            mass_below = softmax.row_sum(jnp.where(above, 0.0, q))
            # NaN is on neither side; the value has it, and the gradient is to have it.
            whole = jnp.where(jnp.isnan(value), value, mass_below)
            return q * jnp.where(above, whole, -mass_above)

        return softmax.per_token(value), gradient
