"""What a run reads, and everything about it that can be wrong: looked at first."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from jax.sharding import Mesh

from taid_jax.data import DataError, Dataset, load_dataset
from taid_jax.data import Tokenizer as DataTokenizer
from taid_jax.data.teacher_field import TeacherField
from taid_jax.data.template import set_chat_template
from taid_jax.errors import ModelError, show
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import select_layers
from taid_jax.models.files.load import OpenModel, open_model
from taid_jax.models.files.tokenizer import Tokenizer, require_tokenizer
from taid_jax.models.files.vocabulary import (
    count_tokens,
    own_tokenizer,
    same_tokenizer,
    with_tokenizer,
)
from taid_jax.models.memory import host_memory
from taid_jax.settings import ModelSettings, Settings, SettingsError
from taid_jax.sharding import batch_part
from taid_jax.store.format import TEACHER, StoreError
from taid_jax.store.read import Store
from taid_jax.train.teachers import StoreColumns

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
