"""The tokens that end a completion, and its text before them."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np

from taid_jax.data import DataError, Dataset
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat
from taid_jax.data.errors import RecordError
from taid_jax.data.tokens import Encoder
from taid_jax.errors import show
from taid_jax.models.files.tokenizer import Tokenizer, warn
from taid_jax.models.files.vocabulary import count_tokens
from taid_jax.train.on_policy.prompts import EvalPrompt, find_eval_prompts

_LOOKED_AT = 64
"""So many prompts are looked at to see how their answers end."""


def decode(
    tokenizer: Tokenizer, ids: np.ndarray, ends: Sequence[int], *, strip: bool = True
) -> str:
    """Returns the text of the tokens before the first that ends a completion."""
    stops = np.flatnonzero(np.isin(ids, ends))
    kept = ids[: stops[0]] if len(stops) else ids
    # As it stands: some tokenizers would take the space before a comma away.
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    text = str(tokenizer.decode(kept.tolist(), **options))
    return text.strip() if strip else text


def end_ids(
    tokenizer: Tokenizer,
    generation: Mapping[str, object],
    prompts: Sequence[EvalPrompt] = (),
) -> tuple[int, ...]:
    """Returns the tokens that end a completion, in order.

    The tokenizer's end token, those of the model's generation_config.json, and what the
    chat template, or at least half of the references, end with, where that is a token
    not learned from text.
    """
    named = [tokenizer.eos_token_id, generation.get("eos_token_id")]
    known = [n for each in named for n in (each if isinstance(each, list) else [each])]
    added = _added_ids(tokenizer)
    # Running text is cut anywhere, so that any token may end one of its references.
    ended = collections.Counter(int(prompt.reference[-1]) for prompt in prompts)
    last = {n for n, times in ended.items() if 2 * times >= len(prompts)} & added
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
        asked = renderer.chat(Chat.pair("a", "\ue000"))
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


def training_ends(
    tokenizer: Tokenizer, generation: Mapping[str, object], dataset: Dataset
) -> tuple[int, ...]:
    """Returns `end_ids` as the training side of a data set shows them."""
    try:
        prompts = find_eval_prompts(dataset.train, _LOOKED_AT)
    except DataError:  # No example has a prompt.
        prompts = []
    return end_ids(tokenizer, generation, prompts)


def export_generation(
    generation: Mapping[str, object], tokenizer: Tokenizer, dataset: Dataset
) -> dict[str, object]:
    """Returns the settings of generation that a student is exported with.

    Whatever ends an answer in training is among its `eos_token_id`, so that generation
    stops there elsewhere too. Where a template ends an answer by text that is no single
    token, no id can say so. `stop_strings` could, but with them in the settings
    `generate` of transformers fails unless it is given the tokenizer: a warning names
    them instead.
    """
    ends = list(training_ends(tokenizer, generation, dataset))
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
