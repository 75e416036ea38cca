"""What a run reads, and everything about it that can be wrong: looked at first."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.data import DataError, Dataset, load_dataset
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.teacher_field import TeacherField
from taid_jax.data.template import set_chat_template
from taid_jax.errors import ModelError, show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import (
    abstract_params,
    param_axes,
    select_layers,
)
from taid_jax.models.files.load import LoadedModel, OpenModel, open_model
from taid_jax.models.files.tokenizer import (
    Tokenizer,
    require_tokenizer,
)
from taid_jax.models.files.vocabulary import (
    count_tokens,
    own_tokenizer,
    resize_vocabulary,
    same_tokenizer,
    translate_ids,
    with_tokenizer,
)
from taid_jax.models.memory import check_fits, host_memory, params_need
from taid_jax.settings import ModelSettings, Settings, SettingsError
from taid_jax.sharding import TEACHER_RULES, batch_part, tree_shardings
from taid_jax.store.format import TEACHER, StoreError
from taid_jax.store.read import Store
from taid_jax.store.teacher import head_params
from taid_jax.train.teachers import StoreColumns, join_params, teacher_functions
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


_BYTES_OF_TOKEN = 96
"""Of a batch on its host: four arrays of int32, read ahead, waiting and in use."""


_BATCHES = 6
"""Batches with a teacher's outputs that are there at once, read ahead and in use."""


def check_memory(settings: Settings, mesh: Mesh, stores: Sequence[Store] = ()) -> None:
    """Raises unless the batches, and the completions that are kept, can be held at all.

    Args:
        settings: Of the run.
        mesh: Its devices.
        stores: Where the teachers' outputs come from.

    Raises:
        SettingsError: If they need more memory than this machine has.
    """
    data, texts = settings.data, settings.on_policy
    width = _BYTES_OF_TOKEN
    width += _BATCHES * sum(store.manifest.bytes_per_token for store in stores)
    sizes = {"batch_size": data.batch_size // batch_part(mesh)[1] * width}
    if texts.texts != "data":
        kept = texts.buffer_capacity * (2 if texts.texts == "pairs" else 1)
        sizes["buffer_capacity"] = kept * 5  # Ids, and what counts.
    for name, size in sizes.items():
        needed = size * (data.seq_len + (data.teacher_len or 0))
        memory = host_memory()
        if needed > memory:
            raise SettingsError(
                f"{name}: so many sequences of seq_len {data.seq_len} need at least "
                f"{needed / 2**30:,.1f} GiB, and this machine has "
                f"{memory / 2**30:,.1f} GiB; choose fewer, or shorter ones"
            )


class OpenPair(NamedTuple):
    """Teacher and student of which everything was read but the weights.

    Attributes:
        teachers: Opened.
        student: The same; None where it is made of the first teacher's layers.
        student_config: Its architecture.
        tokenizer: Of the run: the student's own, with what that lacks from the
            teacher's, and the teacher's where the student is made of its layers, of a
            config, or for its tokenizer (`resize_embeddings`; without a chat template
            that gets the student's).
        stores: The teachers' outputs, where these stand for them; `teachers` are then
            the models without weights that they are of.
    """

    teachers: tuple[OpenModel, ...]
    student: OpenModel | None
    student_config: DecoderConfig
    tokenizer: Tokenizer
    stores: tuple[Store, ...] = ()

    @property
    def teacher(self) -> OpenModel:
        """The first teacher, whose tokenizer all have."""
        return self.teachers[0]


_ONE_TOKENIZER = (
    "Several teachers need one tokenizer, since their mean is of what each gives to an "
    "id; take teachers of one family"
)


def check_models(
    settings: ModelSettings, seq_len: int, teacher_len: int | None = None
) -> OpenPair:
    """Returns the models after reading all but the weights, and comparing them.

    Args:
        settings: Of the models.
        seq_len: Tokens of a row.
        teacher_len: Of a row of the teacher; `seq_len` when None.

    Raises:
        ModelError: If a model cannot be used, or the tokenizers differ.
        SettingsError: If the sequences are longer than a model's context.
    """
    models = open_pair(settings)
    tokenizer, student = models.tokenizer, models.student
    for number, other in enumerate(models.teachers[1:], start=2):
        found = require_tokenizer(other.tokenizer, other.source)
        whose = "the first teacher", f"teacher {number}, {other.source.name},"
        same_tokenizer(tokenizer, found, whose=whose, needed=_ONE_TOKENIZER)
    if student is not None and settings.student is not None:
        if settings.resize_embeddings:
            own = student.tokenizer
            if own is not None and not tokenizer.chat_template:
                tokenizer.chat_template = own.chat_template
        else:
            own = require_tokenizer(student.tokenizer, student.source)
            same_tokenizer(tokenizer, own)
            tokenizer = own_tokenizer(own, tokenizer)
    configs = {
        **{name: each.config for name, each in named_teachers(models.teachers).items()},
        "student": models.student_config,
    }
    for name, config in configs.items():
        flag, length = "seq_len", seq_len
        if name != "student" and teacher_len is not None:
            flag, length = "teacher_seq_len", teacher_len
        if length > config.max_position_embeddings:
            raise SettingsError(
                f"{flag}: {length} is beyond the {name}'s context of "
                f"{config.max_position_embeddings} tokens"
            )
        if settings.resize_embeddings:
            continue
        try:
            with_tokenizer(config, tokenizer)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
    return models._replace(tokenizer=tokenizer)


def open_pair(settings: ModelSettings) -> OpenPair:
    """Returns the models after reading all but the weights; not compared yet.

    Raises:
        ModelError: If a model cannot be used.
        SettingsError: If the teacher has not the layers that the student is to have.
    """
    allow = settings.allow_unknown_keys
    stores: tuple[Store, ...] = ()
    if settings.teacher_store is None:
        named = settings.teachers
        if settings.teaches_itself and settings.student is not None:
            named = (settings.student,)
        opened = [open_model(each, allow_unknown_keys=allow) for each in named]
    else:
        stores = tuple(Store(each) for each in settings.teachers)
        kinds = [store.manifest.kind for store in stores]
        if settings.tail != "student" and "topk" not in kinds:
            raise SettingsError(
                "tail: has no effect with a store of kind "
                f"{', '.join(kinds)}; leave it out"
            )
        if settings.teacher_mean == "geometric" and "sampled" in kinds:
            raise SettingsError(
                "teacher_mean: need arithmetic with the drawn tokens of "
                f"{stores[kinds.index('sampled')].folder}, got geometric: what was not "
                "drawn has probability 0, and so would have the mean"
            )
        opened = [open_model(each.folder / TEACHER, weights=False) for each in stores]
    teacher = opened[0]
    tokenizer = require_tokenizer(teacher.tokenizer, teacher.source)
    whose, layers = "teacher", settings.layers_of_teacher
    if settings.student is not None:
        student = open_model(settings.student, allow_unknown_keys=allow)
        whose, layers = "student", settings.student_layers
    elif settings.student_config is not None:
        student = open_model(
            settings.student_config, weights=False, allow_unknown_keys=allow
        )
        layers = None
    else:
        student = None
    config = teacher.config if student is None else student.config
    if layers is not None:
        if layers > config.num_layers:
            raise SettingsError(
                f"student_layers: the {whose} has {config.num_layers} layers, got "
                f"{layers}"
            )
        # Only the choice of layers says what the student's are.
        _, config = select_layers({"layers": {}}, config, layers)
    return OpenPair(tuple(opened), student, config, tokenizer, stores)


def named_teachers(teachers: Sequence[Any]) -> dict[str, Any]:
    """Returns teachers by what messages call them."""
    if len(teachers) == 1:
        return {"teacher": teachers[0]}
    return {f"teacher {n}": each for n, each in enumerate(teachers, start=1)}


def read_data(
    settings: Settings, tokenizer: Tokenizer, stores: Sequence[Store] = ()
) -> Dataset:
    """Returns the training and held-out examples that the settings ask for.

    A chat template among the settings becomes the tokenizer's, and is exported with it.

    Args:
        settings: Of the run.
        tokenizer: Of the run.
        stores: The teachers' outputs, which the batches then have too.

    Raises:
        DataError: If the data cannot be used, or have ids that the models lack.
        StoreError: If a store lacks examples.
    """
    data, model = settings.data, settings.model
    if data.chat_template is not None:
        set_chat_template(cast(DataTokenizer, tokenizer), data.chat_template)
    date = data.template_date
    if date is None:
        date = template_date(stores)
    field = None
    if model.teacher_field is not None:
        shares = model.shares_of_teachers
        field = TeacherField(model.teacher_field, model.teachers, shares)
    dataset = load_dataset(
        data.data,
        # transformers declares some of these methods on its subclasses alone.
        cast(DataTokenizer, tokenizer),
        seq_len=data.seq_len,
        held_out_fraction=data.held_out_fraction,
        train_on_prompts=data.train_on_prompts,
        pack=data.pack,
        buckets=data.bucket_lengths,
        bad_records=data.bad_records,
        merge_system=data.merge_system,
        template_date=date,
        prompts_suffice=settings.on_policy.prompts_suffice,
        teacher_field=field,
        teacher_prompt=data.teacher_prompt,
        teacher_len=data.teacher_len,
    )
    ids, count = dataset.train.table.ids, count_tokens(tokenizer)
    if len(ids) and not 0 <= ids.min() <= ids.max() < count:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(
            f"{data.data} has the token id {wrong}, and the tokenizer ids from 0 to "
            f"{count - 1}; prepare the data with the tokenizer of this teacher"
        )
    if not stores:
        return dataset
    objective = settings.objective.objective
    for store in stores:
        if store.manifest.kind == "sampled" and objective not in ("forward_kl", "sft"):
            raise SettingsError(
                f"objective: need forward_kl with the drawn tokens of {store.folder}, "
                f"got {objective}: draws are unbiased for its gradient alone"
            )
        _check_stored(settings, dataset, store)
    return dataset.with_columns(StoreColumns(stores))


def template_date(stores: Sequence[Store]) -> str | None:
    """Returns the day that the texts of stores have in them, if they say so."""
    dates = [store.manifest.made.get("template_date") for store in stores]
    return next((date for date in dates if date is not None), None)


def _check_stored(settings: Settings, dataset: Dataset, store: Store) -> None:
    """Raises unless a store has all examples of a data set.

    Raises:
        StoreError: With how many it lacks, the first of them, and what may be why.
    """
    table, missing, first, total = dataset.train.table, 0, "", 0
    sides = {"training": dataset.train, "held-out": dataset.held_out}
    for name, side in sides.items():
        for number in (number for row in side.rows for number in row):
            total += 1
            if not store.has(table[number].ids):
                if not missing:
                    ids = show(table[number].ids[:8].tolist())
                    first = (
                        f"{name} example {number} of {len(table[number].ids)} tokens, "
                        f"which begins with {ids}"
                    )
                missing += 1
    if not missing:
        return
    made, data = store.manifest.made, settings.data
    here: dict[str, object] = {"data": data.data, "seq_len": data.seq_len}
    if data.template_date is not None:
        here["template_date"] = data.template_date
    others = [
        f"{key} {show(made[key])}, here {show(value)}"
        for key, value in here.items()
        if made.get(key, value) != value
    ]
    part = made.get("part", "1/1")
    if part != "1/1":
        others.append(f"part {part} of the work")
    hint = f"; it was made with {' and '.join(others)}" if others else ""
    raise StoreError(
        f"teacher_store: {store.folder} lacks {missing:,} of {total:,} examples, the "
        f"first of them {first}{hint}. Store them with the data settings of this run, "
        "or train with those of the store"
    )


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
