"""Settings of how a student is judged."""

import dataclasses
from typing import Literal

from taid_jax.settings.checks import Checked, bounded, need

BestBy = Literal["kl", "loss", "student_perplexity", "rouge_l", "exact_match"]


@dataclasses.dataclass(frozen=True)
class JudgeSettings(Checked):
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
    answer_examples: int = bounded(0, ge=0)
    answer_tokens: int = bounded(128, ge=1)

    def __post_init__(self):
        super().__post_init__()
        examples = self.answer_examples
        answers = self.best_by not in ("rouge_l", "exact_match") or examples > 0
        need(
            "answer_examples",
            examples,
            answers,
            f">= 1, since best_by is {self.best_by}, which scores answers",
        )
