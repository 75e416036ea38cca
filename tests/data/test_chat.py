"""Answers of conversations: exactly their tokens count, in five formats."""

import numpy as np
import pytest

from taid_jax.data.chat import ChatRenderer, MissingTemplateError
from taid_jax.data.documents import Chat, Completion, Message, parse_record
from taid_jax.data.encoding import Encoder, Rendered
from taid_jax.data.errors import DataError, RecordError

QUESTION = Message("user", "Whether?")
ANSWER = Message("assistant", "that is all.")


def encode(tokenizer, content, *, count_prompts=False):
    renderer = ChatRenderer(tokenizer, count_prompts=count_prompts)
    chat = isinstance(content, Chat)
    item = renderer.chat(content) if chat else renderer.completion(content)
    [example] = Encoder(tokenizer).examples([item])
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


def test_chat_counts_exactly_the_answers(
    style, styled_tokenizer, turn_end, make_conversations
):
    conversations = make_conversations(200)
    for messages in conversations:
        chat = parse_record({"messages": messages})
        example = encode(styled_tokenizer, chat)
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if style in ("llama2", "llama3"):
            answers = [answer.strip() for answer in answers]  # these templates trim
        found = counted_texts(styled_tokenizer, example)
        assert all(text.endswith(turn_end) for text in found)
        found = [text.removesuffix(turn_end) for text in found]
        if style == "llama2":
            found = [text.strip(" ") for text in found]  # a space round the answer
        assert found == answers


@pytest.mark.parametrize("count_prompts", [False, True])
def test_chat_prompt_is_all_that_comes_before_the_last_answer(
    styled_tokenizer, make_conversations, count_prompts
):
    # White space at an answer's start may share a token with the prompt's end.
    for messages in make_conversations(50, edges=("",)):
        chat = parse_record({"messages": messages})
        example = encode(styled_tokenizer, chat, count_prompts=count_prompts)
        asked = styled_tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        found = styled_tokenizer.decode(
            example.ids[: example.prompt].tolist(), clean_up_tokenization_spaces=False
        )
        assert found.rstrip(" ") == asked.rstrip(" ")


@pytest.mark.parametrize("count_prompts", [False, True])
def test_completion_prompt_of_a_base_model_is_the_prompt(base_tokenizer, count_prompts):
    content = Completion("Whether?", " that is all.")
    example = encode(base_tokenizer, content, count_prompts=count_prompts)
    assert base_tokenizer.decode(example.ids[: example.prompt]) == "Whether?"


def test_chat_keeps_the_ids_of_the_whole_text(styled_tokenizer, make_conversations):
    for messages in make_conversations(50, edges=[""]):
        example = encode(styled_tokenizer, parse_record({"messages": messages}))
        whole = styled_tokenizer.apply_chat_template(messages, return_dict=False)
        assert example.ids.tolist() == whole


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


def test_chat_tells_answers_apart_from_equal_prompts(tokenizer):
    echo = Message("user", ANSWER.content)
    example = encode(tokenizer, Chat((echo, ANSWER, echo, ANSWER)))
    assert counted_texts(tokenizer, example) == ["that is all.<|im_end|>"] * 2


def test_chat_counts_everything_but_the_first_token_on_request(styled_tokenizer):
    chat = Chat((QUESTION, ANSWER))
    example = encode(styled_tokenizer, chat, count_prompts=True)
    assert not example.counted[0]
    assert example.counted[1:].all()
    plain = styled_tokenizer.apply_chat_template(
        [message._asdict() for message in chat.messages], return_dict=False
    )
    assert example.ids.tolist() == plain


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


def test_chat_counts_exactly_what_the_template_marks(
    style, styled_tokenizer, turn_end, make_conversations, monkeypatch
):
    """The masks of transformers alone count a token of which one character is."""
    template = marked_template(style, turn_end)
    monkeypatch.setattr(styled_tokenizer, "chat_template", template)
    for messages in make_conversations(200):
        example = encode(styled_tokenizer, parse_record({"messages": messages}))
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        if style in ("llama2", "llama3"):
            answers = [answer.strip() for answer in answers]
        found = counted_texts(styled_tokenizer, example)
        assert all(text.endswith(turn_end) for text in found)
        found = [text.removesuffix(turn_end) for text in found]
        if style == "llama2":
            found = [text.strip(" ") for text in found]
        assert found == answers
        last = example.ids[example.prompt : example.answer_end]
        assert example.counted[example.prompt : example.answer_end].all()
        assert styled_tokenizer.decode(last.tolist()).endswith(turn_end)


def test_chat_finds_marks_in_a_conversation_with_private_characters(
    tokenizer, monkeypatch
):
    template = marked_template("chatml", "<|im_end|>")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    answer = Message("assistant", "\ue000that\ue001 is all.\ue002")
    example = encode(tokenizer, Chat((QUESTION, answer)))
    [found] = counted_texts(tokenizer, example)
    assert found == answer.content + "<|im_end|>"


def test_chat_uses_the_marks_of_the_template(tokenizer, monkeypatch):
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", marked)
    chat = Chat((QUESTION, ANSWER, QUESTION, ANSWER))
    example = encode(tokenizer, chat)
    assert counted_texts(tokenizer, example) == ["that is all."] * 2
    last = example.ids[example.prompt : example.answer_end].tolist()
    assert tokenizer.decode(last) == "that is all."
    everything = encode(tokenizer, chat, count_prompts=True)
    assert everything.counted[1:].all()
    assert everything[2:] == example[2:]


@pytest.mark.parametrize("count_prompts", [False, True])
def test_chat_leaves_out_answers_that_nothing_ends(
    tokenizer, monkeypatch, count_prompts
):
    """The header of the next turn is no end: a model would go on by itself."""
    bare = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] "
        "+ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", bare)
    chat = Chat((QUESTION, ANSWER, QUESTION, ANSWER))
    with pytest.raises(RecordError, match="nothing that ends the answer in turn") as e:
        encode(tokenizer, chat, count_prompts=count_prompts)
    assert e.value.reason == "no_end"


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
    everything = encode(tokenizer, chat, count_prompts=True)  # needs no answers
    assert (everything.prompt, everything.answer_end) == (0, 0)


@pytest.mark.parametrize("role", ["system", "tool"])
@pytest.mark.parametrize("count_prompts", [False, True])
def test_chat_refuses_a_turn_that_the_template_leaves_out(
    tokenizer, monkeypatch, role, count_prompts
):
    """No error of the template tells it: the turn would be missing, no more."""
    silent = (
        "{% for m in messages if m['role'] in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", silent)
    encode(tokenizer, Chat((QUESTION, ANSWER)), count_prompts=count_prompts)
    chat = Chat((QUESTION, ANSWER, Message(role, "22 degrees"), QUESTION, ANSWER))
    with pytest.raises(RecordError, match=rf"does not write turn 3 \({role}\)") as e:
        encode(tokenizer, chat, count_prompts=count_prompts)
    assert e.value.reason == "unknown_role"


@pytest.mark.parametrize("count_prompts", [False, True])
def test_chat_knows_where_the_last_answer_is(
    style, styled_tokenizer, make_conversations, count_prompts
):
    """The prompt is what generation is given, the answer what it should write."""
    for messages in make_conversations(40, edges=[""]):
        content = parse_record({"messages": messages})
        example = encode(styled_tokenizer, content, count_prompts=count_prompts)
        asked = styled_tokenizer.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert example.ids[: example.prompt].tolist() == asked
        counted = encode(styled_tokenizer, content).counted
        assert counted[example.prompt : example.answer_end].all()
        assert not counted[example.answer_end :].any()


def test_chat_with_prompts_gives_a_crossing_token_to_the_answer(tokenizer):
    answer = Message("assistant", "\n\nmoves")
    example = encode(tokenizer, Chat((QUESTION, answer)), count_prompts=True)
    text = tokenizer.decode(example.ids[: example.prompt].tolist())
    assert text.endswith("<|im_start|>assistant")  # its line end is in the next token
    assert example.answer_end == len(example.ids) - 1  # a line end after the turn


def test_chat_says_how_to_give_a_template(base_tokenizer):
    with pytest.raises(MissingTemplateError, match=r"--chat-template FILE.*\.jinja"):
        encode(base_tokenizer, Chat((QUESTION, ANSWER)))


def test_chat_reports_what_the_template_refuses(tokenizers):
    chat = Chat((QUESTION, QUESTION, ANSWER))
    with pytest.raises(DataError, match="roles must alternate"):
        encode(tokenizers["llama2"], chat)


def test_completion_becomes_two_turns_with_a_template(styled_tokenizer):
    completion = Completion(QUESTION.content, ANSWER.content)
    example = encode(styled_tokenizer, completion)
    chat = encode(styled_tokenizer, Chat((QUESTION, ANSWER)))
    np.testing.assert_array_equal(example.ids, chat.ids)
    np.testing.assert_array_equal(example.counted, chat.counted)


def test_completion_is_joined_without_a_template(base_tokenizer):
    completion = Completion("The cat", " sat on the mat")
    example = encode(base_tokenizer, completion)
    assert counted_texts(base_tokenizer, example) == [" sat on the mat<|im_end|>"]
    assert base_tokenizer.decode(example.ids.tolist()).startswith("The cat sat")
    everything = encode(base_tokenizer, completion, count_prompts=True)
    assert everything.counted[1:].all()
    np.testing.assert_array_equal(everything.ids, example.ids)


def test_completion_that_shares_a_token_with_its_prompt_is_cut_there(base_tokenizer):
    """`tea` + `cher` are one token in the whole, two where generation starts."""
    [whole] = Encoder(base_tokenizer).ids(["the teacher"])
    [prompt] = Encoder(base_tokenizer).ids(["the tea"])
    assert whole[: len(prompt)] != prompt
    example = encode(base_tokenizer, Completion("the tea", "cher"))
    assert example.ids[: len(prompt)].tolist() == prompt
    assert counted_texts(base_tokenizer, example) == ["cher<|im_end|>"]


def test_rendered_text_is_what_the_template_writes(tokenizer):
    item = ChatRenderer(tokenizer, count_prompts=False).chat(Chat((QUESTION, ANSWER)))
    assert isinstance(item, Rendered)
    start, stop = item.answers[0]
    assert item.text[start:stop] == "that is all.<|im_end|>"
