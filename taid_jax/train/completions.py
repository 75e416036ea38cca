"""Completions of held-out prompts, and their scores."""

import itertools
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from taid_jax.models.config import DecoderConfig
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.settings import SettingsError
from taid_jax.train.on_policy.ends import decode, end_ids
from taid_jax.train.on_policy.generation import Completer
from taid_jax.train.on_policy.prompts import EvalPrompt
from taid_jax.types import Params

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class EvalCompletions:
    """The student's greedy completions of those prompts that leave room for one.

    Attributes:
        prompts: Those that leave room.
        references: What is wanted, as text.

    Raises:
        SettingsError: If no prompt leaves room for a completion.
    """

    def __init__(
        self,
        prompts: Sequence[EvalPrompt],
        tokenizer: Tokenizer,
        config: DecoderConfig,
        generation: Mapping[str, object],
        *,
        max_new_tokens: int,
        batch_size: int,
        dtype: str,
        mesh: Mesh,
        shardings: Any,
    ):
        room = config.max_position_embeddings - max_new_tokens
        self.prompts = [each for each in prompts if len(each.prompt) <= room]
        if not self.prompts:
            shortest = min(len(each.prompt) for each in prompts)
            raise SettingsError(
                f"eval_tokens: {max_new_tokens} tokens after a prompt (the shortest "
                f"has {shortest}) do not fit the student's context of "
                f"{config.max_position_embeddings}"
            )
        self._tokenizer = tokenizer
        self._complete = Completer(
            config,
            mesh,
            shardings=shardings,
            ends=end_ids(tokenizer, generation, self.prompts),
            max_new_tokens=max_new_tokens,
            dtype=jnp.dtype(dtype),
            rows=batch_size,
        )
        self.references = [self._decode(each.reference) for each in self.prompts]

    def _decode(self, ids: np.ndarray) -> str:
        return decode(self._tokenizer, ids, self._complete.ends)

    def __call__(self, params: Params) -> list[str]:
        """Returns the completion of each prompt, without its end token."""
        prompts = [each.prompt for each in self.prompts]
        # The most probable tokens: nothing is drawn.
        return [
            *map(self._decode, self._complete(params, prompts, [()] * len(prompts)))
        ]


class Scores(NamedTuple):
    """Figures of completions, each between 0 and 1.

    Attributes:
        rouge_l: F-measure of the longest common subsequence of stemmed words, averaged.
        exact_match: Share of the completions that say what the reference says.
        distinct_2: Different word bigrams over all bigrams of all completions; None
            where none has two words.
    """

    rouge_l: float
    exact_match: float
    distinct_2: float | None


def normalise(text: str) -> str:
    """Returns the text in lower case, without punctuation, single spaces between words.

    Punctuation is that of ASCII, as in the published evaluation of question answering.
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def score(completions: Sequence[str], references: Sequence[str]) -> Scores:
    """Returns ROUGE-L, exact match and distinct-2 of completions.

    ROUGE-L is the F-measure of the `rouge-score` package with its stemmer; its words
    are those of ASCII letters and digits, so that one in another script scores 0.
    Those of distinct-2 are what white space separates.

    Raises:
        ValueError: If there are none, or the two differ in number.

    References:
        Lin, ROUGE (ACL workshop 2004), section 3; Shing et al., TAID, ICLR 2025
        (arXiv:2501.16937), appendix on training details. Li et al., A Diversity-
        Promoting Objective Function for Neural Conversation Models, NAACL 2016, section
        5, which divides by words in place of bigrams.
    """
    if not completions or len(completions) != len(references):
        raise ValueError(
            "need as many completions as references and at least one, got "
            f"{len(completions)} and {len(references)}"
        )
    # Imported here: its stemmer brings NLTK, which most runs do not need.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(completions, references, strict=True))
    rouge = [scorer.score(want, got)["rougeL"].fmeasure for got, want in pairs]
    exact = [normalise(got) == normalise(want) for got, want in pairs]
    words = [text.split() for text in completions]
    bigrams = [pair for text in words for pair in itertools.pairwise(text)]
    distinct = len(set(bigrams)) / len(bigrams) if bigrams else None
    return Scores(sum(rouge) / len(pairs), sum(exact) / len(pairs), distinct)
