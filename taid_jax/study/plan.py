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
    "alpha_mixture": {"objective": "alpha_mixture", "disable_adaptive": True},
    "alpha_beta": {"objective": "alpha_beta"},
    "concrete_score": {"objective": "concrete_score"},
    "entropy_gated": {"objective": "entropy_gated"},
}
"""Methods by name, as settings of a run; what they leave out is the default."""

VARIANTS: dict[str, dict[str, Any]] = {
    "taid_linear, t_start 0": {**METHODS["taid_linear"], "t_start": 0.0},
    "taid_linear, t_start 0.2": {**METHODS["taid_linear"], "t_start": 0.2},
    "taid_linear, t_start 0.8": {**METHODS["taid_linear"], "t_start": 0.8},
    "taid, alpha 0.005": {**METHODS["taid"], "alpha": 5e-3},
    "taid, alpha 0.05": {**METHODS["taid"], "alpha": 5e-2},
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
        seeds: Of the runs of the pair that count; the grid has one of its own.
        seeds_elsewhere: Of the other teachers and students.
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
    budgets: tuple[int, ...] = (100, 1000)
    middle_steps: int = 300
    learning_rates: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
    rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    seeds_elsewhere: tuple[int, ...] = (0, 1, 2)
    teacher_steps: int = 3000
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

        Those of the pair come first, the pair's student with other teachers beside
        them, then other students, and last the seeds that the pair alone has: a study
        that is not finished has as much as can be said of its pair.

        Args:
            rates: Learning rate of each method.
            slowdown: Time of a step of forward KL with a live teacher, in steps of SFT.
        """
        runs = []
        for seed in self.seeds:
            runs += self._of_pair(rates, slowdown, seed)
            if seed in self.seeds_elsewhere:
                runs += self._of_all(rates, seed)

        def place(run: Run) -> tuple[bool, bool]:
            return run.seed not in self.seeds_elsewhere, run.student != self.pair[1]

        return sorted(dict.fromkeys(runs), key=place)

    def _of_pair(
        self, rates: Mapping[str, float], slowdown: float, seed: int
    ) -> Iterator[Run]:
        without = self.methods[0]
        for steps in self.budgets:
            for method in self.methods:
                yield self._run(method, steps, rates[method], seed)
            longer = self._run(EQUAL_TIME, steps, rates[without], seed)
            yield longer._replace(steps=round(steps * slowdown))
        for method in (*self.everywhere, *self.variants):
            rate = rates[method.split(",")[0]]
            yield self._run(method, self.middle_steps, rate, seed)

    def _of_all(self, rates: Mapping[str, float], seed: int) -> Iterator[Run]:
        for student, teacher in itertools.product(self.students, self.teachers):
            for method in self.everywhere:
                run = self._run(method, self.middle_steps, rates[method], seed)
                if method != self.methods[0] or teacher == self.pair[0]:
                    yield run._replace(teacher=teacher, student=student)

    def _run(
        self, method: str, steps: int, rate: float, seed: int, *, tuning: bool = False
    ) -> Run:
        return Run(method, *self.pair, steps, rate, seed, steps, tuning)


FULL = Plan(
    teachers={
        "small": (Size(2, 128, 2), 3e-3),
        "middle": (Size(3, 192, 3), 3e-3),
        "large": (Size(4, 256, 4), 2e-3),
    },
    students={"small": Size(2, 64, 1), "larger": Size(2, 96, 3)},
)
"""Some 350 runs."""

QUICK = dataclasses.replace(
    FULL,
    teachers={"middle": FULL.teachers["middle"]},
    students={"small": FULL.students["small"]},
    methods=("sft", "forward_kl", "reverse_kl", "taid_linear"),
    everywhere=(),
    variants=(),
    budgets=(100,),
    rates={"sft": 3e-3, "forward_kl": 6e-3, "reverse_kl": 3e-3, "taid_linear": 3e-3},
    seeds=(0, 1),
    teacher_steps=600,
    timed=1,
)
"""A part of it."""
