"""Teacher and student with their weights, on their devices."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.errors import ModelError
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import abstract_params, param_axes, select_layers
from taid_jax.models.files.load import LoadedModel, OpenModel
from taid_jax.models.files.tokenizer import require_tokenizer
from taid_jax.models.files.vocabulary import (
    count_tokens,
    resize_vocabulary,
    translate_ids,
    with_tokenizer,
)
from taid_jax.models.memory import check_fits, params_need
from taid_jax.settings import ModelSettings, Settings
from taid_jax.sharding import TEACHER_RULES, tree_shardings
from taid_jax.store.format import StoreError
from taid_jax.store.read import Store
from taid_jax.store.teacher import head_params
from taid_jax.train.inputs import OpenPair, named_teachers, open_pair
from taid_jax.train.teachers import join_params, teacher_functions
from taid_jax.types import ModelFunctions, Params


@dataclasses.dataclass(frozen=True)
class Pair:
    """A teacher, or several that teach together, and their student.

    Attributes:
        teachers: In the compute dtype; without parameters where one is `averaged`.
        student_config: The student's architecture.
        student_params: Its float32 master weights.
        shardings: Where the student's weights live.
        teacher_paths: The teachers' folders or files.
        generation: Settings of generation, as in generation_config.json: the student's
            own, and of the teacher's what these lack.
        notes: What a user should know of how the models were read, a line each.
        teacher_functions: What the train step needs of the teachers.
        stores: The teachers' outputs, where these stand for them: their parameters are
            then what their heads need.
        averaged: Whether the teacher is the moving average of the student's weights,
            which is in the state of the run.
    """

    teachers: tuple[LoadedModel, ...]
    student_config: DecoderConfig
    student_params: Params
    shardings: Any
    teacher_paths: tuple[pathlib.Path, ...]
    teacher_functions: ModelFunctions
    generation: Mapping[str, object] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    stores: tuple[Store, ...] = ()
    averaged: bool = False

    @property
    def teacher(self) -> LoadedModel:
        """The first teacher, which alone completes texts."""
        return self.teachers[0]

    @property
    def teacher_params(self) -> Any:
        """What `teacher_functions` take."""
        return join_params([each.params for each in self.teachers])

    @property
    def teachers_at_start(self) -> list[Params]:
        """The parameters of each teacher before the first step."""
        if self.averaged:
            return [self.student_params]
        return [each.params for each in self.teachers]


def load_pair(
    settings: Settings,
    mesh: Mesh,
    models: OpenPair | None = None,
    *,
    copies: int = 3,
) -> Pair:
    """Returns teacher and student on their devices.

    Args:
        settings: Of the run.
        mesh: The devices.
        models: What `check_models` has opened; opened here when None.
        copies: Arrays like each of the student's weights that there will be: the two
            moments of the optimizer with them, or two while they are loaded.

    Raises:
        ModelError: If a model cannot be used, or both do not fit in memory.
    """
    model = settings.model

    def shardings(config: DecoderConfig) -> Any:
        return tree_shardings(param_axes(config), abstract_params(config), mesh)

    def teacher_shardings(config: DecoderConfig) -> Any:
        rules = TEACHER_RULES[model.teacher_sharding]
        return tree_shardings(param_axes(config), abstract_params(config), mesh, rules)

    models = models or open_pair(model)
    learner, averaged = models.student_config, model.teacher_ema is not None
    needs = [
        params_need(
            "the student and its moving average" if averaged else "the student",
            learner,
            "float32",
            shardings(learner),
            copies=copies + averaged,
        )
    ]
    if averaged:
        check_fits(*needs)
        teachers = [models.teacher.without_weights()]
    elif not models.stores:
        for name, each in named_teachers(models.teachers).items():
            where = teacher_shardings(each.config)
            needs.append(params_need(f"the {name}", each.config, model.dtype, where))
        check_fits(*needs[1:], needs[0])
        teachers = [
            each.load(dtype=model.dtype, shardings=teacher_shardings)
            for each in models.teachers
        ]
    else:
        check_fits(*needs)
        teachers = [
            load_stored(store, each, model.dtype, teacher_shardings)
            for store, each in zip(models.stores, models.teachers, strict=True)
        ]
    teacher = teachers[0]
    notes = [f"teacher: {note}" for note in _of_itself(settings)]
    notes += [
        f"{name}: {note}"
        for name, each in named_teachers(teachers).items()
        for note in each.notes
    ]
    if len(teachers) > 1:
        notes += _describe_mean(model)
    generation = teacher.generation
    if models.student is not None and model.student is not None:
        # A shallower student is cut out of one that lies as it does, all but in depth.
        student = models.student.load(shardings=shardings)
        own_settings = student.generation
        if model.resize_embeddings and teacher.tokenizer is not None:
            own_settings = translate_ids(
                own_settings, student.tokenizer, teacher.tokenizer
            )
        generation = {**generation, **own_settings}
    elif models.student is not None:
        key = jax.random.key(settings.run.seed)
        student = models.student.random_init(key, shardings=shardings)
    else:
        student = None
    if student is not None:
        params, config = student.params, student.config
        notes += [f"student: {note}" for note in student.notes]
        if model.student is not None and model.student_layers is not None:
            params, config = select_layers(params, config, model.student_layers)
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
        return dataclasses.replace(config, vocab_size=size, padded_vocab_size=size)

    def resized(params: Params) -> Params:
        return resize_vocabulary(params, size) if model.resize_embeddings else params

    for number, each in enumerate(teachers):
        if model.resize_embeddings and each.config.padded_vocab_size != size:
            new = fitted(each.config)
            resize = jax.jit(resized, out_shardings=teacher_shardings(new))
            teachers[number] = dataclasses.replace(
                each, config=new, params=resize(each.params)
            )
    config = fitted(config)
    where = shardings(config)

    # A copy: the train step donates the student's arrays, and the teacher keeps its.
    def own(params: Params) -> Params:
        return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), resized(params))

    own_params = jax.jit(own, out_shardings=where)(params)
    functions = teacher_functions(
        model,
        [each.config for each in teachers],
        [store.manifest for store in models.stores],
        own_rows=settings.data.teacher_prompt is not None,
    )
    return Pair(
        tuple(teachers),
        config,
        own_params,
        where,
        tuple(each.source.path for each in models.teachers),
        functions,
        generation,
        tuple(notes),
        models.stores,
        averaged,
    )


def _describe_mean(model: ModelSettings) -> list[str]:
    """Returns what several teachers teach together, in lines."""
    pairs = zip(model.teachers, model.shares_of_teachers, strict=True)
    parts = " + ".join(f"{share:.3g} x {name}" for name, share in pairs)
    by_record = f", or as the records' `{model.teacher_field}` says"
    return [
        f"the teacher is the {model.teacher_mean} mean {parts}"
        f"{by_record if model.teacher_field else ''}; KL and perplexity are of the mean"
    ]


def _of_itself(settings: Settings) -> list[str]:
    """Returns what is to be said of a teacher that is the student."""
    if not settings.model.teaches_itself:
        return []
    ema = settings.model.teacher_ema
    notes = [
        "the student as it starts"
        if ema is None
        else f"the moving average of the student's weights, each step keeps {ema:g}"
    ]
    same = settings.data.teacher_prompt is None
    if settings.objective.distil_ratio == 1 and same:
        notes.append(
            "it begins as the student and sees what that sees: with distil_ratio 1 "
            "and no teacher_prompt there is nothing to learn from it"
        )
    return notes


def load_stored(
    store: Store, model: OpenModel, dtype: str, shardings: Any
) -> LoadedModel:
    """Returns a teacher of which only the head is loaded, if that is stored at all.

    Raises:
        StoreError: If the head is not that of the config.
    """
    tokenizer = require_tokenizer(model.tokenizer, model.source)
    config, about = with_tokenizer(model.config, tokenizer), store.manifest
    params: dict[str, Any] = {}
    if about.kind == "hidden":
        stored = store.head()

        def one(path: Any, leaf: Any, where: Any) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            if name not in stored or stored[name].shape != leaf.shape:
                raise StoreError(f"{store.folder}: {name} is not as the config has it")
            array = stored[name].astype(dtype)
            return jax.make_array_from_callback(leaf.shape, where, array.__getitem__)

        shapes, places = (
            head_params(tree, config)
            for tree in (abstract_params(config), shardings(config))
        )
        params = jax.tree_util.tree_map_with_path(one, shapes, places)
    notes = (
        f"its outputs are read from {store.folder}: {about.kind} of {about.tokens:,} "
        f"tokens, {about.bytes_per_token:,} bytes each",
    )
    if about.kind == "sampled":
        notes += (
            "of the tokens that were drawn alone are held-out KL and the teacher's "
            "perplexity: students can be compared by this KL, but it is too large, and "
            "the perplexity says nothing of the teacher",
        )
    if about.mass is not None:
        notes += (
            f"the stored tokens have {about.mass:.4f} of its probability on average; "
            "the rest is spread over the others (--tail), so that objectives which mix "
            "both rows (TAID, AMiD, skew, Jensen-Shannon) are approximations",
        )
    generation = model.generation
    return LoadedModel(config, params, tokenizer, about.source, generation, notes)
