"""The architecture of a decoder, as one frozen dataclass that checks itself."""

import dataclasses

from taid_jax.models.errors import ModelError

ROPE_KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions turn the queries and the keys.

    Attributes:
        theta: Base of the wavelengths.
        kind: "default"; "linear" divides the positions by `factor`; "llama3" divides
            only the low frequencies by it.
        factor: How many times the context was extended ("linear", "llama3").
        low_freq_factor: Wavelengths longer than `original_max_length / low_freq_factor`
            are divided whole ("llama3").
        high_freq_factor: Wavelengths shorter than `original_max_length /
            high_freq_factor` stay as they are ("llama3").
        original_max_length: Context before the extension, in tokens ("llama3").
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192

    def __post_init__(self):
        """Raises ModelError when a setting is out of range."""
        wrong = []
        if self.kind not in ROPE_KINDS:
            wrong.append(f"kind one of {', '.join(ROPE_KINDS)}, got {self.kind}")
        if not self.theta > 0:
            wrong.append(f"theta > 0, got {self.theta}")
        if self.kind != "default" and not self.factor >= 1:
            wrong.append(f"factor >= 1, got {self.factor}")
        if self.kind == "llama3":
            if not 0 < self.low_freq_factor < self.high_freq_factor:
                wrong.append(
                    "0 < low_freq_factor < high_freq_factor, got "
                    f"{self.low_freq_factor} and {self.high_freq_factor}"
                )
            if self.original_max_length < 1:
                wrong.append(
                    f"original_max_length >= 1, got {self.original_max_length}"
                )
        if wrong:
            raise ModelError("the rope settings need " + "; ".join(wrong))


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder: sizes, and what its family does differently.

    Frozen and hashable, so that compiled functions may depend on it.

    Attributes:
        vocab_size: Rows of the embedding, padding included.
        d_model: Width of the residual stream.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head, even.
        mlp_dim: Width between the two halves of the gated MLP.
        max_length: Longest sequence the model was made for, in tokens.
        family: Name of the file under `families` that reads and writes its weights.
        norm_eps: Added to the mean square in RMSNorm.
        rope: Rotary positions.
        tie_embeddings: The head is the transposed embedding.
        attention_bias: The four projections of the attention have a bias.
        mlp_bias: The three projections of the MLP have a bias.
        initializer_range: Standard deviation of random weights.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_length: int
    family: str = "llama"
    norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        """Raises ModelError, which lists every setting that is out of range."""
        sizes = (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_length",
        )
        wrong = [
            f"{name} >= 1, got {getattr(self, name)}"
            for name in sizes
            if getattr(self, name) < 1
        ]
        if self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads:
            wrong.append(
                "num_kv_heads that divides num_heads, got "
                f"{self.num_kv_heads} and {self.num_heads}"
            )
        if self.head_dim % 2:
            wrong.append(f"an even head_dim (rotary pairs), got {self.head_dim}")
        if not self.norm_eps > 0:
            wrong.append(f"norm_eps > 0, got {self.norm_eps}")
        if not self.initializer_range > 0:
            wrong.append(f"initializer_range > 0, got {self.initializer_range}")
        if wrong:
            raise ModelError("the model's settings need " + "; ".join(wrong))
