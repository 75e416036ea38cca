"""What one record says: a text, a prompt and its completion, or a conversation."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from taid_jax.data.errors import RecordError
from taid_jax.errors import shorten, show

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING_ROLES = ("system", "developer")
ANSWER_ROLE = "assistant"

CHAT_KEYS = ("messages", "conversations")
PAIR_KEYS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)
"""What is asked and what should follow, as data sets call them."""
OPTION_KEYS = ("tools", "documents", "chat_template_kwargs")
"""What a record has for the chat template beside its messages."""
_PAIR_OPTIONS = ("input", "system", "history", *OPTION_KEYS)
RECORD_KEYS = (
    *CHAT_KEYS,
    *dict.fromkeys(key for pair in PAIR_KEYS for key in pair),
    *_PAIR_OPTIONS,
    "text",
)
ID_KEYS = ("prompt_id", "id")
"""UltraChat calls its conversations by their prompts."""
EXPECTED_KEYS = "`text`, or `prompt` and `completion`, or `messages`"
OTHER_FORMATS = "docs/data.md lists other formats"

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": ANSWER_ROLE,
    "function_call": ANSWER_ROLE,
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
"""Of `from`; other names are roles already."""


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
    """One turn of a chat.

    Attributes:
        role: Who speaks.
        content: What is said; null only where the assistant calls tools.
        others: What else the message has for the template, such as `tool_calls`.
        trained: Whether an answer is trained on (`weight` is not 0).
    """

    role: str
    content: str | None
    others: tuple[tuple[str, Any], ...] = ()
    trained: bool = True

    def for_template(self) -> dict[str, Any]:
        """Returns the message as chat templates want it."""
        return {"role": self.role, "content": self.content, **dict(self.others)}


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that opens with the user and has an answer in it.

    Attributes:
        messages: Its turns.
        options: What the template gets beside them, such as `tools`.
    """

    messages: tuple[Message, ...]
    options: tuple[tuple[str, Any], ...] = ()


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
    prompt (all that is said before the first answer), so that no prompt is trained on
    with one answer, or one set of tools, and evaluated with another.

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
        parts = [
            part for message in opening for part in (message.role, message.content)
        ]
    key = "\0".join(" ".join((part or "").split()).casefold() for part in parts)
    digest = hashlib.blake2b(
        key.encode(), digest_size=8, salt=seed.to_bytes(8, "little")
    ).digest()
    return Document(origin, content, int.from_bytes(digest, "little") / 2**64, name)


def record_name(record: Mapping[str, object]) -> str | None:
    """Returns what a record is called, None if it has no name."""
    names = (record.get(key) for key in ID_KEYS)
    return next((str(name) for name in names if isinstance(name, str | int)), None)


def parse_record(record: object) -> Content:
    """Returns what a record of any of the formats of docs/data.md says.

    Keys that hold None count as absent, other keys are ignored (`unused_keys` names
    them). A conversation comes first, then a prompt and what follows it, then text.

    Raises:
        RecordError: If it is not a record, has other keys, values of another type, or a
            conversation that cannot be used. The place is not in the message.
    """
    content = _parse(record)
    if isinstance(content, Chat):
        _check_order([message.role for message in content.messages])
    return content


def parse_prompt(record: object) -> Completion | Chat:
    """Returns what a record asks: with an empty completion, or up to its last answer.

    It is read as for training, with an answer put in where it has none.

    Raises:
        RecordError: As `parse_record`, or if nothing is asked.
    """
    if isinstance(record, Mapping):
        said = {k: v for k, v in record.items() if v is not None and str(v).strip()}
        chat = next((key for key in CHAT_KEYS if key in said), None)
        pairs = [pair for pair in PAIR_KEYS if pair[0] in said]
        if chat is not None:
            turns = _list(chat, said[chat])
            roles = [message.role for message in _messages(chat, turns)]
            if ANSWER_ROLE not in roles or roles[-1] in ("user", "tool"):
                said[chat] = [*turns, {"role": ANSWER_ROLE, "content": "-"}]
        elif pairs:
            said[max(pairs, key=lambda pair: pair[1] in said)[1]] = "-"
        else:
            raise _wrong_keys("`prompt` or `messages` with text", record)
        record = said
    content = cast(Completion | Chat, _parse(record))
    if isinstance(content, Completion):
        return dataclasses.replace(content, completion="")
    messages = content.messages
    while messages[-1].role != ANSWER_ROLE:
        messages = messages[:-1]
    messages = messages[:-1]
    if not messages or messages[-1].role == ANSWER_ROLE:
        raise RecordError("wrong_shape", "the conversation asks nothing before its end")
    return dataclasses.replace(content, messages=messages)


def _parse(record: object) -> Content:
    """Returns what a record says, in whatever order the turns of its chat are."""
    if not isinstance(record, Mapping):
        raise RecordError(
            "wrong_shape",
            f"need an object with {EXPECTED_KEYS}, got {_type_name(record)}",
        )
    keys = used_keys(record)
    options = _options(record, keys)
    if keys and keys[0] in CHAT_KEYS:
        opening = _opening(record, keys, ())
        turns = [*opening, *_messages(keys[0], record[keys[0]])]
        return Chat(tuple(turns), options)
    if "text" in keys:
        return Text(_string("text", record["text"]))
    if keys:
        return _pair(record, keys, options)
    raise _wrong_keys(f"the keys {EXPECTED_KEYS}", record)


def _wrong_keys(needed: str, record: Mapping[Any, Any]) -> RecordError:
    found = ", ".join(
        f"`{key}`" + (" (null)" if record[key] is None else "")
        for key in list(record)[:20]
    )
    found = found or "none"
    return RecordError("wrong_shape", f"need {needed}; found {found} ({OTHER_FORMATS})")


def used_keys(record: Mapping[str, object]) -> tuple[str, ...]:
    """Returns the keys that say what a record says, the deciding one first."""
    present = {key for key in RECORD_KEYS if record.get(key) is not None}
    options = tuple(key for key in OPTION_KEYS if key in present)
    system = ("system",) if record.get("system") else ()
    for key in CHAT_KEYS:
        if key in present:
            return (key, *system, *options)
    for pair in PAIR_KEYS:
        if present.issuperset(pair):
            more = [key for key in ("input", "history") if key in present]
            return (*pair, *more, *system, *options)
    return ("text",) if "text" in present else ()


def unused_keys(record: Mapping[str, object]) -> list[str]:
    """Returns the keys of a record that change nothing, names and nulls left aside."""
    used = {*used_keys(record), *ID_KEYS}
    return [
        shorten(str(key), 80)
        for key, value in record.items()
        if value not in (None, "", []) and key not in used
    ]


def _pair(
    record: Mapping[str, Any],
    keys: Sequence[str],
    options: tuple[tuple[str, Any], ...],
) -> Completion | Chat:
    """Returns what is asked and what should follow, as a chat where it needs one."""
    asked, answered = (record[key] for key in keys[:2])
    opening = _opening(record, keys, record.get("history") or ())
    if _is_turns(asked) or _is_turns(answered):
        # What a data set has in the prompt is context, and not to be learned.
        before = [
            each._replace(trained=each.role != ANSWER_ROLE)
            for each in _turns(keys[0], asked, "user")
        ]
        after = _turns(keys[1], answered, ANSWER_ROLE)
        return Chat((*opening, *before, *after), options)
    asked, answered = (_string(key, record[key]) for key in keys[:2])
    more = _string("input", record["input"]) if "input" in keys else ""
    if more.strip():
        asked = f"{asked}\n\n{more}"
    for name, value in zip(keys, (asked, answered), strict=False):
        if not value.strip():
            raise RecordError(
                "empty_turn",
                f"`{name}` is empty; a record without a prompt belongs under `text`",
            )
    if opening or options:
        turns = Message("user", asked), Message(ANSWER_ROLE, answered)
        return Chat((*opening, *turns), options)
    return Completion(asked, answered)


def _opening(
    record: Mapping[str, Any], keys: Sequence[str], history: object
) -> list[Message]:
    """Returns the turns that a record has before its own: `system` and `history`."""
    opening = []
    if "system" in keys and str(record["system"]).strip():
        opening.append(Message("system", _string("system", record["system"])))
    for number, pair in enumerate(_list("history", history), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(
                "wrong_shape", f"`history` needs pairs of texts, got {show(pair)}"
            )
        for role, said in zip(("user", ANSWER_ROLE), pair, strict=True):
            opening.append(Message(role, _string(f"history {number}", said)))
    return opening


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def _turns(key: str, value: object, role: str) -> list[Message]:
    if _is_turns(value):
        return _messages(key, value)
    return [_parse_message(1, {"role": role, "content": _string(key, value)})]


def _options(
    record: Mapping[str, Any], keys: Sequence[str]
) -> tuple[tuple[str, Any], ...]:
    """Returns what the chat template gets beside the messages."""
    found: dict[str, Any] = {}
    for key in OPTION_KEYS:
        value = record.get(key) if key in keys else None
        if key == "chat_template_kwargs":
            if value is not None and not isinstance(value, Mapping):
                raise RecordError(
                    "wrong_shape", f"`{key}` must be an object, got {_type_name(value)}"
                )
            found |= _plain(key, value or {})
        elif value is not None and (given := _list(key, value)):
            if not all(isinstance(each, Mapping) for each in given):
                raise RecordError("wrong_shape", f"`{key}` must be a list of objects")
            found[key] = _plain(key, given)
    return tuple(found.items())


def _list(name: str, value: object) -> Sequence[Any]:
    """Returns a list, which tables may have as text of JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RecordError("wrong_shape", f"`{name}` is not JSON: {error}") from None
    if not isinstance(value, list | tuple):
        raise RecordError(
            "wrong_shape",
            f"`{name}` must be a list of objects"
            + (" with `role` and `content`" if name in CHAT_KEYS else "")
            + f", got {_type_name(value)}",
        )
    return value


def _messages(key: str, value: object) -> list[Message]:
    turns = enumerate(_list(key, value), start=1)
    return [_parse_message(number, message) for number, message in turns]


def _check_order(roles: Sequence[str]) -> None:
    """Raises RecordError if nothing is answered, or the user does not begin."""
    if ANSWER_ROLE not in roles:
        raise RecordError(
            "no_answer",
            "the conversation has no assistant turn, so there is nothing to learn; "
            f"its roles are {', '.join(roles[:20]) or 'none'}",
        )
    first = next(role for role in roles if role not in OPENING_ROLES)
    if first != "user":
        raise RecordError(
            "starts_with_assistant" if first == ANSWER_ROLE else "wrong_shape",
            f"the conversation must start with a user turn, got {first}; "
            "remove the turns before the first user turn",
        )


def _parse_message(number: int, value: object) -> Message:
    names = ("role", "content")
    if isinstance(value, Mapping) and {"from", "value"} <= value.keys():
        names = ("from", "value")
    if not isinstance(value, Mapping) or not (
        names[0] in value and (names[1] in value or value.get("tool_calls"))
    ):
        if isinstance(value, Mapping):
            found = ", ".join(f"`{key}`" for key in list(value)[:20]) or "no keys"
        else:
            found = _type_name(value)
        raise RecordError(
            "wrong_shape", f"turn {number} needs `role` and `content`, found {found}"
        )
    said = _string(f"role of turn {number}", value[names[0]])
    role = _SHAREGPT_ROLES.get(said, said) if names[0] == "from" else said
    if role not in ROLES:
        raise RecordError(
            "unknown_role",
            f"unknown role {show(said)} in turn {number}; known roles: "
            f"{', '.join(ROLES)}",
        )
    others = {
        str(key): _plain(f"{key} of turn {number}", other)
        for key, other in value.items()
        if key not in names and other is not None and other != []
    }
    trained = _weight(number, others) if role == ANSWER_ROLE else True
    content = value.get(names[1])
    if said == "function_call":
        others["tool_calls"] = [_call(number, content)]
        content = None
    calls = role == ANSWER_ROLE and "tool_calls" in others
    if content is not None or not calls:
        content = _said(f"content of turn {number}", content)
        if not content.strip() and not calls:
            raise RecordError("empty_turn", f"turn {number} ({role}) is empty")
    return Message(role, content, tuple(others.items()), trained)


def _said(name: str, value: object) -> str:
    """Returns a content, whose parts of text are joined."""
    if not isinstance(value, list):
        return _string(name, value)
    texts = []
    for part in value:
        given = part.items() if isinstance(part, Mapping) else ()
        held = {key: other for key, other in given if other is not None}
        if isinstance(part, str):
            held = {"text": part}
        if held.get("type", "text") != "text" or "text" not in held:
            kind = held.get("type", _type_name(part))
            raise RecordError(
                "wrong_shape",
                f"the {name} has a part that is not text ({show(kind)}); only parts "
                'such as {"type": "text", "text": ...} can be read',
            )
        texts.append(_string(name, held["text"]))
    return "".join(texts)


def _weight(number: int, others: dict[str, Any]) -> bool:
    """Returns whether an answer is trained on, and takes out what says so."""
    trained = True
    for key in ("weight", "train"):
        value = others.pop(key, None)
        if value not in (None, 0, 1):
            raise RecordError(
                "wrong_shape",
                f"`{key}` of turn {number} must be 0 or 1, got {show(value)}",
            )
        trained = trained and value != 0
    return trained


def _call(number: int, value: object) -> dict[str, Any]:
    """Returns the call of a tool that ShareGPT's form has as text."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or "name" not in call:
        raise RecordError(
            "wrong_shape",
            f"turn {number} (function_call) must be an object of JSON with `name` and "
            f"`arguments`, got {show(value)}",
        )
    return {"type": "function", "function": _plain(f"turn {number}", call)}


def _plain(name: str, value: Any) -> Any:
    """Returns a value for the template, whose texts are checked."""
    if isinstance(value, str):
        return _string(name, value)
    if isinstance(value, Mapping):
        return {
            _string(name, str(key)): _plain(name, other) for key, other in value.items()
        }
    if isinstance(value, list):
        return [_plain(name, other) for other in value]
    return value


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
