"""Tokenizers of model folders and GGUF files: read, identified, saved."""

import hashlib
import importlib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from taid_jax.errors import ModelError, parsing, show
from taid_jax.models.files import gguf_tokenizer as gguf
from taid_jax.models.files.gguf import open_gguf
from taid_jax.models.files.hub import Source, resolve
from taid_jax.probes import EDGES, TEXTS, first_difference, vocabulary_texts

Tokenizer: TypeAlias = PreTrainedTokenizerBase

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "spiece.model",
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")
# What is kept with a tokenizer and not written down with it.
_NOTES, PADS_WITH_END = "_taid_jax_notes", "_taid_jax_pads_with_end"
_LOG = logging.getLogger("taid_jax")


def tokenizer_notes(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Returns what was noticed when a tokenizer was read and the user should know."""
    return getattr(tokenizer, _NOTES, ())


def warn(notes: Iterable[str]) -> None:
    """Shows the user what should be known; on standard error unless logging is set."""
    for note in notes:
        _LOG.warning("%s", note)


def _noted(tokenizer: Tokenizer, *notes: str) -> Tokenizer:
    setattr(tokenizer, _NOTES, (*tokenizer_notes(tokenizer), *notes))
    return tokenizer


def load_tokenizer(source: str | os.PathLike[str]) -> Tokenizer:
    """Returns the tokenizer of a model, with its chat template.

    A tokenizer without a padding token pads with its end token. What was noticed when
    it was read is shown as a warning.

    Args:
        source: See `hub.resolve`.

    Raises:
        ModelError: If there is none, or it cannot be read.
    """
    found = resolve(source, weights=False)
    return require_tokenizer(find_tokenizer(found), found)


def require_tokenizer(tokenizer: Tokenizer | None, found: Source) -> Tokenizer:
    """Returns a tokenizer that has to be there, after warning of what was noticed.

    Raises:
        ModelError: If there is none.
    """
    if tokenizer is None:
        raise ModelError(
            f"{found.path} has no tokenizer (need {_FILES[0]}, or the vocabulary files "
            "that transformers reads); copy the tokenizer files of the model there"
        )
    warn(tokenizer_notes(tokenizer))
    return tokenizer


def find_tokenizer(found: Source) -> Tokenizer | None:
    """Returns the tokenizer that lies beside a model's config, None if there is none.

    Raises:
        ModelError: If there is one that cannot be read.
    """
    if found.kind == "gguf":
        file = open_gguf(found.path)
        return gguf_tokenizer(file.metadata, file.origin)
    if any((found.folder / name).is_file() for name in _FILES):
        return read_folder_tokenizer(found.folder)
    return None


def read_folder_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a model folder; code that it may bring is never run.

    `tokenizer.json` has the last word: where the class of `transformers` that the
    folder names would cut text in another way, have other tokens, or begin and end a
    text by others than the files say, the files are followed, with a note. Which tokens
    are special stays as that class has it.

    Raises:
        ModelError: If it cannot be read.
    """
    if not (folder / _FILES[0]).is_file():
        return choose_pad_token(_read_vocabulary(folder))
    tokenizer = _read_with(AutoTokenizer, folder)
    if type(tokenizer) is PreTrainedTokenizerFast:  # It follows the file already.
        return choose_pad_token(tokenizer)
    plain = _read_with(PreTrainedTokenizerFast, folder)
    vocabulary = plain.get_vocab()
    added = added_tokens(plain)
    texts = [*TEXTS, *EDGES, *added, *vocabulary_texts(vocabulary, without=added)]
    other = first_difference(encoder(tokenizer), encoder(plain), texts)
    framed = [encoder(each, framed=True)(["", "a"]) for each in (tokenizer, plain)]
    if other is not None:
        what = f"other ids, first for {show(other)}"
    elif tokenizer.get_vocab() != vocabulary:
        extra = tokenizer.get_vocab().keys() ^ vocabulary.keys()
        what = f"other tokens, such as {show(min(extra, default=None))}"
    elif framed[0] != framed[1]:
        what = f"other tokens round a text, {framed[0][1]} for 'a'"
    else:
        return choose_pad_token(tokenizer)
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, name)
        if getattr(plain, name) is None and token in vocabulary:
            setattr(plain, name, token)
    plain.padding_side = tokenizer.padding_side
    note = (
        f"{folder}: the class {type(tokenizer).__name__} of transformers gives {what}, "
        f"than {_FILES[0]} says; the file is followed, and exported with the student"
    )
    return choose_pad_token(_noted(plain, note))


def _read_with(reader: Any, folder: pathlib.Path, **options: object) -> Tokenizer:
    with parsing(f"the tokenizer in {folder} cannot be read", ModelError):
        return reader.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )


def _read_vocabulary(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer of a folder that has no tokenizer.json.

    Raises:
        ModelError: If what it has is not enough; says what is needed.
    """

    def has(name: str) -> bool:
        return (folder / name).is_file()

    take = (
        f"take {_FILES[0]} and tokenizer_config.json from the model's Hugging Face "
        "folder, or a folder of it converted by transformers"
    )
    for name in ("tokenizer.model", "spiece.model"):
        if has(name):
            return _read_sentencepiece(folder, name, take)
    if has("tekken.json") and not has("vocab.json"):
        raise ModelError(
            f"{folder} has tekken.json as its only tokenizer, which the package "
            f"mistral-common reads and this one does not; {take}"
        )
    if not has("merges.txt"):
        raise ModelError(
            f"{folder} has vocab.json without merges.txt, and how tokens are merged is "
            f"said there; copy merges.txt too, or {take}"
        )
    try:
        return _read_with(AutoTokenizer, folder)
    except ModelError as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read from vocab.json and merges.txt: "
            "how text is cut before is said by the class that tokenizer_config.json "
            f"names as tokenizer_class; {take}"
        ) from error


def _read_sentencepiece(folder: pathlib.Path, name: str, take: str) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model, compared with SentencePiece's.

    The start token is added where tokenizer_config.json does not say, as llama.cpp and
    the models' own code do.

    Raises:
        ModelError: If it is no such model, or the package is missing.
    """
    path = folder / name
    with parsing(f"{path} cannot be read", ModelError):
        content = path.read_bytes()
    if _TIKTOKEN.match(content):
        raise ModelError(
            f"{path} is a vocabulary of tiktoken (as of Llama 3), which does not say "
            f"how text is cut; {take}"
        )
    try:
        sentencepiece = importlib.import_module("sentencepiece")
    except ImportError as error:
        raise ModelError(
            f"{path} is a SentencePiece model, which the package sentencepiece reads: "
            f"`pip install sentencepiece`, or {take}"
        ) from error
    with parsing(f"{path} is no SentencePiece model", ModelError):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        if not pieces.get_piece_size():
            raise ModelError(f"{path} is no SentencePiece model: it has no pieces")
    tokenizer = _read_with(PreTrainedTokenizerFast, folder, vocab_file=str(path))
    settings = getattr(tokenizer, "init_kwargs", {})
    if tokenizer.bos_token is not None and "add_bos_token" not in settings:
        tokenizer = _read_with(
            PreTrainedTokenizerFast, folder, vocab_file=str(path), add_bos_token=True
        )
    texts = [*TEXTS, *EDGES]
    other = first_difference(pieces.encode, encoder(tokenizer), texts)
    if other is None:
        return tokenizer
    return _noted(
        tokenizer,
        f"{path}: transformers' conversion gives other ids than SentencePiece itself, "
        f"first for {show(other)}; to be sure of the ids, {take}",
    )


def choose_pad_token(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer, padding with its end token where it has no other."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
        setattr(tokenizer, PADS_WITH_END, True)
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


def digest_tokenizer(tokenizer: Tokenizer) -> str:
    """Returns what identifies a tokenizer: its tokens, and how it cuts nasty texts."""
    found = sorted(tokenizer.get_vocab().items()), encoder(tokenizer)(list(TEXTS))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def added_tokens(tokenizer: Any) -> set[str]:
    """Returns the special tokens of a tokenizer, and those that it finds whole."""
    return {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}


def encoder(tokenizer: Tokenizer, *, framed: bool = False) -> Any:
    """Returns what gives the ids of texts; with those round them where `framed`."""

    def encode(texts: list[str]) -> list[list[int]]:
        # Some have no token for what they do not know.
        what = f"the tokenizer {show(tokenizer.name_or_path)} cannot encode every text"
        with parsing(what, ModelError):
            found = tokenizer(texts, add_special_tokens=framed, verbose=False)
        return found["input_ids"]  # pyright: ignore[reportReturnType]

    return encode


def gguf_tokenizer(metadata: Mapping[str, object], origin: str) -> Tokenizer | None:
    """Returns the tokenizer that a GGUF file describes; see `gguf_tokenizer.build`."""
    built = gguf.build(metadata, origin)
    if built is None:
        return None
    tokenizer, notes = built
    return choose_pad_token(_noted(tokenizer, *notes))
