"""How far a student is from its teacher on text that neither was trained on here."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from taid_jax.errors import ModelError
from taid_jax.loss import CrossEntropy, ForwardKL
from taid_jax.loss._objective import Objective, register_objective
from taid_jax.settings import SelectionMetric
from taid_jax.sharding import place_batch
from taid_jax.train.state import DistillState
from taid_jax.train.step import MakeObjective, Metrics, batch_loss
from taid_jax.types import Batch, ModelFunctions, Params

JudgeStep = Callable[[DistillState, Params, Batch], Metrics]


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
        return ForwardKL().metrics(student_logits, teacher_logits)["kl_teacher"]

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


@register_objective
@dataclasses.dataclass(frozen=True)
class Judging:
    """`Comparison`, with the run's own objective as a further metric of the same pass.

    Attributes:
        objective: What the student is taught by.
    """

    objective: Objective

    def __call__(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> Float32[Array, "*tokens"]:
        """Returns KL(teacher || student) in nats per token, `(*tokens,)`."""
        return Comparison()(student_logits, teacher_logits, labels)

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> dict[str, Float32[Array, "*tokens"]]:
        """Returns those of `Comparison` and `objective`, nats per token."""
        return {
            **Comparison().metrics(student_logits, teacher_logits, labels),
            "objective": self.objective(student_logits, teacher_logits, labels),
        }


class HeldOut(NamedTuple):
    """What one evaluation found, over `tokens` counted tokens.

    Attributes:
        kl: Mean KL(teacher || student) at temperature 1, nats per token.
        student_perplexity: Exponential of the student's mean cross-entropy.
        teacher_perplexity: Exponential of the teacher's mean cross-entropy.
        tokens: Tokens that counted.
        loss: Mean of the run's own objective, nats per token: TAID's at the t that the
            state has, CTKD's at the learned temperature.
        rouge_l: ROUGE-L of the student's greedy answers, 0 to 1; None when not asked.
        exact_match: Share of the answers that are the reference; None when not asked.
    """

    kl: float
    student_perplexity: float
    teacher_perplexity: float
    tokens: int
    loss: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None


def cost(
    found: HeldOut | Mapping[str, Any], selection_metric: SelectionMetric
) -> float:
    """Returns the figure that decides, signed so that the lowest is the best.

    Args:
        found: An evaluation, or a row of `evaluations.jsonl`.
        selection_metric: Its name. ROUGE-L and exact match are the better the higher.

    Returns:
        Infinity where it is missing, or it or another figure is not finite.
    """
    values = found if isinstance(found, Mapping) else found._asdict()
    value = values.get(selection_metric)
    # A student that is no distribution may still have answers, and a score for them.
    if value is None or not math.isfinite(value) or not_finite(values):
        return math.inf
    return -value if selection_metric in ("rouge_l", "exact_match") else value


def not_finite(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of an evaluation that are not finite, by their names.

    A perplexity of inf is a number that a float cannot hold, and is not among them: the
    loss that it is the exponential of is finite.
    """
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, float)
        and not math.isfinite(value)
        and not (name.endswith("_perplexity") and value == math.inf)
    }


def check_finite(found: HeldOut, student: str = "the student") -> None:
    """Refuses models whose figures are not finite, by the name of the one it is.

    Args:
        found: Their evaluation.
        student: What the student is called.

    Raises:
        ModelError: If a figure is not finite.
    """
    wrong = not_finite(found._asdict())
    if not wrong:
        return
    models = {"teacher_perplexity": "the teacher", "student_perplexity": student}
    who = [model for name, model in models.items() if name in wrong]
    figures = ", ".join(f"{name} {value}" for name, value in wrong.items())
    raise ModelError(
        f"{' and '.join(who) or 'the two models together'}: not finite on held-out "
        f"text ({figures}). NaN or inf in the weights, or ones too large for --dtype, "
        "are the usual cause; give sound weights, or --dtype float32"
    )


def make_judge_step(
    student: ModelFunctions,
    teacher: ModelFunctions,
    make_objective: MakeObjective,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    fused: bool = True,
) -> JudgeStep:
    """Returns the jitted `(state, teacher_params, batch) -> sums`, without gradients.

    The state is read and not donated: nothing of it can change.

    Args:
        student: Functions of the student.
        teacher: Functions of the teacher.
        make_objective: As in `make_train_step`.
        chunk_size: Tokens of a chunk of the fused head; chosen when None.
        mesh: Where the batch lives, when on several devices.
        fused: Use the fused head where both models offer hidden states; else the
            logits of the whole batch are built.

    Returns:
        A function whose result has the sums `loss` (of the KL), `student_nll`,
        `teacher_nll`, `objective` and `num_tokens`.
    """

    def step(state: DistillState, teacher_params: Params, batch: Batch) -> Metrics:
        objective = make_objective(state.schedule, state.learned, state.step)
        loss_sum, sums = batch_loss(
            Judging(objective),
            student,
            state.params,
            teacher,
            teacher_params,
            batch,
            chunk_size=chunk_size,
            mesh=mesh,
            fused=fused,
        )
        return {"loss": loss_sum, **sums}

    return jax.jit(step)


def evaluate(
    judge_step: JudgeStep,
    state: DistillState,
    teacher_params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> HeldOut:
    """Returns KL, perplexities and loss over `batches`, weighted by token.

    Args:
        judge_step: From `make_judge_step`.
        state: Holds the student; nothing is changed.
        teacher_params: The teacher's.
        batches: Held-out batches of one shape.
        mesh: Where they go.

    Raises:
        ValueError: If no token counts.
    """
    total: dict[str, float] = {}
    for batch in batches:
        sums = judge_step(state, teacher_params, place_batch(batch, mesh))
        for key, value in sums.items():
            # Python floats are float64: long sums of float32 batches stay exact enough.
            total[key] = total.get(key, 0.0) + float(value)
    weight = total.get("num_tokens", 0.0)
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
        loss=total["objective"] / weight,
    )
