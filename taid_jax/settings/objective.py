"""Settings of the objective and of its schedule."""

import dataclasses
import math
import typing
from typing import Literal

from taid_jax.settings.checks import need

ObjectiveName = Literal[
    "taid",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "ctkd",
    "dkd",
    "sft",
]


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What the student is taught by.

    Attributes:
        objective: The distillation objective; `sft` learns from the data alone.
        distil_ratio: Weight of the objective; the rest is next-token cross-entropy.
        t_start: TAID's interpolation at the first step.
        t_end: TAID's interpolation at the last step.
        alpha: TAID's adaptive step size.
        beta: TAID's momentum.
        disable_adaptive: Let TAID's t rise in a straight line.
        temperature: Softens both distributions (KL family and DKD).
        teacher_weight: The teacher's share of the mixture in JS and the skew KLs.
        head_threshold: Probability mass of the head in adaptive KL.
        dkd_alpha: Weight of DKD's target-class part.
        dkd_beta: Weight of DKD's part over the other classes.
        ctkd_ramp_steps: Steps over which CTKD's temperature gains its full strength.
        ctkd_ramp_epochs: The same in passes over the training data; sets
            `ctkd_ramp_steps` once the data are read.
    """

    objective: ObjectiveName = "taid"
    distil_ratio: float = 1.0
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    disable_adaptive: bool = False
    temperature: float = 1.0
    teacher_weight: float = 0.1
    head_threshold: float = 0.5
    dkd_alpha: float = 1.0
    dkd_beta: float = 0.5
    ctkd_ramp_steps: int = 1000
    ctkd_ramp_epochs: float | None = None

    def __post_init__(self):
        names = typing.get_args(ObjectiveName)
        need("objective", self.objective, self.objective in names, f"one of {names}")
        ratio = self.distil_ratio
        need("distil_ratio", ratio, 0 <= ratio <= 1, "0 <= ratio <= 1")
        order = 0 <= self.t_start <= self.t_end <= 1
        need(
            "t_start, t_end",
            (self.t_start, self.t_end),
            order,
            "0 <= t_start <= t_end <= 1",
        )
        need(
            "alpha",
            self.alpha,
            math.isfinite(self.alpha) and self.alpha >= 0,
            "alpha >= 0",
        )
        need("beta", self.beta, 0 <= self.beta < 1, "0 <= beta < 1")
        warm = self.temperature
        need("temperature", warm, math.isfinite(warm) and warm > 0, "temperature > 0")
        for name in ("teacher_weight", "head_threshold"):
            value = getattr(self, name)
            need(name, value, 0 < value < 1, "a value between 0 and 1, both excluded")
        for name in ("dkd_alpha", "dkd_beta"):
            value = getattr(self, name)
            need(name, value, math.isfinite(value) and value >= 0, ">= 0")
        ramp = self.ctkd_ramp_steps
        need("ctkd_ramp_steps", ramp, ramp >= 1, ">= 1")
        epochs = self.ctkd_ramp_epochs
        holds = epochs is None or (math.isfinite(epochs) and epochs > 0)
        need("ctkd_ramp_epochs", epochs, holds, "> 0")
