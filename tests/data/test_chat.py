"""Answers of conversations: exactly their tokens count, in five formats."""

import copy

import numpy as np
import pytest

from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat, Message, make_document
from taid_jax.data.errors import DataError, RecordError
from taid_jax.data.template import ChatTemplate, Conversation, Cut
from taid_jax.data.tokens import Encoder

QUESTION = Message("user", "Whether?")
ANSWER = Message("assistant", "that is all.")


def content_of(record):
    return make_document(record, 0).content


def encode(tokenizer, content, *, train_on_prompts=False, **options):
    renderer = ChatRenderer(tokenizer, train_on_prompts=train_on_prompts, **options)
    [example] = Encoder(tokenizer).examples([renderer.chat(content)])
    if isinstance(example, DataError):
        raise example
    return example


def counted_texts(tokenizer, example):
    """The text of every run of counted tokens."""

    def text(stop):
        # From the start, because decoders drop a space at the start of what they get.
        ids = example.ids[:stop].tolist()
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    changes = np.flatnonzero(np.diff(example.counted.astype(int), prepend=0, append=0))
    return [
        text(stop).removeprefix(text(start)) for start, stop in changes.reshape(-1, 2)
    ]


def test_chat_cuts_a_token_that_crosses_into_an_answer(tokenizer):
    """The line end before an answer and those it starts with are one token together."""
    answer = Message("assistant", "\n\nmoves")
    example = encode(tokenizer, Chat((QUESTION, answer)))
    prompt = tokenizer.apply_chat_template(
        [QUESTION._asdict()], add_generation_prompt=True, return_dict=False
    )
    turns = [QUESTION._asdict(), answer._asdict()]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole[: len(prompt)] != prompt
    assert example.ids[: len(prompt)].tolist() == prompt
    assert counted_texts(tokenizer, example) == ["\n\nmoves<|im_end|>"]


# The five formats again, with marks round what the assistant writes.
HEADERS = {
    "chatml": "<|im_start|>' + m['role'] + '\n",
    "llama3": "<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n",
    "phi3": "<|' + m['role'] + '|>\n",
    "zephyr": "<|' + m['role'] + '|>\n",
}


def marked_template(style, end):
    said = "m['content'] | trim" if style in ("llama2", "llama3") else "m['content']"
    if style == "llama2":
        # Marks with white space control, on lines of their own.
        return (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}\n"
            "  {%- generation -%}\n"
            "    {{ ' ' + m['content'] | trim + ' ' + eos_token }}\n"
            "  {%- endgeneration -%}\n"
            "{% else %}{{ '[INST] ' + m['content'] | trim + ' [/INST]' }}{% endif %}"
            "{% endfor %}"
        )
    return (
        f"{{% for m in messages %}}{{{{ '{HEADERS[style]}' }}}}"
        "{% if m['role'] == 'assistant' %}{% generation %}"
        f"{{{{ {said} }}}}{{{{ '{end}' }}}}{{% endgeneration %}}\n"
        f"{{% else %}}{{{{ {said} }}}}{{{{ '{end}' }}}}{{% endif %}}{{{{ '\n' }}}}"
        "{% endfor %}"
    )


@pytest.mark.parametrize("marked", [False, True])
def test_chat_counts_exactly_the_answers(
    style, styled_tokenizer, turn_end, make_conversations, monkeypatch, marked
):
    """The masks of transformers alone count a token of which one character is."""
    if marked:
        template = marked_template(style, turn_end)
        monkeypatch.setattr(styled_tokenizer, "chat_template", template)
    for messages in make_conversations(80):
        example = encode(styled_tokenizer, content_of({"messages": messages}))
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if style in ("llama2", "llama3"):
            answers = [answer.strip() for answer in answers]  # these templates trim
        found = counted_texts(styled_tokenizer, example)
        assert all(text.endswith(turn_end) for text in found)
        found = [text.removesuffix(turn_end) for text in found]
        if style == "llama2":
            found = [text.strip(" ") for text in found]  # a space round the answer
        assert found == answers
        last = example.ids[example.prompt : example.answer_end]
        assert example.counted[example.prompt : example.answer_end].all()
        assert styled_tokenizer.decode(last.tolist()).endswith(turn_end)


def test_chat_uses_the_marks_of_the_template(tokenizer, monkeypatch):
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    # Characters that marks are made of.
    private = Message("assistant", "\ue000that\ue001 is all.\ue002")
    chat = Chat((QUESTION, private, QUESTION, ANSWER))
    example = encode(tokenizer, chat)
    assert counted_texts(tokenizer, example) == [private.content, ANSWER.content]
    last = example.ids[example.prompt : example.answer_end].tolist()
    assert tokenizer.decode(last) == ANSWER.content
    everything = encode(tokenizer, chat, train_on_prompts=True)
    assert everything.counted[1:].all()
    assert everything[2:] == example[2:]


@pytest.mark.parametrize(
    "template",
    [
        # Changes earlier turns when more follow.
        "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] if loop.last else "
        "'(cut)') + '\n' }}{% endfor %}",
        # Changes what is said.
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
        # Writes no generation prompt though its turns have a header.
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% endfor %}",
    ],
)
def test_chat_refuses_answers_it_cannot_find(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = Chat((QUESTION, ANSWER, QUESTION, ANSWER))
    with pytest.raises(DataError, match=r"answer in turn 2 .* \{% generation %\}"):
        encode(tokenizer, chat)
    everything = encode(tokenizer, chat, train_on_prompts=True)  # needs no answers
    assert (everything.prompt, everything.answer_end) == (0, 0)


@pytest.mark.parametrize("role", ["system", "tool"])
@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_chat_refuses_a_turn_that_the_template_leaves_out(
    tokenizer, monkeypatch, role, train_on_prompts
):
    """No error of the template tells it: the turn would be missing, no more."""
    forgetful = (
        "{% for m in messages if m['role'] in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", forgetful)
    encode(tokenizer, Chat((QUESTION, ANSWER)), train_on_prompts=train_on_prompts)
    chat = Chat((QUESTION, ANSWER, Message(role, "22 degrees"), QUESTION, ANSWER))
    with pytest.raises(RecordError, match=rf"does not write turn 3 \({role}\)") as e:
        encode(tokenizer, chat, train_on_prompts=train_on_prompts)
    assert e.value.reason == "unknown_role"


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_chat_knows_where_the_last_answer_is(
    style, styled_tokenizer, make_conversations, train_on_prompts
):
    """The prompt is what generation is given, the answer what it should write."""
    for messages in make_conversations(20, edges=[""]):
        content = content_of({"messages": messages})
        example = encode(styled_tokenizer, content, train_on_prompts=train_on_prompts)
        asked = styled_tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert example.ids[: example.prompt].tolist() == asked
        counted = example.counted
        assert counted[example.prompt : example.answer_end].all()
        if not train_on_prompts:
            assert not counted[example.answer_end :].any()
            continue
        assert not counted[0]
        assert counted[1:].all()
        plain = styled_tokenizer.apply_chat_template(messages, return_dict=False)
        assert example.ids.tolist() == plain


def test_chat_with_prompts_gives_a_crossing_token_to_the_answer(tokenizer):
    answer = Message("assistant", "\n\nmoves")
    example = encode(tokenizer, Chat((QUESTION, answer)), train_on_prompts=True)
    text = tokenizer.decode(example.ids[: example.prompt].tolist())
    assert text.endswith("<|im_start|>assistant")  # its line end is in the next token
    assert example.answer_end == len(example.ids) - 1  # a line end after the turn


def test_completion_becomes_two_turns_with_a_template(tokenizer):
    example = encode(tokenizer, Chat.pair(QUESTION.content, ANSWER.content))
    chat = encode(tokenizer, Chat((QUESTION, ANSWER)))
    np.testing.assert_array_equal(example.ids, chat.ids)
    np.testing.assert_array_equal(example.counted, chat.counted)


def test_completion_is_joined_without_a_template(base_tokenizer):
    completion = Chat.pair("The cat", " sat on the mat")
    example = encode(base_tokenizer, completion)
    assert counted_texts(base_tokenizer, example) == [" sat on the mat<|im_end|>"]
    assert base_tokenizer.decode(example.ids.tolist()).startswith("The cat sat")
    everything = encode(base_tokenizer, completion, train_on_prompts=True)
    assert everything.counted[1:].all()
    np.testing.assert_array_equal(everything.ids, example.ids)
    for found in (example, everything):
        assert base_tokenizer.decode(found.ids[: found.prompt]) == "The cat"


def test_completion_that_shares_a_token_with_its_prompt_is_cut_there(base_tokenizer):
    """`tea` + `cher` are one token in the whole, two where generation starts."""
    [whole] = Encoder(base_tokenizer).ids(["the teacher"])
    [prompt] = Encoder(base_tokenizer).ids(["the tea"])
    assert whole[: len(prompt)] != prompt
    example = encode(base_tokenizer, Chat.pair("the tea", "cher"))
    assert example.ids[: len(prompt)].tolist() == prompt
    assert counted_texts(base_tokenizer, example) == ["cher<|im_end|>"]


def chat_of(*turns, **record):
    """A conversation of (role, content) or (role, content, other keys)."""
    messages = [
        {"role": role, "content": content, **dict(*others)}
        for role, content, *others in turns
    ]
    return content_of({"messages": messages, **record})


TWO = (("user", "Q?"), ("assistant", "One. "), ("user", "And?"), ("assistant", "Two"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDINGS = {
    # Text where the tokenizer has no such token, and what follows it is no end.
    "text": (CHATML, "One. <|im_end|>", "Two<|im_end|>"),
    "newline_then_eos": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ '\n' }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "One. \n</s>",
        "Two\n</s>",
    ),
    "words_then_eos": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == "
        "'assistant' %} [over]{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "One.  [over]</s>",
        "Two [over]</s>",
    ),
    # The end of the text follows the end of the last turn; both begin by like signs.
    "text_and_end_of_all": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|over|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}<|done|>{% endif %}",
        "One. <|over|>",
        "Two<|over|>",
    ),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_chat_counts_whatever_ends_an_answer(tokenizers, monkeypatch, case):
    template, first, last = ENDINGS[case]
    monkeypatch.setattr(tokenizers["zephyr"], "chat_template", template)
    example = encode(tokenizers["zephyr"], chat_of(*TWO))
    assert counted_texts(tokenizers["zephyr"], example) == [first, last]
    alone = encode(tokenizers["zephyr"], chat_of(*TWO[2:]))
    assert counted_texts(tokenizers["zephyr"], alone) == [last]


# A line end alone: the header of the next turn is no end either.
BARE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}",
        # The end of the text ends the last turn, and nothing the one before it.
        "{% for m in messages %}{{ '\n\n' + m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n' }}assistant: {% else %}</s>"
        "{% endif %}",
        # The last turn of all ends by another token than those before it.
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '</s>' if loop.last "
        "and m.role == 'assistant' else '<s>' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        # Headers are tokens, and no ends.
        "{% for m in messages %}{{ '<s>' + m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s>' }}assistant: {% endif %}",
        BARE,
    ],
)
def test_chat_leaves_out_turns_without_an_end(tokenizers, monkeypatch, template):
    """A model would go on by itself."""
    monkeypatch.setattr(tokenizers["zephyr"], "chat_template", template)
    for train_on_prompts in {False, template == BARE}:
        renderer = ChatRenderer(tokenizers["zephyr"], train_on_prompts=train_on_prompts)
        with pytest.raises(RecordError, match="nothing that ends the answer") as caught:
            renderer.chat(chat_of(*TWO))
        assert caught.value.reason == "no_end"


# What reasoning models have: a block in the last turn, earlier thoughts taken out, a
# tag in the generation prompt, a switch.
REASONING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip() %}"
    "<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}"
    "{% elif loop.last and m.reasoning_content %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{{ said }}"
    "{% elif loop.last and '</think>' in m.content %}{{ m.content }}"
    "{% elif loop.last %}<think>\n\n</think>\n\n{{ said }}{% else %}{{ said }}"
    "{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
TAG = CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
).replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
THOUGHT = "<think>\nso\n</think>\n\nTwo"


@pytest.mark.parametrize(
    ("template", "last", "options", "wanted"),
    [
        (REASONING, ("Two",), {}, "<think>\n\n</think>\n\nTwo"),
        (REASONING, (THOUGHT,), {}, THOUGHT),
        (REASONING, ("Two", {"reasoning_content": "so"}), {}, THOUGHT),
        (REASONING, ("Two", {"thinking": "so"}), {}, THOUGHT),
        # What generation is given does not count.
        (
            REASONING,
            ("Two",),
            {"chat_template_kwargs": {"enable_thinking": False}},
            "Two",
        ),
        (TAG, ("Two",), {}, "Two"),
        (TAG, ("<b> is bold",), {}, "<b> is bold"),
        (TAG, ("t",), {}, "t"),
        (TAG, (THOUGHT,), {}, "\n\nTwo"),
    ],
)
def test_chat_counts_what_a_reasoning_template_writes_before_an_answer(
    tokenizer, monkeypatch, template, last, options, wanted
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    first = ("assistant", "<think>hm</think>One")
    chat = chat_of(TWO[0], first, TWO[2], ("assistant", *last), **options)
    example = encode(tokenizer, chat)
    assert counted_texts(tokenizer, example) == ["One<|im_end|>", wanted + "<|im_end|>"]


CALL = {"type": "function", "function": {"name": "look", "arguments": {"word": "é"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
TOOLED = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("content", [None, "", "Let me look."])
@pytest.mark.parametrize("more", [(), (("tool", "a bird"), ("assistant", "A bird."))])
def test_chat_counts_calls_of_tools(tokenizer, monkeypatch, content, more):
    monkeypatch.setattr(tokenizer, "chat_template", TOOLED)
    turns = ("user", "A heron?"), ("assistant", content, {"tool_calls": [CALL] * 2})
    example = encode(tokenizer, chat_of(*turns, *more, tools=TOOLS))
    call = '<call>{"name": "look", "arguments": {"word": "é"}}</call>'
    wanted = [(content or "") + call * 2 + "<|im_end|>"]
    wanted += ["A bird.<|im_end|>"] if more else []
    assert counted_texts(tokenizer, example) == wanted
    theirs = tokenizer.apply_chat_template(
        [
            {"role": role, "content": said, **dict(*others)}
            for role, said, *others in (*turns, *more)
        ],
        tools=TOOLS,
        return_dict=False,
    )
    assert example.ids.tolist() == theirs


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_chat_leaves_out_calls_that_the_template_does_not_write(
    tokenizer, train_on_prompts
):
    chat = chat_of(("user", "Q"), ("assistant", "Let me look.", {"tool_calls": [CALL]}))
    with pytest.raises(
        RecordError, match="does not write the calls of tools"
    ) as caught:
        encode(tokenizer, chat, train_on_prompts=train_on_prompts)
    assert caught.value.reason == "tool_calls_not_written"


def test_chat_names_the_keys_that_the_template_does_not_use(tokenizer, monkeypatch):
    named = CHATML.replace("{{ m.role }}", "{{ m.name or m.role }}")
    monkeypatch.setattr(tokenizer, "chat_template", named)
    renderer = ChatRenderer(tokenizer)
    chat = chat_of(("user", "Q", {"name": "Ann"}), ("assistant", "A"))
    assert renderer.chat(chat).unused_keys == ()
    others = {"reasoning_content": "hm", "mood": "good"}
    chat = chat_of(("user", "Q"), ("assistant", "A", others), tools=TOOLS)
    assert renderer.chat(chat).unused_keys == ("reasoning_content", "mood", "tools")
    # It changes what an answer is asked by, and so what counts of it.
    monkeypatch.setattr(tokenizer, "chat_template", REASONING)
    quiet = {"chat_template_kwargs": {"enable_thinking": False}}
    assert renderer.chat(chat_of(*TWO, **quiet)).unused_keys == ()


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_chat_does_not_count_answers_of_weight_0(tokenizer, train_on_prompts):
    chat = chat_of(
        ("user", "Say it."),
        ("assistant", "bad answer", {"weight": 0}),
        ("user", "Once more."),
        ("assistant", "good answer", {"weight": 1}),
        ("user", "And?"),
        ("assistant", "worse", {"weight": 0.0}),
    )
    example = encode(tokenizer, chat, train_on_prompts=train_on_prompts)
    counted = "".join(counted_texts(tokenizer, example))
    assert "good answer<|im_end|>" in counted
    assert "bad answer" not in counted
    assert "worse" not in counted
    if not train_on_prompts:
        assert counted == "good answer<|im_end|>"
    asked = tokenizer.decode(example.ids[: example.prompt].tolist())
    assert asked.rstrip().endswith("Once more.<|im_end|>\n<|im_start|>assistant")


def test_chat_of_weight_0_agrees_with_the_marks_of_a_template(tokenizer, monkeypatch):
    template = marked_template("chatml", "<|im_end|>")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    chat = chat_of(TWO[0], (*TWO[1], {"weight": 0}), *TWO[2:])
    assert counted_texts(tokenizer, encode(tokenizer, chat)) == ["Two<|im_end|>"]


def test_chat_puts_a_refused_system_turn_before_the_user_on_request(
    tokenizer, monkeypatch
):
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}"
        "{% endif %}" + CHATML
    )
    chat = chat_of(("system", "Be brief."), *TWO)
    plain = encode(tokenizer, chat, merge_system=True)
    np.testing.assert_array_equal(plain.ids, encode(tokenizer, chat).ids)
    monkeypatch.setattr(tokenizer, "chat_template", strict)
    with pytest.raises(RecordError, match="No system; --merge-system puts"):
        encode(tokenizer, chat)
    merged = encode(tokenizer, chat, merge_system=True)
    same = encode(tokenizer, chat_of(("user", "Be brief.\n\nQ?"), *TWO[1:]))
    np.testing.assert_array_equal(merged.ids, same.ids)
    np.testing.assert_array_equal(merged.counted, same.counted)


def test_chat_of_a_template_with_a_clock_has_the_date_that_is_given(
    tokenizer, monkeypatch
):
    clock = "{{ strftime_now('%d %B %Y') if strftime_now is defined }}\n" + CHATML
    monkeypatch.setattr(tokenizer, "chat_template", clock)
    chat = chat_of(*TWO)
    texts = {
        date: ChatRenderer(tokenizer, date=date).chat(chat).text
        for date in ("2026-01-31", "2027-02-01", "2026-01-31")
    }
    assert texts["2026-01-31"].startswith("31 January 2026\n")
    assert texts["2027-02-01"].startswith("01 February 2027\n")
    asked = ChatRenderer(tokenizer, date="2026-01-31").prompt(chat_of(*TWO[:3], TWO[3]))
    assert asked.text.startswith("31 January 2026\n")


@pytest.mark.parametrize("template", [REASONING, TAG, TOOLED, CHATML])
def test_template_renders_as_transformers_does(tokenizer, monkeypatch, template):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    messages = [
        {"role": "user", "content": "Größe 🙂 \ud83d", "name": None},
        {"role": "assistant", "content": " A\n", "thinking": "hm"},
        {"role": "user", "content": "\ue000"},
    ]
    cuts = [Cut(), Cut(1, True), Cut(2), Cut(3, True)]
    given = Conversation(messages, {"tools": TOOLS})
    ours = ChatTemplate(tokenizer).render(given, cuts)
    theirs = [
        tokenizer.apply_chat_template(
            messages[: cut.stop],
            tools=TOOLS,
            tokenize=False,
            add_generation_prompt=cut.generation,
        )
        for cut in cuts
    ]
    assert ours == theirs


def test_template_for_tools_is_taken_where_there_are_tools(tokenizer, monkeypatch):
    several = {"default": CHATML, "tool_use": TOOLED}
    monkeypatch.setattr(tokenizer, "chat_template", several)
    renderer = ChatRenderer(tokenizer)
    tooled = renderer.chat(chat_of(*TWO, tools=TOOLS))
    assert tooled.text.startswith('[{"type"')
    assert tooled.unused_keys == ()
    assert renderer.chat(chat_of(*TWO)).text.startswith("<|im_start|>user")


def test_prompt_is_what_comes_before_the_answer(styled_tokenizer):
    """In all five formats, so that none of them is taken for one that does not ask."""
    renderer = ChatRenderer(styled_tokenizer)
    asked = renderer.prompt(Chat((QUESTION,)))
    [example] = Encoder(styled_tokenizer).examples([asked])
    answered = encode(styled_tokenizer, Chat((QUESTION, ANSWER)))
    assert example.ids.tolist() == answered.ids[: answered.prompt].tolist()
    assert example.prompt == example.answer_end == len(example.ids)
    assert not example.counted.any()


def test_prompt_of_a_template_that_does_not_ask_is_refused(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    template = tokenizer.chat_template
    tokenizer.chat_template = template[: template.index("{% if add_generation_prompt")]
    with pytest.raises(DataError, match=r"begins an answer with '<|im_start|>assist"):
        ChatRenderer(tokenizer).prompt(Chat((QUESTION,)))
