"""How teacher and student go on with a few held-out beginnings."""

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from taid_jax.data import Dataset, held_out_batches
from taid_jax.models.generate import generate
from taid_jax.models.tokenizer import Tokenizer
from taid_jax.settings import Settings
from taid_jax.train.inputs import Pair
from taid_jax.types import Params

SAMPLES = 3
SAMPLE_PROMPT = 24
SAMPLE_TOKENS = 40


def _padded_left(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts with their padding moved from the right to the left."""
    shifts = ids.shape[1] - mask.sum(axis=1)
    rows = [
        (np.roll(row, shift), np.roll(real, shift))
        for row, real, shift in zip(ids, mask, shifts, strict=True)
    ]
    return np.stack([row for row, _ in rows]), np.stack([real for _, real in rows])


def show_samples(
    settings: Settings,
    pair: Pair,
    params: Params,
    dataset: Dataset,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    """Prints how teacher and student go on with a few held-out beginnings."""
    rows = held_out_batches(dataset.held_out, 1)
    chosen = rows[:: max(1, len(rows) // SAMPLES)][:SAMPLES]
    length = min(SAMPLE_PROMPT, settings.data.seq_len)
    prompts = np.concatenate([row["input_ids"][:, :length] for row in chosen])
    # Only the first of the examples that share a row, without padding.
    which = "segment_ids" if settings.data.pack else "attention_mask"
    mask = np.concatenate([row[which][:, :length] == 1 for row in chosen])
    mask = mask.astype(np.int32)
    prompts, mask = _padded_left(prompts, mask)
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
                eos_token_ids=(),
                pad_token_id=0,
                dtype=jnp.dtype(settings.model.dtype),
            )
        )
        for name, (weights, config) in sides.items()
    }
    for index, prompt in enumerate(prompts):
        console.rule(f"sample {index + 1}")
        text = str(tokenizer.decode(prompt[mask[index] == 1]))
        console.print(text, markup=False, highlight=False)
        for name, tokens in answers.items():
            console.print(f"[bold]{name}:[/bold]", end=" ")
            answer = str(tokenizer.decode(tokens[index]))
            console.print(answer, markup=False, highlight=False)
