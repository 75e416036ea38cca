"""Tokenizers: from folders and GGUF files, saved, compared by what ids mean."""

import contextlib
import json

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from taid_jax.models.errors import ModelError
from taid_jax.models.gguf_header import read_header
from taid_jax.models.tokenizer import (
    choose_pad_token,
    gguf_tokenizer,
    load_tokenizer,
    same_tokenizer,
    save_tokenizer,
    special_ids,
)

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BPE_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *ALPHABET,
    "th",
    "the",
    "Ġt",
    "Ġthe",
    "lo",
    "<tool>",
]
BPE_MERGES = ["t h", "th e", "Ġ t", "Ġ the", "l o"]
TYPE = gguf.TokenType


def byte_pairs(writer):
    """A byte-level vocabulary as llama.cpp keeps it."""
    special = [TYPE.CONTROL] * 3
    plain = [TYPE.NORMAL] * (len(BPE_TOKENS) - 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(BPE_TOKENS)
    writer.add_token_types([*special, *plain, TYPE.USER_DEFINED])
    writer.add_token_merges(BPE_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def sentence_pieces(writer):
    """A sentencepiece vocabulary as llama.cpp keeps it."""
    pieces = ["▁", "t", "h", "e", "▁t", "he", "▁the", "l", "o", "lo"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [TYPE.UNKNOWN, TYPE.CONTROL, TYPE.CONTROL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_token_types([*kinds, *[TYPE.BYTE] * 256, *[TYPE.NORMAL] * len(pieces)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def make_tokenizer(tokens=("a", "b", "ab"), **options):
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=tokens[0]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


@pytest.mark.parametrize("tokens", [byte_pairs, sentence_pieces])
def test_load_tokenizer_gives_the_ids_of_transformers_from_gguf(
    tmp_path, write_gguf, varied_strings, tokens
):
    pytest.importorskip("torch", reason="transformers reads GGUF with PyTorch only")
    write_gguf(tmp_path / "m.gguf", tokens=tokens)
    ours = load_tokenizer(tmp_path / "m.gguf")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in varied_strings:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert special_ids(choose_pad_token(theirs)) == special_ids(ours)
    assert ours.chat_template == theirs.chat_template


def test_load_tokenizer_reads_vocabulary_and_template_from_gguf(tmp_path, write_gguf):
    write_gguf(tmp_path / "m.gguf", tokens=byte_pairs)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.convert_ids_to_tokens(list(range(3))) == BPE_TOKENS[:3]
    ids = tokenizer("the<|im_end|>lo the")["input_ids"]
    names = ["the", "<|im_end|>", "lo", "Ġthe"]
    assert tokenizer.convert_ids_to_tokens(ids) == names
    messages = [{"role": "user", "content": "lo"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "[user] lo"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_load_tokenizer_begins_with_bos_where_llama_cpp_does(tmp_path, write_gguf):
    write_gguf(tmp_path / "m.gguf", tokens=sentence_pieces)
    assert load_tokenizer(tmp_path / "m.gguf")("the")["input_ids"][0] == 1


def test_load_tokenizer_leaves_out_what_fills_a_padded_vocabulary(tmp_path, write_gguf):
    def padded(writer):
        count = len(BPE_TOKENS)
        fill = [f"[PAD{index}]" for index in range(count, count + 7)]
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([*BPE_TOKENS, *fill])
        writer.add_token_types([TYPE.NORMAL] * count + [TYPE.UNUSED] * 7)
        writer.add_token_merges(BPE_MERGES)

    write_gguf(tmp_path / "m.gguf", tokens=padded)
    tokens = load_tokenizer(tmp_path / "m.gguf").get_vocab()
    assert max(tokens.values()) == len(BPE_TOKENS) - 1
    assert not any(token.startswith("[PAD") for token in tokens)


@pytest.mark.parametrize("key", ["bos", "eos", "unk", "pad"])
@pytest.mark.parametrize("number", [-1, 10**6, "1"])
def test_gguf_tokenizer_refuses_special_ids_outside_the_vocabulary(key, number):
    name = {"unk": "unknown", "pad": "padding"}.get(key, key)
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
        f"tokenizer.ggml.{name}_token_id": number,
    }
    with pytest.raises(ModelError, match=f"the {key} token .* outside its vocabulary"):
        gguf_tokenizer(metadata, "file")


def test_gguf_tokenizer_refuses_an_unknown_kind():
    metadata = {"tokenizer.ggml.model": "morse", "tokenizer.ggml.tokens": ["."]}
    with pytest.raises(ModelError, match="morse"):
        gguf_tokenizer(metadata, "file")


def test_gguf_tokenizer_is_none_without_vocabulary(tmp_path, write_gguf):
    write_gguf(tmp_path / "m.gguf")
    assert gguf_tokenizer(read_header(tmp_path / "m.gguf").metadata, "file") is None
    with pytest.raises(ModelError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "m.gguf")


def test_load_tokenizer_says_when_a_folder_has_none(golden_teacher):
    with pytest.raises(ModelError, match=r"has no tokenizer \(need tokenizer\.json"):
        load_tokenizer(golden_teacher)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "BPE"}}'])
def test_load_tokenizer_refuses_a_broken_file(tmp_path, content):
    save_tokenizer(make_tokenizer(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_never_runs_code_of_the_folder(tmp_path):
    save_tokenizer(make_tokenizer(eos_token="b"), tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    values["tokenizer_class"] = "Evil"
    path.write_text(json.dumps(values))
    (tmp_path / "evil.py").write_text("raise SystemExit('code was run')")
    # Whether it is read without that class or refused is transformers' decision.
    with contextlib.suppress(ModelError):
        load_tokenizer(tmp_path)


def test_save_tokenizer_is_read_back_with_template_and_special_tokens(
    tmp_path, write_gguf, varied_strings
):
    write_gguf(tmp_path / "m.gguf", tokens=byte_pairs)
    before = load_tokenizer(tmp_path / "m.gguf")
    save_tokenizer(before, tmp_path)
    after = load_tokenizer(tmp_path)
    same_tokenizer(before, after)
    for text in varied_strings:
        assert before(text)["input_ids"] == after(text)["input_ids"], repr(text)
    assert after.chat_template == before.chat_template == TEMPLATE
    assert special_ids(after) == special_ids(before)
    # The name that transformers 4 knows.
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert values["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_choose_pad_token_takes_the_end_token_only_where_there_is_none():
    assert choose_pad_token(make_tokenizer(eos_token="b")).pad_token_id == 1
    given = make_tokenizer(eos_token="b", pad_token="a")
    assert choose_pad_token(given).pad_token_id == 0


def test_choose_pad_token_adds_no_token():
    tokenizer = make_tokenizer(eos_token="b")
    before = tokenizer.get_vocab()
    assert choose_pad_token(tokenizer).get_vocab() == before


def test_same_tokenizer_accepts_the_same_ids():
    same_tokenizer(make_tokenizer(), make_tokenizer(eos_token="b"))


def test_same_tokenizer_tells_equal_sizes_with_other_ids():
    with pytest.raises(ModelError) as caught:
        same_tokenizer(make_tokenizer(("a", "b", "c")), make_tokenizer(("a", "c", "b")))
    text = str(caught.value)
    assert "(3 tokens) and student (3 tokens) differ in 2 ids" in text
    assert "1 is 'b' and 'c'; 2 is 'c' and 'b'" in text


def test_same_tokenizer_tells_other_sizes_and_added_tokens():
    longer = make_tokenizer()
    longer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"differ in 1 ids: 3 is None and '<new>'"):
        same_tokenizer(make_tokenizer(), longer)
