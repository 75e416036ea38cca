"""The objectives as their papers define them, in PyTorch, -inf logits included.

In float64 they are the truth that both sides of a row are held against, and the tests
of the losses too. In float32 they stand in for PyTorch where the published code
computes something else.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from parity.torch_reference import Settings

# Stands for -inf: any exp of a difference with it is 0, and 0 times it is 0, not NaN.
_FLOOR = -1e30


def _finite(logits: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.masked_fill(torch.isinf(wide), _FLOOR)


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits, dim=-1)


class _Pair:
    """Both distributions of a token; `kept` marks what the student can say at all.

    `in_teacher` marks what the teacher can: where its logarithm would be -inf, a term
    is left out.
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
    ):
        self.kept, self.in_teacher = ~torch.isinf(student), ~torch.isinf(teacher)
        # The floor comes before the division, so that no gradient is infinity by zero.
        self.student = _finite(student) / temperature
        self.teacher = _finite(teacher).detach() / temperature
        self.log_q = _log_softmax(self.student)
        self.log_p = _log_softmax(self.teacher)
        self.q, self.p = self.log_q.exp(), self.log_p.exp()
        self.labels = labels.clamp(min=0)[..., None]

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
    terms = pair.q * (pair.log_q - pair.log_p)
    return pair.sum(terms.masked_fill(~pair.in_teacher, 0.0))


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


def _alpha_mixture(pair: _Pair, settings: Settings) -> Tensor:
    power = (1 - settings.shape) / 2
    log_q, log_p = pair.log_q.detach(), pair.log_p
    log_t, log_rest = torch.tensor([settings.t, 1 - settings.t]).double().log().tolist()
    if power == 0:
        mixture = settings.t * log_p + (1 - settings.t) * log_q
    else:
        mixture = torch.logaddexp(log_t + power * log_p, log_rest + power * log_q)
        mixture = mixture / power
    target = _log_softmax(mixture.masked_fill(~pair.kept, _FLOOR)).exp()
    return -pair.sum(target * pair.log_q)


def _alpha_beta(pair: _Pair, settings: Settings) -> Tensor:
    a, b, log_p, log_q = settings.a, settings.b, pair.log_p, pair.log_q
    ratio = log_p - log_q
    if b == 0:
        terms = ((a * log_p).exp() * (a * ratio - 1) + (a * log_q).exp()) / a**2
    elif a == 0:
        terms = ((b * log_q).exp() * (-b * ratio - 1) + (b * log_p).exp()) / b**2
        terms = terms.masked_fill(~pair.in_teacher, 0.0)
    else:
        both = (a * log_p + b * log_q).exp()
        of_teacher, of_student = (((a + b) * x).exp() for x in (log_p, log_q))
        terms = (a * of_teacher + b * of_student) / (a + b) - both
        terms = terms / (a * b)
    return pair.sum(terms)


def _concrete_score(pair: _Pair, settings: Settings) -> Tensor:
    shared = pair.kept & pair.in_teacher
    weights = (pair.q if settings.weights == "student" else pair.p).detach()
    weights = weights.masked_fill(~shared, 0.0)
    apart = (pair.student - pair.teacher).masked_fill(~shared, 0.0)
    whole = weights.sum(-1, keepdim=True)
    mean = (weights * apart).sum(-1, keepdim=True) / whole.clamp(min=1e-30)
    return 2 * (whole * weights * (apart - mean) ** 2).sum(-1)


def _entropy_gated(pair: _Pair, settings: Settings) -> Tensor:
    unsure = -(pair.p * pair.log_p).sum(-1) > settings.threshold
    covered = pair.sum(pair.p * (pair.log_p - pair.log_q))
    reverse = _reverse_kl(pair, settings)
    return reverse + torch.where(unsure, covered, torch.zeros_like(covered))


def _dkd(pair: _Pair, settings: Settings) -> Tensor:
    label = torch.zeros_like(pair.kept).scatter(-1, pair.labels, True)

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
    return settings.alpha * target + settings.beta * other


def _sft(pair: _Pair, settings: Settings) -> Tensor:
    return -pair.log_q.gather(-1, pair.labels)[..., 0]


_OBJECTIVES = {
    "taid": _taid,
    "alpha_mixture": _alpha_mixture,
    "alpha_beta": _alpha_beta,
    "concrete_score": _concrete_score,
    "entropy_gated": _entropy_gated,
    "forward_kl": _forward_kl,
    "ctkd": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "adaptive_kl": _adaptive_kl,
    "dkd": _dkd,
    "sft": _sft,
}


def exact_losses(
    name: str, student: Tensor, teacher: Tensor, labels: Tensor, settings: Settings
) -> Tensor:
    """Returns the loss of every token as the paper defines it.

    Args:
        name: One of `torch_reference.OBJECTIVES`, or one that came after TAID.
        student: Logits `(*tokens, vocab)`; the gradient flows here. An entry of -inf
            takes no part.
        teacher: Logits of the same shape; an entry of -inf has probability 0.
        labels: `(*tokens,)`, the entry that comes next; -100 where none counts.
        settings: The objective's numbers. All of them divide the logits by the
            temperature, and multiply the loss by its square.

    Returns:
        `(*tokens,)` in float32, or float64 for float64 logits.
    """
    pair = _Pair(student, teacher, labels, settings.temperature)
    return settings.temperature**2 * _OBJECTIVES[name](pair, settings)


def exact_loss(
    name: str,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    labels: Tensor,
    settings: Settings,
) -> Tensor:
    """Returns the mean of `exact_losses` over counted tokens; 0 when none counts."""
    per_token = exact_losses(name, student, teacher, labels, settings)
    mask = mask.to(per_token.dtype)
    return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
