"""Progress on a terminal, or as plain lines where there is none."""

import datetime
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from taid_jax.evaluate import HeldOut
from taid_jax.train.report import number


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
        self._console = console
        self._steps = steps
        self._start = start
        self._began: float | None = None
        self._every = max(1, steps // 20)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=False,
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
            f"loss {number(row['loss'])}  kl {number(row['kl_teacher'])}  "
            f"t {number(row['t'])}  {row['tokens_per_second']:,.0f} tokens/s{busy}  "
            f"{self._left(step)} left"
        )
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step in (1, self._steps):
            self._console.print(f"step {step}/{self._steps}  {numbers}", soft_wrap=True)

    def evaluation(self, step: int, found: HeldOut) -> None:
        """Shows a held-out evaluation."""
        text = (
            f"held out at step {step}: KL {number(found.kl)} nats, perplexity of the "
            f"student {number(found.student_perplexity, 2)}, of the teacher "
            f"{number(found.teacher_perplexity, 2)}"
        )
        if found.rouge_l is not None:
            text += (
                f"; answers: ROUGE-L {number(found.rouge_l)}, exact match "
                f"{number(found.exact_match)}"
            )
        self.say(text)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._bar.console.print(text, soft_wrap=True, highlight=False)
