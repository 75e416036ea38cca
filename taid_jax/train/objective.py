"""From settings to the objective and the schedule of a run."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from taid_jax import loss
from taid_jax.schedule import GapScheduler, ScheduleState, TAIDScheduler
from taid_jax.settings import ObjectiveSettings

Objective = Callable[..., Array]
MakeObjective = Callable[[ScheduleState, dict[str, Array], Array], Objective]
"""`(schedule, learned, step) -> objective`: the objective of one step."""


def make_scheduler(
    settings: ObjectiveSettings, steps: int
) -> TAIDScheduler | GapScheduler:
    """Returns TAID's schedule over `steps` optimizer steps."""
    if settings.t_schedule == "gap":
        return GapScheduler(steps, t_start=settings.t_start, t_end=settings.t_end)
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
    }
    return make[settings.objective]() if settings.objective in make else None


def make_objective(
    settings: ObjectiveSettings,
) -> tuple[MakeObjective, dict[str, Array]]:
    """Returns the objective of a step, and what it learns at the start.

    Args:
        settings: Name and numbers.

    Returns:
        `(schedule, learned, step) -> objective`, and the learned values before the
        first step: an empty dict for all but CTKD, whose temperature is made from
        `raw_temperature`, which starts at 1.
    """
    fixed = _fixed(settings)
    # At 1 the mixture is the objective; sft has nothing to be mixed with.
    mixed = settings.distil_ratio < 1 and settings.objective != "sft"

    def make(
        schedule: ScheduleState, learned: dict[str, Array], step: Array
    ) -> Objective:
        if fixed is not None:
            objective = fixed
        elif settings.objective == "ctkd":
            strength = loss.ctkd_strength(step, settings.ctkd_ramp_steps)
            objective = loss.CTKD(
                loss.ctkd_temperature(learned["raw_temperature"]), strength
            )
        else:
            objective = loss.TAID(schedule.t)
        return loss.Mix(objective, settings.distil_ratio) if mixed else objective

    learns = settings.objective == "ctkd"
    return make, {"raw_temperature": jnp.ones((), jnp.float32)} if learns else {}
