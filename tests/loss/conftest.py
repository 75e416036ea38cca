"""Every objective beside the float64 oracle, the recorded outputs, and inputs."""

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

    make: Callable[[], object]
    oracle: str
    settings: dict[str, float | str] = dataclasses.field(default_factory=dict)
    divergence: bool = False
    """Whether it is 0 at equal distributions."""
    name: str = ""

    def expect(self, s: np.ndarray, u: np.ndarray, labels: np.ndarray) -> Pair:
        return oracle_losses(self.oracle, s, u, labels, **self.settings)


def _cases() -> dict[str, Case]:
    from taid_jax import loss

    even = {"teacher_weight": 0.5, "temperature": 2.0}
    early, sharp = {"t": 1e-3, "shape": -1.0}, {"t": 0.4, "shape": 3.0}
    seeking, covering = {"a": 0, "b": 1}, {"a": 1, "b": 0, "temperature": 2.0}
    of_teacher = {"weights": "teacher", "temperature": 1.5}
    warm = {"alpha": 0.7, "beta": 2, "temperature": 3.0}
    cases = {
        "taid": Case(lambda: loss.TAID(0.4), "taid", {"t": 0.4}),
        "taid_early": Case(lambda: loss.TAID(1e-3), "taid", {"t": 1e-3}),
        "forward_kl": Case(loss.ForwardKL, "forward_kl"),
        "forward_kl_warm": Case(
            lambda: loss.ForwardKL(2.5), "forward_kl", {"temperature": 2.5}
        ),
        "reverse_kl": Case(loss.ReverseKL, "reverse_kl", {}, True),
        "jensen_shannon": Case(loss.JensenShannon, "jensen_shannon", {}, True),
        "jensen_shannon_even": Case(
            lambda: loss.JensenShannon(**even), "jensen_shannon", even, True
        ),
        "total_variation": Case(loss.TotalVariation, "total_variation", {}, True),
        "skew_forward_kl": Case(loss.SkewForwardKL, "skew_forward_kl"),
        "skew_reverse_kl": Case(loss.SkewReverseKL, "skew_reverse_kl", {}, True),
        "adaptive_kl": Case(loss.AdaptiveKL, "adaptive_kl"),
        "alpha_mixture": Case(
            lambda: loss.AlphaMixture(0.4, 0), "alpha_mixture", {"t": 0.4}
        ),
        "alpha_mixture_early": Case(
            lambda: loss.AlphaMixture(**early), "alpha_mixture", early
        ),
        "alpha_mixture_sharp": Case(
            lambda: loss.AlphaMixture(**sharp), "alpha_mixture", sharp
        ),
        "alpha_beta": Case(loss.AlphaBeta, "alpha_beta", {}, True),
        "alpha_beta_seeking": Case(
            lambda: loss.AlphaBeta(**seeking), "alpha_beta", seeking, True
        ),
        "alpha_beta_covering": Case(
            lambda: loss.AlphaBeta(**covering), "alpha_beta", covering, True
        ),
        "concrete_score": Case(loss.ConcreteScore, "concrete_score", {}, True),
        "concrete_score_teacher": Case(
            lambda: loss.ConcreteScore(**of_teacher), "concrete_score", of_teacher, True
        ),
        "entropy_gated": Case(
            lambda: loss.EntropyGated(1.0), "entropy_gated", {"threshold": 1.0}, True
        ),
        "ctkd": Case(lambda: loss.CTKD(4.0), "ctkd", {"temperature": 4.0}),
        "dkd": Case(loss.DKD, "dkd", {}, True),
        "dkd_warm": Case(lambda: loss.DKD(**warm), "dkd", warm, True),
        "cross_entropy": Case(loss.CrossEntropy, "sft"),
    }
    return {name: dataclasses.replace(cases[name], name=name) for name in cases}


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
    "alpha_mixture",
    "alpha_mixture_early",
    "alpha_mixture_sharp",
    "alpha_beta",
    "alpha_beta_seeking",
    "alpha_beta_covering",
    "concrete_score",
    "concrete_score_teacher",
    "entropy_gated",
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
def oracle() -> Callable[..., Pair]:
    """`oracle(name, student, teacher, labels, **settings)`, in float64."""
    return oracle_losses


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


@pytest.fixture(scope="session")
def recorded(golden_losses) -> Callable[..., Inputs]:
    """`recorded(name, dtype)`: logits and labels of a recorded case."""

    def inputs(name: str, dtype=jnp.float32) -> Inputs:
        student, teacher = (
            jnp.asarray(golden_losses[f"{name}/{side}"], dtype)
            for side in ("student", "teacher")
        )
        labels = golden_losses[f"{name}/labels"][:, 1:].astype(np.int32)
        return Inputs(student, teacher, labels)

    return inputs


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
