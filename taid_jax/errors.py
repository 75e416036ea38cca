"""The error of an input that cannot be used, and the border to parsers of others."""

import contextlib
import reprlib
import sys
from collections.abc import Iterator

MAX_SHOWN = 300
"""So many characters of a value, or of another's message, are shown at most."""


class InputError(ValueError):
    """Something that the user gave cannot be used.

    The message is one paragraph that says what was needed, what came and the way out:
    commands print it without a traceback and end with exit status 2.
    """


class ModelError(InputError):
    """A model, or a setting of one, cannot be used."""


_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = MAX_SHOWN


def show(value: object) -> str:
    """Returns the `repr` of a value, shortened while it is made.

    A few references of YAML to themselves make a value whose `repr` has gigabytes.
    """
    try:
        return shorten(_REPR.repr(value))
    except Exception:  # A number of too many digits, or a `__repr__` that fails.
        return f"a value of type {type(value).__name__}"


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Returns the beginning of a text, and how much is cut off, if anything is.

    Args:
        text: Of any length.
        limit: In characters, >= 40.
    """
    if len(text) <= limit:
        return text
    rest = f" ... ({len(text):,} characters)"
    return text[: max(0, limit - len(rest))] + rest


def explain(error: BaseException) -> str:
    """Returns what an exception says, shortened; its type where it says nothing."""
    return shorten(" ".join(str(error).split())) or type(error).__name__


def refuse(error: InputError) -> int:
    """Prints an error of the input as every command does, and returns its status, 2."""
    print(f"error: {shorten(str(error), 2000)}", file=sys.stderr)
    return 2


def how_to_install(extra: str) -> str:
    """Returns how an extra's packages are added, to a wheel and to a clone."""
    return f"pip install 'taid-jax[{extra}]' (in a clone: pip install -e '.[{extra}]')"


@contextlib.contextmanager
def parsing(what: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Turns whatever a parser raises within it into an error of the input.

    Parsers of untrusted files raise anything: bad casts, divisions by zero, recursion
    that is too deep, sizes that no memory has, panics of Rust. To be put round the call
    of the parser alone: an own fault in it would be taken for the input's.

    Args:
        what: What cannot be used, the beginning of the message: `config.json in X`.
        kind: Of the error. Errors of the input that come from within pass as they are.

    Raises:
        InputError: Of `kind`, when anything but an end of the process was raised.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        # PyO3's PanicException is no Exception, so that Python code lets it through.
        if not isinstance(error, Exception) and type(error).__name__ != (
            "PanicException"
        ):
            raise
        raise kind(f"{what}: {explain(error)}") from error
