"""Limits of the whole, of the prompt and of the last answer."""

import pytest

from taid_jax.data.documents import Chat, Document, Message, Text
from taid_jax.data.errors import FILTERS
from taid_jax.data.intake import Intake, Limits
from taid_jax.data.tokens import Encoder

CHAT = Chat(
    (
        Message("user", "Whether the weather is fine?"),
        Message("assistant", "that is all."),
        Message("user", "And then?"),
        Message("assistant", "on and on and on."),
    )
)


def take(tokenizer, limits, content=CHAT, *, train_on_prompts=False):
    intake = Intake(Encoder(tokenizer), limits, train_on_prompts=train_on_prompts)
    [outcome] = intake.outcomes([("here, line 1", Document(content, 0.5))])
    return outcome


@pytest.mark.parametrize("train_on_prompts", [False, True])
def test_limits_are_the_last_that_fit(styled_tokenizer, train_on_prompts):
    [example] = take(styled_tokenizer, Limits(1000)).examples
    whole, answer = len(example.ids), example.answer_end - example.prompt
    options = {"train_on_prompts": train_on_prompts}
    exact = Limits(whole, example.prompt, answer)
    assert len(take(styled_tokenizer, exact, **options).examples) == 1
    for reason, size, less in [
        ("too_long", whole, exact._replace(tokens=whole - 1)),
        ("prompt_too_long", example.prompt, exact._replace(prompt=example.prompt - 1)),
        ("answer_too_long", answer, exact._replace(answer=answer - 1)),
    ]:
        outcome = take(styled_tokenizer, less, **options)
        assert not outcome.examples
        assert outcome.tokens == whole
        assert outcome.error.reason == reason
        assert str(outcome.error) == f"{size} tokens, the limit is {size - 1}"
        assert reason in FILTERS  # sound, but left out


def test_intake_reports_an_answer_that_limits_need_and_the_template_hides(
    tokenizer, monkeypatch
):
    upper = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] | upper }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", upper)
    assert take(tokenizer, Limits(1000), train_on_prompts=True).examples
    outcome = take(tokenizer, Limits(1000, prompt=500), train_on_prompts=True)
    assert not outcome.examples
    assert outcome.error.reason == "answer_not_found"


def test_intake_cuts_text_instead(tokenizer):
    text = Text("that is all. " * 30)
    outcome = take(tokenizer, Limits(16, prompt=1, answer=1), text)
    assert len(outcome.examples) > 1
    assert outcome.error is None
    assert all(len(window.ids) <= 16 for window in outcome.examples)
