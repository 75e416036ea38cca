"""What one record says: a text, a prompt and its completion, or a conversation."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from taid_jax.data.errors import RecordError
from taid_jax.errors import shorten, show

ROLES = ("system", "developer", "user", "assistant", "tool")
OPENING_ROLES = ("system", "developer")
ANSWER_ROLE = "assistant"

_CHAT_KEYS = ("messages", "conversations")
_PAIR_KEYS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
)
"""What is asked and what should follow, as data sets call them."""
_ASKED_KEYS = tuple(pair[:1] for pair in _PAIR_KEYS)
_OPTION_KEYS = ("tools", "documents", "chat_template_kwargs")
"""What a record has for the chat template beside its messages."""
_BESIDE = ("system", *_OPTION_KEYS)
RECORD_KEYS = (
    *_CHAT_KEYS,
    *dict.fromkeys(key for pair in _PAIR_KEYS for key in pair),
    *("input", "history", *_BESIDE),
    "text",
)
ID_KEYS = ("prompt_id", "id")
"""UltraChat calls its conversations by their prompts."""
_EXPECTED = "`text`, or `prompt` and `completion`, or `messages`"

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
    """A conversation that opens with the user.

    Attributes:
        messages: Its turns.
        options: What the template gets beside them, such as `tools`.
        is_pair: Whether it is a prompt and what should follow, and no more: without a
            template the two are joined as they stand.
    """

    messages: tuple[Message, ...]
    options: tuple[tuple[str, Any], ...] = ()
    is_pair: bool = False

    @property
    def asks(self) -> bool:
        """Whether it ends with something to be answered."""
        return bool(self.messages) and self.messages[-1].role in ("user", "tool")

    @classmethod
    def pair(cls, prompt: str, *completion: str) -> "Chat":
        """Returns a prompt, and what should follow if that is known."""
        turns = map(Message, ("user", ANSWER_ROLE), (prompt, *completion))
        return cls(tuple(turns), is_pair=True)


Content = Text | Chat


class Document(NamedTuple):
    """What is kept together when train and held-out data are told apart.

    Attributes:
        content: What it says.
        rank: Its place between 0 and 1, from a hash: low ranks are held out.
        name: What the record is called, from the first of `ID_KEYS` that it has.
        unused_keys: Those of the record that change nothing.
        teacher_weights: How much each of several teachers counts; see `TeacherField`.
        teacher: What the teacher sees in place of it, where that is something else.
    """

    content: Content
    rank: float
    name: str | None = None
    unused_keys: tuple[str, ...] = ()
    teacher_weights: tuple[float, ...] = ()
    teacher: Chat | None = None


def make_document(
    record: object, seed: int, *, prompts_suffice: bool = False
) -> Document:
    """Returns what a record of any of the formats of docs/data.md says.

    A conversation comes first, then a prompt and what follows it, then text; keys that
    hold None count as absent.

    The rank comes from what it says, never from its place: it stays the same when files
    are renamed or put in another order, and copies share it. Case and the amount of
    white space do not change it. A conversation is ranked by its prompt
    (all that is said before the first answer), so that no prompt is trained on with one
    answer, or one set of tools, and evaluated with another.

    Args:
        record: Of a file.
        seed: A different seed gives different ranks; 0 <= seed < 2**63.
        prompts_suffice: Take a record that is not answered too.

    Raises:
        RecordError: If it is not a record, has other keys, values of another type, or a
            conversation that cannot be used. The place is not in the message.
    """
    alone = _ASKED_KEYS if prompts_suffice else ()
    content, used = _parse(record, (*_PAIR_KEYS, *alone))
    if isinstance(content, Text):
        parts = [content.text]
    else:
        roles = [message.role for message in content.messages]
        asks = prompts_suffice and content.asks
        _check_order(roles, answered=not asks)
        first = roles.index(ANSWER_ROLE) if ANSWER_ROLE in roles else len(roles)
        opening = content.messages[:first]
        parts = [part for turn in opening for part in (turn.role, turn.content)]
    key = "\0".join(" ".join((part or "").split()).casefold() for part in parts)
    salt = seed.to_bytes(8, "little")
    digest = hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest()
    rank = int.from_bytes(digest, "little") / 2**64
    given: Mapping[Any, Any] = record  # pyright: ignore
    names = (given.get(key) for key in ID_KEYS)
    name = next((str(name) for name in names if isinstance(name, str | int)), None)
    unused = tuple(
        shorten(str(key), 80)
        for key, value in given.items()
        if value not in (None, "", []) and key not in (*used, *ID_KEYS)
    )
    return Document(content, rank, name, unused)


def parse_prompt(record: object) -> Chat:
    """Returns what a record asks: all up to its last answer.

    Of a conversation that ends with a question all of it is asked.

    Raises:
        RecordError: As `make_document`, or if nothing is asked.
    """
    content, _ = _parse(record, _ASKED_KEYS)
    if isinstance(content, Text):
        raise _wrong_keys("`prompt` or `messages` with text", record)
    roles = [message.role for message in content.messages]
    end = len(roles)
    if ANSWER_ROLE in roles and roles[-1] not in ("user", "tool"):
        end -= 1 + roles[::-1].index(ANSWER_ROLE)
    if not end or roles[end - 1] == ANSWER_ROLE:
        raise _wrong("the conversation asks nothing before its end")
    return dataclasses.replace(content, messages=content.messages[:end])


def _parse(
    record: object, pairs: Sequence[tuple[str, ...]]
) -> tuple[Content, tuple[str, ...]]:
    """Returns what a record says, and the keys that say it."""
    if not isinstance(record, Mapping):
        raise _wrong(f"need an object with {_EXPECTED}, got {_type_name(record)}")
    there = {key for key in RECORD_KEYS if record.get(key) is not None}
    if key := next((key for key in _CHAT_KEYS if key in there), None):
        turns = (*_opening(record, ()), *_messages(key, record[key]))
        return Chat(turns, _options(record)), (key, *_BESIDE)
    if pair := next((pair for pair in pairs if there.issuperset(pair)), None):
        used = (*pair, "input", "history", *_BESIDE)
        return _pair(record, pair), used
    if "text" in there:
        return Text(_string("text", record["text"])), ("text",)
    raise _wrong_keys(f"the keys {_EXPECTED}", record)


def _wrong(message: str) -> RecordError:
    return RecordError("wrong_shape", message)


def _wrong_keys(needed: str, record: Any) -> RecordError:
    found = [
        f"`{key}`" + (" (null)" if record[key] is None else "")
        for key in list(record)[:20]
    ]
    return _wrong(
        f"need {needed}; found {', '.join(found) or 'none'} (docs/data.md lists other "
        "formats)",
    )


def _pair(record: Mapping[str, Any], keys: Sequence[str]) -> Chat:
    """Returns what is asked and what should follow, as a chat where it needs one."""
    options = _options(record)
    opening = _opening(record, record.get("history") or ())
    asked, *answered = (record[key] for key in keys)
    if any(map(_is_turns, (asked, *answered))):
        # What a data set has in the prompt is context, and not to be learned.
        before = [
            each._replace(trained=each.role != ANSWER_ROLE)
            for each in read_turns(keys[0], asked, "user")
        ]
        after = [
            turn
            for value in answered
            for turn in read_turns(keys[1], value, ANSWER_ROLE)
        ]
        return Chat((*opening, *before, *after), options)
    texts = [_string(key, record[key]) for key in keys]
    if (more := _string("input", record.get("input") or "")).strip():
        texts[0] = f"{texts[0]}\n\n{more}"
    for key, text in zip(keys, texts, strict=True):
        if not text.strip():
            raise RecordError(
                "empty_turn",
                f"`{key}` is empty; a record without a prompt belongs under `text`",
            )
    pair = Chat.pair(*texts)
    if opening or options:
        return Chat((*opening, *pair.messages), options)
    return pair


def _opening(record: Mapping[str, Any], history: object) -> tuple[Message, ...]:
    """Returns the turns that a record has before its own: `system` and `history`."""
    opening = []
    if (system := _string("system", record.get("system") or "")).strip():
        opening.append(Message("system", system))
    for number, pair in enumerate(_list("history", history), start=1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise _wrong(f"`history` needs pairs of texts, got {show(pair)}")
        for role, said in zip(("user", ANSWER_ROLE), pair, strict=True):
            opening.append(Message(role, _string(f"history {number}", said)))
    return tuple(opening)


def _is_turns(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, Mapping) for one in value)


def read_turns(key: str, value: object, role: str) -> list[Message]:
    """Returns messages, or a text as the turn of a role.

    Raises:
        RecordError: If it is neither, or empty.
    """
    if _is_turns(value):
        return _messages(key, value)
    return [_message(1, {"role": role, "content": _string(key, value)})]


def _options(record: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Returns what the chat template gets beside the messages."""
    found: dict[str, Any] = {}
    for key in ("tools", "documents"):
        given = _list(key, record.get(key) or ())
        if not all(isinstance(each, Mapping) for each in given):
            raise _wrong(f"`{key}` must be a list of objects")
        if given:
            found[key] = _plain(key, given)
    more = record.get(key := "chat_template_kwargs") or {}
    if not isinstance(more, Mapping):
        raise _wrong(f"`{key}` must be an object, got {_type_name(more)}")
    return tuple((found | _plain(key, more)).items())


def _list(name: str, value: object) -> Sequence[Any]:
    """Returns a list, which tables may have as text of JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _wrong(f"`{name}` is not JSON: {error}") from None
    if not isinstance(value, list | tuple):
        raise _wrong(
            f"`{name}` must be a list of objects"
            + (" with `role` and `content`" if name in _CHAT_KEYS else "")
            + f", got {_type_name(value)}",
        )
    return value


def _messages(key: str, value: object) -> list[Message]:
    turns = enumerate(_list(key, value), start=1)
    return [_message(number, message) for number, message in turns]


def _check_order(roles: Sequence[str], *, answered: bool) -> None:
    """Raises RecordError if the user does not begin, or nothing is `answered`."""
    if answered and ANSWER_ROLE not in roles:
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


def _message(number: int, value: object) -> Message:
    if not isinstance(value, Mapping):
        value, found = {}, _type_name(value)
    else:
        found = ", ".join(f"`{key}`" for key in list(value)[:20]) or "no keys"
    by_from = {"from", "value"} <= value.keys()
    names = ("from", "value") if by_from else ("role", "content")
    if names[0] not in value or not (names[1] in value or value.get("tool_calls")):
        raise _wrong(f"turn {number} needs `role` and `content`, found {found}")
    said = _string(f"role of turn {number}", value[names[0]])
    role = _SHAREGPT_ROLES.get(said, said) if by_from else said
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
        content = _text_of(f"content of turn {number}", content)
        if not content.strip() and not calls:
            raise RecordError("empty_turn", f"turn {number} ({role}) is empty")
    return Message(role, content, tuple(others.items()), trained)


def _text_of(name: str, value: object) -> str:
    """Returns a content, whose parts of text are joined."""
    if not isinstance(value, list):
        return _string(name, value)
    texts = []
    for part in value:
        held = {"text": part} if isinstance(part, str) else part
        kind = held.get("type") or "text" if isinstance(held, Mapping) else ""
        if kind != "text" or held.get("text") is None:
            raise _wrong(
                f"the {name} has a part that is not text "
                f"({show(kind or _type_name(part))}); only parts such as "
                '{"type": "text", "text": ...} can be read',
            )
        texts.append(_string(name, held["text"]))
    return "".join(texts)


def _weight(number: int, others: dict[str, Any]) -> bool:
    """Returns whether an answer is trained on, and takes out what says so."""
    values = {key: others.pop(key, None) for key in ("weight", "train")}
    for key, value in values.items():
        if value not in (None, 0, 1):
            raise _wrong(
                f"`{key}` of turn {number} must be 0 or 1, got {show(value)}",
            )
    return 0 not in values.values()


def _call(number: int, value: object) -> dict[str, Any]:
    """Returns the call of a tool that ShareGPT's form has as text."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, Mapping) or "name" not in call:
        raise _wrong(
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
    if isinstance(value, list | tuple):
        return [_plain(name, other) for other in value]
    return value


def _string(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(f"`{name}` must be a string, got {_type_name(value)}")
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
