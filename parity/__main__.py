"""Shows, number by number, that this project and PyTorch agree.

Runs all sections, or those that are named: losses, schedule, models, run, deviations,
student (needs --run-folder).
Exit status: 0 when every row passes, 1 when one does not, 2 for bad input.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
import warnings
from collections.abc import Sequence

from parity import sections
from parity.recordings import GOLDEN, RecordingError
from parity.rows import AnyRow, failed
from taid_jax.errors import ModelError, how_to_install

NAMES = tuple(sections.SECTIONS)
REPORT = pathlib.Path("parity") / "report.json"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(NAMES)}")
    add(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="sets of random inputs; 0 for the recordings alone (default 1)",
    )
    add(
        "--golden",
        type=pathlib.Path,
        metavar="DIR",
        default=GOLDEN,
        help="recordings, as `python -m parity.record` makes them (default: our own)",
    )
    add(
        "--upstream",
        type=pathlib.Path,
        metavar="CHECKOUT",
        help="a checkout of the published repository, to run the same cases against",
    )
    add("--fetch", action="store_true", help="fetch SmolLM2-135M-Instruct (93 MB)")
    add(
        "--run-folder",
        type=pathlib.Path,
        metavar="DIR",
        help="a finished run, whose exported student PyTorch loads and scores",
    )
    add(
        "--report",
        type=pathlib.Path,
        metavar="FILE",
        help=f"write every number as JSON (default {REPORT} when all sections run)",
    )
    add("--markdown", type=pathlib.Path, metavar="FILE", help="write a short table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the command line, makes the rows, shows them; returns the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.sections if name not in NAMES]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if chosen.seeds < 0:
        parser.error(f"need --seeds >= 0, got {chosen.seeds}")
    if importlib.util.find_spec("torch") is None:
        _complain(f"parity needs PyTorch: {how_to_install('parity')}")
        return 2
    # The comparison is one of arithmetic: both sides on the CPU, in float32 proper.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TQDM_DISABLE", "1")
    return _run(chosen)


def _complain(message: str) -> None:
    print(message, file=sys.stderr)


def _run(chosen: argparse.Namespace) -> int:
    import torch
    import transformers

    from parity.student import RunError
    from parity.table import markdown, print_rows, write_report
    from parity.upstream import UpstreamError, load_upstream

    # The arrays are small: more threads than one wait for each other and for XLA's.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    # Rows that show NaN make numpy and PyTorch warn of it.
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    rows: list[AnyRow] = []
    try:
        if chosen.upstream:
            chosen.upstream = load_upstream(chosen.upstream)
        for name in chosen.sections or NAMES:
            _complain(f"{name} ...")
            made = sections.SECTIONS[name](chosen)
            print_rows(made)
            rows += made
    except (RecordingError, UpstreamError, RunError, ModelError) as error:
        _complain(str(error))
        return 2
    report = chosen.report or (None if chosen.sections else REPORT)
    if report is not None:
        write_report(rows, report, _versions())
    if chosen.markdown is not None:
        chosen.markdown.write_text(markdown(rows), encoding="utf-8")
    wrong = failed(rows)
    print(f"{len(rows)} rows, {len(rows) - len(wrong)} pass, {len(wrong)} fail")
    return 1 if wrong else 0


def _versions() -> dict[str, str]:
    packages = ("jax", "flax", "optax", "torch", "transformers", "numpy")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


if __name__ == "__main__":
    sys.exit(main())
