"""From the losses of tokens to the loss of a batch: weighted sums and means."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Shaped

from taid_jax.loss._checks import check_shapes
from taid_jax.loss._objective import Objective
from taid_jax.types import IGNORE_INDEX


def select_tokens(
    array: Shaped[Array, "..."], mask: Shaped[Array, "*tokens"]
) -> Shaped[Array, "..."]:
    """Returns `array` with 0 in place of every token that does not count.

    A selection, not a product: what a masked token holds, NaN and inf included, reaches
    neither the value nor the gradient. Logits go through it before the objective and
    losses after it; one of the two alone would still let NaN through the gradient.

    Args:
        array: `(*tokens, ...)`, logits or losses.
        mask: `(*tokens,)`, bool or number.
    """
    counted = mask.astype(bool)
    counted = counted.reshape(counted.shape + (1,) * (array.ndim - mask.ndim))
    return jnp.where(
        jnp.broadcast_to(counted, array.shape), array, jnp.zeros((), array.dtype)
    )


def token_weights(
    mask: Shaped[Array, "*tokens"] | None,
    tokens: tuple[int, ...],
    labels: Int[Array, "*tokens"] | None = None,
) -> Float[Array, "*tokens"]:
    """Returns the weight of every token as float32; 1 everywhere without a mask.

    A token whose label is `IGNORE_INDEX` has weight 0, whatever the mask says.
    """
    weights = jnp.ones(tokens, jnp.float32)
    if mask is not None:
        weights = mask.astype(jnp.float32)
    if labels is not None:
        weights = jnp.where(labels == IGNORE_INDEX, 0.0, weights)
    return weights


def weighted_sum(
    values: Float[Array, "*tokens"], weights: Float[Array, "*tokens"]
) -> Float[Array, ""]:
    """Returns the float32 sum of `values * weights` over tokens of non-zero weight."""
    return jnp.sum(select_tokens(values.astype(jnp.float32), weights) * weights)


def weighted_mean(
    total: Float[Array, ""], num_tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns `total / num_tokens`, and 0 with gradient 0 when no token counts."""
    return total / jnp.where(num_tokens == 0, jnp.ones_like(num_tokens), num_tokens)


def token_metrics(
    objective: Objective,
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "..."] | None,
    labels: Int[Array, "..."] | None = None,
) -> dict[str, Float[Array, "..."]]:
    """Returns the metrics of an objective, `(*tokens,)` each; none if it names none."""
    metrics = getattr(objective, "metrics", None)
    if metrics is None:
        return {}
    return metrics(
        jax.lax.stop_gradient(student_logits),
        jax.lax.stop_gradient(teacher_logits),
        labels,
    )


def distillation_sums(
    objective: Objective,
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "..."] | None,
    mask: Shaped[Array, "..."] | None = None,
    labels: Int[Array, "..."] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the weighted sum of an objective over tokens, in nats, and its metrics'.

    Sums can be added over micro-batches, devices and hosts before the one division.

    Args:
        objective: Gives the loss of every token.
        student_logits: `(*tokens, vocab)`, any float dtype.
        teacher_logits: Same shape; receives no gradient. None only for an objective
            that needs no teacher.
        mask: `(*tokens,)`, bool or number; a token counts by its weight. All count when
            None.
        labels: `(*tokens,)`, aligned with the logits, for objectives that need them. A
            token whose label is `IGNORE_INDEX` does not count, whatever the objective;
            any other that is outside the vocabulary makes the loss NaN where labels are
            needed.

    Returns:
        The sum, scalar float32, and a dict without gradient: `num_tokens`, the
        sum of the mask, and the weighted sum of each metric of the objective.

    Raises:
        TypeError: If an argument is no array, or of the wrong kind of numbers.
        ValueError: If the shapes do not match, or labels are needed and missing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TAID, distillation_sums
        >>> student, teacher = jnp.zeros((2, 4)), jnp.eye(2, 4)
        >>> total, sums = distillation_sums(TAID(0.5), student, teacher)
        >>> print(f"{total:.3f}", sorted(sums))
        2.773 ['kl_target', 'kl_teacher', 'num_tokens']
    """
    needs_teacher = getattr(objective, "needs_teacher", True)
    check_shapes(
        student_logits, teacher_logits, labels, mask, needs_teacher=needs_teacher
    )
    if not needs_teacher:
        teacher_logits = None
    weights = token_weights(mask, student_logits.shape[:-1], labels)
    if mask is not None or labels is not None:
        student_logits = select_tokens(student_logits, weights)
        if teacher_logits is not None:
            teacher_logits = select_tokens(teacher_logits, weights)
    teacher: Any = teacher_logits
    loss_sum = weighted_sum(objective(student_logits, teacher, labels), weights)
    sums = {"num_tokens": jnp.sum(weights)}
    for name, values in token_metrics(
        objective, student_logits, teacher_logits, labels
    ).items():
        sums[name] = weighted_sum(values, weights)
    return loss_sum, jax.lax.stop_gradient(sums)


def distillation_loss(
    objective: Objective,
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "..."] | None,
    mask: Shaped[Array, "..."] | None = None,
    labels: Int[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Returns the mean of an objective over counted tokens, in nats.

    Args:
        objective: Gives the loss of every token.
        student_logits: `(*tokens, vocab)`, any float dtype.
        teacher_logits: Same shape; receives no gradient. None only for an objective
            that needs no teacher.
        mask: `(*tokens,)`, bool or number; a token counts by its weight. All count when
            None.
        labels: `(*tokens,)`, aligned with the logits, for objectives that need them. A
            token whose label is `IGNORE_INDEX` does not count, whatever the objective;
            any other that is outside the vocabulary makes the loss NaN where labels are
            needed.

    Returns:
        Scalar float32; 0 when no token counts.

    Raises:
        TypeError: If an argument is no array, or of the wrong kind of numbers.
        ValueError: If the shapes do not match, or labels are needed and missing.

    Examples:
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import CrossEntropy, distillation_loss
        >>> student, labels = jnp.zeros((2, 4)), jnp.array([3, -100])
        >>> loss = distillation_loss(CrossEntropy(), student, None, labels=labels)
        >>> print(f"{loss:.3f}")
        1.386
    """
    loss_sum, sums = distillation_sums(
        objective, student_logits, teacher_logits, mask, labels
    )
    return weighted_mean(loss_sum, sums["num_tokens"])
