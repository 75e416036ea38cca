"""One command that says of an accelerator whether this library is right and fast there.

    python benchmarks/check_device.py --output FOLDER

Five sections: A right, B the head, C the train step, D generation, E real training
(for the minutes that are given). Without E it takes less than five minutes: each
section is computed by processes of their own, JAX and PyTorch apart, which are ended
after their time. FOLDER/check_device.json and check_device.md are written anew after
every row, and what the processes say goes to check_device.log.

Needs jax, flax, torch and transformers; what else is missing is taken from wheels in
the folder `--wheels`. The exit status is 0 if every row of A passes (or A is left out),
1 if one does not, and 2 for bad input.
"""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "benchmarks")]

from device.rows import MARK, Options, run_rows, tell  # noqa: E402

from taid_jax.errors import shorten  # noqa: E402
from taid_jax.files import write_whole  # noqa: E402

SECTIONS = {
    "A": "right: error against its limit",
    "B": "the head, forward and backward",
    "C": "the train step",
    "D": "generation",
    "E": "real training",
}
LOG = "check_device.log"
VERSIONS = ("jax", "jaxlib", "flax", "torch", "transformers", "liger-kernel")
_PLATFORMS = {"gpu": "cuda,cpu", "tpu": "tpu,cpu", "cpu": "cpu"}


class Part(NamedTuple):
    """What one process computes.

    Attributes:
        section: Its letter.
        module: Of the package `device`.
        function: Gives its rows.
        seconds: After which it is ended; None where `--minutes` says it.
    """

    section: str
    module: str
    function: str
    seconds: float | None

    @property
    def uses_jax(self) -> bool:
        """Whether its process has the device by JAX."""
        return self.section != "E" and self.function != "torch_rows"


# Together less than five minutes. What PyTorch is compared with comes before it.
PARTS = (
    Part("A", "right", "rows", 75),
    Part("B", "head", "jax_rows", 45),
    Part("B", "head", "torch_rows", 30),
    Part("C", "step", "jax_rows", 80),
    Part("C", "step", "torch_rows", 30),
    Part("D", "generate", "jax_rows", 20),
    Part("D", "generate", "torch_rows", 15),
    Part("E", "real", "rows", None),
)
_ROOM = 90
"""Seconds that section E has beside its minutes: to start, and to save what it did."""


@dataclasses.dataclass
class Report:
    """What is known so far, written after every change.

    Attributes:
        folder: Where it is written.
        about: The machine and the versions.
        rows: In the order in which they were done.
    """

    folder: pathlib.Path
    about: dict[str, Any]
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, section: str, **row: Any) -> None:
        """Adds a row, writes all and says it."""
        self.rows.append({"section": section, **row})
        self.write()
        print(f"{section} {row['row']}: {_said(row)}", flush=True)

    def summary(self) -> dict[str, dict[str, int]]:
        """Returns how many rows of each section passed, were measured, skipped, ..."""
        return {
            section: dict(Counter(row["status"] for row in self.of(section)))
            for section in SECTIONS
        }

    def goals(self) -> list[dict[str, Any]]:
        """Returns the goals, none of which is met or missed with small shapes."""
        unknown = {"met": None} if self.about["small"] else {}
        return [goal | unknown for goal in find_goals(self.rows)]

    def of(self, section: str) -> list[dict[str, Any]]:
        """Returns the rows of a section."""
        return [row for row in self.rows if row["section"] == section]

    def write(self) -> None:
        """Writes both files, each seen whole or not at all."""
        goals, summary = self.goals(), self.summary()
        found = {"about": self.about, "summary": summary, "goals": goals}
        text = json.dumps({**found, "rows": self.rows}, indent=2) + "\n"
        write_whole(self.folder / "check_device.json", text.encode())
        lines = [f"# {self.about.get('device', 'No device yet')}", ""]
        lines += [f"- {name}: {_shown(value)}" for name, value in self.about.items()]
        lines += ["", *_table(goals)]
        for section, title in SECTIONS.items():
            rows = [
                {name: value for name, value in row.items() if name != "section"}
                for row in self.of(section)
            ]
            said = ", ".join(f"{n} {status}" for status, n in summary[section].items())
            lines += [f"## {section}: {title}", "", said or "left out", ""]
            lines += _table(rows)
        write_whole(self.folder / "check_device.md", "\n".join(lines).encode())


def _shown(value: object) -> str:
    """Returns a figure as a table has it."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value).replace("|", "\\|")


def _said(row: dict[str, Any]) -> str:
    """Returns the figures of a row as one line."""
    figures = (
        f"{name} {_shown(value)}"
        for name, value in row.items()
        if name not in ("row", "status") and value is not None
    )
    return ", ".join([row["status"], *figures])


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of a table with every column that a row has."""
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names)]
    lines += [[_shown(row.get(name)) for name in names] for row in rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def find_goals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each goal, its figure, and whether that meets it; None without one."""

    def best(section: str, name: str, figure: str) -> float | None:
        """Returns the least time, or the most of another figure, of rows so named."""
        found = [
            row[figure]
            for row in rows
            if row["section"] == section
            and re.search(name, row["row"])
            and row.get(figure) is not None
        ]
        return (min if figure == "ms" else max)(found, default=None)

    def ratio(section: str, ours: str, other: str, figure: str) -> float | None:
        one, another = best(section, ours, figure), best(section, other, figure)
        return None if one is None or another is None else one / another

    live, per_second = "live teacher, remat", "tokens_per_second"
    found = [
        (
            f"head, {dtype}: at most 1.3 of the time of its products",
            ratio("B", f"^fused, TAID, {dtype}", f"^four products.*{dtype}", "ms"),
            lambda figure: figure <= 1.3,
        )
        for dtype in ("bfloat16", "float32")
    ]
    liger = ratio("B", "^fused, forward KL, bfl", "^Liger, forward KL, bfl", "ms")
    mfu, step = best("C", live, "mfu"), ratio("C", live, "transformers", per_second)
    found += [
        ("head, bfloat16, forward KL: less than Liger's time", liger, lambda x: x < 1),
        ("step: MFU of at least 0.5", mfu, lambda x: x >= 0.5),
        ("step: at least 1.2 of transformers' speed", step, lambda x: x >= 1.2),
    ]
    return [
        {"goal": goal, "figure": figure, "met": None if figure is None else met(figure)}
        for goal, figure, met in found
    ]


def take_wheels(folder: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Installs aside what is in a folder of wheels and not on this machine.

    Returns:
        Names and versions of what was taken.

    Raises:
        subprocess.CalledProcessError: If pip does not take one.
    """
    names = {path.name.split("-")[0] for path in folder.glob("*.whl")}
    missing = sorted(name for name in names if not _version(name))
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index"]
        command += ["--no-deps", f"--find-links={folder}", f"--target={target}"]
        subprocess.run([*command, *missing], check=True)
    found = importlib.metadata.distributions(path=[str(target)])
    return sorted(f"{each.name} {each.version}" for each in found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_driver() -> str | None:
    """Returns the version of NVIDIA's driver, if there is one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() or None


def run_part(
    report: Report,
    part: Part,
    args: argparse.Namespace,
    wheels: pathlib.Path,
    seconds: float,
) -> None:
    """Computes one part in a process of its own, row by row into the report.

    Rows that it does not come to are told with the reason.
    """
    options = ["--part", str(PARTS.index(part)), f"--minutes={args.minutes}"]
    options += [f"--models={args.models}"] if args.models else []
    options += ["--small"] if args.small else []
    platform = args.platform or report.about.get("platform")
    options += [f"--platform={platform}"] if platform else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH"), str(wheels)])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if part.function == "torch_rows":
        # Beside PyTorch, JAX is not to take the device's memory.
        env["JAX_PLATFORMS"] = "cpu"
    elif args.platform:
        env["JAX_PLATFORMS"] = _PLATFORMS[args.platform]
    elif "cpu" not in env.get("JAX_PLATFORMS", "cpu"):
        env["JAX_PLATFORMS"] += ",cpu"
    planned, log = [f"{part.module}, {part.function}"], report.folder / LOG
    with log.open("a") as errors:
        print(f"== {part.section} {part.module}, {part.function}", file=errors)
        errors.flush()
        process = subprocess.Popen(
            [sys.executable, __file__, *options],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            end_group(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if not line.startswith(MARK):
                    errors.write(line)
                    continue
                told = json.loads(line.removeprefix(MARK))
                if "planned" in told:
                    planned = told["planned"]
                elif "row" in told:
                    planned.remove(told["row"])
                    report.add(part.section, **told)
                else:
                    report.about |= told
            status = process.wait()
        finally:
            timer.cancel()
            end_group(process)
    if late.is_set():
        why = f"ended after {seconds:.0f} s"
    else:
        said = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "")
        why = f"exit status {status}: {shorten(last.strip())}"
    for row in planned:
        report.add(
            part.section, row=row, status="not reached", note=f"{why}; see {LOG}"
        )


def end_group(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _lacks_device(platform: str | None, args: argparse.Namespace) -> bool:
    """Returns whether there is a CPU alone, for which the shapes are too large."""
    return platform == "cpu" and not args.small


def work(part: Part, args: argparse.Namespace) -> int:
    """Computes the rows of a part, in its own process."""
    if part.uses_jax:
        import jax

        device = jax.devices()[0]
        tell(
            device=device.device_kind,
            platform=jax.default_backend(),
            devices=jax.device_count(),
            runtime=" ".join(device.client.platform_version.split()),
        )
        if _lacks_device(jax.default_backend(), args):
            return 2
    module = importlib.import_module(f"device.{part.module}")
    options = Options(args.small, args.platform or "", args.minutes, args.models or "")
    run_rows(getattr(module, part.function)(options))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, help="folder of the report")
    parser.add_argument("--platform", choices=_PLATFORMS, help="JAX's own by default")
    parser.add_argument(
        "--small", action="store_true", help="shapes for two cores of a CPU"
    )
    parser.add_argument("--only", default="ABCDE", help="sections, such as A,B")
    parser.add_argument(
        "--wheels", type=pathlib.Path, help="folder that has what is not installed"
    )
    parser.add_argument("--models", help="file or folder of SmolLM2; else the cache")
    parser.add_argument("--minutes", type=float, default=0.0, help="of section E")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="multiplies the limits of time"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.only = set(args.only.upper().replace(",", ""))
    if wrong := args.only - set(SECTIONS):
        parser.error(f"need sections of {', '.join(SECTIONS)} for --only, got {wrong}")
    if args.output is None and args.part is None:
        parser.error("need --output, a folder for the report")
    if args.wheels and not args.wheels.is_dir():
        parser.error(f"--wheels: there is no folder {args.wheels}")
    if args.minutes < 0 or args.patience <= 0:
        parser.error("need --minutes >= 0 and --patience > 0")
    return args


def main(arguments: Sequence[str]) -> int:
    """Runs the sections, and returns 1 unless all of A that was asked for passes."""
    args = parse(arguments)
    if args.part is not None:
        return work(PARTS[args.part], args)
    # So that what was started is ended too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / LOG).write_text("")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wheels = pathlib.Path(folder)
        try:
            taken = take_wheels(args.wheels, wheels) if args.wheels else []
        except subprocess.CalledProcessError as error:
            print(
                f"error: --wheels: pip ended with {error.returncode}", file=sys.stderr
            )
            return 2
        about: dict[str, Any] = {"small": args.small, "driver": find_driver()}
        about["taken from wheels"] = taken
        about |= {name: _version(name) for name in VERSIONS}
        report = Report(args.output, about)
        print(f"taken from wheels: {_shown(taken)}", flush=True)
        report.write()
        for part in PARTS:
            if part.section in args.only:
                seconds = part.seconds or 60 * args.minutes + _ROOM
                run_part(report, part, args, wheels, args.patience * seconds)
            if _lacks_device(report.about.get("platform"), args):
                why = "JAX has a CPU alone, for which there is --small"
                print(f"error: {why}; see {args.output / LOG}", file=sys.stderr)
                return 2
    for goal in report.goals():
        met = {None: "not decided", True: "met", False: "not met"}[goal["met"]]
        print(f"{goal['goal']}: {met}, {_shown(goal['figure']) or 'no figure'}")
    for section, counts in report.summary().items():
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        print(f"{section}: {said or 'left out'}")
    print(f"{time.monotonic() - began:.0f} s; {args.output / 'check_device.md'}")
    return int(any(row["status"] != "pass" for row in report.of("A")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
