"""Divergences between the student's and the teacher's distribution."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from taid_jax.loss import softmax
from taid_jax.loss.objective import check_setting, check_shapes, register_objective


def _forward_value(
    q: softmax.Normalised, p: softmax.Normalised, kept: Array
) -> Float[Array, "*tokens"]:
    loss = kept * jnp.log(q.total) - softmax.row_sum(p.exp * q.shifted) / p.total
    return jnp.squeeze(loss, -1)


@jax.custom_jvp
def _forward_kl(student: Array, teacher: Array) -> Array:
    s, u = softmax.finite(student), softmax.finite(teacher)
    q, p = softmax.normalise(s), softmax.normalise(u)
    p = p._replace(exp=jnp.where(softmax.excluded(s), 0.0, p.exp))
    return _forward_value(q, p, softmax.row_sum(p.exp) / p.total)


@_forward_kl.defjvp
def _forward_kl_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    s, u = map(softmax.finite, primals)
    q, p = softmax.normalise(s), softmax.normalise(u)
    p = p._replace(exp=jnp.where(softmax.excluded(s), 0.0, p.exp))
    kept = softmax.row_sum(p.exp) / p.total
    offset = p.top - q.top
    difference = (u - s) - offset
    valid = p._replace(total=softmax.row_sum(p.exp))
    ratio = difference - softmax.log_mass_ratio(q, valid, difference, offset)
    gradient = kept * softmax.softmax_difference(q, valid, ratio)
    return _forward_value(q, p, kept), jnp.sum(gradient * tangents[0], -1)


@register_objective
@dataclasses.dataclass(frozen=True)
class ForwardKL:
    """Cross-entropy to the teacher, in nats per token: KL without its constant.

    Attributes:
        temperature: Both rows of logits are divided by it, and the loss is multiplied
            by its square. A traced leaf without gradient.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """

    temperature: ArrayLike = 1.0

    def __post_init__(self) -> None:
        check_setting("temperature", self.temperature, 1e-3, 1e3)

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> Float[Array, "*tokens"]:
        """Returns the loss of every token; see `Objective`."""
        check_shapes(student_logits, teacher_logits, labels)
        temperature = jax.lax.stop_gradient(jnp.asarray(self.temperature, jnp.float32))
        student = student_logits.astype(jnp.float32) / temperature
        teacher = teacher_logits.astype(jnp.float32) / temperature
        return temperature**2 * _forward_kl(student, teacher)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "..."],
        labels: Int[Array, "..."] | None = None,
    ) -> dict[str, Float[Array, "..."]]:
        """Returns `kl`, KL(teacher || student) of every token at temperature 1."""
        del labels
        s, u = softmax.finite(student_logits), softmax.finite(teacher_logits)
        q, p = softmax.normalise(s), softmax.normalise(u)
        exp = jnp.where(softmax.excluded(s), 0.0, p.exp)
        gap = (u - s) - (p.top - q.top)
        kl = (softmax.row_sum(exp * gap)) / p.total - jnp.log(p.total / q.total)
        return {"kl": jnp.maximum(jnp.squeeze(kl, -1), 0.0)}
