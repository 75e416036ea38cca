"""What a distillation objective is: a pytree that gives the loss of every token."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import GetAttrKey, keystr, register_pytree_with_keys
from jaxtyping import Bool, Float, Int

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import (
    as_scalar,
    check_shapes,
    check_static,
    need_labels,
)
from taid_jax.types import IGNORE_INDEX

T = TypeVar("T")

Parts = tuple[Float[Array, "*tokens"], Callable[[], Float[Array, "*tokens vocab"]]]
"""The loss of every token, and what forms the gradient of each in its own logits when,
and only when, it is asked for."""

STATIC = {"static": True}
"""Metadata of a dataclass field that is part of the tree's structure, not a leaf."""


def bounded(low: float | int, high: float | int, **default: float | int) -> Any:
    """Returns such a field: a number from `low` to `high`, checked before tracing."""
    metadata = STATIC | {"bounds": (low, high)}
    return dataclasses.field(metadata=metadata, **default)  # pyright: ignore


@runtime_checkable
class Objective(Protocol):
    """Gives the loss of every token from its two rows of logits.

    Implementations are frozen dataclasses under `register_objective`: numbers that may
    be traced are leaves, settings are static. They know nothing of masks. An objective
    may also have `metrics` with the same arguments, a dict of `(*tokens,)` float32
    arrays without gradient.

    Examples:
        >>> from taid_jax.loss import TAID, Objective
        >>> isinstance(TAID(0.4), Objective)
        True
    """

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token, in nats, float32.

        NaN where a row is no distribution: one with NaN or inf in it, or -inf
        throughout. Also where labels are needed and one is outside the vocabulary.

        Args:
            student_logits: `(*tokens, vocab)`, any float dtype. An entry of -inf takes
                no part.
            teacher_logits: Same shape; receives no gradient. -inf is probability 0.
            labels: `(*tokens,)`, aligned with the logits: the token that each position
                predicts. `IGNORE_INDEX` where the position does not count: an objective
                that needs labels gives 0 there.

        Raises:
            TypeError: If an argument is no array, or of the wrong kind of numbers.
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
    leaves = [f.name for f in fields if not f.metadata.get("static", False)]
    static = [f.name for f in fields if f.metadata.get("static", False)]

    def flatten(node: T) -> tuple[list[tuple[Hashable, object]], tuple[Hashable, ...]]:
        children = [(GetAttrKey(name), getattr(node, name)) for name in leaves]
        return children, tuple(getattr(node, name) for name in static)

    def unflatten(settings: tuple[Hashable, ...], children: Iterable[object]) -> T:
        node = object.__new__(cls)
        for name, value in zip(leaves + static, (*children, *settings), strict=True):
            object.__setattr__(node, name, value)
        return node

    register_pytree_with_keys(cls, flatten, unflatten)
    return cls


class ExactObjective:
    """An objective that forms its own gradient in the student's logits.

    A subclass gives `_value_and_gradient`; checks, dtypes, labels and `kl_teacher` are
    here. The derivative in everything else, leaves included, is exactly zero.
    """

    needs_teacher: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            if "bounds" in field.metadata:
                value = getattr(self, field.name)
                check_static(field.name, value, *field.metadata["bounds"])

    def _value_and_gradient(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Parts:
        """Returns both for float32 logits; leaves are float32 scalars here."""
        raise NotImplementedError

    def _losses(
        self, student_logits: Array, teacher_logits: Any, labels: Any
    ) -> Float[Array, "*tokens"]:
        return _exact(self, student_logits, teacher_logits, labels)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."] | None = None,
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        name = type(self).__name__
        if self.needs_labels:
            labels = need_labels(name, student_logits, labels)
        check_shapes(
            student_logits, teacher_logits, labels, needs_teacher=self.needs_teacher
        )
        scalars = jax.tree_util.tree_map_with_path(
            lambda path, leaf: as_scalar(keystr(path, simple=True), leaf), self
        )
        # None only for an objective that needs no teacher: hence Any.
        teacher: Any = None
        if self.needs_teacher and teacher_logits is not None:
            teacher = teacher_logits.astype(jnp.float32)
        return scalars._losses(
            student_logits.astype(jnp.float32),
            teacher,
            labels if self.needs_labels else None,
        )

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."] | None = None,
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns metrics of every token, in nats; see `Objective`.

        `kl_teacher` is KL(teacher || student) at temperature 1, for every objective.
        """
        check_shapes(
            student_logits, teacher_logits, labels, needs_teacher=self.needs_teacher
        )
        if teacher_logits is None:
            return {}
        return self._metrics(student_logits, teacher_logits)

    def _metrics(
        self, student_logits: Array, teacher_logits: Array
    ) -> dict[str, Float[Array, "*tokens"]]:
        pair = softmax.normalise_pair(student_logits, teacher_logits)
        return {"kl_teacher": softmax.kl(pair)}


@jax.custom_jvp
def _exact(
    objective: ExactObjective,
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"] | None,
    labels: Int[Array, "*tokens"] | None,
) -> Float[Array, "*tokens"]:
    """Returns the losses of an objective; their derivative is its own gradient.

    Both come out of one call and share their exponentials. Works in forward and reverse
    mode and to higher order.
    """
    return _by_label(objective, student_logits, teacher_logits, labels)[0]


@_exact.defjvp
def _exact_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    value, gradient = _by_label(*primals)
    return value, jnp.sum(gradient() * tangents[1], axis=-1)


def _by_label(
    objective: ExactObjective,
    student_logits: Array,
    teacher_logits: Array | None,
    labels: Array | None,
) -> Parts:
    """Returns the value and gradient of an objective, as the labels allow.

    A token whose label is `IGNORE_INDEX` has neither loss nor gradient, and one whose
    label is otherwise outside the vocabulary has NaN for both.
    """
    value, gradient = objective._value_and_gradient(
        student_logits, teacher_logits, labels
    )
    if labels is None:
        return value, gradient
    ignored = labels == IGNORE_INDEX
    known = (labels >= 0) & (labels < student_logits.shape[-1])

    def select(values: Array, ignored: Array, known: Array) -> Array:
        return jnp.where(ignored, 0.0, jnp.where(known, values, jnp.nan))

    def selected() -> Float[Array, "*tokens vocab"]:
        columns = jnp.expand_dims(ignored, -1), jnp.expand_dims(known, -1)
        return select(gradient(), *columns)

    return select(value, ignored, known), selected


def label_entries(
    labels: Int[Array, "*tokens"], vocab: int
) -> Bool[Array, "*tokens vocab"]:
    """Returns which entry is the label; none for a label outside the vocabulary.

    A comparison, not a gather: it stays local when the vocabulary is sharded.
    """
    shape = (1,) * labels.ndim + (vocab,)
    entries = jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)
    return entries == jnp.expand_dims(labels, -1)
