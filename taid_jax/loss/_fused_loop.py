"""The loop of the fused head on one device: chunks of tokens, each over all entries.

Tokens that count are brought together first; a chunk without any does no work.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from taid_jax.loss.objective import Objective
from taid_jax.loss.reduce import select_tokens, token_metrics, weighted_sum
from taid_jax.types import IGNORE_INDEX, Head

_ENTRIES = {"cpu": 3 * 2**22, "gpu": 2**27, "tpu": 2**27}
"""Logits of a chunk, at most. A chunk reads and writes the head's gradient once, and
holds a few arrays of this size: on accelerators some 0.5 GiB each, on a CPU 48 MiB."""

Spread = Callable[[Array, int], Array]
"""Lays an axis of an array out over the devices that share the vocabulary."""


class Problem(NamedTuple):
    """What is the same for all tokens.

    Attributes:
        objective: Gives the loss of every token.
        student: Head in the dtype of the hidden states, as wide as the teacher's.
        teacher: The same of the teacher; None when the objective needs none.
        vocab_size: Entries that count, of both.
    """

    objective: Objective
    student: Head
    teacher: Head | None
    vocab_size: int


class Wanted(NamedTuple):
    """Which gradients are formed; without any, none of their work is done."""

    objective: bool
    hidden: bool
    kernel: bool
    bias: bool

    @property
    def logits(self) -> bool:
        """Whether the gradient in the logits is needed on the way to another."""
        return self.hidden or self.kernel or self.bias


class Tokens(NamedTuple):
    """What comes with every token."""

    student: Shaped[Array, "tokens d_student"]
    teacher: Shaped[Array, "tokens d_teacher"] | None
    weight: Float[Array, " tokens"]
    labels: Int[Array, " tokens"] | None


class Gradients(NamedTuple):
    """Gradients of the summed loss, float32; None where not wanted."""

    objective: list[Array] | None
    hidden: Float[Array, "*tokens d_student"] | None
    kernel: Float[Array, "..."] | None
    bias: Float[Array, " vocab"] | None


class Outcome(NamedTuple):
    """Weighted sums over the tokens of one device, and gradients of the first."""

    loss: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]
    gradients: Gradients


class _PerToken(NamedTuple):
    losses: Float[Array, " tokens"]
    metrics: dict[str, Float[Array, " tokens"]]
    hidden: Float[Array, "parts tokens d_student"] | None  # to be summed over parts


class _Sums(NamedTuple):
    objective: list[Array] | None
    kernel: Array | None
    bias: Array | None


def choose_chunk(tokens: int, vocab: int, platform: str, chunk_size: int | None) -> int:
    """Returns the tokens of a chunk, so that chunks are of about one size.

    Args:
        tokens: How many there are, at least 1.
        vocab: Entries of the head on this device.
        platform: "cpu", "gpu" or "tpu".
        chunk_size: At most this many, when not None.
    """
    if chunk_size is None:
        entries = _ENTRIES.get(platform, _ENTRIES["gpu"])
        # Powers of two divide most batches. Of fewer than 128 tokens a product spends
        # its time on reading the head.
        chunk_size = max(1 << max(entries // vocab, 1).bit_length() - 1, 128)
    return -(-tokens // -(-tokens // chunk_size))


def run_chunks(
    problem: Problem,
    tokens: Tokens,
    masked: bool,
    chunk: int,
    wanted: Wanted,
    spread: Spread = lambda array, axis: array,
    parts: int = 1,
) -> Outcome:
    """Returns the sums over the tokens of one device.

    Args:
        problem: Objective and heads.
        tokens: At least one.
        masked: Whether weights of 0 are expected. Tokens that count are then brought
            together first, and a chunk that holds none does no work.
        chunk: Tokens of a chunk.
        wanted: Which gradients are formed.
        spread: See `Spread`.
        parts: How many devices share the vocabulary.
    """
    count = tokens.weight.shape[0]
    chunks = -(-count // chunk)
    pad = chunks * chunk - count
    counted = tokens.weight != 0
    order, live = None, jnp.int32(count)
    if masked:
        order = jnp.argsort(~counted, stable=True).astype(jnp.int32)
        order = jnp.pad(order, (0, pad), constant_values=count)
        live = jnp.sum(counted.astype(jnp.int32))
    else:
        tokens = jax.tree.map(
            lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)), tokens
        )

    def work(sums: _Sums, part: Tokens) -> tuple[_Sums, _PerToken]:
        return _chunk(problem, wanted, spread, parts, sums, part)

    def body(sums: _Sums, index: Array) -> tuple[_Sums, _PerToken]:
        start = index * chunk
        if order is None:
            part = jax.tree.map(
                lambda x: lax.dynamic_slice_in_dim(x, start, chunk), tokens
            )
            return work(sums, part)
        part = _gather(tokens, lax.dynamic_slice_in_dim(order, start, chunk))
        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(work, sums, part)[1]
        )
        return lax.cond(start < live, work, lambda sums, _: (sums, nothing), sums, part)

    sums = _start(problem, wanted, spread)
    if chunks == 1:
        sums, found = body(sums, jnp.int32(0))
        found = jax.tree.map(lambda x: jnp.expand_dims(x, 0), found)
    else:
        sums, found = lax.scan(body, sums, jnp.arange(chunks, dtype=jnp.int32))
    hidden = found.hidden
    if hidden is not None:
        hidden = jnp.squeeze(hidden, 1) if parts == 1 else jnp.sum(hidden, axis=1)
    losses, metrics, hidden = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (found.losses, found.metrics, hidden)
    )
    weight = tokens.weight
    if order is not None:
        weight = jnp.take(weight, order, mode="fill", fill_value=0)
        if hidden is not None:
            place = jnp.cumsum(counted.astype(jnp.int32)) - 1
            place = jnp.clip(place, 0, hidden.shape[0] - 1)
            hidden = select_tokens(jnp.take(hidden, place, axis=0), counted)
    elif hidden is not None:
        hidden = hidden[:count]
    return Outcome(
        weighted_sum(losses, weight),
        {name: weighted_sum(x, weight) for name, x in metrics.items()},
        Gradients(sums.objective, hidden, sums.kernel, sums.bias),
    )


def _gather(tokens: Tokens, order: Int[Array, " chunk"]) -> Tokens:
    """Returns some tokens; those of weight 0 with hidden states of 0, NaN or not."""

    def take(x: Array, fill: int) -> Array:
        return jnp.take(x, order, axis=0, mode="fill", fill_value=fill)

    weight = take(tokens.weight, 0)
    student, teacher = jax.tree.map(
        lambda x: select_tokens(take(x, 0), weight), (tokens.student, tokens.teacher)
    )
    labels = None if tokens.labels is None else take(tokens.labels, IGNORE_INDEX)
    return Tokens(student, teacher, weight, labels)


def _start(problem: Problem, wanted: Wanted, spread: Spread) -> _Sums:
    """Returns the sums before the first chunk."""
    student = problem.student
    leaves = split_objective(problem.objective)[0]
    vocab, kernel = student.axes[1], None
    if wanted.kernel:
        kernel = spread(jnp.zeros(student.kernel.shape, jnp.float32), vocab)
    return _Sums(
        [jnp.zeros_like(leaf) for leaf in leaves] if wanted.objective else None,
        kernel,
        jnp.zeros(student.kernel.shape[vocab], jnp.float32) if wanted.bias else None,
    )


def is_smooth(leaf: ArrayLike) -> bool:
    """Returns whether a leaf can have a gradient: whether it is no integer or bool."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def split_objective(
    objective: Objective,
) -> tuple[list[Array], Callable[[Sequence[Array]], Objective]]:
    """Returns the leaves that can have a gradient, and what puts others in place."""
    leaves, tree = jax.tree.flatten(objective)

    def rebuild(values: Sequence[Array]) -> Objective:
        new = iter(values)
        return tree.unflatten(
            [next(new) if is_smooth(leaf) else leaf for leaf in leaves]
        )

    return [jnp.asarray(leaf) for leaf in leaves if is_smooth(leaf)], rebuild


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
        logits += jnp.expand_dims(head.bias.astype(jnp.float32), 0)
    if head.softcap is not None:
        logits = head.softcap * jnp.tanh(logits / head.softcap)
    if vocab_size < logits.shape[-1]:
        entry = lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        logits = jnp.where(entry < vocab_size, logits, -jnp.inf)
    return logits


def _chunk(
    problem: Problem,
    wanted: Wanted,
    spread: Spread,
    parts: int,
    sums: _Sums,
    tokens: Tokens,
) -> tuple[_Sums, _PerToken]:
    """Returns losses and metrics of a chunk, its gradients added to the sums."""
    student, weight, vocab_size = problem.student, tokens.weight, problem.vocab_size
    # None for an objective that asks for it: hence Any.
    teacher: Any = None
    if problem.teacher is not None and tokens.teacher is not None:
        product = _dot(
            tokens.teacher, problem.teacher.kernel, 1, problem.teacher.axes[0]
        )
        teacher = _logits(product, problem.teacher, vocab_size)
    leaves, rebuild = split_objective(problem.objective)
    product = _dot(tokens.student, student.kernel, 1, student.axes[0])

    def total(moving: tuple[list[Array], Array]) -> tuple[Array, Array]:
        leaves, product = moving
        logits = _logits(product, student, vocab_size)
        losses = rebuild(leaves)(logits, teacher, tokens.labels).astype(jnp.float32)
        return weighted_sum(losses, weight), losses

    in_leaves, in_product = None, None
    if wanted.objective or wanted.logits:
        # What is not wanted of the two is not computed: nobody reads it.
        _, pull, losses = jax.vjp(total, (leaves, product), has_aux=True)
        in_leaves, in_product = pull(jnp.float32(1))[0]
    else:
        _, losses = total((leaves, product))
    metrics = token_metrics(
        problem.objective, _logits(product, student, vocab_size), teacher, tokens.labels
    )
    if sums.objective is not None and in_leaves is not None:
        added = [a + b for a, b in zip(sums.objective, in_leaves, strict=True)]
        sums = sums._replace(objective=added)
    in_hidden = None
    if wanted.logits and in_product is not None:
        # A token of weight 0 has slope 0 times its own, which may be infinite.
        in_logits = select_tokens(in_product, weight).astype(tokens.student.dtype)
        sums = _add_head(sums, in_logits, tokens.student, student, parts)
        if wanted.hidden:
            in_hidden = _hidden_gradient(in_logits, student, spread, parts)
    return sums, _PerToken(losses, metrics, in_hidden)


def _add_head(
    sums: _Sums, in_logits: Array, hidden: Array, student: Head, parts: int
) -> _Sums:
    """Returns the sums with the gradients of the head added."""
    kernel, bias = sums.kernel, sums.bias
    if kernel is not None:
        pair = (in_logits, hidden) if student.transposed else (hidden, in_logits)
        kernel += _dot(*pair, 0, 0)
        if student.transposed and parts == 1:
            # A TPU may otherwise add up the table's gradient transposed, and copy it
            # at the end.
            kernel = with_layout_constraint(kernel, Layout((0, 1)))
    if bias is not None:
        # A product: on a CPU a sum over the first axis is slow.
        ones = jnp.ones((1, in_logits.shape[0]), in_logits.dtype)
        bias += jnp.squeeze(_dot(ones, in_logits, 1, 0), 0)
    return sums._replace(kernel=kernel, bias=bias)


def _hidden_gradient(
    in_logits: Float[Array, "tokens vocab"], student: Head, spread: Spread, parts: int
) -> Float[Array, "parts tokens d_model"]:
    """Returns the gradient of the hidden states from each part of the vocabulary.

    Devices that share the vocabulary would have to add up their parts in every chunk;
    as a leading axis of the result the parts stay where they are.
    """
    kernel, vocab = student.kernel, student.axes[1]
    if parts == 1:
        return jnp.expand_dims(_dot(in_logits, kernel, 1, vocab), 0)
    model = kernel.shape[1 - vocab]
    in_logits = in_logits.reshape(in_logits.shape[0], parts, -1)
    shape = (parts, -1, model) if vocab == 0 else (model, parts, -1)
    contracted = ((2,), (1 if vocab == 0 else 2,))
    product = lax.dot_general(
        in_logits,
        kernel.reshape(shape),
        (contracted, ((1,), (vocab,))),
        preferred_element_type=jnp.float32,
    )
    return spread(product, 0)
