import dataclasses

import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.settings import OnPolicySettings, SettingsError
from taid_jax.train.on_policy import rules


def plan(texts, draw, threshold=0.0, progress=0.0, full=False):
    found = rules.plan_step(
        OnPolicySettings(texts), draw, threshold=threshold, progress=progress, full=full
    )
    return {
        (None, "data"): "data",
        ("missing", "new"): "new",
        (None, "buffer"): "old",
        ("batch", "buffer"): "new and old",
        ("missing", "buffer"): "what is left",
    }[found]


def test_plan_step_is_the_table_of_gkd():
    found = [plan("mixed:0.5", draw) for draw in (0.0, 0.49, 0.5, 0.51)]
    assert found == ["new and old"] * 2 + ["data"] * 2


@pytest.mark.parametrize("texts", ["student", "teacher"])
def test_plan_step_takes_nothing_but_completions(texts):
    assert {plan(texts, draw) for draw in (0.0, 0.5, 0.99)} == {"what is left"}


# Threshold a, progress p, draw r, and what is done when the buffer is full or is not.
# New completions below a (1 - p); up to a from the buffer, or new when it is not full;
# the data from a on.
DISTILLM = [
    (0.0, 0.0, 0.0, "data", "data"),
    (0.1, 0.0, 0.05, "new", "new"),
    (0.1, 0.0, 0.1, "data", "data"),
    (0.4, 0.5, 0.19, "new", "new"),
    (0.4, 0.5, 0.2, "old", "new"),
    (0.4, 0.5, 0.39, "old", "new"),
    (0.4, 0.5, 0.4, "data", "data"),
    (1.0, 0.25, 0.74, "new", "new"),
    (1.0, 0.25, 0.75, "old", "new"),
    (1.0, 1.0, 0.0, "old", "new"),
]


def test_plan_step_is_the_table_of_distillm():
    for threshold, progress, draw, full, part in DISTILLM:
        for wanted, is_full in ((full, True), (part, False)):
            found = plan("adaptive", draw, threshold, progress, is_full)
            assert found == wanted, (threshold, progress, draw, is_full)


def test_prompts_with_room_are_found_or_their_lack_is_said():
    prompts = (2, 10, 11, 0)
    pairs = [
        (n, Example(np.arange(16, dtype=np.int32), np.ones(16, np.bool_), prompt, 16))
        for n, prompt in enumerate(prompts)
    ]
    # The last example of the table is of the other side.
    rows = [(0,), (1,), (2,)]
    examples = ExampleSet(make_table(pairs), rows, 16, pad_id=0, packed=False)
    settings = OnPolicySettings("student", completion_tokens=6)
    found = rules.prompts_with_room(settings, examples)
    assert found.tolist() == [True, True, False, False]
    [line] = rules.describe_prompts(settings, examples)
    assert line.startswith("1 of 3 training examples have no prompt of at most 10 tok")
    fitting = dataclasses.replace(examples, rows=rows[:2])
    assert rules.describe_prompts(settings, fitting) == []
    longest = OnPolicySettings("student", completion_tokens=15)
    with pytest.raises(SettingsError, match=r"prompt has 2 tokens, .* has room for 1;"):
        rules.prompts_with_room(longest, examples)
    bare = dataclasses.replace(examples, rows=[(3,)])
    with pytest.raises(SettingsError, match="texts student: no training example has a"):
        rules.prompts_with_room(settings, bare)
