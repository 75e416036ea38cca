"""Settings of how a student is judged."""

import dataclasses
import typing
from typing import Literal

from taid_jax.settings.checks import need

BestBy = Literal["kl", "loss", "student_perplexity", "rouge_l", "exact_match"]


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """What decides which checkpoint is the best, and how answers are scored.

    Attributes:
        best_by: Which held-out figure decides what is kept and exported: the lowest KL,
            loss or perplexity, or the highest ROUGE-L or exact match. TAID's loss
            changes with its t, so that it tells little between steps.
        answer_examples: Held-out prompts that the student answers at every evaluation,
            for ROUGE-L and exact match; 0: none. Of running text, the second half of a
            row is the answer to the first.
        answer_tokens: Tokens of an answer at most.
    """

    best_by: BestBy = "kl"
    answer_examples: int = 0
    answer_tokens: int = 128

    def __post_init__(self):
        names = typing.get_args(BestBy)
        need("best_by", self.best_by, self.best_by in names, f"one of {names}")
        examples = self.answer_examples
        need("answer_examples", examples, examples >= 0, ">= 0")
        tokens = self.answer_tokens
        need("answer_tokens", tokens, tokens >= 1, ">= 1")
        answers = self.best_by not in ("rouge_l", "exact_match") or examples > 0
        need(
            "answer_examples",
            examples,
            answers,
            f">= 1, since best_by is {self.best_by}, which scores answers",
        )
