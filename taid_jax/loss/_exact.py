"""How an objective attaches its own gradient to its value."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax

Gradient = Callable[[], Float[Array, "*tokens vocab"]]
"""Forms the gradient in the student's logits when, and only when, it is asked for."""

Parts = tuple[Float[Array, "*tokens"], Gradient]
"""The loss of every token and the gradient of each in its own logits."""

Rule = Callable[..., Parts]
"""`(student_logits, *others) -> Parts`; the others, arrays, are not differentiated."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def exact(
    rule: Rule,
    student_logits: Float[Array, "*tokens vocab"],
    *others: Array,
) -> Float[Array, "*tokens"]:
    """Returns the value of a rule; its derivative is the rule's own gradient.

    Value and gradient come out of one call of the rule and share their exponentials.
    Only the student's logits are differentiated: the derivative in the other arguments
    is exactly zero. Works in forward and reverse mode and to higher order.

    Args:
        rule: A function of arrays that closes over none.
        student_logits: `(*tokens, vocab)`.
        *others: What else the rule takes: teacher's logits, a temperature, labels.
    """
    value, _ = rule(student_logits, *others)
    return value


@exact.defjvp
def _exact_jvp(
    rule: Rule, primals: tuple[Array, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    # Integers among the arguments have tangents of a private type: hence Any.
    value, gradient = rule(*primals)
    return value, jnp.sum(gradient() * tangents[0], axis=-1)


def tempered(
    parts: Callable[[softmax.Pair], Parts],
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    temperature: Float[Array, ""],
) -> Parts:
    """Returns the parts at a temperature, times its square.

    Both the value and the gradient carry the factor, which keeps the size of the
    gradient about the same at every temperature (Hinton et al. 2015, section 2.1).
    """
    value, gradient = parts(
        softmax.normalise_pair(student_logits, teacher_logits, temperature)
    )
    return temperature**2 * value, lambda: temperature * gradient()
