"""The objectives as their papers define them, in PyTorch, -inf logits included.

In float64 they are the truth that both sides of a row are held against. In float32 they
stand in for PyTorch where the published code computes something else.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from parity.torch_reference import Settings

# Stands for -inf: any exp of a difference with it is 0, and 0 times it is 0, not NaN.
_FLOOR = -1e30


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _finite(logits: Tensor) -> Tensor:
    wide = _wide(logits)
    return wide.masked_fill(torch.isinf(wide), _FLOOR)


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1)


class _Pair:
    """Both distributions of a token; `kept` marks what the student can say at all."""

    def __init__(self, student: Tensor, teacher: Tensor):
        self.kept = ~torch.isinf(student)
        self.student = _finite(student)
        self.teacher = _finite(teacher).detach()
        self.log_q = _log_softmax(self.student)
        self.log_p = _log_softmax(self.teacher)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()

    def log_mixture(self, teacher_weight: float) -> Tensor:
        """Returns log(w p + (1 - w) q), exact where both underflow."""
        return torch.logaddexp(
            math.log(teacher_weight) + self.log_p,
            math.log1p(-teacher_weight) + self.log_q,
        )

    def sum(self, terms: Tensor) -> Tensor:
        """Returns the sum over the entries that the student has."""
        return torch.where(self.kept, terms, torch.zeros_like(terms)).sum(-1)


def _forward_kl(pair: _Pair, settings: Settings) -> Tensor:
    return -pair.sum(pair.p * pair.log_q)


def _reverse_kl(pair: _Pair, settings: Settings) -> Tensor:
    return pair.sum(pair.q * (pair.log_q - pair.log_p))


def _total_variation(pair: _Pair, settings: Settings) -> Tensor:
    return 0.5 * pair.sum((pair.p - pair.q).abs())


def _jensen_shannon(pair: _Pair, settings: Settings) -> Tensor:
    weight = settings.teacher_weight
    log_mixture = pair.log_mixture(weight)
    of_teacher = pair.sum(pair.p * (pair.log_p - log_mixture))
    of_student = pair.sum(pair.q * (pair.log_q - log_mixture))
    return weight * of_teacher + (1 - weight) * of_student


def _skew_forward_kl(pair: _Pair, settings: Settings) -> Tensor:
    return -pair.sum(pair.p * pair.log_mixture(settings.teacher_weight))


def _skew_reverse_kl(pair: _Pair, settings: Settings) -> Tensor:
    log_mixture = pair.log_mixture(1 - settings.teacher_weight)
    return pair.sum(pair.q * (pair.log_q - log_mixture))


def _adaptive_kl(pair: _Pair, settings: Settings) -> Tensor:
    falling = pair.p.sort(dim=-1, descending=True).values
    before = falling.cumsum(-1) - falling
    # The smallest head that holds the mass: an entry joins while it is not yet held,
    # and with it all that are as probable.
    members = before < settings.head_threshold
    least = torch.where(members, falling, torch.ones_like(falling)).amin(-1, True)
    head = pair.p >= least
    gap = (pair.p - pair.q).abs().detach()
    head_gap, tail_gap = pair.sum(gap * head), pair.sum(gap * ~head)
    whole = head_gap + tail_gap
    weight = torch.where(whole > 0, head_gap / whole, torch.full_like(whole, 0.5))
    return weight * _forward_kl(pair, settings) + (1 - weight) * _reverse_kl(
        pair, settings
    )


def _taid(pair: _Pair, settings: Settings) -> Tensor:
    t = settings.t
    mixture = (1 - t) * pair.student.detach() + t * pair.teacher
    target = _log_softmax(mixture.masked_fill(~pair.kept, _FLOOR)).exp()
    return -pair.sum(target * pair.log_q)


def _ctkd(student: Tensor, teacher: Tensor, settings: Settings) -> Tensor:
    temperature = torch.as_tensor(settings.temperature, dtype=_wide(student).dtype)
    kept = ~torch.isinf(student)
    # The floor comes before the division, so that no gradient is infinity by zero.
    pair = _Pair(_finite(student) / temperature, _finite(teacher).detach())
    pair.kept = kept
    pair.log_p = _log_softmax(pair.teacher / temperature)
    pair.p = pair.log_p.exp()
    return temperature**2 * _forward_kl(pair, settings)


def _dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, settings: Settings
) -> Tensor:
    temperature = float(settings.temperature)
    pair = _Pair(_wide(student) / temperature, _wide(teacher) / temperature)
    label = functional.one_hot(labels.clamp(min=0), student.shape[-1]).bool()

    def parts(logits: Tensor, log_all: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at_label = (log_all * label).sum(-1)
        others = logits.masked_fill(label, _FLOOR)
        mass = torch.logsumexp(log_all.masked_fill(label, _FLOOR), -1)
        return at_label, mass, _log_softmax(others)

    q_label, q_rest, q_others = parts(pair.student, pair.log_q)
    p_label, p_rest, p_others = parts(pair.teacher, pair.log_p)
    target = p_label.exp() * (p_label - q_label) + p_rest.exp() * (p_rest - q_rest)
    terms = p_others.exp() * (p_others - q_others)
    other = pair.sum(terms.masked_fill(label, 0.0))
    return temperature**2 * (settings.alpha * target + settings.beta * other)


def _sft(student: Tensor, labels: Tensor) -> Tensor:
    log_q = _log_softmax(_finite(student))
    return -log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0]


_PAIRED = {
    "taid": _taid,
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
}


def exact_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    labels: Tensor,
    settings: Settings,
) -> Tensor:
    """Returns the mean loss over counted tokens as the paper defines it.

    Args:
        name: One of `torch_reference.OBJECTIVES`.
        student: Logits `(*tokens, vocab)`; the gradient flows here. An entry of -inf
            takes no part.
        teacher: Logits of the same shape; an entry of -inf has probability 0.
        mask: `(*tokens,)`, 1 where a token counts.
        labels: `(*tokens,)`, the entry that comes next; -100 where none counts.
        settings: The objective's numbers.

    Returns:
        A scalar in float32, or float64 for float64 logits; 0 when no token counts.
    """
    if name == "sft":
        per_token = _sft(student, labels)
    elif name == "dkd":
        per_token = _dkd(student, teacher, labels, settings)
    elif name == "ctkd":
        per_token = _ctkd(student, teacher, settings)
    else:
        per_token = _PAIRED[name](_Pair(student, teacher), settings)
    mask = mask.to(per_token.dtype)
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
