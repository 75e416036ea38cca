"""What a run reads, and everything about it that can be wrong: looked at first."""

import dataclasses
import os
import pathlib
import socket
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax import distributed
from taid_jax.data import DataError, Dataset, load_dataset
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.template import set_chat_template
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, param_axes, select_layers
from taid_jax.models.errors import ModelError
from taid_jax.models.load import LoadedModel, load_config, load_model, random_init
from taid_jax.models.tokenizer import Tokenizer, load_tokenizer, same_tokenizer
from taid_jax.models.vocabulary import (
    count_tokens,
    resize_vocabulary,
    with_tokenizer,
)
from taid_jax.settings import ModelSettings, Settings, SettingsError, contradictions
from taid_jax.sharding import TEACHER_RULES, tree_shardings
from taid_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher and the student that it teaches.

    Attributes:
        teacher: In the compute dtype.
        student_config: The student's architecture.
        student_params: Its float32 master weights.
        shardings: Where the student's weights live.
    """

    teacher: LoadedModel
    student_config: DecoderConfig
    student_params: Params
    shardings: Any


def prepare_output(settings: Settings) -> pathlib.Path:
    """Returns the output folder, made and writable; never one with something in it.

    Raises:
        SettingsError: If it cannot be written, holds something and `resume` is not set,
            or holds nothing and `resume` is set.
    """
    folder = pathlib.Path(settings.run.output).absolute()
    # A plan of this run may lie there already.
    filled = folder.is_dir() and any(
        entry.name != "plan.json" for entry in folder.iterdir()
    )
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"output: {folder} is not a folder")
    if filled and not settings.run.resume:
        raise SettingsError(
            f"output: {folder} is not empty. Go on with what is there by --resume, or "
            "choose another --output; nothing was changed"
        )
    if settings.run.resume and not (folder / "checkpoints").is_dir():
        raise SettingsError(
            f"resume: {folder} has no checkpoints to go on from; leave --resume out to "
            "start anew"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"output: cannot make {folder}: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"output: {folder} is not writable")
    return folder


def share_output(settings: Settings) -> pathlib.Path:
    """Returns the output folder, which process 0 prepares for all processes.

    Raises:
        SettingsError: On process 0, as `prepare_output`.
        DistributedError: If another process does not see the folder.
    """
    folder = pathlib.Path(distributed.broadcast(lambda: str(prepare_output(settings))))
    if not folder.is_dir():
        raise distributed.DistributedError(
            f"output: process 0 has made {folder}, which is not on this host "
            f"({socket.gethostname()}); it has to be on storage that all hosts share"
        )
    return folder


def check_models(settings: ModelSettings, seq_len: int) -> Tokenizer:
    """Returns the tokenizer after reading configs and tokenizers, before any weights.

    Raises:
        ModelError: If a model cannot be used, or the tokenizers differ.
        SettingsError: If the sequences are longer than a model's context.
    """
    teacher = load_config(settings.teacher)
    tokenizer = load_tokenizer(settings.teacher)
    configs = {"teacher": teacher}
    if settings.student is not None:
        configs["student"] = load_config(settings.student)
        if not settings.resize_embeddings:
            same_tokenizer(tokenizer, load_tokenizer(settings.student))
    elif settings.student_config is not None:
        configs["student"] = load_config(settings.student_config)
    else:
        layers = settings.layers_of_teacher
        if layers > teacher.num_layers:
            raise SettingsError(
                f"student_layers: the teacher has {teacher.num_layers} layers, "
                f"got {layers}"
            )
    for name, config in configs.items():
        if seq_len > config.max_length:
            raise SettingsError(
                f"seq_len: {seq_len} is beyond the {name}'s context of "
                f"{config.max_length} tokens"
            )
        if not settings.resize_embeddings:
            with_tokenizer(config, tokenizer)
    return tokenizer


def read_data(settings: Settings, tokenizer: Tokenizer) -> Dataset:
    """Returns the training and held-out examples that the settings ask for.

    A chat template among the settings becomes the tokenizer's, and is exported with it.

    Raises:
        DataError: If the data cannot be used, or have ids that the models lack.
    """
    data = settings.data
    if data.chat_template is not None:
        set_chat_template(cast(DataTokenizer, tokenizer), data.chat_template)
    dataset = load_dataset(
        data.data,
        # transformers declares some of these methods on its subclasses alone.
        cast(DataTokenizer, tokenizer),
        seq_len=data.seq_len,
        held_out_fraction=data.held_out_fraction,
        count_prompts=data.count_prompts,
        pack=data.pack,
        buckets=data.bucket_lengths,
        bad_records=data.bad_records,
    )
    ids, count = dataset.train.table.ids, count_tokens(tokenizer)
    if len(ids) and not 0 <= ids.min() <= ids.max() < count:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(
            f"{data.data} has the token id {wrong}, and the tokenizer ids from 0 to "
            f"{count - 1}; prepare the data with the tokenizer of this teacher"
        )
    return dataset


def refuse_contradictions(saved: Settings, asked: Settings) -> None:
    """Raises when a resumed run would compute something else than was begun.

    Raises:
        SettingsError: With a line per difference.
    """
    found = contradictions(saved, asked)
    if found:
        raise SettingsError(
            "the settings contradict the checkpoint:\n  "
            + "\n  ".join(found)
            + "\nuse the checkpoint's, or start anew with another --output"
        )


def load_pair(settings: Settings, mesh: Mesh) -> Pair:
    """Returns teacher and student on their devices."""
    model = settings.model

    def shardings(config: DecoderConfig) -> Any:
        return tree_shardings(param_axes(config), abstract_params(config), mesh)

    def teacher_shardings(config: DecoderConfig) -> Any:
        rules = TEACHER_RULES[model.teacher_layout]
        return tree_shardings(param_axes(config), abstract_params(config), mesh, rules)

    teacher = load_model(model.teacher, dtype=model.dtype, shardings=teacher_shardings)
    if model.student is not None:
        student = load_model(model.student, dtype="float32", shardings=shardings)
        params, config = student.params, student.config
    elif model.student_config is not None:
        student = random_init(
            model.student_config, jax.random.key(settings.run.seed), shardings=shardings
        )
        params, config = student.params, student.config
    else:
        params, config = select_layers(
            teacher.params, teacher.config, model.layers_of_teacher
        )
    tokenizer = teacher.tokenizer
    if tokenizer is None:  # `check_models` refuses such a teacher before.
        raise ModelError(f"{model.teacher} has no tokenizer")
    size = count_tokens(tokenizer)

    def fitted(config: DecoderConfig) -> DecoderConfig:
        if not model.resize_embeddings:
            return with_tokenizer(config, tokenizer)
        return dataclasses.replace(config, vocab_size=size, num_tokens=None)

    def resized(params: Params) -> Params:
        return resize_vocabulary(params, size) if model.resize_embeddings else params

    if model.resize_embeddings and teacher.config.vocab_size != size:
        new = fitted(teacher.config)
        resize = jax.jit(resized, out_shardings=teacher_shardings(new))
        teacher = dataclasses.replace(
            teacher, config=new, params=resize(teacher.params)
        )
    config = fitted(config)
    where = shardings(config)

    # A copy: the train step donates the student's arrays, and the teacher keeps its.
    def own(params: Params) -> Params:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), resized(params))

    return Pair(teacher, config, jax.jit(own, out_shardings=where)(params), where)
