"""How many tokens the fused head takes at once.

Three sizes nest. A chunk is what one product with the logits' gradient takes: every
chunk reads and writes the head's gradient once. A block is what one product into
logits takes, and rows are what a step of the objective takes, in one group or two.
"""

from typing import NamedTuple

_ENTRIES = {
    "cpu": (2**19, 3 * 2**22, 2**25),
    "tpu": (2**24, 2**26, 2**27),
    "gpu": (2**27, 2**27, 2**27),
}
"""Logits of a step's rows, of a block and of a chunk, at most.

Measured. On a CPU: two groups of rows of a megabyte each, products of 256 rows where
the vocabulary is 49,152, and chunks that pass over the head's gradient rarely. On a
TPU, by its compiler's own count of cycles and bytes: rows keep the objective's arrays
small, which leaves room for larger products. A GPU starts every operation anew, so the
three are one."""

_CPU_GROUPS = 2
"""Groups of rows in a step, which do not wait for each other: while an operation on one
has work for a single core, the other core has an operation on the other. Measured:
four are no faster."""


class Plan(NamedTuple):
    """Sizes of the loop in tokens, each dividing the next, and what it runs on.

    Attributes:
        groups: Into how many equal parts a step divides its rows.
        rows: What a step takes; the whole chunk, in one group, where it is small.
        block: What one product into logits takes.
        chunk: What one product with their gradient takes.
        cpu: Whether it runs on a CPU.
    """

    groups: int
    rows: int
    block: int
    chunk: int
    cpu: bool


def make_plan(tokens: int, vocab: int, platform: str, chunk_size: int | None) -> Plan:
    """Returns the sizes of the loop for the tokens of one device.

    Args:
        tokens: How many there are, at least 1.
        vocab: Entries of the head on this device.
        platform: "cpu", "gpu" or "tpu".
        chunk_size: Tokens of a chunk, rounded up to whole rows; chosen when None.
    """
    # Powers of two divide most batches.
    rows, block, chunk = (
        1 << max(entries // vocab, 1).bit_length() - 1
        for entries in _ENTRIES.get(platform, _ENTRIES["gpu"])
    )
    # Of fewer tokens, a product spends its time on reading the head.
    block, chunk = max(block, 128), max(chunk, 128)
    chunk = _even(tokens, chunk if chunk_size is None else chunk_size)
    block = _even(chunk, block)
    rows = _even(block, rows)
    groups = _CPU_GROUPS if platform == "cpu" and rows < chunk else 1
    # A TPU holds 8 rows in a tile.
    rows = _whole(rows, 8 if rows > 8 else groups)
    block = _whole(block, rows)
    return Plan(groups, rows, block, _whole(chunk, block), platform == "cpu")


def _whole(size: int, part: int) -> int:
    """Returns the least multiple of `part` that is not below `size`."""
    return -(-size // part) * part


def _even(total: int, most: int) -> int:
    """Returns the size of equal parts of `total`, none above `most`."""
    return -(-total // -(-total // most))
