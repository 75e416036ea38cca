"""Section E: the default job and the recipe of questions, for some minutes."""

import functools
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from device.rows import Figures, MissingError, Options, Row
from taid_jax.models.files.hub import SMOLLM2, cache_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = f"--config={ROOT / 'scripts/recipes/questions.yaml'}"
# Flags, and what makes it small.
JOBS: dict[str, tuple[list[str], list[str]]] = {
    "default job": ([], []),
    "recipe questions.yaml": ([RECIPE], ["--eval-prompts=2", "--eval-tokens=4"]),
}
SMALL = ["--batch-size=2", "--student-layers=2", "--held-out-batches=1"]
SAVING = 20
"""Seconds that a run has to save itself after it was asked to stop."""


def rows(options: Options) -> list[Row]:
    """Returns a row for each job."""
    return [
        (name, functools.partial(train, options, *flags))
        for name, flags in JOBS.items()
    ]


def find_smollm2(models: str) -> pathlib.Path:
    """Returns the file or the folder of SmolLM2; nothing is fetched.

    Args:
        models: The file, or a folder that has it or is the model; the cache if empty.

    Raises:
        MissingError: If it is not there.
    """
    given = pathlib.Path(models) if models else cache_folder() / "models"
    # A wheel of it is unpacked on the path.
    packaged = [pathlib.Path(entry, SMOLLM2.member) for entry in sys.path]
    for path in (given / SMOLLM2.file_name, given, *packaged * (not models)):
        if path.is_file() or (path / "config.json").is_file():
            return path
    raise MissingError(f"no {SMOLLM2.file_name} and no model in {given}: give --models")


def train(options: Options, flags: list[str], small: list[str]) -> Figures:
    """Returns the figures of a run that is asked to stop after its share of the time.

    Raises:
        MissingError: Without minutes or without the model.
        RuntimeError: If the run took no step that is in its metrics.
    """
    if options.minutes <= 0:
        raise MissingError("no time for it: give --minutes")
    model = find_smollm2(options.models)
    seconds = 60 * options.minutes / len(JOBS)
    command = [sys.executable, str(ROOT / "scripts/train_tpu.py"), *flags]
    # Every step is in the metrics, so that few are enough.
    command += [f"--teacher={model}", "--log-every=1"]
    command += [*SMALL, *small] * options.small
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "run")
        began = time.perf_counter()
        process = subprocess.Popen([*command, f"--output={output}"], stdout=sys.stderr)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SAVING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - began
        metrics = output / "metrics.jsonl"
        text = metrics.read_text() if metrics.is_file() else ""
    # The last line of a run that was killed may be half of one.
    steps = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    if not steps:
        raise RuntimeError(f"no step in {seconds:.0f} s; see the log")

    def median(figure: str) -> float | None:
        values = [step[figure] for step in steps if step.get(figure) is not None]
        return statistics.median(values) if values else None

    return {
        "steps": len(steps),
        "first_loss": steps[0]["loss"],
        "last_loss": steps[-1]["loss"],
        "first_kl_teacher": steps[0]["kl_teacher"],
        "last_kl_teacher": steps[-1]["kl_teacher"],
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "seconds": seconds,
    }
