"""report.html: what a run or a comparison left in its folder, as one page to look at.

The page needs no network and may show anything: texts of data, models and file names
are escaped, and its policy lets no script run but its own.
"""

import base64
import functools
import hashlib
import json
import math
import pathlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from taid_jax.errors import InputError, parsing
from taid_jax.files import write_whole
from taid_jax.settings import Settings, SettingsError, changed, flatten, read_settings
from taid_jax.train.folder import SETTINGS, writing
from taid_jax.train.report import (
    EVALUATIONS,
    METRICS,
    REPORT,
    find_rows,
    read_json,
)

PAGE = "report.html"
SHOWN = "shown.json"
"""What the page of a run shows and no other file has."""

_POINTS = 1000
"""A curve is drawn through so many points at most."""

_LARGEST, _SKIPPED = 20, 50

_NAMES = {
    "kl_teacher": "KL(teacher || student), nats",
    "kl_reverse": "KL(student || teacher), nats",
    "cross_entropy": "cross-entropy, nats",
    "perplexity": "perplexity",
    "loss": "the run's own objective, nats",
    "rouge_l": "ROUGE-L of completions",
    "exact_match": "exact match of completions",
    "distinct_2": "distinct-2 of completions",
    "calibration_error": "calibration error",
}

_TRAINING = (
    ("Loss", "nats", True, {"loss": "loss", "lm_loss": "on the data"}),
    ("t", "", False, {"t": "t"}),
    ("Learning rate", "", False, {"learning_rate": "learning rate"}),
    ("Gradient norm", "", True, {"grad_norm": "before clipping"}),
    ("Throughput", "tokens/s", False, {"tokens_per_second": "tokens/s"}),
)
_KL = {"kl_teacher": "to the teacher", "kl_target": "to the target"}

Chart = dict[str, Any]
"""`title`, `unit`, `log` and `series`: each a `name` and `points`, `[x, y]` or `[x, y,
lowest, highest]` with None where there is a gap."""


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("taid_jax.train", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, *, data: Mapping[str, Any], **values: Any) -> str:
    """Returns a page.

    Args:
        template: Its name in the folder `pages`.
        data: What its script reads: `charts`, and `rows` of tokens.
        values: What the template shows.
    """
    environment = _environment()
    environment.filters |= {"figure": figure, "visible": visible}
    own = {
        name: environment.loader.get_source(environment, f"page.{name}")[0]  # pyright: ignore
        for name in ("css", "js")
    }
    digest = hashlib.sha256(own["js"].encode()).digest()
    return environment.get_template(template).render(
        css=Markup(own["css"]),
        script=Markup(own["js"]),
        script_hash=base64.b64encode(digest).decode(),
        data=_json(data),
        **values,
    )


def write_page(path: pathlib.Path, text: str) -> None:
    """Writes a page, whole or not at all.

    Raises:
        WriteError: If it cannot be written.
    """
    with writing(path):
        # A name of a file may have what UTF-8 cannot write.
        write_whole(path, text.encode("utf-8", "replace"))


def _json(value: Any) -> Markup:
    """Returns JSON that no text in it can end: `<`, `>`, `&` are written as escapes.

    So is all that is not ASCII, the line separators of JavaScript with it.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def figure(value: Any, digits: int = 4) -> str:
    """Returns a figure of a table, with so many digits behind the point or in all."""
    if value is None:
        return "-"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return visible(str(value))
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{digits if abs(value) < 100 else 1}f}"


def visible(text: str) -> str:
    """Returns a text with what cannot be seen, or turns the text round, by its code."""
    hidden = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    joins = "\n\t\u200c\u200d"  # Lines, and what holds letters or pictures together.
    return "".join(
        f"⟨{ord(c):04x}⟩" if unicodedata.category(c) in hidden and c not in joins else c
        for c in text
    )


def curve(name: str, steps: Sequence[int], values: Sequence[Any]) -> dict[str, Any]:
    """Returns a series of a chart; a gap where a value is missing or not finite."""
    every = max(1, math.ceil(len(steps) / _POINTS))
    pairs = list(zip(steps, values, strict=True))
    # The last one always; of the others every so many.
    kept = pairs[::-1][::every][::-1]
    return {"name": name, "points": [[x, _drawn(y)] for x, y in kept]}


def _drawn(value: Any) -> float | None:
    finite = isinstance(value, int | float) and math.isfinite(value)
    return float(f"{value:.6g}") if finite else None


def chart(
    title: str, unit: str, log: bool, series: Sequence[Mapping[str, Any]]
) -> Chart | None:
    """Returns a chart of the series that have anything to draw; None without any."""
    drawn = [s for s in series if any(p[1] is not None for p in s["points"])]
    return (
        {"title": title, "unit": unit, "log": log, "series": drawn} if drawn else None
    )


def _nats(perplexity: float | None) -> float | None:
    return None if perplexity is None else math.log(perplexity) if perplexity else None


def with_cross_entropies(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a held-out evaluation with both cross-entropies, nats per token."""
    own = {
        name.replace("perplexity", "cross_entropy"): _nats(value)
        for name, value in row.items()
        if name.endswith("_perplexity")
    }
    return {**row, **own}


def _charts(
    metrics: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> list[Chart]:
    """Returns the charts of a run, those that have something to show."""

    def of(
        rows: Sequence[Mapping[str, Any]], names: Mapping[str, str], extra: str = ""
    ):
        steps = [row["step"] for row in rows]
        return [
            curve(f"{extra}{name}", steps, [row.get(key) for row in rows])
            for key, name in names.items()
        ]

    ways = {
        "kl_teacher": "KL(teacher || student)",
        "kl_reverse": "KL(student || teacher)",
    }
    sides = {"student_cross_entropy": "student", "teacher_cross_entropy": "teacher"}
    loss, *others = [
        chart(title, unit, log, of(metrics, names))
        for title, unit, log, names in _TRAINING
    ]
    found = [
        loss,
        chart("KL in training", "nats", True, of(metrics, _KL)),
        chart("KL on held-out text", "nats", True, of(held_out, ways)),
        chart("Cross-entropy on held-out text", "nats", False, of(held_out, sides)),
        *others,
    ]
    return [each for each in found if each]


def _table(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, Any, Any, Any]]:
    """Returns name, before, after and the teacher's of each held-out figure."""
    rows = []
    order = [*_NAMES, *after]
    for key in sorted(after, key=lambda k: order.index(k.removeprefix("student_"))):
        name = key.removeprefix("student_")
        if key in ("step", "tokens") or key.startswith("teacher_"):
            continue
        found = before.get(key), after.get(key), after.get(f"teacher_{name}")
        if any(value is not None for value in found):
            rows.append((_NAMES.get(name, name), *found))
    return rows


def _time(
    metrics: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> list[tuple[str, float]]:
    """Returns where the seconds went, each step's with all between its line's."""
    spent: dict[str, float] = {}

    def add(name: str, seconds: float) -> None:
        spent[name] = spent.get(name, 0.0) + max(seconds, 0.0)

    before = metrics[0]["step"] - 1 if metrics else 0
    for number, row in enumerate(metrics):
        steps, before = row["step"] - before, row["step"]
        whole, host, data, dispatch, generate = (
            steps * (row.get(f"{part}_seconds") or 0.0)
            for part in ("step", "host", "data", "dispatch", "generate")
        )
        if number == 0:
            add("first step, with compilation", whole)
            continue
        add("waiting for the devices", whole - host - dispatch - generate)
        add("handing steps over", dispatch)
        add("completions of texts", generate)
        add("data", data)
        add("the host's rest", host - data)
    busy = report.get("utilisation") or {}
    add("evaluation", busy.get("evaluate_seconds") or 0.0)
    add("checkpoints", busy.get("save_seconds") or 0.0)
    if (whole := report.get("seconds")) and not (metrics and metrics[0]["step"] > 1):
        add("reading, compiling, exporting", whole - sum(spent.values()))
    return [(name, seconds) for name, seconds in spent.items() if seconds > 0]


def _largest(rows: Sequence[Sequence[Sequence[Any]]]) -> list[dict[str, Any]]:
    """Returns the tokens with the largest KL, each with the text before it."""

    def kl(place: tuple[int, int]) -> float:
        value = float(rows[place[0]][place[1]][1])
        return math.inf if math.isnan(value) else value  # What is wrong comes first.

    places = [(r, n) for r, row in enumerate(rows) for n, t in enumerate(row) if t[1:]]
    return [
        {
            "row": r,
            "number": n,
            "token": rows[r][n],
            "before": "".join(token[0] for token in rows[r][max(0, n - 12) : n]),
        }
        for r, n in sorted(places, key=lambda place: -kl(place))[:_LARGEST]
    ]


def _own_settings(folder: pathlib.Path) -> tuple[Settings | None, str | None]:
    """Returns the settings of a run, and what is wrong with them."""
    try:
        return read_settings(folder / SETTINGS), None
    except SettingsError as error:
        return None, str(error)


def _read_shown(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what `shown.json` holds; nothing of a damaged one, with a note."""
    path = folder / SHOWN
    if not path.is_file():
        return {"notes": [f"{SHOWN} is missing: the run is of an earlier version"]}
    try:
        with parsing(f"{path} cannot be read"):
            # Not as `read_json`: a token may read "NaN".
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it is no object")
    except InputError as error:
        return {"notes": [str(error)]}
    return found


def run_page(folder: pathlib.Path) -> str:
    """Returns the page of a run, finished or not, from the files of its folder.

    Raises:
        SettingsError: If it is no folder of a run, or a file of it is damaged.
    """
    if not (folder / SETTINGS).is_file():
        raise SettingsError(f"{folder} is no run's folder: it has no {SETTINGS}")
    shown = _read_shown(folder)
    outcome, report = shown.get("outcome", "done"), {}
    notes = [*shown.get("notes", [])]
    with parsing(f"{folder / REPORT} cannot be read", SettingsError):
        if outcome == "done" and (folder / REPORT).is_file():
            report = read_json(folder / REPORT)
    rows = {}
    for name in (METRICS, EVALUATIONS):
        rows[name], fault = find_rows(folder / name)
        if fault:
            notes.append(f"{name} {fault}; what comes before it is shown")
    metrics = rows[METRICS]
    held_out = [with_cross_entropies(row) for row in rows[EVALUATIONS]]
    exported = [r for r in held_out if r["step"] == report.get("exported_step")]
    after = next(iter(exported or held_out[-1:]), None)
    settings, fault = _own_settings(folder)
    notes += [fault] if fault else []
    with parsing(f"{folder / SHOWN} is damaged", SettingsError):
        tokens = [list(map(_visible_token, row)) for row in shown.get("tokens") or []]
        kls = [float(t[1]) for row in tokens for t in row if t[1:]]
        largest = _largest(tokens)
        finite = [kl for kl in kls if math.isfinite(kl)]
        # One token in fifty may be beyond the end of the scale.
        scale = max(float(np.quantile(finite, 0.98)), 1e-6) if finite else 1.0
        charts = _charts(metrics, held_out)
        return render(
            "run.html",
            data={"charts": charts, "rows": tokens},
            title=shown.get("title") or folder.name,
            folder=str(folder),
            outcome=outcome,
            notes=notes,
            lines=shown.get("lines") or [],
            info=shown.get("data") or report.get("data"),
            report=report,
            steps=(metrics[-1]["step"] if metrics else 0),
            settings=settings,
            changed=changed(settings) if settings else {},
            defaults=flatten(Settings()),
            all_settings=flatten(settings) if settings else {},
            after=after["step"] if after else 0,
            table=_table(held_out[0], after) if after else [],
            exported=report.get("exported_step"),
            charts=charts,
            thinned=math.ceil(len(metrics) / _POINTS) if metrics else 1,
            completions=shown.get("completions"),
            tokens=tokens,
            scale=scale,
            shades=[[_shade(t, scale) for t in row] for row in tokens],
            largest=largest,
            skipped=[row for row in metrics if row.get("skipped")],
            most_skipped=_SKIPPED,
            time=_time(metrics, report),
            memory=report.get("peak_memory_bytes"),
            mfu=(report.get("utilisation") or {}).get("mfu"),
            rate=report.get("tokens_per_second"),
        )


def _visible_token(token: Sequence[Any]) -> list[Any]:
    text, *figures = token
    if not figures:
        return [visible(text)]
    tops = [[[visible(piece), prob] for piece, prob in top] for top in figures[3:]]
    return [visible(text), *figures[:3], *tops]


def _shade(token: Sequence[Any], scale: float) -> str | None:
    """Returns how strongly a token is coloured, 0 to 1; None if it does not count."""
    if not token[1:]:
        return None
    kl = float(token[1])
    return f"{min(max(kl / scale, 0.0), 1.0) if math.isfinite(kl) else 1.0:.3f}"
