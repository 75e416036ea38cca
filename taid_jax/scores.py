"""Scores of answers: ROUGE-L and exact match, each between 0 and 1."""

import string
from collections.abc import Sequence
from typing import NamedTuple

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Scores(NamedTuple):
    """Means over the answers.

    Attributes:
        rouge_l: F-measure of the longest common subsequence of stemmed words.
        exact_match: Share of the answers that say what the reference says.
    """

    rouge_l: float
    exact_match: float


def normalise(text: str) -> str:
    """Returns the text in lower case, without punctuation, single spaces between words.

    Punctuation is that of ASCII, as in the published evaluation of question answering.
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def score_answers(answers: Sequence[str], references: Sequence[str]) -> Scores:
    """Returns ROUGE-L and exact match of answers, averaged.

    ROUGE-L is the F-measure of the `rouge-score` package with its stemmer; its words
    are those of ASCII letters and digits, so that an answer in another script scores 0.

    Args:
        answers: What the model wrote.
        references: What was to be written, in the same order.

    Raises:
        ValueError: If there are none, or the two differ in number.

    References:
        Lin, ROUGE (ACL workshop 2004), section 3; Shing et al., TAID, ICLR 2025
        (arXiv:2501.16937), appendix on training details.
    """
    if not answers or len(answers) != len(references):
        raise ValueError(
            "need as many answers as references and at least one, got "
            f"{len(answers)} and {len(references)}"
        )
    # Imported here: its stemmer brings NLTK, which most runs do not need.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(answers, references, strict=True))
    rouge = [
        scorer.score(target=reference, prediction=answer)["rougeL"].fmeasure
        for answer, reference in pairs
    ]
    exact = [normalise(answer) == normalise(reference) for answer, reference in pairs]
    return Scores(sum(rouge) / len(pairs), sum(exact) / len(pairs))
