"""Rows of the proof, and what makes one pass."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far two sides may be apart.

    Attributes:
        value: The largest error that passes.
        why: Where the number comes from: the format, and the size of the sum.
    """

    value: float
    why: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that both sides compute, at its worst over several cases.

    Attributes:
        section: The subcommand that made the row.
        name: What is computed.
        quantity: Which number of it, and in which format.
        other: The other side: PyTorch, a recording, a checkout of the published code.
        cases: Cases that were tried.
        failures: Those outside the tolerance.
        error: Largest error of ours against the other side; None where the two are not
            meant to agree.
        error_exact: Largest error of ours against float64.
        other_exact: Largest error of the other side against float64.
        tolerance: Of each case.
        note: The worst case, or what else should be known.
        skipped: Nothing was tried, and `note` says why; neither passes nor fails.
    """

    section: str
    name: str
    quantity: str
    other: str
    cases: int
    failures: int
    error: float | None
    error_exact: float | None
    other_exact: float | None
    tolerance: Tolerance
    note: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether something was tried and all of it was within the tolerance."""
        return self.skipped or (self.cases > 0 and self.failures == 0)


@dataclasses.dataclass(frozen=True)
class Deviation:
    """One place where the published code is not followed, and who is right.

    Attributes:
        name: What the published code does.
        instead: What is done here.
        quantity: The number that shows it.
        other: Who computed the published number.
        published: That number.
        ours: The same number here.
        exact: The same in float64, from the definition.
        tolerance: Of ours against `exact`, relative to it.
        distance: How far `published` has to be from `exact`, relative to it, for the
            row to show anything.
    """

    name: str
    instead: str
    quantity: str
    other: str
    published: float
    ours: float
    exact: float
    tolerance: Tolerance
    distance: float
    section: str = "deviations"

    @property
    def passed(self) -> bool:
        """Whether ours is the exact number and the published one is not."""
        scale = abs(self.exact) or 1.0
        right = abs(self.ours - self.exact) <= self.tolerance.value * scale
        apart = abs(self.published - self.exact) / scale
        return right and (math.isnan(apart) or apart >= self.distance)


class Tally:
    """Collects the cases of one row and keeps the worst.

    Args:
        section: As in `Row`, like the next four.
        name: What is computed.
        quantity: Which number of it.
        other: The other side.
        tolerance: Of each case.
        drifting: Roundings grow with every step of what is computed, in every float32
            program alike: ours may be as far from float64 as the other side is, and by
            the tolerance further.
    """

    def __init__(
        self,
        section: str,
        name: str,
        quantity: str,
        other: str,
        tolerance: Tolerance,
        drifting: bool = False,
    ):
        self._head = (section, name, quantity, other)
        self._tolerance = tolerance
        self._drifting = drifting
        self._cases = self._failures = 0
        self._worst: dict[str, float] = {}
        self._worst_case = ("", -1.0)

    def add(
        self,
        case: str,
        error: float | None,
        error_exact: float | None = None,
        other_exact: float | None = None,
    ) -> None:
        """Adds a case.

        Where float64 is known, ours has to be right, and it may differ from the other
        side by as much more as that side is wrong. NaN is never within a tolerance.

        Args:
            case: A name for the case.
            error: Of ours against the other side, None when they need not agree.
            error_exact: Of ours against float64.
            other_exact: Of the other side against float64.
        """
        # Numbers of numpy are not JSON's.
        error, error_exact, other_exact = (
            None if value is None else float(value)
            for value in (error, error_exact, other_exact)
        )
        limit = self._tolerance.value
        drift = (other_exact or 0.0) if self._drifting else 0.0
        fine = error_exact is None or error_exact <= limit + drift
        if error is not None:
            fine = fine and error <= limit + (other_exact or 0.0)
        if error is None and error_exact is None:
            raise ValueError(f"{self._head}: case {case} compares nothing")
        self._cases += 1
        self._failures += not fine
        values = {
            "error": error,
            "error_exact": error_exact,
            "other_exact": other_exact,
        }
        for key, value in values.items():
            if value is not None:
                self._worst[key] = _larger(self._worst.get(key, 0.0), value)
        decisive = error if error_exact is None else error_exact
        if decisive is not None and not decisive <= self._worst_case[1]:
            self._worst_case = (case, decisive)

    def row(self) -> Row:
        """Returns the row of all cases so far."""
        return Row(
            *self._head,
            cases=self._cases,
            failures=self._failures,
            error=self._worst.get("error"),
            error_exact=self._worst.get("error_exact"),
            other_exact=self._worst.get("other_exact"),
            tolerance=self._tolerance,
            note=f"worst: {self._worst_case[0]}" if self._cases > 1 else "",
        )


class Tallies:
    """The rows of one section, made as cases come in.

    Args:
        section: The subcommand.
        order: Names in the order of the rows; the others come last.
    """

    def __init__(self, section: str, order: Sequence[str] = ()):
        self._section, self._order = section, list(order)
        self._tallies: dict[tuple[str, str, str], Tally] = {}

    def add(
        self,
        key: tuple[str, str, str],
        tolerance: Tolerance,
        case: str,
        *errors: float | None,
    ) -> None:
        """Adds a case to the row of a name, a quantity and another side."""
        if key not in self._tallies:
            self._tallies[key] = Tally(self._section, *key, tolerance)
        self._tallies[key].add(case, *errors)

    def rows(self) -> list[Row]:
        """Returns the rows of all cases so far."""
        rows = [tally.row() for tally in self._tallies.values()]
        known = {name: index for index, name in enumerate(self._order)}
        return sorted(rows, key=lambda row: known.get(row.name, len(known)))


def triple(error: Callable, ours: Any, theirs: Any, exact: Any) -> list[float | None]:
    """Returns how far ours is from the other side, and both from float64.

    None where there is no other side.
    """
    pairs = ((ours, theirs), (ours, exact), (theirs, exact))
    return [None if a is None or b is None else error(a, b) for a, b in pairs]


def skipped(section: str, name: str, why: str) -> Row:
    """Returns a row that says why something was not tried."""
    nothing = Tolerance(0.0, "")
    return Row(
        section, name, "", "", 0, 0, None, None, None, nothing, note=why, skipped=True
    )


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


AnyRow = Row | Deviation


def failed(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Returns the rows that did not pass."""
    return [row for row in rows if not row.passed]
