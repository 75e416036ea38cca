"""Softmaxes of the student's and the teacher's logits, and the exact step between them.

Every sum and maximum is a plain reduction over the last axis, so that a vocabulary
sharded over a mesh axis stays sharded. Exponentials of a row are taken once and shared
by the value, the gradient and the metrics.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
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
        target: The teacher's row over the entries where the student is not masked.
        mass: `(*tokens, 1)`, the teacher's mass on those entries.
        student_masked: `(*tokens, vocab)`, where the student's logit is -inf.
        teacher_masked: `(*tokens, vocab)`, where the teacher's logit is -inf.
        difference: `(*tokens, vocab)`, `log p - log q` up to a constant of the token: 0
            at the student's largest entry, large and negative where the
            teacher is masked, large and positive where the student is.
        shift: `(*tokens, 1)`, what the difference of the logits had at that entry.
        constant: `(*tokens, 1)`, `difference - (log p - log q)`.
        offset: `(*tokens, 1)`, see `log_mass`.
        top_ratio: `(*tokens, 1)`, `log p - log q` at the student's largest entry.
    """

    student: Row
    teacher: Row
    target: Row
    mass: Float[Array, "*tokens 1"]
    student_masked: Bool[Array, "*tokens vocab"]
    teacher_masked: Bool[Array, "*tokens vocab"]
    difference: Float[Array, "*tokens vocab"]
    shift: Float[Array, "*tokens 1"]
    constant: Float[Array, "*tokens 1"]
    offset: Float[Array, "*tokens 1"]
    top_ratio: Float[Array, "*tokens 1"]


def row_sum(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the sum over the vocabulary."""
    return jnp.sum(values, axis=-1, keepdims=True)


def row_max(values: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the largest entry over the vocabulary."""
    return jnp.max(values, axis=-1, keepdims=True)


@jax.custom_jvp
def row_maxes(
    a: Float[Array, "*tokens vocab"], b: Float[Array, "*tokens vocab"]
) -> tuple[Float[Array, "*tokens 1"], Float[Array, "*tokens 1"]]:
    """Returns the largest entries of two arrays, on a CPU from one pass over both.

    There the pass also works the arrays out, which two passes would have stored; a TPU
    needs the same memory either way. It is not for a vocabulary that may be spread over
    devices, which would gather its partial results instead of reducing them.
    """

    def apart(a: Array, b: Array) -> tuple[Array, Array]:
        return row_max(a), row_max(b)

    def larger(x: tuple[Array, Array], y: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.maximum(x[0], y[0]), jnp.maximum(x[1], y[1])

    def together(a: Array, b: Array) -> tuple[Array, Array]:
        low = jnp.float32(-jnp.inf)
        tops = lax.reduce((a, b), (low, low), larger, (a.ndim - 1,))
        return jnp.expand_dims(tops[0], -1), jnp.expand_dims(tops[1], -1)

    mesh = jax.sharding.get_abstract_mesh()
    if any(mesh.shape[axis] > 1 for axis in mesh.auto_axes):
        return apart(a, b)
    return lax.platform_dependent(a, b, cpu=together, default=apart)


@row_maxes.defjvp
def _row_maxes_jvp(
    rows: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    pairs = zip(rows, tangents, strict=True)
    a, b = (jax.jvp(row_max, (row,), (tangent,)) for row, tangent in pairs)
    return (a[0], b[0]), (a[1], b[1])


def per_token(column: Float[Array, "*tokens 1"]) -> Float[Array, "*tokens"]:
    """Returns a column without its last axis."""
    return jnp.squeeze(column, -1)


def finite(logits: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens vocab"]:
    """Returns float32 logits with `FLOOR` in place of -inf; NaN and inf stay."""
    return jnp.maximum(logits.astype(jnp.float32), FLOOR)


def checked(top: Float[Array, "*tokens 1"]) -> Float[Array, "*tokens 1"]:
    """Returns the largest logit of a row; NaN where the row has no softmax.

    That is a row with NaN, inf or numbers as large as `FLOOR`, and one that is -inf
    throughout. The largest logit is part of every sum of the row: none of them is then
    mistaken for a number.
    """
    return jnp.where((top > FLOOR) & (top < -FLOOR), top, jnp.nan)


def filled(top: Float[Array, "*tokens 1"]) -> Float[Array, "*tokens 1"]:
    """Returns what `checked` does, but 0 for a part of a row that is all -inf."""
    return jnp.where(top <= FLOOR, 0.0, checked(top))


def total(exp: Float[Array, "*tokens vocab"]) -> Float[Array, "*tokens 1"]:
    """Returns the sum of a row of exponentials, 1 for an empty one."""
    sum_ = row_sum(exp)
    return jnp.where(sum_ == 0, 1.0, sum_)


def normalise(
    logits: Float[Array, "*tokens vocab"],
    temperature: Float[Array, ""] | float = 1.0,
    top: Float[Array, "*tokens 1"] | None = None,
) -> Row:
    """Returns the softmax of `logits / temperature` in its parts.

    `top` are the largest logits as `checked` gives them; found when None.
    """
    if top is None:
        top = checked(row_max(logits))
    # One division in all; at temperature 1 the product changes nothing.
    shifted = (finite(logits) - top) * (1 / temperature)
    exp = jnp.exp(shifted)
    return Row(shifted, exp, top, total(exp))


def at_top(
    student_logits: Float[Array, "*tokens vocab"],
    student_top: Float[Array, "*tokens 1"],
    teacher_logits: Float[Array, "*tokens vocab"],
) -> Float[Array, "*tokens vocab"]:
    """Returns the teacher's logits at the student's largest entries, elsewhere -inf."""
    # A sum, as a CPU's compiler makes a branch of a choice between loaded numbers.
    return jnp.where(student_logits == student_top, 0.0, -jnp.inf) + teacher_logits


def anchored_difference(
    student_logits: Float[Array, "..."],
    teacher_logits: Float[Array, "..."],
    student_top: Float[Array, "..."],
    anchor: Float[Array, "..."],
) -> Float[Array, "..."]:
    """Returns teacher less student logits, less the same at the student's largest.

    A constant of the token means nothing to a softmax and much to float32. This one
    leaves exactly 0 where a confident student has nearly all of its mass, and small
    numbers where the two rows nearly agree up to a shift. What rounding takes from the
    two subtractions is put back.

    Args:
        student_logits: May have entries of -inf, as the teacher's may.
        teacher_logits: Same shape.
        student_top: `(*tokens, 1)`, the student's largest logit.
        anchor: The teacher's logit at that entry.
    """
    difference, lost = _subtract(finite(teacher_logits), finite(student_logits))
    shift, shift_lost = _subtract(anchor, student_top)
    return (difference - shift) + (lost - shift_lost)


def _subtract(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns the difference of two arrays and what rounding took from it.

    References:
        Knuth, The Art of Computer Programming 2, section 4.2.2, theorem B.
    """
    difference = a - b
    back = difference - a
    return difference, (a - (difference - back)) - (b + back)


def normalise_pair(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    temperature: Float[Array, ""] | float = 1.0,
    largest: Callable[[Array], Array] = checked,
) -> Pair:
    """Returns both softmaxes at a temperature, and the step between them.

    Entries may be -inf. `largest` is `checked`, or `filled` for parts of rows, which
    may be empty.
    """
    student_logits = student_logits.astype(jnp.float32)
    teacher_logits = teacher_logits.astype(jnp.float32)
    student_masked = finite(student_logits) <= FLOOR
    teacher_masked = finite(teacher_logits) <= FLOOR
    q = normalise(student_logits, temperature, largest(row_max(student_logits)))
    at_student_top, teacher_top = row_maxes(
        at_top(student_logits, q.top, teacher_logits), teacher_logits
    )
    p = normalise(teacher_logits, temperature, largest(teacher_top))
    masked_top = at_student_top <= FLOOR
    # Where the teacher is masked there, its own largest logit stands in.
    anchor = jnp.where(masked_top, p.top, at_student_top)
    difference = anchored_difference(student_logits, teacher_logits, q.top, anchor)
    offset = (p.top - anchor) * (1 / temperature)
    constant = offset + jnp.log(p.total / q.total)
    shared = jnp.where(student_masked, 0.0, p.exp)
    return Pair(
        student=q,
        teacher=p,
        target=p._replace(exp=shared, total=total(shared)),
        mass=row_sum(shared) / p.total,
        student_masked=student_masked,
        teacher_masked=teacher_masked,
        difference=difference * (1 / temperature),
        shift=anchor - q.top,
        constant=constant,
        offset=offset,
        top_ratio=jnp.where(masked_top, FLOOR, -constant),
    )


def expm1_near(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `exp(x) - 1` for `|x| <= NEAR`, to float32's last digit.

    A polynomial: on CPUs the compiler's `expm1` takes as long as three exponentials.
    """
    x = jnp.clip(x, -NEAR, NEAR)
    # Taylor's series: the first term left out is below 2e-8 of the sum.
    series = jnp.full_like(x, 1 / math.factorial(8))
    for n in range(7, 0, -1):
        series = series * x + 1 / math.factorial(n)
    return series * x


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


def log_mass(pair: Pair) -> Float[Array, "*tokens 1"]:
    """Returns `log sum_v q_v exp(difference_v)`, q the student's softmax, if small.

    A small result has digits that the logarithms of two sums would lose in their
    difference. Otherwise the rows differ so much that `step` needs no ratio: inf.
    """
    # Capped against overflow: the sum is then far from small.
    end = pair.target.exp * jnp.exp(jnp.minimum(pair.offset, 30.0))
    grown = step(pair.student.exp, end, pair.difference)
    return log_grown(row_sum(grown) / pair.student.total)


def log_grown(relative: Float[Array, "*tokens 1"]) -> Float[Array, "*tokens 1"]:
    """Returns `log(1 + relative)` if small, else inf; see `log_mass`."""
    near = jnp.abs(relative) < NEAR
    return jnp.where(near, jnp.log1p(jnp.where(near, relative, 0.0)), jnp.inf)


def exact_constant(pair: Pair) -> Float[Array, "*tokens 1"]:
    """Returns `pair.constant` to all digits where the rows nearly agree, else inf."""
    return log_mass(pair) - jnp.log(pair.mass)


def probability_difference(pair: Pair) -> Float[Array, "*tokens vocab"]:
    """Returns p - q, 0 where the student is masked."""
    q = pair.student.exp / pair.student.total
    p = pair.target.exp / pair.teacher.total
    return step(q, p, pair.difference - exact_constant(pair))


def kl(pair: Pair) -> Float[Array, "*tokens"]:
    """Returns KL(teacher || student) of every token, in nats."""
    mean = row_sum(pair.target.exp * pair.difference) / pair.teacher.total
    # Rounding can leave -1e-8 where the two agree.
    return jnp.maximum(per_token(mean - pair.mass * pair.constant), 0.0)
