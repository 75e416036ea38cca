"""Which documents are held out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError


def hold_out(
    ranks: Float64[np.ndarray, " examples"], fraction: float, source: str
) -> Bool[np.ndarray, " examples"]:
    """Returns which examples are held out.

    Those of documents ranked below `fraction` are. A rank comes from what a document
    says (`make_document`), so copies of a document fall on the same side, and neither
    the order of files nor a document added later moves another one across. Where no
    document would be held out, the one of the lowest rank is; where all would, the
    one of the highest is not.

    Args:
        ranks: Of the examples' documents, in [0, 1].
        fraction: In [0, 1); nothing is held out when it is 0.
        source: Named in messages.

    Raises:
        DataError: If all documents are copies of one, which cannot be split.
    """
    if fraction == 0:
        return np.zeros(len(ranks), np.bool_)
    lowest, highest = ranks.min(), ranks.max()
    if lowest == highest:
        raise DataError(
            f"{source}: need two different documents, one to train on and one to hold "
            "out, and there is one (copies, and records with the same prompt, count as "
            "one); add documents, or set held_out_fraction to 0"
        )
    held_out = ranks < fraction
    if not held_out.any():
        return ranks == lowest
    if held_out.all():
        return ranks < highest
    return held_out


def cut_only_text(documents: Sequence[Document], fraction: float) -> list[Document]:
    """Returns the documents; a text that is the only one becomes two.

    A single .txt file is a common corpus. Its last part, from the end of a paragraph
    (or line, or word) on, is held out: no text is on both sides, unless the author
    repeats it.
    """
    if len(documents) != 1 or not isinstance(documents[0].content, Text):
        return list(documents)
    origin, text = documents[0].origin, documents[0].content.text
    target = round(len(text) * (1 - fraction))
    for border in ("\n\n", "\n", " "):
        cut = text.rfind(border, target // 2, target)
        if cut > 0 and text[:cut].strip() and text[cut:].strip():
            return [
                Document(f"{origin}, first part", Text(text[:cut]), 1.0),
                Document(f"{origin}, last part", Text(text[cut:]), 0.0),
            ]
    return list(documents)
