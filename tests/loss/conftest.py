"""A float64 oracle of every objective, the recorded outputs, and inputs."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parents[2] / "parity" / "golden"

Pair = tuple[np.ndarray, np.ndarray]
"""The loss of every token and its gradient in the student's logits, float64."""


def log_softmax(x: np.ndarray) -> np.ndarray:
    top = x.max(-1, keepdims=True)
    return x - top - np.log(np.exp(x - top).sum(-1, keepdims=True))


def _sum(x: np.ndarray) -> np.ndarray:
    return x.sum(-1, keepdims=True)


class Oracle:
    """Value and gradient by the definitions, in float64, plainly and slowly.

    A term with a student logit of -inf is left out of every sum, and so is one with a
    teacher logit of -inf where the term would have its logarithm.
    """

    def _start(self, s: np.ndarray, u: np.ndarray, temperature: float = 1.0) -> tuple:
        s, u = (np.asarray(x, np.float64) / temperature for x in (s, u))
        with np.errstate(all="ignore"):
            lq, lp = log_softmax(s), log_softmax(u)
        return lq, lp, np.exp(lq), np.exp(lp), np.isfinite(s), np.isfinite(u)

    @staticmethod
    def _gradient(q: np.ndarray, slope: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """From the slope in q to the gradient in the logits."""
        slope = np.where(kept, slope, 0.0)
        return q * (slope - _sum(q * slope))

    def taid(self, s, u, labels=None, t=0.4) -> Pair:
        s, u = np.asarray(s, np.float64), np.asarray(u, np.float64)
        with np.errstate(all="ignore"):
            seen = np.isfinite(s)
            lq = log_softmax(s)
            m = np.where(seen, np.where(t == 1, 0.0, (1 - t) * s), -np.inf)
            m = m + np.where(t == 0, 0.0, t * u)
            lp = log_softmax(m)
            value = -np.where(seen, np.exp(lp) * np.where(seen, lq, 0), 0).sum(-1)
            # q - p from expm1, with the logarithm of the mass taken from the student's
            # largest entry: exact where float64 would have no digits left either.
            top = s.argmax(-1)[..., None]
            d = np.where(seen, t * (u - s), 0.0)
            if t == 0:
                d = np.zeros_like(d)
            anchor = np.take_along_axis(d, top, -1)
            d = d - np.where(np.isfinite(anchor), anchor, 0.0)
            q = np.exp(lq)
            small = d < 30
            rise = np.where(small, q * np.expm1(np.where(small, d, 0)), 0)
            rise = rise + np.where(small, 0, np.exp(lq + d) - q)
            x = d - np.log1p(_sum(rise))
            gradient = np.where(
                x <= 0,
                -q * np.expm1(x),
                np.exp(np.where(seen, lq, 0) + x) * np.expm1(-x),
            )
        return value, np.where(seen, gradient, 0.0)

    def forward_kl(self, s, u, labels=None, temperature=1.0) -> Pair:
        lq, _lp, q, p, seen, _ = self._start(s, u, temperature)
        p_seen = np.where(seen, p, 0.0)
        value = -(p_seen * np.where(seen, lq, 0)).sum(-1)
        gradient = _sum(p_seen) * q - p_seen
        return temperature**2 * value, temperature * gradient

    def reverse_kl(self, s, u, labels=None, temperature=1.0) -> Pair:
        lq, lp, q, _p, seen, heard = self._start(s, u, temperature)
        both = seen & heard
        ratio = np.where(both, np.where(both, lq, 0) - np.where(both, lp, 0), 0)
        value = (q * ratio).sum(-1)
        gradient = self._gradient(q, ratio + 1, both)
        return temperature**2 * value, temperature * gradient

    def total_variation(self, s, u, labels=None) -> Pair:
        _lq, _lp, q, p, seen, _ = self._start(s, u)
        value = 0.5 * np.where(seen, abs(p - q), 0).sum(-1)
        return value, self._gradient(q, 0.5 * np.where(q >= p, 1.0, -1.0), seen)

    def _mixture(self, lq, lp, share: float) -> tuple:
        with np.errstate(all="ignore"):
            lm = np.logaddexp(np.log(share) + lp, np.log1p(-share) + lq)
        return lm, np.isfinite(lm)

    def jensen_shannon(
        self, s, u, labels=None, teacher_weight=0.1, temperature=1.0
    ) -> Pair:
        lq, lp, q, p, seen, heard = self._start(s, u, temperature)
        w = teacher_weight
        lm, _ = self._mixture(lq, lp, w)
        with np.errstate(all="ignore"):
            to_p = np.where(seen & heard, p * (lp - lm), 0).sum(-1)
            rho = np.where(seen, lq - lm, 0)
        value = w * to_p + (1 - w) * (q * rho).sum(-1)
        gradient = self._gradient(q, (1 - w) * rho, seen)
        return temperature**2 * value, temperature * gradient

    def skew_forward_kl(self, s, u, labels=None, skew=0.1, temperature=1.0) -> Pair:
        lq, lp, q, p, seen, heard = self._start(s, u, temperature)
        w = skew
        lm, _ = self._mixture(lq, lp, w)
        with np.errstate(all="ignore"):
            value = -np.where(seen & heard, p * lm, 0).sum(-1)
            slope = np.where(seen, -(1 - w) * np.exp(lp - lm), 0)
        gradient = self._gradient(q, slope, seen)
        return temperature**2 * value, temperature * gradient

    def skew_reverse_kl(self, s, u, labels=None, skew=0.1, temperature=1.0) -> Pair:
        lq, lp, q, _p, seen, _ = self._start(s, u, temperature)
        w = skew
        lm, _ = self._mixture(lq, lp, 1 - w)
        with np.errstate(all="ignore"):
            rho = np.where(seen, lq - lm, 0)
        value = (q * rho).sum(-1)
        gradient = self._gradient(q, rho + 1 - w * np.exp(rho), seen)
        return temperature**2 * value, temperature * gradient

    def adaptive_kl(
        self, s, u, labels=None, head_threshold=0.5, temperature=1.0
    ) -> Pair:
        _lq, _lp, q, p, seen, _ = self._start(s, u, temperature)
        order = np.argsort(-p, axis=-1, kind="stable")
        held = np.cumsum(np.take_along_axis(p, order, -1), -1)
        held -= np.take_along_axis(p, order, -1)
        head = np.zeros(p.shape, bool)
        np.put_along_axis(head, order, held < head_threshold, -1)
        gap = np.where(seen, abs(p - q), 0)
        head_gap, tail_gap = (_sum(np.where(x, gap, 0)) for x in (head, ~head))
        both = head_gap + tail_gap
        weight = np.where(both == 0, 0.5, head_gap / np.where(both == 0, 1, both))
        fv, fg = self.forward_kl(s, u, temperature=temperature)
        rv, rg = self.reverse_kl(s, u, temperature=temperature)
        value = weight[..., 0] * fv + (1 - weight[..., 0]) * rv
        return value, weight * fg + (1 - weight) * rg

    def cross_entropy(self, s, u, labels) -> Pair:
        lq, _, q, _, _, _ = self._start(s, s)
        known = (labels >= 0)[..., None]
        onehot = (np.arange(s.shape[-1]) == labels[..., None]) & np.isfinite(s)
        counted = onehot.any(-1)
        value = -np.where(onehot, np.where(onehot, lq, 0), 0).sum(-1)
        return value, np.where(known & counted[..., None], q - onehot, 0.0)

    def ctkd(self, s, u, labels=None, temperature=1.0) -> Pair:
        return self.forward_kl(s, u, temperature=temperature)

    def ctkd_slope(self, s, u, temperature=1.0, step=1e-5) -> np.ndarray:
        """Slope of the loss in the temperature, not reversed, by differences."""
        high, _ = self.ctkd(s, u, temperature=temperature + step)
        low, _ = self.ctkd(s, u, temperature=temperature - step)
        return (high - low) / (2 * step)

    def dkd(self, s, u, labels, alpha=1.0, beta=0.5, temperature=1.0) -> Pair:
        onehot = np.arange(s.shape[-1]) == labels[..., None]
        _lq, _lp, q, p, seen, heard = self._start(s, u, temperature)
        a, b = (_sum(np.where(onehot, x, 0)) for x in (q, p))
        a_rest, b_rest = (_sum(np.where(onehot, 0, x)) for x in (q, p))
        with np.errstate(all="ignore"):
            la, lb = (np.log(x) for x in (a, b))
            tckd = np.where(b > 0, b * (lb - la), 0)
            tckd = tckd + np.where(b_rest > 0, b_rest * np.log(b_rest / a_rest), 0)
        rest = [np.where(onehot, -np.inf, np.asarray(x, np.float64)) for x in (s, u)]
        with np.errstate(all="ignore"):
            lqr, lpr = (log_softmax(x / temperature) for x in rest)
        qr, pr = np.exp(lqr), np.exp(lpr)
        both = seen & heard & ~onehot
        ratio = np.where(both, np.where(both, lpr, 0) - np.where(both, lqr, 0), 0)
        nckd = _sum(pr * ratio)
        value = (alpha * tckd + beta * nckd)[..., 0]
        pr_seen = np.where(seen, pr, 0)
        in_rest = beta * (_sum(pr_seen) * qr - pr_seen) - alpha * (a - b) * qr
        gradient = np.where(onehot, alpha * (a - b), in_rest)
        return temperature**2 * value, temperature * gradient


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective and what the oracle says it is."""

    name: str
    make: Callable[[], object]
    oracle: Callable[..., Pair]
    settings: dict[str, float] = dataclasses.field(default_factory=dict)
    divergence: bool = False
    """Whether it is 0 at equal distributions."""

    def expect(self, s: np.ndarray, u: np.ndarray, labels: np.ndarray) -> Pair:
        return self.oracle(s, u, labels, **self.settings)


def _cases() -> dict[str, Case]:
    from taid_jax import loss

    o = Oracle()
    cases = [
        Case("taid", lambda: loss.TAID(0.4), o.taid, {"t": 0.4}),
        Case("taid_early", lambda: loss.TAID(1e-3), o.taid, {"t": 1e-3}),
        Case("forward_kl", loss.ForwardKL, o.forward_kl),
        Case(
            "forward_kl_warm",
            lambda: loss.ForwardKL(2.5),
            o.forward_kl,
            {"temperature": 2.5},
        ),
        Case("reverse_kl", loss.ReverseKL, o.reverse_kl, {}, True),
        Case("jensen_shannon", loss.JensenShannon, o.jensen_shannon, {}, True),
        Case(
            "jensen_shannon_even",
            lambda: loss.JensenShannon(0.5, temperature=2.0),
            o.jensen_shannon,
            {"teacher_weight": 0.5, "temperature": 2.0},
            True,
        ),
        Case("total_variation", loss.TotalVariation, o.total_variation, {}, True),
        Case("skew_forward_kl", loss.SkewForwardKL, o.skew_forward_kl),
        Case("skew_reverse_kl", loss.SkewReverseKL, o.skew_reverse_kl, {}, True),
        Case("adaptive_kl", loss.AdaptiveKL, o.adaptive_kl),
        Case("ctkd", lambda: loss.CTKD(4.0), o.ctkd, {"temperature": 4.0}),
        Case("dkd", loss.DKD, o.dkd, {}, True),
        Case(
            "dkd_warm",
            lambda: loss.DKD(alpha=0.7, beta=2, temperature=3.0),
            o.dkd,
            {"alpha": 0.7, "beta": 2, "temperature": 3.0},
            True,
        ),
        Case("cross_entropy", loss.CrossEntropy, o.cross_entropy),
    ]
    return {case.name: case for case in cases}


CASES = (
    "taid",
    "taid_early",
    "forward_kl",
    "forward_kl_warm",
    "reverse_kl",
    "jensen_shannon",
    "jensen_shannon_even",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "ctkd",
    "dkd",
    "dkd_warm",
    "cross_entropy",
)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every objective in turn."""
    return _cases()[request.param]


@pytest.fixture(params=["taid", "jensen_shannon", "dkd", "ctkd", "cross_entropy"])
def kind(request: pytest.FixtureRequest) -> Case:
    """One objective of each kind, where trying all would only cost time."""
    return _cases()[request.param]


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture(scope="session")
def golden_losses() -> Iterator[np.lib.npyio.NpzFile]:
    """Recorded outputs of the published code; see parity/golden/README.md."""
    with np.load(GOLDEN / "losses.npz") as file:
        yield file


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Float32 logits `(*tokens, vocab)` and labels `(*tokens,)`."""

    student: np.ndarray
    teacher: np.ndarray
    labels: np.ndarray


MakeInputs = Callable[..., Inputs]


@pytest.fixture(scope="session")
def make_inputs() -> MakeInputs:
    """Random inputs: `(shape, scale, noise, seed)`.

    A teacher with `noise` is the student plus so much of it; without, independent.
    """

    def make(
        shape: tuple[int, ...] = (2, 5, 33),
        scale: float = 3.0,
        noise: float | None = None,
        seed: int = 0,
    ) -> Inputs:
        rng = np.random.default_rng(seed)
        student = (scale * rng.standard_normal(shape)).astype(np.float32)
        other = rng.standard_normal(shape)
        teacher = scale * other if noise is None else student + noise * other
        labels = rng.integers(0, shape[-1], shape[:-1]).astype(np.int32)
        return Inputs(student, teacher.astype(np.float32), labels)

    return make


Evaluate = Callable[..., Pair]


@pytest.fixture(scope="session")
def run_objective() -> Callable[..., tuple]:
    """Losses, and gradients in the student's and the teacher's logits; jitted once."""

    @jax.jit
    def run(objective, student, teacher, labels):
        def total(student, teacher):
            losses = objective(student, teacher, labels)
            return jnp.sum(losses), losses

        return jax.grad(total, (0, 1), has_aux=True)(student, teacher)

    def run_objective(objective, student, teacher, labels=None) -> tuple:
        arrays = (student, teacher, labels)
        arrays = (None if x is None else jnp.asarray(x) for x in arrays)
        gradients, losses = run(objective, *arrays)
        return tuple(map(np.asarray, (losses, *gradients)))

    return run_objective


@pytest.fixture(scope="session")
def evaluate(run_objective: Callable[..., tuple]) -> Evaluate:
    """Loss of every token and the gradient of each in the student's logits."""
    return lambda *args: run_objective(*args)[:2]


MeanLoss = Callable[..., Pair]


@pytest.fixture(scope="session")
def mean_loss() -> MeanLoss:
    """`distillation_loss` and its gradient in the student's logits, jitted once."""

    @jax.jit
    def run(objective, student, teacher, mask, labels):
        from taid_jax.loss import distillation_loss

        def loss(student):
            return distillation_loss(objective, student, teacher, mask, labels)

        return jax.value_and_grad(loss)(student)

    def mean_loss(objective, inputs, mask=None) -> Pair:
        arrays = (inputs.student, inputs.teacher, mask, inputs.labels)
        arrays = (None if x is None else jnp.asarray(x) for x in arrays)
        value, gradient = run(objective, *arrays)
        return np.asarray(value), np.asarray(gradient)

    return mean_loss
