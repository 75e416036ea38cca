"""Records and ranks."""

import pytest

from taid_jax.data.documents import (
    Chat,
    Completion,
    Message,
    Text,
    make_document,
    parse_record,
)
from taid_jax.data.errors import DataError


def rank(content, seed=0):
    return make_document("here", content, seed).rank


def turns(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def test_make_document_ranks_by_what_is_said():
    assert rank(Text("one two")) == rank(Text(" One\n  two\n"))
    assert rank(Text("one two")) != rank(Text("one three"))
    assert rank(Text("one two")) != rank(Text("one two"), seed=1)
    assert 0 <= rank(Text("one two")) <= 1


def test_make_document_ranks_answers_by_their_prompt():
    asked = Message("user", "Why?")
    answered = Message("assistant", "So.")
    chat = Chat((asked, answered))
    assert rank(chat) == rank(Chat((asked, Message("assistant", "Because."))))
    assert rank(chat) == rank(Chat((asked, answered, asked, answered)))
    assert rank(chat) == rank(Completion("Why?", "Because."))
    assert rank(chat) != rank(Chat((Message("system", "Be kind."), asked, answered)))


def test_make_document_spreads_ranks_evenly():
    ranks = [rank(Text(f"document {n}")) for n in range(2000)]
    # Binomial with p = 0.1: standard deviation 13; five of them.
    assert abs(sum(r < 0.1 for r in ranks) - 200) < 67


def test_parse_record_reads_a_conversation():
    record = turns(("system", "Be kind."), ("user", "Why?"), ("assistant", "So."))
    chat = parse_record({**record, "text": "not used"})
    assert isinstance(chat, Chat)
    assert chat.messages[2] == Message("assistant", "So.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (turns(("user", "Why?")), "no assistant turn.*roles are user"),
        (turns(), "no assistant turn.*none"),
        (turns(("assistant", "So.")), "start with a user turn, got assistant"),
        (turns(("system", "a"), ("assistant", "So.")), "got assistant"),
        (turns(("user", " \n"), ("assistant", "So.")), r"turn 1 \(user\) is empty"),
        (
            turns(("user", "Why?"), ("gpt", "So.")),
            "'gpt' in turn 2; known roles: system",
        ),
        (turns(("user", "Why?"), ("assistant", None)), "content of turn 2.*got null"),
        ({"messages": [{"from": "human", "text": "a"}]}, "turn 1 .*`from`, `text`"),
        ({"messages": ["Why?"]}, "turn 1 needs .* found a string"),
        ({"messages": "Why?"}, "list of objects.*got a string"),
        ({"messages": {"role": "user"}}, "got an object"),
        ({"prompt": "a", "completion": ["b"]}, "`completion` must be a string.*a list"),
        ({"prompt": "", "completion": "b"}, "`prompt` is empty"),
        ({"prompt": "a", "completion": " "}, "`completion` is empty"),
        ({"text": None}, "found `text`"),
        (None, "got null"),
    ],
)
def test_parse_record_says_what_is_wrong(record, message):
    with pytest.raises(DataError, match=message):
        parse_record(record)
