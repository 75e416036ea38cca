"""How far a student is from its teacher on text that neither was trained on here."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from taid_jax.loss import CrossEntropy
from taid_jax.sharding import place_batch
from taid_jax.train.step import EvalStep
from taid_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Comparison:
    """KL(teacher || student) of a token at temperature 1, and both models' surprise.

    An objective like any other, so that it runs through the fused head.
    """

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> Float32[Array, "*tokens"]:
        """Returns KL(teacher || student) in nats per token, `(*tokens,)`."""
        student = jax.nn.log_softmax(student_logits.astype(jnp.float32))
        teacher = jax.nn.log_softmax(teacher_logits.astype(jnp.float32))
        probability = jnp.exp(teacher)
        # An entry that either side excludes has no share in the divergence.
        counts = (probability > 0) & (student_logits > -jnp.inf)
        gap = jnp.where(counts, teacher - student, 0.0)
        return jnp.sum(probability * gap, axis=-1)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> dict[str, Float32[Array, "*tokens"]]:
        """Returns `student_nll` and `teacher_nll`, nats per token, `(*tokens,)`."""
        nll = CrossEntropy()
        return {
            "student_nll": nll(student_logits, teacher_logits, labels),
            "teacher_nll": nll(teacher_logits, student_logits, labels),
        }


class HeldOut(NamedTuple):
    """What one evaluation found, over `tokens` counted tokens.

    Attributes:
        kl: Mean KL(teacher || student) at temperature 1, nats per token.
        student_perplexity: Exponential of the student's mean cross-entropy.
        teacher_perplexity: Exponential of the teacher's mean cross-entropy.
        tokens: Tokens that counted.
    """

    kl: float
    student_perplexity: float
    teacher_perplexity: float
    tokens: int


def evaluate(
    eval_step: EvalStep,
    params: Params,
    teacher_params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> HeldOut:
    """Returns KL and perplexities over `batches`, weighted by token.

    Args:
        eval_step: `make_eval_step(student, teacher, Comparison())`.
        params: The student's parameters; nothing is changed.
        teacher_params: The teacher's.
        batches: Held-out batches of one shape.
        mesh: Where they go.

    Raises:
        ValueError: If no token counts.
    """
    total: dict[str, float] = {}
    for batch in batches:
        sums = eval_step(params, teacher_params, place_batch(batch, mesh))
        for key, value in sums.items():
            # Python floats are float64: long sums of float32 batches stay exact enough.
            total[key] = total.get(key, 0.0) + float(value)
    weight = total.get("weight", 0.0)
    if not weight:
        raise ValueError("the held-out batches have no counted token")

    def perplexity(nll: float) -> float:
        try:
            return math.exp(nll / weight)
        except OverflowError:
            return math.inf

    return HeldOut(
        kl=total["loss"] / weight,
        student_perplexity=perplexity(total["student_nll"]),
        teacher_perplexity=perplexity(total["teacher_nll"]),
        tokens=round(weight),
    )
