"""Texts of the study, its tokenizer, and models of random weights."""

import hashlib
import json
import pathlib
import sysconfig
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from taid_jax.data.documents import make_document
from taid_jax.files import write_whole
from taid_jax.study.plan import Size

FRACTIONS = {"student": 0.1, "tuning": 0.2, "teacher": 0.2}
"""Documents ranked below the first are held out of all training; those between the two
choose learning rates. A teacher sees neither."""

_END = "<|endoftext|>"
_SMALLEST = 400
"""Characters: shorter files, most of them empty, are left out."""


def python_sources() -> pathlib.Path:
    """Returns the folder of Python's standard library."""
    return pathlib.Path(sysconfig.get_path("stdlib"))


def _texts(folder: pathlib.Path) -> Iterator[tuple[bool, str]]:
    """Yields the sources under a folder, and whether each lies at its top."""
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(folder)
        if "site-packages" in inner.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # Tests of other encodings.
            continue
        if len(text) >= _SMALLEST:
            yield len(inner.parts) == 1, text


def write_texts(sources: pathlib.Path, output: pathlib.Path) -> dict[str, Any]:
    """Writes what teachers, students and the choice of learning rates are given.

    Teachers are taught by all sources, students by those at the top of the folder.

    Args:
        sources: A folder with `.py` files.
        output: Gets `teacher.jsonl`, `student.jsonl` and `tuning.jsonl`.

    Returns:
        Documents and characters of each, and a digest of all texts.
    """
    lines: dict[str, list[str]] = {"teacher": [], "student": [], "tuning": []}
    digest = hashlib.sha256()
    characters = dict.fromkeys(lines, 0)
    for top, text in _texts(sources):
        digest.update(text.encode())
        names = ["teacher"]
        if top:
            names.append("student")
            if make_document({"text": text}, 0).rank >= FRACTIONS["student"]:
                names.append("tuning")
        for name in names:
            lines[name].append(json.dumps({"text": text}) + "\n")
            characters[name] += len(text)
    for name, found in lines.items():
        write_whole(output / f"{name}.jsonl", "".join(found).encode())
    return {
        "sha256": digest.hexdigest(),
        "documents": {name: len(found) for name, found in lines.items()},
        "characters": characters,
    }


def train_tokenizer(texts: pathlib.Path, vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer that is trained on a file of records."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore
        add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore
        special_tokens=[_END],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    with texts.open(encoding="utf-8") as lines:
        tokenizer.train_from_iterator((json.loads(x)["text"] for x in lines), trainer)
    return tokenizer


def write_model(
    folder: pathlib.Path, size: Size, tokenizer: Tokenizer, context: int
) -> None:
    """Writes the config of a Llama, and the tokenizer; there are no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(_END),
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": _END,
        "model_max_length": context,
    }
    for name, value in (("config", config), ("tokenizer_config", settings)):
        write_whole(folder / f"{name}.json", json.dumps(value, indent=2).encode())
    write_whole(folder / "tokenizer.json", tokenizer.to_str().encode())
