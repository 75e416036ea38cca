"""The manifest of prepared data: what lies in the folder, and what it was made from."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from taid_jax.data.errors import DataError
from taid_jax.data.identity import TokenizerIdentity
from taid_jax.files import write_whole

MANIFEST = "manifest.json"
FORMAT = "taid-jax prepared data 2"

TRAIN, VALIDATION = "train", "validation"
SIDES = (TRAIN, VALIDATION)


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """One shard.

    Attributes:
        name: Of the file, in the folder.
        side: `train` or `validation`.
        examples: Its rows.
        tokens: In them.
        bytes: Of the file.
        sha256: Of the file.
    """

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
    unused_keys: dict[str, int] = dataclasses.field(default_factory=dict)
    skipped_files: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def write(self, folder: pathlib.Path) -> None:
        """Puts it into the folder, whole or not at all."""
        values = {"format": FORMAT} | dataclasses.asdict(self)
        values["tokenizer"] = self.tokenizer._asdict()
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        write_whole(folder / MANIFEST, text.encode())


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


def read_shard_file(folder: pathlib.Path, file: ShardFile) -> bytes:
    """Returns the bytes of a shard, checked.

    Raises:
        DataError: If it is missing, cut short or another.
    """
    path = folder / file.name
    again = "copy it again, or prepare the data again"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}, which {MANIFEST} names, cannot be read: {error.strerror}; {again}"
        ) from error
    if len(data) != file.bytes:
        what = "cut short" if len(data) < file.bytes else "too long"
        raise DataError(
            f"{path} is {what}: {len(data):,} bytes, and {MANIFEST} says "
            f"{file.bytes:,}; {again}"
        )
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DataError(
            f"{path} is damaged, or another file: its sha256 is not that of "
            f"{MANIFEST}; {again}"
        )
    return data
