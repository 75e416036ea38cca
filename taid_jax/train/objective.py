"""From settings to the objective and the schedule of a run, and what evaluates it."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from taid_jax import loss
from taid_jax.loss import _softmax as softmax
from taid_jax.loss._checks import need_labels
from taid_jax.loss._objective import label_entries, register_objective
from taid_jax.schedule import TAIDScheduler, TAIDState
from taid_jax.settings import ObjectiveSettings

Objective = Callable[..., Array]
MakeObjective = Callable[[TAIDState, dict[str, Array], Array], Objective | loss.ByText]
"""`(schedule, learned, step) -> objective`: the objective of one step."""


def make_scheduler(settings: ObjectiveSettings, steps: int) -> TAIDScheduler:
    """Returns TAID's schedule over `steps` optimizer steps."""
    return TAIDScheduler(
        steps,
        t_start=settings.t_start,
        t_end=settings.t_end,
        alpha=settings.alpha,
        beta=settings.beta,
        disable_adaptive=settings.disable_adaptive,
    )


def _fixed(settings: ObjectiveSettings) -> Objective | None:
    """Returns an objective that is the same at every step, None if it is not."""
    temperature, skew = settings.temperature, settings.skew
    make: dict[str, Callable[[], Objective]] = {
        "sft": loss.CrossEntropy,
        "forward_kl": lambda: loss.ForwardKL(temperature),
        "reverse_kl": lambda: loss.ReverseKL(temperature),
        "jensen_shannon": lambda: loss.JensenShannon(
            settings.teacher_weight, temperature
        ),
        "total_variation": loss.TotalVariation,
        "skew_forward_kl": lambda: loss.SkewForwardKL(skew, temperature),
        "skew_reverse_kl": lambda: loss.SkewReverseKL(skew, temperature),
        "adaptive_kl": lambda: loss.AdaptiveKL(settings.head_threshold, temperature),
        "dkd": lambda: loss.DKD(settings.dkd_alpha, settings.dkd_beta, temperature),
        "alpha_beta": lambda: loss.AlphaBeta(
            settings.alpha_beta_a, settings.alpha_beta_b, temperature
        ),
        "concrete_score": lambda: loss.ConcreteScore(
            settings.score_weights, temperature
        ),
        "entropy_gated": lambda: loss.EntropyGated(
            settings.entropy_threshold, temperature
        ),
    }
    return make[settings.objective]() if settings.objective in make else None


def make_objective(
    settings: ObjectiveSettings, steps: int
) -> tuple[MakeObjective, dict[str, Array]]:
    """Returns the objective of a step, and what it learns at the start.

    Args:
        settings: Name and numbers.
        steps: Of the run, over the first half of which DistiLLM-2's weight rises.

    Returns:
        `(schedule, learned, step) -> objective`, and the learned values before the
        first step: an empty dict for all but CTKD, whose temperature is made from
        `raw_temperature`, which starts at 1.
    """
    fixed = _fixed(settings)
    # At 1 the mixture is the objective; sft has nothing to be mixed with.
    mixed = settings.distil_ratio < 1 and settings.objective != "sft"

    def make(
        schedule: TAIDState, learned: dict[str, Array], step: Array
    ) -> Objective | loss.ByText:
        if settings.objective == "distillm2":
            return loss.ByText(
                loss.SkewForwardKL(settings.skew),
                loss.SkewReverseKL(settings.skew),
                loss.distillm2_weight(step, steps),
            )
        if fixed is not None:
            objective = fixed
        elif settings.objective == "ctkd":
            strength = loss.ctkd_strength(step, settings.ctkd_ramp_steps)
            objective = loss.CTKD(
                loss.ctkd_temperature(learned["raw_temperature"]), strength
            )
        elif settings.objective == "alpha_mixture":
            objective = loss.AlphaMixture(schedule.t, settings.mixture_shape)
        else:
            objective = loss.TAID(schedule.t)
        return loss.Mix(objective, settings.distil_ratio) if mixed else objective

    learns = settings.objective == "ctkd"
    return make, {"raw_temperature": jnp.ones((), jnp.float32)} if learns else {}


def on_data(objective: Objective | loss.ByText) -> Objective:
    """Returns what judges a text of the data: of two, that of the teacher's texts."""
    return objective.teacher_texts if isinstance(objective, loss.ByText) else objective


CALIBRATION_BINS = tuple(f"calibration_{number}" for number in range(15))
"""Metrics whose sums over tokens give the expected calibration error."""


def calibration(
    logits: Float[Array, "*tokens vocab"], labels: Int[Array, "*tokens"]
) -> dict[str, Float32[Array, "*tokens"]]:
    """Returns confidence less accuracy of every token, apart for 15 bins of confidence.

    The confidence is the probability of the most probable entry, and a bin reaches from
    above its lower to its upper edge. The expected calibration error is the sum over
    bins of the absolute value of their sums over tokens, divided by the tokens. Where k
    entries are the most probable, a label that is among them counts as 1 / k: whatever
    is chosen of them, and however the vocabulary is ordered.

    Only sums and maxima over the vocabulary are taken, which a mesh reduces where it is
    spread: an argmax would gather it.

    Args:
        logits: May have entries of -inf. A row that has no softmax gives NaN in every
            bin.
        labels: As the objectives take them.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2.
    """
    logits = logits.astype(jnp.float32)
    row = softmax.normalise(logits)
    is_top = (logits == row.top).astype(jnp.float32)
    is_label = label_entries(labels, logits.shape[-1])
    hit = softmax.row_sum(jnp.where(is_label, is_top, 0.0)) / softmax.row_sum(is_top)
    confidence = softmax.per_token(1 / row.total)
    over = confidence - softmax.per_token(hit)
    bins = len(CALIBRATION_BINS)
    found = jnp.clip(jnp.ceil(confidence * bins) - 1, 0, bins - 1)
    # NaN is in no bin, and is not to be lost.
    lost = jnp.isnan(over)
    return {
        name: jnp.where(lost | (found == number), over, 0.0)
        for number, name in enumerate(CALIBRATION_BINS)
    }


def both_sides(
    student_logits: Float[Array, "*tokens vocab"],
    teacher_logits: Float[Array, "*tokens vocab"],
    labels: Int[Array, "*tokens"],
) -> dict[str, Float32[Array, "*tokens"]]:
    """Returns KL(student || teacher) and both cross-entropies, nats per token."""
    nll = loss.CrossEntropy()
    return {
        "kl_reverse": loss.ReverseKL()(student_logits, teacher_logits),
        "student_nll": nll(student_logits, teacher_logits, labels),
        "teacher_nll": nll(teacher_logits, student_logits, labels),
    }


@register_objective
@dataclasses.dataclass(frozen=True)
class Evaluation:
    """KL(teacher || student) of a token, and what else is measured in the same pass.

    An objective like any other, so that it runs through the fused head.

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
        return loss.ForwardKL().metrics(student_logits, teacher_logits)["kl_teacher"]

    def metrics(
        self,
        student_logits: Float[Array, "*tokens vocab"],
        teacher_logits: Float[Array, "*tokens vocab"],
        labels: Int[Array, "*tokens"] | None = None,
    ) -> dict[str, Float32[Array, "*tokens"]]:
        """Returns the other KL, both cross-entropies and the objective, nats per token.

        And confidence less accuracy of the student; see `calibration`.
        """
        labels = need_labels("Evaluation", student_logits, labels)
        return {
            **both_sides(student_logits, teacher_logits, labels),
            "objective": self.objective(student_logits, teacher_logits, labels),
            **calibration(student_logits, labels),
        }
