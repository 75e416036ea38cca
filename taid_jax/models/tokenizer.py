"""Tokenizers of model folders and GGUF files, and whether two are the same."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import TypeAlias

from gguf import TokenType
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from taid_jax.models.errors import ModelError
from taid_jax.models.gguf import open_gguf
from taid_jax.models.source import Source, resolve

Tokenizer: TypeAlias = PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "spiece.model",
)
_EXAMPLES = 5


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    A tokenizer without a padding token pads with its end token.

    Args:
        source: See `source.resolve`.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    found = resolve(source, weights=False)
    tokenizer = find_tokenizer(found)
    if tokenizer is None:
        raise ModelError(
            f"{found.path} has no tokenizer (need {_FILES[0]}, or the vocabulary files "
            "that transformers reads); copy the tokenizer files of the model there"
        )
    return tokenizer


def find_tokenizer(found: Source) -> Tokenizer | None:
    """Returns the tokenizer that lies beside a model's config, None if there is none.

    Raises:
        ModelError: If there is one that cannot be read.
    """
    if found.kind == "gguf":
        file = open_gguf(found.path)
        return gguf_tokenizer(file.metadata, file.origin)
    folder = found.path.parent if found.kind == "config" else found.path
    if any((folder / name).is_file() for name in _FILES):
        return read_folder_tokenizer(folder)
    return None


def read_folder_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a model folder; code that it may bring is never run.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    # Broken files fail in many ways in there, down to bare exceptions from Rust.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read: {error}"
        ) from error
    return choose_pad_token(tokenizer)


def choose_pad_token(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer, padding with its end token where it has no other."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


NO_SPECIAL_IDS: Mapping[str, object] = dict.fromkeys(
    ("bos_token_id", "eos_token_id", "pad_token_id")
)
"""What `special_ids` would give of a tokenizer without special tokens."""


def special_ids(tokenizer: Tokenizer) -> dict[str, object]:
    """Returns the ids of start, end and padding as config.json calls them."""
    return {key: getattr(tokenizer, key) for key in NO_SPECIAL_IDS}


def save_tokenizer(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Writes a tokenizer so that transformers 4 and 5 read it."""
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.get("tokenizer_class") == "TokenizersBackend":
        # Transformers 5 renamed the class, and reads the old name as well.
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        text = json.dumps(values, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def same_tokenizer(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raises unless both tokenizers give every token the same id.

    A distribution over the vocabulary means the same for both models only then; equal
    sizes say nothing.

    Raises:
        ModelError: With how many ids differ, and the first of them.
    """
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    if ours == theirs:
        return
    by_id, other_by_id = _by_id(ours), _by_id(theirs)
    different = [
        f"{number} is {by_id.get(number)!r} and {other_by_id.get(number)!r}"
        for number in sorted(by_id.keys() | other_by_id.keys())
        if by_id.get(number) != other_by_id.get(number)
    ]
    raise ModelError(
        f"the tokenizers of teacher ({len(ours):,} tokens) and student "
        f"({len(theirs):,} tokens) differ in {len(different):,} ids: "
        f"{'; '.join(different[:_EXAMPLES])}. Both models need the same tokenizer, "
        "since the student learns the teacher's probability of each id; take a pair "
        "of one family, build the student from the teacher, or give "
        "--resize-embeddings, which makes both vocabularies that of the teacher's "
        "tokenizer and exports the student with it"
    )


def _by_id(vocabulary: Mapping[str, int]) -> dict[int, str]:
    """Returns id to token; where several tokens have one id, all of them."""
    found: dict[int, str] = {}
    for token, number in sorted(vocabulary.items()):
        found[number] = f"{found[number]} {token}" if number in found else token
    return found


def _without_padding(tokens: list, kinds: object) -> int:
    """Returns how many tokens there are without what fills a padded vocabulary.

    llama.cpp names each such entry by its id and marks it as unused.
    """
    count = len(tokens)
    if isinstance(kinds, list) and len(kinds) == count:
        while count > 1 and (
            kinds[count - 1] == TokenType.UNUSED
            and tokens[count - 1] == f"[PAD{count - 1}]"
        ):
            count -= 1
    return count


_GGUF_KEYS: Mapping[str, str] = {
    "tokenizer_type": "model",
    "pre_tokenizer_type": "pre",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "precompiled_charsmap": "precompiled_charsmap",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unk_token_id": "unknown_token_id",
    "pad_token_id": "padding_token_id",
    "add_prefix_space": "add_space_prefix",
}
"""What `transformers` calls the entries of `tokenizer.ggml` in a GGUF file."""


def gguf_tokenizer(metadata: Mapping[str, object], origin: str) -> Tokenizer | None:
    """Returns the tokenizer that a GGUF file describes, None if it has none.

    `AutoTokenizer` reads GGUF files only where PyTorch is installed; what it builds the
    tokenizer with needs no PyTorch and is used here on metadata read by `gguf.py`.

    Args:
        metadata: All of the file's keys and values.
        origin: Where they come from, for messages.

    Raises:
        ModelError: If it is damaged, or of a kind that `transformers` does not know.
    """
    entries = {
        name: metadata[f"tokenizer.ggml.{key}"]
        for name, key in _GGUF_KEYS.items()
        if f"tokenizer.ggml.{key}" in metadata
    }
    tokens = entries.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return None
    real = _without_padding(tokens, entries.get("token_type"))
    entries["tokens"] = tokens = tokens[:real]
    for name in ("scores", "token_type"):
        if isinstance(listed := entries.get(name), list):
            entries[name] = listed[:real]
    options: dict[str, object] = {}
    for name in ("bos", "eos", "unk", "pad"):
        number = entries.get(f"{name}_token_id")
        if number is None:
            options[f"{name}_token"] = None
        elif isinstance(number, int) and 0 <= number < len(tokens):
            options[f"{name}_token"] = tokens[number]
        else:
            raise ModelError(
                f"{origin} has the {name} token {number!r}, outside its vocabulary of "
                f"{len(tokens):,} tokens"
            )
    for name in ("add_bos_token", "add_eos_token"):
        if (value := metadata.get(f"tokenizer.ggml.{name}")) is not None:
            options[name] = bool(value)
    if entries.get("tokenizer_type") == "llama":
        options.setdefault("add_bos_token", True)  # As llama.cpp does.
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        options["chat_template"] = template
    try:
        # Only where it is needed: the module is slow to import.
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            convert_gguf_tokenizer,
        )

        architecture = str(metadata.get("general.architecture"))
        backend, _ = convert_gguf_tokenizer(architecture, entries)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    # What a broken file leads to in there is open-ended.
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {origin} cannot be used: {error}"
        ) from error
    return choose_pad_token(tokenizer)
