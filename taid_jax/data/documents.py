"""What one record says: a text, a prompt and its completion, or a conversation."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

from taid_jax.data.errors import RecordError

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING_ROLES = ("system", "developer")
ANSWER_ROLE = "assistant"

RECORD_KEYS = ("messages", "prompt", "completion", "text")
ID_KEYS = ("prompt_id", "id")
"""UltraChat calls its conversations by their prompts."""
EXPECTED_KEYS = "`text`, or `prompt` and `completion`, or `messages`"


@dataclasses.dataclass(frozen=True)
class Text:
    """Running text: every token counts."""

    text: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it."""

    prompt: str
    completion: str


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that opens with the user and has an answer in it."""

    messages: tuple[Message, ...]


Content = Text | Completion | Chat


class Document(NamedTuple):
    """What is kept together when train and held-out data are told apart.

    Attributes:
        origin: Where it stands, such as `chat.jsonl, line 3`.
        content: What it says.
        rank: Its place between 0 and 1, from a hash: low ranks are held out.
        name: What the record is called, from the first of `ID_KEYS` that it has.
    """

    origin: str
    content: Content
    rank: float
    name: str | None = None


def make_document(
    origin: str, content: Content, seed: int, name: str | None = None
) -> Document:
    """Returns the document with its rank.

    The rank comes from what the document says, never from its place: it stays the same
    when files are renamed or put in another order, and copies share it. Case and the
    amount of white space do not change it. A completion and a chat are ranked by their
    prompt (all that comes before the first answer), so that no prompt is trained on
    with one answer and evaluated with another.

    Args:
        origin: Where it stands, for messages.
        content: What it says.
        seed: A different seed gives different ranks; 0 <= seed < 2**63.
        name: What the record is called, if it is.
    """
    if isinstance(content, Text):
        parts = [content.text]
    elif isinstance(content, Completion):
        parts = ["user", content.prompt]
    else:
        roles = [message.role for message in content.messages]
        opening = content.messages[: roles.index(ANSWER_ROLE)]
        parts = [part for message in opening for part in message]
    key = "\0".join(" ".join(part.split()).casefold() for part in parts)
    digest = hashlib.blake2b(
        key.encode(), digest_size=8, salt=seed.to_bytes(8, "little")
    ).digest()
    return Document(origin, content, int.from_bytes(digest, "little") / 2**64, name)


def record_name(record: Mapping[str, object]) -> str | None:
    """Returns what a record is called, None if it has no name."""
    names = (record.get(key) for key in ID_KEYS)
    return next((str(name) for name in names if isinstance(name, str | int)), None)


def parse_record(record: object) -> Content:
    """Returns what a record of a JSONL or Parquet file says.

    Keys that hold None count as absent, other keys are ignored. Where a record has
    several of the known keys, `messages` comes first, then `prompt` and `completion`.

    Raises:
        RecordError: If it is not a record, has other keys, values of another type, or a
            conversation that cannot be used. The place is not in the message.
    """
    if not isinstance(record, Mapping):
        raise RecordError(
            "wrong_shape",
            f"need an object with {EXPECTED_KEYS}, got {_type_name(record)}",
        )
    present = {key for key in RECORD_KEYS if record.get(key) is not None}
    if "messages" in present:
        return _parse_chat(record["messages"])
    if {"prompt", "completion"} <= present:
        prompt = _string("prompt", record["prompt"])
        completion = _string("completion", record["completion"])
        for name, value in (("prompt", prompt), ("completion", completion)):
            if not value.strip():
                raise RecordError(
                    "empty_turn",
                    f"`{name}` is empty; a record without a prompt belongs under "
                    "`text`",
                )
        return Completion(prompt, completion)
    if "text" in present:
        return Text(_string("text", record["text"]))
    found = ", ".join(f"`{key}`" for key in record) or "none"
    raise RecordError("wrong_shape", f"need the keys {EXPECTED_KEYS}; found {found}")


def _parse_chat(value: object) -> Chat:
    if not isinstance(value, list):
        raise RecordError(
            "wrong_shape",
            "`messages` must be a list of objects with `role` and `content`, got "
            f"{_type_name(value)}",
        )
    messages = [_parse_message(n, message) for n, message in enumerate(value, start=1)]
    roles = [message.role for message in messages]
    if ANSWER_ROLE not in roles:
        raise RecordError(
            "no_answer",
            "the conversation has no assistant turn, so there is nothing to learn; "
            f"its roles are {', '.join(roles) or 'none'}",
        )
    first = next(role for role in roles if role not in OPENING_ROLES)
    if first != "user":
        raise RecordError(
            "starts_with_assistant" if first == ANSWER_ROLE else "wrong_shape",
            f"the conversation must start with a user turn, got {first}; "
            "remove the turns before the first user turn",
        )
    return Chat(tuple(messages))


def _parse_message(number: int, value: object) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        if isinstance(value, Mapping):
            found = ", ".join(f"`{key}`" for key in value) or "no keys"
        else:
            found = _type_name(value)
        raise RecordError(
            "wrong_shape", f"turn {number} needs `role` and `content`, found {found}"
        )
    role = _string(f"role of turn {number}", value["role"])
    content = _string(f"content of turn {number}", value["content"])
    if role not in ROLES:
        raise RecordError(
            "unknown_role",
            f"unknown role {role!r} in turn {number}; known roles: {', '.join(ROLES)}",
        )
    if not content.strip():
        raise RecordError("empty_turn", f"turn {number} ({role}) is empty")
    return Message(role, content)


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise RecordError(
            "wrong_shape", f"`{name}` must be a string, got {_type_name(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which no tokenizer can read.
        raise RecordError(
            "not_utf8",
            f"`{name}` has half of a surrogate pair at character {error.start}, which "
            "is not Unicode text",
        ) from error
    return value


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
