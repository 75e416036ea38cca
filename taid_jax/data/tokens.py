"""Text to token ids, in batches, with the exact tokens of every answer."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from taid_jax.data.errors import DataError, RecordError
from taid_jax.errors import parsing


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: those of `transformers` have it all.

    It may also have `bos_token_id`, `eos_token_id`, `pad_token_id` and `chat_template`.
    They are not listed as attributes because `transformers` makes them up when they are
    asked for, which the protocol check of Python 3.12 does not see.
    """

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, Any]:
        """Encodes texts: `["input_ids"]` is a list of lists of ids."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], **options: Any
    ) -> Any:
        """Renders a conversation."""
        ...

    def decode(self, token_ids: list[int], **options: Any) -> Any:
        """Turns ids into text."""
        ...

    def get_added_vocab(self) -> Mapping[str, int]:
        """Returns the tokens not learned from text, such as `<|im_end|>`."""
        ...


class Example(NamedTuple):
    """Token ids, and which of them are predicted and counted.

    Attributes:
        ids: `(tokens,)` int32.
        counted: `(tokens,)` bool; the first is False, as nothing comes before it.
        prompt: Tokens before the last answer, which a model is asked to go on from.
        answer_end: The token after the last answer's last. Both are 0 where the last
            answer is not known, and all tokens where there is none yet.
        teacher: What the teacher sees, where its prompt is another one: the tokens that
            count are the same, in the same order.
    """

    ids: Int32[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    prompt: int = 0
    answer_end: int = 0
    teacher: "Example | None" = None

    def with_answer(self, answer: Int32[np.ndarray, " tokens"]) -> "Example":
        """Returns the prompt with other tokens behind it, which count."""
        before = slice(self.prompt)
        ids = np.concatenate([self.ids[before], answer]).astype(np.int32)
        counts = np.ones(len(answer), np.bool_)
        return Example(
            ids,
            np.concatenate([self.counted[before], counts]),
            self.prompt,
            len(ids),
            None if self.teacher is None else self.teacher.with_answer(answer),
        )


class Span(NamedTuple):
    """Characters `start` to `stop`, the last not included."""

    start: int
    stop: int


class Rendered(NamedTuple):
    """Text ready for the tokenizer.

    Attributes:
        text: What is encoded.
        answers: The characters of the answers that are looked for, in order.
        counts_all: All tokens count, and not only those of the answers.
        framed: Gets the tokenizer's start token and the end token, which the text of a
            chat template brings itself.
        untrained: Those of the answers that do not count.
        unused_keys: What the record has for the chat template, which does not use it.
        asks: It is a prompt, which no answer follows.
    """

    text: str
    answers: tuple[Span, ...] = ()
    counts_all: bool = False
    framed: bool = False
    untrained: tuple[Span, ...] = ()
    unused_keys: tuple[str, ...] = ()
    asks: bool = False


class Encoder:
    """A tokenizer together with the tokens that begin and end a text.

    The start token is added where the tokenizer itself adds one. The end token is
    `eos_token_id`, so that a student learns where texts end; a tokenizer without one
    adds none. A text that is written with them has them once all the same.

    Attributes:
        tokenizer: The tokenizer.
        pad_id: What fills a row up: the pad token, else the end token, else 0. It is
            never counted, so which it is does not matter.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        alone = tokenizer([""], add_special_tokens=True)["input_ids"][0]
        start = getattr(tokenizer, "bos_token_id", None)
        end = getattr(tokenizer, "eos_token_id", None)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int = next((i for i in (pad, end) if i is not None), 0)
        self._start = [start] if start is not None and start in alone[:1] else []
        self._end = [end] if end is not None else []
        # A tokenizer in SentencePiece's way puts a space before a text, which a piece
        # from the middle of one must not get: the end token before it keeps it off.
        guard = getattr(tokenizer, "eos_token", None) or ""
        self._guard = guard if self.ids([guard]) == [self._end] else ""

    @property
    def adds_start(self) -> bool:
        """Whether texts begin with the start token."""
        return bool(self._start)

    def begin(self, ids: list[int], *, added: bool) -> list[int]:
        """Returns ids with the start token once, if they have it or it is added."""
        written = self._starts(ids)
        return [*(self._start if written or added else ()), *ids[written:]]

    def _starts(self, ids: Sequence[int]) -> int:
        """Returns how many start tokens ids begin with; 0 where texts have none."""
        others = (place for place, one in enumerate(ids) if [one] != self._start)
        return next(others, len(ids)) if self._start else 0

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text, without start and end tokens."""
        if not texts:
            return []
        with parsing("the tokenizer cannot encode a text of the data", DataError):
            encoded = self.tokenizer(
                list(texts),
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
        return encoded["input_ids"]

    def examples(self, rendered: Sequence[Rendered]) -> list[Example | RecordError]:
        """Returns the ids of every text and which of them count.

        Tokens count when they lie in an answer, and each text has to prove which do.
        Either the ids of the pieces between the borders of the answers join to the ids
        of the whole; or the ids of the text up to every border begin the ids of the
        whole; or (where a token of the whole crosses a border) the ids of the pieces,
        which are what generation sees, are taken and must decode to the whole text.
        Where all tokens count, the ids of the whole are taken in any case.

        Returns:
            An example for each text, or the problem that keeps it from being one.
        """
        wholes = self.ids([item.text for item in rendered])
        pieces = [self._pieces(item) for item in rendered]
        flat = iter(self.ids([piece for parts in pieces for piece in parts]))
        # Behind the guard that all but the first piece begin with.
        guard = len(self._end) if self._guard else 0
        return [
            self._example(
                item,
                whole,
                [next(flat)[guard if n else 0 :] for n in range(len(parts))],
            )
            for item, whole, parts in zip(rendered, wholes, pieces, strict=True)
        ]

    def _pieces(self, item: Rendered) -> list[str]:
        """Returns the text between the borders of the answers."""
        borders = [0, *itertools.chain(*item.answers), len(item.text)]
        first, *others = (item.text[a:b] for a, b in itertools.pairwise(borders))
        return [first, *(self._guard + text for text in others)]

    def _example(
        self, item: Rendered, whole: list[int], pieces: list[list[int]]
    ) -> Example | RecordError:
        if item.asks:
            ids = self.begin(whole, added=item.framed)
            counted = np.full(len(ids), item.counts_all)
            counted[:1] = False
            return Example(np.array(ids, np.int32), counted, len(ids), len(ids))
        found = self._find(item, whole, pieces)
        if found is None:
            return RecordError(
                "answer_not_found",
                "the answer's tokens cannot be told from the prompt's: with this "
                "tokenizer one token crosses the border between the two; train on "
                "prompts too, or put white space between them",
            )
        ids, places = found
        counted = np.full(len(ids), item.counts_all)
        prompt = answer_end = 0
        for span, start, stop in zip(
            item.answers, places[::2], places[1::2], strict=True
        ):
            counted[start:stop] = span not in item.untrained
            if span not in item.untrained:
                prompt, answer_end = start, stop
        # Written in the text, by a template or by both: one start token is right.
        written = self._starts(ids)
        if extra := max(0, written - 1):
            ids, counted = ids[extra:], counted[extra:]
            prompt, answer_end = max(0, prompt - extra), max(0, answer_end - extra)
        if item.framed:
            before = 0 if written else len(self._start)
            while self._end and ids[-2:] == [*self._end, *self._end]:
                ids, counted = ids[:-1], counted[:-1]
            answer_end = min(answer_end, len(ids))
            end = self._end if ids[-1:] != self._end else []
            ids = [*self._start[:before], *ids, *end]
            counted = np.pad(counted, (before, len(end)), constant_values=True)
            if answer_end:
                prompt, answer_end = prompt + before, answer_end + before + len(end)
        counted[:1] = False
        return Example(np.array(ids, np.int32), counted, prompt, answer_end)

    def _find(
        self, item: Rendered, whole: list[int], pieces: list[list[int]]
    ) -> tuple[list[int], list[int]] | None:
        """Returns ids, and the places of the borders; None where nothing proves them.

        A token that crosses into an answer is the answer's where all count anyway.
        """
        joined = list(itertools.chain(*pieces))
        places = list(itertools.accumulate(map(len, pieces)))[:-1]
        if joined == whole:
            return whole, places
        borders = itertools.chain(*item.answers)
        starts = self.ids([item.text[:border] for border in borders])
        shared = [shared_start(whole, start) for start in starts]
        if item.counts_all or shared == [*map(len, starts)]:
            return whole, shared
        return (joined, places) if self._text_of(joined) == item.text else None

    def _text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def shared_start(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Returns how many characters, or ids, both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    shorter = min(len(one), len(other))
    return next((place for place, (a, b) in pairs if a != b), shorter)


def cut_windows(example: Example, length: int) -> Iterator[Example]:
    """Yields windows of at most `length` tokens that predict every token once.

    A window begins with the last token of the one before it, as context that is not
    counted: the first token of a window has nothing before it to be predicted from. So
    each token of the text but its very first is counted in exactly one window.

    The second half of a window is its answer: text has none of its own, and to go on
    from the first half is what a model can be asked for.
    """
    ids, counted = example.ids, example.counted
    for start in range(0, max(1, len(ids) - 1), length - 1):
        window = counted[start : start + length].copy()
        window[:1] = False
        size = len(window)
        yield Example(ids[start : start + length], window, size // 2, size)
