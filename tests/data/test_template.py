"""A chat template from a file."""

import threading

import pytest

from taid_jax.data import DataError, load_dataset
from taid_jax.data import template as te
from taid_jax.data.template import ChatTemplate, Conversation, Cut, set_chat_template

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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "cannot be used: .*ZeroDivisionError"),
        ("{% for m in messages %}", "cannot be used: .*TemplateSyntaxError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be used: .*Recurs"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used: .*SecurityError"),
        ("{{ 10 ** (10 ** 9) }}", r"stopped after [\d.]+ seconds of computing"),
        ("{{ 'a' * 10 ** 10 if add_generation_prompt }}", "asks for too much memory"),
        (
            "{{ ('a' * 10 ** 8) | length }}{{ 'a' * 33000000 }}",
            "writes 33,000,009 char",
        ),
    ],
)
def test_template_that_breaks_or_takes_too_much_is_one_message(
    tokenizer, monkeypatch, write_jsonl, template, message
):
    source = write_jsonl([{"messages": TURNS}] * 3)
    options = {"seq_len": 64, "held_out_fraction": 0.0, "bad_records": "count"}
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", template)
        if message.startswith("stopped"):
            patch.setattr(te, "SECONDS", 0.2)
        with pytest.raises(te.TemplateError, match=message) as caught:
            load_dataset(source, tokenizer, **options)
    assert len(str(caught.value)) < 600
    # The next one is rendered by another process.
    assert len(load_dataset(source, tokenizer, **options).train)


@pytest.mark.parametrize(
    ("addition", "reason", "message"),
    [
        ("{{ '' if 1 / (messages | length - 3) }}", "template_refuses", "ZeroDivision"),
        ("{{ '\\ud800' if messages | length == 3 }}", "not_utf8", "surrogate"),
    ],
)
def test_template_that_breaks_on_some_records_leaves_out_those(
    tokenizer, monkeypatch, write_jsonl, addition, reason, message
):
    template = tokenizer.chat_template + addition
    monkeypatch.setattr(tokenizer, "chat_template", template)
    three = [{"role": "system", "content": "Be."}, *TURNS]
    source = write_jsonl([{"messages": TURNS}, {"messages": three}])
    options = {"seq_len": 64, "held_out_fraction": 0.0, "bad_records": "count"}
    info = load_dataset(source, tokenizer, **options).info
    assert info.dropped == {reason: 1}
    assert message in info.problems[0]


def test_template_that_a_user_stops_is_not_the_answer_to_the_next(
    tokenizer, monkeypatch
):
    template = ChatTemplate(tokenizer)
    [wanted] = template.render(Conversation(TURNS), [Cut()])
    process = te._Renderer.process
    assert process is not None

    def stop():
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "stdout", type("Pipe", (), {"readline": stop}))
    with pytest.raises(KeyboardInterrupt):
        template.render(Conversation(TURNS[:1]), [Cut()])
    assert template.render(Conversation(TURNS), [Cut()]) == [wanted]


def test_template_is_rendered_in_any_thread(tokenizer):
    found = []
    template = ChatTemplate(tokenizer)
    threads = [
        threading.Thread(
            target=lambda: found.extend(template.render(Conversation(TURNS), [Cut()]))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tokenizer.apply_chat_template(TURNS, tokenize=False)] * 4
