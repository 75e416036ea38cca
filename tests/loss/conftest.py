"""Every objective beside the float64 oracle, and inputs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss

Pair = tuple[np.ndarray, np.ndarray]
"""The loss of every token and its gradient in the student's logits, float64."""


def oracle_losses(name: str, student, teacher, labels=None, **settings) -> Pair:
    """Value and gradient of `parity.torch_exact`, in float64."""
    reason = "the float64 oracle needs PyTorch: '.[parity]'"
    torch = pytest.importorskip("torch", reason=reason)
    torch.set_num_threads(1)  # The arrays are small: more wait for each other.
    from parity.torch_exact import exact_losses
    from parity.torch_reference import Settings

    if labels is None:
        labels = np.zeros(student.shape[:-1])
    logits = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    losses = exact_losses(
        name,
        logits,
        torch.tensor(teacher, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.int64),
        Settings(**settings),
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    gradient = gradient.numpy().copy()
    # A shift of the logits changes no loss, so the entries add up to 0. Of a student
    # that is nearly certain the largest is a difference of two numbers near 1, and
    # even float64 has its digits only as the sum of the others.
    top = np.asarray(student).argmax(-1)[..., None]
    np.put_along_axis(gradient, top, 0.0, -1)
    np.put_along_axis(gradient, top, -gradient.sum(-1, keepdims=True), -1)
    return losses.detach().numpy(), gradient


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, its name in the oracle, and the numbers that it is given there."""

    name: str
    objective: loss.Objective
    oracle: str
    settings: dict[str, float | str]
    zero: bool
    """Whether it is 0 at equal distributions."""

    def expect(self, s: np.ndarray, u: np.ndarray, labels: np.ndarray) -> Pair:
        return oracle_losses(self.oracle, s, u, labels, **self.settings)


def _case(name: str, make: Callable, variant="", *, oracle="", zero=False, **settings):
    full = f"{name}_{variant}" if variant else name
    return Case(full, make(**settings), oracle or name, settings, zero)


CASES = [
    _case("taid", loss.TAID, t=0.4),
    _case("taid", loss.TAID, "early", t=1e-3),
    _case("forward_kl", loss.ForwardKL),
    _case("forward_kl", loss.ForwardKL, "warm", temperature=2.5),
    _case("reverse_kl", loss.ReverseKL, zero=True),
    _case("jensen_shannon", loss.JensenShannon, zero=True, teacher_weight=0.1),
    _case(
        "jensen_shannon",
        loss.JensenShannon,
        "even",
        zero=True,
        teacher_weight=0.5,
        temperature=2.0,
    ),
    _case("total_variation", loss.TotalVariation, zero=True),
    _case("skew_forward_kl", loss.SkewForwardKL),
    _case("skew_reverse_kl", loss.SkewReverseKL, zero=True),
    _case("adaptive_kl", loss.AdaptiveKL),
    _case("alpha_mixture", loss.AlphaMixture, t=0.4, shape=0),
    _case("alpha_mixture", loss.AlphaMixture, "early", t=1e-3, shape=-1.0),
    _case("alpha_mixture", loss.AlphaMixture, "sharp", t=0.4, shape=3.0),
    _case("alpha_beta", loss.AlphaBeta, zero=True),
    _case("alpha_beta", loss.AlphaBeta, "seeking", zero=True, a=0, b=1),
    _case(
        "alpha_beta", loss.AlphaBeta, "covering", zero=True, a=1, b=0, temperature=2.0
    ),
    _case("concrete_score", loss.ConcreteScore, zero=True),
    _case(
        "concrete_score",
        loss.ConcreteScore,
        "covering",
        zero=True,
        weights="teacher",
        temperature=1.5,
    ),
    _case(
        "entropy_gated", loss.EntropyGated, zero=True, threshold=2.0, temperature=1.5
    ),
    _case("ctkd", loss.CTKD, temperature=4.0),
    _case("dkd", loss.DKD, zero=True),
    _case("dkd", loss.DKD, "warm", zero=True, alpha=0.7, beta=2, temperature=3.0),
    _case("cross_entropy", loss.CrossEntropy, oracle="sft"),
]
KINDS = {
    name: next(case for case in CASES if case.name == name)
    for name in ("taid", "jensen_shannon_even", "ctkd", "dkd", "cross_entropy")
}


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    """Every objective in turn."""
    return request.param


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Case:
    """One objective of each kind, where trying all would only cost time."""
    return KINDS[request.param]


@pytest.fixture
def oracle() -> Callable[..., Pair]:
    """`oracle(name, student, teacher, labels, **settings)`, in float64."""
    return oracle_losses


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
        # Numbers of Python and of NumPy would be programs of their own.
        objective = jax.tree.map(jnp.float32, objective)
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
        def mean(student):
            return loss.distillation_loss(objective, student, teacher, mask, labels)

        return jax.value_and_grad(mean)(student)

    def mean_loss(objective, inputs, mask=None) -> Pair:
        arrays = (inputs.student, inputs.teacher, mask, inputs.labels)
        arrays = (None if x is None else jnp.asarray(x) for x in arrays)
        value, gradient = run(objective, *arrays)
        return np.asarray(value), np.asarray(gradient)

    return mean_loss
