import pytest

from taid_jax.train.completions import normalise, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Cat's\n hat. ", "the cats hat"),
        ("A-B, c!", "ab c"),
        ("...", ""),
        ("ÄÖ 1.5", "äö 15"),
    ],
)
def test_normalise_case_punctuation_and_space(text, expected):
    assert normalise(text) == expected


def test_score_closed_form():
    # "the cat sat on the mat" and "the dog sat on a mat" share "the sat on mat":
    # precision and recall are both 4 / 6.
    found = score(["The dog sat on a mat."], ["the cat sat on the mat"])
    assert found.rouge_l == pytest.approx(4 / 6)
    assert found.exact_match == 0


def test_score_precision_and_recall_have_their_sides():
    # 2 of 2 words are right and 2 of 6 were found: F = 2 * 1 * (1/3) / (4/3) = 1/2.
    assert score(["a b"], ["a b c d e f"]).rouge_l == pytest.approx(0.5)


def test_score_stems_words():
    assert score(["running cats"], ["run cat"]).rouge_l == 1
    assert score(["running cats"], ["run cat"]).exact_match == 0


def test_score_are_means():
    found = score(["Yes!", "no", ""], ["yes", "maybe", "something"])
    assert found.exact_match == pytest.approx(1 / 3)
    assert found.rouge_l == pytest.approx(1 / 3)


@pytest.mark.parametrize(("answers", "references"), [([], []), (["a"], ["a", "b"])])
def test_score_needs_pairs(answers, references):
    with pytest.raises(ValueError, match="as many completions as references"):
        score(answers, references)


def test_score_distinct_2_is_of_all_completions_together():
    # ab bc, ab bd, and one without a bigram: 3 of 4 are different.
    assert score(["a b c", "a\n b d", "b"], [""] * 3).distinct_2 == 3 / 4
    assert score(["a a a a"], [""]).distinct_2 == 1 / 3


def test_score_distinct_2_without_a_bigram_is_none():
    assert score(["", "a"], ["", ""]).distinct_2 is None
