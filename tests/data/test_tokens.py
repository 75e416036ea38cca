"""Text to ids: start and end tokens, and windows that predict every token once."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import Chat
from taid_jax.data.errors import DataError
from taid_jax.data.tokens import Encoder, Example, Rendered, Span, cut_windows


def example_of(length):
    counted = np.ones(length, np.bool_)
    counted[:1] = False
    return Example(np.arange(length, dtype=np.int32), counted)


@given(st.integers(2, 200), st.integers(2, 40))
def test_cut_windows_counts_every_token_once(tokens, length):
    times = np.zeros(tokens, int)
    for ids, counted, *_ in cut_windows(example_of(tokens), length):
        assert 2 <= len(ids) <= length
        assert not counted[0]
        np.testing.assert_array_equal(np.diff(ids), 1)  # the text as it stands
        np.add.at(times, ids[counted], 1)
    assert times[0] == 0  # nothing comes before the very first
    assert (times[1:] == 1).all()


def test_cut_windows_asks_for_the_second_half():
    windows = list(cut_windows(example_of(10), 5))
    assert [(w.prompt, w.answer_end) for w in windows] == [(2, 5), (2, 5), (1, 2)]
    [window] = cut_windows(example_of(5), 5)
    np.testing.assert_array_equal(window.ids, np.arange(5))


def test_cut_windows_leaves_the_text_as_it_was():
    example = example_of(9)
    list(cut_windows(example, 4))
    assert example.counted.sum() == 8


def test_encoder_frames_text_with_the_tokenizers_own_tokens(styled_tokenizer):
    encoder = Encoder(styled_tokenizer)
    [example] = encoder.examples([Rendered("The cat", counts_all=True, framed=True)])
    plain = styled_tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert example.ids.tolist() == [*plain, styled_tokenizer.eos_token_id]
    assert example.counted.tolist() == [False] + [True] * len(plain)


@pytest.fixture
def llama(tokenizers):
    """A tokenizer that begins texts with <s>."""
    from tokenizers.processors import TemplateProcessing

    llama = copy.deepcopy(tokenizers["llama2"])
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", llama.bos_token_id)]
    )
    return llama


def test_encoder_adds_the_start_token_where_the_tokenizer_does(llama):
    rendered = Rendered("The cat", (Span(3, 7),), framed=True)
    [example] = Encoder(llama).examples([rendered])
    assert example.ids[0] == llama.bos_token_id
    assert example.ids[-1] == llama.eos_token_id
    assert llama.decode(example.ids[example.counted].tolist()).endswith("cat</s>")
    assert not example.counted[:2].any()
    assert example.prompt == np.flatnonzero(example.counted)[0]
    assert example.answer_end == len(example.ids)


@pytest.mark.parametrize("framed", [True, False])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_encoder_has_the_start_token_of_a_text_once(llama, times, framed):
    # A text of the data, or of a template that writes it before a text that has it.
    prompt, answer = "<s>" * times + "[INST] hi [/INST]", " hello</s>"
    text = prompt + answer
    spans = (Span(len(prompt), len(text)),)
    [plain, asked] = Encoder(llama).examples(
        [
            Rendered(text, counts_all=True, framed=framed),
            Rendered(text, spans, framed=framed),
        ]
    )
    for example in (plain, asked):
        ids = example.ids.tolist()
        assert ids[0] == llama.bos_token_id
        assert ids.count(llama.bos_token_id) == 1
        assert ids.count(llama.eos_token_id) == 1
        assert llama.decode(ids) == llama.decode(plain.ids.tolist())
    assert asked.answer_end == len(asked.ids)
    assert llama.decode(asked.ids[asked.prompt :]).strip() == "hello</s>"
    np.testing.assert_array_equal(
        np.flatnonzero(asked.counted), np.arange(asked.prompt, asked.answer_end)
    )


@pytest.mark.parametrize("train_on_prompts", [True, False])
def test_encoder_of_a_prompt_that_was_rendered_before(llama, train_on_prompts):
    content = Chat.pair("<s>[INST] hi [/INST]", " hello</s>")
    item = ChatRenderer(llama, train_on_prompts=train_on_prompts).chat(content)
    [example] = Encoder(llama).examples([item])
    text = llama.decode(example.ids.tolist())
    assert text.replace("<s> ", "<s>") == "<s>[INST] hi [/INST] hello</s>"
    assert llama.decode(example.ids[example.prompt :]).strip() == "hello</s>"


def test_encoder_leaves_start_tokens_to_a_tokenizer_that_adds_none(tokenizers):
    [example] = Encoder(tokenizers["llama2"]).examples(
        [Rendered("<s><s>hi", framed=True)]
    )
    assert example.ids.tolist().count(tokenizers["llama2"].bos_token_id) == 2


def test_encoder_keeps_a_text_of_start_and_end_tokens_alone(llama):
    [example] = Encoder(llama).examples([Rendered("<s><s></s></s>", framed=True)])
    assert example.ids.tolist() == [llama.bos_token_id, llama.eos_token_id]


@pytest.mark.parametrize("text", ["on<|im_end|>", "on<|im_end|><|im_end|><|im_end|>"])
def test_encoder_does_not_double_the_end_token(tokenizer, text):
    [example] = Encoder(tokenizer).examples([Rendered(text, framed=True)])
    assert example.ids.tolist().count(tokenizer.eos_token_id) == 1


class Mangling:
    """A tokenizer that joins across borders and cannot be read back."""

    bos_token_id = eos_token_id = pad_token_id = chat_template = None

    def __call__(self, text, **options):
        return {"input_ids": [[sum(map(ord, x))] for x in text]}

    def apply_chat_template(self, conversation, **options):
        raise NotImplementedError

    def decode(self, token_ids, **options):
        return "?"

    def get_added_vocab(self):
        return {}


def test_encoder_refuses_answers_it_cannot_prove():
    [problem] = Encoder(Mangling()).examples([Rendered("ab", (Span(1, 2),))])
    assert isinstance(problem, DataError)
    assert "crosses the border" in str(problem)


@pytest.mark.parametrize(
    ("pad", "end", "used"), [(7, 3, 7), (None, 3, 3), (None,) * 2 + (0,)]
)
def test_encoder_pads_with_what_there_is(pad, end, used):
    tokenizer = Mangling()
    tokenizer.pad_token_id, tokenizer.eos_token_id = pad, end
    assert Encoder(tokenizer).pad_id == used


def test_encoder_is_quiet_about_long_text(tokenizer, capfd):
    tokenizer.model_max_length, saved = 8, tokenizer.model_max_length
    try:
        Encoder(tokenizer).ids(["The cat sat on the mat. " * 50])
    finally:
        tokenizer.model_max_length = saved
    assert capfd.readouterr().err == ""
