"""Prompts of files: encoded as training would have them."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from taid_jax.train.prompts import Prompt, encode_prompts


@pytest.fixture
def tokenizer():
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "hi": 3, "user": 4}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def encode(tokenizer, text):
    [found] = encode_prompts([Prompt(0, "here", None, text)], tokenizer)
    return found.ids


@pytest.mark.parametrize("text", ["hi", "<s>hi", "<s> hi", "<s><s>hi"])
def test_encode_prompts_begins_with_one_start_token(tokenizer, text):
    assert encode(tokenizer, text) == [0, 3]
    # What begins with it was rendered before, and is no turn of a chat.
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }} user"
    assert encode(tokenizer, text) == ([0, 3, 4] if text == "hi" else [0, 3])


def test_encode_prompts_adds_no_start_token_to_a_template_without(tokenizer):
    tokenizer.chat_template = "{{ messages[0]['content'] }} user"
    assert encode(tokenizer, "hi") == [3, 4]
