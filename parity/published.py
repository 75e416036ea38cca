"""The published side of a comparison: the reference in PyTorch, or a checkout."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parity.subjects import CTKD_RAW, TorchLoss
from parity.torch_reference import (
    MakeSchedule,
    PublishedSchedule,
    Settings,
    ctkd_strength,
    ctkd_temperature,
    published_loss,
)

TemperatureGradient = Callable[[Tensor, Tensor, Tensor, int], float]


def temperature_slope(
    loss: TorchLoss, student: Tensor, teacher: Tensor, mask: Tensor
) -> float:
    """Returns the slope of CTKD in the number that its temperature is made of."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    raw = torch.tensor(CTKD_RAW, dtype=wide, requires_grad=True)
    settings = Settings(temperature=ctkd_temperature(raw))
    labels = torch.zeros_like(mask).long()
    value = loss("ctkd", student, teacher, mask, labels, settings)
    (gradient,) = torch.autograd.grad(value, raw)
    return float(gradient)


def temperature_gradient(
    student: Tensor, teacher: Tensor, mask: Tensor, epoch: int
) -> float:
    """Returns what the number of CTKD's temperature is given in an epoch, of 10."""
    slope = temperature_slope(published_loss, student, teacher, mask)
    return ctkd_strength(epoch) * slope


class Published(NamedTuple):
    """The published objectives and schedule.

    Attributes:
        name: Of the side.
        loss: Mean loss of logits.
        schedule: TAID's controller.
        temperature_gradient: CTKD's, in the number that its temperature is made of.
    """

    name: str = "PyTorch"
    loss: TorchLoss = published_loss
    schedule: MakeSchedule = PublishedSchedule
    temperature_gradient: TemperatureGradient = temperature_gradient


REFERENCE = Published()
