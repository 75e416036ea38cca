"""The header of a GGUF file: its metadata and where its tensors lie, all checked.

The reader of the `gguf` package walks every array entry by entry and believes what the
file says; this one is bounded by the size of the file and some twenty times faster.
Types and block sizes are the package's.

Reference: ggml's docs/gguf.md, versions 2 and 3.
"""

import math
import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.constants import GGUFValueType

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.families.fields import require_file, shown_name

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_ENTRIES = 1 << 24
_MOST_BYTES = 64 << 20
"""Of an array and of a text in the header. Vocabularies have a million entries at most;
a count that was damaged would otherwise read the numbers of the tensors."""
_SCALARS: Mapping[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}

Value = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]


class TensorInfo(NamedTuple):
    """Where a tensor lies.

    Attributes:
        shape: Slowest axis first.
        kind: How its numbers are stored.
        offset: Of its first byte in the file.
        row_bytes: Of one row along the last axis.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    row_bytes: int


class Header(NamedTuple):
    """What stands before the tensors of a GGUF file.

    Attributes:
        metadata: Keys and values.
        tensors: Name to place.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


def read_header(path: pathlib.Path) -> Header:
    """Returns the header of a GGUF file.

    Raises:
        ModelError: If it is no GGUF file, or damaged: cut off, with counts or offsets
            that do not fit, with tensors that do not follow each other.
    """
    require_file(path)
    with (
        parsing(f"{path} is damaged or no GGUF file, fetch it again", ModelError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _Reader(data).header()


class _DamagedError(Exception):
    """Something in the file does not fit."""


class _Reader:
    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 0

    def header(self) -> Header:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise _DamagedError("it does not begin with GGUF")
        self._at = len(_MAGIC)
        version = self._number("I")
        if version not in _VERSIONS:
            raise _DamagedError(f"version {version}, and only {_VERSIONS} are read")
        tensor_count, pair_count = self._number("Q"), self._number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self._text()
            if key in metadata:
                raise _DamagedError(f"the key {shown_name(key)} is there twice")
            metadata[key] = self._value(self._number("I"))
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise _DamagedError(f"alignment {show(alignment)}")
        entries = [self._tensor() for _ in range(self._within(tensor_count, 24))]
        start = _align(self._at, alignment)
        return Header(metadata, self._places(entries, start, alignment))

    def _places(
        self,
        entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
        start: int,
        alignment: int,
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        expected = 0
        for name, shape, kind, offset in entries:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            shown = shown_name(name)
            if name in tensors:
                raise _DamagedError(f"the tensor {shown} is there twice")
            if min(shape) < 1:
                raise _DamagedError(f"the tensor {shown} has the shape {shape}")
            if shape[-1] % block:
                raise _DamagedError(
                    f"{shown}: rows of {shape[-1]} in blocks of {block}"
                )
            if offset != expected:
                raise _DamagedError(f"{shown} lies at {offset} instead of {expected}")
            row_bytes = shape[-1] // block * block_bytes
            size = math.prod(shape[:-1]) * row_bytes
            if start + offset + size > len(self._data):
                raise _DamagedError(f"it ends before the end of the tensor {shown}")
            expected = _align(offset + size, alignment)
            tensors[name] = TensorInfo(shape, kind, start + offset, row_bytes)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self._text(), self._number("I")
        shown = shown_name(name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"the tensor {shown} has {dimensions} dimensions")
        shape = tuple(reversed(self._numbers("Q", dimensions, _MOST_DIMENSIONS)))
        kind, offset = self._number("I"), self._number("Q")
        try:
            return name, shape, GGMLQuantizationType(kind), offset
        except ValueError:
            raise _DamagedError(
                f"the tensor {shown} has the unknown type {kind}"
            ) from None

    def _value(self, kind: int) -> Value:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            raise _DamagedError(f"a value of the unknown type {kind}")
        of, count = self._number("I"), self._number("Q")
        if of in _SCALARS:
            return self._numbers(_SCALARS[of], count, _MOST_ENTRIES)
        if of == GGUFValueType.STRING:
            count = self._within(count, 8, _MOST_ENTRIES)
            return [self._text() for _ in range(count)]
        raise _DamagedError(f"an array of values of the unknown type {of}")

    def _text(self) -> str:
        length = self._number("Q")
        start = self._at
        self._at += self._within(length, 1, _MOST_BYTES)
        try:
            return self._data[start : self._at].decode("utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"the text at byte {start} is not UTF-8") from None

    def _number(self, code: str):
        return self._numbers(code, 1)[0]

    def _numbers(self, code: str, count: int, most: int = 1) -> list:
        size = struct.calcsize(f"<{code}")
        start = self._at
        self._at += size * self._within(count, size, most)
        return list(struct.unpack_from(f"<{count}{code}", self._data, start))

    def _within(self, count: int, size: int, most: int | None = None) -> int:
        """Returns the count if so many things of a size may be and are in the file."""
        if count * size > len(self._data) - self._at:
            raise _DamagedError("it ends in the middle of its header")
        if most is not None and count > most:
            raise _DamagedError(
                f"{count:,} entries of one value; at most {most:,} can be"
            )
        return count


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
