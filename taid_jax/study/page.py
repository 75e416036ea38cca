"""The page of the study: tables and pictures, made from its results alone."""

import importlib.resources
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import matplotlib.figure

from taid_jax.study.figures import (
    FIGURES,
    Figure,
    Interval,
    Results,
    choose_rates,
    machine_line,
)
from taid_jax.study.plan import EQUAL_TIME, Run
from taid_jax.train.report import read_json, save_picture

LANGUAGE, PICTURES, DRIFT = "language.json", "pictures.json", "drift.json"
"""Results of the parts, in the page's folder; `language-2.json`: another machine's."""

_OF_PICTURES = (
    Figure("accuracy", "accuracy", 4, -1),
    *(f for f in FIGURES if f.key not in ("rouge_l", "distinct_2")),
)

_OF_DRIFT = (
    Figure("follows", "digits that follow", 3, -1),
    Figure("after_mistake", "right after a mistake", 3, -1),
    Figure("kl_data", "KL on the data's texts", 4, 1),
    Figure("kl_own", "KL on own texts", 4, 1),
    Figure("exposure_bias", "exposure bias", 4, 1),
)

Rows = Mapping[str, Mapping[str, Any]]
"""What the runs of each row of a table have in common."""


_STEM = LANGUAGE.removesuffix(".json")


def result_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the results of a folder, of language models in order of their number."""
    texts = sorted(folder.glob(f"{_STEM}*.json"), key=lambda p: (len(p.stem), p.stem))
    others = (folder / name for name in (PICTURES, DRIFT))
    return [*texts, *(path for path in others if path.is_file())]


def make_page(folder: pathlib.Path) -> str:
    """Returns the page, and draws its picture."""
    found, languages = {}, []
    for path in result_files(folder):
        if path.name in (PICTURES, DRIFT):
            found[path.stem] = read_json(path)
        else:
            picture = f"methods{path.stem.removeprefix(_STEM)}.png"
            languages.append(_language(read_json(path), folder, picture))
    values: dict[str, Any] = {
        "folder": folder.name,
        "equal_time": EQUAL_TIME,
        "languages": [{**part, "place": n} for n, part in enumerate(languages)],
    }
    if "pictures" in found:
        results = Results(found["pictures"]["runs"])
        grid = found["pictures"]["settings"]["rates"]
        values["gap_in_pictures"] = "taid_gap" in results.methods()
        values["picture_edges"] = _edges(results, grid)
        values["picture_tables"] = picture_tables(found["pictures"])
    if "drift" in found:
        results = Results(found["drift"]["runs"])
        rows = {name: {"method": name} for name in results.methods()}
        references = "forward KL, data", "sft, data"
        values["drift_tables"] = _tables(results, rows, references, _OF_DRIFT)
        values["drift_verdict"] = _verdict(
            results, rows, references[0], "exposure_bias"
        )
    home = importlib.resources.files("taid_jax.study")
    template = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: home.joinpath(name).read_text(encoding="utf-8")
        ),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    ).get_template("page.md.jinja")
    return template.render(
        **({"pictures": None, "drift": None} | found | values),
        machine=machine_line,
        ms=lambda seconds: f"{1000 * seconds:.1f}",
    ).replace("\n\n\n", "\n\n")


def picture_tables(found: dict[str, Any]) -> list[str]:
    """Returns the learning rates, figures and differences of the study of pictures."""
    results = Results(found["runs"])
    rows = {name: {"method": name} for name in results.methods()}
    references = "cross_entropy", "forward_kl"
    return [
        _rates(results, found["settings"]["rates"]),
        *_tables(results, rows, references, _OF_PICTURES),
    ]


def _language(
    found: dict[str, Any], folder: pathlib.Path, picture: str
) -> dict[str, Any]:
    results, plan = Results(found["runs"]), found["plan"]
    teacher, student = plan["pair"]
    pair = {"teacher": teacher, "student": student}
    methods, verdicts = {}, {}
    for steps in plan["budgets"]:
        same = {**pair, "budget": steps}
        rows = {name: {**same, "method": name} for name in results.methods(**same)}
        methods[steps] = _tables(results, rows, ("forward_kl", "sft"))
        verdicts[steps] = {
            reference: _verdict(results, rows, reference)
            for reference in ("sft", EQUAL_TIME, "forward_kl")
            if reference in rows
        }
    _draw(results, pair, plan["budgets"], folder / picture)
    middle = {**pair, "budget": plan["middle_steps"]}
    rows = {name: {**middle, "method": name} for name in results.methods(**middle)}
    has_variants = any(name in rows for name in plan["variants"])
    return {
        "language": found,
        "picture": picture,
        "teachers": _teachers(found, results),
        "diverged": [
            "`" + Run(*(each[name] for name in Run._fields)).name + "`"
            for each in found["runs"]
            if each["diverged"]
        ],
        "rates": _rates(results, plan["learning_rates"]),
        "edges": _edges(results, plan["learning_rates"]),
        "methods": methods,
        "verdicts": verdicts,
        "of_variants": _verdict(results, rows, "taid_linear") if has_variants else "",
        "sizes": _sizes(plan, results),
        "variants": _tables(results, rows, ("taid_linear",)) if has_variants else [],
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _tables(
    results: Results,
    rows: Rows,
    references: Sequence[str],
    figures: Sequence[Figure] = FIGURES,
) -> list[str]:
    """Returns a table of figures, and one of differences to each reference."""
    titles = [figure.title for figure in figures]
    tables = [
        _table(
            ["method", "seeds", *titles],
            [
                [
                    name,
                    str(len(results.values(figures[0].key, **row))),
                    *_cells(
                        [results.mean(f.key, **row) for f in figures], figures, _mean
                    ),
                ]
                for name, row in rows.items()
            ],
        )
    ]
    for reference in [name for name in references if name in rows]:
        lines = []
        for name, row in rows.items():
            if name != reference:
                pairs = [
                    results.difference(f.key, row, rows[reference]) for f in figures
                ]
                lines.append([name, *_cells(pairs, figures, _difference)])
        tables.append(_table([f"less {reference}", *titles], lines))
    return tables


def _cells(
    values: Sequence[Interval | None],
    figures: Sequence[Figure],
    write: Callable[[Interval | None, Figure], str],
) -> list[str]:
    """Returns the figures of a row, with their number of seeds where it is less."""
    most = max((value.number for value in values if value is not None), default=0)
    return [
        write(value, figure)
        + (f" (of {value.number})" if value is not None and value.number < most else "")
        for value, figure in zip(values, figures, strict=True)
    ]


def _verdict(
    results: Results, rows: Rows, reference: str, key: str = "cross_entropy"
) -> str:
    """Returns which rows have a lower figure than one of them, and which not."""
    found: dict[str, list[str]] = {"better": [], "worse": [], "within noise": []}
    for name, row in rows.items() if reference in rows else ():
        value = results.difference(key, row, rows[reference])
        if name != reference and value is not None and not math.isinf(value.half):
            word = {-1: "better", 1: "worse", 0: "within noise"}[value.sign]
            found[word].append(f"`{name}`")
    texts = [f"{word}: {', '.join(names)}" for word, names in found.items() if names]
    return "; ".join(texts) or "no differences of two seeds yet"


def _mean(value: Interval | None, figure: Figure) -> str:
    if value is None:
        return ""
    text = f"{value.mean:.{figure.digits}f}"
    return text + (
        "" if math.isinf(value.half) else f" ± {value.half:.{figure.digits}f}"
    )


def _difference(value: Interval | None, figure: Figure) -> str:
    """Returns a difference, marked where its interval leaves 0 out."""
    if value is None:
        return ""
    text = f"{value.mean:+.{figure.digits}f}"
    if math.isinf(value.half):
        return text
    text += f" ± {value.half:.{figure.digits}f}"
    if not value.sign:
        return f"{text} noise"
    words = {0: "", -1: " better", 1: " worse"}
    return f"**{text}**{words[value.sign * figure.sign]}"


def _teachers(found: dict[str, Any], results: Results) -> str:
    best = min(r["figures"].get("cross_entropy", math.inf) for r in results.records)
    rows = []
    for name in found["plan"]["teachers"]:
        each = found["teachers"][name]
        values = results.values("teacher_cross_entropy", teacher=name)
        entropy = next(iter(values.values()), math.nan)
        tokens = f"{each['tokens'] / 1e6:.1f} M"
        size = f"{each['layers']} of {each['width']}"
        figures = f"{entropy:.3f}", f"{best - entropy:.3f}"
        rows.append([name, size, tokens, f"{each['learning_rate']:g}", *figures])
    head = ["teacher", "layers", "tokens", "learning rate", "cross-entropy", "gap"]
    return _table(head, rows)


def _tried(results: Results) -> dict[str, dict[float, float]]:
    """Returns the cross-entropy of each method at each learning rate."""
    tried: dict[str, dict[float, float]] = {}
    for each in results.tuning:
        rates = tried.setdefault(each["method"], {})
        value = each["figures"].get("cross_entropy")
        rates[each["learning_rate"]] = math.inf if value is None else value
    return tried


def _rates(results: Results, grid: Sequence[float]) -> str:
    """Returns the grid of learning rates, the best of each method marked."""
    rows = []
    for method, values in _tried(results).items():
        texts = {
            rate: "diverged" if math.isinf(value) else f"{value:.3f}"
            for rate, value in values.items()
        }
        best = min(values, key=lambda rate: values[rate])
        texts[best] = f"**{texts[best]}**"
        rows.append([method, *(texts.get(rate, "") for rate in grid)])
    head = ["cross-entropy of tuning", *(f"{rate:g}" for rate in grid)]
    return _table(head, rows) if rows else ""


def _edges(results: Results, grid: Sequence[float]) -> list[str]:
    """Returns the methods whose best learning rate is an end of the grid."""
    best = choose_rates(results.tuning, "cross_entropy")
    return [name for name, rate in best.items() if rate in (min(grid), max(grid))]


def _sizes(plan: dict[str, Any], results: Results) -> list[str]:
    """Returns for each student the cross-entropy by method and teacher."""
    teachers, figure = list(plan["teachers"]), FIGURES[0]
    tables = []
    for student in plan["students"] if len(teachers) > 1 else ():
        rows = []
        for method in plan["everywhere"]:
            same = {
                "student": student,
                "budget": plan["middle_steps"],
                "method": method,
            }
            last, first = ({**same, "teacher": teachers[end]} for end in (-1, 0))
            cells = [
                results.mean(figure.key, **same, teacher=name) for name in teachers
            ]
            change = results.difference(figure.key, last, first)
            means = [_mean(cell, figure) for cell in cells]
            rows.append([method, *means, _difference(change, figure)])
        if any(any(row[1:]) for row in rows):
            head = [f"student `{student}`", *teachers, "change"]
            tables.append(_table(head, rows))
    return tables


def _draw(
    results: Results,
    pair: Mapping[str, str],
    budgets: Sequence[int],
    path: pathlib.Path,
) -> None:
    size = (9, 3.2 * len(budgets))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(budgets), 2, squeeze=False)
    for row, steps in zip(axes, budgets, strict=True):
        same = {**pair, "budget": steps}
        methods = results.methods(**same)
        for place, measured in zip(row, FIGURES[:2], strict=True):
            found = [results.mean(measured.key, method=m, **same) for m in methods]
            means = [mean for mean in found if mean is not None]
            halves = [0 if math.isinf(mean.half) else mean.half for mean in means]
            places = range(len(means))
            place.errorbar([m.mean for m in means], places, xerr=halves, fmt="o")
            place.set_yticks(places, methods, fontsize="small")
            place.invert_yaxis()
            place.set_xlabel(f"{measured.title}, nats a token, {steps:,} steps")
            place.grid(alpha=0.3)
    save_picture(path, figure)
