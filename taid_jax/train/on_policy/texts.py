"""Batches of texts that student or teacher complete, in place of those of the data."""

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from taid_jax.data import ExampleSet, NumpyBatch
from taid_jax.data.batches import row_order
from taid_jax.data.tokens import Example
from taid_jax.settings import OnPolicySettings, SettingsError
from taid_jax.train.on_policy.buffer import Completion, ReplayBuffer
from taid_jax.train.on_policy.generation import Complete
from taid_jax.train.on_policy.rules import Rows, fill_rows, plan_step, prompts_with_room
from taid_jax.train.throughput import Throughput
from taid_jax.types import Params

_PATIENCE = 256
"""So many empty completions in a row are no accident."""

_SAMPLES, _OF_PROMPT = 3, 120
"""So many completions are shown, each after so many tokens of its prompt."""


class OnPolicyBatches:
    """The batches of a run that trains on completions, of the data too where it does.

    All draws come from the seed, the number of the step and of the prompt, so that they
    are the same on all processes and after a resume. Every process holds the whole
    buffer.

    Args:
        settings: With `texts` other than `data`.
        examples: The training side of the data.
        complete: Has student or teacher complete prompts.
        complete_beside: Of pairs has the teacher complete prompts without an answer.
        ends: Tokens that end a completion.
        batch_size: Rows of a batch, over all processes.
        steps: Steps of the whole run.
        seed: Of the order of the data and of the draws.
        process_index: This process.
        process_count: How many share the batch.

    Attributes:
        buffer: The completions so far.
        threshold: DistiLLM's share of the steps.
        held_out_loss: The loss that the next one is compared with.
        counts: How many completions were written, by how they end.

    Raises:
        SettingsError: If no prompt leaves room for a completion.
    """

    def __init__(
        self,
        settings: OnPolicySettings,
        examples: ExampleSet,
        complete: Complete,
        *,
        complete_beside: Complete | None = None,
        ends: Sequence[int],
        batch_size: int,
        steps: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._settings, self._examples = settings, examples
        self._complete, self._ends = complete, frozenset(ends)
        self._complete_beside = complete_beside
        self._batch_size, self._steps, self._seed = batch_size, steps, seed
        self._pairs = settings.texts == "pairs"
        self._rollout = settings.rollout_batch or batch_size // (1 + self._pairs)
        size = batch_size // process_count
        self._part = slice(process_index * size, (process_index + 1) * size)
        self._has_room = prompts_with_room(settings, examples)
        self._order = row_order(examples, seed)
        # Rows that were taken; prompts completed ahead of the pace of a batch a step;
        # empty completions in a row.
        self._place = self._ahead = self._empty = 0
        reuse = settings.reuse or (1 if settings.prompts_suffice else None)
        self.buffer = ReplayBuffer(settings.buffer_capacity, reuse)
        self.threshold = 0.0
        self.held_out_loss: float | None = None
        self.counts: collections.Counter[str] = collections.Counter()
        self._trained: list[Completion] = []
        self._step = 0

    def batch(
        self, student: Params, teacher: Params, step: int, throughput: Throughput
    ) -> NumpyBatch:
        """Returns this process's rows of what a step trains on.

        Args:
            student: The student's parameters before the step.
            teacher: The teacher's.
            step: Its number, from 1.
            throughput: Measures what is waited for and generated.

        Raises:
            SettingsError: If nothing but empty completions comes.
        """
        rng = np.random.default_rng((self._seed, step))
        plan = plan_step(
            self._settings,
            rng.random(),
            threshold=self.threshold,
            progress=(step - 1) / self._steps,
            full=self.buffer.full,
        )
        self._step, self._trained = step, []
        if plan.train_on == "data":
            rows = [self._next_row() for _ in range(self._batch_size)][self._part]
            return self._examples.batch(rows, len(rows))
        if plan.generate is None:
            self._place += self._batch_size  # The data's batch is passed over.
        elif plan.generate == "batch":
            while self._ahead < self._batch_size:
                self._ahead += self._generate(student, teacher, step, throughput)
            self._ahead -= self._batch_size
        new = plan.train_on == "new"
        rows, filled = self._draw(rng, new)
        while plan.generate == "missing" and not filled:
            self._generate(student, teacher, step, throughput)
            rows, filled = self._draw(rng, new)
        places = list(dict.fromkeys(place for row in rows for place, _ in row))
        self._trained = self.buffer.use(places, step)
        drawn = dict(zip(places, self._trained, strict=True))
        return self._as_batch(
            [[(drawn[place].texts[text], text) for place, text in row] for row in rows]
        )

    def _next_row(self) -> int:
        """Returns the number of the next row of the data."""
        self._place += 1
        return int(self._order[self._place - 1])  # pyright: ignore

    def _draw(self, rng: np.random.Generator, new: bool) -> tuple[Rows, bool]:
        """Returns the texts of each row, and whether more would not help."""
        rows, whole = fill_rows(
            [[self._room(text) for text in each.texts] for each in self.buffer],
            places := self.buffer.draw(rng, new=new),
            batch_size=self._batch_size,
            seq_len=self._examples.seq_len if self._examples.packed else None,
        )
        return rows, whole or len(places) == self._settings.buffer_capacity

    def _room(self, text: Example) -> int:
        theirs = None if text.teacher is None else len(text.teacher.ids)
        return int(self._examples.room(len(text.ids), theirs))

    def _generate(
        self, student: Params, teacher: Params, step: int, throughput: Throughput
    ) -> int:
        """Adds the completions of the next prompts to the buffer; returns how many."""
        table, rows = self._examples.table, self._examples.rows
        asked: list[tuple[int, int]] = []
        while len(asked) < self._rollout:
            epoch = self._place // len(rows)
            numbers = rows[self._next_row()]
            asked += [(number, epoch) for number in numbers if self._has_room[number]]
        examples = [table[number] for number, _ in asked]
        writer, prompts = student, [each.ids[: each.prompt] for each in examples]
        if self._settings.texts == "teacher":
            writer, prompts = teacher, _teachers_prompts(examples)
        with throughput.measured("wait"):
            jax.block_until_ready(student)
        with throughput.measured("generate"):
            found = self._complete(writer, prompts, asked)
        written = [
            Completion(example.with_answer(said), step, int(said[-1]) in self._ends)
            for example, said in zip(examples, found, strict=True)
        ]
        if self._pairs:
            texts = self._texts_beside(teacher, examples, asked, throughput)
            written = [
                each._replace(beside=text)
                for each, text in zip(written, texts, strict=True)
            ]
        for each in written:
            self.counts[each.end] += 1
            self._empty = self._empty + 1 if each.end == "empty" else 0
            if self._empty >= _PATIENCE:
                raise SettingsError(
                    f"texts {self._settings.texts}: the last {self._empty} completions "
                    "are empty, as the model ends each of them at once, so that there "
                    "is nothing to learn from: look at the prompts and the chat "
                    "template, draw with --completion-temperature 1, or train on "
                    "--texts data first"
                )
        self.buffer.add(written)
        return len(written)

    def _texts_beside(
        self,
        teacher: Params,
        examples: Sequence[Example],
        asked: Sequence[tuple[int, int]],
        throughput: Throughput,
    ) -> list[Example]:
        """Returns the teacher's text of each prompt: the data's answer, or its own."""
        texts = list(examples)
        open_ = [n for n, each in enumerate(texts) if each.prompt == len(each.ids)]
        if open_ and self._complete_beside is not None:
            prompts = _teachers_prompts([texts[n] for n in open_])
            numbers = [asked[n] for n in open_]
            with throughput.measured("generate"):
                found = self._complete_beside(teacher, prompts, numbers)
            for n, said in zip(open_, found, strict=True):
                texts[n] = texts[n].with_answer(said)
        return texts

    def _as_batch(self, rows: Sequence[Sequence[tuple[Example, int]]]) -> NumpyBatch:
        """Returns this process's rows of a batch of what the step trains on.

        Args:
            rows: The texts of each, and which of its completion's texts each is.
        """
        sizes = itertools.accumulate(map(len, rows), initial=0)
        places = [tuple(range(*bound)) for bound in itertools.pairwise(sizes)]
        examples = self._examples.of_examples(
            [text for row in rows for text, _ in row], places
        )
        own = range(len(rows))[self._part]
        batch = examples.batch(own, self._part.stop - self._part.start)
        if self._pairs:
            segments = batch["segment_ids" if examples.packed else "attention_mask"]
            batch["from_student"] = np.zeros_like(segments)
            for place, number in enumerate(own):
                # Padding is segment 0.
                who = np.array([0, *(text == 0 for _, text in rows[number])], np.int32)
                batch["from_student"][place] = who[segments[place]]
        return batch

    def metrics(self) -> dict[str, Array]:
        """Returns what a line of metrics says of the last step's batch.

        `completions` are 0 where it was one of the data; then nothing is said of their
        length, their end and their age.
        """
        trained, found = self._trained, {}
        if trained:
            found = {
                "completion_length": [each.length for each in trained],
                "completion_truncated": [each.end == "truncated" for each in trained],
                "completion_empty": [each.end == "empty" for each in trained],
                "completion_age": [self._step - each.step for each in trained],
            }
        found = {name: float(np.mean(values)) for name, values in found.items()}
        found |= {"completions": len(trained), "buffer_size": len(self.buffer)}
        if self._settings.texts == "adaptive":
            found["adaptive_threshold"] = self.threshold
        return {name: jnp.float32(value) for name, value in found.items()}

    def summary(self, decode: Callable[[list[int]], str]) -> dict[str, Any]:
        """Returns what a report says of all completions so far, as JSON values.

        `written` by how they end; `pushed_out` before they were trained on;
        `trained_by_age`, in steps, up to the power of two that the key names; `samples`
        of the last step's batch, or else of the buffer.

        Args:
            decode: Token ids to text.
        """
        shown = [*self._trained, *self.buffer][:_SAMPLES]
        ages: collections.Counter[int] = collections.Counter()
        for age, count in self.buffer.ages.items():
            ages[1 << (age - 1).bit_length() if age else 0] += count
        return {
            "written": dict(self.counts),
            "pushed_out": self.buffer.unused,
            "trained_by_age": {str(age): ages[age] for age in sorted(ages)},
            "samples": [
                {
                    "prompt": decode(
                        ids[max(0, prompt - _OF_PROMPT) : prompt].tolist()
                    ),
                    "completion": decode(ids[prompt:].tolist()),
                    "end": each.end,
                    "step": each.step,
                }
                for each in shown
                for ids, _, prompt, *_ in [each.example]
            ],
        }

    def observe(self, loss: float) -> None:
        """Moves DistiLLM's threshold by the loss of a held-out evaluation.

        The first loss is stored. A later one that is at or above the stored one raises
        the threshold and takes its place; one that is below changes nothing, nor does
        one that is not finite.
        """
        if self._settings.texts != "adaptive" or not math.isfinite(loss):
            return
        if self.held_out_loss is not None:
            if loss < self.held_out_loss:
                return
            self.threshold = min(self.threshold + self._settings.adaptive_step, 1.0)
        self.held_out_loss = loss

    def get_state(self) -> dict[str, Any]:
        """Returns its place in the data, the buffer and the rest, as JSON values."""
        return {
            "buffer": self.buffer.get_state(),
            "place": self._place,
            "ahead": self._ahead,
            "empty": self._empty,
            "counts": dict(self.counts),
            "threshold": self.threshold,
            "loss": self.held_out_loss,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `get_state` gave."""
        self.buffer.set_state(state["buffer"])
        self._place, self._ahead = state["place"], state["ahead"]
        self._empty, self.counts = state["empty"], collections.Counter(state["counts"])
        self.threshold, self.held_out_loss = state["threshold"], state["loss"]


def _teachers_prompts(examples: Sequence[Example]) -> list[Int32[np.ndarray, " _"]]:
    """Returns the prompts as the teacher sees them."""
    seen = [each.teacher or each for each in examples]
    return [each.ids[: each.prompt] for each in seen]
