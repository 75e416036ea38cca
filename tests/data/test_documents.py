"""Records and ranks."""

import pytest

from taid_jax.data.documents import (
    Chat,
    Message,
    make_document,
    parse_prompt,
)
from taid_jax.data.errors import DataError


def rank(record, seed=0):
    return make_document(record, seed).rank


def text(words):
    return {"text": words}


def turns(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def turn(content, role="user", **others):
    return {"messages": [{"role": role, "content": content, **others}]}


USER, ANSWER = ("user", "Q"), ("assistant", "A")
TURNS = turns(USER, ANSWER)["messages"]
PAIR = {"instruction": "Q", "output": "A"}


def test_make_document_ranks_by_what_is_said():
    assert rank(text("one two")) == rank(text(" One\n  two\n"))
    assert rank(text("one two")) != rank(text("one three"))
    assert rank(text("one two")) != rank(text("one two"), seed=1)
    assert 0 <= rank(text("one two")) <= 1


def test_make_document_ranks_answers_by_their_prompt():
    asked, answered = ("user", "Why?"), ("assistant", "So.")
    chat = rank(turns(asked, answered))
    assert chat == rank(turns(asked, ("assistant", "Because.")))
    assert chat == rank(turns(asked, answered, asked, answered))
    assert chat == rank({"prompt": "Why?", "completion": "Because."})
    assert chat != rank(turns(("system", "Be kind."), asked, answered))
    asked = turns(asked)["messages"]
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert chat == rank({"messages": [*asked, called], "tools": [{"name": "f"}]})
    assert chat == rank({"prompt": asked, "completion": TURNS[1:]})


def test_make_document_spreads_ranks_evenly():
    ranks = [rank(text(f"document {n}")) for n in range(2000)]
    # Binomial with p = 0.1: standard deviation 13; five of them.
    assert abs(sum(r < 0.1 for r in ranks) - 200) < 67


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
        ({"messages": TURNS, "tools": [3]}, "`tools` must be a list of objects"),
        ({"messages": TURNS, "tools": "[1"}, "`tools` is not JSON"),
        ({"messages": TURNS, "chat_template_kwargs": [1]}, "must be an object"),
        (PAIR | {"history": ["Q"]}, "needs pairs of texts"),
        (PAIR | {"system": 3}, "`system` must be a string"),
        (PAIR | {"instruction": " "}, "`instruction` is empty"),
        (turn([{"type": "image", "url": "a"}]), "part that is not text .*image"),
        (turn([3]), "part that is not text .*number"),
        (turn("A", "assistant", weight=0.5), "must be 0 or 1"),
        (turn("A", "assistant", weight="0"), "must be 0 or 1"),
        (
            {"messages": [{"from": "function_call", "value": "f(1)"}]},
            "object of JSON with `name`",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}]},
            "found `role`, `tool_calls`",
        ),
        (turn("a", name="\ud800"), "surrogate"),
        (turn("a", "x" * 1000), "unknown role .{,320} in turn 1"),
    ],
)
def test_make_document_says_what_is_wrong(record, message):
    with pytest.raises(DataError, match=message):
        make_document(record, 0)


def chat(*messages, **options):
    return Chat(tuple(Message(*each) for each in messages), tuple(options.items()))


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("record", "content"),
    [
        # ShareGPT
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {
                        "from": "function_call",
                        "value": '{"name": "f", "arguments": {"x": 1}}',
                    },
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "A"},
                ],
                "system": "S",
                "tools": '[{"name": "f"}]',
            },
            chat(
                ("system", "S"),
                USER,
                ("assistant", None, (("tool_calls", [CALL]),)),
                ("tool", "1"),
                ANSWER,
                tools=[{"name": "f"}],
            ),
        ),
        ({"conversations": TURNS, "text": "not used"}, chat(USER, ANSWER)),
        # Alpaca
        (
            {"instruction": "Q", "input": "I", "output": "A", "text": "all"},
            Chat.pair("Q\n\nI", "A"),
        ),
        ({"instruction": "Q", "output": "A"}, Chat.pair("Q", "A")),
        (
            {
                "instruction": "Q",
                "output": "A",
                "system": "S",
                "history": [["Q0", "A0"]],
            },
            chat(("system", "S"), ("user", "Q0"), ("assistant", "A0"), USER, ANSWER),
        ),
        # Pairs
        ({"prompt": "Q", "response": "A"}, Chat.pair("Q", "A")),
        (
            {"prompt": TURNS[:1], "completion": TURNS[1:]},
            chat(USER, ANSWER),
        ),
        (
            {"prompt": [*TURNS, TURNS[0]], "completion": "A"},
            chat(USER, ("assistant", "A", (), False), USER, ANSWER),
        ),
        # Parts, weights, calls
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "Q", "image_url": None},
                            {"text": "!"},
                        ],
                    },
                    {"role": "assistant", "content": "A", "weight": 0},
                ]
            },
            chat(("user", "Q!"), ("assistant", "A", (), False)),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q", "name": "Ann"},
                    {"role": "assistant", "tool_calls": [CALL], "weight": 1},
                ],
                "chat_template_kwargs": {"enable_thinking": False},
            },
            chat(
                ("user", "Q", (("name", "Ann"),)),
                ("assistant", None, (("tool_calls", [CALL]),)),
                enable_thinking=False,
            ),
        ),
    ],
)
def test_make_document_reads_the_formats_of_data_sets(record, content):
    assert make_document(record, 0).content == content


def test_make_document_names_the_record_and_what_changes_nothing():
    record = {"messages": TURNS, "prompt": "Q", "id": 3, "source": "x", "n": None}
    document = make_document(record, 0)
    assert document.unused_keys == ("prompt", "source")
    assert document.name == "3"
    record = {"text": "a", "prompt": "b", "prompt_id": "p", "id": "i"}
    assert make_document(record, 0)[2:4] == ("p", ("prompt",))
    record = {"instruction": "Q", "input": "", "output": "A", "id": None}
    assert make_document(record, 0)[2:4] == (None, ())


@pytest.mark.parametrize(
    ("record", "content"),
    [
        ({"prompt": "Q", "completion": "A"}, Chat.pair("Q")),
        ({"instruction": "Q", "input": "I"}, Chat.pair("Q\n\nI")),
        ({"prompt": "Q", "system": "S"}, chat(("system", "S"), USER)),
        ({"messages": TURNS}, chat(USER)),
        ({"prompt": TURNS[:1]}, chat(USER)),
        ({"conversations": [{"from": "human", "value": "Q"}]}, chat(USER)),
        (
            {
                "messages": [
                    TURNS[0],
                    {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "1"},
                ],
                "tools": [CALL],
            },
            chat(
                USER,
                ("assistant", None, (("tool_calls", [CALL]),)),
                ("tool", "1"),
                tools=[CALL],
            ),
        ),
    ],
)
def test_parse_prompt_gives_all_before_the_last_answer(record, content):
    assert parse_prompt(record) == content
