"""A chat template from a file, for tokenizers that bring none."""

import os
import pathlib
import re

import jinja2

from taid_jax.data.encoding import Tokenizer
from taid_jax.data.errors import DataError

# What marks an answer, which Jinja alone does not know.
_MARKS = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")


def set_chat_template(tokenizer: Tokenizer, path: str | os.PathLike[str]) -> None:
    """Gives a tokenizer the chat template of a file, in place of its own.

    Args:
        tokenizer: Changed in place, so that it is exported with the template.
        path: A Jinja template, as `chat_template.jinja` of a model's folder is.

    Raises:
        DataError: If the file cannot be read, or is not a Jinja template.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        if not text.strip():
            raise DataError(f"chat_template: {path} is empty")
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
            _MARKS.sub("", text)
        )
    except OSError as error:
        raise DataError(
            f"chat_template: {path} cannot be read: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"chat_template: {path} is not UTF-8: {error}") from error
    except jinja2.TemplateError as error:
        raise DataError(
            f"chat_template: {path} is not a Jinja template: {error}"
        ) from error
    # Every tokenizer of transformers has it; the protocol cannot name it.
    tokenizer.chat_template = text  # pyright: ignore[reportAttributeAccessIssue]
