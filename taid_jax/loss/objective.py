"""What a distillation objective is: a pytree that gives the loss of every token."""

import dataclasses
import math
from collections.abc import Hashable, Iterable
from typing import Protocol, TypeVar, runtime_checkable

import jax
from jax import Array
from jaxtyping import Float, Int

T = TypeVar("T")

STATIC = {"static": True}
"""Metadata of a dataclass field that is part of the tree's structure, not a leaf."""


@runtime_checkable
class Objective(Protocol):
    """Gives the loss of every token from its two rows of logits.

    Implementations are frozen dataclasses under `register_objective`: numbers that may
    be traced are leaves, settings are static. They know nothing of masks. An objective
    may also have `metrics` with the same arguments, a dict of `(*tokens,)` float32
    arrays without gradient.
    """

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token, in nats, float32.

        Args:
            student_logits: `(*tokens, vocab)`, any float dtype. An entry of -inf takes
                no part.
            teacher_logits: Same shape; receives no gradient. -inf is probability 0.
            labels: `(*tokens,)`, aligned with the logits: the token that each position
                predicts. `IGNORE_INDEX` where the position does not count.

        Raises:
            ValueError: If the shapes do not match, or labels are needed and missing.
        """
        ...


def register_objective(cls: type[T]) -> type[T]:
    """Registers a frozen dataclass as a pytree.

    Fields with `metadata=STATIC` are part of the tree's structure, all others
    are leaves. Unlike `jax.tree_util.register_dataclass`, rebuilding a tree does not
    run `__init__`: jax puts placeholders into it that no check should see.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    leaves = tuple(f.name for f in fields if not f.metadata.get("static", False))
    static = tuple(f.name for f in fields if f.metadata.get("static", False))

    def flatten_with_keys(
        node: T,
    ) -> tuple[list[tuple[Hashable, object]], tuple[Hashable, ...]]:
        children = [
            (jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in leaves
        ]
        return children, tuple(getattr(node, name) for name in static)

    def unflatten(settings: tuple[Hashable, ...], children: Iterable[object]) -> T:
        node = object.__new__(cls)
        for name, value in zip(leaves, children, strict=True):
            object.__setattr__(node, name, value)
        for name, value in zip(static, settings, strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def check_between(
    name: str, value: object, low: float | int, high: float | int
) -> None:
    """Checks a number known before tracing; a traced one is left alone.

    Raises:
        ValueError: If `value` is a Python number outside [low, high].
    """
    if isinstance(value, int | float) and not low <= value <= high:
        raise ValueError(f"need {low} <= {name} <= {high}, got {name} = {value}")


def check_inside(
    name: str, value: float | int, low: float | int, high: float | int
) -> None:
    """Checks a setting that has to be strictly between two bounds.

    Raises:
        ValueError: If it is not.
    """
    if not low < value < high:
        raise ValueError(f"need {low} < {name} < {high}, got {name} = {value}")


def check_positive(name: str, value: object) -> None:
    """Checks a number known before tracing; a traced one is left alone.

    Raises:
        ValueError: If `value` is a Python number that is not positive and finite.
    """
    if isinstance(value, int | float) and not 0 < value < math.inf:
        raise ValueError(f"need {name} > 0 and finite, got {name} = {value}")


def check_shapes(
    student_logits: Array,
    teacher_logits: Array | None,
    labels: Array | None = None,
    mask: Array | None = None,
) -> None:
    """Checks the arrays of an objective against one another, before any tracing.

    Args:
        student_logits: `(*tokens, vocab)`.
        teacher_logits: Has to have the same shape when given.
        labels: Has to be `(*tokens,)` when given.
        mask: Has to be `(*tokens,)` when given.

    Raises:
        ValueError: With every shape in the message.
    """
    arrays = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": labels,
        "mask": mask,
    }
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
    """Returns the labels of an objective that cannot do without them.

    Raises:
        ValueError: If they are missing.
    """
    if labels is None:
        raise ValueError(
            f"{name} needs labels of shape {student_logits.shape[:-1]}, one per token, "
            f"got labels = None with student_logits {student_logits.shape}"
        )
    return labels
