"""Settings of the objective and of its schedule."""

import dataclasses
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need

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
class ObjectiveSettings(Checked):
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
        teacher_weight: The teacher's share of the mixture in Jensen-Shannon.
        skew: Share of the mixture in the skew KLs: the teacher's in the forward one,
            the student's in the reverse one.
        head_threshold: Probability mass of the head in adaptive KL.
        dkd_alpha: Weight of DKD's target-class part.
        dkd_beta: Weight of DKD's part over the other classes.
        ctkd_ramp_steps: Steps over which CTKD's temperature gains its full strength.
        ctkd_ramp_epochs: The same in passes over the training data; sets
            `ctkd_ramp_steps` once the data are read.
    """

    objective: ObjectiveName = "taid"
    distil_ratio: float = bounded(1.0, ge=0, le=1)
    t_start: float = bounded(0.4, ge=0, le=1)
    t_end: float = bounded(1.0, ge=0, le=1)
    alpha: float = bounded(5e-4, ge=0)
    beta: float = bounded(0.99, ge=0, lt=1)
    disable_adaptive: bool = False
    # Logits are divided by it, and the loss multiplied by its square.
    temperature: float = bounded(1.0, ge=1e-6, le=1e6)
    teacher_weight: float = bounded(0.1, ge=1e-6, le=1 - 1e-6)
    skew: float = bounded(0.1, ge=1e-6, le=1 - 1e-6)
    head_threshold: float = bounded(0.5, ge=1e-6, lt=1)
    dkd_alpha: float = bounded(1.0, ge=0, le=1e6)
    dkd_beta: float = bounded(0.5, ge=0, le=1e6)
    ctkd_ramp_steps: int = bounded(1000, ge=1)
    ctkd_ramp_epochs: float | None = bounded(None, gt=0)

    def __post_init__(self):
        super().__post_init__()
        ends = self.t_start, self.t_end
        need("t_start, t_end", ends, ends[0] <= ends[1], "0 <= t_start <= t_end <= 1")
