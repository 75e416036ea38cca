"""Prompts in files, to be answered: read, and encoded as training would have them."""

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from taid_jax.data import DataError
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import ANSWER_ROLE, Chat, Completion, parse_prompt
from taid_jax.data.errors import RecordError
from taid_jax.data.records import kind_of, read_file
from taid_jax.data.tokens import Encoder, Tokenizer


class Prompt(NamedTuple):
    """What is asked.

    Attributes:
        number: Its place in the file, from 0.
        origin: The same for people, such as `prompts.jsonl, line 3`.
        content: As `parse_prompt` has it.
    """

    number: int
    origin: str
    content: Completion | Chat

    def answered(self, text: str) -> dict[str, Any]:
        """Returns the record that training reads, with an answer."""
        content = self.content
        if isinstance(content, Completion):
            return {"prompt": content.prompt, "completion": text}
        turns = [
            message.for_template() | ({} if message.trained else {"weight": 0})
            for message in content.messages
        ]
        record: dict[str, Any] = {
            "messages": [*turns, {"role": ANSWER_ROLE, "content": text}]
        }
        if content.options:
            record["chat_template_kwargs"] = dict(content.options)
        return record


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Returns the prompts of a file of records, in any format that training reads.

    What should follow a prompt is left aside. Of a conversation all up to the last
    answer is asked, or all of it when it ends with a question.

    Raises:
        DataError: If the file or a record cannot be used, with its place, or there is
            no prompt.
    """
    if kind_of(path) in (None, ".txt"):
        raise DataError(f"{path}: need a file of records, such as .jsonl or .parquet")
    prompts = []
    # A record that is left out would shift the numbers of those after it.
    for number, (origin, record) in enumerate(read_file(path)):
        try:
            if isinstance(record, RecordError):
                raise record
            prompts.append(Prompt(number, origin, parse_prompt(record)))
        except RecordError as error:
            raise DataError(f"{origin}: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """Returns 16 hexadecimal digits; other prompts, other digits."""
    text = repr([prompt.content for prompt in prompts])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Encoded(NamedTuple):
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, date: str | None = None
) -> list[Encoded]:
    """Returns the ids of each prompt, as training would have them before the answer.

    Args:
        prompts: What is asked.
        tokenizer: Of the model that is asked.
        date: What templates take for today, `YYYY-MM-DD`; today when None.

    Raises:
        DataError: If a conversation is asked and there is no template, or the template
            refuses one.
    """
    encoder, renderer = Encoder(tokenizer), ChatRenderer(tokenizer, date=date)
    texts, framed = [], []
    for prompt in prompts:
        try:
            rendered = renderer.prompt(prompt.content)
        except RecordError as error:
            raise DataError(f"{prompt.origin}: {error}") from error
        texts.append(rendered.text)
        framed.append(rendered.framed)
    return [
        Encoded(prompt, encoder.begin(row, added=bare))
        for prompt, row, bare in zip(prompts, encoder.ids(texts), framed, strict=True)
    ]
