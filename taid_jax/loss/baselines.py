"""Objectives from other families: next-token cross-entropy, DKD, CTKD."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from taid_jax.loss import softmax
from taid_jax.loss.objective import check_shapes, need_labels, register_objective


def _label_entries(labels: Int[Array, "*tokens"], vocab: int) -> Array:
    # A comparison, not a gather: it stays local when the vocabulary is sharded.
    return jnp.arange(vocab, dtype=labels.dtype) == labels[..., None]


def _nll(q: softmax.Normalised, is_label: Array) -> tuple[Array, Array]:
    shifted = softmax.row_sum(jnp.where(is_label, q.shifted, 0.0))
    known = shifted > 0.5 * softmax.FLOOR
    loss = jnp.where(known, jnp.log(q.total) - shifted, 0.0)
    return jnp.squeeze(loss, -1), known


@jax.custom_jvp
def _cross_entropy(student: Array, labels: Array) -> Array:
    q = softmax.normalise(softmax.finite(student))
    return _nll(q, _label_entries(labels, student.shape[-1]))[0]


@_cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    student, labels = primals
    q = softmax.normalise(softmax.finite(student))
    is_label = _label_entries(labels, student.shape[-1])
    loss, known = _nll(q, is_label)
    others = softmax.row_sum(jnp.where(is_label, 0.0, q.exp))
    gradient = jnp.where(is_label, -others, q.exp) * (known / q.total)
    return loss, jnp.sum(gradient * tangents[0], -1)


@register_objective
@dataclasses.dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy to the labels, in nats per token; no teacher needed."""

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."] | None,
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(
            student_logits,
            student_logits if teacher_logits is None else teacher_logits,
            labels,
        )
        labels = need_labels("CrossEntropy", student_logits, labels)
        return _cross_entropy(student_logits.astype(jnp.float32), labels)
