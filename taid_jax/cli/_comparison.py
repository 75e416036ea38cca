"""Several methods from one start, on the same batches: cells, their table, a picture.

A cell is one method with one seed: a run of `taid-jax train` in a process of its own,
so that its memory is its own. Its report, once it is there, is all that counts.
"""

import csv
import dataclasses
import io
import math
import pathlib
import statistics
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from taid_jax.errors import parsing
from taid_jax.recipes import read_recipe
from taid_jax.settings import (
    Settings,
    SettingsError,
    changed,
    flatten,
    from_dict,
    read_settings,
    to_yaml,
)
from taid_jax.train import html
from taid_jax.train.report import (
    EVALUATIONS,
    REPORT,
    drawn,
    read_json,
    read_lines,
    save_picture,
    write_json,
)

FIGURES = {
    "kl": "KL (nats)",
    "kl_reverse": "reverse KL (nats)",
    "student_perplexity": "perplexity",
    "calibration_error": "calibration error",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "distinct_2": "distinct-2",
}
"""What is judged, before and after; a report calls them `kl_before`, `kl_after`, ..."""

BEFORE = "before training"
TOKENS = "tokens/s"
MEMORY = "memory (GiB)"


_OWN = frozenset({"run.output", "run.resume"})
"""Settings in which two runs of one cell may differ."""

_CELLS_OWN = _OWN | {"run.seed"}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method with one seed.

    Attributes:
        method: Its name.
        seed: Of data order and random weights.
        folder: Holds `settings.yaml` and the run's own folder.
        settings: Of the run.
    """

    method: str
    seed: int
    folder: pathlib.Path
    settings: Settings

    @property
    def file(self) -> pathlib.Path:
        """The settings file of the run."""
        return self.folder / "settings.yaml"

    @property
    def run(self) -> pathlib.Path:
        """The run's own folder."""
        return self.folder / "run"

    def check(self) -> None:
        """Raises unless what was begun here was begun with the same settings.

        Raises:
            SettingsError: With a line per difference.
        """
        if not self.file.is_file():
            return
        asked, found = flatten(self.settings), flatten(read_settings(self.file))
        different = [
            f"{name}: {found[name]!r} there, now {asked[name]!r}"
            for name in asked
            if found[name] != asked[name] and name not in _OWN
        ]
        if different:
            raise SettingsError(
                f"{self.folder} holds a cell with other settings; choose another "
                "--output or remove it:\n  " + "\n  ".join(different)
            )

    def report(self) -> dict[str, Any] | None:
        """Returns the report of the finished run, None if there is none yet."""
        path = self.run / REPORT
        with parsing(f"{path} is no report of a run", SettingsError):
            return read_json(path) if path.is_file() else None

    def prepare(self) -> list[str]:
        """Writes the settings file and returns the flags of the run.

        A run that was stopped goes on from its last checkpoint, if it has one.
        """
        with parsing(f"output: cannot write {self.file}", SettingsError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file.write_text(to_yaml(self.settings), encoding="utf-8")
        return [f"--config={self.file}", "--resume"]


def plan_cells(
    config: pathlib.Path | None,
    methods: Sequence[str],
    seeds: Sequence[int],
    output: pathlib.Path,
    overrides: Mapping[str, Any],
    pair: str | None = None,
) -> list[Cell]:
    """Returns the cells, those of one seed together.

    Args:
        config: Settings that all methods share, over those of the pair.
        methods: Names or files of methods.
        seeds: Of the runs.
        output: Gets a folder per cell.
        overrides: Settings laid over those of config and method.
        pair: Name or file of a pair of models.

    Raises:
        SettingsError: If a settings file is missing or cannot be used, or a cell was
            begun with other settings.
    """
    named: dict[str, str] = {}
    for method in methods:
        name = pathlib.Path(method).stem
        if named.setdefault(name, method) != method:
            raise SettingsError(
                f"methods: {named[name]} and {method} are both called {name}, and "
                "would share a folder; rename a file"
            )
    cells = []
    for seed in seeds:
        for method, given in named.items():
            folder = output.absolute() / f"{method}-seed{seed}"
            own = {"seed": seed, "output": str(folder / "run")}
            shared = read_recipe(pair=pair, config=config, method=given)
            # Of several methods not each has a use for them.
            settings = from_dict({**overrides, **own}, shared, strict=False)
            cells.append(Cell(method, seed, folder, settings))
            cells[-1].check()
    return cells


Row = dict[str, list[float]]
"""Figures by name, one of each seed."""


def collect(cells: Sequence[Cell]) -> dict[str, Row]:
    """Returns the rows of the table: before training, then the finished methods.

    Returns:
        For each row its figures, in the order of the seeds. What is the same for all
        methods, the student before training, is taken from the first of them.
    """
    rows: dict[str, Row] = {}
    seen: set[int] = set()
    for cell in cells:
        report = cell.report()
        if report is None:
            continue
        row = rows.setdefault(cell.method, {})
        for key, name in FIGURES.items():
            if (value := report.get(f"{key}_after")) is not None:
                row.setdefault(name, []).append(value)
            first = report.get(f"{key}_before")
            if first is not None and cell.seed not in seen:
                rows.setdefault(BEFORE, {}).setdefault(name, []).append(first)
        seen.add(cell.seed)
        if (rate := report.get("tokens_per_second")) is not None:
            row.setdefault(TOKENS, []).append(rate)
        if (memory := report.get("peak_memory_bytes")) is not None:
            row.setdefault(MEMORY, []).append(memory / 2**30)
    before = {BEFORE: rows.pop(BEFORE)} if BEFORE in rows else {}
    return before | rows


def table_cells(rows: Mapping[str, Row]) -> list[list[str]]:
    """Returns the table's texts, headings first: means, standard deviations of seeds.

    Args:
        rows: What `collect` found.
    """
    names = [*FIGURES.values(), TOKENS, MEMORY]
    names = [name for name in names if any(name in row for row in rows.values())]
    table = [["method", "seeds", *names]]
    for method, row in rows.items():
        seeds = max(len(values) for values in row.values())
        figures = [_with_spread(row.get(name, []), name, seeds) for name in names]
        table.append([method, str(seeds), *figures])
    return table


def make_table(rows: Mapping[str, Row]) -> str:
    """Returns the rows as a Markdown table; see `table_cells`."""
    head, *others = ("| " + " | ".join(row) + " |" for row in table_cells(rows))
    rule = "|---" + "|---:" * (head.count("|") - 2) + "|"
    return "\n".join([head, rule, *others]) + "\n"


def make_csv(cells: Sequence[Cell]) -> str:
    """Returns a row for every cell, of RFC 4180: method, seed, all figures of a report.

    Figures have the names of `report.json`. Those of a cell that is not finished are
    empty, as is what a report lacks; what is not finite is `nan`, `inf` or `-inf`.
    """
    rows = []
    for cell in cells:
        figures = {
            name: value
            for name, value in (cell.report() or {}).items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        rows.append({"method": cell.method, "seed": cell.seed, **figures})
    text = io.StringIO(newline="")
    names = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _with_spread(values: Sequence[float], name: str, seeds: int) -> str:
    """Returns mean and standard deviation; of how many, where a seed has no figure."""
    if len(values) < seeds and values:
        return f"{_with_spread(values, name, len(values))} (of {len(values)})"
    if not values:
        return ""
    digits = {TOKENS: 0, "perplexity": 2, MEMORY: 2}.get(name, 4)
    if not all(map(math.isfinite, values)):
        # One seed that failed is not to be lost in a mean, nor is it a spread.
        return f"{sum(values):.{digits}f}"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}"


_CURVES = {
    "kl_teacher": ("KL(teacher || student)", "nats", True),
    "kl_reverse": ("KL(student || teacher)", "nats", True),
    "student_cross_entropy": ("Cross-entropy of the student", "nats", False),
    "rouge_l": (FIGURES["rouge_l"], "", False),
}


def make_page(cells: Sequence[Cell], output: pathlib.Path) -> str:
    """Returns comparison.html: the table, curves of all methods, links to the cells."""
    curves: dict[str, list[list[dict[str, Any]]]] = {}
    shown = []
    own = [
        {k: v for k, v in changed(cell.settings).items() if k not in _CELLS_OWN}
        for cell in cells
    ]
    shared = {k: v for k, v in own[0].items() if all(k in o and o[k] == v for o in own)}
    for cell, settings in zip(cells, own, strict=True):
        finished, page = cell.report() is not None, cell.run / html.PAGE
        if finished:
            found = read_lines(cell.run / EVALUATIONS)
            rows = [html.with_cross_entropies(row) for row in found]
            curves.setdefault(cell.method, []).append(rows)
        others = [f"{k}={v}" for k, v in settings.items() if k not in shared]
        link = urllib.parse.quote(str(page.relative_to(output.absolute())))
        shown.append(
            {
                "method": cell.method,
                "seed": cell.seed,
                "state": "finished" if finished else "not finished",
                "settings": ", ".join(others),
                "link": link if page.is_file() else None,
            }
        )
    charts = [
        html.chart(*about, [_band(name, runs, key) for name, runs in curves.items()])
        for key, about in _CURVES.items()
    ]
    charts = [each for each in charts if each]
    methods = {cell.method: None for cell in cells}
    seeds = {cell.seed for cell in cells}
    return html.render(
        "comparison.html",
        data={"charts": charts, "rows": []},
        title=f"Comparison of {len(methods)} methods, {len(seeds)} seeds",
        folder=str(output.absolute()),
        table=table_cells(collect(cells)),
        charts=charts,
        cells=shown,
        unfinished=[
            f"{cell.method} with seed {cell.seed}"
            for cell in cells
            if cell.report() is None
        ],
        shared=shared,
    )


def _band(
    name: str, runs: Sequence[Sequence[Mapping[str, Any]]], key: str
) -> dict[str, Any]:
    """Returns a method's curve: mean, lowest and highest of its seeds at each step."""
    at: dict[int, list[float]] = {}
    for row in (row for run in runs for row in run):
        at.setdefault(row["step"], []).append(drawn(row.get(key)))
    points = []
    for step, values in sorted(at.items()):
        # Of all seeds: there is a gap where one is not finite.
        whole = len(values) == len(runs) and all(map(math.isfinite, values))
        mean = [statistics.fmean(values), min(values), max(values)]
        points.append([step, *(mean if whole else [None] * 3)])
    return {"name": name, "points": points}


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws held-out KL over steps, and ROUGE-L at the end where it was asked for.

    Lines and bars are means over the seeds; bands and whiskers reach from the lowest to
    the highest.

    Args:
        cells: Those without a report are left out.
        path: The picture, PNG.
    """
    done: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.report() is not None:
            done.setdefault(cell.method, []).append(cell)
    rows = collect(cells)
    rouge = {
        method: row[FIGURES["rouge_l"]]
        for method, row in rows.items()
        if FIGURES["rouge_l"] in row
    }
    figure = matplotlib.figure.Figure(figsize=(12, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    colours = matplotlib.colormaps["tab20"]
    for number, (method, group) in enumerate(done.items()):
        runs = [read_lines(cell.run / EVALUATIONS) for cell in group]
        steps = [row["step"] for row in runs[0]]
        found = [[drawn(row["kl_teacher"]) for row in run] for run in runs]
        # Of all seeds: there is a gap where one is not finite.
        at_step = np.array(found)
        low, high = at_step.min(axis=0), at_step.max(axis=0)
        curves.plot(steps, at_step.mean(axis=0), color=colours(number), label=method)
        curves.fill_between(steps, low, high, color=colours(number), alpha=0.2)
    curves.set(xlabel="step", ylabel="held-out KL(teacher || student), nats per token")
    curves.set_yscale("log")
    curves.legend(frameon=False, fontsize="small")
    means = [statistics.fmean(values) for values in rouge.values()]
    below = [mean - min(v) for mean, v in zip(means, rouge.values(), strict=True)]
    above = [max(v) - mean for mean, v in zip(means, rouge.values(), strict=True)]
    bars.barh(list(rouge), means, xerr=[below, above], color="tab:blue", capsize=3)
    bars.invert_yaxis()
    bars.set_xlabel("ROUGE-L of held-out answers")
    for axes in (curves, bars):
        axes.grid(alpha=0.3)
    save_picture(path, figure)


def write_results(cells: Sequence[Cell], output: pathlib.Path) -> str:
    """Writes table, figures, picture and page, and returns the table."""
    rows = collect(cells)
    table = make_table(rows)
    (output / "comparison.md").write_text(table, encoding="utf-8")
    write_json(output / "comparison.json", rows)
    (output / "comparison.csv").write_bytes(make_csv(cells).encode())
    draw(cells, output / "comparison.png")
    html.write_page(output / "comparison.html", make_page(cells, output))
    return table
