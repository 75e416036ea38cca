"""Prepares conversations for training: tokenised, filtered, shuffled, in shards.

The source is a data set of the Hugging Face hub, a file of records (JSON lines, JSON,
CSV, Parquet, Arrow) or a folder of them; docs/data.md has the keys. Train with
`taid-jax train --data FOLDER`. A stopped preparation goes on when it is started
again; manifest.json and left_out.jsonl tell what became of every record.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro
from rich.console import Console
from rich.table import Table

from taid_jax.cli import _flags
from taid_jax.data.errors import FILTERS, REASONS
from taid_jax.data.options import PRESETS, PrepareOptions
from taid_jax.errors import InputError, refuse
from taid_jax.settings import ModelSettings, check_text

if TYPE_CHECKING:
    from taid_jax.data.shards import Manifest


@dataclasses.dataclass(frozen=True)
class Command:
    """The flags.

    Attributes:
        options: What is prepared, and how.
        tokenizer: Model whose tokenizer is used: the teacher of the training.
        chat_template: A Jinja template in place of the tokenizer's own.
        preset: `ultrachat` gives the data set, splits and filter of the published
            recipe; flags go over it.
    """

    options: Annotated[PrepareOptions, tyro.conf.arg(name="")]
    tokenizer: str = ModelSettings().teachers[0]
    chat_template: str | None = None
    preset: Literal["ultrachat"] | None = None


def parse(arguments: Sequence[str]) -> Command:
    """Returns the flags, laid over those of `--preset`.

    Raises:
        SettingsError: If an option cannot be used.
    """
    preset = _flags.first_flags(arguments, "preset").preset
    # Before the others, so that those go over them.
    flags = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in PRESETS.get(preset, {}).items()
    ]
    command = _flags.parse(Command, [*flags, *arguments], __doc__)
    for name in ("tokenizer", "chat_template"):
        check_text(name, getattr(command, name) or "")
    return command


def show(manifest: "Manifest", console: Console) -> None:
    """Prints what was prepared and what was left out."""
    from taid_jax.data.shards import SIDES

    sides = Table("side", "examples", "tokens", "shards")
    for side in SIDES:
        files = [file for file in manifest.files if file.side == side]
        examples = sum(file.examples for file in files)
        tokens = sum(file.tokens for file in files)
        sides.add_row(side, f"{examples:,}", f"{tokens:,}", str(len(files)))
    console.print(sides)
    told = Table(
        "records", "what became of them", title=f"of {manifest.records:,} read"
    )
    meanings = {**REASONS, **FILTERS}
    for reason, count in sorted(manifest.left_out.items()):
        told.add_row(f"{count:,}", f"left out ({reason}): {meanings[reason]}")
    for reason, count in sorted(manifest.noted.items()):
        told.add_row(f"{count:,}", f"saved, but: {reason.replace('_', ' ')}")
    for key, count in sorted(manifest.unused_keys.items()):
        told.add_row(f"{count:,}", f"saved, but the key `{key}` changed nothing")
    if told.row_count:
        console.print(told)
    if skipped := manifest.skipped_files:
        few = ", ".join(skipped[:5])
        more = ", ..." * (len(skipped) > 5)
        _flags.say(console, f"{len(skipped)} files passed over: {few}{more}")
    for note in manifest.notes[:20]:
        _flags.say(console, note)


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    console = Console()
    try:
        command = parse(arguments)
        from taid_jax.data import Tokenizer
        from taid_jax.data.prepare import REPORT, prepare
        from taid_jax.data.shards import MANIFEST
        from taid_jax.data.template import set_chat_template
        from taid_jax.models.files.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(command.tokenizer)
        if command.chat_template is not None:
            set_chat_template(cast(Tokenizer, tokenizer), command.chat_template)
        # transformers declares some of these methods on its subclasses alone.
        manifest = prepare(command.options, cast(Tokenizer, tokenizer))
    except InputError as error:
        return refuse(error)
    show(manifest, console)
    output = command.options.output
    _flags.say(console, f"shards, {MANIFEST} and {REPORT} are in {output}")
    return 0
