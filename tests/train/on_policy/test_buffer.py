import json

import numpy as np
import pytest

from taid_jax.data.tokens import Example
from taid_jax.train.on_policy.buffer import Completion, ReplayBuffer


def completion(number, *, step=1, ended=True, length=2, uses=0):
    size = 2 + number % 5
    ids = np.arange(number, number + size + length, dtype=np.int32)
    example = Example(ids, ids % 3 == 0, size, size + length)
    return Completion(example, step, ended, uses)


def contents(buffer):
    return [
        (
            each.example.ids.tolist(),
            each.example.counted.tolist(),
            *each.example[2:],
            *each[1:],
        )
        for each in buffer
    ]


@pytest.mark.parametrize(
    ("ended", "length", "end"),
    [(True, 2, "ended"), (True, 1, "empty"), (False, 1, "truncated")],
)
def test_completion_says_how_it_ends(ended, length, end):
    found = completion(3, ended=ended, length=length)
    assert (found.end, found.length) == (end, length)


def test_buffer_draws_different_ones_by_the_generator():
    buffer = ReplayBuffer(50)
    buffer.add(completion(n) for n in range(50))
    first = buffer.draw(np.random.default_rng(3))
    assert sorted(first) == list(range(50))
    assert first == buffer.draw(np.random.default_rng(3))
    assert first != buffer.draw(np.random.default_rng(4))
    used = buffer.use(first[:20], 1)
    assert [each.example.ids[0] for each in used] == first[:20]
    assert sorted(buffer.draw(np.random.default_rng(3), new=True)) == sorted(first[20:])


def test_buffer_lets_go_of_what_was_used_so_often_and_of_the_oldest():
    buffer = ReplayBuffer(4, reuse=2)
    buffer.add(completion(n, step=n) for n in range(4))
    buffer.use([0, 3], 5)
    buffer.use([3], 6)
    assert [each.step for each in buffer] == [0, 1, 2]
    assert not buffer.full
    buffer.add(completion(n, step=n) for n in range(7, 10))
    # Of the two that were pushed out one had been trained on.
    assert [each.step for each in buffer] == [2, 7, 8, 9]
    assert buffer.full
    assert buffer.unused == 1
    assert buffer.ages == {5: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("count", [0, 1, 7])
def test_buffer_state_goes_through_json_whole(count):
    buffer = ReplayBuffer(5)
    buffer.add(completion(n, step=n, ended=n % 2 > 0, uses=n) for n in range(count))
    buffer.use([0] * bool(count), 9)
    assert [each.step for each in buffer] == list(range(count))[-5:]
    again = ReplayBuffer(5)
    again.add([completion(99)])
    again.set_state(json.loads(json.dumps(buffer.get_state())))
    assert contents(again) == contents(buffer)
    assert (again.unused, again.ages) == (buffer.unused, buffer.ages)
    assert again.full == buffer.full == (count >= 5)
    for each in again:
        assert each.example.ids.dtype == np.int32
        assert each.example.counted.dtype == np.bool_
