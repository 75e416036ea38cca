"""Text to token ids, in batches, with the exact tokens of every answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from taid_jax.data.errors import DataError
from taid_jax.data.tokens import Example


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


class Span(NamedTuple):
    """Characters `start` to `stop`, the last not included."""

    start: int
    stop: int


class Rendered(NamedTuple):
    """Text ready for the tokenizer.

    Attributes:
        text: What is encoded.
        answers: The characters whose tokens count, in order; all when None.
        framed: Gets the tokenizer's start token and the end token, which the text of a
            chat template brings itself.
        windowed: Is cut into windows when it is too long, instead of being dropped.
    """

    text: str
    answers: tuple[Span, ...] | None = None
    framed: bool = False
    windowed: bool = False


class _Piece(NamedTuple):
    """Text between two borders, whether it counts, and ids to skip at its start."""

    text: str
    counts: bool
    skip: int


class Encoder:
    """A tokenizer together with the tokens that begin and end a text.

    The start token is added where the tokenizer itself adds one. The end token is
    `eos_token_id`, so that a student learns where texts end; a tokenizer without one
    adds none.

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

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text, without start and end tokens."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def examples(self, rendered: Sequence[Rendered]) -> list[Example | DataError]:
        """Returns the ids of every text and which of them count.

        Tokens count when they lie in an answer, and each text has to prove which do.
        Either the ids of the pieces between the borders of the answers join to the ids
        of the whole; or the ids of the text up to every border begin the ids of the
        whole; or (where a token of the whole crosses a border) the ids of the pieces,
        which are what generation sees, are taken and must decode to the whole text.

        Returns:
            An example for each text, or the problem that keeps it from being one.
        """
        wholes = self.ids([item.text for item in rendered])
        pieces = [self._pieces(item) for item in rendered]
        flat = iter(self.ids([piece.text for parts in pieces for piece in parts]))
        return [
            self._example(item, whole, parts, [next(flat)[p.skip :] for p in parts])
            for item, whole, parts in zip(rendered, wholes, pieces, strict=True)
        ]

    def _pieces(self, item: Rendered) -> list[_Piece]:
        if item.answers is None:
            return []
        pieces, done = [], 0
        for start, stop in item.answers:
            pieces += [(item.text[done:start], False), (item.text[start:stop], True)]
            done = stop
        pieces.append((item.text[done:], False))
        guard = len(self._end) if self._guard else 0
        return [
            _Piece(self._guard + text, counts, guard) if n else _Piece(text, counts, 0)
            for n, (text, counts) in enumerate(pieces)
            if text
        ]

    def _example(
        self,
        item: Rendered,
        whole: list[int],
        pieces: list[_Piece],
        piece_ids: list[list[int]],
    ) -> Example | DataError:
        ids = whole
        if item.answers is None:
            counted = [True] * len(whole)
        else:
            joined = [token for part in piece_ids for token in part]
            counted = [
                piece.counts
                for piece, part in zip(pieces, piece_ids, strict=True)
                for _ in part
            ]
            if joined != whole:
                by_prefix = self._count_by_prefixes(item, whole)
                if by_prefix is not None:
                    counted = by_prefix
                elif self._text_of(joined) == item.text:
                    ids = joined
                else:
                    return DataError(
                        "the answer's tokens cannot be told from the prompt's: with "
                        "this tokenizer one token crosses the border between the two; "
                        "count prompts too, or put white space between them"
                    )
        if item.framed:
            end = self._end if ids[-1:] != self._end else []
            ids = [*self._start, *ids, *end]
            counted = [*(False for _ in self._start), *counted, *(True for _ in end)]
        if ids:
            counted[0] = False
        return Example(np.array(ids, np.int32), np.array(counted, np.bool_))

    def _count_by_prefixes(self, item: Rendered, whole: list[int]) -> list[bool] | None:
        answers = item.answers or ()
        borders = [border for answer in answers for border in answer]
        counted = [False] * len(whole)
        starts = self.ids([item.text[:border] for border in borders])
        if any(whole[: len(start)] != start for start in starts):
            return None
        for first, last in zip(starts[::2], starts[1::2], strict=True):
            counted[len(first) : len(last)] = [True] * (len(last) - len(first))
        return counted

    def _text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def cut_windows(example: Example, length: int) -> Iterator[Example]:
    """Yields windows of at most `length` tokens that predict every token once.

    A window begins with the last token of the one before it, as context that is not
    counted: the first token of a window has nothing before it to be predicted from. So
    each token of the text but its very first is counted in exactly one window.

    Args:
        example: The whole text.
        length: Tokens of a window, >= 2.
    """
    ids, counted = example
    for start in range(0, max(1, len(ids) - 1), length - 1):
        window = counted[start : start + length].copy()
        window[:1] = False
        yield Example(ids[start : start + length], window)
