"""Which documents are held out."""

import numpy as np
import pytest

from taid_jax.data.documents import Document, Text
from taid_jax.data.errors import DataError
from taid_jax.data.split import cut_only_text, hold_out


def test_hold_out_takes_low_ranks():
    ranks = np.array([0.5, 0.05, 0.05, 0.3])
    np.testing.assert_array_equal(hold_out(ranks, 0.1, ""), ranks == 0.05)
    np.testing.assert_array_equal(hold_out(ranks, 0.4, ""), ranks < 0.4)
    assert not hold_out(ranks, 0.0, "").any()


def test_hold_out_leaves_something_on_both_sides():
    ranks = np.array([0.5, 0.3, 0.3, 0.9])
    np.testing.assert_array_equal(hold_out(ranks, 0.1, ""), ranks == 0.3)
    np.testing.assert_array_equal(hold_out(ranks, 0.95, ""), ranks < 0.9)


def test_hold_out_needs_two_documents():
    with pytest.raises(DataError, match=r"here\.jsonl: need two different documents"):
        hold_out(np.array([0.5, 0.5]), 0.1, "here.jsonl")
    assert not hold_out(np.array([0.5, 0.5]), 0.0, "").any()


@pytest.mark.parametrize("border", ["\n\n", "\n", " "])
def test_cut_only_text_cuts_between_paragraphs(border):
    text = border.join(f"part{n}" for n in range(100))
    parts = cut_only_text([Document("a.txt", Text(text), 0.5)], 0.2)
    first, last = (part.content.text for part in parts)
    assert first + last == text
    assert last.startswith(border + "part")
    # 20% of the text, and at most one more part.
    assert 0.2 * len(text) <= len(last) <= 0.2 * len(text) + len(border + "part99")
    assert [part.rank for part in parts] == [1.0, 0.0]
    assert hold_out(np.array([1.0, 0.0]), 0.2, "").tolist() == [False, True]


def test_cut_only_text_leaves_other_documents():
    one = Document("a.txt", Text("word"), 0.5)
    assert cut_only_text([one], 0.2) == [one]
    two = [one, Document("b.txt", Text("more words " * 50), 0.5)]
    assert cut_only_text(two, 0.2) == two
