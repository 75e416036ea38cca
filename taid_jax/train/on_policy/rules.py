"""Which texts a step is trained on, and which prompts are completed at all.

References:
    Agarwal et al., GKD, 2023 (arXiv:2306.13649), algorithm 1; Ko et al., DistiLLM, 2024
    (arXiv:2402.03898), section 3.2 and algorithm 1.
"""

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool

from taid_jax.data import ExampleSet
from taid_jax.settings import OnPolicySettings, SettingsError


class Plan(NamedTuple):
    """What is done at a step.

    Attributes:
        generate: Completions join the buffer: those of a batch of prompts (`batch`), or
            as many as it takes to fill a batch (`missing`).
        train_on: The batch as the `data` have it, completions that were not trained on
            (`new`), or any in the `buffer`.
    """

    generate: Literal["batch", "missing"] | None
    train_on: Literal["data", "new", "buffer"]


def plan_step(
    settings: OnPolicySettings,
    draw: float,
    *,
    threshold: float,
    progress: float,
    full: bool,
) -> Plan:
    """Returns what is done at a step.

    GKD (`mixed`) trains on completions in a fixed share of the steps; DistiLLM
    (`adaptive`) in the share `threshold`, and the further it gets, the fewer of them
    are new. With `student`, `teacher` and `pairs` all are completions, as often as
    `reuse` says.

    Args:
        settings: Which of them.
        draw: Uniform in [0, 1).
        threshold: DistiLLM's share of the steps.
        progress: Steps done before, as a share of all steps.
        full: Whether the buffer is.
    """
    if settings.prompts_suffice:
        return Plan("missing", "buffer")
    share = settings.mixed_share
    if draw >= (threshold if share is None else share):
        return Plan(None, "data")
    if share is not None:
        return Plan("batch", "buffer")
    if draw < threshold * (1 - progress) or not full:
        return Plan("missing", "new")
    return Plan(None, "buffer")


Rows = list[list[tuple[int, int]]]
"""The texts of each row: the place of a completion, and which of its texts it is."""


def fill_rows(
    lengths: Sequence[Sequence[int]],
    places: Iterable[int],
    *,
    batch_size: int,
    seq_len: int | None,
) -> tuple[Rows, bool]:
    """Returns rows of completions, all texts of each, and whether no more fit.

    Args:
        lengths: Tokens of the texts of every completion.
        places: Completions in the order in which they are taken.
        batch_size: Rows at most.
        seq_len: Tokens of a row; None where a row is one text.
    """
    rows: Rows = []
    room: list[int] = []
    for place in places:
        taken: list[int] = []
        for text, length in enumerate(lengths[place]):
            fits = (n for n, left in enumerate(room) if length <= left)
            row = next(fits, len(rows))
            if row == batch_size:
                for each in taken:  # A part of a pair is none.
                    rows[each].pop()
                return [row for row in rows if row], True
            if row == len(rows):
                rows.append([])
                room.append(-1 if seq_len is None else seq_len)
            rows[row].append((place, text))
            room[row] = -1 if seq_len is None else room[row] - length
            taken.append(row)
    return rows, seq_len is None and len(rows) == batch_size


def prompts_with_room(
    settings: OnPolicySettings, examples: ExampleSet
) -> Bool[np.ndarray, " examples"]:
    """Returns which examples have a prompt that leaves room for a completion.

    Where the teacher has a prompt of its own, that has to leave room in its row too.

    Args:
        settings: Of the completions.
        examples: A side of the data; those of its table that are not in its rows are
            none.

    Raises:
        SettingsError: If there is none.
    """
    room = examples.seq_len - settings.completion_tokens
    prompts = np.zeros(len(examples.table), np.int64)
    numbers = [number for row in examples.rows for number in row]
    prompts[numbers] = examples.table.prompts[numbers]
    fits = (prompts > 0) & (prompts <= room)
    asking = prompts[prompts > 0]
    if not len(asking):
        raise SettingsError(
            f"texts {settings.texts}: no training example has a prompt to complete; "
            "give data with `prompt` or `messages`, or --texts data"
        )
    if asking.min() > room:
        raise SettingsError(
            f"completion_tokens: the shortest prompt has {asking.min()} tokens, and a "
            f"completion of {settings.completion_tokens} in seq_len "
            f"{examples.seq_len} has room for {room}; set completion_tokens lower or "
            "seq_len higher"
        )
    teacher, length = examples.table.teacher, examples.teacher_len
    if teacher is None or length is None:
        return fits
    theirs = length - settings.completion_tokens
    fits &= (teacher.prompts > 0) & (teacher.prompts <= theirs)
    if not fits.any():
        raise SettingsError(
            f"teacher_seq_len: no prompt of the teacher leaves room for a completion "
            f"of {settings.completion_tokens} tokens in a row of {length}; set "
            "completion_tokens lower or teacher_seq_len higher"
        )
    return fits


def describe_prompts(settings: OnPolicySettings, examples: ExampleSet) -> list[str]:
    """Returns a line about the prompts that are not completed, if there are any.

    Raises:
        SettingsError: If none is.
    """
    has_room = prompts_with_room(settings, examples)
    numbers = [number for row in examples.rows for number in row]
    left_out = len(numbers) - int(np.count_nonzero(has_room))
    if not left_out:
        return []
    room, length = settings.completion_tokens, examples.teacher_len
    theirs = "" if length is None else f", or {length - room} for the teacher"
    return [
        f"{left_out:,} of {len(numbers):,} training examples have no prompt of at most "
        f"{examples.seq_len - room} tokens (seq_len less completion_tokens){theirs}: "
        "no model completes them"
    ]
