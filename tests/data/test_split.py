"""Which documents are held out."""

import numpy as np
import pytest

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError
from taid_jax.data.split import cut_only_text, hold_out


def held(ranks, fraction, tokens=None):
    """The ranks that are held out."""
    ranks = np.array(ranks)
    tokens = np.ones(len(ranks), int) if tokens is None else np.array(tokens)
    return sorted(ranks[hold_out(ranks, tokens, fraction, "here.jsonl")].tolist())


def test_hold_out_takes_low_ranks():
    ranks = [0.5, 0.05, 0.7, 0.05, 0.3, 0.25, 0.8, 0.9]
    assert held(ranks, 0.2) == [0.05, 0.05]
    assert held(ranks, 0.4) == [0.05, 0.05, 0.25, 0.3]
    assert held(ranks, 0.0) == []


def test_hold_out_leaves_something_on_both_sides():
    assert held([0.5, 0.3, 0.3, 0.9], 0.25) == [0.3, 0.3]
    assert held([0.5, 0.3, 0.3, 0.9], 0.95) == [0.3, 0.3, 0.5]
    assert held([0.5, 0.3], 0.01) == [0.3]
    assert held([0.1, 0.2], 0.5) == [0.1]


def test_hold_out_keeps_to_its_share_of_the_tokens():
    ranks = [0.01, 0.02, 0.03, 0.5, 0.9]
    assert held(ranks, 0.1, [50, 5, 5, 20, 20]) == [0.02, 0.03]
    assert held(ranks, 0.1, [15, 15, 5, 20, 45]) == [0.01, 0.03]
    # Nothing fits: the smallest.
    assert held([0.01, 0.5, 0.9], 0.1, [50, 40, 30]) == [0.9]
    # Nothing ranks low enough: the lowest that fits.
    assert held([0.3, 0.5, 0.9], 0.2, [80, 10, 10]) == [0.5]


def test_hold_out_needs_two_documents():
    with pytest.raises(DataError, match=r"here\.jsonl: need two different documents"):
        held([0.5, 0.5], 0.1)
    assert held([0.5, 0.5], 0.0) == []


@pytest.mark.parametrize("border", ["\n\n", "\n", " "])
def test_cut_only_text_cuts_between_paragraphs(border):
    text = border.join(f"part{n}" for n in range(100))
    parts = cut_only_text([("a.txt", Document(Text(text), 0.5))], 0.2)
    first, last = (part.content.text for _, part in parts)
    assert first + last == text
    assert last.startswith(border + "part")
    # 20% of the text, and at most one more part.
    assert 0.2 * len(text) <= len(last) <= 0.2 * len(text) + len(border + "part99")
    assert [part.rank for _, part in parts] == [1.0, 0.0]
    assert held([1.0, 0.0], 0.2, [80, 20]) == [0.0]


def test_cut_only_text_leaves_other_documents():
    one = ("a.txt", Document(Text("word"), 0.5))
    assert cut_only_text([one], 0.2) == [one]
    two = [one, ("b.txt", Document(Text("more words " * 50), 0.5))]
    assert cut_only_text(two, 0.2) == two
