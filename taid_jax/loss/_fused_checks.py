"""Checks of what the fused head is given, before any tracing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from taid_jax.errors import show
from taid_jax.loss._checks import check_kinds, check_positive
from taid_jax.loss._objective import Objective
from taid_jax.loss._reduce import token_metrics
from taid_jax.loss._teachers import TeacherHead, TeacherOut, Teachers, TeachersHead
from taid_jax.loss._topk import TopK, TopKHead
from taid_jax.types import Head


def check_arguments(
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: TeacherOut,
    teacher_head: TeacherHead,
    mask: Array | None,
    labels: Array | None,
) -> int:
    """Returns how many entries of the vocabularies count.

    Raises:
        TypeError: If hidden states or heads are no floats, or a head is no `Head`.
        ValueError: With every shape in the message.
    """
    if student_hidden is None:
        raise ValueError("need student_hidden, got None")
    check_kinds(student_hidden=student_hidden, mask=mask, labels=labels)
    tokens, sizes = student_hidden.shape[:-1], []
    dense = [("student", student_hidden, student_head)]
    for rows, head in _each_teacher(tokens, teacher_hidden, teacher_head):
        if isinstance(rows, TopK):
            sizes.append(_check_top_k(tokens, rows, head))
        else:
            dense.append(("teacher", rows, head))
    for name, hidden, head in dense:
        _check_head(name, hidden, head)
    got = ", ".join(
        f"{name}_hidden {hidden.shape}, {name}_head.kernel {head.kernel.shape}"
        + ("" if head.bias is None else f", bias {head.bias.shape}")
        + ("" if head.vocab_size is None else f", vocab_size {head.vocab_size}")
        + (", transposed" if head.transposed else "")
        for name, hidden, head in dense
    )
    for name, array in (("mask", mask), ("labels", labels)):
        got += "" if array is None else f", {name} {array.shape}"
    for name, hidden, head in dense:
        if hidden.ndim < 2 or hidden.shape[:-1] != tokens:
            raise ValueError(
                f"need {name}_hidden of shape (*tokens, d_model) with the tokens of "
                f"student_hidden and at least one axis of them, got {got}"
            )
        model, vocab = head.axes
        if head.kernel.ndim != 2 or head.kernel.shape[model] != hidden.shape[-1]:
            raise ValueError(
                f"need a {name} kernel of shape (d_model, vocab), or (vocab, d_model) "
                f"of a head that is `transposed`, with the {hidden.shape[-1]} of "
                f"{name}_hidden, got {got}"
            )
        width = head.kernel.shape[vocab]
        size = width if head.vocab_size is None else head.vocab_size
        bias = head.bias is None or head.bias.shape == (width,)
        if not 1 <= size <= width or not bias:
            raise ValueError(
                f"need 1 <= vocab_size <= {width}, the entries of the {name}'s kernel, "
                f"and as many in its bias, got {got}"
            )
        sizes.append(size)
    for name, array in (("mask", mask), ("labels", labels)):
        if array is not None and array.shape != tokens:
            raise ValueError(f"need {name} of shape {tokens}, one per token, got {got}")
    return min(sizes)


def _each_teacher(
    tokens: tuple[int, ...], hidden: TeacherOut, head: TeacherHead
) -> list[tuple[Any, Any]]:
    """Returns what comes of each teacher, and its head; nothing without a teacher."""
    for rows, made_by in ((TopK, TopKHead), (Teachers, TeachersHead)):
        if isinstance(hidden, rows) != isinstance(head, made_by):
            raise TypeError(
                f"need {rows.__name__} for teacher_hidden with a {made_by.__name__} "
                f"for teacher_head, got {type(hidden).__name__} with "
                f"{type(head).__name__}"
            )
    if hidden is None:
        return []
    if not isinstance(hidden, Teachers) or not isinstance(head, TeachersHead):
        return [(hidden, head)]
    rows, heads = hidden.rows, head.heads
    check_kinds(weights=hidden.weights)
    shape = None if hidden.weights is None else hidden.weights.shape
    if not len(rows) == len(heads) > 0 or shape != (*tokens, len(heads)):
        raise ValueError(
            "need rows and a head of each teacher, and weights of shape (*tokens, "
            f"teachers), got {len(rows)} rows, {len(heads)} heads and weights {shape} "
            f"beside tokens {tokens}"
        )
    pairs = list(zip(rows, heads, strict=True))
    for each, its_head in pairs:
        stored = isinstance(each, TopK)
        right = isinstance(its_head, TopKHead if stored else Head)
        if not right or not (stored or hasattr(each, "dtype")):
            raise TypeError(
                "need an array with a Head, or TopK with a TopKHead, of each of the "
                f"Teachers, got {type(each).__name__} with {type(its_head).__name__}"
            )
    return pairs


def _check_head(name: str, hidden: Array, head: Head) -> None:
    check_kinds(**{f"{name}_hidden": hidden})
    if not isinstance(head, Head):
        raise TypeError(
            f"need a taid_jax.loss.Head for {name}_head, such as Head(kernel) with "
            f"a kernel of shape (d_model, vocab), got {show(head)}"
        )
    check_kinds(**{f"{name}_head.kernel": head.kernel, f"{name}_head.bias": head.bias})
    if head.softcap is not None:
        check_positive(f"{name}_head.softcap", head.softcap)
    if not isinstance(head.vocab_size, int | np.integer | None):
        raise TypeError(
            f"need an int or None for {name}_head.vocab_size, got "
            f"{show(head.vocab_size)}"
        )


def _check_top_k(tokens: tuple[int, ...], rows: TopK, head: TopKHead) -> int:
    """Returns how many entries the teacher has."""
    check_kinds(logprobs=rows.logprobs, tail=rows.tail)
    shapes = rows.ids.shape, rows.logprobs.shape, rows.tail.shape
    wanted = (*tokens, rows.ids.shape[-1])
    if shapes != (wanted, wanted, tokens) or head.vocab_size < 1:
        raise ValueError(
            "need ids and logprobs of shape (*tokens, k), tail of shape (*tokens,) "
            f"and vocab_size >= 1, got {shapes}, tokens {tokens} and vocab_size "
            f"{head.vocab_size}"
        )
    return head.vocab_size


def trace_objective(
    objective: Objective,
    student_hidden: Array,
    teacher_hidden: TeacherOut,
    labels: Array | None,
    vocab_size: int,
) -> list[str]:
    """Returns the names of an objective's metrics, without computing any.

    Raises:
        ValueError: If the objective is not one, or lacks a teacher or labels.
    """
    tokens = student_hidden.shape[:-1]
    logits = jax.ShapeDtypeStruct((*tokens, vocab_size), jnp.float32)
    if teacher_hidden is None and getattr(objective, "needs_teacher", True):
        raise ValueError(
            f"{type(objective).__name__} needs teacher_hidden and teacher_head; got "
            f"None beside student_hidden {student_hidden.shape}. An objective that "
            "needs none says so by `needs_teacher = False`"
        )

    def call(objective: Objective, student: Array, teacher: Any, labels: Any) -> Any:
        metrics = token_metrics(objective, student, teacher, labels)
        return objective(student, teacher, labels), metrics

    teacher = None if teacher_hidden is None else logits
    losses, metrics = jax.eval_shape(call, objective, logits, teacher, labels)
    for name, array in (("losses", losses), *metrics.items()):
        if array.shape != tokens:
            raise ValueError(
                f"need {name} of shape {tokens}, one per token, from "
                f"{type(objective).__name__}, got {array.shape}"
            )
    return list(metrics)
