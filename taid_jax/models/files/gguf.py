"""GGUF files in: quantised tensors to numbers."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import ClassVar

import gguf
import numpy as np

from taid_jax.errors import ModelError, parsing
from taid_jax.models.families.fields import shown_name
from taid_jax.models.families.layout import FileFormat, Index
from taid_jax.models.files.gguf_header import Header, Value, read_header

_MOST_NAMED = 10


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read; its tensors are read one at a time.

    Attributes:
        path: The file.
        header: Its metadata and the places of its tensors.
    """

    file_format: ClassVar[FileFormat] = "gguf"
    path: pathlib.Path
    header: Header

    @property
    def origin(self) -> str:
        """The file, for messages."""
        return str(self.path)

    @property
    def metadata(self) -> Mapping[str, Value]:
        """Keys and values of the header."""
        return self.header.metadata

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each tensor, slowest axis first."""
        return {name: info.shape for name, info in self.header.tensors.items()}

    def read(self, name: str, index: Index) -> np.ndarray:
        """Returns a part of a tensor as float32, dequantised.

        Only the rows that are asked for are read: whole ones, since rows are quantised
        in blocks.

        Raises:
            ModelError: If the file cannot be read any more.
        """
        info = self.header.tensors[name]
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
        ModelError: If it is damaged, a part of several files, or has tensors of a type
            that cannot be dequantised.
    """
    file = GgufFile(path, read_header(path))
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise ModelError(
            f"{path} is one of several parts; merge them first with llama.cpp's "
            "`llama-gguf-split --merge`"
        )
    kinds = {info.kind for info in file.header.tensors.values()}
    unknown = {kind for kind in kinds if not _can_dequantise(kind)}
    if unknown:
        tensors = [
            f"{shown_name(name)} ({info.kind.name})"
            for name, info in file.header.tensors.items()
            if info.kind in unknown
        ]
        raise ModelError(
            f"{path} has {len(tensors)} tensors of types that cannot be read, such as "
            f"{', '.join(tensors[:_MOST_NAMED])}. "
            "F32, F16, BF16 and all quantisations that the gguf package undoes can"
        )
    return file


def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True
