"""Conversations to text, with the characters of every answer."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from taid_jax.data.documents import (
    ANSWER_ROLE,
    OPENING_ROLES,
    Chat,
)
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.template import MARK, ChatTemplate, Conversation, Cut
from taid_jax.data.tokens import Rendered, Span, Tokenizer, shared_start
from taid_jax.errors import shorten, show

_MARKED = "\ue000"
"""An answer that no template writes by itself."""

_PRIVATE = (*range(0xE000, 0xF8FF), *range(0xF0000, 0xFFFFE))
"""Characters that mean nothing in Unicode, to be told apart from a conversation's."""

_CLOSED = re.compile(r".*(?:</\w+>|\[/\w+\])", re.DOTALL)
"""What is thought before an answer, of which templates keep the answer alone."""

_MOST_KEYS = 50
"""Each key of a conversation's messages costs a rendering."""

_WHOLE_WORD = re.compile(r"(?:.*[\s>\])}])?", re.DOTALL)


class ChatRenderer:
    """Renders conversations through the tokenizer's chat template.

    An answer runs from the end of the generation prompt to the end of its turn: what a
    model has to write when it is asked. So what the template writes in between counts,
    such as an empty block of thoughts or a call of a tool, and what ends the turn, be
    it a token or text; line ends after it do not.

    Args:
        tokenizer: With its chat template.
        train_on_prompts: Count every token, not only the assistant's.
        merge_system: Put a system turn that the template refuses before the first turn
            of the user.
        date: What templates take for today, `YYYY-MM-DD`; today when None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        train_on_prompts: bool = False,
        merge_system: bool = False,
        date: str | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, date)
        self._train_on_prompts = train_on_prompts
        self._merge_system = merge_system
        self._asks = False
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        # The longest first, so that no token is taken for a shorter one it begins with.
        ends = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, ends)) or r"(?!)")

    def prompt(self, content: Chat) -> Rendered:
        """Returns what a model is given to answer a conversation.

        Raises:
            DataError: If there is no template for a conversation, or it asks for no
                answer.
            RecordError: If the template refuses the conversation.
        """
        all_count = self._train_on_prompts
        if self._is_bare(content):
            text = content.messages[0].content or ""
            return Rendered(text, counts_all=all_count, framed=True, asks=True)

        def rendered(content: Chat) -> Rendered:
            texts = self._texts(content, [Cut(generation=True)])
            return Rendered(
                texts.plain[0],
                counts_all=all_count,
                unused_keys=texts.unused_keys,
                asks=True,
            )

        self._check_asks()

        return self._merging(content, rendered)

    def _check_asks(self) -> None:
        """Looks once whether the template asks for an answer at all.

        Raises:
            DataError: If it begins an answer with more than it ends a prompt with.
        """
        if self._asks or not self.has_template:
            return
        pair = [message.for_template() for message in Chat.pair("a", _MARKED).messages]
        cuts = [Cut(), Cut(1), Cut(1, generation=True)]
        shown = self._template.render(Conversation(pair), cuts)
        whole, bare, asked = (text if isinstance(text, str) else "" for text in shown)
        header = whole.removeprefix(bare).partition(_MARKED)[0].strip()
        written = whole.startswith(bare) and _MARKED in whole
        if bare and bare == asked and written and header:
            raise DataError(
                f"the chat template begins an answer with {show(header)}, but does not "
                "write that when it asks for one: a model would go on with the prompt. "
                "Let it heed add_generation_prompt, or give another by --chat-template"
            )
        self._asks = True

    def chat(self, content: Chat) -> Rendered:
        """Returns a conversation as text, with the characters of its answers.

        A prompt and its completion are a turn each of user and assistant. A tokenizer
        without a chat template (a base model's) gets the two joined as they stand, with
        start and end tokens. So does a prompt that begins with the start token: it was
        rendered before.

        Where prompts count too, only the last answer is looked for, and it is no
        problem if it is not found.

        Raises:
            DataError: If there is no template.
            RecordError: If the template refuses the conversation or leaves a turn out,
                or the answers are not found in what it renders, or nothing ends them.
        """
        if not self._is_bare(content):
            return self._merging(content, self._chat)
        prompt, completion = (turn.content or "" for turn in content.messages)
        text = prompt + completion
        answers = (Span(len(prompt), len(text)),)
        return Rendered(text, answers, self._train_on_prompts, framed=True)

    def _is_bare(self, content: Chat) -> bool:
        """Whether a prompt gets no template."""
        start = getattr(self._tokenizer, "bos_token", None)
        prompt = content.messages[0].content or ""
        rendered = bool(start) and prompt.startswith(start)
        return content.is_pair and (rendered or not self.has_template)

    def _merging(self, content: Chat, render: Callable[[Chat], Rendered]) -> Rendered:
        """Renders a conversation, its system turn put elsewhere if that is asked."""
        if not self.has_template:
            raise DataError(
                "conversations need a chat template and this tokenizer has none; give "
                "one by --chat-template FILE (a Jinja template), or put a "
                "chat_template.jinja (or the key `chat_template` in "
                "tokenizer_config.json) into the model's folder"
            )
        try:
            return render(content)
        except RecordError as error:
            merged = _merged(content)
            refused = error.reason in ("template_refuses", "unknown_role")
            if merged is None or not refused:
                raise
            if self._merge_system:
                return render(merged)
            raise RecordError(
                error.reason,
                f"{error}; --merge-system puts a system turn before the first turn of "
                "the user",
            ) from error

    def _chat(self, content: Chat) -> Rendered:
        every = [n for n, m in enumerate(content.messages) if m.role == ANSWER_ROLE]
        untrained = [turn for turn in every if not content.messages[turn].trained]
        turns = every
        if self._train_on_prompts:
            # Where they are matters for the last, and for those that do not count.
            last = [turn for turn in every if turn not in untrained][-1:]
            turns = sorted([*untrained, *last])
        cuts = [Cut(), *(Cut(turn, generation=True) for turn in turns)]
        texts = self._texts(content, cuts)
        whole = texts.plain[0]
        try:
            if MARK.search(texts.given.template or ""):
                spans, turns = _marked_answers(texts, self._template), every
                if untrained and len(spans) != len(every):
                    raise RecordError(
                        "answer_not_found",
                        "the chat template marks other answers than those that have a "
                        "weight",
                    )
            else:
                spans = _Answers(
                    content, turns, texts, self._template, self._token
                ).find()
        except RecordError as error:
            if not self._train_on_prompts or untrained or error.reason == "no_end":
                raise
            return Rendered(whole, counts_all=True, unused_keys=texts.unused_keys)
        turned = zip(spans, turns, strict=False)
        masked = tuple(span for span, turn in turned if turn in untrained)
        trained = tuple(span for span in spans if span not in masked)
        if not self._train_on_prompts:
            return Rendered(whole, trained, unused_keys=texts.unused_keys)
        answers = tuple(sorted((*masked, *trained[-1:])))
        return Rendered(
            whole,
            answers,
            counts_all=True,
            untrained=masked,
            unused_keys=texts.unused_keys,
        )

    def _texts(self, content: Chat, cuts: Sequence[Cut]) -> "_Texts":
        """Renders a conversation.

        Raises:
            RecordError: If the template refuses the conversation, or does not write a
                turn or the calls of tools.
        """
        messages = [message.for_template() for message in content.messages]
        options = dict(content.options)
        given = Conversation(messages, options, self._template.text(options))
        plain = [_sound(text) for text in self._template.render(given, cuts)]
        for turn, message in enumerate(content.messages, start=1):
            # Every template knows these two; others it may leave out without a word.
            known = message.role in ("user", ANSWER_ROLE)
            if not known and (message.content or "").strip() not in plain[0]:
                raise RecordError(
                    "unknown_role",
                    f"the chat template does not write turn {turn} ({message.role}); "
                    "take the turn out, or give another template by --chat-template",
                )
        keys = dict.fromkeys(key for turn in content.messages for key, _ in turn.others)
        keys = [*keys, *options]
        if len(keys) > _MOST_KEYS:
            raise RecordError(
                "wrong_shape",
                f"{len(keys)} keys beside `role` and `content`; at most {_MOST_KEYS} "
                "can be looked at",
            )
        unused = []
        for key in keys:
            # A template uses what it writes otherwise without. Some keys change only
            # how an answer is asked for.
            less = [{k: v for k, v in turn.items() if k != key} for turn in messages]
            left = {k: v for k, v in options.items() if k != key}
            without = given._replace(messages=less, options=left)
            found = self._template.render(without, [cuts[0], cuts[-1]])
            if found == [plain[0], plain[-1]]:
                unused.append(shorten(key, 80))
        if "tool_calls" in unused:
            # An answer without its calls is another answer.
            raise RecordError(
                "tool_calls_not_written",
                "the chat template does not write the calls of tools; give another by "
                "--chat-template, or take them out",
            )
        return _Texts(given, plain, tuple(unused))


class _Texts(NamedTuple):
    """What a template is given, the text of every cut, and the keys without use."""

    given: Conversation
    plain: list[str]
    unused_keys: tuple[str, ...]


def _sound(text: str | RecordError) -> str:
    if isinstance(text, RecordError):
        raise text
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise RecordError(
            "not_utf8", "the chat template writes half of a surrogate pair"
        )
    return text


def _marked_answers(texts: _Texts, template: ChatTemplate) -> list[Span]:
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
    shown = _sound(shown)
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


class _Answers:
    """Where the answers of a conversation lie in what a template renders.

    Each answer is rendered once more with a character behind it that the conversation
    does not have: what follows that character is the template's.
    """

    def __init__(
        self,
        content: Chat,
        turns: Sequence[int],
        texts: _Texts,
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
        """Returns what ends an answer.

        Args:
            number: Of the answer.
            after: What follows the answer where the conversation ends with it.
            follows: The same where it goes on, None if it cannot.
        """
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


def _merged(content: Chat) -> Chat | None:
    """Returns a conversation whose system turns are part of the first of the user."""
    roles = [message.role for message in content.messages]
    count = roles.index("user") if "user" in roles else 0
    opening, user = content.messages[:count], content.messages[count]
    if not opening or any(role not in OPENING_ROLES for role in roles[:count]):
        return None
    said = "\n\n".join(message.content or "" for message in (*opening, user))
    rest = content.messages[count + 1 :]
    return dataclasses.replace(content, messages=(user._replace(content=said), *rest))


def _free(given: Conversation, count: int) -> list[str]:
    """Returns characters that neither a conversation nor its template has."""
    parts = [given.messages, given.options, given.template]
    used = set(json.dumps(parts, ensure_ascii=False, default=str))
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return list(itertools.islice(free, count))
