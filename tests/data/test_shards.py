"""Prepared shards: read as they were made, or refused with the reason."""

import json
import pathlib
import shutil

import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data.prepare import PrepareOptions, prepare
from taid_jax.data.shards import MANIFEST, differences, identify, read_manifest


@pytest.fixture(scope="module")
def shards(tmp_path_factory, make_conversations, tokenizer):
    """Some shards of 60 conversations, not to be changed."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"messages": m}) for m in make_conversations(60)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    output = folder / "shards"
    asked = PrepareOptions(
        str(folder / "a.jsonl"), str(output), jobs=1, shard_tokens=4000
    )
    assert len(prepare(asked, tokenizer).files) >= 3
    return output


@pytest.fixture
def damaged(shards, tmp_path):
    """The same, to be damaged."""
    return pathlib.Path(shutil.copytree(shards, tmp_path / "shards"))


def test_shards_of_long_conversations_are_read_for_short_rows(shards, tokenizer):
    whole = load_dataset(shards, tokenizer, seq_len=2048)
    short = load_dataset(shards, tokenizer, seq_len=200)
    dropped = short.info.dropped["too_long"]
    assert 0 < dropped < 60
    examples = [side.examples for side in (short.info.train, short.info.held_out)]
    assert sum(examples) + dropped == 60
    assert whole.info.dropped == {}
    assert max(short.train.table.lengths) <= 200
    with pytest.raises(DataError, match="no example of at most 4 tokens"):
        load_dataset(shards, tokenizer, seq_len=4)


def test_shards_of_answers_serve_all_tokens_too(shards, tokenizer):
    dataset = load_dataset(shards, tokenizer, seq_len=512, train_on_prompts=True)
    table = dataset.train.table
    assert not table.counted[table.starts[:-1]].any()
    assert table.counted.sum() == len(table.ids) - len(table)
    assert (table.prompts < table.answer_ends).all()


def changed_backend(tokenizer, **changes):
    """A tokenizer with the same vocabulary that cuts text otherwise."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    values = json.loads(tokenizer.backend_tokenizer.to_str()) | changes
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        eos_token=tokenizer.eos_token,
    )
    other.chat_template = tokenizer.chat_template
    return other


def test_shards_of_a_tokenizer_that_gives_other_ids_are_refused(
    shards, tokenizers, tokenizer
):
    with pytest.raises(DataError, match=r"differs: the vocabulary \(.* tokens there"):
        load_dataset(shards, tokenizers["llama3"], seq_len=512)
    same = changed_backend(tokenizer)
    load_dataset(shards, same, seq_len=512)
    other = changed_backend(tokenizer, normalizer={"type": "Lowercase"})
    with pytest.raises(DataError, match="differs: how text is cut"):
        load_dataset(shards, other, seq_len=512)


def test_shards_of_another_template_are_refused(shards, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + " ")
    with pytest.raises(DataError, match=r"differs: the chat template \(sha256 \w{12} "):
        load_dataset(shards, tokenizer, seq_len=512)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(
        DataError, match=r"template \(.* none here; .*--chat-template\)"
    ):
        load_dataset(shards, tokenizer, seq_len=512)


def test_identify_does_not_see_what_was_done_with_the_tokenizer(tokenizer):
    before = identify(tokenizer)
    tokenizer(["a", "that is all."], truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert identify(tokenizer) == before
    assert before.size == len(tokenizer)


@pytest.mark.parametrize("style", ["llama2", "llama3"])
def test_identify_sees_no_difference_in_an_exported_tokenizer(
    styled_tokenizer, tmp_path
):
    """Shards of a teacher fit the student that it was exported with."""
    from taid_jax.models.files.tokenizer import read_folder_tokenizer, save_tokenizer

    save_tokenizer(styled_tokenizer, tmp_path)
    again = identify(read_folder_tokenizer(tmp_path))
    assert differences(identify(styled_tokenizer), again, chats=True) == []


def test_differences_names_each():
    from taid_jax.data.shards import TokenizerIdentity

    here = TokenizerIdentity(3, "v", "r", {"eos_token_id": 2}, "t")
    assert differences(here, here, chats=True) == []
    other = here._replace(special={"eos_token_id": 1})
    assert differences(here, other, chats=True) == [
        "the eos_token_id (2 there, 1 here)"
    ]
    other = here._replace(template=None)
    assert differences(here, other, chats=False) == []
    [template] = differences(other, here, chats=True)
    assert template.startswith("the chat template (sha256 none there, t here")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-30], r"cut short, .* it has [\d,]+ bytes"),
        (lambda data: data + b"\0", "cut short, damaged or another file"),
        (lambda data: data[:100] + b"\0\1" + data[102:], "damaged or another file"),
        (None, "cannot be read: No such file"),
    ],
)
def test_shards_that_are_not_whole_are_refused(damaged, tokenizer, damage, message):
    path = damaged / read_manifest(damaged).files[0].name
    data = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(data))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(damaged, tokenizer, seq_len=512)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "not a whole manifest"),
        (lambda text: text.replace("data 3", "data 9"), "need the format .*data 3"),
        (lambda text: text.replace('"files"', '"filed"'), "not a whole manifest"),
        (lambda text: "[]", "not a whole manifest"),
    ],
)
def test_manifest_that_cannot_be_read_is_refused(damaged, tokenizer, change, message):
    path = damaged / MANIFEST
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        load_dataset(damaged, tokenizer, seq_len=512)
