"""Prepared data: shards of token ids, and the manifest of what they were made from."""

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Bool

from taid_jax.data.errors import DataError, LeftOut, RecordError
from taid_jax.data.packing import TokenTable, make_table
from taid_jax.data.tokens import Encoder, Example, Tokenizer, cut_windows
from taid_jax.files import write_whole
from taid_jax.probes import TEXTS, vocabulary_texts

SHARD_SCHEMA = pyarrow.schema(
    [
        ("input_ids", pyarrow.list_(pyarrow.int32())),
        ("loss_mask", pyarrow.list_(pyarrow.bool_())),
        # Tokens before the last answer, and the token after its last.
        ("prompt", pyarrow.int32()),
        ("answer_end", pyarrow.int32()),
        # Running text, which may be cut into shorter windows.
        ("text", pyarrow.bool_()),
    ]
)


class TokenizerIdentity(NamedTuple):
    """Equal for two tokenizers that give every conversation the same ids.

    Attributes:
        size: How many tokens it has.
        vocabulary: sha256 of its tokens with their ids.
        rules: sha256 of the ids that it gives `probes.TEXTS` and texts of its tokens:
            how it cuts text, however that is written down.
        special: Ids of the tokens that begin and end a text; None for a start token
            that neither the tokenizer nor the template writes.
        template: sha256 of the chat template, None without one.
    """

    size: int
    vocabulary: str
    rules: str
    special: dict[str, int | None]
    template: str | None


def identify(tokenizer: Tokenizer) -> TokenizerIdentity:
    """Returns the identity of a tokenizer, by content, wherever it lies."""
    vocabulary = dict(getattr(tokenizer, "get_vocab", tokenizer.get_added_vocab)())
    encoder = Encoder(tokenizer)
    texts = vocabulary_texts(vocabulary, without=tokenizer.get_added_vocab())
    template = getattr(tokenizer, "chat_template", None)
    starts = encoder.adds_start or "bos_token" in str(template)
    start = getattr(tokenizer, "bos_token_id", None) if starts else None
    return TokenizerIdentity(
        size=len(vocabulary),
        vocabulary=_digest(sorted(vocabulary.items(), key=lambda item: item[1])),
        rules=_digest(encoder.ids([*TEXTS, *texts])),
        special={
            "bos_token_id": start,
            "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        },
        template=_digest(template) if template else None,
    )


def differences(
    made_by: TokenizerIdentity, given: TokenizerIdentity, *, chats: bool
) -> list[str]:
    """Returns what differs, in words; nothing when both give the same ids."""
    found = []
    if made_by.vocabulary != given.vocabulary:
        sizes = f"{made_by.size:,} tokens there, {given.size:,} here"
        found.append(f"the vocabulary ({sizes})")
    elif made_by.rules != given.rules:
        found.append("how text is cut (merges, normalizer or pre-tokenizer)")
    for name, number in made_by.special.items():
        if number != (other := given.special.get(name)):
            found.append(f"the {name} ({number} there, {other} here)")
    if chats and made_by.template != given.template:
        there, here = (each.template or "none" for each in (made_by, given))
        found.append(
            f"the chat template (sha256 {there[:12]} there, {here[:12]} here; give one "
            "by --chat-template)"
        )
    return found


def _digest(value: object) -> str:
    """Returns the sha256 of a value of JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


MANIFEST = "manifest.json"
FORMAT = "taid-jax prepared data 3"

TRAIN, VALIDATION = "train", "validation"
SIDES = (TRAIN, VALIDATION)


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One shard."""

    name: str
    side: str
    examples: int
    tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What was prepared, from what and how.

    Attributes:
        tokenizer: What the ids mean.
        chats: Whether a chat template was used.
        train_on_prompts: Whether prompts were counted.
        options: All that was asked for.
        sources: The files read, with their sizes.
        records: How many were read.
        left_out: How many of them were not taken, by reason.
        noted: How many were taken though there was something to say, by reason.
        files: The shards.
        versions: Of the packages that took part.
        unused_keys: How many records had each key that changed nothing.
        skipped_files: Files of the source that were passed over.
        notes: What else is to be said of the source, such as which split was taken.
    """

    tokenizer: TokenizerIdentity
    chats: bool
    train_on_prompts: bool
    options: Mapping[str, Any]
    sources: list[dict[str, Any]]
    records: int
    left_out: dict[str, int]
    noted: dict[str, int]
    files: list[ShardFile]
    versions: dict[str, str]
    unused_keys: dict[str, int]
    skipped_files: list[str]
    notes: list[str]

    def write(self, folder: pathlib.Path) -> None:
        """Puts it into the folder, whole or not at all."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        values["tokenizer"] = self.tokenizer._asdict()
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / MANIFEST, text.encode("utf-8", "backslashreplace"))


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Returns the manifest of a folder, None if it has none.

    Raises:
        DataError: If it cannot be read, or is of another format.
    """
    path = pathlib.Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if (found := values.pop("format")) != FORMAT:
            raise DataError(
                f"{path}: need the format {FORMAT!r}, got {found!r}; prepare the data "
                "with this version"
            )
        values["tokenizer"] = TokenizerIdentity(**values["tokenizer"])
        values["files"] = [ShardFile(**file) for file in values["files"]]
        return Manifest(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} is not a whole manifest of prepared data ({error}); prepare the "
            "data again"
        ) from error


def read_shards(
    folder: pathlib.Path,
    manifest: Manifest,
    tokenizer: Tokenizer,
    seq_len: int,
    *,
    train_on_prompts: bool,
    left_out: LeftOut,
) -> tuple[TokenTable, Bool[np.ndarray, " examples"]]:
    """Returns the examples of a folder of shards, and which are validated on.

    All of it is held in memory, five bytes a token: a billion tokens are 5 GB on every
    host.

    Args:
        folder: Where they lie.
        manifest: Of the folder.
        tokenizer: Of the run, which must give the ids that the shards hold.
        seq_len: Longer conversations are left out, longer windows of text are cut.
        train_on_prompts: Count every token.
        left_out: Told of what does not fit.

    Raises:
        DataError: If the shards were made with another tokenizer or chat template, hold
            no answers and those alone are asked for, or a file is missing or damaged.
    """
    found = differences(manifest.tokenizer, identify(tokenizer), chats=manifest.chats)
    if found:
        raise DataError(
            f"{folder} was prepared with another tokenizer than the teacher's; what "
            f"differs: {'; '.join(found)}. Prepare the data again with --tokenizer set "
            "to this teacher, or give the teacher that they were prepared for"
        )
    if manifest.train_on_prompts and not train_on_prompts:
        raise DataError(
            f"{folder} was prepared with --train-on-prompts, and does not tell which "
            "tokens are answers; train with --train-on-prompts, or prepare it again "
            "without"
        )
    pairs: list[tuple[int, Example]] = []
    validation, documents = [], 0
    for file in sorted(manifest.files, key=lambda file: SIDES.index(file.side)):
        path = folder / file.name
        data = _read_shard(path, file)
        try:
            rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
            examples = _examples(rows.select(SHARD_SCHEMA.names).cast(SHARD_SCHEMA))
        except (pyarrow.ArrowException, KeyError, ValueError) as error:
            raise DataError(
                f"{path} is not a shard of this format ({error}); prepare the "
                "data again"
            ) from error
        for number, (example, is_text) in enumerate(examples, start=1):
            size, fitting = len(example.ids), [example]
            if size > seq_len and is_text:
                fitting = [*cut_windows(example, seq_len)]
            elif size > seq_len:
                message = f"{size} tokens, the limit is {seq_len}"
                problem = RecordError("too_long", message)
                left_out.add(f"{path}, row {number}", problem)
                fitting = []
            pairs += [(documents, each) for each in fitting]
            validation += [file.side != TRAIN] * len(fitting)
            documents += 1
    if not pairs:
        raise DataError(
            f"{folder} has no example of at most {seq_len} tokens; raise seq_len"
        )
    table = make_table(pairs)
    if train_on_prompts:
        table = dataclasses.replace(table, counted=np.ones_like(table.counted))
        table.counted[table.starts[:-1]] = False
    return table, np.array(validation)


def _examples(rows: pyarrow.Table) -> list[tuple[Example, bool]]:
    """Returns the rows of a shard, and whether each is running text."""
    lists = [rows[name].combine_chunks() for name in ("input_ids", "loss_mask")]
    ids, mask = (each.flatten().to_numpy(zero_copy_only=False) for each in lists)
    starts, masked = (
        np.cumsum([0, *each.value_lengths().to_pylist()]) for each in lists
    )
    if not np.array_equal(starts, masked):
        raise ValueError("as many tokens as places of the mask are needed")
    prompts, ends, text = (rows[name].to_pylist() for name in SHARD_SCHEMA.names[2:])
    return [
        (Example(ids[start:stop], mask[start:stop], prompts[n], ends[n]), text[n])
        for n, (start, stop) in enumerate(itertools.pairwise(starts.tolist()))
    ]


def _read_shard(path: pathlib.Path, file: ShardFile) -> bytes:
    """Returns the bytes of a shard, which must be those that were written."""
    again = "copy it again, or prepare the data again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}, which {MANIFEST} names, cannot be read: {error.strerror}; {again}"
        ) from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(
            f"{path} is cut short, damaged or another file: it has {len(data):,} bytes "
            f"and not the sha256 of the {file.bytes:,} that {MANIFEST} names; {again}"
        )
    return data
