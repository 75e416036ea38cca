"""Limits of the whole, of the prompt and of the last answer."""

import pytest

from taid_jax.data.documents import Chat, Message, Text, make_document
from taid_jax.data.encoding import Encoder
from taid_jax.data.errors import FILTERS, REASONS, BadRecords, DataError
from taid_jax.data.intake import Intake, Limits

CHAT = Chat(
    (
        Message("user", "Whether the weather is fine?"),
        Message("assistant", "that is all."),
        Message("user", "And then?"),
        Message("assistant", "on and on and on."),
    )
)


def take(tokenizer, limits, content=CHAT, *, train_on_prompts=False):
    bad = BadRecords("count", filtered=True)
    intake = Intake(
        Encoder(tokenizer), limits, train_on_prompts=train_on_prompts, bad=bad
    )
    documents = [make_document("here, line 1", content, 0)]
    return [example for *_, example in intake.examples(documents)], bad, intake


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_limits_are_the_last_that_fit(styled_tokenizer, train_on_prompts):
    [example], _, _ = take(styled_tokenizer, Limits(1000))
    whole, answer = len(example.ids), example.answer_end - example.prompt
    options = {"train_on_prompts": train_on_prompts}
    exact = Limits(whole, example.prompt, answer)
    assert len(take(styled_tokenizer, exact, **options)[0]) == 1
    for reason, less in [
        ("too_long", exact._replace(tokens=whole - 1)),
        ("prompt_too_long", exact._replace(prompt=example.prompt - 1)),
        ("answer_too_long", exact._replace(answer=answer - 1)),
    ]:
        found, bad, _ = take(styled_tokenizer, less, **options)
        assert not found
        assert dict(bad.reasons) == {reason: 1}
        assert reason in FILTERS
        assert bad.count == 0  # sound, but left out
        [problem] = bad.problems
        assert problem.origin == "here, line 1"
        assert (
            str(
                getattr(
                    less, "tokens" if reason == "too_long" else reason.split("_")[0]
                )
            )
            in problem.message
        )


def test_intake_remembers_the_shortest_that_is_too_long(tokenizer):
    [example], _, _ = take(tokenizer, Limits(1000))
    _, _, intake = take(tokenizer, Limits(5))
    assert intake.shortest_too_long == len(example.ids)


def test_intake_reports_an_answer_that_limits_need_and_the_template_hides(
    tokenizer, monkeypatch
):
    upper = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", upper)
    assert len(take(tokenizer, Limits(1000), train_on_prompts=True)[0]) == 1
    found, bad, _ = take(tokenizer, Limits(1000, prompt=500), train_on_prompts=True)
    assert not found
    assert dict(bad.reasons) == {"answer_not_found": 1}
    assert "answer_not_found" in REASONS


def test_intake_ends_where_all_conversations_lack_a_template(base_tokenizer):
    with pytest.raises(DataError, match="--chat-template FILE"):
        take(base_tokenizer, Limits(100))


def test_intake_cuts_text_instead(tokenizer):
    text = Text("that is all. " * 30)
    found, bad, _ = take(tokenizer, Limits(16, prompt=1, answer=1), text)
    assert len(found) > 1
    assert not bad.reasons
    assert all(len(window.ids) <= 16 for window in found)
