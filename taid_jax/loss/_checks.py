"""Checks of what an objective is given, before any tracing."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taid_jax.errors import show


def _numbers(name: str, value: object) -> np.ndarray | None:
    """Returns the numbers that a setting holds, float64; None of a traced one.

    Raises:
        TypeError: If it holds no real numbers.
    """
    if isinstance(value, Tracer):
        return None
    if isinstance(value, Array) and not value.is_fully_addressable:
        return None
    if isinstance(value, int | float | np.generic | np.ndarray | Array):
        numbers = np.asarray(jax.device_get(value))
        # bfloat16 is no kind of number to NumPy.
        if any(jnp.issubdtype(numbers.dtype, x) for x in (jnp.integer, jnp.floating)):
            return numbers.astype(np.float64)
    raise TypeError(f"need a real number for {name}, got {show(value)}")


def check_between(
    name: str, value: object, low: float | int, high: float | int
) -> None:
    """Checks a number known before tracing; a traced one is left alone.

    Raises:
        TypeError: If `value` is no real number, nor an array of them.
        ValueError: If it is outside [low, high], or NaN.
    """
    numbers = _numbers(name, value)
    if numbers is not None and not np.all((low <= numbers) & (numbers <= high)):
        raise ValueError(f"need {low} <= {name} <= {high}, got {name} = {show(value)}")


def check_positive(name: str, value: object) -> None:
    """Checks a number known before tracing; a traced one is left alone.

    Raises:
        TypeError: If `value` is no real number, nor an array of them.
        ValueError: If it is not positive and finite, as a float32.
    """
    numbers = _numbers(name, value)
    if numbers is None:
        return
    with np.errstate(over="ignore"):
        numbers = numbers.astype(np.float32)
    if not np.all((numbers > 0) & (numbers < np.inf)):
        raise ValueError(f"need {name} > 0 and finite, got {name} = {show(value)}")


def check_static(name: str, value: object, low: float | int, high: float | int) -> None:
    """Checks a setting that is part of the program.

    Raises:
        TypeError: If `value` is no Python or NumPy number, such as a traced array.
        ValueError: If it is out of bounds, or NaN.
    """
    if isinstance(value, Array) or np.ndim(value):  # pyright: ignore[reportArgumentType]
        raise TypeError(
            f"need a Python number for {name}, which is static, got {show(value)}"
        )
    check_between(name, value, low, high)


def as_scalar(name: str, value: ArrayLike) -> Float[Array, ""]:
    """Returns a leaf of an objective as a float32.

    Raises:
        ValueError: If it is no scalar.
    """
    scalar = jnp.asarray(value, jnp.float32)
    if scalar.ndim:
        raise ValueError(
            f"need a scalar {name}, got {name} of shape {scalar.shape}; jax.vmap goes "
            "over several"
        )
    return scalar


_KINDS = {
    "labels": ((jnp.signedinteger,), "signed integers"),
    "mask": ((jnp.bool_, jnp.integer, jnp.floating), "bools or real numbers"),
}


def check_kinds(**arrays: object) -> None:
    """Checks that arguments are arrays of the right kind of numbers.

    Args:
        **arrays: By their names: `labels` and `mask` have kinds of their own, all
            others hold floats. None is left alone.

    Raises:
        TypeError: If one is not.
    """
    for name, array in arrays.items():
        kinds, words = _KINDS.get(name, ((jnp.floating,), "floats"))
        if array is None:
            continue
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            got = show(array)
        elif any(jnp.issubdtype(array.dtype, kind) for kind in kinds):  # pyright: ignore
            continue
        else:
            got = f"dtype {array.dtype}"  # pyright: ignore
        raise TypeError(f"need an array of {words} for {name}, got {got}")


def check_shapes(
    student_logits: Array,
    teacher_logits: Array | None,
    labels: Array | None = None,
    mask: Array | None = None,
    *,
    needs_teacher: bool = True,
) -> None:
    """Checks the arrays of an objective against one another, before any tracing.

    Raises:
        TypeError: If one is no array, or of the wrong kind of numbers.
        ValueError: With every shape in the message.
    """
    arrays = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": labels,
        "mask": mask,
    }
    check_kinds(**arrays)
    if student_logits is None or (teacher_logits is None and needs_teacher):
        raise ValueError("need student_logits and teacher_logits, got None")
    got = ", ".join(f"{k} {a.shape}" for k, a in arrays.items() if a is not None)
    if student_logits.ndim < 1 or student_logits.shape[-1] < 1:
        raise ValueError(f"need logits of shape (*tokens, vocab), got {got}")
    if teacher_logits is not None and student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"need student and teacher logits of one shape, got {got}; where the "
            "vocabularies are padded to different sizes, cut both to the shared entries"
        )
    tokens = student_logits.shape[:-1]
    for name in ("labels", "mask"):
        array = arrays[name]
        if array is not None and array.shape != tokens:
            raise ValueError(f"need {name} of shape {tokens}, one per token, got {got}")


def need_labels(name: str, student_logits: Array, labels: Array | None) -> Array:
    """Returns the labels of an objective that cannot do without them, as int32.

    Raises:
        TypeError: If they are no integers.
        ValueError: If they are missing.
    """
    if labels is None:
        shapes = getattr(student_logits, "shape", (0,))
        raise ValueError(
            f"{name} needs labels of shape {shapes[:-1]}, one per token, "
            f"got labels = None with student_logits {shapes}"
        )
    check_kinds(labels=labels)
    return as_int32(labels)


def as_int32(labels: Int[Array, "*tokens"]) -> Int[Array, "*tokens"]:
    """Returns labels as int32; those beyond it stay outside every vocabulary."""
    if labels.dtype.itemsize > 4:
        labels = labels.clip(-(2**31), 2**31 - 1)
    # Smaller integers could not count the entries of the vocabulary.
    return jnp.asarray(labels, jnp.int32)
