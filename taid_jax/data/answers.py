"""Where the answers of a conversation lie in what a chat template renders."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from taid_jax.data.documents import ANSWER_ROLE, Chat
from taid_jax.data.errors import RecordError
from taid_jax.data.template import MARK, ChatTemplate, Conversation, Cut
from taid_jax.data.tokens import Span, shared_start

_PRIVATE = (*range(0xE000, 0xF8FF), *range(0xF0000, 0xFFFFE))
"""Characters that mean nothing in Unicode, to be told apart from a conversation's."""

_CLOSED = re.compile(r".*(?:</\w+>|\[/\w+\])", re.DOTALL)
"""What is thought before an answer, of which templates keep the answer alone."""

_WHOLE_WORD = re.compile(r"(?:.*[\s>\])}])?", re.DOTALL)


class Texts(NamedTuple):
    """What a template is given, the text of every cut, and the keys without use."""

    given: Conversation
    plain: list[str]
    unused_keys: tuple[str, ...]


def sound(text: str | RecordError) -> str:
    """Returns what a template wrote, and raises where it refused or is no Unicode."""
    if isinstance(text, RecordError):
        raise text
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RecordError(
            "not_utf8", "the chat template writes half of a surrogate pair"
        )
    return text


def marked_answers(texts: Texts, template: ChatTemplate) -> list[Span]:
    """Returns the characters that the template marks as the assistant's.

    Which tokens they are is left to the encoder and its proof: the masks that
    `transformers` makes count a token of which one character is an answer's.
    """
    start, stop = _free(texts.given, 2)

    def show(mark: re.Match[str]) -> str:
        # A block, as the mark is, so that white space round it is treated alike.
        left, end, right = mark.groups()
        shown = stop if end else start
        return f"{{%{left} if true %}}{shown}{{% endif {right}%}}"

    marked = MARK.sub(show, texts.given.template or "")
    [shown] = template.render(texts.given._replace(template=marked), [Cut()])
    shown = sound(shown)
    spans: list[Span] = []
    place = 0
    for piece in re.split(f"([{start}{stop}])", shown):
        if piece == start:
            spans.append(Span(place, place))
        elif piece == stop:
            spans[-1] = spans[-1]._replace(stop=place)
        else:
            place += len(piece)
    if re.sub(f"[{start}{stop}]", "", shown) != texts.plain[0]:
        raise RecordError(
            "answer_not_found",
            "the chat template marks answers in a way that changes what it renders",
        )
    return [span for span in spans if span.start < span.stop]


class Answers:
    """Where the answers of a conversation lie in what a template renders.

    Each answer is rendered once more with a character behind it that the conversation
    does not have: what follows that character is the template's.
    """

    def __init__(
        self,
        content: Chat,
        turns: Sequence[int],
        texts: Texts,
        template: ChatTemplate,
        token: re.Pattern[str],
    ):
        self._content, self._turns, self._given = content, turns, texts.given
        self._whole, *self._prompts = texts.plain
        self._template, self._token = template, token
        self._marks = _free(texts.given, len(turns))

    def find(self) -> list[Span]:
        """Returns the answers.

        Raises:
            RecordError: If one is not found, or nothing ends it.
        """
        messages = [*self._given.messages, {"role": "user", "content": "."}]
        for mark, turn in zip(self._marks, self._turns, strict=True):
            messages[turn] = _marked(messages[turn], mark)
        # All of it, the same going on, and up to each answer.
        stops = (-1, None, *(turn + 1 for turn in self._turns))
        shown, on, *ended = self._template.render(
            self._given._replace(messages=messages), [Cut(stop) for stop in stops]
        )
        stops = self._align(shown)
        spans = []
        for number, turn in enumerate(self._turns):
            start = self._start(number)
            self._check(number, start, stops[number])
            # What stands behind the answer where it is the last, and where it is not.
            last = turn + 1 == len(self._content.messages)
            after, follows = ended[number], on if last else shown
            if isinstance(after, RecordError):
                raise self._problem(number)
            after = after.partition(self._marks[number])[2]
            if isinstance(follows, str):
                follows = follows.partition(self._marks[number])[2]
            else:
                follows = None
            end = self._end_of(number, after, follows)
            if last and not end.strip():
                # Only the end of the text is written down.
                end = self._end_of(number, after, None)
            if not end.strip():
                raise RecordError(
                    "no_end",
                    f"the chat template writes nothing that ends the answer in turn "
                    f"{turn + 1}, so that a student would never stop; give another by "
                    "--chat-template",
                )
            spans.append(Span(start, stops[number] + len(end)))
        return spans

    def _end_of(self, number: int, after: str, follows: str | None) -> str:
        """Returns what ends an answer."""
        end = after
        if follows is not None and not follows.startswith(after):
            same = shared_start(after, follows)
            # Both may go on by like characters, of which no token is one.
            end = _WHOLE_WORD.match(after[:same])[0]  # pyright: ignore
        token = None if self._calls(number) else self._token.search(end)
        return end[: token.end()] if token else end.rstrip()

    def _calls(self, number: int) -> bool:
        message = self._content.messages[self._turns[number]]
        return "tool_calls" in dict(message.others)

    def _said(self, number: int) -> str:
        return self._content.messages[self._turns[number]].content or ""

    def _align(self, shown: str | RecordError) -> list[int]:
        """Returns where in the whole each mark would stand.

        White space at the end of an answer is before its mark, where it is kept.
        """
        if isinstance(shown, RecordError):
            raise self._problem(0)
        first, *pieces = re.split(f"[{''.join(self._marks)}]", shown)
        if len(pieces) != len(self._marks) or not self._whole.startswith(first):
            raise self._problem(0)
        place, stops = len(first), []
        for number, piece in enumerate(pieces):
            said = self._said(number)
            space = "" if self._calls(number) else said[len(said.rstrip()) :]
            if not self._whole.startswith(space + piece, place):
                space = ""
            if not self._whole.startswith(piece, place + len(space)):
                raise self._problem(number)
            stops.append(place + len(space))
            place += len(space) + len(piece)
        if place != len(self._whole):
            raise self._problem(len(stops) - 1)
        return stops

    def _start(self, number: int) -> int:
        """Returns where an answer begins: behind what it is asked by.

        A template may ask by more than it writes when the answer is there, such as the
        tag that opens a block of thoughts: then where the two part, if it is behind
        the beginning of what asks.
        """
        prompt = self._prompts[number]
        if self._whole.startswith(prompt):
            return len(prompt)
        plain, bare = self._before(number)
        same = shared_start(prompt, self._whole)
        if not isinstance(bare, str) or same <= shared_start(plain, prompt):
            raise self._problem(number)
        # The answer may begin as the rest of the prompt does.
        return min(same, shared_start(prompt, bare))

    def _before(self, number: int) -> tuple[str, str | RecordError]:
        """Returns all before an answer, with nothing that asks and with a mark."""
        turn = self._turns[number]
        mark = {"role": ANSWER_ROLE, "content": self._marks[number]}
        asked = self._given._replace(messages=[*self._given.messages[:turn], mark])
        plain, bare = self._template.render(asked, [Cut(turn), Cut()])
        if not isinstance(plain, str):
            raise self._problem(number)
        return plain, bare

    def _check(self, number: int, start: int, stop: int) -> None:
        """Raises RecordError if that is not what is said in a turn."""
        region, said = self._whole[start:stop], self._said(number).strip()
        if said not in region:
            # The answer alone may be left of one that says its thoughts first.
            closed = _CLOSED.match(said)
            answer = said[closed.end() :].strip() if closed else ""
            if not answer or answer not in region:
                raise self._problem(number)
        if self._calls(number) or region.lstrip().startswith(said):
            return
        # Where nothing asks, what stands before an answer may be the turn's header.
        if self._before(number)[0] == self._prompts[number]:
            raise self._problem(number)

    def _problem(self, number: int) -> RecordError:
        return RecordError(
            "answer_not_found",
            f"the answer in turn {self._turns[number] + 1} is not found where the chat "
            "template asks for it; mark answers in the template with {% generation %} "
            "... {% endgeneration %}, or train on prompts too",
        )


def _marked(message: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Returns an answer with a character behind it, or in the name of its last call."""
    calls = message.get("tool_calls")
    if not calls:
        return {**message, "content": (message["content"] or "").rstrip() + mark}
    *before, last = calls
    inner = last.get("function") if isinstance(last, Mapping) else None
    if isinstance(inner, Mapping):
        last = {**last, "function": {**inner, "name": f"{inner.get('name')}{mark}"}}
    elif isinstance(last, Mapping):
        last = {**last, "name": f"{last.get('name')}{mark}"}
    return {**message, "tool_calls": [*before, last]}


def _free(given: Conversation, count: int) -> list[str]:
    """Returns characters that neither a conversation nor its template has."""
    parts = [given.messages, given.options, given.template]
    used = set(json.dumps(parts, ensure_ascii=False, default=str))
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return list(itertools.islice(free, count))
