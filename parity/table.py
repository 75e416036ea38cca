"""Rows of the proof, what makes one pass, and how they are shown."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


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
    """Collects the cases of one row and keeps the worst."""

    def __init__(
        self, section: str, name: str, quantity: str, other: str, tolerance: Tolerance
    ):
        self._head = (section, name, quantity, other)
        self._tolerance = tolerance
        self._cases = self._failures = 0
        self._worst: dict[str, float] = {}
        self._worst_case = ("", -1.0)
        self._note = ""

    def add(
        self,
        case: str,
        error: float | None,
        error_exact: float | None = None,
        other_exact: float | None = None,
        note: str = "",
    ) -> None:
        """Adds a case.

        Where float64 is known, ours has to be right, and it may differ from the other
        side by as much more as that side is wrong. NaN is never within a tolerance.

        Args:
            case: A name for the case.
            error: Of ours against the other side, None when they need not agree.
            error_exact: Of ours against float64.
            other_exact: Of the other side against float64.
            note: Shown with the row.
        """
        limit = self._tolerance.value
        fine = error_exact is None or error_exact <= limit
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
        self._note = note or self._note

    def row(self) -> Row:
        """Returns the row of all cases so far."""
        worst = f"worst: {self._worst_case[0]}" if self._cases > 1 else ""
        return Row(
            *self._head,
            cases=self._cases,
            failures=self._failures,
            error=self._worst.get("error"),
            error_exact=self._worst.get("error_exact"),
            other_exact=self._worst.get("other_exact"),
            tolerance=self._tolerance,
            note="; ".join(part for part in (self._note, worst) if part),
        )


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


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}e}" if value and digits == 1 else f"{value:.{digits + 3}g}"


def _verdict(row: AnyRow) -> str:
    if isinstance(row, Row) and row.skipped:
        return "not run"
    return "pass" if row.passed else "FAIL"


def _is_deviation(rows: Sequence[AnyRow]) -> bool:
    return isinstance(rows[0], Deviation)


def _header(rows: Sequence[AnyRow]) -> list[str]:
    if _is_deviation(rows):
        return ["published", "here", "shown by", "PyTorch", "ours", "float64", ""]
    return [
        "what",
        "number",
        "other side",
        "cases",
        "ours – other",
        "ours – float64",
        "other – float64",
        "tolerance",
        "",
        "note",
    ]


def _cells(row: AnyRow) -> list[str]:
    if isinstance(row, Deviation):
        return [
            row.name,
            row.instead,
            row.quantity
            if row.other == "reference"
            else f"{row.quantity} [{row.other}]",
            _number(row.published, 3),
            _number(row.ours, 3),
            _number(row.exact, 3),
            _verdict(row),
        ]
    return [
        row.name,
        row.quantity,
        row.other,
        str(row.cases),
        _number(row.error),
        _number(row.error_exact),
        _number(row.other_exact),
        "" if row.skipped else _number(row.tolerance.value),
        _verdict(row),
        row.note,
    ]


def _sections(rows: Sequence[AnyRow]) -> dict[str, list[AnyRow]]:
    sections: dict[str, list[AnyRow]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    return sections


def _reasons(rows: Sequence[AnyRow]) -> list[str]:
    """Returns each tolerance's reason once, in the order of the rows."""
    reasons = {
        f"{_number(row.tolerance.value)}: {row.tolerance.why}": None
        for row in rows
        if row.tolerance.why
    }
    return list(reasons)


def print_rows(rows: Sequence[AnyRow], console: Console | None = None) -> None:
    """Prints one table per section, and under it why its tolerances are what they are."""
    console = console or Console(width=170)
    for section, members in _sections(rows).items():
        table = Table(title=f"parity: {section}", title_justify="left")
        for name in _header(members):
            table.add_column(name, overflow="fold")
        for row in members:
            table.add_row(*_cells(row), style=None if row.passed else "bold red")
        console.print(table)
        for reason in _reasons(members):
            console.print(f"  {reason}", highlight=False, markup=False)
        console.print()


def markdown(rows: Sequence[AnyRow]) -> str:
    """Returns the same tables in Markdown."""
    lines: list[str] = []
    for section, members in _sections(rows).items():
        header = [name or "result" for name in _header(members)]
        lines += [f"#### {section}", "", "| " + " | ".join(header) + " |"]
        lines.append("|" + "---|" * len(header))
        lines += [
            "| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |"
            for row in members
        ]
        lines += ["", *(f"- {reason}" for reason in _reasons(members)), ""]
    return "\n".join(lines)


def _plain(value: object) -> object:
    # JSON has no NaN: a string says what it was.
    return (
        str(value) if isinstance(value, float) and not math.isfinite(value) else value
    )


def write_report(
    rows: Sequence[AnyRow], path: pathlib.Path, versions: dict[str, str]
) -> None:
    """Writes every field of every row as JSON.

    Args:
        rows: All rows.
        path: The file; its folder is made when missing.
        versions: What the numbers were made with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [
        {
            **{key: _plain(value) for key, value in dataclasses.asdict(row).items()},
            "passed": row.passed,
        }
        for row in rows
    ]
    report = {"versions": versions, "passed": not failed(rows), "rows": content}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
