"""What a run shows and leaves behind: progress, lines of metrics, report, picture."""

import datetime
import io
import json
import math
import pathlib
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import matplotlib
import matplotlib.figure
import rich.progress
from rich.console import Console

from taid_jax.errors import InputError, explain, parsing
from taid_jax.files import write_whole
from taid_jax.train.folder import writing

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
REPORT = "report.json"
CURVES = "curves.png"


_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How numbers that JSON lacks are written, as strings."""


def _plain(value: Any) -> Any:
    """Returns a value that JSON has: NaN and infinities by their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _figures(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object as it was before `_plain`."""
    return {
        key: _WORDS.get(value, value) if isinstance(value, str) else value
        for key, value in pairs
    }


def number(value: float | int | None, digits: int = 4) -> str:
    """Returns how a figure is printed: `nan` and `inf` as such, `-` where none is."""
    return "-" if value is None else f"{value:.{digits}f}"


class Lines:
    """A file of JSON lines that a resumed run cuts back to where it goes on.

    Args:
        path: Made when it is missing.
        first_dropped: Lines of this step and later are from a run that was cut off.
        rows: Its lines up to there, where they are known; else those of the file.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        first_dropped: int,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ):
        self._path = path
        before = read_lines(path) if rows is None else rows
        kept = [row for row in before if row["step"] < first_dropped]
        with writing(path):
            write_whole(path, "".join(map(_line, kept)).encode())
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line and hands it to the operating system at once."""
        with writing(self._path):
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({key: _plain(value) for key, value in row.items()}) + "\n"


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines; a last line cut short is left out."""
    return find_rows(path)[0]


def find_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], str | None]:
    """Returns the rows of a file of JSON lines, and what is wrong with it, if anything.

    A row has a step, later than that of the row before, and figures.
    """
    if not path.is_file():
        return [], "is no file" if path.exists() else None
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        return [], f"cannot be read: {explain(error)}"
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and number == len(lines):
            break  # Cut short by a kill.
        if row is None or (rows and row["step"] <= rows[-1]["step"]):
            return rows, f"is damaged: line {number} is no row of a later step"
        rows.append(row)
    return rows, None


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        with parsing("line"):
            row = json.loads(line, object_pairs_hook=_figures)
    except InputError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    others = [value for key, value in row.items() if key != "not_finite"]
    figures = all(value is None or isinstance(value, int | float) for value in others)
    return row if figures else None


def write_json(
    path: pathlib.Path, value: Mapping[str, Any], indent: int | None = 2
) -> None:
    """Writes a JSON file, whole or not at all."""
    text = json.dumps(_plain(value), indent=indent, allow_nan=False)
    with writing(path):
        write_whole(path, (text + "\n").encode())


def save_picture(path: pathlib.Path, figure: matplotlib.figure.Figure) -> None:
    """Writes a figure as a PNG file, whole or not at all."""
    picture = io.BytesIO()
    with writing(path):
        figure.savefig(picture, dpi=120, format="png")
        write_whole(path, picture.getvalue())


def read_json(path: pathlib.Path) -> Any:
    """Returns what `write_json` wrote, NaN and infinities as floats.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is no JSON.
    """
    text = path.read_text(encoding="utf-8")
    return json.loads(text, object_pairs_hook=_figures)


def peak_memory() -> int:
    """Returns the most memory that was in use, in bytes.

    Of the fullest device of this process where devices tell (GPUs and TPUs), else of
    the process itself, which on a CPU holds the arrays.
    """
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if each]
    if peaks:
        return max(peaks)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def drawn(value: float | int | None) -> float:
    """Returns a figure for a curve, NaN where it is to have a gap."""
    return math.nan if value is None or not math.isfinite(value) else value


def draw_curves(
    path: pathlib.Path,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    title: str,
) -> None:
    """Draws loss, KL and t over steps, with gaps where they are not finite.

    Args:
        path: The picture, PNG.
        metrics: Rows of `metrics.jsonl`.
        evaluations: Rows of `evaluations.jsonl`; their KL is the held-out one.
        title: Above the curves.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 7), layout="constrained")
    loss, divergence, interpolation = figure.subplots(3, 1, sharex=True)
    steps = [row["step"] for row in metrics]

    def curve(axes: Any, key: str, label: str, color: str) -> None:
        values = [drawn(row.get(key)) for row in metrics]
        axes.plot(steps, values, color=color, linewidth=1.2, label=label)

    figure.suptitle(title)
    curve(loss, "loss", "training loss", "tab:blue")
    loss.set_ylabel("nats per token")
    curve(divergence, "kl_teacher", "training KL(teacher || student)", "tab:blue")
    if any("kl_target" in row for row in metrics):
        curve(divergence, "kl_target", "training KL to the target", "tab:cyan")
    divergence.plot(
        [row["step"] for row in evaluations],
        [drawn(row["kl_teacher"]) for row in evaluations],
        "o-",
        color="tab:red",
        markersize=4,
        label="held-out KL(teacher || student)",
    )
    divergence.set_yscale("log")
    divergence.set_ylabel("nats per token")
    curve(interpolation, "t", "t", "tab:green")
    interpolation.set_ylabel("interpolation t")
    interpolation.set_ylim(-0.02, 1.02)
    interpolation.set_xlabel("step")
    for axes in (loss, divergence, interpolation):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=False)
    save_picture(path, figure)


@runtime_checkable
class Progress(Protocol):
    """Somebody who is shown how it goes."""

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a logged step."""
        ...

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Shows a held-out evaluation."""
        ...

    def say(self, text: str) -> None:
        """Shows a line of text."""
        ...


class ConsoleProgress:
    """Shows loss, KL, t, tokens per second, MFU where it is known, and the time left.

    On a terminal a bar with the last step's numbers is kept up to date; elsewhere about
    twenty lines are printed over the whole run.

    Args:
        console: Where to.
        steps: Optimizer steps of the whole run.
        start: Steps done before, when resumed.
    """

    def __init__(self, console: Console, steps: int, start: int = 0):
        self._console, self._steps, self._start = console, steps, start
        self._began: float | None = None
        self._every = max(1, steps // 20)
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=20),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, numbers="")

    def __enter__(self) -> "ConsoleProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def _left(self, step: int) -> str:
        """Returns the time left, from the mean of the steps so far."""
        now = time.monotonic()
        if self._began is None:
            # The first step is mostly compilation: counted from its end.
            self._began, self._start = now, step
            return "-:--:--"
        seconds = (now - self._began) / max(step - self._start, 1)
        return str(datetime.timedelta(seconds=round(seconds * (self._steps - step))))

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a logged step."""
        step, mfu = row["step"], row.get("mfu")
        busy = "" if mfu is None else f"  MFU {mfu:.1%}"
        numbers = (
            f"loss {number(row['loss'])}  kl_teacher {number(row['kl_teacher'])}  "
            f"t {number(row['t'])}  {row['tokens_per_second']:,.0f} tokens/s{busy}  "
            f"{self._left(step)} left"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step in (1, self._steps):
            self._console.print(f"step {step}/{self._steps}  {numbers}", soft_wrap=True)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Shows a held-out evaluation."""
        text = (
            f"held out at step {row['step']}: KL {number(row['kl_teacher'])} nats, "
            f"reverse {number(row['kl_reverse'])}, "
            f"perplexity of the student {number(row['student_perplexity'], 2)}, "
            f"of the teacher {number(row['teacher_perplexity'], 2)}, "
            f"calibration error {number(row['calibration_error'])}"
        )
        if row["rouge_l"] is not None:
            text += (
                f"; completions: ROUGE-L {number(row['rouge_l'])}, exact match "
                f"{number(row['exact_match'])}, distinct-2 {number(row['distinct_2'])}"
            )
        self.say(text)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, soft_wrap=True, highlight=False)
