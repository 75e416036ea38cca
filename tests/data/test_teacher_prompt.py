"""A prompt of the teacher's own, and answers that are aligned token by token."""

import itertools

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from taid_jax.data import DataError, held_out_batches, load_dataset
from taid_jax.data.documents import Text, make_document
from taid_jax.data.errors import RecordError
from taid_jax.data.teacher_field import TeacherField
from taid_jax.data.teacher_prompt import TeacherPrompt, align
from taid_jax.data.tokens import Example
from taid_jax.types import IGNORE_INDEX

PAIR = {"prompt": "What?", "completion": "that is all.", "hint": "{answer}", "n": 4}
TALK = {
    "messages": [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "said"},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "on and on"},
    ],
    "hint": [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "two, really?"},
    ],
}


def seen(text, record, **options):
    content = make_document(record, 0, prompts_suffice=True).content
    found = TeacherPrompt(text).apply(record, content, **options)
    return [(turn.role, turn.content, turn.trained) for turn in found.messages], found


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("hint", "{answer}"),
        ("Say {answer}: {prompt}", "Say that is all.: What?"),
        # What a record has is not looked at again, and braces round others stay.
        ("{hint} {n} {{hint}} {0} {'a': {}}", "{answer} 4 {hint} {0} {'a': {}}"),
        ("{prompt.__class__}", None),
        ("{missing} {prompt}", None),
        ("missing", None),
        ("{list}", None),
    ],
)
def test_teacher_prompt_of_a_pair(text, asked):
    record = {**PAIR, "list": ["a"], "prompt.__cls__": "x"}
    if asked is None:
        with pytest.raises(RecordError, match="--teacher-prompt") as caught:
            seen(text, record)
        assert caught.value.reason == "no_teacher_prompt"
        return
    turns, found = seen(text, record)
    assert turns == [("user", asked, True), ("assistant", "that is all.", True)]
    assert found.is_pair


def test_teacher_prompt_of_a_conversation():
    turns, found = seen("{prompt} Hint: {answer}", TALK)
    given = [(turn["role"], turn["content"], True) for turn in TALK["messages"]]
    assert turns == [*given[:3], ("user", "two? Hint: on and on", True), given[4]]
    assert not found.is_pair
    # A field has the whole prompt, whose answers are context.
    turns, _ = seen("hint", TALK)
    assert turns == [
        ("user", "one?", True),
        ("assistant", "no", False),
        ("user", "two, really?", True),
        given[4],
    ]


def test_teacher_prompt_of_what_is_only_asked():
    asked = {"messages": TALK["messages"][:4], "hint": TALK["hint"]}
    turns, _ = seen("{prompt}!", asked, asks=True)
    assert [turn[1] for turn in turns] == ["be short", "one?", "said", "two?!"]
    assert seen("hint", asked, asks=True)[0][-1][1] == "two, really?"
    with pytest.raises(RecordError, match="the record has no `answer`"):
        seen("{prompt} {answer}", asked, asks=True)
    with pytest.raises(RecordError, match="running text has no prompt"):
        TeacherPrompt("{prompt}").apply({}, Text("a b"))


def example(ids, counted, prompt=0):
    ids, counted = np.array(ids, np.int32), np.array(counted, np.bool_)
    return Example(ids, counted, prompt, len(ids))


def test_align_takes_the_same_tokens_alone():
    student = example([1, 5, 2, 6, 7], [0, 1, 0, 1, 1], 3)
    whole = example([9, 9, 5, 2, 9, 6, 7], [0, 0, 1, 0, 0, 1, 1], 5)
    np.testing.assert_array_equal(align(student, whole).counted, student.counted)
    # An answer before the last that the teacher does not see is not taught.
    last = example([9, 6, 7], [0, 1, 1], 1)
    found = align(student, last)
    np.testing.assert_array_equal(found.counted, [0, 0, 0, 1, 1])
    assert found.teacher is last
    for wrong in (
        example([9, 6, 8], [0, 1, 1], 1),
        example([9, 7], [0, 1], 1),
        example([9, 9, 5, 9, 5, 6, 7], [0, 0, 1, 0, 1, 1, 1], 5),
    ):
        assert align(student, wrong).reason == "answers_differ"


def records(count=60):
    draw = np.random.default_rng(0)
    words = ["cat", "sat", "on", "the", "mat", "and", "then", "all"]

    def text(most):
        return " ".join(draw.choice(words, int(draw.integers(1, most))))

    for _ in range(count):
        turns = []
        for _ in range(int(draw.integers(1, 3))):
            turns.append({"role": "user", "content": text(8)})
            turns.append({"role": "assistant", "content": text(6)})
        yield {"messages": turns, "hint": text(20)}


@pytest.mark.parametrize(
    ("prompt", "pack"),
    [("{hint} {prompt}", True), ("hint", False), ("{answer} so {prompt}", True)],
)
def test_load_dataset_aligns_every_answer(write_jsonl, styled_tokenizer, pack, prompt):
    """Each counted token is predicted in both rows, in the same example."""
    path, lengths = write_jsonl(records()), {"seq_len": 96, "teacher_len": 130}
    options = {"pack": pack, "held_out_fraction": 0.0}
    dataset = load_dataset(
        path, styled_tokenizer, teacher_prompt=prompt, **lengths, **options
    )
    assert dataset.info.dropped == {}
    assert dataset.info.unused_keys == ({} if "hint" in prompt else {"hint": 60})
    plain = load_dataset(path, styled_tokenizer, seq_len=96, **options)
    assert dataset.info.fingerprint != plain.info.fingerprint
    if prompt != "hint":
        counts = {each.info.train.counted_tokens for each in (dataset, plain)}
        assert len(counts) == 1
    total = 0
    for batch in held_out_batches(dataset.train, 4):
        assert batch["teacher_input_ids"].shape == (4, 130)
        segments = batch.get("segment_ids", batch.get("attention_mask"))
        of_teacher = batch.get("teacher_segment_ids")
        if of_teacher is None:
            of_teacher = batch["teacher_attention_mask"]
        for row, place in itertools.product(range(4), range(95)):
            label, index = batch["labels"][row, place + 1], batch["teacher_index"]
            index = index[row, place]
            assert (index >= 0) == (label != IGNORE_INDEX)
            if index >= 0:
                total += 1
                assert batch["teacher_input_ids"][row, index + 1] == label
                assert of_teacher[row, index] == of_teacher[row, index + 1]
                assert of_teacher[row, index] == segments[row, place]
    assert total == dataset.info.train.counted_tokens


def test_load_dataset_counts_what_has_no_teachers_prompt(write_jsonl, tokenizer):
    rows = [*records(20), {"text": "a b c"}, {**PAIR, "hint": "that is all. " * 40}]
    path = write_jsonl([*rows, {**PAIR, "hint": None}])
    options = {"seq_len": 96, "teacher_prompt": "{hint} {prompt}"}
    found = load_dataset(path, tokenizer, bad_records="count", **options)
    assert found.info.dropped == {"no_teacher_prompt": 2, "teacher_too_long": 1}
    with pytest.raises(DataError, match=r"line 21: running text has no prompt"):
        load_dataset(path, tokenizer, **options)
    with pytest.raises(DataError, match=r"no example is left.*no_teacher_prompt: 23"):
        load_dataset(
            path,
            tokenizer,
            bad_records="count",
            **options | {"teacher_prompt": "nothing"},
        )


def test_load_dataset_leaves_out_answers_of_other_tokens(write_jsonl, tokenizers):
    """A prompt with a start token gets no template, and the teacher's here does."""
    rendered = {"prompt": "<s>the cat", "completion": "sat on the mat"}
    path = write_jsonl([PAIR, rendered])
    options = {"seq_len": 64, "teacher_prompt": "Well: {prompt}"}
    found = load_dataset(
        path,
        tokenizers["llama2"],
        bad_records="count",
        held_out_fraction=0.0,
        **options,
    )
    assert found.info.dropped == {"answers_differ": 1}
    with pytest.raises(DataError, match=r"line 2: behind the teacher's prompt the ans"):
        load_dataset(path, tokenizers["llama2"], **options)


def test_load_dataset_reads_the_field_from_tables(tmp_path, tokenizer):
    """Other columns are not read; who teaches a record may stand in a third."""
    rows = [{**PAIR, "hint": f"number {n}", "more": "x"} for n in range(4)]
    for row, name in zip(rows, "abab", strict=True):
        row["who"] = name
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    options = {"seq_len": 64, "pack": False, "held_out_fraction": 0.0}
    found = load_dataset(
        path,
        tokenizer,
        teacher_prompt="{hint}",
        teacher_field=TeacherField("who", ("a", "b"), (0.5, 0.5)),
        **options,
    )
    assert found.info.unused_keys == {"n": 4, "more": 4}
    batch = found.train.batch(range(4), 4)
    texts = map(tokenizer.decode, batch["teacher_input_ids"])
    assert all(f"number {n}" in text for n, text in enumerate(texts))
    np.testing.assert_array_equal(batch["teacher_weights"][:, 0], np.eye(2)[[0, 1] * 2])
    assert "teacher_teacher_weights" not in batch
    with pytest.raises(DataError, match="no `other`"):
        load_dataset(path, tokenizer, seq_len=64, teacher_prompt="{other}")
