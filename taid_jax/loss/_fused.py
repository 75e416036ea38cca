"""The fused head: hidden states and two heads to any objective, without the logits.

Tokens go through one scan in chunks, each over the whole vocabulary, those that count
first; the gradient of a chunk is formed with its value.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Float, Int, Shaped

from taid_jax.errors import show
from taid_jax.loss._checks import as_int32
from taid_jax.loss._fused_checks import check_arguments, trace_objective
from taid_jax.loss._fused_chunk import Static, is_smooth
from taid_jax.loss._fused_mesh import (
    Fixed,
    Gradients,
    Moving,
    Outcome,
    find_partition,
    over_mesh,
)
from taid_jax.loss._fused_scan import sum_tokens
from taid_jax.loss._objective import Objective
from taid_jax.loss._teachers import TeacherHead, Teachers, as_rows
from taid_jax.loss._topk import TopK
from taid_jax.types import Head


def fused_loss(
    objective: Objective,
    student_hidden: Float[Array, "*tokens d_student"],
    student_head: Head,
    teacher_hidden: Float[Array, "..."] | TopK | Teachers | None,
    teacher_head: TeacherHead,
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

    What the backward pass needs is named "fused_loss", for a policy of
    `jax.checkpoint`: under one that saves nothing, the value is computed twice.

    Args:
        objective: Gives the loss of every token, and metrics if it has them. Its leaves
            may be traced and receive their gradient. One with an attribute
            `needs_teacher` that is False is called with None for the teacher's logits.
        student_hidden: `(*tokens, d_student)`, any float dtype.
        student_head: Pass the embedding table itself for a tied head: `transposed`.
        teacher_hidden: `(*tokens, d_teacher)`; receives no gradient. `TopK` with a
            `TopKHead`, whose rows are made in each chunk; `Teachers` with a
            `TeachersHead` for several. None only for an objective that needs none.
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

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from taid_jax.loss import TAID, Head, fused_loss
        >>> hidden, kernel = jnp.ones((3, 2)), jnp.eye(2, 5)
        >>> teacher = jnp.ones((3, 4)), Head(jnp.eye(4, 5))
        >>> def mean(hidden, kernel):
        ...     total, sums = fused_loss(TAID(0.5), hidden, Head(kernel), *teacher)
        ...     return total / sums["num_tokens"]
        >>> value, gradients = jax.value_and_grad(mean, (0, 1))(hidden, kernel)
        >>> print(f"{value:.3f}", gradients[1].shape)
        1.574 (2, 5)

    References:
        Hsu et al., Liger Kernel, 2024 (arXiv:2410.10989): a gradient formed in the
        forward pass. Wijmans et al., Cut Your Losses, ICLR 2025 (arXiv:2411.09009).
    """
    if not getattr(objective, "needs_teacher", True):
        teacher_hidden, teacher_head = None, None
    vocab_size = check_arguments(
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
    names = trace_objective(
        objective, student_hidden, teacher_hidden, labels, vocab_size
    )
    if student_hidden.size == 0:
        # Nothing to differentiate either: the gradient of a constant is 0.
        return jnp.float32(0), {name: jnp.float32(0) for name in ("num_tokens", *names)}
    partition, platform, once = find_partition(mesh, student_hidden.shape[0])
    static = Static(vocab_size, chunk_size, partition, platform, once, tuple(names))
    moving = Moving(objective, student_hidden, student_head)
    fixed = Fixed(*as_rows(teacher_hidden, teacher_head), mask, labels)
    return _fused(static, moving, lax.stop_gradient(fixed))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    static: Static, moving: Moving, fixed: Fixed
) -> tuple[Array, dict[str, Array]]:
    nothing = Gradients(False, False, False, False)
    outcome = _run(static, nothing, moving, fixed)
    return outcome.loss, outcome.metrics


def _fused_forward(
    static: Static, moving: Any, fixed: Any
) -> tuple[tuple[Array, dict[str, Array]], tuple[Gradients, Moving]]:
    # Leaves are no arrays here: each says whether it is differentiated.
    wanted = Gradients(
        objective=any(leaf.perturbed for leaf in jax.tree.leaves(moving.objective)),
        hidden=moving.hidden.perturbed,
        kernel=moving.head.kernel.perturbed,
        bias=moving.head.bias is not None and moving.head.bias.perturbed,
    )
    moving, fixed = jax.tree.map(lambda leaf: leaf.value, (moving, fixed))
    outcome = _run(static, wanted, moving, fixed)
    # Named, so that `jax.checkpoint` can be told to keep it: it is all the work.
    gradients = checkpoint_name(outcome.gradients, "fused_loss")
    # Of the arguments only the dtypes are needed; none is kept.
    like = jax.tree.map(lambda x: jnp.zeros((), jnp.result_type(x)), moving)
    return (outcome.loss, outcome.metrics), (gradients, like)


def _fused_backward(
    static: Static, residuals: tuple[Gradients, Moving], cotangents: tuple[Any, Any]
) -> tuple[Any, None]:
    gradients, like = residuals
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return None, None

    def scaled(gradient: Array | None, like: Any) -> Any:
        if gradient is None or like is None:
            return None
        return (gradient * scale).astype(like.dtype)

    objective: Any = None
    if gradients.objective is not None:
        leaves, tree = jax.tree.flatten(like.objective)
        new = iter(gradients.objective)
        objective = tree.unflatten(
            [scaled(next(new), leaf) if is_smooth(leaf) else None for leaf in leaves]
        )
    head = dataclasses.replace(
        like.head,
        kernel=scaled(gradients.kernel, like.head.kernel),
        bias=scaled(gradients.bias, like.head.bias),
    )
    return Moving(objective, scaled(gradients.hidden, like.hidden), head), None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(static: Static, wanted: Gradients, moving: Moving, fixed: Fixed) -> Outcome:
    local = functools.partial(sum_tokens, static, wanted)
    return over_mesh(local, static.partition, moving, fixed)
