"""From settings to batches of completions, and to the teacher's held-out answers."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.data import Dataset
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.models.sampling import GREEDY, SamplingParams
from taid_jax.settings import Settings, SettingsError
from taid_jax.sharding import batch_part, batch_rows
from taid_jax.train.on_policy.ends import training_ends
from taid_jax.train.on_policy.generation import Complete, Completer
from taid_jax.train.on_policy.texts import OnPolicyBatches
from taid_jax.train.pair import Pair

_ROWS = 32
"""Prompts that a device completes at once at most: each has its keys and values."""


def make_on_policy(
    settings: Settings, pair: Pair, dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh
) -> OnPolicyBatches:
    """Returns the batches of a run with `texts` other than `data`, at their start.

    Raises:
        SettingsError: If no prompt leaves room for a completion.
    """
    chosen = settings.on_policy
    ends = training_ends(tokenizer, pair.generation, dataset)
    sampling = SamplingParams(
        chosen.completion_temperature, chosen.completion_top_k, chosen.completion_top_p
    )
    part, parts = batch_part(mesh)

    def complete(whose: Literal["student", "teacher"]) -> Complete:
        return _make_complete(settings, pair, whose, ends, mesh, sampling)

    return OnPolicyBatches(
        chosen,
        dataset.train,
        complete("teacher" if chosen.texts == "teacher" else "student"),
        complete_beside=complete("teacher") if chosen.texts == "pairs" else None,
        ends=ends,
        batch_size=settings.data.batch_size,
        steps=settings.run.steps,
        seed=settings.run.seed,
        process_index=part,
        process_count=parts,
    )


def _make_complete(
    settings: Settings,
    pair: Pair,
    whose: Literal["student", "teacher"],
    ends: Sequence[int],
    mesh: Mesh,
    sampling: SamplingParams = GREEDY,
) -> Complete:
    """Returns what has the student complete prompts, or the teacher."""
    student, chosen = whose == "student", settings.on_policy
    parts = batch_rows(mesh)
    wanted = chosen.rollout_batch or settings.data.batch_size
    return Completer(
        pair.student_config if student else pair.teacher.config,
        mesh,
        shardings=pair.shardings
        if student
        else jax.tree.map(lambda leaf: leaf.sharding, pair.teachers_at_start[0]),
        ends=ends,
        max_new_tokens=chosen.completion_tokens,
        dtype=jnp.dtype(settings.model.dtype),
        rows=min(-(-wanted // parts), _ROWS) * parts,
        sampling=sampling,
        seed=settings.run.seed,
    )


def with_answers(
    settings: Settings, pair: Pair, dataset: Dataset, tokenizer: Tokenizer, mesh: Mesh
) -> Dataset:
    """Returns a data set whose held-out prompts without an answer have the teacher's.

    Its most probable ones, so that every evaluation of every run sees the same.

    Raises:
        SettingsError: If no held-out example can be evaluated on.
    """
    side, chosen = dataset.held_out, settings.on_policy
    numbers = [number for row in side.rows for number in row]
    examples = [side.table[number] for number in numbers]
    asking = [each for each in examples if each.prompt == len(each.ids)]
    if not asking:
        return dataset
    most = settings.data.held_out_batches * settings.data.batch_size
    room = side.seq_len - chosen.completion_tokens
    theirs = (side.teacher_len or side.seq_len) - chosen.completion_tokens
    fitting = [
        each
        for each in asking
        if each.prompt <= room and (each.teacher or each).prompt <= theirs
    ][:most]
    ends = training_ends(tokenizer, pair.generation, dataset)
    complete = _make_complete(settings, pair, "teacher", ends, mesh)
    known = pair.teachers_at_start[0]
    prompts = [(each.teacher or each).ids for each in fitting]
    found = complete(known, prompts, [()] * len(fitting))
    answered = [each for each in examples if each.prompt < len(each.ids)]
    for each, said in zip(fitting, found, strict=True):
        answered.append(each.with_answer(said))
    if not answered:
        raise SettingsError(
            f"completion_tokens: none of {len(asking)} held-out prompts has room for "
            f"{chosen.completion_tokens} tokens in seq_len {side.seq_len}; set "
            "completion_tokens lower or seq_len higher"
        )
    whose = f"{pair.teacher.source}'s" if len(pair.teachers) > 1 else "the teacher's"
    note = f"{len(fitting)} held-out prompts have {whose} answers"
    info = dataclasses.replace(dataset.info, notes=(*dataset.info.notes, note))
    return Dataset(dataset.train, side.of_examples(answered), info)
