"""The published objectives and schedule in PyTorch, defects included.

Written afresh from the mathematics and from a description of what SakanaAI/TAID (commit
a062892) computes. Where the published code is wrong, so is this, and the place is
marked `DEFECT`: `deviations` shows each beside the right number. `torch_exact` holds
the same objectives without the defects.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol, Required, TypedDict

import torch
from torch import Tensor
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers that an objective may need; each uses its own.

    Attributes:
        t: Interpolation of TAID, in [0, 1].
        teacher_weight: Share of the teacher in the mixture of JS and the skew KLs.
        head_threshold: Probability mass of adaptive KL's head.
        temperature: Of CTKD and DKD; a tensor where its gradient is wanted.
        alpha: Weight of DKD's target part.
        beta: Weight of DKD's other part.
        shape: Of AMiD's mixture.
        a: First power of the alpha-beta divergence.
        b: Second power.
        weights: Whose probabilities weigh the concrete score.
        threshold: Entropy above which forward KL is added, in nats.
    """

    t: float = 0.4
    teacher_weight: float = 0.1
    head_threshold: float = 0.5
    temperature: float | Tensor = 1.0
    alpha: float = 1.0
    beta: float = 0.5
    shape: float = 0.0
    a: float = 0.2
    b: float = 0.7
    weights: str = "student"
    threshold: float = 1.0


def _softmax(logits: Tensor) -> Tensor:
    return functional.softmax(logits, dim=-1, dtype=_wide(logits))


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1, dtype=_wide(logits))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _drop(terms: Tensor, *logits: Tensor) -> Tensor:
    # DEFECT: zeros put over NaN or -inf leave the gradient NaN: 0 times infinity.
    infinite = torch.stack([torch.isinf(x) for x in logits]).any(0)
    return terms.masked_fill(infinite, 0.0)


def _cross(target: Tensor, student: Tensor) -> Tensor:
    return -_drop(target * _log_softmax(student), student).sum(-1)


def _forward_kl(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    return _cross(_softmax(teacher), student)


def _reverse(q: Tensor, student: Tensor, teacher: Tensor) -> Tensor:
    gap = _log_softmax(student) - _log_softmax(teacher)
    return _drop(q * gap, student, teacher).sum(-1)


def _reverse_kl(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    return _reverse(_softmax(student), student, teacher)


def _total_variation(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    gap = (_softmax(teacher) - _softmax(student)).abs()
    return 0.5 * _drop(gap, student, teacher).sum(-1)


def _jensen_shannon(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    p, q, weight = _softmax(teacher), _softmax(student), settings.teacher_weight
    # DEFECT: the logarithm of a mixture that may have underflown to 0.
    log_mixture = torch.log(weight * p + (1 - weight) * q)
    of_teacher = _drop(p * (_log_softmax(teacher) - log_mixture), student, teacher)
    of_student = _drop(q * (_log_softmax(student) - log_mixture), student, teacher)
    return weight * of_teacher.sum(-1) + (1 - weight) * of_student.sum(-1)


def _skew_forward_kl(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    p, q, weight = _softmax(teacher), _softmax(student), settings.teacher_weight
    # DEFECT: as in Jensen-Shannon.
    log_mixture = torch.log(weight * p + (1 - weight) * q)
    return -_drop(p * log_mixture, student, teacher).sum(-1)


def _skew_reverse_kl(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    p, q, weight = _softmax(teacher), _softmax(student), settings.teacher_weight
    # DEFECT: as in Jensen-Shannon.
    log_mixture = torch.log((1 - weight) * p + weight * q)
    return _drop(q * (_log_softmax(student) - log_mixture), student, teacher).sum(-1)


def _adaptive_kl(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    p, q = _softmax(teacher), _softmax(student)
    rising = p.sort(dim=-1).values
    head = rising.cumsum(-1) > 1 - settings.head_threshold
    # DEFECT: `head` is in sorted order, the gap in the vocabulary's.
    # DEFECT: the weights are part of the graph, so the gradient runs through them.
    gap = (p - q).abs()
    head_gap, tail_gap = (gap * head).sum(-1), (gap * ~head).sum(-1)
    forward, reverse = _cross(p, student), _reverse(q, student, teacher)
    whole = head_gap + tail_gap
    return head_gap / whole * forward + tail_gap / whole * reverse


def _ctkd(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    temperature = torch.as_tensor(settings.temperature, dtype=_wide(student))
    # DEFECT: the quotient is rounded to the logits' dtype.
    inner = _forward_kl(student / temperature, teacher / temperature, settings)
    return temperature**2 * inner


def _taid(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    t = torch.tensor(settings.t, dtype=_wide(student))
    # DEFECT: a sum in the logits' dtype, rounded where that is bfloat16 or float16.
    # DEFECT: 0 * -inf is NaN, at t = 0 in the teacher's part and at t = 1 in the other.
    mixture = (1 - t) * student.detach() + t * teacher
    return _cross(_softmax(mixture), student)


def _dkd(
    student: Tensor, teacher: Tensor, mask: Tensor, labels: Tensor, settings: Settings
) -> Tensor:
    label = functional.one_hot(labels.clamp(min=0), student.shape[-1]).bool()
    temperature = settings.temperature
    student, teacher = student / temperature, teacher / temperature

    # DEFECT: this softmax stays in the logits' dtype.
    def two_way(logits: Tensor) -> Tensor:
        probability = functional.softmax(logits, dim=-1)
        parts = (probability * label).sum(-1), (probability * ~label).sum(-1)
        return torch.stack(parts, dim=-1)

    def divergence(log_q: Tensor, p: Tensor) -> Tensor:
        return functional.kl_div(log_q, p, reduction="none").sum(-1)

    target = divergence(two_way(student).log(), two_way(teacher))
    # DEFECT: the label is pushed down by 1000 rather than left out, and -inf is met by
    # 0 * -inf.
    away = 1000.0 * label.to(_wide(student))
    other = divergence(_log_softmax(student - away), _softmax(teacher - away))
    # DEFECT: padding takes part in the denominator.
    target, other = ((part * mask).sum() / mask.numel() for part in (target, other))
    return temperature**2 * (settings.alpha * target + settings.beta * other)


def _sft(student: Tensor, labels: Tensor) -> Tensor:
    flat = student.to(_wide(student)).reshape(-1, student.shape[-1])
    loss = functional.cross_entropy(
        flat, labels.reshape(-1), ignore_index=-100, reduction="none"
    )
    return loss.reshape(labels.shape)


_UNLABELLED = {
    "taid": _taid,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "ctkd": _ctkd,
}
OBJECTIVES = (*_UNLABELLED, "dkd", "sft")


def published_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    labels: Tensor,
    settings: Settings,
) -> Tensor:
    """Returns the mean loss over counted tokens, as the published code computes it.

    Logits may be of any float dtype, labels are -100 where none counts. The result is
    float32, or float64 for float64 logits; NaN when no token counts.
    """
    if name == "dkd":
        return _dkd(student, teacher, mask, labels, settings)
    if name == "sft":
        per_token = _sft(student, labels)
    else:
        per_token = _UNLABELLED[name](student, teacher, settings)
    return (per_token * mask).sum() / mask.sum()


def ctkd_temperature(raw: Tensor, start: float = 1.0, end: float = 20.0) -> Tensor:
    """Returns CTKD's temperature from the number it learns: start + end sigmoid."""
    return start + end * torch.sigmoid(raw)


def ctkd_strength(epoch: int, epochs: int = 10) -> float:
    """Returns the factor on the temperature's gradient, as published.

    DEFECT: it falls from 1 to 0 where the paper's rises, and it is positive where the
    paper's gradient is reversed.
    """
    return 0.5 * (1 + math.cos(math.pi * min(epoch, epochs) / epochs))


class ScheduleSettings(TypedDict, total=False):
    """The arguments of TAID's controller, the same on both sides."""

    num_train_steps: Required[int]
    t_start: float
    t_end: float
    alpha: float
    beta: float
    disable_adaptive: bool


class Schedule(Protocol):
    """A controller in PyTorch: the reference's, or a checkout's."""

    @property
    def t(self) -> Tensor:
        """Interpolation, float32 scalar."""
        ...

    @property
    def momentum(self) -> Tensor:
        """Running mean of the relative improvement."""
        ...

    def update(self, loss: Tensor, step: int) -> None:
        """Advances on the loss of step `step`; the first call only keeps it."""
        ...


MakeSchedule = Callable[..., Schedule]


class PublishedSchedule:
    """TAID's controller, one `update` per call: the caller decides how often.

    Attributes:
        t: Interpolation, float32 scalar.
        prev_loss: Loss of the call before; infinite before the first.
        momentum: Running mean of the relative improvement.
        delta: What the controller asked for in the last call; NaN on the first.
    """

    def __init__(
        self,
        num_train_steps: int,
        t_start: float = 0.4,
        t_end: float = 1.0,
        alpha: float = 5e-4,
        beta: float = 0.99,
        disable_adaptive: bool = False,
    ):
        self.num_train_steps = num_train_steps
        self.t_start, self.t_end = t_start, t_end
        self.alpha, self.beta = alpha, beta
        self.disable_adaptive = disable_adaptive
        self.t = torch.tensor(t_start)
        self.prev_loss = torch.tensor(math.inf)
        self.momentum = torch.zeros(())
        self.delta = torch.tensor(math.nan)

    def update(self, loss: Tensor, step: int) -> None:
        """Advances on the loss of step `step`; the first call only keeps it."""
        if torch.isinf(self.prev_loss):
            self.prev_loss = loss
            return
        gain = (self.prev_loss - loss) / (self.prev_loss + 1e-15)
        # DEFECT: once NaN, the momentum stays NaN, and `max` below picks the line.
        self.momentum = self.beta * self.momentum + (1 - self.beta) * gain
        self.delta = self.alpha * torch.sigmoid(self.momentum) * (1 - self.t)
        self.prev_loss = loss
        linear = (
            self.t_start + (self.t_end - self.t_start) * step / self.num_train_steps
        )
        if self.disable_adaptive:
            self.t = torch.tensor(linear)
            return
        raised = max(linear, float(self.t + self.delta))
        self.t = torch.tensor(min(self.t_end, raised))
