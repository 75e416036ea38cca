import json

import numpy as np
import pytest

from taid_jax.data.tokens import Example
from taid_jax.train.replay import ReplayBuffer


def example(number):
    ids = np.arange(number, number + 2 + number % 5, dtype=np.int32)
    return Example(ids, ids % 3 == 0)


def contents(buffer):
    return [(e.ids.tolist(), e.counted.tolist()) for e in buffer]


def test_buffer_keeps_the_newest():
    buffer = ReplayBuffer(4)
    buffer.add(example(n) for n in range(3))
    assert len(buffer) == 3
    assert not buffer.full
    buffer.add(example(n) for n in range(3, 6))
    assert buffer.full
    assert [ids[0] for ids, _ in contents(buffer)] == [2, 3, 4, 5]


def test_buffer_draws_different_ones_by_the_generator():
    buffer = ReplayBuffer(50)
    buffer.add(example(n) for n in range(50))
    first = [e.ids[0] for e in buffer.draw(np.random.default_rng(3), 20)]
    again = [e.ids[0] for e in buffer.draw(np.random.default_rng(3), 20)]
    assert len(set(first)) == 20
    assert first == again
    assert first != [e.ids[0] for e in buffer.draw(np.random.default_rng(4), 20)]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_buffer_state_goes_through_json_whole(count):
    buffer = ReplayBuffer(5)
    buffer.add(example(n) for n in range(count))
    again = ReplayBuffer(5)
    again.add([example(99)])
    again.set_state(json.loads(json.dumps(buffer.get_state())))
    assert contents(again) == contents(buffer)
    assert again.full == buffer.full
    for e in again:
        assert e.ids.dtype == np.int32
        assert e.counted.dtype == np.bool_
    # And it goes on as the other would.
    for other in (buffer, again):
        other.add([example(50)])
    assert contents(again) == contents(buffer)
