"""GGUF files in: metadata to `DecoderConfig`, quantised tensors to numbers."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import gguf
import numpy as np

from taid_jax.models.config import DecoderConfig, RopeConfig
from taid_jax.models.errors import ModelError
from taid_jax.models.families import FAMILIES, MOST_LAYERS, Family
from taid_jax.models.fields import REQUIRED, Fields
from taid_jax.models.gguf_header import Header, Value, read_header
from taid_jax.models.layout import Index
from taid_jax.models.rope import rope_frequencies

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_ROPE_FACTORS = "rope_freqs.weight"

_ONE_WAY: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.attn_factor": (1.0,),
}
"""Keys of an architecture with the only values that the decoder can follow."""

_HARMLESS = (
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
)


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read; its tensors are read one at a time.

    Attributes:
        path: The file.
        header: Its metadata and the places of its tensors.
    """

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
        try:
            raw = np.fromfile(self.path, np.uint8, count=size, offset=offset)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error}") from error
        if raw.size != size:
            raise ModelError(f"{self.path} was cut off while it was read")
        # A damaged scale may be infinite; that shows in the numbers, not in a warning.
        with np.errstate(all="ignore"):
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
            f"{name} ({info.kind.name})"
            for name, info in file.header.tensors.items()
            if info.kind in unknown
        ]
        raise ModelError(
            f"{path} has tensors of types that cannot be read: {', '.join(tensors)}. "
            "F32, F16, BF16, Q8_0, Q4_0, Q4_1 and the K-quants can"
        )
    return file


def read_gguf_config(file: GgufFile) -> DecoderConfig:
    """Returns the architecture that a GGUF file describes.

    Raises:
        ModelError: With everything that is wrong or that the decoder cannot do.
    """
    family = _family_of(file)
    prefix = f"{family.gguf}."
    values = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    fields, shapes = Fields(values, file.origin, prefix), file.shapes
    d_model = fields.get("embedding_length", REQUIRED, int)
    num_layers = fields.get("block_count", REQUIRED, int)
    num_heads = fields.get("attention.head_count", REQUIRED, int)
    num_kv_heads = fields.get("attention.head_count_kv", num_heads, int)
    head_dim = fields.get("attention.key_length", d_model // max(1, num_heads), int)
    mlp_dim = fields.get("feed_forward_length", REQUIRED, int)
    max_length = fields.get("context_length", REQUIRED, int)
    norm_eps = fields.get("attention.layer_norm_rms_epsilon", REQUIRED, float)
    rows = shapes[_EMBEDDING][0] if _EMBEDDING in shapes else 1
    vocab_size = fields.get("vocab_size", rows, int)
    fields.only("attention.value_length", (head_dim,))
    fields.only("rope.dimension_count", (head_dim,))
    for key, allowed in _ONE_WAY.items():
        fields.only(key, allowed)
    if num_layers > MOST_LAYERS:
        fields.problem("block_count", f"need at most {MOST_LAYERS:,} layers")
    rope = _read_rope(file, fields, head_dim)
    fields.finish(_HARMLESS)
    try:
        return DecoderConfig(
            family=family.name,
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            mlp_dim=mlp_dim,
            max_length=max_length,
            norm_eps=_shortest(norm_eps),
            rope=rope,
            tie_embeddings=_HEAD not in shapes,
            attention_bias="blk.0.attn_q.bias" in shapes,
            mlp_bias="blk.0.ffn_up.bias" in shapes,
        )
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from error


def _family_of(file: GgufFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    for family in FAMILIES:
        if family.gguf is not None and family.gguf == architecture:
            return family
    names = ", ".join(family.gguf for family in FAMILIES if family.gguf)
    raise ModelError(
        f"{file.path} has the architecture {architecture!r}, which is not supported in "
        f"GGUF files; supported are: {names}"
    )


def _read_rope(file: GgufFile, fields: Fields, head_dim: int) -> RopeConfig:
    theta = _shortest(fields.get("rope.freq_base", 10000.0, float))
    kind = fields.get("rope.scaling.type", "none", str)
    factor = fields.get("rope.scaling.factor", 1.0, float)
    factor = fields.get("rope.scale_linear", factor, float)
    if kind not in ("none", "linear"):
        fields.problem("rope.scaling.type", f"the decoder can do linear, not {kind!r}")
    if not (theta > 0 and factor >= 1):
        fields.problem("rope", f"need a base > 0 and a factor >= 1, got {factor}")
    if fields.problems:
        return RopeConfig()
    if _ROPE_FACTORS in file.shapes:
        shape = file.shapes[_ROPE_FACTORS]
        if shape != (head_dim // 2,):
            raise ModelError(
                f"{file.path}: {_ROPE_FACTORS} has shape {shape}, the metadata need "
                f"({head_dim // 2},)"
            )
        return _rope_of_factors(
            file, file.read(_ROPE_FACTORS, (slice(0, shape[0]),)), theta
        )
    if factor != 1.0:
        return RopeConfig(theta=theta, kind="linear", factor=_shortest(factor))
    return RopeConfig(theta=theta)


def _rope_of_factors(file: GgufFile, factors: np.ndarray, theta: float) -> RopeConfig:
    """Returns the settings whose frequencies were divided by these factors.

    llama.cpp keeps Llama 3's scaling as the finished factors; all published models have
    the same three of its four settings, and the fourth is the largest factor.
    """
    if np.all(factors == 1.0):
        return RopeConfig(theta=theta)
    factor = max(1.0, float(np.nan_to_num(factors).max()))
    rope = RopeConfig(theta=theta, kind="llama3", factor=factor)
    plain, scaled = (
        rope_frequencies(each, 2 * factors.size)
        for each in (RopeConfig(theta=theta), rope)
    )
    # Both are rounded to float32; a factor that is no number is near nothing.
    if not np.allclose(factors, plain / scaled, rtol=1e-5):
        raise ModelError(
            f"{file.path}: {_ROPE_FACTORS} holds rotary factors that are not "
            "those of Llama 3; the decoder cannot follow them"
        )
    return rope


def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _shortest(value: float) -> float:
    """Returns the number that was meant by a float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))
