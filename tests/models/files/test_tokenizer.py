"""Tokenizers: from folders and GGUF files, saved, compared by what ids mean."""

import contextlib
import io
import json

import gguf
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from taid_jax.data.errors import DataError
from taid_jax.data.tokens import Encoder
from taid_jax.errors import ModelError
from taid_jax.models.files.gguf_tokenizer import SPLITTINGS
from taid_jax.models.files.tokenizer import (
    choose_pad_token,
    gguf_tokenizer,
    load_tokenizer,
    read_folder_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_notes,
)
from taid_jax.models.files.vocabulary import (
    own_tokenizer,
    same_tokenizer,
    translate_ids,
)
from taid_jax.probes import EDGES, TEXTS

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


def trained(pre, special=("<|begin|>", "<|im_end|>")):
    """A byte-level tokenizer as a model's tokenizer.json has it, cut by a rule."""
    rule = SPLITTINGS[pre]
    backend = Backend(models.BPE(ignore_merges=rule.whole))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in rule.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "The cat  sat on 2024 mats,\n\ndon't you know?  caf\u00e9   \u6771\u4eac  1"
    ]
    backend.train_from_iterator(texts * 5 + ["2024 2024\n\n\n   end"] * 5, trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[0], eos_token=special[1]
    )


def as_gguf(tokenizer, pre=None, **changes):
    """The same tokenizer as llama.cpp's converter writes it down."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = [int(TYPE.NORMAL)] * len(tokens)
    for added in rules["added_tokens"]:
        kind = TYPE.CONTROL if added["special"] else TYPE.USER_DEFINED
        kinds[added["id"]] = int(kind)
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": kinds,
        "merges": [" ".join(merge) for merge in rules["model"]["merges"]],
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "add_bos_token": False,
    } | changes
    named = {f"tokenizer.ggml.{k}": v for k, v in found.items() if v is not None}
    return named | {"general.architecture": "llama"}


def encode(tokenizer, texts=(*TEXTS, *EDGES)):
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bos_token_id": -1}, "the bos token .* outside its vocabulary"),
        ({"unknown_token_id": 10**6}, "the unk token .* outside its vocabulary"),
        ({"padding_token_id": "1"}, "the pad token .* outside its vocabulary"),
        ({"model": "morse"}, "morse"),
        ({"pre": "klingon"}, r"pre is .*Hugging Face folder.*llama-bpe"),
        ({"pre": 7}, r"pre is .*Hugging Face folder.*llama-bpe"),
        ({"tokens": ["a", "b", "a"]}, "id 0 is 'a' there and would be None"),
    ],
)
def test_gguf_tokenizer_refuses_what_it_cannot_follow(changes, words):
    tokenizer = make_tokenizer(("a", "b", "c"))
    metadata = as_gguf(tokenizer, **({"pre": "gpt-2"} | changes))
    with pytest.raises(ModelError, match=words):
        gguf_tokenizer(metadata, "file")


def test_load_tokenizer_says_when_there_is_none(tmp_path, write_gguf, golden_teacher):
    write_gguf(tmp_path / "m.gguf")
    for source in (tmp_path / "m.gguf", golden_teacher):
        with pytest.raises(
            ModelError, match=r"has no tokenizer \(need tokenizer\.json"
        ):
            load_tokenizer(source)


@pytest.mark.parametrize("content", ["", "[]", '{"model": {"type": "BPE"}}'])
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


def test_same_tokenizer_tells_other_ids_and_added_tokens():
    with pytest.raises(ModelError) as caught:
        same_tokenizer(make_tokenizer(("a", "b", "c")), make_tokenizer(("a", "c", "b")))
    text = str(caught.value)
    assert "(3 tokens) and student (3 tokens) differ in 2 ids" in text
    assert "1 is 'b' and 'c'; 2 is 'c' and 'b'" in text
    longer = make_tokenizer()
    longer.add_tokens(["<new>"])
    with pytest.raises(ModelError, match=r"differ in 1 ids: 3 is None and '<new>'"):
        same_tokenizer(make_tokenizer(), longer)


def test_same_tokenizer_takes_the_same_one_from_gguf_and_names_another_rule(caplog):
    # Of each its own text: digits, line ends, and NFC.
    for pre in ("llama-bpe", "qwen2", "smollm", "gpt-2", "deepseek-v3"):
        ours = trained(pre)
        theirs = gguf_tokenizer(as_gguf(ours, pre), "file")
        same_tokenizer(ours, theirs)
        assert encode(ours) == encode(theirs)
        assert tokenizer_notes(theirs) == ()
        for other in ("llama-bpe", "qwen2", "smollm", "gpt-2"):
            if other != pre:
                cut = gguf_tokenizer(as_gguf(ours, other), "file")
                with pytest.raises(ModelError, match=r"cut text in other ways.*first"):
                    same_tokenizer(ours, cut)
    assert not caplog.records


def test_splittings_are_those_of_transformers_where_it_has_them():
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs

    def cut(patterns, text):
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
        return pre_tokenizers.Sequence(splits).pre_tokenize_str(text)

    assert theirs.GGUF_PRE_TOKENIZER_SPLITS.keys() <= SPLITTINGS.keys()
    for name, pattern in theirs.GGUF_PRE_TOKENIZER_SPLITS.items():
        for text in (*TEXTS, *EDGES):
            assert cut([pattern], text) == cut(SPLITTINGS[name].patterns, text), name
    gpt2, digits = pre_tokenizers.ByteLevel(False), pre_tokenizers.Digits(True)
    for name, rule in (("gpt-2", gpt2), ("smollm", None)):
        rule = rule or pre_tokenizers.Sequence([digits, gpt2])
        for text in (*TEXTS, *EDGES):
            places = [place for _, place in rule.pre_tokenize_str(text)]
            mine = [place for _, place in cut(SPLITTINGS[name].patterns, text)]
            assert places == mine, (name, text)


@pytest.mark.parametrize("pre", [None, "", "default"])
def test_load_tokenizer_warns_where_the_file_does_not_say_how_to_cut(
    pre, tmp_path, write_gguf, caplog
):
    def unsaid(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(BPE_TOKENS)
        writer.add_token_merges(BPE_MERGES)
        if pre is not None:
            writer.add_tokenizer_pre(pre)

    write_gguf(tmp_path / "m.gguf", tokens=unsaid)
    found = load_tokenizer(tmp_path / "m.gguf")
    [record] = caplog.records
    assert record.name == "taid_jax"
    assert (record.message,) == tokenizer_notes(found)
    assert "how its tokenizer cuts text (tokenizer.ggml.pre)" in record.message


@pytest.mark.parametrize(
    "special", [("<s>", "</s>"), ("<\uff5cbegin\uff5c>", "<\uff5cend\u2581of\uff5c>")]
)
def test_gguf_tokenizer_has_the_tokens_of_the_file_and_no_others(special):
    ours = trained("deepseek-v3", special)
    theirs = gguf_tokenizer(as_gguf(ours, "deepseek-v3"), "file")
    assert theirs.get_vocab() == ours.get_vocab()
    assert special_ids(theirs) == special_ids(choose_pad_token(ours))
    text = f"The{special[0]}cat<think>sat {special[1]}"
    assert encode(theirs, [text]) == encode(ours, [text])
    assert ours.bos_token_id in encode(theirs, [text])[0]


def test_gguf_tokenizer_has_no_token_that_a_class_of_transformers_adds():
    pieces = [
        "<nul>",
        "<a>",
        "<b>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "t",
    ]
    kinds = [TYPE.CONTROL] * 3 + [TYPE.BYTE] * 256 + [TYPE.NORMAL] * 2
    metadata = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.scores": [0.0] * len(pieces),
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_tokenizer(metadata, "file")
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(pieces)))
    assert tokenizer("t\n")["input_ids"] == [259, 260, 3 + 10]


def test_gguf_tokenizer_puts_no_space_before_a_text_where_the_file_says_so(
    tmp_path, write_gguf
):
    def bare(writer):
        sentence_pieces(writer)
        writer.add_add_space_prefix(False)

    write_gguf(tmp_path / "m.gguf", tokens=bare)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    ids = tokenizer("the", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["t", "he"]
    assert tokenizer.decode(ids) == "the"
    assert tokenizer.decode(encode(tokenizer, [" the"])[0]) == " the"


def test_gguf_tokenizer_begins_with_bos_where_its_rule_does():
    ours = trained("llama-bpe")
    metadata = as_gguf(ours, "llama-bpe", add_bos_token=None)
    assert gguf_tokenizer(metadata, "file")("a")["input_ids"][0] == ours.bos_token_id
    metadata = as_gguf(ours, "qwen2", add_bos_token=None)
    assert gguf_tokenizer(metadata, "file")("a")["input_ids"] == encode(ours, ["a"])[0]


def test_same_tokenizer_tells_merges_and_normaliser_of_equal_vocabularies():
    def merging(merges, normalizer=None):
        tokens = [*ALPHABET, "th", "he", "the"]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if normalizer is not None:
            backend.normalizer = normalizer
        return PreTrainedTokenizerFast(tokenizer_object=backend)

    merges = [("t", "h"), ("h", "e"), ("th", "e")]
    ours = merging(merges)
    same_tokenizer(ours, merging(merges))
    for theirs in (merging(merges[:2]), merging([merges[n] for n in (1, 0, 2)])):
        with pytest.raises(ModelError, match="splitting, merges or normaliser"):
            same_tokenizer(ours, theirs)
    with pytest.raises(ModelError, match=r"after \d+ tokens"):
        same_tokenizer(ours, merging(merges, normalizers.NFC()))


def spaced(**options):
    """Two ways to put a space before a text: at its beginning, or of each piece."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "\u2581",
        "t",
        "h",
        "e",
        "\u2581t",
        "he",
        "\u2581the",
    ]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he")]
    backend = Backend(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if options.pop("each"):
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first", split=False
        )
    special = [AddedToken(t, normalized=False, special=True) for t in pieces[:3]]
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )


def test_same_tokenizer_only_warns_of_how_a_text_begins(caplog):
    same_tokenizer(spaced(each=True), spaced(each=False))
    [record] = caplog.records
    assert "differ in how a text begins" in record.message


def write_class(folder, tokenizer, name, **changes):
    save_tokenizer(tokenizer, folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text()) | {"tokenizer_class": name} | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return Backend.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2Tokenizer"])
def test_read_folder_tokenizer_follows_the_file_and_says_so(tmp_path, name):
    file = write_class(tmp_path, spaced(each=True, padding_side="left"), name)
    tokenizer = read_folder_tokenizer(tmp_path)
    [note] = tokenizer_notes(tokenizer)
    assert f"the class {name} of transformers gives other" in note
    for text in (*TEXTS, *EDGES, "<s>the</s> the"):
        assert encode(tokenizer, [text])[0] == file.encode(text).ids
    assert tokenizer.get_vocab() == file.get_vocab()
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.padding_side == "left"
    save_tokenizer(tokenizer, tmp_path / "again")
    again = read_folder_tokenizer(tmp_path / "again")
    assert tokenizer_notes(again) == ()
    assert encode(again) == encode(tokenizer)


def test_read_folder_tokenizer_follows_the_files_start_token(tmp_path):
    ours = spaced(each=False)
    ours.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    write_class(tmp_path, ours, "LlamaTokenizer")
    assert read_folder_tokenizer(tmp_path)("the")["input_ids"] == [1, 9]


def test_read_folder_tokenizer_says_nothing_where_the_class_agrees(tmp_path):
    LlamaTokenizer().save_pretrained(tmp_path)
    tokenizer = read_folder_tokenizer(tmp_path)
    assert tokenizer_notes(tokenizer) == ()
    assert type(tokenizer) is LlamaTokenizer


def test_tokenizers_that_cannot_encode_a_text_say_so(tmp_path):
    backend = Backend(models.WordLevel({"a": 0, "b": 1}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    other = Backend.from_str(backend.to_str())
    other.normalizer = normalizers.NFC()
    pair = [PreTrainedTokenizerFast(tokenizer_object=each) for each in (backend, other)]
    with pytest.raises(ModelError, match="cannot encode every text: WordLevel error"):
        same_tokenizer(*pair)
    with pytest.raises(DataError, match="a text of the data: WordLevel error"):
        Encoder(pair[0]).ids(["a b", "c"])
    # A class that builds one without a token for what it does not know.
    plain = Backend(models.BPE({sign: n for n, sign in enumerate(ALPHABET)}, []))
    plain = PreTrainedTokenizerFast(tokenizer_object=plain)
    write_class(tmp_path, plain, "BertTokenizer")
    with pytest.raises(ModelError, match="cannot encode every text: WordPiece error"):
        load_tokenizer(tmp_path)


def write_pieces(folder, **options):
    reason = "sentencepiece makes the model, and this environment has none"
    sentencepiece = pytest.importorskip("sentencepiece", reason=reason)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The cat sees the house", "the dog took 123"] * 9),
        model_writer=out,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_load_tokenizer_reads_sentencepiece_alone_as_sentencepiece_does(tmp_path, kind):
    pieces = write_pieces(tmp_path, model_type=kind, normalization_rule_name="identity")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer"})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer_notes(tokenizer) == ()
    for text in (*TEXTS, *EDGES):
        assert encode(tokenizer, [text])[0] == pieces.encode(text)
    assert tokenizer("the")["input_ids"][0] == pieces.bos_id()
    assert len(tokenizer) == pieces.get_piece_size()
    save_tokenizer(tokenizer, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    same_tokenizer(tokenizer, again)
    assert again("the")["input_ids"] == tokenizer("the")["input_ids"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"\n\x05<unk>", "pip install sentencepiece"),
        ("spiece.model", b"\n\x05<unk>", "pip install sentencepiece"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "vocabulary of tiktoken"),
        ("tekken.json", b"{}", "mistral-common"),
        ("vocab.json", b'{"a": 0}', "without merges.txt"),
    ],
)
def test_load_tokenizer_names_what_a_lone_vocabulary_needs(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{message}.* take tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_load_tokenizer_refuses_what_is_no_sentencepiece_model(tmp_path):
    pytest.importorskip("sentencepiece", reason="sentencepiece tells what is a model")
    for content in (b"", b"\x00\x01 what"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ModelError, match="is no SentencePiece model"):
            load_tokenizer(tmp_path)


def test_own_tokenizer_is_the_students_and_gets_what_it_lacks(caplog):
    teacher = make_tokenizer(eos_token="b", pad_token="a", bos_token="ab")
    teacher.chat_template = TEMPLATE
    student = choose_pad_token(make_tokenizer(eos_token="b", padding_side="left"))
    student.eos_token = "a"
    own = own_tokenizer(student, teacher)
    assert (own.eos_token, own.pad_token, own.bos_token) == ("a", "a", "ab")
    assert (own.chat_template, own.padding_side) == (TEMPLATE, "left")
    assert not caplog.records
    # "ab" is found whole, as by the teacher's; so are the student's own.
    assert own("abba", add_special_tokens=False)["input_ids"] == [2, 1, 0]
    student.chat_template = "other"
    assert own_tokenizer(student, teacher).chat_template == "other"
    assert "different chat templates" in caplog.text


def test_translate_ids_goes_by_the_text_of_tokens(caplog):
    source, target = make_tokenizer(("a", "b", "c")), make_tokenizer(("c", "x", "a"))
    generation = {
        "eos_token_id": [0, 1],
        "pad_token_id": 2,
        "bos_token_id": None,
        "suppress_tokens": [1],
        "temperature": 0.5,
    }
    assert translate_ids(generation, source, target) == {
        "eos_token_id": [2],
        "pad_token_id": 0,
        "bos_token_id": None,
        "temperature": 0.5,
    }
    assert "(eos_token_id, suppress_tokens)" in caplog.text
    assert translate_ids({"eos_token_id": 0, "top_k": 3}, None, target) == {"top_k": 3}
