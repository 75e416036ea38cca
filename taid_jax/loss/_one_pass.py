"""TAID's sums in one pass over both rows of logits, by a kernel for GPUs.

The plain form reads the rows for the student's largest logit, for the teacher's, for
that of the mixture, and for the sums. Here a part of a row has its sums less its own
largest logits, and parts are put together as those demand. A part is anchored, as whole
rows are, at the student's largest entry of it: where student and teacher nearly agree,
all that putting together adds is small, and no digits are lost.
"""

import contextlib
import contextvars
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._softmax import FLOOR

_LANES = 256
"""Parts of a row that are summed side by side: two for each thread of four warps."""

_ENTRIES = 8
"""Entries that each takes at a time: to move what was summed before costs as much as
one entry does. By ptxas 146 registers a thread for H100, 84 instructions an entry."""

_LOG2_E = 1.4426950408889634

_wanted = contextvars.ContextVar("one_pass", default=False)
_interpret = contextvars.ContextVar("one_pass_interpret", default=False)


@contextlib.contextmanager
def one_pass(wanted: bool, *, interpret: bool = False) -> Iterator[None]:
    """Has objectives that are traced inside take their sums in one pass, if they can.

    Args:
        wanted: Only where `runs_on` says so, and for rows that lie whole on one device:
            the compiler cannot share out a kernel.
        interpret: Whether to run the kernel without a GPU, slowly, to test it.
    """
    tokens = _wanted.set(wanted), _interpret.set(interpret)
    try:
        yield
    finally:
        _wanted.reset(tokens[0])
        _interpret.reset(tokens[1])


def is_wanted() -> bool:
    """Returns whether `one_pass` says so."""
    return _wanted.get()


def runs_on(device: Any) -> bool:
    """Returns whether Triton compiles for a device: for NVIDIA's, from Ampere on."""
    capability = str(getattr(device, "compute_capability", ""))
    return bool(re.fullmatch(r"([89]|\d\d)\.\d", capability))


class Sums(NamedTuple):
    """Sums over both rows of a token, or over parts of them; all of one shape.

    Attributes:
        student_top: The student's largest logit.
        teacher_top: The teacher's.
        at_top: The teacher's logit at the student's largest entry.
        target_top: The largest of the mixture, of rows less their largest.
        student: Of the student's exponentials.
        teacher: Of the teacher's.
        shared: Of the teacher's where the student is not masked.
        target: Of the mixture's.
        mean: Of the mixture's times the student's logits less the largest.
        grown: See `softmax.log_mass`.
        teacher_difference: Of the teacher's times `Pair.difference`.
        target_difference: Of the mixture's times that.
    """

    student_top: Array
    teacher_top: Array
    at_top: Array
    target_top: Array
    student: Array
    teacher: Array
    shared: Array
    target: Array
    mean: Array
    grown: Array
    teacher_difference: Array
    target_difference: Array

    @property
    def anchor(self) -> Array:
        """Returns `at_top`, or the teacher's largest where that is masked."""
        return jnp.where(self.at_top <= FLOOR, self.teacher_top, self.at_top)

    def offset(self, t: Array) -> Array:
        """Returns that of the mixture; see `softmax.log_mass`."""
        return self.target_top + t * (self.teacher_top - self.anchor)


def _nothing(shape: tuple[int, ...]) -> Sums:
    """Returns the sums over no entry."""
    floor, zero = (jnp.full(shape, x, jnp.float32) for x in (FLOOR, 0))
    return Sums(*(floor,) * 4, *(zero,) * 8)


def _entries(student: Array, teacher: Array) -> Sums:
    """Returns the sums over one entry each."""
    # Compilers leave out to add -0, which changes no number; 0 changes that.
    zero, one = jnp.full_like(student, -0.0), jnp.ones_like(student)
    return Sums(
        student_top=student,
        teacher_top=teacher,
        at_top=teacher,
        target_top=zero,
        student=one,
        teacher=one,
        shared=jnp.where(student <= FLOOR, zero, one),
        target=one,
        mean=zero,
        grown=zero,
        teacher_difference=zero,
        target_difference=zero,
    )


def _together(parts: Sequence[Sums], t: Array, *, across: bool = False) -> Sums:
    """Returns the sums over all parts, of each lane or across all."""

    def largest(values: Sequence[Array]) -> Array:
        top = functools.reduce(jnp.maximum, values)
        return jnp.max(top) if across else top

    def total(values: Sequence[Array]) -> Array:
        added = functools.reduce(jnp.add, values)
        return jnp.sum(added) if across else added

    student_top = largest([part.student_top for part in parts])
    teacher_top = largest([part.teacher_top for part in parts])
    at_top = [
        jnp.where(part.student_top == student_top, part.at_top, FLOOR) for part in parts
    ]
    # Less than this is the mixture only where the teacher is masked.
    least = jnp.where(t > 0, t * FLOOR, FLOOR)

    def target_top(part: Sums) -> Array:
        below = part.teacher_top - teacher_top
        below = jnp.where(part.teacher_top <= FLOOR, FLOOR, below)
        top = part.target_top + (1 - t) * (part.student_top - student_top) + t * below
        return jnp.where(part.student_top <= FLOOR, FLOOR, jnp.maximum(top, least))

    target_tops = [target_top(part) for part in parts]
    whole = _nothing(student_top.shape)._replace(
        student_top=student_top,
        teacher_top=teacher_top,
        at_top=largest(at_top),
        target_top=largest(target_tops),
    )
    moved = [_moved(*each, whole, t) for each in zip(parts, target_tops, strict=True)]
    return Sums(*whole[:4], *map(total, zip(*moved, strict=True)))


def _exp(x: Array) -> Array:
    """Returns `exp(x)` by an instruction that GPUs have.

    Its relative error is `|x|` times float32's: large where the number is small.
    """
    return jnp.exp2(x * _LOG2_E)


def _moved(part: Sums, target_top: Array, whole: Sums, t: Array) -> tuple[Array, ...]:
    """Returns the sums of a part less the largest logits of all parts.

    Args:
        part: Less its own.
        target_top: The largest of the part's mixture, of rows less those of all.
        whole: Has the largest of all.
        t: TAID's.
    """
    shift = softmax.anchored_difference(
        part.student_top, part.anchor, whole.student_top, whole.anchor
    )
    below = part.student_top - whole.student_top
    in_student = _exp(below)
    in_teacher = _exp(part.teacher_top - whole.teacher_top)
    in_target = _exp(target_top - whole.target_top)
    student, target = in_student * part.student, in_target * part.target
    # As `softmax.step` and `softmax.log_mass` have it, of sums in place of entries. One
    # that has doubled is not small any more.
    near = (jnp.abs(t * shift) < softmax.NEAR) & (part.grown < part.student)
    more = softmax.expm1_near(t * shift) * (part.grown + part.student)
    end = target * _exp(jnp.minimum(whole.offset(t), 30.0))
    return (
        student,
        in_teacher * part.teacher,
        in_teacher * part.shared,
        target,
        in_target * (part.mean + below * part.target),
        jnp.where(near, in_student * (part.grown + more), end - student),
        in_teacher * (part.teacher_difference + shift * part.shared),
        in_target * (part.target_difference + shift * part.target),
    )


def _find(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    t: Float[Array, ""],
) -> Sums:
    """Returns the sums over the vocabulary, `(*tokens, 1)`."""
    # Of JAX's Triton part not every platform has all; and only this needs it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    *tokens, vocab = student_logits.shape
    count = student_logits.size // vocab

    def kernel(student_ref: Any, teacher_ref: Any, t_ref: Any, *out_refs: Any) -> None:
        token, t = pl.program_id(0), t_ref[()]

        def read(ref: Any, entry: Array) -> Array:
            here = ref.at[token, entry]
            logits = triton.load(here, mask=entry < vocab, other=-jnp.inf)
            return softmax.finite(logits)

        def add(step: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
            parts = [Sums(*found)]
            for i in range(_ENTRIES):
                entry = (step * _ENTRIES + i) * _LANES + jnp.arange(
                    _LANES, dtype=step.dtype
                )
                parts.append(
                    _entries(read(student_ref, entry), read(teacher_ref, entry))
                )
            return tuple(_together(parts, t))

        steps = pl.cdiv(vocab, _ENTRIES * _LANES)
        lanes = lax.fori_loop(0, steps, add, tuple(_nothing((_LANES,))))
        sums = _together([Sums(*lanes)], t, across=True)
        for ref, value in zip(out_refs, sums, strict=True):
            ref[token] = value

    column = jax.ShapeDtypeStruct((count,), jnp.float32)
    columns = pl.pallas_call(
        kernel,
        grid=(count,),
        out_shape=(column,) * len(Sums._fields),
        compiler_params=triton.CompilerParams(num_warps=4),
        interpret=_interpret.get(),
        name="taid_sums",
    )(student_logits.reshape(-1, vocab), teacher_logits.reshape(-1, vocab), t)
    found = Sums(*(x.reshape(*tokens, 1) for x in columns))
    student_top = softmax.checked(found.student_top)
    teacher_top = softmax.checked(found.teacher_top)
    # No result of a row that has no softmax is to be mistaken for a number.
    sound = jnp.where(jnp.isnan(student_top + teacher_top), jnp.nan, 1.0)
    empty = found.target_top <= FLOOR
    return found._replace(
        student_top=student_top,
        teacher_top=teacher_top,
        target_top=softmax.filled(found.target_top),
        student=sound * found.student,
        target=sound * jnp.where(empty, 1.0, found.target),
        mean=jnp.where(empty, 0.0, found.mean),
        target_difference=jnp.where(empty, 0.0, found.target_difference),
    )


def taid_values(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    t: Float[Array, ""],
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Returns the loss, KL(teacher || student) and KL(target || student) of tokens."""
    sums = _find(student_logits, teacher_logits, t)
    loss = jnp.log(sums.student) - sums.mean / sums.target
    constant = sums.teacher_top - sums.anchor + jnp.log(sums.teacher / sums.student)
    kl_teacher = (sums.teacher_difference - sums.shared * constant) / sums.teacher
    constant = sums.offset(t) + jnp.log(sums.target / sums.student)
    kl_target = t * sums.target_difference / sums.target - constant
    # Rounding can leave -1e-8 where the two agree.
    columns = loss, jnp.maximum(kl_teacher, 0.0), jnp.maximum(kl_target, 0.0)
    loss, kl_teacher, kl_target = map(softmax.per_token, columns)
    return loss, kl_teacher, kl_target


def taid_gradient(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    t: Float[Array, ""],
) -> Float[Array, "*tokens vocab"]:
    """Returns the gradient of every token's loss in the student's logits."""
    sums = _find(student_logits, teacher_logits, t)
    student = softmax.finite(student_logits) - sums.student_top
    teacher = softmax.finite(teacher_logits) - sums.teacher_top
    masked = softmax.finite(student_logits) <= FLOOR
    mixture = jnp.where(masked, FLOOR, (1 - t) * student + t * teacher)
    difference = softmax.anchored_difference(
        student_logits, teacher_logits, sums.student_top, sums.anchor
    )
    log_ratio = t * difference - softmax.log_grown(sums.grown / sums.student)
    q = jnp.exp(student) / sums.student
    p = jnp.exp(mixture - sums.target_top) / sums.target
    return -softmax.step(q, p, log_ratio)
