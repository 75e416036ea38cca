"""Divergences between the student's and the teacher's distribution, as objectives."""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taid_jax.loss import _adaptive as adaptive
from taid_jax.loss import _cross_entropy as cross_entropy
from taid_jax.loss import _mixtures as mixtures
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._exact import Parts, exact, tempered
from taid_jax.loss._objective import (
    STATIC,
    as_scalar,
    check_positive,
    check_shapes,
    check_static,
    register_objective,
)


class _Divergence:
    """What the divergences share: parts at a temperature, and KL beside them."""

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        """Returns the divergence at temperature 1; must not hold a leaf."""
        raise NotImplementedError

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(student_logits, teacher_logits, labels)
        return exact(
            functools.partial(tempered, self._parts()),
            student_logits.astype(jnp.float32),
            teacher_logits.astype(jnp.float32),
            as_scalar("temperature", getattr(self, "temperature", 1.0)),
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
class ForwardKL(_Divergence):
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
    """

    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return cross_entropy.forward


@register_objective
@dataclasses.dataclass(frozen=True)
class ReverseKL(_Divergence):
    """KL(student || teacher), `sum q (log q - log p)`.

    Entries to which the teacher gives probability 0 are left out of the sum.

    Attributes:
        temperature: As in `ForwardKL`.

    References:
        Gu et al., MiniLLM, arXiv:2306.08543.
    """

    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return cross_entropy.reverse


@register_objective
@dataclasses.dataclass(frozen=True)
class JensenShannon(_Divergence):
    """`w KL(p, m) + (1 - w) KL(q, m)` for the mixture `m = w p + (1 - w) q`.

    Attributes:
        teacher_weight: w, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Agarwal et al., GKD, arXiv:2306.13649.
    """

    teacher_weight: float | int = dataclasses.field(default=0.1, metadata=STATIC)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_static("teacher_weight", self.teacher_weight, 1e-6, 1 - 1e-6)
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return functools.partial(
            mixtures.jensen_shannon, teacher_weight=self.teacher_weight
        )


@register_objective
@dataclasses.dataclass(frozen=True)
class SkewForwardKL(_Divergence):
    """`-sum p log m` for `m = w p + (1 - w) q`, without the teacher's entropy.

    Attributes:
        teacher_weight: w, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Ko et al., DistiLLM, arXiv:2402.03898.
    """

    teacher_weight: float | int = dataclasses.field(default=0.1, metadata=STATIC)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_static("teacher_weight", self.teacher_weight, 1e-6, 1 - 1e-6)
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return functools.partial(
            mixtures.skew_forward, teacher_weight=self.teacher_weight
        )


@register_objective
@dataclasses.dataclass(frozen=True)
class SkewReverseKL(_Divergence):
    """`sum q (log q - log m)` for `m = (1 - w) p + w q`.

    Attributes:
        teacher_weight: w, strictly between 0 and 1; static.
        temperature: As in `ForwardKL`.

    Raises:
        ValueError: If a setting is out of its range.

    References:
        Ko et al., DistiLLM, arXiv:2402.03898.
    """

    teacher_weight: float | int = dataclasses.field(default=0.1, metadata=STATIC)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_static("teacher_weight", self.teacher_weight, 1e-6, 1 - 1e-6)
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return functools.partial(
            mixtures.skew_reverse, teacher_weight=self.teacher_weight
        )


@register_objective
@dataclasses.dataclass(frozen=True)
class AdaptiveKL(_Divergence):
    """Forward and reverse KL, weighted by the gap in the teacher's head and tail.

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
    """

    head_threshold: float | int = dataclasses.field(default=0.5, metadata=STATIC)
    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_static("head_threshold", self.head_threshold, 1e-6, 1)
        check_positive("temperature", self.temperature)

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return functools.partial(adaptive.adaptive, head_threshold=self.head_threshold)


@register_objective
@dataclasses.dataclass(frozen=True)
class TotalVariation(_Divergence):
    """Total variation distance, `0.5 sum |p - q|`.

    References:
        Wen et al., f-Divergence Minimization for Sequence-Level Knowledge Distillation,
        arXiv:2307.15190.
    """

    def _parts(self) -> Callable[[softmax.Pair], Parts]:
        return _total_variation


def _total_variation(pair: softmax.Pair) -> Parts:
    change = softmax.change(pair)
    value = 0.5 * softmax.row_sum(jnp.abs(change))

    def gradient() -> Float[Array, "*tokens vocab"]:
        # q (sign - sum q sign) / 2, with the mass on the other side of each entry in
        # place of a difference that cancels when one side has nearly all of it.
        q = pair.student.exp / pair.student.total
        above = ~(change > 0)
        mass_above = softmax.row_sum(jnp.where(above, q, 0.0))
        mass_below = softmax.row_sum(jnp.where(above, 0.0, q))
        # NaN is on neither side; the value has it, and the gradient is to have it too.
        whole = jnp.where(jnp.isnan(value), value, mass_below)
        return q * jnp.where(above, whole, -mass_above)

    return softmax.per_token(value), gradient
