"""Which layers see a window only, and which of them turn: patterns in config.json."""

from collections.abc import Callable
from typing import Any

from taid_jax.models.config import DecoderConfig
from taid_jax.models.families.family import Got, Group
from taid_jax.models.families.fields import Fields

_TYPES = "layer_types"
_SLIDING, _FULL = "sliding_attention", "full_attention"


def alternating_windows(*, window: int, every: int, every_key: str | None) -> Group:
    """Returns the keys of families where every so many layers see everything.

    Args:
        window: Tokens that the others see, when the file says nothing.
        every: How many layers lie from one that sees everything to the next.
        every_key: Name of that number in the file; None when it is fixed.
    """

    def read(fields: Fields, got: Got) -> dict[str, Any]:
        size = fields.optional("sliding_window", window, int)
        step = fields.get(every_key, every, int) if every_key else every
        if step < 1:
            fields.problem(every_key or _TYPES, f"need at least 1, got {step}")
        return _windows(fields, got, size, lambda index: (index + 1) % max(1, step) > 0)

    def write(config: DecoderConfig) -> dict[str, object]:
        return {"sliding_window": config.window, _TYPES: _layer_types(config)}

    return Group(read, write)


def _read_last_windows(fields: Fields, got: Got) -> dict[str, Any]:
    used = fields.get("use_sliding_window", False, bool)
    size = fields.optional("sliding_window", 4096, int)
    first = fields.get("max_window_layers", 28, int)
    return _windows(fields, got, size if used else None, lambda index: index >= first)


def _write_last_windows(config: DecoderConfig) -> dict[str, object]:
    windowed = [window is not None for window in config.windows]
    return {
        "use_sliding_window": any(windowed),
        "sliding_window": config.window,
        "max_window_layers": [*windowed, True].index(True),
        _TYPES: _layer_types(config),
    }


LAST_WINDOWS = Group(_read_last_windows, _write_last_windows)
"""The keys of Qwen: no window, or one in the layers from a certain one on."""


def _read_unturned(fields: Fields, got: Got) -> dict[str, Any]:
    step = fields.get("no_rope_layer_interval", 4, int)
    flags = fields.sequence("no_rope_layers", int)
    layers = got["num_layers"]
    if step < 1:
        fields.problem("no_rope_layer_interval", f"need at least 1, got {step}")
    if flags is None:
        flags = tuple(int((index + 1) % max(1, step) != 0) for index in range(layers))
    if len(flags) < layers:
        fields.problem(
            "no_rope_layers", f"need one for each of {layers} layers, got {len(flags)}"
        )
    turns = tuple(bool(flag) for flag in flags[:layers])
    used = fields.get("use_sliding_window", False, bool)
    size = fields.optional("sliding_window", None, int)
    windows = _windows(
        fields, got, size if used else None, lambda index: not all(turns[index:][:1])
    )
    return {"rope_layers": None if all(turns) else turns, **windows}


def _write_unturned(config: DecoderConfig) -> dict[str, object]:
    return {
        "no_rope_layers": [int(rope is not None) for rope in config.ropes],
        "use_sliding_window": any(config.windows),
        "sliding_window": config.window,
        _TYPES: _layer_types(config),
    }


UNTURNED_LAYERS = Group(_read_unturned, _write_unturned)
"""The keys of SmolLM3: layers without rotary positions, which may have a window."""


def _windows(
    fields: Fields, got: Got, size: int | None, standard: Callable[[int], bool]
) -> dict[str, Any]:
    """Returns the window, and its layers.

    `standard` says which of them have it where the file does not name their kinds.
    """
    layers, kinds = got["num_layers"], fields.sequence(_TYPES, str)
    if kinds is None:
        has = tuple(standard(index) for index in range(layers))
    else:
        if len(kinds) != layers or set(kinds) - {_SLIDING, _FULL}:
            fields.problem(
                _TYPES, f"need {_FULL} or {_SLIDING} for each of {layers} layers"
            )
        has = tuple(kind == _SLIDING for kind in kinds)
    if size is None:
        return {"window": None, "window_layers": None}
    # Kept where no layer has it: some classes of transformers want it all the same.
    return {"window": size, "window_layers": None if all(has) else has}


def _layer_types(config: DecoderConfig) -> list[str]:
    return [_FULL if window is None else _SLIDING for window in config.windows]
