"""Tests of `taid_jax.errors`."""

import pytest

from taid_jax.errors import (
    MAX_SHOWN,
    InputError,
    explain,
    how_to_install,
    parsing,
    refuse,
    shorten,
    show,
)


class OtherError(InputError):
    pass


def test_shorten_says_how_much_is_cut():
    text = shorten("x" * 10_000)
    assert len(text) == MAX_SHOWN
    assert text.endswith("(10,000 characters)")
    assert shorten("short") == "short"


def test_show_of_an_alias_bomb_is_short():
    bomb: list = ["lol"] * 9
    for _ in range(30):
        bomb = [bomb] * 9
    assert len(show(bomb)) <= MAX_SHOWN


@pytest.mark.parametrize(
    "value",
    [10**10_000, b"x" * 10_000, {"a": "y" * 10_000}],
    ids=["number", "bytes", "text"],
)
def test_show_never_fails_and_is_short(value):
    assert len(show(value)) <= MAX_SHOWN


def test_explain_names_the_type_of_an_error_without_words():
    assert explain(ZeroDivisionError()) == "ZeroDivisionError"
    assert explain(ValueError("two\n  lines")) == "two lines"


def test_how_to_install_fits_a_wheel_and_a_clone():
    text = how_to_install("tpu")
    assert "pip install 'taid-jax[tpu]'" in text
    assert "pip install -e '.[tpu]'" in text


def test_refuse_prints_one_short_message(capsys):
    assert refuse(InputError("x" * 10**6)) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: xxx")
    assert len(shown) < 2100


class PanicException(BaseException):
    pass


@pytest.mark.parametrize(
    "raised",
    [ZeroDivisionError("division"), RecursionError(), MemoryError(), PanicException()],
)
def test_parsing_turns_what_parsers_raise_into_the_error(raised):
    with pytest.raises(OtherError, match=r"^the file: ") as found:  # noqa: SIM117
        with parsing("the file", OtherError):
            raise raised
    assert found.value.__cause__ is raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), SystemExit(3)])
def test_parsing_lets_an_end_of_the_process_through(raised):
    with pytest.raises(type(raised)):  # noqa: SIM117
        with parsing("the file"):
            raise raised


def test_parsing_keeps_an_error_of_the_input():
    with pytest.raises(InputError, match="own words") as found:  # noqa: SIM117
        with parsing("the file", OtherError):
            raise InputError("own words")
    assert type(found.value) is InputError
