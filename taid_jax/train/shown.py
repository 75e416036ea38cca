"""What a run shows of its models: what they are, complete, and where they differ."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from taid_jax import distributed
from taid_jax.data import DataError, Dataset
from taid_jax.data.dataset import DatasetInfo
from taid_jax.errors import InputError, ModelError, explain, parsing, show
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.settings import Settings
from taid_jax.sharding import batch_rows
from taid_jax.train.completions import EvalCompletions
from taid_jax.train.folder import WriteError
from taid_jax.train.html import PAGE, SHOWN, run_page, write_page
from taid_jax.train.inputs import named_teachers
from taid_jax.train.loop import Interrupted, TrainingError
from taid_jax.train.on_policy.prompts import EvalPrompt, find_eval_prompts
from taid_jax.train.pair import Pair
from taid_jax.train.report import write_json
from taid_jax.train.state import DistillState
from taid_jax.train.token_kl import held_out_token_kl, make_token_kl, tokens_of_rows
from taid_jax.types import Params

_PROMPTS, _COMPLETED, _OF_PROMPT = 3, 40, 120
"""So many prompts are completed, by so many tokens; so many of a prompt are shown."""

_PROBLEMS = 5
"""So many records that cannot be used are shown with their line; all are counted."""

REFERENCE, TEACHER, BEFORE, AFTER = (
    "reference",
    "teacher",
    "student before",
    "student after",
)


def teacher_names(pair: Pair, *, layers: bool = False) -> str:
    """Returns what the teachers are called, for titles.

    Args:
        pair: The models.
        layers: Whether to say how many layers each has.
    """
    return " + ".join(
        f"{each.source} ({each.config.num_layers} layers)" if layers else each.source
        for each in pair.teachers
    )


def describe(settings: Settings, pair: Pair, dataset: Dataset, mesh: Mesh) -> list[str]:
    """Returns what is about to be trained, on what, and where, in lines."""

    def size(params: Params) -> str:
        return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"

    def held(params: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    axes = ", ".join(f"{axis}={count}" for axis, count in mesh.shape.items())
    info, data, run = dataset.info, settings.data, settings.run
    sides = {"training": info.train, "held out": info.held_out}
    # The student's weights, their gradient and the two moments of the optimizer.
    starts = pair.teachers_at_start
    memory = held(starts) + 4 * held(pair.student_params)
    sees, rows = "", len(dataset.train)
    if data.teacher_prompt is not None:
        sees = (
            f"teacher: it sees {show(data.teacher_prompt)} in place of the prompt, in "
            f"rows of {data.teacher_len} tokens"
        )
    named = named_teachers([*zip(pair.teachers, starts, strict=True)])
    lines = [
        *(
            f"{name}: {each.config.num_layers} layers, {size(params)}"
            for name, (each, params) in named.items()
        ),
        f"student: {pair.student_config.num_layers} layers, "
        f"{size(pair.student_params)}",
        *pair.notes,
        *([sees] if sees else []),
        *(
            f"{name}: {side.documents} documents, {side.tokens:,} tokens in "
            f"{side.rows} rows"
            for name, side in sides.items()
        ),
        *info.notes,
        f"run: {run.steps:,} steps of {data.batch_size} rows of {data.seq_len} tokens, "
        f"{run.steps * data.batch_size / max(rows, 1):,.1f} times the training rows",
        f"memory: {memory / 2**30:,.2f} GiB for weights, gradients and optimizer, and "
        "activations beside them",
        f"devices: {mesh.size} x {jax.devices()[0].device_kind} ({axes})",
    ]
    if rows < data.batch_size:
        lines.append(
            f"note: a batch has {data.batch_size} rows, and the data {rows}: they come "
            "several times in it"
        )
    return lines


def describe_left_out(info: DatasetInfo) -> list[str]:
    """Returns what of the data is not used, in lines."""
    dropped = ", ".join(f"{n} {reason}" for reason, n in info.dropped.items())
    unused = ", ".join(f"{key} ({n} records)" for key, n in info.unused_keys.items())
    skipped = ", ".join(info.skipped_files[:_PROBLEMS])
    if info.num_skipped_files > _PROBLEMS:
        skipped += ", ..."
    return [
        f"left out: {dropped or 'nothing'}",
        *(f"  {problem}" for problem in info.problems[:_PROBLEMS]),
        *([f"keys not used: {unused}"] if unused else []),
        *(
            [f"files passed over: {info.num_skipped_files} ({skipped})"]
            if skipped
            else []
        ),
    ]


class Shown:
    """Looks at the models of a run before and after it, and makes its report.html.

    All processes call it, as the models may lie over all of them; process 0 writes.
    Nothing in it ends a run but a disk that cannot be written: what cannot be found out
    is a note on the page.

    Args:
        settings: Of the run.
        folder: Of the run.
        pair: Its models.
        dataset: Its data.
        tokenizer: Of both models.
        mesh: Where they are.
        lines: What `describe` says.
    """

    def __init__(
        self,
        settings: Settings,
        folder: pathlib.Path,
        pair: Pair,
        dataset: Dataset,
        tokenizer: Tokenizer,
        mesh: Mesh,
        lines: Sequence[str],
    ):
        self._settings, self._folder, self._pair = settings, folder, pair
        self._dataset, self._tokenizer, self._mesh = dataset, tokenizer, mesh
        self._lines = list(lines)
        self._notes: list[str] = []
        self._prompts: list[str] = []
        self._texts: dict[str, list[str]] = {}
        self._tokens: list[Any] = []
        self._chosen = self._choose()

    def _choose(self) -> list[EvalPrompt]:
        """Returns held-out prompts, their ends where both models have room for them."""
        models = [each.config for each in self._pair.teachers]
        configs = *models, self._pair.student_config
        room = min(each.max_position_embeddings for each in configs) - _COMPLETED
        try:
            found = find_eval_prompts(self._dataset.held_out, _PROMPTS)
        except DataError:  # No answer was found in any of them; the run is as good.
            found = []
        if not found or room < 1:
            why = "no prompt was found" if room > 0 else "the context is too short"
            self._notes.append(f"nothing of held-out text was completed: {why}")
            return []
        self._prompts = [
            str(self._tokenizer.decode(each.prompt[-_OF_PROMPT:])) for each in found
        ]
        return [
            each._replace(
                prompt=each.prompt[-room:],
                teacher=None if each.teacher is None else each.teacher[-room:],
            )
            for each in found
        ]

    def _complete(self, name: str, params: Params) -> None:
        """Has a model complete the prompts."""
        if not self._chosen:
            return
        pair, size, chosen = self._pair, batch_rows(self._mesh), self._chosen
        if name == TEACHER:
            chosen = [
                each if each.teacher is None else each._replace(prompt=each.teacher)
                for each in chosen
            ]
        try:
            completions = EvalCompletions(
                chosen,
                self._tokenizer,
                pair.teacher.config if name == TEACHER else pair.student_config,
                pair.generation,
                max_new_tokens=_COMPLETED,
                batch_size=-(-_PROMPTS // size) * size,
                dtype=self._settings.model.dtype,
                mesh=self._mesh,
                shardings=jax.tree.map(lambda leaf: leaf.sharding, params),
            )
            self._texts[REFERENCE] = completions.references
            self._texts[name] = completions(params)
        # Its logits are not finite; or memory is short, and training may need less.
        except (ModelError, jax.errors.JaxRuntimeError) as error:
            self._notes.append(f"{name}: no completions ({explain(error)})")

    def begin(self, state: DistillState, console: Console) -> None:
        """Has teacher and student complete prompts, and writes what is known so far.

        Args:
            state: Of the run. What the student said before the first step is read from
                the folder where some are done.
            console: Is told what goes wrong.

        Raises:
            WriteError: If it cannot be written.
        """
        step = int(state.step)
        saved = distributed.broadcast(self._read) if step else {}
        if saved and saved.get("prompts") != self._prompts:
            saved = {}
        self._texts |= saved.get("texts", {})
        self._texts.pop(AFTER, None)
        if not self._pair.stores and TEACHER not in self._texts:
            self._complete(TEACHER, state.teacher_of(self._pair.teacher.params))
        if not self._pair.stores and len(self._pair.teachers) > 1 and self._chosen:
            first = self._pair.teacher.source
            self._notes.append(f"the teacher's completions are those of {first} alone")
        if not step:
            self._complete(BEFORE, state.params)
        elif self._chosen and BEFORE not in self._texts:
            self._notes.append(
                f"what the student completed before training is missing: the {SHOWN} "
                "of the run's start is not there, or of other data"
            )
        self._tell(distributed.broadcast(lambda: self._write("running")), console)

    def _read(self) -> dict[str, Any]:
        """Returns the completions that the folder has, as far as they can be used."""
        with contextlib.suppress(InputError), parsing(SHOWN):
            found = json.loads((self._folder / SHOWN).read_text(encoding="utf-8"))
            texts, prompts = (found["completions"][k] for k in ("texts", "prompts"))
            if all(
                len(each) == len(prompts) and all(isinstance(t, str) for t in each)
                for each in texts.values()
            ):
                return {"texts": texts, "prompts": prompts}
        return {}

    def end(self, state: DistillState, console: Console) -> None:
        """Looks at the trained student, prints its completions and writes the page.

        Raises:
            WriteError: If the page cannot be written.
        """
        self._complete(AFTER, state.params)
        if state.average is not None:  # It is another than at the start.
            self._complete(TEACHER, state.average)
        self._look(state)
        for number, prompt in enumerate(self._prompts):
            console.rule(f"sample {number + 1}")
            console.print(prompt, markup=False, highlight=False)
            for name in (TEACHER, BEFORE, AFTER):
                if name in self._texts:
                    console.print(f"[bold]{name}:[/bold]", end=" ")
                    text = self._texts[name][number]
                    console.print(text, markup=False, highlight=False)
        self._tell(distributed.broadcast(lambda: self._write("done")), console)

    def _look(self, state: DistillState) -> None:
        """Finds the KL of every token of a few held-out rows."""
        pair, config = self._pair, self._pair.student_config
        compare = make_token_kl(
            decoder_functions(config, dtype=jnp.dtype(self._settings.model.dtype)),
            pair.teacher_functions,
            config.vocab_size or 1,
            self._mesh,
        )
        try:
            found = held_out_token_kl(
                compare,
                state.params,
                state.teacher_of(pair.teacher_params),
                self._dataset,
                self._mesh,
            )
        except jax.errors.JaxRuntimeError as error:  # Out of memory; the run is done.
            self._notes.append(f"held-out text was not coloured: {explain(error)}")
            return
        if distributed.is_main_process():
            self._tokens = tokens_of_rows(found, self._tokenizer)
        if any(store.manifest.kind != "hidden" for store in pair.stores):
            self._notes.append(
                "KL a token and the teacher's most probable tokens are of rows that "
                "are made again from what is stored of them"
            )

    @contextlib.contextmanager
    def watched(self, console: Console) -> Iterator[None]:
        """Within it, a run that stops gets its page, which says why."""
        try:
            yield
        except (TrainingError, Interrupted) as error:
            if distributed.is_main_process():
                try:
                    self._tell(self._write(str(error)), console)
                except WriteError as failed:  # Why it stopped matters more.
                    self._tell(str(failed), console)
            raise

    def _tell(self, fault: str | None, console: Console) -> None:
        if fault:
            console.print(f"note: {fault}", markup=False, soft_wrap=True)

    def _write(self, outcome: str) -> str | None:
        """Writes `shown.json`, and the page of all that is in the folder.

        Returns:
            Why there is no page, where none can be made of what the folder holds.
        """
        settings, pair = self._settings, self._pair
        shown: Mapping[str, Any] = {
            "outcome": outcome,
            "title": f"{settings.objective.objective}: "
            f"{teacher_names(pair, layers=True)} → "
            f"{pair.student_config.num_layers} layers",
            "lines": self._lines,
            "notes": self._notes,
            "data": dataclasses.asdict(self._dataset.info),
            "completions": {"prompts": self._prompts, "texts": self._texts},
            "tokens": self._tokens,
        }
        write_json(self._folder / SHOWN, shown, indent=None)
        try:
            page = run_page(self._folder)
        except InputError as error:  # The run is as good without.
            return f"{PAGE} is not made: {error}"
        write_page(self._folder / PAGE, page)
        return None
