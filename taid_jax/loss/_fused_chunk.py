"""One chunk of the fused head: its products, its losses, its part of every gradient."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from taid_jax.loss._fused_mesh import Gradients, Outcome, Partition, spread_vocabulary
from taid_jax.loss._objective import Objective
from taid_jax.loss._one_pass import one_pass
from taid_jax.loss._reduce import select_tokens, token_metrics, weighted_sum
from taid_jax.loss._teachers import TeacherRows, TeachersHead
from taid_jax.loss._topk import TopKHead
from taid_jax.types import Head


class Static(NamedTuple):
    """What is known before tracing.

    Attributes:
        vocab_size: Entries that count.
        chunk_size: Tokens of a chunk; chosen when None.
        partition: How the work lies on a mesh; None on one device.
        platform: "cpu", "gpu" or "tpu".
        one_pass: Whether an objective should read its rows once for all of its sums.
        metrics: Names of the objective's.
    """

    vocab_size: int
    chunk_size: int | None
    partition: Partition | None
    platform: str
    one_pass: bool
    metrics: tuple[str, ...]


class Tokens(NamedTuple):
    """What comes with every token: hidden states of the student and of the teachers."""

    student: Shaped[Array, "tokens d_model"]
    teacher: TeacherRows
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


class Products(NamedTuple):
    """The same tokens after the products with the heads."""

    student: Float[Array, "tokens vocab"]
    teacher: TeacherRows
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


class Problem(NamedTuple):
    """What is the same for all chunks.

    Attributes:
        objective: Gives the loss of every token.
        student: Head in the dtype of the hidden states, as wide as the teachers'.
        teacher: The same of each teacher, or what makes its rows; none when the
            objective needs none.
        wanted: Which gradients are formed; none of the others' work is done.
        static: What is known before tracing.
        parts: How many devices share the vocabulary.
        rows: Tokens that the objective takes at once.
    """

    objective: Objective
    student: Head
    teacher: TeachersHead
    wanted: Gradients
    static: Static
    parts: int
    rows: int


_Sums = tuple[Float[Array, ""], dict[str, Float[Array, ""]], list[Array]]
"""Sums over some tokens, and the gradient in the leaves of the objective."""


def is_smooth(leaf: ArrayLike) -> bool:
    """Returns whether a leaf can have a gradient: whether it is no integer or bool."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Returns the float32 product of two matrices over one axis of each."""
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def add_chunk(
    problem: Problem, sums: Outcome, tokens: Tokens
) -> tuple[Outcome, Array | None]:
    """Returns the sums with a chunk added, and the gradient of its hidden states."""
    student, wanted = problem.student, problem.wanted
    teachers = zip(tokens.teacher.rows, problem.teacher.heads, strict=True)
    teacher = tokens.teacher._replace(
        rows=tuple(
            _dot(x, head.kernel, 1, head.axes[0]) if isinstance(head, Head) else x
            for x, head in teachers
        )
    )
    product = _dot(tokens.student, student.kernel, 1, student.axes[0])
    rows = Products(product, teacher, tokens.weight, tokens.labels)
    (loss, metrics, in_leaves), in_product = _evaluate(problem, rows)
    in_logits = in_product.astype(tokens.student.dtype)
    objective, _, kernel, bias = sums.gradients
    if objective is not None:
        objective = [a + b for a, b in zip(objective, in_leaves, strict=True)]
    if kernel is not None:
        if student.transposed:
            kernel += _dot(in_logits, tokens.student, 0, 0)
        else:
            columns = tokens.student.T
            if problem.static.platform == "cpu":
                # XLA's product takes a slower path where it transposes an operand:
                # the head takes 6% less time with a transposed one beside it.
                columns = lax.optimization_barrier(columns)
            kernel += _dot(columns, in_logits, 1, 0)
        if student.transposed and problem.parts == 1:
            # A TPU may otherwise add up the table's gradient transposed, and copy it
            # at the end.
            kernel = with_layout_constraint(kernel, Layout((0, 1)))
    if bias is not None:
        bias += jnp.sum(in_product, axis=0)
    metrics = jax.tree.map(jnp.add, sums.metrics, metrics)
    gradients = Gradients(objective, None, kernel, bias)
    in_hidden = _hidden_gradient(problem, in_logits) if wanted.hidden else None
    return Outcome(sums.loss + loss, metrics, gradients), in_hidden


def _evaluate(
    problem: Problem, rows: Products
) -> tuple[_Sums, Float[Array, "tokens vocab"]]:
    """Returns the sums over tokens, and their gradient in the student's product."""
    size = problem.rows
    if size >= rows.weight.size:
        return _evaluate_group(problem, rows)
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)

    def add(sums: _Sums, group: Products) -> tuple[_Sums, Array]:
        found, in_product = _evaluate_group(problem, group)
        return jax.tree.map(jnp.add, sums, found), in_product

    first = jax.tree.map(lambda x: x[0], groups)
    like = jax.eval_shape(functools.partial(_evaluate_group, problem), first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    found, in_product = lax.scan(add, zeros, groups)
    return found, in_product.reshape(rows.student.shape)


def _evaluate_group(
    problem: Problem, rows: Products
) -> tuple[_Sums, Float[Array, "tokens vocab"]]:
    teachers = zip(rows.teacher.rows, problem.teacher.heads, strict=True)
    made: Any = [
        head.logits(x, problem.student.finish(rows.student))
        if isinstance(head, TopKHead)
        else head.finish(x)
        for x, head in teachers
    ]
    if rows.teacher.weights is None:
        (teacher,) = made or (None,)
    else:
        teacher = problem.teacher.mix(made, rows.teacher.weights)
    leaves, tree = jax.tree.flatten(problem.objective)

    def total(
        smooth: list[Array], product: Array
    ) -> tuple[Array, dict[str, Float[Array, ""]]]:
        new = iter(smooth)
        objective = tree.unflatten([next(new) if is_smooth(x) else x for x in leaves])
        logits = problem.student.finish(product)
        with one_pass(problem.static.one_pass):
            losses = objective(logits, teacher, rows.labels)
            metrics = token_metrics(objective, logits, teacher, rows.labels)
        sums = {name: weighted_sum(x, rows.weight) for name, x in metrics.items()}
        return weighted_sum(losses, rows.weight), sums

    smooth = [jnp.asarray(x) for x in leaves if is_smooth(x)]
    # What is not wanted of the gradients is not computed: nobody reads it.
    value, pull, metrics = jax.vjp(total, smooth, rows.student, has_aux=True)
    in_leaves, in_product = pull(jnp.float32(1))
    # A token of weight 0 has slope 0 times its own, which may be infinite.
    in_product = select_tokens(in_product, rows.weight)
    return (value, metrics, in_leaves), in_product


def _hidden_gradient(
    problem: Problem, in_logits: Float[Array, "tokens vocab"]
) -> Float[Array, "*parts tokens d_model"]:
    """Returns the gradient of the hidden states from each part of the vocabulary.

    Devices that share the vocabulary would have to add up their parts in every chunk;
    as a leading axis of the result the parts stay where they are.
    """
    kernel, parts = problem.student.kernel, problem.parts
    model, vocab = problem.student.axes
    if parts == 1:
        return _dot(in_logits, kernel, 1, vocab)
    d_model = kernel.shape[model]
    by_part = (parts, -1, d_model) if vocab == 0 else (d_model, parts, -1)
    product = jnp.einsum(
        "cpv,pvd->pcd" if vocab == 0 else "cpv,dpv->pcd",
        in_logits.reshape(in_logits.shape[0], parts, -1),
        kernel.reshape(by_part),
        preferred_element_type=jnp.float32,
    )
    return spread_vocabulary(product, 0, problem.static.partition)
