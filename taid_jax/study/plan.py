"""What the study trains: sizes, methods, budgets, learning rates, seeds."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

METHODS: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "jensen_shannon": {"objective": "jensen_shannon"},
    "skew_forward_kl": {"objective": "skew_forward_kl"},
    "skew_reverse_kl": {"objective": "skew_reverse_kl"},
    "adaptive_kl": {"objective": "adaptive_kl"},
    "total_variation": {"objective": "total_variation"},
    "dkd": {"objective": "dkd"},
    "ctkd": {"objective": "ctkd"},
    "taid_linear": {"objective": "taid", "disable_adaptive": True},
    "taid": {"objective": "taid"},
}
"""Methods by name, as settings of a run; what they leave out is the default."""

VARIANTS: dict[str, dict[str, Any]] = {
    "taid_linear, t_start 0": {**METHODS["taid_linear"], "t_start": 0.0},
    "taid_linear, t_start 0.2": {**METHODS["taid_linear"], "t_start": 0.2},
    "taid_linear, t_start 0.8": {**METHODS["taid_linear"], "t_start": 0.8},
    "taid, alpha 0.005": {**METHODS["taid"], "alpha": 5e-3},
    "taid, alpha 0.05": {**METHODS["taid"], "alpha": 5e-2},
    "taid, gap": {**METHODS["taid"], "t_schedule": "gap"},
}
"""TAID with another start or another controller; tuned as `taid_linear` and `taid`."""

EQUAL_TIME = "sft, equal time"
"""SFT for as many steps as take the time of forward KL with a live teacher."""


class StudyError(RuntimeError):
    """A run of the study failed; what is done is kept."""


class Size(NamedTuple):
    """The shape of a model.

    Attributes:
        layers: How many.
        width: Of the hidden states; the MLP is three times as wide.
        heads: Of attention.
    """

    layers: int
    width: int
    heads: int


class Run(NamedTuple):
    """One student that is trained.

    Attributes:
        method: A key of `METHODS` or `VARIANTS`, or `EQUAL_TIME`.
        teacher: A key of the plan's teachers.
        student: A key of the plan's students.
        steps: Optimizer steps.
        learning_rate: The highest.
        seed: Of weights and order of the data.
        budget: The steps that this run is compared at.
        tuning: Whether it only chooses a learning rate.
    """

    method: str
    teacher: str
    student: str
    steps: int
    learning_rate: float
    seed: int
    budget: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """Names its folder."""
        method = self.method.replace(", ", "-").replace(" ", "-")
        parts = (self.teacher, self.student, method, self.steps)
        ends = f"{self.learning_rate:g}", f"seed{self.seed}", *["tuning"] * self.tuning
        return "-".join(map(str, (*parts, *ends)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the study trains.

    Attributes:
        teachers: Sizes and learning rates of the teachers, by name.
        students: Sizes of the students, by name.
        pair: The teacher and the student that all methods are compared on.
        methods: Compared on that pair; the first is the one without a teacher.
        everywhere: Compared over all teachers and students; of `methods`.
        variants: Keys of `VARIANTS`, compared on the pair.
        budgets: Steps of the students on the pair.
        middle_steps: Steps where teachers, students and variants are compared; none of
            the budgets.
        learning_rates: The grid that is tried for each method.
        rates: Learning rates by method, for those that are not tuned here.
        seeds: Of the runs that count; the grid has one of its own.
        teacher_steps: Steps of a teacher.
        teacher_batch: Sequences of a teacher's step.
        batch_size: Sequences of a student's step.
        seq_len: Tokens of a sequence.
        vocab_size: Of the tokenizer, which is trained on the texts.
        held_out_batches: Of an evaluation.
        prompts: Beginnings of held-out sequences that a student completes.
        timed: Runs of each kind whose steps are timed.
    """

    teachers: Mapping[str, tuple[Size, float]]
    students: Mapping[str, Size]
    pair: tuple[str, str] = ("middle", "small")
    methods: tuple[str, ...] = tuple(METHODS)
    everywhere: tuple[str, ...] = (
        *("sft", "forward_kl", "reverse_kl", "taid_linear", "taid"),
    )
    variants: tuple[str, ...] = tuple(VARIANTS)
    budgets: tuple[int, ...] = (150, 1500)
    middle_steps: int = 500
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    teacher_steps: int = 5000
    teacher_batch: int = 16
    batch_size: int = 8
    seq_len: int = 128
    vocab_size: int = 1024
    held_out_batches: int = 64
    prompts: int = 64
    timed: int = 3

    def tuning(self) -> Iterator[Run]:
        """Yields the runs that choose the learning rates."""
        for method in self.methods:
            if method not in self.rates:
                for rate in self.learning_rates:
                    yield self._run(method, self.middle_steps, rate, 100, tuning=True)

    def runs(self, rates: Mapping[str, float], slowdown: float) -> list[Run]:
        """Returns the runs that count, each once.

        Those of the pair come first, short ones before long ones, and all methods of a
        seed together.

        Args:
            rates: Learning rate of each method.
            slowdown: Time of a step of forward KL with a live teacher, in steps of SFT.
        """
        without, middle = self.methods[0], self.middle_steps
        pair, others = [], []
        for steps, seed in itertools.product(
            sorted({*self.budgets, middle}), self.seeds
        ):
            if steps in self.budgets:
                pair += [self._run(m, steps, rates[m], seed) for m in self.methods]
                longer = self._run(EQUAL_TIME, steps, rates[without], seed)
                pair.append(longer._replace(steps=round(steps * slowdown)))
            else:
                for method in (*self.everywhere, *self.variants):
                    rate = rates[method.split(",")[0]]
                    pair.append(self._run(method, steps, rate, seed))
        for seed, student, teacher in itertools.product(
            self.seeds, self.students, self.teachers
        ):
            for method in self.everywhere:
                run = self._run(method, middle, rates[method], seed)
                if method != without or teacher == self.pair[0]:
                    others.append(run._replace(teacher=teacher, student=student))
        return list(dict.fromkeys([*pair, *others]))

    def _run(
        self, method: str, steps: int, rate: float, seed: int, *, tuning: bool = False
    ) -> Run:
        return Run(method, *self.pair, steps, rate, seed, steps, tuning)


FULL = Plan(
    teachers={
        "small": (Size(3, 128, 2), 3e-3),
        "middle": (Size(4, 192, 3), 3e-3),
        "large": (Size(6, 256, 4), 2e-3),
    },
    students={"small": Size(2, 64, 1), "larger": Size(2, 96, 3)},
)
"""Some 340 runs."""

QUICK = dataclasses.replace(
    FULL,
    teachers={"middle": FULL.teachers["middle"]},
    students={"small": FULL.students["small"]},
    methods=("sft", "forward_kl", "reverse_kl", "taid_linear"),
    everywhere=(),
    variants=(),
    budgets=(150,),
    rates={"sft": 3e-3, "forward_kl": 6e-3, "reverse_kl": 3e-3, "taid_linear": 3e-3},
    seeds=(0, 1),
    teacher_steps=600,
    timed=1,
)
"""A part of it."""
