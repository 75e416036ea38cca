"""The corpus that comes with Python."""

import builtins
import collections
import re
from pydoc_data.topics import topics

import pytest

from taid_jax.data.corpus import pydoc_questions, pydoc_sections
from taid_jax.data.errors import DataError


def paragraphs(text):
    return {" ".join(part.split()) for part in text.split("\n\n")}


def test_pydoc_sections_are_whole_and_in_order():
    sections = list(pydoc_sections())
    names = [name for name, _ in sections]
    assert [n.split(":")[0] for n in names] == sorted(n.split(":")[0] for n in names)
    if "\n====" in topics["types"]:
        assert 150 <= len(sections) <= 300
    else:  # Python 3.11.2: the data model's 34 headings are a list there.
        assert len(sections) == 136
    # 373 kB under Python 3.11, 397 kB under 3.12.
    assert 350_000 < sum(len(text) for _, text in sections) < 600_000
    assert dict(sections)['assert: The "assert" statement'].startswith(
        'The "assert" statement\n****'
    )


def test_pydoc_sections_lose_nothing_but_copies():
    given = set().union(*(paragraphs(text) for _, text in pydoc_sections()))
    lost = [
        part
        for text in topics.values()
        for part in paragraphs(text) - given
        # A heading alone, or with underlines of another level.
        if not re.search(r"([*=~^-])\1{2}", part)
    ]
    assert lost == []


def test_pydoc_sections_do_not_repeat_one_another():
    """What is held out must not stand in a section that is trained on."""
    times = collections.Counter()
    total = 0
    for _, text in pydoc_sections():
        times.update(part for part in paragraphs(text) if len(part) >= 40)
        total += len(text)
    repeated = sum(len(part) * (n - 1) for part, n in times.items() if n > 1)
    # A line such as "See The standard type hierarchy for more information."
    assert repeated / total < 0.002


def test_pydoc_sections_say_when_python_lacks_them(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pydoc_data\.topics.*give a \.txt"):
        list(pydoc_sections())


def test_pydoc_questions_are_answered_with_prose():
    found = list(pydoc_questions())
    assert len(found) > 100
    names, questions, answers = zip(*found, strict=True)
    assert all(question.endswith("?") for question in questions)
    assert all(answer and "\n" not in answer for answer in answers)
    answer = dict(zip(names, answers, strict=True))['break: The "break" statement']
    # Not the grammar, which comes first.
    assert answer.startswith('"break" may only occur')
    first = dict(zip(names, answers, strict=True))['assert: The "assert" statement']
    assert first.startswith("Assert statements are a convenient way")
