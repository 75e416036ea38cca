"""GGUF files in: metadata, and quantised tensors to numbers.

The reader of the `gguf` package walks every array entry by entry and believes what the
file says; this one is bounded by the size of the file and some twenty times faster.
Types, block sizes and dequantisation are the package's.

Reference: ggml's docs/gguf.md, versions 2 and 3.
"""

import dataclasses
import functools
import math
import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.constants import GGUFValueType

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.families.fields import require_file, shown_name
from taid_jax.models.families.layout import FileFormat, Index

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
_MOST_ENTRIES = 1 << 24
_MOST_BYTES = 64 << 20
"""Of an array and of a text in the header. Vocabularies have a million entries at most;
a count that was damaged would otherwise read the numbers of the tensors."""
_MOST_NAMED = 10
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


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read; its tensors are read one at a time.

    Attributes:
        path: The file.
        metadata: Keys and values of its header.
        tensors: Name to place.
    """

    file_format: ClassVar[FileFormat] = "gguf"
    path: pathlib.Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    @property
    def origin(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, slowest axis first."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a part of a tensor as float32, dequantised.

        Only the rows that are asked for are read: whole ones, since rows are quantised
        in blocks.

        Raises:
            ModelError: If the file cannot be read any more.
        """
        info = self.tensors[name]
        shape = info.shape if len(info.shape) > 1 else (1, *info.shape)
        first, *rest = index if len(info.shape) > 1 else (slice(0, 1), *index)
        step = math.prod(shape[1:-1]) * info.row_bytes
        size = (first.stop - first.start) * step
        offset = info.offset + first.start * step
        with parsing(f"{self.path} cannot be read", ModelError):
            raw = np.fromfile(self.path, np.uint8, count=size, offset=offset)
        if raw.size != size:
            raise ModelError(f"{self.path} was cut off while it was read")
        # A damaged scale may be infinite; that shows in the numbers, not in a warning.
        damaged = parsing(f"{self.path}: {shown_name(name)} is damaged", ModelError)
        with damaged, np.errstate(all="ignore"):
            values = gguf.dequantize(raw.reshape(-1, info.row_bytes), info.kind)
        part = values.reshape(-1, *shape[1:])[(slice(None), *rest)]
        return part if len(info.shape) > 1 else part[0]


def open_gguf(path: pathlib.Path) -> GgufFile:
    """Returns a GGUF file; only its header is read.

    Raises:
        ModelError: If it is damaged (cut off, with counts or offsets that do not fit,
            with tensors that do not follow each other), a part of several files, or has
            tensors of a type that cannot be dequantised.
    """
    require_file(path)
    with (
        parsing(f"{path} is damaged or no GGUF file, fetch it again", ModelError),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        metadata, tensors = _Header(data).read()
    if metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(
            f"{path} is one of several parts; merge them first with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    unknown = {info.kind for info in tensors.values() if not _can_read(info.kind)}
    if unknown:
        named = [
            f"{shown_name(name)} ({info.kind.name})"
            for name, info in tensors.items()
            if info.kind in unknown
        ]
        raise ModelError(
            f"{path} has {len(named)} tensors of types that cannot be read, such as "
            f"{', '.join(named[:_MOST_NAMED])}. "
            "F32, F16, BF16 and all quantisations that the gguf package undoes can"
        )
    return GgufFile(path, metadata, tensors)


@functools.cache
def _can_read(kind: GGMLQuantizationType) -> bool:
    block = np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


class _DamagedError(Exception):
    """Something in the file does not fit."""


class _Header:
    """What stands before the numbers of the tensors, read from the first byte on."""

    def __init__(self, data: mmap.mmap):
        self._data = data
        self._at = 0

    def read(self) -> tuple[dict[str, Value], dict[str, TensorInfo]]:
        """Returns the metadata, and the places of all tensors."""
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
        start, expected = _align(self._at, alignment), 0
        tensors: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            block, block_bytes = GGML_QUANT_SIZES[kind]
            shown = shown_name(name)
            if name in tensors:
                raise _DamagedError(f"the tensor {shown} is there twice")
            if min(shape) < 1 or shape[-1] % block:
                raise _DamagedError(
                    f"the tensor {shown} has the shape {shape}, in blocks of {block}"
                )
            if offset != expected:
                raise _DamagedError(f"{shown} lies at {offset} instead of {expected}")
            row_bytes = shape[-1] // block * block_bytes
            size = math.prod(shape[:-1]) * row_bytes
            if start + offset + size > len(self._data):
                raise _DamagedError(f"it ends before the end of the tensor {shown}")
            expected = _align(offset + size, alignment)
            tensors[name] = TensorInfo(shape, kind, start + offset, row_bytes)
        return metadata, tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dimensions = self._text(), self._number("I")
        shown = shown_name(name)
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise _DamagedError(f"the tensor {shown} has {dimensions} dimensions")
        shape = tuple(reversed(self._numbers("Q", dimensions, _MOST_DIMENSIONS)))
        kind, offset = self._number("I"), self._number("Q")
        if kind not in GGML_QUANT_SIZES:
            raise _DamagedError(f"the tensor {shown} has the unknown type {kind}")
        return name, shape, GGMLQuantizationType(kind), offset

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
