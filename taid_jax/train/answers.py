"""Held-out questions, and the student's greedy answers to them."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32

from taid_jax.data import DataError, Dataset, ExampleSet, held_out_batches, pad_left
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Completion
from taid_jax.data.errors import RecordError
from taid_jax.data.tokens import Encoder
from taid_jax.errors import show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.tokenizer import Tokenizer, warn
from taid_jax.models.files.vocabulary import count_tokens
from taid_jax.settings import SampleSettings, SettingsError
from taid_jax.sharding import batch_part
from taid_jax.train.answer_rows import AnswerRows, make_answer_rows
from taid_jax.types import Params

_WIDTH = 32
"""Prompts are padded to a multiple of this."""

_LOOKED_AT = 64
"""So many questions are looked at to see how answers end."""


class Question(NamedTuple):
    """A prompt and what should follow it.

    Attributes:
        prompt: `(tokens,)` int32, all up to the last answer.
        answer: `(tokens,)` int32, the last answer with the token that ends it.
    """

    prompt: Int32[np.ndarray, " prompt"]
    answer: Int32[np.ndarray, " answer"]


def find_questions(examples: ExampleSet, limit: int) -> list[Question]:
    """Returns the questions in the first rows of a data set.

    A row asks the question of its first example; running text is asked to be gone on
    with from its middle. The order does not depend on anything but the data, and is the
    same on all processes.

    Args:
        examples: Held out.
        limit: At most this many; none are looked for at 0.

    Raises:
        DataError: If there is none.
    """
    questions: list[Question] = []
    # More than are wanted: the last answer is not found in every conversation.
    rows = held_out_batches(examples, 1, limit=2 * limit, with_prompts=True)
    for row in rows if limit else []:
        start, stop = int(row["prompt_lengths"][0]), int(row["answer_ends"][0])
        if 0 < start < stop and len(questions) < limit:
            ids = row["input_ids"][0]
            questions.append(Question(ids[:start], ids[start:stop]))
    if limit and not questions:
        raise DataError(
            "answers cannot be scored: no held-out example has a prompt. Give data "
            "with `prompt` and `completion` or with `messages`, or set answer_examples "
            "to 0"
        )
    return questions


def end_ids(
    tokenizer: Tokenizer,
    generation: Mapping[str, object],
    questions: Sequence[Question] = (),
) -> tuple[int, ...]:
    """Returns the tokens that end an answer, in order.

    The tokenizer's end token, those of the model's generation_config.json, and what the
    chat template, or at least half of the questions, end an answer with, where that is
    a token not learned from text.
    """
    named = [tokenizer.eos_token_id, generation.get("eos_token_id")]
    known = [n for each in named for n in (each if isinstance(each, list) else [each])]
    added = _added_ids(tokenizer)
    # Running text is cut anywhere, so that any token may end one of its questions.
    ended = collections.Counter(int(question.answer[-1]) for question in questions)
    last = {n for n, times in ended.items() if 2 * times >= len(questions)} & added
    if (end := template_end(tokenizer)) is not None:
        known.append(end.token)
    ends = last.union(n for n in known if isinstance(n, int))
    return tuple(sorted(n for n in ends if 0 <= n < count_tokens(tokenizer)))


class TemplateEnd(NamedTuple):
    """What a chat template ends an answer with.

    Attributes:
        text: All that follows the answer.
        token: The first in it that is not learned from text; None without any.
    """

    text: str
    token: int | None


def template_end(tokenizer: Tokenizer) -> TemplateEnd | None:
    """Returns how the chat template ends an answer, as any conversation shows.

    None without a template, or if no answer is found in what it renders.
    """
    encoder = Encoder(cast(DataTokenizer, tokenizer))
    renderer = ChatRenderer(encoder.tokenizer, train_on_prompts=False)
    if not renderer.has_template:
        return None
    try:
        # A character that no header of a template has.
        asked = renderer.completion(Completion("a", "\ue000"))
    except DataError as error:
        no_end = isinstance(error, RecordError) and error.reason == "no_end"
        return TemplateEnd("", None) if no_end else None
    if not asked.answers:
        return None
    text = asked.text.partition("\ue000")[2]
    added = _added_ids(tokenizer)
    [ids] = encoder.ids([text])
    return TemplateEnd(text, next((n for n in ids if n in added), None))


def _added_ids(tokenizer: Tokenizer) -> set[int]:
    """Returns the tokens not learned from text, without that of unknown text."""
    # transformers declares this method on its subclasses alone.
    added = cast(DataTokenizer, tokenizer).get_added_vocab().values()
    return {number for number in added if number != tokenizer.unk_token_id}


def export_generation(
    generation: Mapping[str, object], tokenizer: Tokenizer, dataset: Dataset
) -> dict[str, object]:
    """Returns the settings of generation that a student is exported with.

    Whatever ends an answer in training is among its `eos_token_id`, so that generation
    stops there elsewhere too. Where a template ends an answer by text that is no single
    token, no id can say so. `stop_strings` could, but with them in the settings
    `generate` of transformers fails unless it is given the tokenizer: a warning names
    them instead.

    Args:
        generation: See `Pair`.
        tokenizer: That the student is exported with.
        dataset: That it was trained on.
    """
    try:
        questions = find_questions(dataset.train, _LOOKED_AT)
    except DataError:  # None of them has a prompt.
        questions = []
    ends = list(end_ids(tokenizer, generation, questions))
    end = template_end(tokenizer)
    if end is not None and end.token is None:
        text = show(" ".join(end.text.split()))
        warn(
            [
                f"the chat template ends an answer by {text}, which is no token of its "
                "own, so that no eos_token_id can stop generation there: generate with "
                f"stop_strings=[{text}] and tokenizer=..., or train with a tokenizer "
                "that has such a token"
                if end.text.strip()
                else "the chat template writes nothing after an answer: nothing but "
                "the end token stops generation"
            ]
        )
    if not ends:
        return dict(generation)
    return {**generation, "eos_token_id": ends if len(ends) > 1 else ends[0]}


@dataclasses.dataclass(frozen=True)
class Examination:
    """Questions, and what is needed to have them answered.

    Attributes:
        questions: Those that leave room for an answer.
        references: The answers that are wanted, as text.
        tokenizer: Of the student.
        ends: Tokens that end an answer.
        width: Tokens that prompts are padded to.
        batch_size: Questions that are answered at once, over all processes.
        answer_rows: Has the student answer them.
        mesh: Where the questions go.
    """

    questions: Sequence[Question]
    references: tuple[str, ...]
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    width: int
    batch_size: int
    answer_rows: AnswerRows
    mesh: Mesh

    def answers(self, params: Params) -> list[str]:
        """Returns the student's answer to each question, without its end token.

        Args:
            params: The student's parameters; nothing is changed.
        """
        part, parts = batch_part(self.mesh)
        size = self.batch_size // parts
        answers: list[str] = []
        for start in range(0, len(self.questions), self.batch_size):
            batch = self._padded(start)
            # Each process asks its own part, and hears the answers to all.
            own = {
                name: rows[part * size : (part + 1) * size]
                for name, rows in batch.items()
            }
            found = self.answer_rows(params, own, 0)["tokens"]
            answers += [decode(self.tokenizer, row, self.ends) for row in found]
        return answers[: len(self.questions)]

    def _padded(self, start: int) -> dict[str, np.ndarray]:
        """Returns prompts with padding on the left; the last batch repeats the first.

        All batches have one shape, so that one program answers them all.
        """
        places = range(start, start + self.batch_size)
        ids, mask = pad_left(
            [self.questions[place % len(self.questions)].prompt for place in places],
            self.width,
        )
        return {"prompt_ids": ids, "prompt_mask": mask}


def prepare_examination(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    config: DecoderConfig,
    generation: Mapping[str, object],
    *,
    answer_tokens: int,
    batch_size: int,
    dtype: str,
    mesh: Mesh,
    shardings: Any,
) -> Examination:
    """Returns the examination of those questions that leave room for an answer.

    Args:
        questions: From `find_questions`.
        tokenizer: Of the student.
        config: Of the student.
        generation: Settings of the student's generation, see `Pair`.
        answer_tokens: Tokens of an answer at most.
        batch_size: Questions that are answered at once, over all processes.
        dtype: What the student computes in.
        mesh: Where the questions go.
        shardings: Of the student's parameters.

    Raises:
        SettingsError: If no question leaves room for an answer in the model's context.
    """
    room = config.max_position_embeddings - answer_tokens
    fitting = [question for question in questions if len(question.prompt) <= room]
    if not fitting:
        shortest = min(len(question.prompt) for question in questions)
        raise SettingsError(
            f"answer_tokens: {answer_tokens} tokens after a prompt (the shortest has "
            f"{shortest}) do not fit the student's context of "
            f"{config.max_position_embeddings}"
        )
    ends = end_ids(tokenizer, generation, fitting)
    longest = max(len(question.prompt) for question in fitting)
    answer_rows = make_answer_rows(
        config,
        SampleSettings(sample_tokens=answer_tokens),  # the most probable tokens
        mesh,
        shardings=shardings,
        ends=ends,
        dtype=jnp.dtype(dtype),
        seed=0,
    )
    return Examination(
        questions=fitting,
        references=tuple(
            decode(tokenizer, question.answer, ends) for question in fitting
        ),
        tokenizer=tokenizer,
        ends=ends,
        width=min(-(-longest // _WIDTH) * _WIDTH, room),
        batch_size=batch_size,
        answer_rows=answer_rows,
        mesh=mesh,
    )


def decode(tokenizer: Tokenizer, ids: np.ndarray, ends: Sequence[int]) -> str:
    """Returns the text of the tokens before the first that ends an answer."""
    stops = np.flatnonzero(np.isin(ids, ends))
    kept = ids[: stops[0]] if len(stops) else ids
    # As it stands: some tokenizers would take the space before a comma away.
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(kept.tolist(), **options)).strip()
