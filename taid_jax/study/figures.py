"""Results of the study: what was measured, means, intervals, differences."""

import importlib.metadata
import math
import os
import pathlib
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit

from taid_jax.study.plan import Run


class Figure(NamedTuple):
    """Something that is measured of a student.

    Attributes:
        key: In `figures` of a run.
        title: At the head of a column.
        digits: After the point.
        sign: 1 where less is better, -1 where more is, 0 where neither is.
    """

    key: str
    title: str
    digits: int
    sign: int


FIGURES = (
    Figure("cross_entropy", "cross-entropy", 3, 1),
    Figure("kl_teacher", "KL(teacher, student)", 3, 1),
    Figure("kl_reverse", "KL(student, teacher)", 3, 1),
    Figure("rouge_l", "ROUGE-L", 3, -1),
    Figure("distinct_2", "distinct-2", 3, 0),
    Figure("calibration_error", "calibration error", 3, 1),
)
"""What is said of each student, on held-out text."""


def figures_of(report: dict[str, Any]) -> dict[str, float | None]:
    """Returns the figures of a run from its report; cross-entropies in nats a token."""
    return {
        "cross_entropy": math.log(report["student_perplexity_after"]),
        "teacher_cross_entropy": math.log(report["teacher_perplexity"]),
        "cross_entropy_before": math.log(report["student_perplexity_before"]),
        "kl_teacher": report["kl_after"],
        **{
            key: report.get(f"{key}_after")
            for key in ("kl_reverse", "rouge_l", "distinct_2", "calibration_error")
        },
    }


class Interval(NamedTuple):
    """A mean and the 95% interval of Student's t about it; one value has no interval.

    Attributes:
        mean: Of the values.
        half: Half the width of the interval, infinite of one value.
        number: Of values.
    """

    mean: float
    half: float
    number: int

    @property
    def sign(self) -> int:
        """1 or -1 where all of the interval is on that side of 0, else 0."""
        if abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def interval(values: Sequence[float]) -> Interval:
    """Returns mean and 95% interval of values that are independent draws.

    Raises:
        ValueError: If there is none.
    """
    count = len(values)
    if not count:
        raise ValueError("need at least one value, got none")
    if count == 1:
        return Interval(values[0], math.inf, 1)
    quantile = float(stdtrit(count - 1, 0.975))
    half = quantile * statistics.stdev(values) / math.sqrt(count)
    return Interval(statistics.fmean(values), half, count)


class Results:
    """The runs that are done.

    Attributes:
        records: Those that count.
        tuning: Those that chose a learning rate.
    """

    def __init__(self, records: Iterable[dict[str, Any]]):
        found = list(records)
        self.records = [each for each in found if not each["tuning"]]
        self.tuning = [each for each in found if each["tuning"]]

    def values(self, key: str, **wanted: Any) -> dict[int, float]:
        """Returns a figure by seed, of the runs that have all that is `wanted`."""
        return {
            each["seed"]: each["figures"][key]
            for each in self.records
            if all(each[name] == value for name, value in wanted.items())
            and each["figures"].get(key) is not None
        }

    def mean(self, key: str, **wanted: Any) -> Interval | None:
        """Returns the mean over the seeds, None where there is no run."""
        values = self.values(key, **wanted)
        return interval(list(values.values())) if values else None

    def difference(
        self, key: str, one: Mapping[str, Any], other: Mapping[str, Any]
    ) -> Interval | None:
        """Returns one minus other over the seeds that both have, which is a paired one.

        Runs of a seed have the same start and the same batches.
        """
        first, second = self.values(key, **one), self.values(key, **other)
        both = [first[seed] - second[seed] for seed in first if seed in second]
        return interval(both) if both else None

    def methods(self, **wanted: Any) -> list[str]:
        """Returns the methods of the runs that have all that is `wanted`."""
        return list(
            dict.fromkeys(
                each["method"]
                for each in self.records
                if all(each[name] == value for name, value in wanted.items())
            )
        )


def record(run: Run, report: dict[str, Any] | None) -> dict[str, Any]:
    """Returns what is kept of a run; one that diverged has no report, nor figures."""
    figures = figures_of(report) if report else {}
    return {
        **run._asdict(),
        "diverged": report is None,
        "figures": {
            key: None if value is None else round(value, 6)
            for key, value in figures.items()
        },
        "seconds": report["seconds"] if report else 0.0,
    }


def choose_rates(tuning: Iterable[dict[str, Any]], key: str) -> dict[str, float]:
    """Returns for each method the learning rate with the lowest figure.

    Args:
        tuning: Records.
        key: What is to be low; NaN, None, and that of a run that diverged, is higher
            than all else.
    """
    best: dict[str, tuple[float, float]] = {}
    for each in tuning:
        value = each["figures"].get(key)
        low = math.inf if value is None or math.isnan(value) else value
        found = low, each["learning_rate"]
        method = each["method"]
        best[method] = min(found, best.get(method, found))
    return {method: rate for method, (_, rate) in best.items()}


def machine() -> dict[str, Any]:
    """Returns what the figures were measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "taid_jax": importlib.metadata.version("taid-jax"),
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1] for line in lines if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()


def machine_line(found: dict[str, Any]) -> str:
    """Returns a sentence about where results were made, and how long it took."""
    machine = found["machine"]
    processor = machine.get("processor") or machine.get("architecture")
    return (
        f"Measured on {machine['cores']} cores ({processor}) with Python "
        f"{machine['python']} and jax {machine['jax']}; the runs took "
        f"{found['seconds'] / 60:,.0f} minutes of a core."
    )
