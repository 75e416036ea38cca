"""The architecture of a decoder, as one frozen dataclass that checks itself."""

import dataclasses

from taid_jax.errors import ModelError, show

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

_LEAST, _MOST = 1e-30, 1e30
"""Bounds of positive numbers: what lies outside is 0 or infinite in float32 once it is
squared, or multiplied by a position."""

_SMALLEST_DIVISOR = 1e-6
"""Of a frequency; of published models all are 1 or more."""

_CHOICES = {
    "norm": ("rms", "rms_plus_one", "layer", "layer_no_bias"),
    "norm_place": ("before", "after", "both"),
    "residual": ("sequential", "parallel", "parallel_one_norm"),
    "qk_norm": ("none", "head", "projection", "each_head"),
    "activation": ACTIVATIONS,
}


def _not_positive(config: object, *names: str, least: float = _LEAST) -> list[str]:
    """Returns which numbers are not positive in float32; None is no number."""
    wrong = []
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if number is not None and not least <= number <= _MOST:
                bound = f"between {least:g} and {_MOST:g}" if number > 0 else "> 0"
                wrong.append(f"{name} {bound}, got {show(number)}")
                break
    return wrong


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """How positions rotate the queries and the keys.

    Attributes:
        theta: Base of the wavelengths.
        kind: "default"; "linear" divides the frequencies by `factor`; "llama3" only the
            low ones; "yarn" those that rotate less than `beta_slow` times in the
            original context, and those up to `beta_fast` in part; "dynamic" raises
            `theta` with the length of a sequence beyond the original context;
            "longrope" divides each by its own factor, of two lists: one for sequences
            that fit the original context, one for those that do not.
        factor: How many times the context was extended (all but "longrope").
        low_freq_factor: Wavelengths longer than the original context divided by it are
            divided whole ("llama3").
        high_freq_factor: Wavelengths shorter than the original context divided by it
            stay as they are ("llama3").
        original_max_position_embeddings: Context before the extension, in tokens
            ("llama3", "dynamic", "yarn", "longrope").
        partial_rotary_factor: Part of a head's width that is rotated, from its start.
        attention_factor: Multiplies cosine and sine ("yarn", "longrope").
        beta_fast: Rotations in the original context from which a frequency stays as it
            is ("yarn").
        beta_slow: Rotations below which it is divided whole ("yarn").
        truncate: Round the bounds between these two outwards to whole pairs ("yarn").
        short_factor: Divisors of the frequencies, one each ("longrope").
        long_factor: The same for sequences beyond the original context.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    partial_rotary_factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self):
        """Raises ModelError when a setting is out of range."""
        wrong = []
        if self.kind not in ROPE_KINDS:
            wrong.append(f"kind one of {', '.join(ROPE_KINDS)}, got {self.kind}")
        # Below 1, pairs rotate more than a radian per token, up to infinity.
        wrong += _not_positive(self, "theta", least=1.0)
        if self.kind != "default" and not 1 <= self.factor <= _MOST:
            wrong.append(f"factor >= 1, got {self.factor}")
        if self.kind == "llama3" and (
            not _LEAST < self.low_freq_factor < self.high_freq_factor < _MOST
        ):
            wrong.append(
                "0 < low_freq_factor < high_freq_factor, got "
                f"{self.low_freq_factor} and {self.high_freq_factor}"
            )
        if (
            self.kind not in ("default", "linear")
            and self.original_max_position_embeddings < 1
        ):
            original = self.original_max_position_embeddings
            wrong.append(f"original_max_position_embeddings >= 1, got {original}")
        if not 0 < (part := self.partial_rotary_factor) <= 1:
            wrong.append(f"0 < partial_rotary_factor <= 1, got {part}")
        wrong += _not_positive(self, "attention_factor")
        if self.kind == "yarn" and not (
            _LEAST < self.beta_slow <= self.beta_fast < _MOST and self.theta != 1
        ):
            wrong.append(
                "0 < beta_slow <= beta_fast and theta other than 1, got "
                f"{self.beta_slow}, {self.beta_fast} and {self.theta}"
            )
        wrong += _not_positive(
            self, "short_factor", "long_factor", least=_SMALLEST_DIVISOR
        )
        if wrong:
            raise ModelError("the rope settings need " + "; ".join(wrong))

    def width(self, head_dim: int) -> int:
        """Returns how many entries of a head are rotated."""
        return int(head_dim * self.partial_rotary_factor)

    def problems(self, head_dim: int) -> list[str]:
        """Returns what does not fit heads of this width."""
        width, wrong = self.width(head_dim), []
        if width < 2 or width % 2:
            of_it = "" if width == head_dim else f", of which {width} are rotated"
            wrong.append(f"an even head_dim (rotary pairs), got {head_dim}{of_it}")
        if self.kind == "dynamic" and width == 2:
            wrong.append("more than one rotary pair for dynamic rope, got a width of 2")
        for name in ("short_factor", "long_factor"):
            count = len(getattr(self, name))
            if self.kind == "longrope" and count != width // 2:
                wrong.append(f"{width // 2} rope {name}, one for a pair, got {count}")
        return wrong


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder: sizes, and what its family does differently.

    Frozen and hashable, so that compiled functions may depend on it.

    Attributes:
        vocab_size: Ids of the tokenizer; entries of the vocabulary from here on are
            padding and take no part.
        d_model: Width of the residual stream.
        num_layers: Layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides `num_heads`.
        head_dim: Width of a head, even where it is rotated whole.
        mlp_dim: Width between the two halves of the MLP.
        max_position_embeddings: Longest sequence the model was made for, in tokens.
        family: Name of the file under `families` that reads and writes its weights.
        norm_eps: Added to the mean square (the variance) in a norm.
        rope: Rotary positions; None when nothing is rotated.
        tie_embeddings: The head is the transposed embedding.
        attention_bias: The four projections of the attention have a bias.
        mlp_bias: The projections of the MLP have a bias.
        initializer_range: Standard deviation of random weights.
        norm: "rms"; "rms_plus_one", whose scale is one more than its parameter;
            "layer", which takes off the mean and has a bias; "layer_no_bias".
        norm_place: The norms stand "before" the sublayers, "after" them, or "both".
        residual: The MLP reads what the attention wrote ("sequential"), or both read
            the same stream ("parallel"), through one and the same norm
            ("parallel_one_norm").
        qk_norm: Queries and keys are normed: "none"; with one scale for each "head"'s
            width; over all heads together ("projection"); by a LayerNorm without bias
            whose scale is another in "each_head".
        activation: "silu", "gelu", "gelu_tanh" (its usual approximation) or "relu".
        gated_mlp: `down(act(gate(x)) * up(x))`; else `down(act(up(x)))`.
        qkv_bias: The projections to queries, keys and values have a bias.
        head_bias: The head has a bias, where it is not the embedding.
        scale_embedding: Embedded tokens are multiplied by the root of `d_model`.
        query_pre_attn_scalar: Scores are divided by its root; that of `head_dim` when
            None.
        attention_softcap: Scores become `cap * tanh(score / cap)` when not None.
        head_softcap: The same for the logits.
        window: Tokens that a layer sees, each one itself included; all when None.
        window_layers: Which layers have the window; every one when None.
        local_rope: Rotary positions of the layers with a window; `rope` when None.
        rope_layers: Which layers rotate at all; every one when None.
        learned_positions: A learned row for each position is added to the tokens.
        padded_vocab_size: Rows of the embedding, padding included; `vocab_size` when 0.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_position_embeddings: int
    family: str = "llama"
    norm_eps: float = 1e-5
    rope: RopeConfig | None = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    norm: str = "rms"
    norm_place: str = "before"
    residual: str = "sequential"
    qk_norm: str = "none"
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    head_bias: bool = False
    scale_embedding: bool = False
    query_pre_attn_scalar: int | None = None
    attention_softcap: float | None = None
    head_softcap: float | None = None
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] | None = None
    learned_positions: bool = False
    padded_vocab_size: int = 0

    def __post_init__(self):
        """Raises ModelError, which lists every setting that is out of range."""
        if not self.padded_vocab_size:
            object.__setattr__(self, "padded_vocab_size", self.vocab_size)
        sizes = (
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
            "max_position_embeddings",
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
        for rope in filter(None, {self.rope, self.local_rope}):
            wrong += rope.problems(self.head_dim)
        wrong += _not_positive(self, "norm_eps", "initializer_range")
        if self.vocab_size > self.padded_vocab_size:
            wrong.append(
                f"vocab_size <= padded_vocab_size, got {self.vocab_size} and "
                f"{self.padded_vocab_size}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                can = ", ".join(choices)
                wrong.append(f"{name} one of {can}, got {getattr(self, name)}")
        wrong += _not_positive(
            self, "query_pre_attn_scalar", "attention_softcap", "head_softcap", "window"
        )
        for name in ("window_layers", "rope_layers"):
            count = len(getattr(self, name) or range(self.num_layers))
            if count != self.num_layers:
                wrong.append(f"{self.num_layers} {name}, one for a layer, got {count}")
        wrong += self._contradictions()
        if wrong:
            raise ModelError("the model's settings need " + "; ".join(wrong))

    def _contradictions(self) -> list[str]:
        """Returns which settings only make sense with another one that is not there."""
        wrong = []
        if self.rope is None and (self.local_rope or self.rope_layers is not None):
            wrong.append("rope where local_rope or rope_layers are given")
        ropes = [rope for rope in (self.rope, self.local_rope) if rope]
        if len(parts := {rope.partial_rotary_factor for rope in ropes}) == 2:
            wrong.append(
                "rope and local_rope with the same partial_rotary_factor, got "
                f"{' and '.join(map(str, sorted(parts)))}"
            )
        if self.window is None and self.window_layers is not None:
            wrong.append("window where window_layers are given")
        if self.norm_place != "before" and self.residual != "sequential":
            wrong.append("norms before the sublayers where the residual is parallel")
        if self.head_bias and self.tie_embeddings:
            wrong.append("a head of its own where head_bias is given")
        return wrong

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it sees everything."""
        has = self.window_layers or (True,) * self.num_layers
        return tuple(self.window if windowed else None for windowed in has)

    @property
    def ropes(self) -> tuple[RopeConfig | None, ...]:
        """The rotary positions of each layer, None where it does not rotate."""
        local = self.local_rope or self.rope
        rotated = self.rope_layers or (True,) * self.num_layers
        return tuple(
            (self.rope if window is None else local) if has else None
            for has, window in zip(rotated, self.windows, strict=True)
        )
