"""Trains teachers and students on Python's own sources, and says what methods are worth.

    taid-jax study --output runs/study            about three hours on two cores
    taid-jax study --quick --output runs/quick    a part of it in ten minutes

Teachers of several sizes are trained from random weights, what they say of the texts is
stored, and students learn from that by every method, each with the best learning rate of
the same grid, from the same starts and on the same batches. The page says what came out,
with intervals. What is done is not done again: the same command goes on where the last
one ended.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import Settings, SettingsError, check_text, from_dict

if TYPE_CHECKING:
    from taid_jax.study.plan import Plan, Run


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        output: Gets the models, a folder per run, and the page.
        quick: The part that takes ten minutes.
        jobs: Runs at a time, each on a core of its own; as many as there are cores when
            0.
        page: The page, .md; what it is made from goes into the folder of its name
            without .md. `study.md` in the output when None.
        only_page: Run nothing; make the page of what is in the page's folder and of
            what is finished in the output.
        sources: A folder with the .py files that are the text; Python's standard
            library when None.
    """

    output: pathlib.Path = pathlib.Path("runs/study")
    quick: bool = False
    jobs: int = 0
    page: pathlib.Path | None = None
    only_page: bool = False
    sources: pathlib.Path | None = None


class StudyError(RuntimeError):
    """A run of the study failed; what is done is kept."""


class Study:
    """The stages of the study, each of which goes on where it ended.

    Args:
        plan: What is trained.
        output: Gets everything.
        jobs: Runs at a time.
        console: Where progress is shown.
    """

    def __init__(
        self, plan: "Plan", output: pathlib.Path, jobs: int, console: Console
    ):
        self._plan, self._output, self._console = plan, output.absolute(), console
        self._cores: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        for core in _cores(jobs):
            self._cores.put(core)
        self._jobs, self._lock = jobs, threading.Lock()
        self._failed = False

    def _folder(self, kind: str, name: str) -> pathlib.Path:
        return self._output / kind / name

    def texts(self, sources: pathlib.Path) -> dict[str, Any]:
        """Writes texts, tokenizer and the models' configs; returns what the texts are.

        Raises:
            SettingsError: If other texts are there than those that would be written.
        """
        from taid_jax.study.texts import train_tokenizer, write_model, write_texts
        from taid_jax.train.report import read_json, write_json

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
        if not all(self._folder("models", name).is_dir() for name in sizes):
            tokenizer = train_tokenizer(folder / "teacher.jsonl", plan.vocab_size)
            for name, size in sizes.items():
                where = self._folder("models", name)
                write_model(where, size, tokenizer, 8 * plan.seq_len)
        write_json(kept, found)
        return found

    def teachers(self, names: Sequence[str]) -> dict[str, Any]:
        """Trains teachers and stores what they say of the students' texts.

        Returns:
            Their size, steps, seconds, and the perplexity on text that they never saw.
        """
        from taid_jax.study.texts import TUNING_FRACTION

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
                    "held_out_fraction": TUNING_FRACTION,
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
                **size._asdict(),
                "steps": plan.teacher_steps,
                "tokens": plan.teacher_steps * plan.teacher_batch * plan.seq_len,
                "learning_rate": rate,
                "seconds": report["seconds"],
            }

        return dict(zip(names, self._each("teacher", names, train), strict=True))

    def _start(self, name: str) -> pathlib.Path:
        """Makes the random weights that a teacher's run is given for a teacher."""
        folder = self._folder("starts", name)
        if not folder.is_dir():
            import jax

            from taid_jax.models.files.export import export_model
            from taid_jax.models.files.load import random_init

            config = self._folder("models", f"student-{next(iter(self._plan.students))}")
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
            "data": self._output / "texts" / "student.jsonl",
            "batch-size": plan.teacher_batch,
            "seq-len": plan.seq_len,
            "output": folder,
        }
        words = [f"--{key}={value}" for key, value in flags.items()]
        log = self._folder("teachers", name) / "store.txt"
        self._command("store", ["--kind=hidden", "--no-pack", *words], log)

    def rates(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Tries the learning rates; returns the records and the best of each method.

        What is the lowest is the cross-entropy on documents that no other run judges by.
        """
        from taid_jax.study.figures import choose_rates

        records = self.students(list(self._plan.tuning()))
        return records, self._plan.rates | choose_rates(records, "cross_entropy")

    def speed(self) -> dict[str, float]:
        """Returns the seconds of a step of SFT and of forward KL, one run at a time.

        With a live teacher and with its store; the median over the steps of three
        alternating runs each.
        """
        from taid_jax.study.plan import Run
        from taid_jax.train.report import read_json, write_json

        kept = self._output / "speed.json"
        if kept.is_file():
            return read_json(kept)
        teacher, student = self._plan.pair
        live = str(self._folder("teachers", teacher) / "run" / "student")
        found: dict[str, list[float]] = {}
        core = self._cores.get()
        _stay_on(core)
        for number in range(3):
            for name, method, more in (
                ("sft", "sft", {}),
                ("stored", "forward_kl", {}),
                ("live", "forward_kl", {"teacher": live}),
            ):
                steps = min(100, self._plan.middle_steps)
                run = Run(method, teacher, student, steps, 1e-3, number, steps)
                settings = self._student_settings(run, {**more, "eval_prompts": 0})
                report = self._train("speed", f"{name}-{number}", settings)
                seconds = report["utilisation"]["step_seconds"]
                found.setdefault(name, []).append(seconds)
        self._cores.put(core)
        medians = {name: sorted(each)[1] for name, each in found.items()}
        write_json(kept, medians)
        return medians

    def students(self, runs: Sequence["Run"]) -> list[dict[str, Any]]:
        """Trains students; returns their records."""
        from taid_jax.study.figures import record

        def train(run: "Run") -> dict[str, Any]:
            settings = self._student_settings(run)
            return record(run, self._train("students", run.name, settings))

        return self._each("student", runs, train)

    def _student_settings(
        self, run: "Run", more: dict[str, Any] | None = None
    ) -> Settings:
        from taid_jax.study.plan import EQUAL_TIME, METHODS, VARIANTS
        from taid_jax.study.texts import TEST_FRACTION, TUNING_FRACTION

        methods = {**METHODS, **VARIANTS, EQUAL_TIME: METHODS["sft"]}
        fraction = TUNING_FRACTION if run.tuning else TEST_FRACTION
        text = "tuning" if run.tuning else "student"
        plan = self._plan
        return self._settings(
            {
                "teacher_store": str(self._folder("stores", run.teacher)),
                "student_config": str(self._folder("models", f"student-{run.student}")),
                "data": str(self._output / "texts" / f"{text}.jsonl"),
                "held_out_fraction": fraction,
                "batch_size": plan.batch_size,
                "steps": run.steps,
                "learning_rate": run.learning_rate,
                "warmup_steps": run.steps // 20,
                "ctkd_ramp_steps": max(1, run.steps // 2),
                "eval_prompts": plan.prompts,
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
        """Returns the report of a run, which is run if it is not finished yet."""
        from taid_jax.cli._comparison import Cell

        folder = self._folder(kind, name)
        run = dataclasses.replace(settings.run, output=str(folder / "run"))
        cell = Cell(name, run.seed, folder, dataclasses.replace(settings, run=run))
        cell.check()
        report = cell.report()
        if report is None:
            self._command("train", cell.prepare(), folder / "log.txt")
            report = cell.report()
        if report is None:
            raise StudyError(f"{folder} has no report")
        # A finished run does not go on.
        shutil.rmtree(cell.run / "checkpoints", ignore_errors=True)
        return report

    def _command(self, command: str, flags: Sequence[str], log: pathlib.Path) -> None:
        from taid_jax.cli.compare import run_logged

        status = run_logged([command, *flags], log, self._console)
        if status:
            raise StudyError(f"{log.parent} failed, and its command can be tried again")

    def _each(
        self, what: str, items: Sequence[Any], do: Callable[[Any], dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Returns what `do` says of each, as many at a time as there are jobs."""
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
                left = seconds / done * (len(items) - done) / 60
                self._console.print(
                    f"{what} {done} of {len(items)}: {name}; at most {left:.0f} min left",
                    highlight=False,
                    soft_wrap=True,
                )
            return found

        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            return list(pool.map(work, items))


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
    plan: "Plan", output: pathlib.Path, jobs: int, sources: pathlib.Path, console: Console
) -> dict[str, Any]:
    """Runs all that is not done yet, and returns the results.

    Raises:
        SettingsError: If the output holds another study.
        StudyError: If a run failed.
    """
    from taid_jax.study.figures import machine

    began = time.monotonic()
    study = Study(plan, output, jobs, console)
    results: dict[str, Any] = {"machine": machine(), "texts": study.texts(sources)}
    results["teachers"] = study.teachers([plan.pair[0]])
    results["step_seconds"] = speed = study.speed()
    tuning, results["rates"] = study.rates()
    main, others = plan.runs(results["rates"], speed["live"] / speed["sft"])
    runs = [*tuning, *study.students(main)]
    results["teachers"] |= study.teachers([n for n in plan.teachers if n != plan.pair[0]])
    runs += study.students(others)
    results["runs"] = runs
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    return results
