"""Texts that come with Python: nothing to download."""

from collections.abc import Iterator

from taid_jax.data.errors import DataError

PYDOC = "pydoc"
"""The name that asks for Python's own documentation instead of a file."""


def pydoc_topics() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of the topics of `help()`: the language reference.

    About 79 topics and 465 kB of English with code, under the PSF licence. The text is
    that of the running Python, so Python 3.11 and 3.12 give different corpora: compare
    runs made with the same version only.

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
    for name in sorted(topics):
        yield name, topics[name]
