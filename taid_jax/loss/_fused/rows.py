"""A few tokens of the fused head: from the heads' products to losses and gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taid_jax.loss._objective import Objective
from taid_jax.loss._reduce import select_tokens, token_metrics, weighted_sum
from taid_jax.types import Head


class Problem(NamedTuple):
    """What is the same for all tokens.

    Attributes:
        objective: Gives the loss of every token.
        student: Head in the dtype of the hidden states, as wide as the teacher's.
        teacher: The same of the teacher; None when the objective needs none.
        vocab_size: Entries that count, of both.
    """

    objective: Objective
    student: Head
    teacher: Head | None
    vocab_size: int


class Wanted(NamedTuple):
    """Which gradients are formed."""

    objective: bool
    hidden: bool
    kernel: bool
    bias: bool

    @property
    def logits(self) -> bool:
        """Whether the gradient in the logits is needed on the way to another."""
        return self.hidden or self.kernel or self.bias


class Rows(NamedTuple):
    """Losses and metrics of tokens, and the gradients of their weighted sum.

    Attributes:
        losses: `(rows,)`.
        metrics: `(rows,)` each.
        objective: Gradient in the leaves of the objective; None where not wanted.
        product: `(rows, vocab)`, gradient in the student's product with its kernel, in
            the dtype of the hidden states; None where not wanted.
    """

    losses: Float[Array, " rows"]
    metrics: dict[str, Float[Array, " rows"]]
    objective: list[Array] | None
    product: Float[Array, "rows vocab"] | None


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Returns the float32 product of two matrices over one axis of each."""
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def head_product(hidden: Array, head: Head) -> Float[Array, "rows vocab"]:
    """Returns `hidden @ kernel` in float32."""
    return dot(hidden, head.kernel, 1, head.axes[0])


def logits_from_product(
    product: Float[Array, "rows vocab"], head: Head, vocab_size: int
) -> Float[Array, "rows vocab"]:
    """Returns the logits of a head, -inf where an entry does not count."""
    logits = product
    if head.bias is not None:
        logits += jnp.expand_dims(head.bias.astype(jnp.float32), 0)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if vocab_size < logits.shape[-1]:
        entry = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(entry < vocab_size, logits, -jnp.inf)
    return logits


def is_smooth(leaf: ArrayLike) -> bool:
    """Returns whether a leaf can have a gradient: whether it is no integer or bool."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split_objective(
    objective: Objective,
) -> tuple[list[Array], Callable[[Sequence[Array]], Objective]]:
    """Returns the leaves that can have a gradient, and what puts others in place."""
    leaves, tree = jax.tree.flatten(objective)

    def rebuild(values: Sequence[Array]) -> Objective:
        new = iter(values)
        return tree.unflatten(
            [next(new) if is_smooth(leaf) else leaf for leaf in leaves]
        )

    return [jnp.asarray(leaf) for leaf in leaves if is_smooth(leaf)], rebuild


def evaluate_rows(
    problem: Problem,
    product: Float[Array, "rows vocab"],
    teacher_product: Float[Array, "rows vocab"] | None,
    weight: Float[Array, " rows"],
    labels: Int[Array, " rows"] | None,
    wanted: Wanted,
    dtype: jnp.dtype,
) -> Rows:
    """Returns losses and metrics of tokens, and the gradients of their weighted sum.

    Args:
        problem: Objective and heads.
        product: The student's hidden states times its kernel, float32.
        teacher_product: The teacher's; None when the objective needs none.
        weight: Weight of every token; one of 0 contributes nothing.
        labels: Aligned with the rows; None when there are none.
        wanted: Which gradients are formed; without any, none of their work is done.
        dtype: That of the gradient in the product.
    """
    vocab_size = problem.vocab_size
    # None for an objective that asks for it: hence Any.
    teacher: Any = None
    if problem.teacher is not None and teacher_product is not None:
        teacher = logits_from_product(teacher_product, problem.teacher, vocab_size)
    leaves, rebuild = split_objective(problem.objective)

    def student_logits(product: Array) -> Array:
        return logits_from_product(product, problem.student, vocab_size)

    def total(leaves: list[Array], product: Array) -> tuple[Array, Array]:
        losses = rebuild(leaves)(student_logits(product), teacher, labels)
        losses = losses.astype(jnp.float32)
        return weighted_sum(losses, weight), losses

    in_leaves, in_product = None, None
    if wanted.objective and wanted.logits:
        _, pull, losses = jax.vjp(total, leaves, product, has_aux=True)
        in_leaves, in_product = pull(jnp.float32(1))
    elif wanted.objective:
        _, pull, losses = jax.vjp(lambda x: total(x, product), leaves, has_aux=True)
        (in_leaves,) = pull(jnp.float32(1))
    elif wanted.logits:
        _, pull, losses = jax.vjp(lambda x: total(leaves, x), product, has_aux=True)
        (in_product,) = pull(jnp.float32(1))
    else:
        _, losses = total(leaves, product)
    if in_product is not None:
        # A token of weight 0 has slope 0 times its own, which may be infinite.
        in_product = select_tokens(in_product, weight).astype(dtype)
    metrics = token_metrics(problem.objective, student_logits(product), teacher, labels)
    return Rows(losses, metrics, in_leaves, in_product)
