"""Rows of the decoder: hidden states and logits beside `transformers` in PyTorch."""

import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from parity.rows import AnyRow, Tallies, Tolerance, skipped, triple
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.hub import SMOLLM2, cache_folder
from taid_jax.models.files.load import load_model

CLOSE = Tolerance(
    1e-4,
    "largest difference over the root mean square; each product of d terms rounds by "
    "sqrt(d) * 6e-8 of them, some ten products deep, and peaked attention amplifies it",
)
_SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "grouped heads, untied": {},
    "one key head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "all key heads, wide heads": {"num_key_value_heads": 6, "head_dim": 16},
    "theta 1e5, eps 1e-6": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
        "rms_norm_eps": 1e-6,
    },
    "linear RoPE": {"rope_parameters": _LINEAR},
    "llama3 RoPE, tied": {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
LENGTH = 40
QUANTITIES = ("hidden states", "logits")


class Batch(NamedTuple):
    """Sequences for both sides.

    Attributes:
        name: Of the situation.
        ours: What our decoder is given.
        theirs: What PyTorch's is given: one or several calls, and where the tokens of
            each lie in ours, as (row, first position).
    """

    name: str
    ours: dict[str, np.ndarray]
    theirs: list[tuple[dict[str, np.ndarray], list[tuple[int, slice]]]]


def batches(vocab: int, seed: int) -> Iterator[Batch]:
    """Yields a plain, a right-padded, a left-padded and a packed batch."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (2, LENGTH), np.int32)
    ones = np.ones_like(ids)
    everywhere = [(row, slice(None)) for row in range(2)]
    whole = {"input_ids": ids, "attention_mask": ones}
    yield Batch("plain", whole, [(whole, everywhere)])
    short = LENGTH - 11
    for side, real in (("right", slice(0, short)), ("left", slice(11, None))):
        mask = ones.copy()
        mask[1] = 0
        mask[1, real] = 1
        padded = {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        call = {**padded, "position_ids": positions}
        yield Batch(f"padded {side}", padded, [(call, [(0, slice(None)), (1, real)])])
    parts = (slice(0, 13), slice(13, 20), slice(20, LENGTH))
    segments, positions = np.zeros_like(ids[:1]), np.zeros_like(ids[:1])
    calls = []
    for index, part in enumerate(parts):
        length = len(range(*part.indices(LENGTH)))
        segments[:, part] = index + 1
        positions[:, part] = np.arange(length)
        alone = {
            "input_ids": ids[:1, part],
            "attention_mask": np.ones((1, length), np.int32),
        }
        calls.append((alone, [(0, part)]))
    packed = {"input_ids": ids[:1], "segment_ids": segments, "positions": positions}
    yield Batch("packed", packed, calls)


def _torch_outputs(
    model: Any, batch: Batch
) -> Iterator[tuple[int, slice, np.ndarray, np.ndarray]]:
    for call, places in batch.theirs:
        inputs = {name: torch.tensor(array).long() for name, array in call.items()}
        with torch.no_grad():
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        for index, (row, part) in enumerate(places):
            # A call with one sequence holds nothing but that part.
            at = part if hidden.shape[1] == LENGTH else slice(None)
            yield (
                row,
                part,
                hidden[index, at].double().numpy(),
                logits[index, at].double().numpy(),
            )


def _errors(
    ours: tuple[np.ndarray, np.ndarray], model: Any, exact: Any, batch: Batch
) -> Iterator[tuple[str, list[float | None]]]:
    sides = zip(_torch_outputs(model, batch), _torch_outputs(exact, batch), strict=True)
    for (row, part, *theirs), (_, _, *truths) in sides:
        for quantity, mine, other, truth in zip(
            QUANTITIES, ours, theirs, truths, strict=True
        ):
            found = mine[row, part].astype(np.float64)
            errors = triple(lambda a, b: np.abs(a - b).max(), found, other, truth)
            yield (
                quantity,
                [None if each is None else each / _scale(truth) for each in errors],
            )


def _scale(outputs: np.ndarray) -> float:
    return float(np.sqrt(np.mean(outputs**2)))


def our_outputs(
    folder: pathlib.Path, found: Iterable[Batch]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns our hidden states and logits, of the model in a folder or a file."""
    model = load_model(folder, dtype=jnp.float32)
    functions = decoder_functions(model.config)
    hidden_of, head_of = functions.hidden, functions.head
    if hidden_of is None or head_of is None:
        raise TypeError("need a decoder with hidden states and a head")

    @jax.jit
    def run(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden = hidden_of(params, batch)
        return hidden, head_of(params).logits(hidden)

    outputs = []
    for batch in found:
        inputs = {name: jnp.asarray(array) for name, array in batch.ours.items()}
        hidden, logits = run(model.params, inputs)
        outputs.append((np.asarray(hidden), np.asarray(logits)))
    return outputs


Outputs = Callable[[pathlib.Path, list[Batch]], list[tuple[np.ndarray, np.ndarray]]]


def random_rows(
    seeds: Iterable[int],
    configs: Mapping[str, Mapping[str, Any]] = CONFIGS,
    outputs: Outputs = our_outputs,
) -> list[AnyRow]:
    """Returns the rows of randomly initialised Llamas, written and read as folders.

    `configs` say by name what differs from a small one; `outputs` is our side.
    """
    tallies = Tallies("models")
    for name, changes in configs.items():
        for seed in seeds:
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**_SMALL, **changes})).eval()
            _randomise_vectors(model)
            found = list(batches(_SMALL["vocab_size"], seed))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                ours = outputs(pathlib.Path(folder), found)
                exact = LlamaForCausalLM.from_pretrained(folder).double().eval()
            for batch, pair in zip(found, ours, strict=True):
                for quantity, errors in _errors(pair, model, exact, batch):
                    key = name, quantity, "transformers"
                    tallies.add(key, CLOSE, f"{batch.name}, seed {seed}", *errors)
    return [*tallies.rows()]


def _randomise_vectors(model: torch.nn.Module) -> None:
    """Moves norm scales and biases off their 1 and 0, where a mix-up would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))


def _torch_gguf(path: pathlib.Path) -> torch.nn.Module:
    """Returns a Llama of a .gguf file, read by transformers' own reader.

    `from_pretrained` would ask for accelerate, which nothing here needs.
    """
    settings = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    tensors = {name: torch.as_tensor(t) for name, t in found["tensors"].items()}
    # The head is the embedding, and only that is in the file.
    model.load_state_dict({"lm_head.weight": model.lm_head.weight, **tensors})
    return model


def smollm2_rows(file: pathlib.Path | None = None) -> list[AnyRow]:
    """Returns the rows of SmolLM2-135M-Instruct, if its file is given or cached."""
    name = "SmolLM2-135M-Instruct"
    path = file or cache_folder() / "models" / SMOLLM2.file_name
    if not path.is_file():
        why = f"{SMOLLM2.file_name} is not in the cache: --fetch gets it (93 MB)"
        return [skipped("models", name, why)]
    model = _torch_gguf(path)
    ids = np.random.default_rng(0).integers(0, 49_152, (1, 24), np.int32)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    batch = Batch("plain", inputs, [(inputs, [(0, slice(None))])])
    (ours,) = our_outputs(path, [batch])
    tallies = Tallies("models")
    for _, _, *theirs in _torch_outputs(model, batch):
        for quantity, mine, other in zip(QUANTITIES, ours, theirs, strict=True):
            error = float(np.abs(mine[0] - other).max()) / _scale(other)
            tallies.add((name, quantity, "transformers"), CLOSE, "24 tokens", error)
    return [*tallies.rows()]
