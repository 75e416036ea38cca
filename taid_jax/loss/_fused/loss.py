"""The fused head: hidden states and two heads to any objective, without the logits."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int, Shaped

from taid_jax.errors import show
from taid_jax.loss._checks import as_int32, check_kinds, check_positive
from taid_jax.loss._fused.chunks import Gradients
from taid_jax.loss._fused.mesh import find_partition
from taid_jax.loss._fused.rows import Wanted, is_smooth
from taid_jax.loss._fused.shards import Fixed, Moving, Static, run
from taid_jax.loss._objective import Objective
from taid_jax.loss._reduce import token_metrics
from taid_jax.types import Head

FUSED_LOSS = "fused_loss"
"""Name of what the backward pass needs, for a policy of `jax.checkpoint`.

Under one that saves nothing, the value is computed twice: its two products are then the
only ones that are repeated.
"""

_NOTHING = Wanted(objective=False, hidden=False, kernel=False, bias=False)


def fused_loss(
    objective: Objective,
    student_hidden: Float[Array, "*tokens d_student"],
    student_head: Head,
    teacher_hidden: Float[Array, "..."] | None,
    teacher_head: Head | None,
    mask: Shaped[Array, "..."] | None = None,
    labels: Int[Array, "..."] | None = None,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the weighted sum of an objective over tokens, in nats, and its metrics'.

    The logits of the whole batch never exist. Tokens go through in chunks, those that
    count first, and the gradient of a chunk is formed together with its value: three
    products with the student's head and one with the teacher's in all. The value and
    the gradient do not depend on the size of a chunk. Without a derivative only the
    value is computed, and what is not differentiated, a frozen head for instance, costs
    no product.

    Products take both operands in the dtype of the hidden states; logits, sums and the
    gradient of the head are float32.

    On a mesh, tokens stay where their leading axis puts them, over `data` and `fsdp`.
    The heads are gathered over `fsdp` once, the vocabulary stays spread over `tensor`,
    and the gradient of the head is reduced once, after the loop. A leading axis that
    the mesh does not divide is left to the compiler.

    Args:
        objective: Gives the loss of every token, and metrics if it has them. Its leaves
            may be traced and receive their gradient. One with an attribute
            `needs_teacher` that is False is called with None for the teacher's logits.
        student_hidden: `(*tokens, d_student)`, any float dtype.
        student_head: Of a tied embedding, give the table itself: `transposed`.
        teacher_hidden: `(*tokens, d_teacher)`; receives no gradient. None only for an
            objective that needs no teacher.
        teacher_head: Receives no gradient. Of unequal vocabularies the first entries,
            as many as the smaller has, are shared: only they count, in both softmaxes.
        mask: `(*tokens,)`, bool or number; a token counts by its weight, and one of
            weight 0 contributes nothing, whatever it holds. All count when None.
        labels: `(*tokens,)`, aligned with the logits, for objectives that need them. A
            token whose label is `IGNORE_INDEX` does not count, whatever the objective;
            any other that is no entry that counts makes the loss NaN where labels are
            needed.
        chunk_size: Tokens of a chunk on a device; chosen from the number of tokens, the
            vocabulary and the platform when None.
        mesh: Where the arrays live; that of `jax.set_mesh` when None. Inside a
            `shard_map` the sums are those of the device.

    Returns:
        The sum, scalar float32, and a dict without gradient: `num_tokens`, the
        sum of the mask, and the weighted sum of each metric of the objective.

    Raises:
        TypeError: If an argument is no array, or of the wrong kind of numbers, or a
            head is no `Head`.
        ValueError: If shapes do not match, or the objective lacks labels or a teacher.

    References:
        Hsu et al., Liger Kernel, 2024 (arXiv:2410.10989): a gradient formed in the
        forward pass. Wijmans et al., Cut Your Losses, ICLR 2025 (arXiv:2411.09009).
    """
    if not getattr(objective, "needs_teacher", True):
        teacher_hidden, teacher_head = None, None
    _check_kinds(student_hidden, student_head, teacher_hidden, teacher_head)
    check_kinds(mask=mask, labels=labels)
    vocab_size = _check(
        student_hidden, student_head, teacher_hidden, teacher_head, mask, labels
    )
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise TypeError(f"need a Mesh or None for mesh, got {show(mesh)}")
    if chunk_size is not None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
            raise TypeError(f"need an int or None for chunk_size, got {chunk_size!r}")
        if chunk_size < 1:
            raise ValueError(f"need chunk_size >= 1 or None, got {chunk_size}")
    if labels is not None:
        # Entries that do not count are no labels either.
        labels = as_int32(labels)
        labels = jnp.where(labels < vocab_size, labels, -1)
    names = _trace_objective(
        objective, student_hidden, teacher_hidden, labels, vocab_size
    )
    if student_hidden.size == 0:
        # Nothing to differentiate either: the gradient of a constant is 0.
        return jnp.float32(0), {name: jnp.float32(0) for name in ("num_tokens", *names)}
    partition, platform = find_partition(mesh, student_hidden.shape[0])
    bias = student_head.bias
    bias_dtype = jnp.dtype(jnp.float32) if bias is None else bias.dtype
    static = Static(
        vocab_size,
        chunk_size,
        partition,
        platform,
        (student_hidden.dtype, student_head.kernel.dtype, bias_dtype),
    )
    moving = Moving(objective, student_hidden, student_head)
    fixed = Fixed(teacher_hidden, teacher_head, mask, labels)
    return _fused(static, moving, lax.stop_gradient(fixed))


def _check_kinds(
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: Array | None,
    teacher_head: Head | None,
) -> None:
    """Raises TypeError unless hidden states and heads are floats, in a `Head`."""
    if student_hidden is None:
        raise ValueError("need student_hidden, got None")
    check_kinds(student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    for name, head in (("student", student_head), ("teacher", teacher_head)):
        if head is None and name == "teacher":
            continue
        if not isinstance(head, Head):
            raise TypeError(
                f"need a taid_jax.loss.Head for {name}_head, such as Head(kernel) with "
                f"a kernel of shape (d_model, vocab), got {show(head)}"
            )
        kinds = {f"{name}_head.kernel": head.kernel, f"{name}_head.bias": head.bias}
        check_kinds(**kinds)
        if head.softcap is not None:
            check_positive(f"{name}_head.softcap", head.softcap)
        if not isinstance(head.vocab_size, int | np.integer | None):
            raise TypeError(
                f"need an int or None for {name}_head.vocab_size, got "
                f"{show(head.vocab_size)}"
            )


def _check(
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: Array | None,
    teacher_head: Head | None,
    mask: Array | None,
    labels: Array | None,
) -> int:
    """Returns how many entries of the vocabularies count.

    Raises:
        ValueError: With every shape in the message.
    """
    if teacher_hidden is None or teacher_head is None:
        both = [("student", student_hidden, student_head)]
    else:
        both = [
            ("student", student_hidden, student_head),
            ("teacher", teacher_hidden, teacher_head),
        ]
    got = ", ".join(
        f"{name}_hidden {hidden.shape}, {name}_head.kernel {head.kernel.shape}"
        + ("" if head.bias is None else f", bias {head.bias.shape}")
        + ("" if head.vocab_size is None else f", vocab_size {head.vocab_size}")
        + (", transposed" if head.transposed else "")
        for name, hidden, head in both
    )
    for name, array in (("mask", mask), ("labels", labels)):
        got += "" if array is None else f", {name} {array.shape}"
    tokens, sizes = student_hidden.shape[:-1], []
    for name, hidden, head in both:
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


def _trace_objective(
    objective: Objective,
    student_hidden: Array,
    teacher_hidden: Array | None,
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    static: Static, moving: Moving, fixed: Fixed
) -> tuple[Array, dict[str, Array]]:
    outcome = run(static, _NOTHING, moving, fixed)
    return outcome.loss, outcome.metrics


class _Residuals(NamedTuple):
    objective: Objective
    head: Head  # without its arrays
    gradients: Gradients


def _fused_forward(
    static: Static, moving: Any, fixed: Any
) -> tuple[tuple[Array, dict[str, Array]], _Residuals]:
    # Leaves are no arrays here: each says whether it is differentiated.
    wanted = Wanted(
        objective=any(leaf.perturbed for leaf in jax.tree.leaves(moving.objective)),
        hidden=moving.hidden.perturbed,
        kernel=moving.head.kernel.perturbed,
        bias=moving.head.bias is not None and moving.head.bias.perturbed,
    )
    moving, fixed = jax.tree.map(lambda leaf: leaf.value, (moving, fixed))
    outcome = run(static, wanted, moving, fixed)
    bare = dataclasses.replace(moving.head, kernel=None, bias=None)
    # Named, so that `jax.checkpoint` can be told to keep it: it is all the work.
    gradients = checkpoint_name(outcome.gradients, FUSED_LOSS)
    return (outcome.loss, outcome.metrics), _Residuals(
        moving.objective, bare, gradients
    )


def _fused_backward(
    static: Static, residuals: _Residuals, cotangents: tuple[Any, dict[str, Any]]
) -> tuple[Any, None]:
    in_leaves, in_hidden, in_kernel, in_bias = residuals.gradients
    hidden_dtype, kernel_dtype, bias_dtype = static.dtypes
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return None, None

    def scaled(gradient: Array | None, dtype: Any) -> Any:
        return None if gradient is None else (gradient * scale).astype(dtype)

    objective: Any = None
    if in_leaves is not None:
        leaves, tree = jax.tree.flatten(residuals.objective)
        new = iter(in_leaves)
        objective = tree.unflatten(
            scaled(next(new), jnp.result_type(leaf)) if is_smooth(leaf) else None
            for leaf in leaves
        )
    head = dataclasses.replace(
        residuals.head,
        kernel=scaled(in_kernel, kernel_dtype),
        bias=scaled(in_bias, bias_dtype),
    )
    return Moving(objective, scaled(in_hidden, hidden_dtype), head), None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)
