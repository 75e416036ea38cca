"""Batches: one shape, every token once, the same order for any number of processes."""

import itertools
import json
import threading

import jax
import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet, held_out_batches, train_iterator
from taid_jax.data.errors import DataError
from taid_jax.data.packing import make_table, pack_rows
from taid_jax.data.tokens import Example
from taid_jax.types import IGNORE_INDEX

SEQ_LEN = 8
PAD = 99


def make_examples(layout):
    """Eleven examples of 2 to 8 tokens; every id occurs once: 100, 101, ..."""
    lengths = [5, 2, 8, 3, 3, 4, 6, 2, 7, 5, 2]
    ids = iter(range(100, 200))
    pairs = []
    for number, length in enumerate(lengths):
        counted = np.arange(length) % 3 != 0  # the first, and some others, do not count
        tokens = np.array([next(ids) for _ in range(length)], np.int32)
        pairs.append((number, Example(tokens, counted, length // 2, length)))
    packed = layout == "packed"
    rows = pack_rows(lengths, SEQ_LEN) if packed else [(i,) for i in range(11)]
    buckets = (4, SEQ_LEN) if layout == "buckets" else ()
    return ExampleSet(make_table(pairs), rows, SEQ_LEN, PAD, packed, buckets)


@pytest.fixture(params=["padded", "packed"])
def examples(request):
    return make_examples(request.param)


@pytest.fixture(params=["padded", "packed", "buckets"])
def any_examples(request):
    return make_examples(request.param)


def counted_ids(examples):
    return sorted(examples.table.ids[examples.table.counted].tolist())


def labels_of(batches):
    labels = np.concatenate([batch["labels"].ravel() for batch in batches])
    return labels[labels != IGNORE_INDEX].tolist()


def assert_equal(left, right):
    assert left.keys() == right.keys()
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_batch_has_aligned_labels_and_resets_at_segments(examples):
    batch = examples.batch(range(len(examples)), len(examples))
    for name, array in batch.items():
        assert array.dtype == np.int32, name
        assert array.shape == (len(examples), SEQ_LEN), name
    counts = batch["labels"] != IGNORE_INDEX
    np.testing.assert_array_equal(batch["labels"][counts], batch["input_ids"][counts])
    assert sorted(batch["labels"][counts].tolist()) == counted_ids(examples)
    if examples.packed:
        assert batch.keys() == {"input_ids", "labels", "segment_ids", "positions"}
        segments, positions = batch["segment_ids"], batch["positions"]
        real = segments > 0
        starts = real & (np.diff(segments, prepend=0, axis=1) != 0)
        assert (positions[starts] == 0).all()
        inner = real & ~starts
        steps = np.diff(positions, prepend=-1, axis=1)
        assert (steps[inner] == 1).all()
        assert starts.sum() == len(examples.table)
    else:
        assert batch.keys() == {"input_ids", "labels", "attention_mask"}
        real = batch["attention_mask"] == 1
        starts = np.zeros_like(real)
        starts[:, 0] = True
        assert (real | (batch["attention_mask"] == 0)).all()
    # What is predicted from another text, or from nothing, does not count.
    assert not counts[starts].any()
    assert not counts[~real].any()
    assert (batch["input_ids"][~real] == PAD).all()
    assert real.sum() == len(examples.table.ids)


def test_batch_labels_predict_the_next_token_of_the_same_example(examples):
    """The shift is the train step's: output i against label i + 1."""
    batch = examples.batch(range(len(examples)), len(examples))
    pairs = set()
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        pairs |= {
            (int(ids[i]), int(labels[i + 1]))
            for i in range(SEQ_LEN - 1)
            if labels[i + 1] != IGNORE_INDEX
        }
    wanted = set()
    for number in range(len(examples.table)):
        ids, counted, *_ = examples.table[number]
        wanted |= {
            (int(ids[i]), int(ids[i + 1]))
            for i in range(len(ids) - 1)
            if counted[i + 1]
        }
    assert pairs == wanted


@pytest.mark.parametrize("size", [1, 4])
def test_train_iterator_gives_every_row_once_an_epoch(examples, size):
    rows, count = len(examples), 4
    # Whole epochs and whole batches at once.
    iterator = train_iterator(examples, size, seed=0)
    batches = list(itertools.islice(iterator, rows * count // size))
    assert {tuple(batch) for batch in batches} == {tuple(batches[0])}
    assert all(batch["labels"].shape == (size, SEQ_LEN) for batch in batches)
    first_ids = np.concatenate([batch["input_ids"][:, 0] for batch in batches])
    epochs = first_ids.reshape(count, rows)
    for epoch in epochs:
        assert sorted(epoch) == sorted(epochs[0])
        assert len(set(epoch)) == rows
    assert len({tuple(epoch) for epoch in epochs}) == count  # a new order each time
    assert sorted(labels_of(batches)) == sorted(counted_ids(examples) * count)


def test_train_iterator_is_the_seeds(any_examples):
    def order(seed):
        batches = itertools.islice(train_iterator(any_examples, 4, seed=seed), 5)
        return [batch["input_ids"][:, 0].tolist() for batch in batches]

    assert order(3) == order(3)
    assert order(3) != order(4)


@pytest.mark.parametrize(("steps", "prefetch"), [(0, 0), (7, 4)])
def test_train_iterator_resumes_with_the_very_next_batch(any_examples, steps, prefetch):
    iterator = train_iterator(any_examples, 4, seed=5, prefetch=prefetch)
    for _ in range(steps):
        next(iterator)
    given = iterator.get_state()
    state = json.loads(json.dumps(given))
    wanted = [next(iterator) for _ in range(6)]
    assert given == state  # as it was taken
    resumed = train_iterator(any_examples, 4, seed=5, prefetch=4 - prefetch)
    next(resumed)
    resumed.set_state(state)
    for batch in wanted:
        assert_equal(batch, next(resumed))
    # Going back in a running iterator works as well.
    iterator.set_state(state)
    assert_equal(wanted[0], next(iterator))


def test_train_iterator_does_not_depend_on_the_number_of_processes(any_examples):
    whole = train_iterator(any_examples, 4, seed=1)
    parts = [
        train_iterator(any_examples, 4, seed=1, process_index=p, process_count=2)
        for p in range(2)
    ]
    for _ in range(8):
        pieces = [next(part) for part in parts]
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in pieces[0]}
        assert_equal(next(whole), joined)
    states = [json.dumps(iterator.get_state()) for iterator in [whole, *parts]]
    assert len(set(states)) == 1


def test_train_iterator_takes_a_batch_larger_than_the_data(examples):
    batch = next(train_iterator(examples, 3 * len(examples), seed=0))
    assert sorted(labels_of([batch])) == sorted(counted_ids(examples) * 3)


def test_train_iterator_leaves_no_thread_behind(examples):
    before = set(threading.enumerate())
    iterator = train_iterator(examples, 4, seed=0)
    next(iterator)
    iterator.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)  # the batch being made is finished first
        assert not thread.is_alive(), thread


@pytest.mark.parametrize("size", [1, 4, 50])
def test_held_out_batches_count_every_token_once(examples, size):
    batches = held_out_batches(examples, size)
    assert len(batches) == -(-len(examples) // size)
    assert {batch["input_ids"].shape for batch in batches} == {(size, SEQ_LEN)}
    assert sorted(labels_of(batches)) == counted_ids(examples)
    for left, right in zip(batches, held_out_batches(examples, size), strict=True):
        assert_equal(left, right)
    mask = "segment_ids" if examples.packed else "attention_mask"
    left_over = size * len(batches) - len(examples)
    if left_over:
        filling = {key: array[-left_over:] for key, array in batches[-1].items()}
        assert (filling["labels"] == IGNORE_INDEX).all()
        assert (filling[mask] == 0).all()
        assert (filling["input_ids"] == PAD).all()


@pytest.mark.parametrize("count", [1, 2])
def test_batches_tell_where_the_last_answer_is(any_examples, count):
    """Of each row's first example."""
    places = {
        int(any_examples.table[row[0]].ids[0]): any_examples.table[row[0]][2:4]
        for row in any_examples.rows
    }
    options = {"process_count": count, "with_prompts": True}
    for process in range(count):
        for batch in held_out_batches(
            any_examples, 4, process_index=process, **options
        ):
            found = zip(batch["prompt_lengths"], batch["answer_ends"], strict=True)
            wanted = [
                places.get(int(first), (0, 0)) for first in batch["input_ids"][:, 0]
            ]
            assert list(found) == wanted
            assert batch["prompt_lengths"].dtype == np.int32
            assert batch["answer_ends"].shape == (4 // count,)


def test_held_out_batches_divide_by_processes(examples):
    whole = held_out_batches(examples, 4)
    parts = [
        held_out_batches(examples, 4, process_index=p, process_count=2) for p in (0, 1)
    ]
    for batch, *pieces in zip(whole, *parts, strict=True):
        joined = {k: np.concatenate([p[k] for p in pieces]) for k in batch}
        assert_equal(batch, joined)


def test_held_out_batches_stop_at_the_limit(examples):
    limited = held_out_batches(examples, 2, limit=2)
    assert len(limited) == 2
    assert_equal(limited[1], held_out_batches(examples, 2)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 4, "process_count": 3}, "multiple of the 3 processes, got 4"),
        ({"batch_size": 0}, "batch size"),
        (
            {"batch_size": 4, "process_index": 2, "process_count": 2},
            "process_index < 2",
        ),
        ({"batch_size": 4, "seed": -1}, r"seed < 2\*\*32, got -1"),
    ],
)
def test_train_iterator_says_what_it_needs(examples, options, message):
    with pytest.raises(DataError, match=message):
        train_iterator(examples, **{"seed": 0, **options})


def test_train_iterator_needs_rows():
    nothing = ExampleSet(make_table([]), [], SEQ_LEN, PAD, True)
    with pytest.raises(DataError, match="nothing to train on"):
        train_iterator(nothing, 4, seed=0)
    assert held_out_batches(nothing, 4) == []
