"""The corpus that comes with Python."""

import builtins

import pytest

from taid_jax.data.corpus import pydoc_topics
from taid_jax.data.errors import DataError


def test_pydoc_topics_are_whole_and_in_order():
    topics = list(pydoc_topics())
    names = [name for name, _ in topics]
    assert names == sorted(names)
    assert 60 <= len(topics) <= 120
    # 465 kB under Python 3.11, 492 kB under 3.12.
    assert 400_000 < sum(len(text) for _, text in topics) < 700_000
    assert dict(topics)["while"].startswith('The "while" statement')


def test_pydoc_topics_say_when_python_lacks_them(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pydoc_data\.topics.*give a \.txt"):
        list(pydoc_topics())
