"""How teacher and student go on with a few held-out beginnings."""

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from taid_jax.data import DataError, Dataset, pad_left
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.models.generation import generate
from taid_jax.settings import Settings
from taid_jax.train.answers import decode, end_ids, find_questions
from taid_jax.train.inputs import Pair
from taid_jax.types import Params

SAMPLES = 3
SAMPLE_TOKENS = 40
SHOWN_PROMPT = 40
"""So many tokens of a prompt are shown at most: its last."""


def show_samples(
    settings: Settings,
    pair: Pair,
    params: Params,
    dataset: Dataset,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Prints how teacher and student go on with a few held-out beginnings.

    The prompts are those that answers are scored by: a conversation up to its last
    answer, the first half of a window of running text.
    """
    try:
        questions = find_questions(dataset.held_out, SAMPLES)
    except DataError:  # No answer was found in any of them; the run is as good.
        return
    ends = end_ids(tokenizer, pair.generation, questions)
    configs = pair.teacher.config, pair.student_config
    length = min(config.max_position_embeddings for config in configs) - SAMPLE_TOKENS
    if length < 1:
        return
    chosen = [question.prompt[-length:] for question in questions]
    prompts, mask = pad_left(chosen)
    sides = {
        "teacher": (pair.teacher.params, pair.teacher.config),
        "student": (params, pair.student_config),
    }
    answers = {
        name: np.asarray(
            generate(
                weights,
                config,
                jnp.asarray(prompts),
                jnp.asarray(mask),
                max_new_tokens=SAMPLE_TOKENS,
                eos_token_ids=ends,
                pad_token_id=0,
                dtype=jnp.dtype(settings.model.dtype),
            ).tokens
        )
        for name, (weights, config) in sides.items()
    }
    for index, prompt in enumerate(chosen):
        console.rule(f"sample {index + 1}")
        text = str(tokenizer.decode(prompt[-SHOWN_PROMPT:]))
        console.print(text, markup=False, highlight=False)
        for name, tokens in answers.items():
            console.print(f"[bold]{name}:[/bold]", end=" ")
            answer = decode(tokenizer, tokens[index], ends)
            console.print(answer, markup=False, highlight=False)
