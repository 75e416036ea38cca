"""How many tokens the fused head takes at once.

Three sizes nest. A chunk is what one product with the logits' gradient takes: every
chunk reads and writes the head's gradient once. A block is what one product into
logits takes, and rows are what the objective sees at once.
"""

from typing import NamedTuple

_ENTRIES = {
    "cpu": (2**17, 3 * 2**22, 2**25),
    "tpu": (2**24, 2**26, 2**27),
    "gpu": (2**27, 2**27, 2**27),
}
"""Logits of rows, of a block and of a chunk, at most.

Measured. On a CPU: rows of half a megabyte, products of 256 rows where the vocabulary
is 49,152, and chunks that pass over the head's gradient rarely. On a TPU, by its
compiler's own count of cycles and bytes: rows keep the objective's arrays small, which
leaves room for larger products. A GPU starts every operation anew, so the three are
one."""


class Plan(NamedTuple):
    """Sizes of the loop in tokens, each dividing the next, and what it runs on."""

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
    # A TPU holds 8 rows in a tile.
    rows = -(-rows // 8) * 8 if rows > 8 else rows
    block = -(-block // rows) * rows
    return Plan(rows, block, -(-chunk // block) * block, platform == "cpu")


def _even(total: int, most: int) -> int:
    """Returns the size of equal parts of `total`, none above `most`."""
    return -(-total // -(-total // most))
