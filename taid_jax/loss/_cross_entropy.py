"""Cross-entropies and Kullback-Leibler divergences, with their exact gradients."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from taid_jax.loss import _softmax as softmax
from taid_jax.loss._exact import Parts, exact
from taid_jax.types import IGNORE_INDEX


def soft_cross_entropy(
    student: softmax.Row,
    target: softmax.Row,
    difference: Float[Array, "*tokens vocab"],
    gap: Float[Array, "*tokens 1"],
    kept: Float[Array, "*tokens 1"] | float = 1.0,
) -> Parts:
    """Returns `kept` times the cross-entropy of q to a target p, and `kept * (q - p)`.

    The gradient is `q * expm1(log p - log q)` where the two are close and a subtraction
    elsewhere. `log p - log q` comes from the logits' difference less the logarithm of
    `sum q exp(difference)`, which keeps all of its digits when both are small.

    Args:
        student: The row of q.
        target: The row of p; 0 at entries that the student excludes.
        difference: Logits of the target less the student's, up to a constant.
        gap: See `softmax.log_mass`.
        kept: Share of the target's mass on entries that the student does not exclude.
    """
    mean = softmax.row_sum(target.exp * student.shifted) / target.total
    value = softmax.per_token(kept * (jnp.log(student.total) - mean))

    def gradient() -> Float[Array, "*tokens vocab"]:
        log_ratio = difference - softmax.log_mass(student, target, difference, gap)
        q, p = student.exp / student.total, target.exp / target.total
        return -kept * softmax.step(q, p, log_ratio)

    return value, gradient


def forward(pair: softmax.Pair) -> Parts:
    """Returns the cross-entropy to the teacher, `-sum p log q`, in its parts."""
    return soft_cross_entropy(
        pair.student, pair.target, pair.difference, pair.gap, pair.kept
    )


def reverse(pair: softmax.Pair) -> Parts:
    """Returns `sum q (log q - log p)` over entries of finite `log p`, in its parts."""
    q = pair.student
    silent_mass = softmax.row_sum(jnp.where(pair.silent, q.exp, 0.0)) / q.total
    difference = jnp.where(pair.silent, 0.0, pair.difference)
    mean = softmax.row_sum(q.exp * difference) / q.total
    value = softmax.per_token((1 - silent_mass) * pair.constant - mean)

    def gradient() -> Float[Array, "*tokens vocab"]:
        # Without silent entries this is q * (mean - difference): the constant drops out
        # before it can cost digits.
        dropped = silent_mass - jnp.where(pair.silent, 1.0, 0.0)
        centred = (1 + pair.constant) * dropped + (mean - difference)
        return q.exp / q.total * centred

    return value, gradient


def label_entries(
    labels: Int[Array, "*tokens"], vocab: int
) -> Bool[Array, "*tokens vocab"]:
    """Returns which entry is the label; none for a label outside the vocabulary.

    A comparison, not a gather: it stays local when the vocabulary is sharded.
    """
    shape = (1,) * labels.ndim + (vocab,)
    entries = jax.lax.broadcasted_iota(labels.dtype, shape, labels.ndim)
    return entries == jnp.expand_dims(labels, -1)


def by_label(labels: Int[Array, "*tokens"], vocab: int, parts: Parts) -> Parts:
    """Returns the parts of a rule that needs labels, as the labels allow.

    A token whose label is `IGNORE_INDEX` has neither loss nor gradient, and one whose
    label is otherwise outside the vocabulary has NaN for both.
    """
    value, gradient = parts
    ignored = labels == IGNORE_INDEX
    known = (labels >= 0) & (labels < vocab)

    def select(values: Array, ignored: Array, known: Array) -> Array:
        return jnp.where(ignored, 0.0, jnp.where(known, values, jnp.nan))

    def selected() -> Float[Array, "*tokens vocab"]:
        columns = jnp.expand_dims(ignored, -1), jnp.expand_dims(known, -1)
        return select(gradient(), *columns)

    return select(value, ignored, known), selected


def _label_parts(logits: Array, labels: Array) -> Parts:
    q = softmax.normalise(logits)
    is_label = label_entries(labels, logits.shape[-1])
    shifted = softmax.row_sum(jnp.where(is_label, q.shifted, 0.0))
    # A label that is -inf in the student takes no part; NaN is not hidden.
    excluded = shifted <= softmax.FLOOR / 2
    value = softmax.per_token(jnp.where(excluded, 0.0, jnp.log(q.total) - shifted))

    def gradient() -> Float[Array, "*tokens vocab"]:
        # 1 - q of the label from the other entries: exact also where q is nearly 1.
        others = softmax.row_sum(jnp.where(is_label, 0.0, q.exp))
        in_logits = jnp.where(is_label, -others, q.exp) / q.total
        return jnp.where(excluded, 0.0, in_logits)

    return by_label(labels, logits.shape[-1], (value, gradient))


def label_cross_entropy(
    student_logits: Float[Array, "*tokens vocab"], labels: Int[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """Returns `-log q` of every token's label, in nats, with its exact gradient.

    Args:
        student_logits: `(*tokens, vocab)`, float32.
        labels: `(*tokens,)`; `IGNORE_INDEX` gives 0, and any other that is outside the
            vocabulary NaN.
    """
    return exact(_label_parts, student_logits, labels)
