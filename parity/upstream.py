"""The published code itself as the other side, from a checkout that the user has.

Nothing of it is part of this project. Its loss modules are imported from the checkout
while stand-ins take the place of the frameworks that they name, and a request for a
CUDA device is answered with the CPU where there is none.
"""

import importlib
import inspect
import math
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parity.published import Published
from parity.stand_ins import on_cpu, stood_in
from parity.torch_reference import Settings

NAME = "upstream"
_PACKAGE = "parity_upstream_losses"
_LOSSES = pathlib.Path("src") / "distil_losses"
_CLASSES = {
    "taid": "TAID",
    "forward_kl": "ForwardKL",
    "reverse_kl": "ReverseKL",
    "total_variation": "TVD",
    "jensen_shannon": "JS",
    "skew_forward_kl": "SkewForwardKL",
    "skew_reverse_kl": "SkewReverseKL",
    "adaptive_kl": "AdaptiveKL",
    "ctkd": "CTKD",
    "dkd": "DKD",
}


class UpstreamError(ValueError):
    """A checkout is not what the published repository looks like."""


class _Anything:
    """Answers every attribute with the number of steps: a trainer that only counts."""

    def __init__(self, steps: int):
        self._steps = steps

    def __getattr__(self, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._steps


class _Module:
    """What the published losses ask of the module that trains."""

    def __init__(self, steps: int = 1, epoch: int = 0):
        self.global_step = 0
        self.current_epoch = epoch
        self.training = True
        self.trainer = _Anything(steps)
        self.device = torch.device("cpu")

    def log(self, *args: object, **kwargs: object) -> None:
        """Does nothing."""

    log_dict = log


class Upstream:
    """The published losses and schedule, called as the rows call the reference.

    Raises:
        UpstreamError: If its losses are not where they should be, or do not import.
    """

    def __init__(self, folder: pathlib.Path):
        self._classes = dict(_load_classes(folder))
        missing = sorted(set(_CLASSES.values()) - set(self._classes))
        if missing:
            raise UpstreamError(
                f"need the published losses in {folder / _LOSSES}, found no class "
                + ", ".join(missing)
            )

    def loss(
        self,
        name: str,
        student: Tensor,
        teacher: Tensor,
        mask: Tensor,
        labels: Tensor,
        settings: Settings,
    ) -> Tensor:
        """Returns the mean loss over counted tokens; as `published_loss`.

        Next-token cross-entropy is no class of its own there: PyTorch's is used.
        """
        if name == "sft":
            flat = student.reshape(-1, student.shape[-1]).float()
            return torch.nn.functional.cross_entropy(flat, labels.reshape(-1))
        with on_cpu():
            objective = self._make(name, settings)
            before = labels.new_zeros((*labels.shape[:-1], 1))
            inputs = {"labels": torch.cat([before, labels], dim=-1)}
            offered: dict[str, Any] = {
                "lightning_module": _Module(),
                "logits": student,
                "teacher_logits": teacher,
                "mask": mask,
                "batch": {"model_inputs": inputs, **inputs},
            }
            result = objective(**_accepted(objective.forward, offered))
        return _scalar(result)

    def temperature_gradient(
        self, student: Tensor, teacher: Tensor, mask: Tensor, epoch: int
    ) -> float:
        """Returns what CTKD's one learned number is given as its gradient."""
        with on_cpu():
            objective = self._make("ctkd", Settings())
            (raw,) = objective.parameters()
            offered = {
                "lightning_module": _Module(epoch=epoch),
                "logits": student,
                "teacher_logits": teacher,
                "mask": mask,
                "batch": {},
            }
            result = objective(**_accepted(objective.forward, offered))
            (gradient,) = torch.autograd.grad(_scalar(result), raw)
        return float(gradient)

    def schedule(self, num_train_steps: int, **settings: float) -> "UpstreamSchedule":
        """Returns the published controller; as `PublishedSchedule`."""
        with on_cpu():
            return UpstreamSchedule(self._classes["TAID"](**settings), num_train_steps)

    def _make(self, name: str, settings: Settings) -> torch.nn.Module:
        cls = self._classes[_CLASSES[name]]
        if name == "taid":
            objective = cls(t_start=min(settings.t, 0.5))
            objective.t = torch.tensor(settings.t)
            return objective
        if name == "dkd":
            return cls(alpha=settings.alpha, beta=settings.beta)
        if name == "adaptive_kl":
            return cls(head_threshold=settings.head_threshold)
        if name == "jensen_shannon":
            return cls(teacher_weight=settings.teacher_weight)
        return cls()


def load_upstream(folder: pathlib.Path) -> Published:
    """Returns the published side of a checkout; raises what `Upstream` does."""
    theirs = Upstream(folder)
    return Published(NAME, theirs.loss, theirs.schedule, theirs.temperature_gradient)


class UpstreamSchedule:
    """The published controller behind the names of `PublishedSchedule`."""

    def __init__(self, objective: Any, num_train_steps: int):
        self._objective = objective
        self._num_train_steps = num_train_steps
        self.delta = torch.tensor(math.nan)

    @property
    def t(self) -> Tensor:
        """Interpolation, float32 scalar."""
        return torch.as_tensor(self._objective.t)

    @property
    def momentum(self) -> Tensor:
        """Running mean of the relative improvement."""
        return torch.as_tensor(self._objective.momentum)

    @property
    def prev_loss(self) -> Tensor:
        """Loss of the call before; infinite before the first."""
        return torch.as_tensor(self._objective.prev_loss)

    def update(self, loss: Tensor, step: int) -> None:
        """Advances on the loss of step `step`; the first call only keeps it."""
        with on_cpu():
            delta = self._objective.update_t(
                loss, global_step=step, num_train_steps=self._num_train_steps
            )
        if isinstance(delta, Tensor):
            self.delta = delta.detach()


def _load_classes(folder: pathlib.Path) -> Iterator[tuple[str, type]]:
    losses = folder / _LOSSES
    if not losses.is_dir():
        raise UpstreamError(
            f"need a checkout of the published repository, with its losses in "
            f"{losses}; found no such folder"
        )
    for name in [n for n in sys.modules if n.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(losses)]
    sys.modules[_PACKAGE] = package
    wanted = set(_CLASSES.values())
    with stood_in(folder), on_cpu():
        for path in sorted(losses.glob("*.py")):
            if path.stem == "__init__":
                continue
            try:
                module = importlib.import_module(f"{_PACKAGE}.{path.stem}")
            except Exception as error:
                raise UpstreamError(
                    f"{path} does not import with its frameworks stood in for: "
                    f"{type(error).__name__}: {error}"
                ) from error
            for name in wanted & set(vars(module)):
                yield name, getattr(module, name)


def _accepted(call: Any, offered: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(call).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in parameters if p.name in offered}


def _scalar(result: Any) -> Tensor:
    if isinstance(result, dict):
        named = [result[key] for key in ("distil_loss", "loss") if key in result]
        result = named[0] if named else next(iter(result.values()))
    return result.reshape(())
