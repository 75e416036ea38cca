"""Files to a data set: split, windows, packing, and messages when nothing is left."""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from taid_jax.data import DataError, held_out_batches, load_dataset, train_iterator
from taid_jax.data.corpus import pydoc_sections
from taid_jax.data.teacher_field import TeacherField
from taid_jax.types import IGNORE_INDEX

CHAT = [
    {"role": "user", "content": "Whether the weather is fine?"},
    {"role": "assistant", "content": "that is all."},
]


def texts_of(side, tokenizer):
    """What a side was made from: its windows put together again, by document."""
    ids = {}
    for number in sorted(number for row in side.rows for number in row):
        window = side.table[number].ids.tolist()
        document = ids.setdefault(int(side.table.documents[number]), [])
        document += window[1:] if document else window
    end = tokenizer.eos_token
    return {tokenizer.decode(tokens).removesuffix(end) for tokens in ids.values()}


def labels_of(side):
    batches = held_out_batches(side, 4)
    labels = np.concatenate([batch["labels"].ravel() for batch in batches])
    return labels[labels != IGNORE_INDEX]


@pytest.fixture
def documents():
    return [f"Document {n} says {n * n} and then that is all." for n in range(200)]


def test_load_dataset_never_leaks(write_jsonl, tokenizer, documents):
    copies = documents + documents[:100]
    records = [{"text": text} for text in copies]
    random.Random(1).shuffle(records)
    path = write_jsonl(records)
    dataset = load_dataset(path, tokenizer, seq_len=16, held_out_fraction=0.2)
    train = texts_of(dataset.train, tokenizer)
    held_out = texts_of(dataset.held_out, tokenizer)
    assert not train & held_out
    assert train | held_out == set(documents)
    # Binomial with p = 0.2 over 200: standard deviation 5.7; four of them.
    assert abs(len(held_out) - 40) < 23
    info = dataset.info
    assert info.train.documents + info.held_out.documents == len(copies)


def test_load_dataset_splits_alike_in_any_order_of_files(
    write_jsonl, tokenizer, documents
):
    records = [{"text": text} for text in documents]
    parts = [write_jsonl(records[n::3], f"x{n}.jsonl") for n in range(3)]
    renamed = write_jsonl(records[::-1], "a.jsonl")
    options = {"seq_len": 16, "held_out_fraction": 0.2}
    sides = [
        texts_of(load_dataset(source, tokenizer, **options).held_out, tokenizer)
        for source in (parts, parts[::-1], renamed)
    ]
    assert sides[0] == sides[1] == sides[2]
    # A document that comes later moves no other across.
    more = load_dataset(
        [*parts, write_jsonl([{"text": "one more"}], "b.jsonl")], tokenizer, **options
    )
    assert texts_of(more.held_out, tokenizer) - {"one more"} == sides[0]
    other = load_dataset(parts, tokenizer, split_seed=1, **options)
    assert texts_of(other.held_out, tokenizer) != sides[0]


def test_load_dataset_keeps_a_prompt_on_one_side(write_jsonl, tokenizer):
    records = [
        {"prompt": f"Question {n % 40}?", "completion": f"Answer {n}."}
        for n in range(120)
    ]
    dataset = load_dataset(
        write_jsonl(records), tokenizer, seq_len=64, held_out_fraction=0.3
    )
    train, held_out = (
        {text.split("?")[0] for text in texts_of(side, tokenizer)}
        for side in (dataset.train, dataset.held_out)
    )
    assert not train & held_out
    assert len(train | held_out) == 40


def test_load_dataset_holds_out_the_end_of_a_single_text(tmp_path, tokenizer):
    path = tmp_path / "book.txt"
    text = "\n\n".join(f"Paragraph {n} of the book." for n in range(100))
    path.write_text(text)
    dataset = load_dataset(path, tokenizer, seq_len=32, held_out_fraction=0.1)
    [first], [last] = (
        texts_of(side, tokenizer) for side in (dataset.train, dataset.held_out)
    )
    assert first + last == text
    assert 0.05 < len(last) / len(text) < 0.15


@pytest.mark.parametrize("pack", [False, True])
def test_load_dataset_predicts_every_token_of_text_once(
    write_jsonl, tokenizer, documents, pack
):
    path = write_jsonl([{"text": text} for text in documents])
    dataset = load_dataset(path, tokenizer, seq_len=12, pack=pack)
    wanted = []
    for text in documents:
        wanted += [*tokenizer(text)["input_ids"][1:], tokenizer.eos_token_id]
    found = [*labels_of(dataset.train), *labels_of(dataset.held_out)]
    assert sorted(found) == sorted(wanted)
    info = dataset.info
    assert info.train.counted_tokens + info.held_out.counted_tokens == len(wanted)
    batch = held_out_batches(dataset.train, len(dataset.train))[0]
    real = batch["segment_ids" if pack else "attention_mask"] > 0
    assert info.train.fill == pytest.approx(real.mean())


def test_load_dataset_packs_without_changing_what_counts(
    write_jsonl, tokenizer, make_conversations
):
    path = write_jsonl([{"messages": m} for m in make_conversations(60)])
    packed, padded = (
        load_dataset(path, tokenizer, seq_len=512, pack=pack) for pack in (True, False)
    )
    for name in ("train", "held_out"):
        left, right = (labels_of(getattr(d, name)) for d in (packed, padded))
        np.testing.assert_array_equal(np.sort(left), np.sort(right))
    assert packed.info.train.rows < padded.info.train.rows
    assert packed.info.train.fill > 0.9


def test_load_dataset_counts_answers_or_everything(write_jsonl, tokenizer):
    records = [{"messages": CHAT}, {"prompt": "Why?", "completion": "on and on."}]
    path = write_jsonl(records)
    options = {"seq_len": 64, "held_out_fraction": 0.0}
    dataset = load_dataset(path, tokenizer, **options)
    text = tokenizer.decode(labels_of(dataset.train).tolist())
    assert text == "that is all.<|im_end|>on and on.<|im_end|>"
    whole = load_dataset(path, tokenizer, train_on_prompts=True, **options)
    assert whole.info.train.counted_tokens == whole.info.train.tokens - 2
    assert dataset.info.held_out.rows == 0
    assert held_out_batches(dataset.held_out, 4) == []


def test_load_dataset_counts_what_it_leaves_out(write_jsonl, tokenizer):
    long = [CHAT[0], {"role": "assistant", "content": "that is all. " * 50}]
    records = [{"messages": CHAT}, {"txt": "a"}, {"text": ""}, {"messages": long}]
    records += [{"text": "three four"}, {"messages": []}, {"text": " \n"}]
    path = write_jsonl(records)
    with pytest.raises(DataError, match="line 2: need the keys"):
        load_dataset(path, tokenizer, seq_len=64)
    info = load_dataset(path, tokenizer, seq_len=64, bad_records="count").info
    reasons = {"wrong_shape": 1, "empty": 2, "too_long": 1, "no_answer": 1}
    assert info.dropped == reasons
    # What could not be used, and not what is sound and does not fit.
    assert len(info.problems) == 2
    assert "line 2" in info.problems[0]
    assert "line 6" in info.problems[1]
    assert info.train.examples + info.held_out.examples == 2


def test_load_dataset_says_when_all_are_too_long(write_jsonl, tokenizer):
    path = write_jsonl([{"messages": CHAT}] * 3)
    length = len(tokenizer.apply_chat_template(CHAT, return_dict=False))
    message = rf"too_long: 3.*shortest .* has {length} tokens: raise seq_len"
    with pytest.raises(DataError, match=message):
        load_dataset(path, tokenizer, seq_len=8)


def test_load_dataset_says_when_everything_is_masked(
    write_jsonl, tokenizer, monkeypatch
):
    marks_nothing = (
        "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}"
        "{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", marks_nothing)
    with pytest.raises(DataError, match=r"all_masked: 1.*every token is masked"):
        load_dataset(write_jsonl([{"messages": CHAT}]), tokenizer, seq_len=64)


def test_load_dataset_says_when_nothing_is_left(write_jsonl, tokenizer):
    with pytest.raises(DataError, match=r"no example is left .*empty: 2"):
        load_dataset(write_jsonl([{"text": " "}] * 2), tokenizer, seq_len=64)
    with pytest.raises(DataError, match=r"wrong_shape: 1.*first problem: .*line 1"):
        load_dataset(
            write_jsonl([{"x": 1}]), tokenizer, seq_len=64, bad_records="count"
        )
    with pytest.raises(DataError, match=r"no records"):
        load_dataset([], tokenizer, seq_len=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len >= 2, got 1"),
        ({"held_out_fraction": 1.0}, "held_out_fraction < 1, got 1.0"),
        ({"split_seed": -1}, "split_seed"),
    ],
)
def test_load_dataset_checks_numbers_before_reading(tokenizer, options, message):
    with pytest.raises(DataError, match=message):
        load_dataset("nowhere", tokenizer, **{"seq_len": 16, **options})


def test_load_dataset_has_a_fingerprint_of_what_is_trained_on(
    write_jsonl, tokenizer, documents
):
    path = write_jsonl([{"text": text} for text in documents])
    first = load_dataset(path, tokenizer, seq_len=16).info
    assert load_dataset(path, tokenizer, seq_len=16).info == first
    others = [{"seq_len": 17}, {"split_seed": 1}, {"pack": False}]
    for change in others:
        other = load_dataset(path, tokenizer, **{"seq_len": 16, **change}).info
        assert other.fingerprint != first.fingerprint, change
    json.dumps(dataclasses.asdict(first))


def test_load_dataset_reads_the_built_in_corpus(tokenizer):
    dataset = load_dataset("pydoc", tokenizer, seq_len=256)
    info = dataset.info
    assert info.train.documents + info.held_out.documents == len(list(pydoc_sections()))
    assert info.dropped == {}
    # Ten per cent of some 170 documents of very unequal length.
    share = info.held_out.tokens / (info.held_out.tokens + info.train.tokens)
    assert 0.04 < share < 0.2
    assert info.train.fill > 0.95
    batch = next(train_iterator(dataset.train, 4, seed=0))
    assert batch["input_ids"].shape == (4, 256)
    assert jax.tree.map(jax.numpy.asarray, batch)["labels"].dtype == np.int32


def test_held_out_order_does_not_follow_the_files(write_jsonl, tokenizer, documents):
    path = write_jsonl([{"text": text} for text in documents])
    side = load_dataset(
        path, tokenizer, seq_len=64, held_out_fraction=0.5, pack=False
    ).held_out
    order = [int(side.table.documents[number]) for (number,) in side.rows]
    assert order != sorted(order)
    assert sum(order[:20]) / 20 == pytest.approx(np.mean(order), abs=60)


def test_load_dataset_tells_what_is_not_used(tmp_path, tokenizer):
    asked = {"role": "user", "content": "Q", "name": "Ann"}
    record = {"messages": [asked, CHAT[1]], "source": "x"}
    for name in ("train-0.jsonl", "test-0.jsonl", "notes.md"):
        (tmp_path / name).write_text(json.dumps(record))
    info = load_dataset(tmp_path, tokenizer, seq_len=64, held_out_fraction=0.0).info
    assert info.train.documents == 1
    assert info.unused_keys == {"source": 1, "name": 1}
    assert info.num_skipped_files == 2
    assert info.skipped_files == (
        str(tmp_path / "notes.md"),
        str(tmp_path / "test-0.jsonl"),
    )
    assert "split train" in info.notes[0]
    assert json.loads(json.dumps(dataclasses.asdict(info)))["num_skipped_files"] == 2


def test_load_dataset_takes_prompts_without_answers_where_they_suffice(
    write_jsonl, tokenizer
):
    turns = [("user", "Why?"), ("assistant", "So."), ("user", "And now?")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    records = [
        {"prompt": "Whether?"},
        {"instruction": "Say it.", "input": "once"},
        chat,
        {"prompt": "Is it?", "completion": "that is all."},
    ]
    path = write_jsonl(records)
    options = {"seq_len": 128, "held_out_fraction": 0.0, "pack": False}
    options |= {"bad_records": "count"}
    found = load_dataset(str(path), tokenizer, prompts_suffice=True, **options)
    examples = [found.train.table[number] for number in range(len(records))]
    asked = [tokenizer.decode(each.ids[: each.prompt].tolist()) for each in examples]
    for prompt, text in zip(asked, ("Whether?", "once", "now?", "Is it?"), strict=True):
        assert f"{text}<|im_end|>" in prompt
        assert prompt.endswith("<|im_start|>assistant\n")
    assert [each.prompt == len(each.ids) for each in examples] == [True] * 3 + [False]
    alone = load_dataset(str(path), tokenizer, **options)
    assert alone.info.dropped == {"wrong_shape": 2}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_token_of_a_record_has_the_weights_of_its_teachers(
    kind, tmp_path, write_jsonl, tokenizer
):
    """Of several windows of a text, of several examples in a row, and at padding."""
    chosen = {"weather": ("b", (0, 1)), "fine": ([3, 1], (0.75, 0.25))}
    chosen["that"] = (None, (0.5, 0.5))
    records = [
        {"text": f"{n} " + " ".join([word] * 40)}
        | ({} if named is None else {"who": named if kind == "jsonl" else str(named)})
        for n in range(20)
        for word, (named, _) in chosen.items()
    ]
    path = write_jsonl(records)
    if kind == "parquet":
        import pyarrow

        path = tmp_path / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    field = TeacherField("who", ("models/a", "models/b"), (0.5, 0.5))
    dataset = load_dataset(path, tokenizer, seq_len=16, teacher_field=field)
    assert "40 of 60 documents say by `who`" in dataset.info.notes[0]
    assert not dataset.info.unused_keys
    seen = set()
    for side in (dataset.train, dataset.held_out):
        for batch in held_out_batches(side, 4):
            for row, segments in enumerate(batch["segment_ids"]):
                for segment in np.unique(segments):
                    here = segments == segment
                    text = tokenizer.decode(batch["input_ids"][row][here])
                    word = next((w for w in chosen if w in text), None)
                    expected = chosen[word][1] if segment else (0, 0)
                    seen.add(word if segment else None)
                    found = batch["teacher_weights"][row][here]
                    np.testing.assert_array_equal(found, [expected] * here.sum())
    assert seen == {*chosen, None}


def test_other_teachers_of_records_are_other_data(write_jsonl, tokenizer, documents):
    fields = [
        TeacherField("who", ("a", "b"), weights) for weights in ((1.0, 0.0), (0.5, 0.5))
    ]
    records = [{"text": text} for text in documents]
    records[3]["who"] = [0, 1]
    path = write_jsonl(records)
    found = [
        load_dataset(path, tokenizer, seq_len=16, teacher_field=field).info.fingerprint
        for field in (None, *fields)
    ]
    assert len({*found}) == 3
    del records[3]["who"]
    with pytest.raises(DataError, match=r"no record of .* says by `who`"):
        load_dataset(
            write_jsonl(records), tokenizer, seq_len=16, teacher_field=fields[0]
        )
