"""The stages of the study: texts, teachers, learning rates, students."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.cli._comparison import Cell
from taid_jax.cli.compare import run_logged
from taid_jax.files import hold_folder
from taid_jax.models.files.export import export_model
from taid_jax.models.files.load import random_init
from taid_jax.settings import Settings, SettingsError, from_dict
from taid_jax.study.figures import choose_rates, machine, record
from taid_jax.study.plan import EQUAL_TIME, METHODS, VARIANTS, Plan, Run, StudyError
from taid_jax.study.texts import FRACTIONS, train_tokenizer, write_model, write_texts
from taid_jax.train.report import METRICS, read_json, read_lines, write_json


class Unfinished(Exception):  # noqa: N818 - nothing went wrong
    """Something would have to be run."""


class DivergedError(StudyError):
    """A run was given up after steps in a row that were not finite."""


class Study:
    """The stages of the study, each of which goes on where it ended.

    Args:
        plan: What is trained.
        output: Gets everything.
        jobs: Runs at a time; with none nothing is run, and what is not finished is
            passed over.
        console: Where progress is shown.
    """

    def __init__(self, plan: Plan, output: pathlib.Path, jobs: int, console: Console):
        self._plan, self._output, self._console = plan, output.absolute(), console
        self._cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for core in _cores(jobs):
            self._cores.put(core)
        self._jobs, self._lock = jobs, threading.Lock()
        self._failed = False

    def _folder(self, kind: str, name: str) -> pathlib.Path:
        return self._output / kind / name

    def results(self, sources: pathlib.Path) -> dict[str, Any]:
        """Runs what is not done yet, and returns what came of all of it.

        Args:
            sources: A folder with the .py files that are the text.

        Raises:
            SettingsError: If the output holds another study, or there is nothing to
                show.
            StudyError: If a run failed.
        """
        plan = self._plan
        found: dict[str, Any] = {"machine": machine(), "plan": dataclasses.asdict(plan)}
        found["texts"] = self.texts(sources)
        nothing = SettingsError(f"output: {self._output} has nothing to show yet")
        if not self._jobs and not (self._output / "speed.json").is_file():
            raise nothing
        # The last is the largest, and takes longest.
        found["teachers"] = self.teachers([*plan.teachers][::-1])
        found["step_seconds"] = speed = self.speed()
        tuning, rates = self.rates()
        if not rates.keys() >= {*plan.methods}:
            raise nothing
        wanted = plan.runs(rates, speed["live"] / speed["sft"])
        runs = [*tuning, *self.students(wanted)]
        planned = sum(1 for _ in plan.tuning()) + len(wanted)
        everything = [*runs, *found["teachers"].values()]
        seconds = round(sum(each["seconds"] for each in everything), 1)
        return {
            **found,
            "rates": rates,
            "runs": runs,
            "planned": planned,
            "seconds": seconds,
        }

    def texts(self, sources: pathlib.Path) -> dict[str, Any]:
        """Writes texts, tokenizer and the models' configs; returns what the texts are.

        Raises:
            SettingsError: If other texts are there than those that would be written.
        """
        plan, folder = self._plan, self._output / "texts"
        folder.mkdir(parents=True, exist_ok=True)
        found = write_texts(sources, folder)
        kept = self._output / "texts.json"
        if kept.is_file() and read_json(kept)["sha256"] != found["sha256"]:
            raise SettingsError(
                f"output: {self._output} holds a study of other texts than those in "
                f"{sources}; choose another --output"
            )
        sizes = {f"teacher-{name}": size for name, (size, _) in plan.teachers.items()}
        sizes |= {f"student-{name}": size for name, size in plan.students.items()}
        # The tokenizer is the last file of each.
        made = [self._folder("models", name) / "tokenizer.json" for name in sizes]
        if not all(path.is_file() for path in made):
            tokenizer = train_tokenizer(folder / "teacher.jsonl", plan.vocab_size)
            for name, size in sizes.items():
                where = self._folder("models", name)
                write_model(where, size, tokenizer, 8 * plan.seq_len)
        for name in ("student", "tuning"):
            self._tokenise(name, folder)
        write_json(kept, found)
        return found

    def _tokenise(self, name: str, texts: pathlib.Path) -> None:
        """Prepares a text, so that not every run has to."""
        folder, plan = self._folder("data", name), self._plan
        if (folder / "manifest.json").is_file():
            return
        flags = {
            "data": texts / f"{name}.jsonl",
            "tokenizer": self._folder("models", f"student-{plan.pair[1]}"),
            "max-tokens": plan.seq_len,
            "held-out-fraction": FRACTIONS[name],
            "output": folder,
        }
        self._command("prepare", _flags_of(flags), texts / f"{name}.txt")

    def teachers(self, names: Sequence[str]) -> dict[str, Any]:
        """Trains teachers and stores what they say of the students' texts.

        Returns:
            Their sizes, steps, tokens, learning rates and seconds, by name.
        """
        plan = self._plan

        def train(name: str) -> dict[str, Any]:
            size, rate = plan.teachers[name]
            config = self._folder("models", f"teacher-{name}")
            settings = self._settings(
                {
                    # It is its own teacher here: only the tokenizer is taken from it.
                    "teacher": str(self._start(name)),
                    "student_config": str(config),
                    "objective": "sft",
                    "data": str(self._output / "texts" / "teacher.jsonl"),
                    "held_out_fraction": FRACTIONS["teacher"],
                    "batch_size": plan.teacher_batch,
                    "steps": plan.teacher_steps,
                    "learning_rate": rate,
                    "warmup_steps": min(100, plan.teacher_steps // 10),
                    "save_every": 500,
                    "eval_prompts": 0,
                    "seed": 0,
                }
            )
            report = self._train("teachers", name, settings)
            self._store(name)
            return {
                "name": name,
                **size._asdict(),
                "steps": plan.teacher_steps,
                "tokens": plan.teacher_steps * plan.teacher_batch * plan.seq_len,
                "learning_rate": rate,
                "seconds": report["seconds"],
            }

        return {each.pop("name"): each for each in self._each("teacher", names, train)}

    def _start(self, name: str) -> pathlib.Path:
        """Makes the random weights that a teacher's run is given for a teacher."""
        folder = self._folder("starts", name)
        if not folder.is_dir():
            config = self._folder("models", f"student-{self._plan.pair[1]}")
            model = random_init(config, jax.random.key(0))
            export_model(folder, model.config, model.params, model.tokenizer)
        return folder

    def _store(self, name: str) -> None:
        """Stores what a teacher says of all that students are trained and judged on."""
        folder = self._folder("stores", name)
        if (folder / "manifest.json").is_file():
            return
        plan = self._plan
        flags = {
            "teacher": self._folder("teachers", name) / "run" / "student",
            "data": self._folder("data", "student"),
            "batch-size": plan.teacher_batch,
            "seq-len": plan.seq_len,
            "output": folder,
        }
        log = self._folder("teachers", name) / "store.txt"
        self._command("store", ["--kind=hidden", "--no-pack", *_flags_of(flags)], log)

    def rates(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Tries the learning rates; returns the records and the best of each method.

        That of the lowest cross-entropy on documents that nothing else is judged by.
        """
        records = self.students(list(self._plan.tuning()))
        return records, {**self._plan.rates, **choose_rates(records, "cross_entropy")}

    def speed(self) -> dict[str, float]:
        """Returns the seconds of a step of SFT and of forward KL, one run at a time.

        With a live teacher and with its store; each the median of the runs' medians,
        and the runs of the three alternate.
        """
        kept = self._output / "speed.json"
        if kept.is_file():
            return read_json(kept)
        teacher, student = self._plan.pair
        live = str(self._folder("teachers", teacher) / "run" / "student")
        found: dict[str, list[float]] = {}
        core = self._cores.get()
        _stay_on(core)
        for number in range(self._plan.timed):
            for name, method, more in (
                ("sft", "sft", {}),
                ("stored", "forward_kl", {}),
                ("live", "forward_kl", {"teacher": live}),
            ):
                steps = min(100, self._plan.middle_steps)
                run = Run(method, teacher, student, steps, 1e-3, number, steps)
                settings = self._student_settings(
                    run, {**more, "eval_prompts": 0, "held_out_batches": 1}
                )
                report = self._train("speed", f"{name}-{number}", settings)
                seconds = report["utilisation"]["step_seconds"]
                found.setdefault(name, []).append(seconds)
        self._cores.put(core)
        medians = {name: statistics.median(each) for name, each in found.items()}
        write_json(kept, medians)
        return medians

    def students(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Trains students; returns their records."""

        def train(run: Run) -> dict[str, Any]:
            settings = self._student_settings(run)
            try:
                report = self._train("students", run.name, settings)
            except DivergedError:
                report = None
            return record(run, report)

        return self._each("student", runs, train)

    def _student_settings(
        self, run: Run, more: dict[str, Any] | None = None
    ) -> Settings:
        methods = {**METHODS, **VARIANTS, EQUAL_TIME: METHODS["sft"]}
        text = "tuning" if run.tuning else "student"
        plan = self._plan
        of_pair = (run.teacher, run.student) == tuple(plan.pair)
        return self._settings(
            {
                "teacher_store": str(self._folder("stores", run.teacher)),
                "student_config": str(self._folder("models", f"student-{run.student}")),
                "data": str(self._folder("data", text)),
                "held_out_fraction": FRACTIONS[text],
                "batch_size": plan.batch_size,
                "steps": run.steps,
                "learning_rate": run.learning_rate,
                "warmup_steps": run.steps // 20,
                "ctkd_ramp_steps": max(1, run.steps // 2),
                # Shown of the pair alone.
                "eval_prompts": plan.prompts if of_pair and not run.tuning else 0,
                "eval_tokens": plan.seq_len // 2,
                "seed": run.seed,
                **methods[run.method],
                **(more or {}),
            }
        )

    def _settings(self, values: dict[str, Any]) -> Settings:
        plan = self._plan
        shared = {
            "seq_len": plan.seq_len,
            # Each sequence begins with its own first token, whatever else there is.
            "pack": False,
            "held_out_batches": plan.held_out_batches,
            "eval_every": 0,
            "save_every": 0,
            "log_every": 20,
            "keep": 1,
        }
        if "teacher" in values:
            values = {k: v for k, v in values.items() if k != "teacher_store"}
        return from_dict({**shared, **values}, strict=False)

    def _train(self, kind: str, name: str, settings: Settings) -> dict[str, Any]:
        """Returns the report of a run, which is run if it is not finished yet.

        Raises:
            DivergedError: If it is finished, and has no report because of that.
            StudyError: If it failed otherwise.
        """
        folder = self._folder(kind, name)
        run = dataclasses.replace(settings.run, output=str(folder / "run"))
        cell = Cell(name, run.seed, folder, dataclasses.replace(settings, run=run))
        cell.check()
        report = cell.report()
        if report is None and not _diverged(cell):
            with contextlib.suppress(StudyError):
                self._command("train", cell.prepare(), folder / "log.txt")
            report = cell.report()
        if report is None:
            if _diverged(cell):
                raise DivergedError(f"{folder} diverged")
            raise StudyError(f"{folder} failed, and its command can be tried again")
        # A finished run does not go on.
        shutil.rmtree(cell.run / "checkpoints", ignore_errors=True)
        return report

    def _command(self, command: str, flags: Sequence[str], log: pathlib.Path) -> None:
        if not self._jobs:
            raise Unfinished
        status = run_logged([command, *flags], log, self._console)
        if status:
            raise StudyError(f"{log.parent} failed, and its command can be tried again")

    def _each(
        self, what: str, items: Sequence[Any], do: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns what `do` says of each, as many at a time as there are jobs."""
        if not self._jobs:
            found = []
            for item in items:
                with contextlib.suppress(Unfinished):
                    found.append(do(item))
            return found
        done, began = 0, time.monotonic()

        def work(item: Any) -> dict[str, Any]:
            nonlocal done
            if self._failed:
                raise StudyError("another run failed")
            core = self._cores.get()
            try:
                _stay_on(core)
                found = do(item)
            except BaseException:
                self._failed = True
                raise
            finally:
                self._cores.put(core)
            with self._lock:
                done += 1
                name = getattr(item, "name", item)
                seconds = time.monotonic() - began
                left = round(seconds / done * (len(items) - done) / 60)
                line = f"{what} {done} of {len(items)}: {name}; about {left} min left"
                _flags.say(self._console, line)
            return found

        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            return list(pool.map(work, items))


def _diverged(cell: Cell) -> bool:
    """Returns whether a run ended with as many wrong steps in a row as end one."""
    most = cell.settings.run.max_consecutive_nonfinite
    last = read_lines(cell.run / METRICS)[-most:]
    return len(last) == most and all(row["skipped"] for row in last)


def _flags_of(values: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in values.items()]


def _cores(jobs: int) -> list[int | None]:
    """Returns a core for each job, where the system lets a process choose one."""
    if not hasattr(os, "sched_getaffinity"):
        return [None] * jobs
    cores = sorted(os.sched_getaffinity(0))
    return [cores[number % len(cores)] for number in range(jobs)]


def _stay_on(core: int | None) -> None:
    """Keeps this thread, and the processes that it starts, on a core."""
    if core is not None:
        os.sched_setaffinity(0, {core})


def run_study(
    plan: Plan,
    output: pathlib.Path,
    jobs: int,
    sources: pathlib.Path,
    console: Console,
) -> dict[str, Any]:
    """Runs all that is not done yet, and returns the results.

    With no jobs nothing is run: the results are those of what is finished. See
    `Study.results`.

    Raises:
        InputError: If another process holds the output, and what `results` raises.
    """
    with contextlib.ExitStack() as held:
        if jobs:
            lock, note = hold_folder(output)
            held.callback(os.close, lock)
            if note:
                _flags.say(console, note)
        return Study(plan, output, jobs, console).results(sources)
