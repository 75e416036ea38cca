"""When a batch is what the student itself writes: the rules of GKD and DistiLLM.

References:
    Agarwal et al., GKD, 2023 (arXiv:2306.13649), algorithm 1; Ko et al., DistiLLM, 2024
    (arXiv:2402.03898), section 3.2 and algorithm 1.
"""

import math
from typing import Literal, NamedTuple


class Plan(NamedTuple):
    """What is done at a step.

    Attributes:
        answer: The student answers the batch's prompts; its answers join the buffer.
        train_on: The batch as the `data` have it, the new `answers`, or a batch drawn
            from the `buffer`.
    """

    answer: bool
    train_on: Literal["data", "answers", "buffer"]


DATA = Plan(answer=False, train_on="data")


def plan_mixed(draw: float, rate: float) -> Plan:
    """Returns the plan of GKD: answers of the student in a fixed share of the steps.

    Args:
        draw: Uniform in [0, 1).
        rate: The share.
    """
    return Plan(answer=True, train_on="buffer") if draw < rate else DATA


def plan_adaptive(
    draw: float, *, threshold: float, progress: float, full: bool
) -> Plan:
    """Returns the plan of DistiLLM: the further it gets, the fewer answers are new.

    Args:
        draw: Uniform in [0, 1).
        threshold: Share of the steps that train on answers of the student.
        progress: Steps done before, as a share of all steps.
        full: Whether the buffer is.
    """
    if draw >= threshold:
        return DATA
    if draw < threshold * (1 - progress) or not full:
        return Plan(answer=True, train_on="answers")
    return Plan(answer=False, train_on="buffer")


class Threshold(NamedTuple):
    """The share of DistiLLM's steps that train on answers, and what moves it.

    Attributes:
        value: From 0 to 1.
        loss: The held-out loss that the next one is compared with; None before the
            first.
    """

    value: float = 0.0
    loss: float | None = None

    def after(self, loss: float, step: float) -> "Threshold":
        """Returns the threshold after a held-out evaluation.

        The first loss is stored. A later one that is at or above the stored one raises
        the threshold and takes its place; one that is below changes nothing.

        Args:
            loss: Of the evaluation; nothing changes when it is not finite.
            step: By how much the threshold rises.
        """
        if not math.isfinite(loss):
            return self
        if self.loss is None:
            return Threshold(self.value, loss)
        if loss < self.loss:
            return self
        return Threshold(min(self.value + step, 1.0), loss)
