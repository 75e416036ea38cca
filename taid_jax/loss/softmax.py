"""Softmaxes of the student's and the teacher's logits, and the exact step between them.

Every sum and maximum is a plain reduction over the last axis, so that a vocabulary
sharded over a mesh axis stays sharded. Exponentials of a row are taken once and shared
by the value, the gradient and the metrics.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

FLOOR = -1e30
"""Stands for -inf: its exponential is 0, while sums and products of it stay finite."""

NEAR = 0.5
"""Up to this size `expm1` is summed as a series; beyond it a subtraction is exact."""


class Row(NamedTuple):
    """A row of logits in the parts of its softmax, `exp / total`.

    Attributes:
        shifted: `(*tokens, vocab)`, logits less their largest, over the temperature.
        exp: `(*tokens, vocab)`, `exp(shifted)`, or 0 where an entry takes no part.
        top: `(*tokens, 1)`, the largest logit.
        total: `(*tokens, 1)`, the sum of `exp`; 1 for an empty row.
    """

    shifted: Float[Array, "*tokens vocab"]
    exp: Float[Array, "*tokens vocab"]
    top: Float[Array, "*tokens 1"]
    total: Float[Array, "*tokens 1"]


class Pair(NamedTuple):
    """The student's and the teacher's row at one temperature.

    Attributes:
        student: The student's row, q.
        teacher: The teacher's row, p, over all of its entries.
        shared: Teacher's `exp` with 0 at entries that the student excludes.
        excluded: `(*tokens, vocab)`, where the student's logit is -inf.
        silent: `(*tokens, vocab)`, where the teacher's logit is -inf.
        difference: `(*tokens, vocab)`, `log p - log q + log_totals`; large and negative
            where the teacher is silent, large and positive where an entry is excluded.
        log_totals: `(*tokens, 1)`, log of teacher's over student's `total`.
    """

    student: Row
    teacher: Row
    shared: Float[Array, "*tokens vocab"]
    excluded: Bool[Array, "*tokens vocab"]
    silent: Bool[Array, "*tokens vocab"]
    difference: Float[Array, "*tokens vocab"]
    log_totals: Float[Array, "*tokens 1"]


def row_sum(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the sum over the vocabulary."""
    return jnp.sum(values, axis=-1, keepdims=True)


def row_max(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the largest entry over the vocabulary."""
    return jnp.max(values, axis=-1, keepdims=True)


def per_token(column: Float[Array, "*tokens 1"]) -> Float[Array, "*tokens"]:
    """Returns a column without its last axis."""
    return jnp.squeeze(column, -1)


def finite(logits: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens vocab"]:
    """Returns float32 logits with `FLOOR` in place of -inf; NaN and inf stay."""
    return jnp.maximum(logits.astype(jnp.float32), FLOOR)


def largest(logits: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the largest logit of a row, 0 for an empty one: all of it -inf."""
    top = row_max(logits.astype(jnp.float32))
    return jnp.where(top <= FLOOR, 0.0, top)


def total(exp: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the sum of a row of exponentials, 1 for an empty one."""
    sum_ = row_sum(exp)
    return jnp.where(sum_ == 0, 1.0, sum_)


def normalise(
    logits: Float[Array, "*tokens vocab"],
    temperature: Float[Array, ""] | float = 1.0,
) -> Row:
    """Returns the softmax of `logits / temperature` in its parts."""
    top = largest(logits)
    shifted = (finite(logits) - top) / temperature
    exp = jnp.exp(shifted)
    return Row(shifted, exp, top, total(exp))


def normalise_pair(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    temperature: Float[Array, ""] | float = 1.0,
) -> Pair:
    """Returns both softmaxes at a temperature, and the step between them."""
    student, teacher = finite(student_logits), finite(teacher_logits)
    excluded, silent = student <= FLOOR, teacher <= FLOOR
    q = normalise(student_logits, temperature)
    p = normalise(teacher_logits, temperature)
    # From the logits, not from two logarithms: for a teacher close to the student their
    # difference is exact, and a constant over the vocabulary cannot drown it.
    difference = ((teacher - student) - (p.top - q.top)) / temperature
    return Pair(
        student=q,
        teacher=p,
        shared=jnp.where(excluded, 0.0, p.exp),
        excluded=excluded,
        silent=silent,
        difference=difference,
        log_totals=jnp.log(p.total / q.total),
    )


def expm1_near(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `exp(x) - 1` for `|x| <= NEAR`, to float32's last digit.

    A polynomial: on CPUs the compiler's `expm1` takes as long as three exponentials.
    """
    x = jnp.clip(x, -NEAR, NEAR)
    # x (1 + x/2 (1 + x/3 (1 + ... x/8))): the next term is below 1e-8 of the sum.
    series = jnp.ones_like(x)
    for n in range(8, 1, -1):
        series = 1.0 + x * series * (1.0 / n)
    return x * series


def step(
    start: Float[Array, "*tokens vocab"],
    end: Float[Array, "*tokens vocab"],
    log_ratio: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens vocab"]:
    """Returns `end - start` for `end = start * exp(log_ratio)`, exact at any size.

    Where the two are close, their difference has lost the digits that `log_ratio` has.
    """
    near = jnp.abs(log_ratio) < NEAR
    return jnp.where(near, start * expm1_near(log_ratio), end - start)


def log_mass(
    student: Row,
    target: Row,
    difference: Float[Array, "*tokens vocab"],
    gap: Float[Array, "*tokens 1"] | float,
) -> Float[Array, "*tokens 1"]:
    """Returns `log sum_v q_v exp(difference_v)`, q the student's softmax.

    Args:
        student: The student's row.
        target: The row whose `exp` is `student.exp * exp(difference - gap)`.
        difference: Logits of the target less the student's, up to a constant.
        gap: At most about 0, so that nothing overflows.
    """
    change = step(student.exp, target.exp * jnp.exp(gap), difference)
    relative = row_sum(change) / student.total
    # Close to -1 the sum has lost its digits, but there the logarithms have not.
    near = relative > -NEAR
    return jnp.where(
        near,
        jnp.log1p(jnp.where(near, relative, 0.0)),
        gap + jnp.log(target.total / student.total),
    )


def kl(pair: Pair) -> Float[Array, "*tokens"]:
    """Returns KL(teacher || student) of every token, in nats."""
    mean = row_sum(pair.shared * pair.difference) / pair.teacher.total
    kept = row_sum(pair.shared) / pair.teacher.total
    # Rounding can leave -1e-8 where the two agree.
    return jnp.maximum(per_token(mean - kept * pair.log_totals), 0.0)
