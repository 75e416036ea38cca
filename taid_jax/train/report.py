"""What a run leaves behind: lines of metrics, a report, a picture."""

import json
import math
import pathlib
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import matplotlib
import matplotlib.figure

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
    """

    def __init__(self, path: pathlib.Path, *, first_dropped: int):
        kept = [row for row in read_lines(path) if row["step"] < first_dropped]
        text = "".join(json.dumps(_plain(row)) + "\n" for row in kept)
        # A rename, so that being killed here loses nothing.
        scratch = path.with_suffix(".tmp")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a line and hands it to the operating system at once."""
        self._file.write(json.dumps(_plain(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of JSON lines; a last line cut short is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line, object_pairs_hook=_figures))
        except json.JSONDecodeError:
            break
    return rows


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    scratch = path.with_suffix(".tmp")
    text = json.dumps(_plain(value), indent=2, allow_nan=False)
    scratch.write_text(text + "\n", encoding="utf-8")
    scratch.replace(path)


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
    curve(divergence, "kl", "training KL to the target", "tab:blue")
    divergence.plot(
        [row["step"] for row in evaluations],
        [drawn(row["kl"]) for row in evaluations],
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
    scratch = path.with_suffix(".tmp")
    figure.savefig(scratch, dpi=120, format="png")
    scratch.replace(path)
