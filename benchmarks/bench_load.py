"""Measures how long a model takes to load and how much memory that needs at most.

Without arguments, SmolLM2-135M-Instruct as a GGUF file and the same model exported as
safetensors. Every load has a process of its own, with the tokenizer included and the
imports left out; the peak is what the process grew by, as the kernel counts it.

    python benchmarks/bench_load.py [SOURCE ...] [--repeats 3] [--json FILE]
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax

from taid_jax.models.files.hub import DEFAULT_TEACHER
from taid_jax.models.files.load import export_model, load_model

_CHILD = "--measure"


def process_bytes(key: str) -> int:
    """Returns what Linux counts of this process: `VmRSS` now, `VmHWM` at most."""
    text = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}; this needs Linux")
    return int(found[1]) * 1024


def measure(source: str) -> dict[str, float]:
    """Returns seconds, those of them at work, and bytes of one load in this process."""
    jax.devices()  # Its start is not the model's.
    before = process_bytes("VmRSS")
    begun, worked = time.perf_counter(), time.process_time()
    model = load_model(source)
    seconds, worked = time.perf_counter() - begun, time.process_time() - worked
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    peak = process_bytes("VmHWM") - before
    return {
        "seconds": seconds,
        "cpu_seconds": worked,
        "weight_bytes": weights,
        "peak_bytes": peak,
    }


def measure_apart(source: str, repeats: int) -> list[dict[str, float]]:
    """Returns what loads in new processes took."""
    command = [sys.executable, __file__, _CHILD, source]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each source and prints a line about it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("sources", nargs="*", help="as of load_model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument(_CHILD, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return 0
    with tempfile.TemporaryDirectory() as work:
        sources = {source: source for source in arguments.sources}
        if not sources:
            folder = pathlib.Path(work) / "model"
            model = load_model(DEFAULT_TEACHER)
            export_model(folder, model.config, model.params, model.tokenizer)
            sources = {
                f"{DEFAULT_TEACHER} (GGUF)": DEFAULT_TEACHER,
                "the same as safetensors": str(folder),
            }
        found = {
            name: measure_apart(source, arguments.repeats)
            for name, source in sources.items()
        }
    for name, runs in found.items():
        seconds = sorted(run["seconds"] for run in runs)
        work = min(run["cpu_seconds"] for run in runs)
        peak = max(run["peak_bytes"] / run["weight_bytes"] for run in runs)
        size = runs[0]["weight_bytes"] / 2**20
        print(
            f"{name}: {size:,.0f} MiB, {len(runs)} loads in {seconds[0]:.2f} to "
            f"{seconds[-1]:.2f} s, at work {work:.2f} s, "
            f"peak {peak:.2f} times the weights"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
