"""Texts of a model where the teacher has a prompt of its own."""

import json

import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.settings import OnPolicySettings, SettingsError
from taid_jax.train.on_policy import rules
from taid_jax.train.on_policy.texts import OnPolicyBatches
from taid_jax.train.throughput import Throughput

SEQ_LEN, TEACHER_LEN, NEW, BATCH, END = 16, 24, 6, 4, 3
ROOMY = 15  # Of the last example the teacher's prompt leaves no room.


def make_example(draw, prompt):
    ids = draw.integers(4, 22, prompt + 3).astype(np.int32)
    counted = np.arange(prompt + 3) >= prompt
    ids[1], counted[1] = 4, True  # An earlier answer, of one token.
    return Example(ids, counted, prompt, prompt + 3)


@pytest.fixture(scope="module")
def examples():
    draw, found = np.random.default_rng(0), []
    for number in range(ROOMY + 1):
        longer = TEACHER_LEN - 4 if number == ROOMY else int(draw.integers(4, 18))
        student = make_example(draw, int(draw.integers(3, 10)))
        teacher = make_example(draw, longer)
        found.append(student._replace(teacher=teacher))
    return found


def make_batches(examples, texts, *, packed=True, **options):
    table, rows = make_table(enumerate(examples)), [(n,) for n in range(len(examples))]
    side = ExampleSet(table, rows, SEQ_LEN, 0, packed, teacher_len=TEACHER_LEN)
    chosen = OnPolicySettings(texts, completion_tokens=NEW, **options)
    asked = []

    def complete(params, prompts, numbers):
        """Writes the number of the example, a few times."""
        asked.extend(zip(numbers, prompts, strict=True))
        return [
            np.array([number] * (1 + number % (NEW - 1)) + [END], np.int32)
            for number, _ in numbers
        ]

    batches = OnPolicyBatches(
        chosen, side, complete, ends=(END,), batch_size=BATCH, steps=20, seed=5
    )
    return batches, asked


def take(batches, step):
    return batches.batch({}, {}, step, Throughput())


@pytest.mark.parametrize("texts", ["student", "teacher"])
@pytest.mark.parametrize("packed", [True, False])
def test_batches_append_what_is_written_to_both_prompts(examples, texts, packed):
    batches, asked = make_batches(examples, texts, packed=packed)
    found = [take(batches, step) for step in range(1, 4)]
    for (number, _), prompt in asked:
        assert number != ROOMY
        whose = examples[number].teacher if texts == "teacher" else examples[number]
        assert prompt.tolist() == whose.ids[: whose.prompt].tolist()
    seen = 0
    for batch in found:
        segments = batch["segment_ids" if packed else "attention_mask"]
        theirs = batch["teacher_" + ("segment_ids" if packed else "attention_mask")]
        for row in range(BATCH):
            for segment in range(1, segments[row].max() + 1):
                mine = batch["input_ids"][row][segments[row] == segment]
                other = batch["teacher_input_ids"][row][theirs[row] == segment]
                number = int(mine[-2])
                whole = examples[number]
                said = [number] * (1 + number % (NEW - 1)) + [END]
                assert mine.tolist() == [*whole.ids[: whole.prompt], *said]
                whole = whole.teacher
                assert other.tolist() == [*whole.ids[: whole.prompt], *said]
                seen += len(said)
            at = batch["teacher_index"][row]
            for place in np.flatnonzero(batch["labels"][row] >= 0):
                after = at[place - 1] + 1
                assert theirs[row, after] == segments[row, place]
                label = batch["labels"][row, place]
                assert batch["teacher_input_ids"][row, after] == label
    assert seen > 0


def test_batches_go_on_bit_for_bit_with_the_teachers_prompts(examples):
    whole, _ = make_batches(examples, "mixed:0.7", buffer_capacity=8)
    cut, _ = make_batches(examples, "mixed:0.7", buffer_capacity=8)
    for step in range(1, 4):
        take(whole, step)
        take(cut, step)
    state = json.loads(json.dumps(cut.get_state()))
    again, _ = make_batches(examples, "mixed:0.7", buffer_capacity=8)
    again.set_state(state)
    assert again.get_state() == cut.get_state()
    for step in range(4, 9):
        left, right = take(whole, step), take(again, step)
        assert left.keys() == right.keys()
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])


def test_prompts_with_room_have_it_in_the_teachers_row_too(examples):
    batches, _ = make_batches(examples, "student")
    side, chosen = batches._examples, batches._settings
    found = rules.prompts_with_room(chosen, side)
    assert found.tolist() == [True] * ROOMY + [False]
    [line] = rules.describe_prompts(chosen, side)
    assert "at most 10 tokens (seq_len less completion_tokens), or 18 for the" in line
    with pytest.raises(SettingsError, match="teacher_seq_len: no prompt of the teach"):
        make_batches(examples[ROOMY:], "student")
