"""Examples as token ids, held in a few flat arrays."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64


class Example(NamedTuple):
    """Token ids, and which of them are predicted and counted.

    Attributes:
        ids: `(tokens,)` int32.
        counted: `(tokens,)` bool; the first is False, as nothing comes before it.
        prompt: Tokens before the last answer, which a model is asked to go on from.
        answer_end: The token after the last answer's last. Both are 0 where the last
            answer is not known.
    """

    ids: Int32[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    prompt: int = 0
    answer_end: int = 0


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Many examples end to end: five bytes a token, any of them found at once.

    Attributes:
        ids: `(tokens,)` int32, all examples end to end.
        counted: `(tokens,)` bool.
        starts: `(examples + 1,)` int64; example i is `starts[i]:starts[i + 1]`.
        documents: `(examples,)` int64, the number of the document it comes from.
        prompts: `(examples,)` int64, the tokens before the last answer.
        answer_ends: `(examples,)` int64, the token after the last answer.
    """

    ids: Int32[np.ndarray, " tokens"]
    counted: Bool[np.ndarray, " tokens"]
    starts: Int64[np.ndarray, " bounds"]
    documents: Int64[np.ndarray, " examples"]
    prompts: Int64[np.ndarray, " examples"]
    answer_ends: Int64[np.ndarray, " examples"]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        span = slice(self.starts[index], self.starts[index + 1])
        return Example(
            self.ids[span],
            self.counted[span],
            int(self.prompts[index]),
            int(self.answer_ends[index]),
        )

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of every example."""
        return np.diff(self.starts)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that change when any example does."""
        digest = hashlib.blake2b(digest_size=8)
        answers = (self.prompts, self.answer_ends)
        for array in (self.ids, self.counted, self.starts, *answers):
            digest.update(array.tobytes())
        return digest.hexdigest()


def make_table(examples: Iterable[tuple[int, Example]]) -> TokenTable:
    """Returns the table of (number of the document, example) pairs."""
    documents, ids, counted, prompts, ends = [], [], [], [], []
    for document, example in examples:
        documents.append(document)
        ids.append(example.ids)
        counted.append(example.counted)
        prompts.append(example.prompt)
        ends.append(example.answer_end)
    lengths = np.array([0, *map(len, ids)], np.int64)
    return TokenTable(
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        counted=np.concatenate(counted) if counted else np.zeros(0, np.bool_),
        starts=np.cumsum(lengths),
        documents=np.array(documents, np.int64),
        prompts=np.array(prompts, np.int64),
        answer_ends=np.array(ends, np.int64),
    )
