"""Conversations to text, with the characters of every answer."""

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from taid_jax.data.documents import (
    ANSWER_ROLE,
    OPENING_ROLES,
    Chat,
    Completion,
    Message,
)
from taid_jax.data.encoding import Rendered, Span, Tokenizer, is_rendered
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.template import ChatTemplate, Cut
from taid_jax.data.template_process import common
from taid_jax.errors import shorten

_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
"""What a template has round all that the assistant writes, where it says so itself."""

_PRIVATE = (*range(0xE000, 0xF8FF), *range(0xF0000, 0xFFFFE))
"""Characters that mean nothing in Unicode, to be told apart from a conversation's."""

_CLOSED = re.compile(r".*(?:</\w+>|\[/\w+\])", re.DOTALL)
"""What is thought before an answer, of which templates keep the answer alone."""

_MOST_KEYS = 50
"""Each key of a conversation's messages costs a rendering."""

_WHOLE_WORD = re.compile(r"(?:.*[\s>\])}])?", re.DOTALL)


class MissingTemplateError(DataError):
    """There are conversations, and the tokenizer has no chat template."""

    def __init__(self):
        super().__init__(
            "conversations need a chat template and this tokenizer has none; give one "
            "by --chat-template FILE (a Jinja template), or put a chat_template.jinja "
            "(or the key `chat_template` in tokenizer_config.json) into the model's "
            "folder"
        )


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

    Attributes:
        unused: How many conversations had each key that the template does not use.
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
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.unused: Counter[str] = Counter()
        # The longest first, so that no token is taken for a shorter one it begins with.
        ends = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, ends)) or r"(?!)")

    def completion(self, content: Completion) -> Rendered:
        """Returns a prompt and its completion as one turn each of user and assistant.

        A tokenizer without a chat template (a base model's) gets prompt and completion
        joined as they stand, with start and end tokens. So does a prompt that begins
        with the start token: it was rendered before.

        Raises:
            RecordError: If the template refuses it.
        """
        if self.has_template and not is_rendered(self._tokenizer, content.prompt):
            user = Message("user", content.prompt)
            return self.chat(Chat((user, Message(ANSWER_ROLE, content.completion))))
        text = content.prompt + content.completion
        answers = (Span(len(content.prompt), len(text)),)
        return Rendered(text, answers, self._train_on_prompts, framed=True)

    def prompt(self, content: Completion | Chat) -> Rendered:
        """Returns what a model is given to answer a conversation, or a plain prompt.

        A plain prompt is a user's turn of the chat template, unless there is none, or
        it begins with the start token: it was rendered before.

        Raises:
            MissingTemplateError: If there is no template for a conversation.
            RecordError: If the template refuses the conversation.
        """
        if isinstance(content, Completion):
            if not self.has_template or is_rendered(self._tokenizer, content.prompt):
                return Rendered(content.prompt, framed=True)
            content = Chat((Message("user", content.prompt),))
        cuts = [Cut(generation=True)]
        content, texts = self._rendered(content, cuts)
        self._count_unused(content, cuts, texts)
        return Rendered(texts[0])

    def chat(self, content: Chat) -> Rendered:
        """Returns a conversation as text, with the characters of its answers.

        Where prompts count too, only the last answer is looked for, and it is no
        problem if it is not found.

        Raises:
            MissingTemplateError: If there is no template.
            RecordError: If the template refuses the conversation or leaves a turn out,
                or the answers are not found in what it renders, or nothing ends them.
        """
        turns = _answer_turns(content)
        silent = [turn for turn in turns if not content.messages[turn].trained]
        if self._train_on_prompts:
            # Where they are matters for the last, and for those that do not count.
            last = [turn for turn in turns if turn not in silent][-1:]
            turns = sorted([*silent, *last])
        numbers = [n for n, turn in enumerate(turns) if turn in silent]
        cuts = [Cut(), *(Cut(turn, generation=True) for turn in turns)]
        before = len(content.messages)
        content, texts = self._rendered(content, cuts)
        moved = before - len(content.messages)
        turns = [turn - moved for turn in turns]
        whole = texts[0]
        # Some keys change only how an answer is asked for.
        looked_at = [Cut(), *(Cut(turn, generation=True) for turn in turns[-1:])]
        self._count_unused(content, looked_at, [whole, *texts[1:][-1:]])
        marked = self._template.text(dict(content.options)) or ""
        try:
            if _MARK.search(marked):
                spans = self._marked_answers(whole, content, marked)
                every = _answer_turns(content)
                if silent and len(spans) != len(every):
                    raise RecordError(
                        "answer_not_found",
                        "the chat template marks other answers than those that have a "
                        "weight",
                    )
                numbers = [n for n, turn in enumerate(every) if turn + moved in silent]
            elif turns:
                finder = _Answers(self._template, content, turns, whole, self._token)
                spans = finder.find(texts[1:])
            else:
                spans = ()
        except RecordError as error:
            if not self._train_on_prompts or silent or error.reason == "no_end":
                raise
            return Rendered(whole, counts_all=True)
        trained = tuple(span for n, span in enumerate(spans) if n not in numbers)
        if not self._train_on_prompts:
            return Rendered(whole, trained)
        left_out = tuple(spans[n] for n in numbers)
        return Rendered(whole, trained[-1:], counts_all=True, not_counted=left_out)

    def _rendered(self, content: Chat, cuts: Sequence[Cut]) -> tuple[Chat, list[str]]:
        """Returns the conversation as it can be rendered, and the text of each cut."""
        if not self.has_template:
            raise MissingTemplateError()
        try:
            return content, self._strictly(content, cuts)
        except RecordError as error:
            merged = _merged(content)
            if merged is None:
                raise
            if self._merge_system:
                moved = len(content.messages) - len(merged.messages)
                cuts = [
                    cut._replace(stop=cut.stop and cut.stop - moved) for cut in cuts
                ]
                return merged, self._strictly(merged, cuts)
            try:
                self._strictly(merged, cuts[:1])
            except RecordError:
                raise error from None
            raise RecordError(
                error.reason,
                f"{error}; --merge-system puts the system turn before the first turn "
                "of the user",
            ) from error

    def _strictly(self, content: Chat, cuts: Sequence[Cut]) -> list[str]:
        messages = content.messages
        found = self._template.render(_dicts(messages), cuts, dict(content.options))
        texts = []
        for each in found:
            if isinstance(each, RecordError):
                raise each
            if not each.isascii() and re.search("[\ud800-\udfff]", each):
                raise RecordError(
                    "not_utf8", "the chat template writes half of a surrogate pair"
                )
            texts.append(each)
        for turn, message in enumerate(messages, start=1):
            # Every template knows these two; others it may silently leave out.
            known = message.role in ("user", ANSWER_ROLE)
            if not known and (message.content or "").strip() not in texts[0]:
                raise RecordError(
                    "unknown_role",
                    f"the chat template does not write turn {turn} ({message.role}); "
                    "take the turn out, or give another template by --chat-template",
                )
        return texts

    def _count_unused(
        self, content: Chat, cuts: Sequence[Cut], texts: Sequence[str]
    ) -> None:
        """Counts what the template does not use: it writes the same without it.

        Raises:
            RecordError: If calls of tools are among it: an answer without its calls is
                another answer.
        """
        options = dict(content.options)
        keys = dict.fromkeys(key for turn in content.messages for key, _ in turn.others)
        if len(keys) + len(options) > _MOST_KEYS:
            raise RecordError(
                "wrong_shape",
                f"{len(keys) + len(options)} keys beside `role` and `content`; at most "
                f"{_MOST_KEYS} can be looked at",
            )
        for key in (*keys, *options):
            less = [
                {name: value for name, value in turn.items() if name != key}
                for turn in _dicts(content.messages)
            ]
            left = {name: value for name, value in options.items() if name != key}
            without = self._template.render(
                less,
                cuts,
                left,
                # Which one is used may depend on whether there are tools.
                template=self._template.text(options),
            )
            if without != texts:
                continue
            if key == "tool_calls":
                raise RecordError(
                    "tool_calls_not_written",
                    "the chat template does not write the calls of tools; give another "
                    "by --chat-template, or take them out",
                )
            self.unused[shorten(key, 80)] += 1

    def _marked_answers(
        self, whole: str, content: Chat, template: str
    ) -> tuple[Span, ...]:
        """Returns the characters that the template marks as the assistant's.

        Each mark is replaced by a character that the conversation does not have. Which
        tokens they are is left to the encoder and its proof: the masks that
        `transformers` makes count a token of which one character is an answer's.
        """
        start, stop = _free(whole, 2)

        def show(mark: re.Match[str]) -> str:
            # A block, as the mark is, so that white space round it is treated alike.
            left, end, right = mark.groups()
            character = stop if end else start
            return f"{{%{left} if true %}}{character}{{% endif {right}%}}"

        [shown] = self._template.render(
            _dicts(content.messages),
            options=dict(content.options),
            template=_MARK.sub(show, template),
        )
        if isinstance(shown, RecordError):
            raise shown
        spans: list[Span] = []
        place = 0
        for piece in re.split(f"([{start}{stop}])", shown):
            if piece == start:
                spans.append(Span(place, place))
            elif piece == stop:
                spans[-1] = spans[-1]._replace(stop=place)
            else:
                place += len(piece)
        if re.sub(f"[{start}{stop}]", "", shown) != whole:
            raise RecordError(
                "answer_not_found",
                "the chat template marks answers in a way that changes what it renders",
            )
        return tuple(span for span in spans if span.start < span.stop)


class _Answers:
    """Where the answers of a conversation lie in what a template renders.

    Each answer is rendered once more with a character behind it that the conversation
    does not have: what follows that character is the template's.

    Args:
        template: Renders the conversation.
        content: The conversation.
        turns: The places of the answers that are looked for.
        whole: What the template writes.
        token: Finds tokens that are not learned from text.
    """

    def __init__(
        self,
        template: ChatTemplate,
        content: Chat,
        turns: Sequence[int],
        whole: str,
        token: re.Pattern[str],
    ):
        self._template = template
        self._options = dict(content.options)
        self._messages = content.messages
        self._turns = turns
        self._whole = whole
        self._token = token
        self._marks = _free(whole, len(turns))
        self._marked = _dicts(content.messages)
        for mark, turn in zip(self._marks, turns, strict=True):
            self._marked[turn] = _marked(self._marked[turn], mark)

    def find(self, prompts: Sequence[str]) -> list[Span]:
        """Returns the answers.

        Args:
            prompts: What each answer is asked by.

        Raises:
            RecordError: If one is not found, or nothing ends it.
        """
        follower = {"role": "user", "content": "."}
        last = len(self._messages) == self._turns[-1] + 1
        shown, alone, on = self._template.render(
            [*self._marked, follower],
            [Cut(len(self._messages)), Cut(self._turns[-1] + 1), Cut()],
            self._options,
        )
        if isinstance(shown, RecordError) or isinstance(alone, RecordError):
            raise self._problem(0)
        stops = self._align(shown)
        starts = []
        for number, (prompt, stop) in enumerate(zip(prompts, stops, strict=True)):
            starts.append(self._start(number, prompt))
            self._check(number, self._whole[starts[-1] : stop], prompt)
        ends: list[str] = []
        for number in reversed(range(len(self._turns))):
            turn, mark = self._turns[number], self._marks[number]
            goes_on = shown.partition(mark)[2]
            calls = self._calls(number)
            if not ends:
                after = alone.partition(mark)[2]
                more = on.partition(mark)[2] if isinstance(on, str) else None
                end = self._end_of(after, more if last else goes_on, calls=calls)
                if last and not end.strip():
                    # Only the end of the text is written down.
                    end = self._end_of(after, None, calls=calls)
            elif not calls and ends[0].strip() and goes_on.startswith(ends[0]):
                end = ends[0]  # As the last one ends, as nearly all do.
            else:
                [ended] = self._template.render(
                    self._marked, [Cut(turn + 1)], self._options
                )
                if isinstance(ended, RecordError):
                    raise self._problem(number)
                end = self._end_of(ended.partition(mark)[2], goes_on, calls=calls)
                if not end.strip():
                    # Some end the last answer of all by another token.
                    end = self._other_end(goes_on)
            if not end.strip():
                raise RecordError(
                    "no_end",
                    f"the chat template writes nothing that ends the answer in turn "
                    f"{turn + 1}, so that a student would never stop; give another by "
                    "--chat-template",
                )
            ends.append(end)
        return [
            Span(start, stop + len(end))
            for start, stop, end in zip(starts, stops, ends[::-1], strict=True)
        ]

    def _end_of(self, after: str, follows: str | None, *, calls: bool) -> str:
        """Returns what ends an answer, from what stands between it and the next turn.

        Args:
            after: What follows the answer where the conversation ends with it.
            follows: The same where it goes on, None if it cannot.
            calls: Whether calls of tools stand there too.
        """
        end = after
        if follows is not None and not follows.startswith(after):
            same = common(after, follows)
            # Both may go on by like characters, of which no token is one.
            end = _WHOLE_WORD.match(after[:same])[0]  # pyright: ignore
        token = None if calls else self._token.search(end)
        return end[: token.end()] if token else end.rstrip()

    def _other_end(self, goes_on: str) -> str:
        """Returns the token behind an answer, if none that begins a turn is it."""
        found = re.match(rf"\s*(?:{self._token.pattern})", goes_on)
        first = [{"role": "user", "content": self._marks[0]}]
        [begins] = self._template.render(first, options=self._options)
        if not found or isinstance(begins, RecordError):
            return ""
        header = begins.partition(self._marks[0])[0]
        return "" if found[0].strip() in header else found[0]

    def _calls(self, number: int) -> bool:
        return "tool_calls" in dict(self._messages[self._turns[number]].others)

    def _align(self, shown: str) -> list[int]:
        """Returns where in the whole each mark would stand.

        White space at the end of an answer is before its mark, where it is kept.
        """
        pieces = re.split(f"[{''.join(self._marks)}]", shown)
        if len(pieces) != len(self._marks) + 1:
            raise self._problem(0)
        place, stops = len(pieces[0]), []
        if not self._whole.startswith(pieces[0]):
            raise self._problem(0)
        for number, piece in enumerate(pieces[1:]):
            said = self._messages[self._turns[number]].content or ""
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

    def _start(self, number: int, prompt: str) -> int:
        """Returns where an answer begins: behind what it is asked by.

        A template may ask by more than it writes when the answer is there, such as the
        tag that opens a block of thoughts: then where the two part, if it is behind
        the beginning of what asks.
        """
        if self._whole.startswith(prompt):
            return len(prompt)
        turn = self._turns[number]
        [plain] = self._template.render(
            _dicts(self._messages), [Cut(turn)], self._options
        )
        same = common(prompt, self._whole)
        if isinstance(plain, RecordError) or same <= common(plain, prompt):
            raise self._problem(number)
        # The answer may begin as the rest of the prompt does.
        [bare] = self._template.render(
            [
                *_dicts(self._messages[:turn]),
                {"role": ANSWER_ROLE, "content": self._marks[number]},
            ],
            options=self._options,
        )
        if isinstance(bare, RecordError):
            raise self._problem(number)
        return min(same, common(prompt, bare))

    def _check(self, number: int, region: str, prompt: str) -> None:
        """Raises RecordError if that is not what is said in a turn."""
        said = (self._messages[self._turns[number]].content or "").strip()
        if said not in region:
            # The answer alone may be left of one that says its thoughts first.
            closed = _CLOSED.match(said)
            answer = said[closed.end() :].strip() if closed else ""
            if not answer or answer not in region:
                raise self._problem(number)
        if self._calls(number) or region.lstrip().startswith(said):
            return
        # Where nothing asks, what stands before an answer may be the turn's header.
        [plain] = self._template.render(
            _dicts(self._messages), [Cut(self._turns[number])], self._options
        )
        if plain == prompt:
            raise self._problem(number)

    def _problem(self, number: int) -> RecordError:
        return RecordError(
            "answer_not_found",
            f"the answer in turn {self._turns[number] + 1} is not found where the chat "
            "template asks for it; mark answers in the template with {% generation %} "
            "... {% endgeneration %}, or train on prompts too",
        )


def _answer_turns(content: Chat) -> list[int]:
    return [n for n, turn in enumerate(content.messages) if turn.role == ANSWER_ROLE]


def _dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.for_template() for message in messages]


def _marked(message: dict[str, Any], mark: str) -> dict[str, Any]:
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


def _free(text: str, count: int) -> list[str]:
    """Returns characters that a text does not have."""
    used = set(text)
    free = [
        chr(code) for code in _PRIVATE[: count + len(used)] if chr(code) not in used
    ]
    return free[:count]
