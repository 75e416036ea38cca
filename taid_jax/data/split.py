"""Which documents are held out."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int64

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError, RecordError


def hold_out(
    ranks: Float64[np.ndarray, " examples"],
    tokens: Int64[np.ndarray, " examples"],
    fraction: float,
    source: str,
) -> Bool[np.ndarray, " examples"]:
    """Returns which examples are held out.

    Those of documents ranked below `fraction` are. A rank comes from what a document
    says (`make_document`), so copies of a document fall on the same side, and neither
    the order of files nor (as a rule) a document added later moves another one across.

    The rule bends for few and unequal documents. The held-out side never gets more than
    twice its share of the tokens: documents that would exceed it are trained on. It
    gets at least one document, and leaves at least one; none when `fraction` is 0.

    Raises:
        DataError: If all documents are copies of one, which cannot be split.
    """
    if fraction == 0:
        return np.zeros(len(ranks), np.bool_)
    values, document = np.unique(ranks, return_inverse=True)
    if len(values) == 1:
        raise DataError(
            f"{source}: need two different documents, one to train on and one to hold "
            "out, and there is one (copies, and records with the same prompt, count as "
            "one); add documents"
        )
    sizes = np.zeros(len(values), np.int64)
    np.add.at(sizes, document, tokens)
    room = 2 * fraction * sizes.sum()
    chosen = np.zeros(len(values), np.bool_)
    # The last document, of the highest rank, is always trained on.
    for number in np.flatnonzero(values[:-1] < fraction):
        if sizes[number] <= room:
            chosen[number] = True
            room -= sizes[number]
    if not chosen.any():
        fits = np.flatnonzero(sizes[:-1] <= room)
        chosen[fits[0] if len(fits) else sizes.argmin()] = True
    return chosen[document]


def cut_only_text(
    documents: Sequence[tuple[str, Document | RecordError]], fraction: float
) -> list[tuple[str, Document | RecordError]]:
    """Returns the documents; a text that is the only one becomes two.

    A single .txt file is a common corpus. Its last part, from the end of a paragraph
    (or line, or word) on, is held out: no text is on both sides, unless the author
    repeats it.
    """
    match documents:
        case [(origin, Document(Text(text)) as whole)]:
            target = round(len(text) * (1 - fraction))
            for border in ("\n\n", "\n", " "):
                cut = text.rfind(border, target // 2, target)
                if cut > 0 and text[:cut].strip() and text[cut:].strip():
                    first, last = (
                        Document(
                            Text(part), rank, teacher_weights=whole.teacher_weights
                        )
                        for part, rank in ((text[:cut], 1.0), (text[cut:], 0.0))
                    )
                    return [
                        (f"{origin}, first part", first),
                        (f"{origin}, last part", last),
                    ]
    return list(documents)
