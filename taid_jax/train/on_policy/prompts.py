"""Prompts of a data set and of files, and the file that completions are written to."""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from taid_jax.data import DataError, ExampleSet, held_out_batches
from taid_jax.data.chat import ChatRenderer
from taid_jax.data.documents import ANSWER_ROLE, Chat, parse_prompt
from taid_jax.data.errors import RecordError
from taid_jax.data.records import kind_of, read_file
from taid_jax.data.tokens import Encoder, Tokenizer
from taid_jax.models.sampling import SamplingParams
from taid_jax.settings import SettingsError


class EvalPrompt(NamedTuple):
    """A prompt of a data set and what follows it there.

    Attributes:
        prompt: `(tokens,)` int32, all up to the last answer.
        reference: `(tokens,)` int32, the last answer with the token that ends it.
        teacher: The teacher's prompt, where it has one of its own.
    """

    prompt: Int32[np.ndarray, " prompt"]
    reference: Int32[np.ndarray, " reference"]
    teacher: Int32[np.ndarray, " teacher"] | None = None


def find_eval_prompts(examples: ExampleSet, limit: int) -> list[EvalPrompt]:
    """Returns the prompts in the first rows of a data set, at most `limit`.

    A row gives the prompt of its first example; running text is cut in its middle. The
    order depends on the data alone and is the same on all processes.

    Raises:
        DataError: If there is none.
    """
    found: list[EvalPrompt] = []
    # More than are wanted: the last answer is not found in every conversation.
    rows = held_out_batches(examples, 1, limit=2 * limit, with_prompts=True)
    for number, row in enumerate(rows if limit else []):
        start, stop = int(row["prompt_lengths"][0]), int(row["answer_ends"][0])
        if 0 < start < stop and len(found) < limit:
            ids = row["input_ids"][0]
            own = examples.table[examples.rows[number][0]].teacher
            own = own and own.ids[: own.prompt]
            found.append(EvalPrompt(ids[:start], ids[start:stop], own))
    if limit and not found:
        raise DataError(
            "completions cannot be scored: no held-out example has a prompt. Give data "
            "with `prompt` and `completion` or with `messages`, or set eval_prompts "
            "to 0"
        )
    return found


class Prompt(NamedTuple):
    """A prompt of a file.

    Attributes:
        number: Its place in the file, from 0.
        origin: The same for people, such as `prompts.jsonl, line 3`.
        content: As `parse_prompt` has it.
        ids: Its tokens, once it is encoded.
    """

    number: int
    origin: str
    content: Chat
    ids: Sequence[int] = ()

    def completed(self, text: str) -> dict[str, Any]:
        """Returns the record that training reads, with a completion."""
        content = self.content
        if content.is_pair:
            return {"prompt": content.messages[0].content, "completion": text}
        turns = [
            message.for_template() | ({} if message.trained else {"weight": 0})
            for message in content.messages
        ]
        record: dict[str, Any] = {
            "messages": [*turns, {"role": ANSWER_ROLE, "content": text}]
        }
        if content.options:
            record["chat_template_kwargs"] = dict(content.options)
        return record


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """Returns the prompts of a file of records, in any format that training reads.

    What should follow a prompt is left aside. Of a conversation all up to the last
    answer is the prompt, or all of it when it ends with a question.

    Raises:
        DataError: If the file or a record cannot be used, with its place, or there is
            no prompt.
    """
    if kind_of(path) in (None, ".txt"):
        raise DataError(f"{path}: need a file of records, such as .jsonl or .parquet")
    prompts = []
    # A record that is left out would shift the numbers of those after it.
    for number, (origin, record) in enumerate(read_file(path)):
        try:
            if isinstance(record, RecordError):
                raise record
            prompts.append(Prompt(number, origin, parse_prompt(record)))
        except RecordError as error:
            raise DataError(f"{origin}: {error}") from error
    if not prompts:
        raise DataError(f"{path} holds no prompt")
    return prompts


def digest(prompts: Sequence[Prompt]) -> str:
    """Returns 16 hexadecimal digits; other prompts, other digits."""
    text = repr([prompt.content for prompt in prompts])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, *, date: str | None = None
) -> list[Prompt]:
    """Returns the prompts with their ids, as training has them before the answer.

    Args:
        prompts: Without ids.
        tokenizer: Of the model that completes them.
        date: What templates take for today, `YYYY-MM-DD`; today when None.

    Raises:
        DataError: If a prompt is a conversation and there is no template, or the
            template refuses one.
    """
    encoder, renderer = Encoder(tokenizer), ChatRenderer(tokenizer, date=date)
    texts, framed = [], []
    for prompt in prompts:
        try:
            rendered = renderer.prompt(prompt.content)
        except RecordError as error:
            raise DataError(f"{prompt.origin}: {error}") from error
        texts.append(rendered.text)
        framed.append(rendered.framed)
    return [
        prompt._replace(ids=encoder.begin(row, added=bare))
        for prompt, row, bare in zip(prompts, encoder.ids(texts), framed, strict=True)
    ]


def choose_fitting(
    prompts: Sequence[Prompt], context: int, max_new_tokens: int
) -> list[Prompt]:
    """Returns the encoded prompts that leave room for a completion.

    Raises:
        DataError: If none does.
    """
    room = context - max_new_tokens
    fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= room]
    if not fitting:
        shortest = min(len(prompt.ids) for prompt in prompts)
        raise DataError(
            f"no prompt leaves room for a completion of {max_new_tokens} tokens: the "
            f"shortest has {shortest} and the model's context is {context}; ask for "
            "shorter ones"
        )
    return fitting


@dataclasses.dataclass(frozen=True)
class Job:
    """What decides the completions of a file, and so what it may be continued with.

    Attributes:
        model: As the user called it.
        prompts: What `digest` says of them.
        max_new_tokens: Tokens of a completion at most.
        seed: Of the draws.
        sampling: How tokens are taken.
        dtype: Of the computation.
        template_date: What the chat template takes for today.
        matmul_precision: Of float32 products.
    """

    model: str
    prompts: str
    max_new_tokens: int
    seed: int
    sampling: SamplingParams
    dtype: str
    template_date: str | None = None
    matmul_precision: str = "default"


def _job_file(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".job.json")


def _read_job(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_job_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def begun_on(path: pathlib.Path) -> str:
    """Returns the date that the prompts of a file of completions have, else today.

    Gone on with on another day, a template with a clock must not write another one.
    """
    return _read_job(path).get("template_date") or datetime.date.today().isoformat()


class CompletionsFile:
    """A file of completions, one line each, that can be gone on with.

    Beside it lies what decides them, `NAME.job.json`, so that it is continued with
    nothing else.

    Args:
        path: Of the file.
        job: What decides the completions.
        overwrite: Begin anew where there is a file.

    Attributes:
        done: Number of the first prompt that was not looked at yet.

    Raises:
        SettingsError: If there is a file that this job did not write.
    """

    def __init__(self, path: pathlib.Path, job: Job, *, overwrite: bool):
        self._path = path
        self.done = 0
        wanted = dataclasses.asdict(job)
        if path.exists() and not overwrite:
            found = {"matmul_precision": "default", **_read_job(path)}
            differences = [
                f"{name}: the file has {found.get(name)!r}, now {wanted[name]!r}"
                for name in wanted
                if found.get(name) != wanted[name]
            ]
            if differences:
                raise SettingsError(
                    f"output: {path} holds other completions:\n  "
                    + "\n  ".join(differences)
                    + "\nchoose another --output, or write it anew by --overwrite"
                )
            self.done = self._cut_back()
            return
        try:
            path.write_text("", encoding="utf-8")
            text = json.dumps(wanted, indent=2) + "\n"
            _job_file(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise SettingsError(f"output: cannot write {path}: {error}") from error

    def _cut_back(self) -> int:
        """Cuts a last line off that was not written to its end."""
        whole = self._path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            self._path.write_bytes(kept)
        lines = kept.splitlines()
        return json.loads(lines[-1])["number"] + 1 if lines else 0

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines, and hands them to the operating system at once."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
