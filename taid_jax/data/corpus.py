"""Texts that come with Python: nothing to download."""

import re
from collections.abc import Iterator

from taid_jax.data.errors import DataError

PYDOC = "pydoc"
"""The name that asks for Python's own documentation instead of a file."""

PYDOC_QUESTIONS = "pydoc-questions"
"""The same as questions and answers: small data for all that needs prompts."""

_HEADING = re.compile(r"^(\S.*)\n([*=~^-])\2{2,}\n", re.MULTILINE)


def pydoc_sections() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the sections of `help()`'s topics: the language reference.

    Under Python 3.11.7 these are 169 sections with 373 kB of English and code, under
    the PSF licence. The text is that of the running Python, so another version gives
    another corpus (3.12.1: 182 sections, 397 kB): compare runs of one version only.

    Sections, not topics: a fifth of the topics' text stands in several of them (`if` is
    also a part of `compound`), which would put trained text among the held-out. A
    section that was given before is left out, whatever its heading's level.

    Raises:
        DataError: If this Python was built without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python comes without pydoc_data.topics, the built-in corpus; give a "
            ".txt, .jsonl or .parquet file, or install Python's standard library whole"
        ) from error
    given = set()
    for topic in sorted(topics):
        for heading, text in _sections(topics[topic]):
            body = " ".join(_HEADING.sub("", text, count=1).split())
            if body and body not in given:
                given.add(body)
                yield f"{topic}: {heading}", text


def pydoc_questions() -> Iterator[tuple[str, str, str]]:
    """Yields (name, question, answer) for the sections of Python's documentation.

    The question asks for the section by its heading; the answer is its first paragraph
    of prose. Nobody asked these questions: they only have the form of a chat.

    Raises:
        DataError: If this Python was built without its documentation.
    """
    for name, text in pydoc_sections():
        topic, _, heading = name.partition(": ")
        body = _HEADING.sub("", text, count=1).strip("\n")
        # What is indented is grammar or code.
        prose = [part for part in re.split(r"\n\s*\n", body) if part[:1].strip()]
        if prose:
            question = f"What does Python's reference say about {heading or topic}?"
            yield name, question, " ".join(prose[0].split())


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Yields (heading, text with its heading) of every section."""
    headings = list(_HEADING.finditer(text))
    starts = [match.start() for match in headings]
    if starts[:1] != [0]:
        yield "", text[: starts[0] if starts else len(text)]
    for match, stop in zip(headings, [*starts[1:], len(text)], strict=True):
        yield match[1], text[match.start() : stop]
