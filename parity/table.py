"""How the rows of the proof are shown: tables, Markdown and `report.json`."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from parity.rows import AnyRow, Deviation, Row, failed


def _number(value: float | None, digits: int = 1) -> str:
    if value is None:
        return "-"
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
        "ours vs other",
        "ours vs float64",
        "other vs float64",
        "tolerance",
        "",
        "note",
    ]


def _cells(row: AnyRow) -> list[str]:
    if isinstance(row, Deviation):
        return [
            row.name,
            row.instead,
            row.quantity if row.other == "PyTorch" else f"{row.quantity} [{row.other}]",
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
    """Prints one table per section, and under it the reasons of its tolerances."""
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


def _nearest_its_tolerance(rows: Sequence[Row]) -> Row:
    """Returns the row that is closest to failing, or furthest beyond it."""

    def share(row: Row) -> float:
        error = row.error if row.error_exact is None else row.error_exact
        limit = row.tolerance.value
        if error is None or error == 0.0:
            return 0.0
        return math.inf if math.isnan(error) or limit == 0.0 else error / limit

    def plain(row: Row) -> bool:
        # What a format rounds away would hide what the arithmetic gets right.
        return not row.quantity.startswith(("bfloat16", "float16"))

    return max(rows, key=lambda row: (not row.passed, plain(row), share(row)))


_SHORTENED = ("losses", "schedule", "models")


def _merged(rows: Sequence[AnyRow]) -> list[AnyRow]:
    """Returns one row per name: the one nearest its tolerance, for all of them."""
    names: dict[str, list[Row]] = {}
    kept: list[AnyRow] = []
    for row in rows:
        if isinstance(row, Deviation) or row.section not in _SHORTENED:
            kept.append(row)
        else:
            names.setdefault(row.name, []).append(row)
    for same in names.values():
        others = dict.fromkeys(row.other for row in same)
        kept.append(
            dataclasses.replace(
                _nearest_its_tolerance(same),
                other="; ".join(others),
                cases=sum(row.cases for row in same),
                note=same[0].note if same[0].skipped else "",
            )
        )
    return kept


def markdown(rows: Sequence[AnyRow]) -> str:
    """Returns short tables in Markdown: of each name, the row nearest its tolerance."""
    lines: list[str] = []
    for section, members in _sections(rows).items():
        members = _merged(members)
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
    """Writes every field of every row as JSON, and what the numbers were made with."""
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
