"""The fused head: hidden states and two heads to any objective, without the logits.

Tokens go through one scan in chunks, each over the whole vocabulary, those that count
first; the gradient of a chunk is formed with its value.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from taid_jax.errors import show
from taid_jax.loss._checks import as_int32, check_kinds, check_positive
from taid_jax.loss._fused_mesh import (
    Fixed,
    Gradients,
    Moving,
    Outcome,
    Partition,
    find_partition,
    over_mesh,
    spread_vocabulary,
)
from taid_jax.loss._objective import Objective
from taid_jax.loss._one_pass import one_pass
from taid_jax.loss._reduce import (
    select_tokens,
    token_metrics,
    token_weights,
    weighted_sum,
)
from taid_jax.loss._teachers import (
    TeacherHead,
    TeacherOut,
    Teachers,
    TeachersHead,
    heads_of,
    map_heads,
    map_rows,
)
from taid_jax.loss._topk import TopK, TopKHead
from taid_jax.types import Head

_ENTRIES = {"cpu": 3 * 2**22, "gpu": 2**27, "tpu": 2**27}
"""Logits of a chunk, at most. A chunk reads and writes the head's gradient once, and
holds a few arrays of this size: on accelerators some 0.5 GiB each, on a CPU 48 MiB."""


_CPU_ROWS = 2**19
"""Logits of a group of rows on a CPU: two megabytes, which stay in a core's cache from
one operation of the objective to the next. Measured: forward KL at 1,024 x 256 x 32,000
takes 12% less time than with whole chunks."""


class _Static(NamedTuple):
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
    partition, platform, once = find_partition(mesh, student_hidden.shape[0])
    static = _Static(vocab_size, chunk_size, partition, platform, once, tuple(names))
    moving = Moving(objective, student_hidden, student_head)
    fixed = Fixed(teacher_hidden, teacher_head, mask, labels)
    return _fused(static, moving, lax.stop_gradient(fixed))


def _check_kinds(
    student_hidden: Array,
    student_head: Head,
    teacher_hidden: TeacherOut,
    teacher_head: TeacherHead,
) -> None:
    """Raises TypeError unless hidden states and heads are floats, in a `Head`."""
    if student_hidden is None:
        raise ValueError("need student_hidden, got None")
    check_kinds(student_hidden=student_hidden)
    if isinstance(teacher_hidden, Teachers) and isinstance(teacher_head, TeachersHead):
        check_kinds(weights=teacher_hidden.weights)
        for each in zip(teacher_hidden.rows, teacher_head.heads, strict=False):
            _check_kinds(student_hidden, student_head, *each)
        return
    if isinstance(teacher_hidden, TopK):
        check_kinds(logprobs=teacher_hidden.logprobs, tail=teacher_hidden.tail)
    elif not isinstance(teacher_hidden, Teachers):
        check_kinds(teacher_hidden=teacher_hidden)
    for rows, head in ((TopK, TopKHead), (Teachers, TeachersHead)):
        if isinstance(teacher_hidden, rows) != isinstance(teacher_head, head):
            raise TypeError(
                f"need {rows.__name__} for teacher_hidden with a {head.__name__} for "
                f"teacher_head, got {type(teacher_hidden).__name__} with "
                f"{type(teacher_head).__name__}"
            )
    for name, head in (("student", student_head), ("teacher", teacher_head)):
        if name == "teacher" and (head is None or isinstance(head, TopKHead)):
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
    teacher_hidden: TeacherOut,
    teacher_head: TeacherHead,
    mask: Array | None,
    labels: Array | None,
) -> int:
    """Returns how many entries of the vocabularies count.

    Raises:
        ValueError: With every shape in the message.
    """
    if isinstance(teacher_hidden, Teachers) and isinstance(teacher_head, TeachersHead):
        rows, heads = teacher_hidden.rows, teacher_head.heads
        wanted = (*student_hidden.shape[:-1], len(heads))
        if not len(rows) == len(heads) > 0 or teacher_hidden.weights.shape != wanted:
            raise ValueError(
                "need rows and a head of each teacher, and weights of shape (*tokens, "
                f"teachers), got {len(rows)} rows, {len(heads)} heads and weights "
                f"{teacher_hidden.weights.shape} beside student_hidden "
                f"{student_hidden.shape}"
            )
        return min(
            _check(student_hidden, student_head, *each, mask, labels)
            for each in zip(rows, heads, strict=True)
        )
    if isinstance(teacher_hidden, TopK) and isinstance(teacher_head, TopKHead):
        tokens, rows = student_hidden.shape[:-1], teacher_hidden
        shapes = rows.ids.shape, rows.logprobs.shape, rows.tail.shape
        wanted = (*tokens, rows.ids.shape[-1])
        if shapes != (wanted, wanted, tokens) or teacher_head.vocab_size < 1:
            raise ValueError(
                "need ids and logprobs of shape (*tokens, k), tail of shape (*tokens,) "
                f"and vocab_size >= 1, got {shapes}, tokens {tokens} and vocab_size "
                f"{teacher_head.vocab_size}"
            )
        own = _check(student_hidden, student_head, None, None, mask, labels)
        return min(own, teacher_head.vocab_size)
    if not isinstance(teacher_hidden, Array) or not isinstance(teacher_head, Head):
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(
    static: _Static, moving: Moving, fixed: Fixed
) -> tuple[Array, dict[str, Array]]:
    nothing = Gradients(False, False, False, False)
    outcome = _run(static, nothing, moving, fixed)
    return outcome.loss, outcome.metrics


def _fused_forward(
    static: _Static, moving: Any, fixed: Any
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
    static: _Static, residuals: tuple[Gradients, Moving], cotangents: tuple[Any, Any]
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
            [scaled(next(new), leaf) if _is_smooth(leaf) else None for leaf in leaves]
        )
    head = dataclasses.replace(
        like.head,
        kernel=scaled(gradients.kernel, like.head.kernel),
        bias=scaled(gradients.bias, like.head.bias),
    )
    return Moving(objective, scaled(gradients.hidden, like.hidden), head), None


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(static: _Static, wanted: Gradients, moving: Moving, fixed: Fixed) -> Outcome:
    local = functools.partial(_local, static, wanted)
    return over_mesh(local, static.partition, moving, fixed)


def _sizes(tokens: int, vocab: int, static: _Static) -> tuple[int, int]:
    """Returns the tokens of a chunk, and of a group of its rows; the last may be more.

    Args:
        tokens: How many there are on a device, at least 1.
        vocab: Entries of the head on a device.
        static: Has the platform, and the size that was asked for.
    """

    def largest(entries: int) -> int:
        # Powers of two divide most batches.
        return 1 << max(entries // vocab, 1).bit_length() - 1

    chunk = static.chunk_size
    if chunk is None:
        # Of fewer tokens, a product spends its time on reading the head.
        chunk = max(largest(_ENTRIES.get(static.platform, _ENTRIES["gpu"])), 128)
    # Chunks of about one size.
    chunk = -(-tokens // -(-tokens // chunk))
    rows = largest(_CPU_ROWS) if static.platform == "cpu" else chunk
    return (chunk, rows) if rows >= chunk else (-(-chunk // rows) * rows, rows)


class _Tokens(NamedTuple):
    """What comes with every token."""

    student: Shaped[Array, "tokens d_student"]
    teacher: TeacherOut
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


class _Problem(NamedTuple):
    """What is the same for all chunks.

    Attributes:
        objective: Gives the loss of every token.
        student: Head in the dtype of the hidden states, as wide as the teacher's.
        teacher: The same of the teacher, or what makes its rows; None when the
            objective needs none.
        vocab_size: Entries that count, of both.
        wanted: Which gradients are formed; none of the others' work is done.
        partition: Of the mesh, if there is one.
        parts: How many devices share the vocabulary.
        rows: Tokens that the objective takes at once.
        one_pass: Whether it should read them once for all of its sums.
        platform: "cpu", "gpu" or "tpu".
    """

    objective: Objective
    student: Head
    teacher: TeacherHead
    vocab_size: int
    wanted: Gradients
    partition: Partition | None
    parts: int
    rows: int
    one_pass: bool
    platform: str


def _local(
    static: _Static,
    wanted: Gradients,
    partition: Partition | None,
    moving: Moving,
    fixed: Fixed,
) -> Outcome:
    """Returns the sums over the tokens of one device; the heads are whole."""
    hidden, vocab = moving.hidden, moving.head.axes[1]
    entries = width = moving.head.kernel.shape[vocab]
    for head in heads_of(fixed.head):
        width = min(width, head.kernel.shape[head.axes[1]])

    def cut(head: Head, dtype: Any) -> Head:
        axis = head.axes[1]
        kernel = lax.slice_in_dim(head.kernel, 0, width, axis=axis).astype(dtype)
        bias = None if head.bias is None else head.bias[:width].astype(jnp.float32)
        kernel = spread_vocabulary(kernel, axis, partition)
        return dataclasses.replace(head, kernel=kernel, bias=bias)

    student = cut(moving.head, hidden.dtype)
    teacher = map_heads(lambda x, head: cut(head, x.dtype), fixed.hidden, fixed.head)
    tensor = 1 if partition is None else partition.tensor
    parts = 1 if width % tensor else tensor
    weight = token_weights(fixed.mask, hidden.shape[:-1], fixed.labels)
    tokens = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[weight.ndim :]),
        _Tokens(hidden, fixed.hidden, weight, fixed.labels),
    )
    chunk, rows = _sizes(weight.size, -(-width // tensor), static)
    problem = _Problem(
        moving.objective,
        student,
        teacher,
        static.vocab_size,
        wanted,
        partition,
        parts,
        rows,
        static.one_pass,
        static.platform,
    )
    masked = fixed.mask is not None or fixed.labels is not None
    sums, in_hidden = _scan(problem, static.metrics, tokens, chunk, masked)
    if in_hidden is not None:
        in_hidden = in_hidden.reshape(hidden.shape)
    in_kernel, in_bias = sums.gradients.kernel, sums.gradients.bias
    if entries > width:
        rest = (0, entries - width)
        if in_kernel is not None:
            pads = [rest if axis == vocab else (0, 0) for axis in (0, 1)]
            in_kernel = jnp.pad(in_kernel, pads)
        in_bias = None if in_bias is None else jnp.pad(in_bias, rest)
    metrics = {"num_tokens": jnp.sum(weight), **sums.metrics}
    gradients = Gradients(sums.gradients.objective, in_hidden, in_kernel, in_bias)
    return Outcome(sums.loss, metrics, gradients)


def _scan(
    problem: _Problem,
    metrics: tuple[str, ...],
    tokens: _Tokens,
    chunk: int,
    masked: bool,
) -> tuple[Outcome, Float[Array, "tokens d_student"] | None]:
    """Returns the sums over tokens, and the gradient of their hidden states.

    Args:
        problem: Objective and heads.
        metrics: Names of the objective's.
        tokens: At least one.
        chunk: Tokens of a chunk.
        masked: Whether weights of 0 are expected. Tokens that count are then brought
            together first, and a chunk that holds none does no work.
    """
    count = tokens.weight.size
    chunks = -(-count // chunk)
    live, order = jnp.int32(count), None
    if masked:
        order = jnp.argsort(tokens.weight == 0, stable=True).astype(jnp.int32)
        live = jnp.sum(tokens.weight != 0, dtype=jnp.int32)
        tokens = jax.tree.map(lambda x: jnp.take(x, order, axis=0), tokens)
        student, teacher = jax.tree.map(
            lambda x: select_tokens(x, tokens.weight), (tokens.student, tokens.teacher)
        )
        tokens = tokens._replace(student=student, teacher=teacher)

    def in_chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(chunks, chunk, *x.shape[1:])

    def work(sums: Outcome, part: _Tokens) -> tuple[Outcome, Array | None]:
        return _chunk(problem, sums, part)

    def body(sums: Outcome, x: tuple[Array, _Tokens]) -> tuple[Outcome, Array | None]:
        start, part = x
        if not masked:
            return work(sums, part)
        nothing = jax.tree.map(
            lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(work, sums, part)[1]
        )

        def skip(sums: Outcome, _: _Tokens) -> tuple[Outcome, Array | None]:
            return _touched(problem, sums), nothing

        return lax.cond(start < live, work, skip, sums, part)

    starts = chunk * jnp.arange(chunks, dtype=jnp.int32)
    sums, in_hidden = lax.scan(
        body, _zeros(problem, metrics), (starts, jax.tree.map(in_chunks, tokens))
    )
    if in_hidden is None:
        return sums, None
    if problem.parts > 1:
        in_hidden = jnp.sum(in_hidden, axis=1)
    in_hidden = in_hidden.reshape(chunks * chunk, -1)[:count]
    if order is not None:
        in_hidden = jnp.take(in_hidden, jnp.argsort(order), axis=0)
    return sums, in_hidden


def _touched(problem: _Problem, sums: Outcome) -> Outcome:
    """Returns the same sums, of which the head's gradient seems to be another on a GPU.

    A branch that gives back what it was given makes XLA for GPUs copy it once in every
    chunk. One that writes into it, as the other branch does, has it in place.
    """
    kernel, axis = sums.gradients.kernel, problem.student.axes[0]
    if kernel is None or problem.platform != "gpu":
        return sums
    # Along d_model: the vocabulary may be spread.
    first = lax.slice_in_dim(kernel, 0, 1, axis=axis)
    kernel = lax.dynamic_update_slice_in_dim(kernel, first, 0, axis)
    return sums._replace(gradients=sums.gradients._replace(kernel=kernel))


def _zeros(problem: _Problem, metrics: tuple[str, ...]) -> Outcome:
    """Returns the sums before the first chunk."""
    student, wanted, zero = problem.student, problem.wanted, jnp.float32(0)
    leaves, kernel = jax.tree.leaves(problem.objective), None
    vocab = student.kernel.shape[student.axes[1]]
    if wanted.kernel:
        kernel = jnp.zeros(student.kernel.shape, jnp.float32)
        kernel = spread_vocabulary(kernel, student.axes[1], problem.partition)
    smooth = [jnp.zeros_like(jnp.asarray(x)) for x in leaves if _is_smooth(x)]
    gradients = Gradients(
        smooth if wanted.objective else None,
        None,
        kernel,
        jnp.zeros(vocab, jnp.float32) if wanted.bias else None,
    )
    sums: dict[str, Any] = dict.fromkeys(metrics, zero)
    return Outcome(zero, sums, gradients)


def _is_smooth(leaf: ArrayLike) -> bool:
    """Returns whether a leaf can have a gradient: whether it is no integer or bool."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Returns the float32 product of two matrices over one axis of each."""
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _logits(
    product: Float[Array, "tokens vocab"], head: Head, vocab_size: int
) -> Float[Array, "tokens vocab"]:
    """Returns the logits of a head, -inf where an entry does not count."""
    logits = product
    if head.bias is not None:
        logits += jnp.expand_dims(head.bias, 0)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if vocab_size < logits.shape[-1]:
        entry = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(entry < vocab_size, logits, -jnp.inf)
    return logits


class _Found(NamedTuple):
    """Sums over some tokens, and the gradient in the leaves of the objective."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    objective: list[Array]


class _Rows(NamedTuple):
    """Products of some tokens with both heads, and what comes with each."""

    student: Float[Array, "tokens vocab"]
    teacher: TeacherOut
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


def _chunk(
    problem: _Problem, sums: Outcome, tokens: _Tokens
) -> tuple[Outcome, Array | None]:
    """Returns the sums with a chunk added, and the gradient of its hidden states."""
    student, teacher, wanted = problem.student, problem.teacher, problem.wanted
    product = _dot(tokens.student, student.kernel, 1, student.axes[0])
    teacher_rows = map_rows(
        lambda x, head: _dot(x, head.kernel, 1, head.axes[0]), tokens.teacher, teacher
    )
    rows = _Rows(product, teacher_rows, tokens.weight, tokens.labels)
    found, in_product = _evaluate(problem, rows)
    in_logits = in_product.astype(tokens.student.dtype)
    objective, _, kernel, bias = sums.gradients
    if objective is not None:
        objective = [a + b for a, b in zip(objective, found.objective, strict=True)]
    if kernel is not None:
        pair = (in_logits, tokens.student)
        pair = pair if student.transposed else pair[::-1]
        kernel += _dot(pair[0], pair[1], 0, 0)
        if student.transposed and problem.parts == 1:
            # A TPU may otherwise add up the table's gradient transposed, and copy it
            # at the end.
            kernel = with_layout_constraint(kernel, Layout((0, 1)))
    if bias is not None:
        bias += jnp.sum(in_product, axis=0)
    metrics = jax.tree.map(jnp.add, sums.metrics, found.metrics)
    gradients = Gradients(objective, None, kernel, bias)
    in_hidden = _hidden_gradient(problem, in_logits) if wanted.hidden else None
    return Outcome(sums.loss + found.loss, metrics, gradients), in_hidden


def _evaluate(
    problem: _Problem, rows: _Rows
) -> tuple[_Found, Float[Array, "tokens vocab"]]:
    """Returns the sums over tokens, and their gradient in the student's product."""
    size = problem.rows
    if size >= rows.weight.size:
        return _evaluate_group(problem, rows)
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)

    def add(sums: _Found, group: _Rows) -> tuple[_Found, Array]:
        found, in_product = _evaluate_group(problem, group)
        return jax.tree.map(jnp.add, sums, found), in_product

    first = jax.tree.map(lambda x: x[0], groups)
    like = jax.eval_shape(functools.partial(_evaluate_group, problem), first)[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    found, in_product = lax.scan(add, zeros, groups)
    return found, in_product.reshape(rows.student.shape)


def _evaluate_group(
    problem: _Problem, rows: _Rows
) -> tuple[_Found, Float[Array, "tokens vocab"]]:
    teacher = _teacher_logits(problem, rows.student, rows.teacher, problem.teacher)
    leaves, tree = jax.tree.flatten(problem.objective)

    def total(
        smooth: list[Array], product: Array
    ) -> tuple[Array, dict[str, Float[Array, ""]]]:
        new = iter(smooth)
        objective = tree.unflatten([next(new) if _is_smooth(x) else x for x in leaves])
        logits = _logits(product, problem.student, problem.vocab_size)
        with one_pass(problem.one_pass):
            losses = objective(logits, teacher, rows.labels)
            metrics = token_metrics(objective, logits, teacher, rows.labels)
        sums = {name: weighted_sum(x, rows.weight) for name, x in metrics.items()}
        return weighted_sum(losses, rows.weight), sums

    smooth = [jnp.asarray(x) for x in leaves if _is_smooth(x)]
    # What is not wanted of the gradients is not computed: nobody reads it.
    value, pull, metrics = jax.vjp(total, smooth, rows.student, has_aux=True)
    in_leaves, in_product = pull(jnp.float32(1))
    # A token of weight 0 has slope 0 times its own, which may be infinite.
    in_product = select_tokens(in_product, rows.weight)
    return _Found(value, metrics, in_leaves), in_product


def _teacher_logits(
    problem: _Problem, student: Array, rows: TeacherOut, head: TeacherHead
) -> Any:
    """Returns a teacher's logits, or those of several; None where there is none."""
    if isinstance(rows, Teachers) and isinstance(head, TeachersHead):
        pairs = zip(rows.rows, head.heads, strict=True)
        made = [_teacher_logits(problem, student, *pair) for pair in pairs]
        return head.mix(made, rows.weights)
    if isinstance(rows, TopK) and isinstance(head, TopKHead):
        own = _logits(student, problem.student, problem.vocab_size)
        return head.logits(rows, own)
    if isinstance(rows, Array) and isinstance(head, Head):
        return _logits(rows, head, problem.vocab_size)
    return None


def _hidden_gradient(
    problem: _Problem, in_logits: Float[Array, "tokens vocab"]
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
    return spread_vocabulary(product, 0, problem.partition)
