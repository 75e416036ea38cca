"""Rows of a finished run: its exported student, loaded and scored by PyTorch."""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from parity.models import CLOSE, Batch, our_outputs
from parity.rows import AnyRow, Row, Tolerance, skipped
from taid_jax.data import DataError, held_out_batches
from taid_jax.models.files.tokenizer import load_tokenizer
from taid_jax.models.files.vocabulary import count_tokens
from taid_jax.settings import Settings, SettingsError, from_dict
from taid_jax.train.inputs import read_data
from taid_jax.train.report import read_json
from taid_jax.types import IGNORE_INDEX

PERPLEXITY = Tolerance(
    5e-3, "relative; 1e-4 nats per token by the order of float32 sums, and to spare"
)
_WEIGHTS = Tolerance(0.0, "tensors that are missing, too many or of another shape")
_NAME = "exported student"
_ROWS = 4
"""Rows of held-out text whose logits are compared."""


class RunError(ValueError):
    """A folder does not hold a finished run."""


def student_rows(folder: pathlib.Path | None) -> list[AnyRow]:
    """Returns the rows of a finished run: weights, logits and held-out perplexity.

    Raises:
        RunError: If there is no finished run in it, or its data are not there any more.
    """
    if folder is None:
        return [skipped("student", _NAME, "--run-folder DIR scores a finished run")]
    report, settings = _finished(folder)
    # A pair, which the annotations of transformers do not know.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder / "student", output_loading_info=True
    )
    model, info = loaded
    model = model.float().eval()
    try:
        # The teacher's tokenizer travels with the student.
        tokenizer = load_tokenizer(str(folder / "student"))
        dataset = read_data(settings, tokenizer)
    except DataError as error:
        raise RunError(f"{folder}: the run's data cannot be read: {error}") from error
    batches = held_out_batches(
        dataset.held_out,
        settings.data.batch_size,
        limit=settings.data.held_out_batches,
    )
    sequences = [sequence for batch in batches for sequence in _sequences(batch)]
    size = count_tokens(tokenizer)
    found = _perplexity(model, sequences, size)
    stated = float(report["student_perplexity_after"])
    logits = _logit_error(folder / "student", model, sequences, size)
    return [
        _row("weights", _WEIGHTS, sum(map(len, info.values())), len(info)),
        _row("logits", CLOSE, *logits),
        _row(
            "held-out perplexity",
            PERPLEXITY,
            # Both may be beyond a float.
            0.0 if found == stated else abs(found / stated - 1),
            len(sequences),
            f"{found:.6g}, in the report {stated:.6g}",
        ),
    ]


def _row(
    quantity: str, tolerance: Tolerance, error: float, cases: int, note: str = ""
) -> Row:
    return Row(
        "student",
        _NAME,
        quantity,
        "transformers",
        cases=cases,
        failures=0 if error <= tolerance.value else 1,
        error=float(error),
        error_exact=None,
        other_exact=None,
        tolerance=tolerance,
        note=note,
    )


def _finished(folder: pathlib.Path) -> tuple[Mapping[str, Any], Settings]:
    """Returns the report of a run and the settings in it."""
    try:
        report = read_json(folder / "report.json")
        return report, from_dict(report["settings"])
    except (OSError, ValueError, KeyError, TypeError, SettingsError) as error:
        raise RunError(
            f"{folder} holds no finished run of scripts/train_tpu.py ({error!r}); give "
            "the folder that its --output named"
        ) from error


def _sequences(
    batch: Mapping[str, np.ndarray],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the ids and labels of every segment, without padding."""
    segments = batch.get("segment_ids", batch.get("attention_mask"))
    if segments is None:
        raise RunError("a batch has neither segments nor an attention mask")
    for ids, labels, numbers in zip(
        batch["input_ids"], batch["labels"], segments, strict=True
    ):
        for number in range(1, int(numbers.max()) + 1):
            here = numbers == number
            yield ids[here], labels[here]


@torch.no_grad()
def _perplexity(
    model: torch.nn.Module,
    sequences: list[tuple[np.ndarray, np.ndarray]],
    vocab_size: int,
) -> float:
    """Returns the perplexity of the counted tokens, each sequence by itself.

    Entries of the vocabulary that are padding, from `vocab_size` on, take no part.
    """
    total, count = 0.0, 0
    for ids, labels in sequences:
        logits = model(torch.tensor(ids[None]).long()).logits[0, :-1, :vocab_size]
        wanted = torch.tensor(labels[1:]).long()
        nll = torch.nn.functional.cross_entropy(
            logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum"
        )
        total += float(nll)
        count += int((wanted != IGNORE_INDEX).sum())
    try:
        return math.exp(total / count)
    except OverflowError:
        return math.inf


@torch.no_grad()
def _logit_error(
    folder: pathlib.Path,
    model: torch.nn.Module,
    sequences: list[tuple[np.ndarray, np.ndarray]],
    vocab_size: int,
) -> tuple[float, int]:
    """Returns the largest difference of a logit over their scale, and the cases.

    Entries of the vocabulary that are padding, from `vocab_size` on, take no part.
    """
    # The longest, cut to one length: our side is compiled once.
    chosen = sorted((ids for ids, _ in sequences), key=len, reverse=True)[:_ROWS]
    length = min(map(len, chosen))
    batches = [
        Batch("held out", {"input_ids": ids[None, :length].astype(np.int32)}, [])
        for ids in chosen
    ]
    worst = 0.0
    outputs = our_outputs(folder, batches)
    for batch, (_, ours) in zip(batches, outputs, strict=True):
        logits = model(torch.tensor(batch.ours["input_ids"]).long()).logits
        ours, theirs = ours[..., :vocab_size], logits[..., :vocab_size].numpy()
        scale = float(np.sqrt(np.mean(theirs.astype(np.float64) ** 2)))
        worst = max(worst, float(np.abs(ours - theirs).max()) / scale)
    return worst, len(batches)
