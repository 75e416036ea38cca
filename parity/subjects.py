"""The objectives that both sides compute: our pytree beside its name in PyTorch."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from parity.cases import Case
from parity.torch_reference import Settings
from taid_jax import loss

TorchLoss = Callable[..., torch.Tensor]

# Objectives whose gradient vanishes where both sides are peaked on different entries.
_SATURATING = ("total_variation", "jensen_shannon", "skew_reverse_kl")
_LOG_OF_MIXTURE = ("jensen_shannon", "skew_forward_kl", "skew_reverse_kl")
_NAN_AT_INF = ("reverse_kl", *_LOG_OF_MIXTURE)
_NEVER_AS_PUBLISHED = ("adaptive_kl", "dkd")
_ROUNDED_IN_LOGITS_DTYPE = ("taid", "ctkd")

_DEFAULTS = Settings()

CTKD_EPOCH = 3
"""The epoch, of 10, at which the gradient of the temperature is recorded."""

CTKD_RAW = 1.0
"""The number that CTKD's temperature is made of, before its first step."""

CTKD_TEMPERATURE = 1.0 + 20.0 / (1.0 + math.exp(-CTKD_RAW))
"""The temperature made of it."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """An objective on both sides.

    Attributes:
        name: Of its rows.
        reference: Its name in `torch_exact`, and in `torch_reference.OBJECTIVES`.
        make: Ours; called once per comparison.
        settings: The other side's numbers.
        recorded: Its name in a recording's `losses.npz`, if it is there.
        later: It came after the published code, which does not have it.
    """

    name: str
    reference: str
    make: Callable[[], loss.Objective]
    settings: Settings = _DEFAULTS
    recorded: str = ""
    later: bool = False

    @property
    def vanishes(self) -> bool:
        """Whether the gradient can vanish, so that relative digits mean nothing."""
        return self.reference in _SATURATING or self.settings.t == 0.0

    def as_published(self, dtype: str, case: Case) -> bool:
        """Whether the published code is right on a case, and so its other side."""
        if self.later or self.reference in _NEVER_AS_PUBLISHED or case.empty:
            return False
        if self.reference in _ROUNDED_IN_LOGITS_DTYPE and dtype != "float32":
            return False
        if case.underflows and self.reference in _LOG_OF_MIXTURE:
            return False
        at_ends = self.reference == "taid" and self.settings.t in (0.0, 1.0)
        return not (case.infinite and (at_ends or self.reference in _NAN_AT_INF))


def _taid(t: float, recorded: bool = True) -> Subject:
    return Subject(
        f"TAID, t = {t:g}",
        "taid",
        lambda: loss.TAID(t),
        Settings(t=t),
        f"taid_{t}" if recorded else "",
    )


def _later(
    name: str, reference: str, make: Callable[[], loss.Objective], **settings: Any
) -> Subject:
    return Subject(name, reference, make, Settings(**settings), later=True)


SUBJECTS: tuple[Subject, ...] = (
    _taid(0.0),
    _taid(0.001, recorded=False),
    *(_taid(t) for t in (0.25, 0.4, 0.75, 1.0)),
    Subject("forward KL", "forward_kl", lambda: loss.ForwardKL(), recorded="fkl"),
    Subject("reverse KL", "reverse_kl", lambda: loss.ReverseKL(), recorded="rkl"),
    Subject("TVD", "total_variation", lambda: loss.TotalVariation(), recorded="tvd"),
    Subject("JS", "jensen_shannon", lambda: loss.JensenShannon(), recorded="js"),
    Subject(
        "JS, weight 0.5",
        "jensen_shannon",
        lambda: loss.JensenShannon(teacher_weight=0.5),
        Settings(teacher_weight=0.5),
        "js_0.5",
    ),
    Subject(
        "skew forward KL",
        "skew_forward_kl",
        lambda: loss.SkewForwardKL(),
        recorded="skew_fkl",
    ),
    Subject(
        "skew reverse KL",
        "skew_reverse_kl",
        lambda: loss.SkewReverseKL(),
        recorded="skew_rkl",
    ),
    Subject(
        "adaptive KL",
        "adaptive_kl",
        lambda: loss.AdaptiveKL(),
        recorded="adaptive_kl",
    ),
    Subject(
        "CTKD",
        "ctkd",
        lambda: loss.CTKD(CTKD_TEMPERATURE),
        Settings(temperature=CTKD_TEMPERATURE),
        "ctkd",
    ),
    Subject("DKD", "dkd", lambda: loss.DKD(), recorded="dkd"),
    Subject("cross-entropy", "sft", lambda: loss.CrossEntropy()),
    *(
        _later(
            f"AMiD, t = {t:g}, shape {shape:g}",
            "alpha_mixture",
            # Of this t and this shape: a lambda looks names up when it is called.
            functools.partial(loss.AlphaMixture, t, shape),
            t=t,
            shape=shape,
        )
        for t, shape in ((0.001, -1.0), (0.4, -1.0), (0.4, 0.0), (0.4, 3.0))
    ),
    _later("ABKD, 0.2 and 0.7", "alpha_beta", loss.AlphaBeta),
    _later("ABKD, 1 and 0", "alpha_beta", lambda: loss.AlphaBeta(1, 0), a=1.0, b=0.0),
    _later("ABKD, 0 and 1", "alpha_beta", lambda: loss.AlphaBeta(0, 1), a=0.0, b=1.0),
    _later("CSD", "concrete_score", loss.ConcreteScore),
    _later(
        "CSD, the teacher's weights",
        "concrete_score",
        lambda: loss.ConcreteScore("teacher"),
        weights="teacher",
    ),
    _later(
        "entropy-gated KL",
        "entropy_gated",
        lambda: loss.EntropyGated(1.5),
        threshold=1.5,
    ),
)
