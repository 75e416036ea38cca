"""Prompts in files, to be answered: read, and encoded as training would have them."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from taid_jax.data import DataError
from taid_jax.data.chat import MissingTemplateError
from taid_jax.data.encoding import Encoder, Tokenizer, is_rendered

Records = Iterator[tuple[str, object]]
"""Where each record stands, and what it holds."""


class Prompt(NamedTuple):
    """What is asked.

    Attributes:
        number: Its place in the file, from 0.
        origin: The same for people, such as `prompts.jsonl, line 3`.
        messages: The conversation so far; None for a plain prompt.
        text: The plain prompt; empty for a conversation.
    """

    number: int
    origin: str
    messages: tuple[dict[str, str], ...] | None
    text: str


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Returns the prompts of a .jsonl or .parquet file.

    A record has `prompt` (a `completion` beside it is left aside), or `messages`: all
    up to the last answer is asked, or all of it when it ends with a question.

    Raises:
        DataError: If the file or a record cannot be used, with its place, or there is
            no prompt.
    """
    readers: dict[str, Callable[[pathlib.Path], Records]] = {
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: need a .jsonl or .parquet file with prompts")
    try:
        prompts = [
            _parse(number, origin, record)
            for number, (origin, record) in enumerate(readers[path.suffix](path))
        ]
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def _read_jsonl(path: pathlib.Path) -> Records:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                origin = f"{path}, line {number}"
                try:
                    yield origin, json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{origin}: no line of JSON ({error})") from error


def _read_parquet(path: pathlib.Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    row += 1
                    yield f"{path}, row {row}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no intact Parquet file: {error}") from error


def _parse(number: int, origin: str, record: object) -> Prompt:
    if not isinstance(record, Mapping):
        raise DataError(f"{origin}: need an object with `prompt` or `messages`")
    messages, text = record.get("messages"), record.get("prompt")
    if isinstance(messages, list) and messages:
        turns = []
        for turn in messages:
            parts = turn if isinstance(turn, Mapping) else {}
            if not all(isinstance(parts.get(k), str) for k in ("role", "content")):
                raise DataError(
                    f"{origin}: every turn needs `role` and `content`, both text"
                )
            turns.append({"role": parts["role"], "content": parts["content"]})
        answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        if turns[-1]["role"] != "user" and answers:
            turns = turns[: answers[-1]]
        if not turns or turns[-1]["role"] == "assistant":
            raise DataError(f"{origin}: the conversation asks nothing before its end")
        return Prompt(number, origin, tuple(turns), "")
    if isinstance(text, str) and text.strip():
        return Prompt(number, origin, None, text)
    found = ", ".join(f"`{key}`" for key in record) or "no keys"
    raise DataError(f"{origin}: need `prompt` or `messages` with text; found {found}")


def digest(prompts: Sequence[Prompt]) -> str:
    """Returns 16 hexadecimal digits; other prompts, other digits."""
    text = json.dumps([(prompt.messages, prompt.text) for prompt in prompts])
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


class Encoded(NamedTuple):
    """A prompt and its token ids."""

    prompt: Prompt
    ids: list[int]


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[Encoded]:
    """Returns the ids of each prompt, as training would have them before the answer.

    A plain prompt is asked as a user's turn of the chat template, if there is one and
    it does not begin with the start token, as what was rendered before does.

    Raises:
        DataError: If a conversation is asked and there is no template, or the template
            refuses one.
    """
    encoder = Encoder(tokenizer)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    texts, framed = [], []
    for prompt in prompts:
        messages = prompt.messages or ({"role": "user", "content": prompt.text},)
        bare = not has_template or is_rendered(tokenizer, prompt.text)
        framed.append(prompt.messages is None and bare)
        if framed[-1]:
            texts.append(prompt.text)
            continue
        if not has_template:
            raise MissingTemplateError()
        try:
            texts.append(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # A template may raise anything.
            raise DataError(
                f"{prompt.origin}: the chat template refuses this conversation: {error}"
            ) from error
    return [
        Encoded(prompt, encoder.begin(row, added=bare))
        for prompt, row, bare in zip(prompts, encoder.ids(texts), framed, strict=True)
    ]
