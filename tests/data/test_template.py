"""A chat template from a file."""

import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data.template import set_chat_template

TURNS = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "that is all."},
]


def test_set_chat_template_lets_a_base_tokenizer_read_chats(
    base_tokenizer, tokenizer, write_jsonl, tmp_path
):
    source = write_jsonl([{"messages": TURNS}])
    options = {"seq_len": 64, "held_out_fraction": 0.0}
    with pytest.raises(DataError, match="--chat-template FILE"):
        load_dataset(source, base_tokenizer, **options)
    path = tmp_path / "template.jinja"
    path.write_text(tokenizer.chat_template)
    set_chat_template(base_tokenizer, path)
    ours = load_dataset(source, base_tokenizer, **options).info
    assert ours == load_dataset(source, tokenizer, **options).info


def test_set_chat_template_takes_one_that_marks_answers(base_tokenizer, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(
        "{%- for m in messages %}{%- generation %}{{ m['content'] }}"
        "{%- endgeneration -%}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    )
    set_chat_template(base_tokenizer, path)
    assert "generation" in base_tokenizer.chat_template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}", "not a Jinja template"),
        (b"", "is empty"),
        (b"\xff", "not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_set_chat_template_says_what_is_wrong(
    base_tokenizer, tmp_path, content, message
):
    path = tmp_path / "template.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        set_chat_template(base_tokenizer, path)
    assert base_tokenizer.chat_template is None
