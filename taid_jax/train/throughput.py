"""How busy a run keeps its devices: operations of a step, and where its time goes."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from taid_jax.chips import peak_flops
from taid_jax.models.config import DecoderConfig
from taid_jax.models.flops import forward_flops
from taid_jax.settings import Settings

MEASURED = (
    "tokens_per_second",
    "tokens_per_second_per_chip",
    "flops_per_second_per_chip",
    "mfu",
    "step_seconds",
    "data_seconds",
    "generate_seconds",
    "learn_seconds",
    "dispatch_seconds",
    "host_seconds",
    "save_seconds",
)
"""What a line of metrics says that depends on the clock."""


class StepFlops(NamedTuple):
    """Floating-point operations of one optimizer step, over all devices.

    Attributes:
        student: Of its layers, forward and backward.
        teacher: Of its layers, forward.
        student_head: Of its head, forward and backward, per token that counts.
        teacher_head: The same of the teacher's, forward.
        repeated: What the backward pass of the student computes a second time; no part
            of the model's operations, and of no MFU.
    """

    student: int
    teacher: int
    student_head: int
    teacher_head: int
    repeated: int

    def total(self, counted: float) -> float:
        """Returns the operations of both with this many counted tokens."""
        heads = counted * (self.student_head + self.teacher_head)
        return self.student + self.teacher + heads


def step_flops(
    student: DecoderConfig,
    *teachers: DecoderConfig,
    batch: int,
    length: int,
    remat: str = "none",
    fused: bool = True,
    teacher_used: bool = True,
    stored: Sequence[str] = (),
    teacher_length: int | None = None,
) -> StepFlops:
    """Returns the operations of a train step, from the two architectures.

    A product of (m, k) and (k, n) counts 2 m k n; its gradient is two more such
    products. Attention counts the pairs that the causal mask leaves of whole sequences,
    also where several are packed into one. The fused head passes over tokens that do
    not count, so its operations are given by token.

    Args:
        student: Its architecture.
        *teachers: Their architectures.
        batch: Sequences of the step, over all micro-batches.
        length: Tokens of each.
        remat: What the student's backward pass computes again, as in `hidden_states`.
        fused: The fused head is used; else the heads see every token.
        teacher_used: False for an objective that looks at no teacher.
        stored: Kinds of the stores that the teachers' outputs come from, if they do: of
            hidden states the head is still applied.
        teacher_length: Tokens of a row of the teacher, where they are others than the
            student's; its head is applied to the student's.

    References:
        Chowdhery et al., PaLM, 2022 (arXiv:2204.02311), appendix B: MFU.
    """
    mine = forward_flops(student, batch, length)
    theirs = [forward_flops(each, batch, teacher_length or length) for each in teachers]
    their_heads = [forward_flops(each, batch, length).head for each in teachers]
    # The scores are always computed again, "dots" and "full" do so with the values, and
    # "full" repeats all but the last product of each layer, which nothing depends on.
    last = 2 * batch * length * student.num_layers * student.d_model * student.mlp_dim
    repeated = {
        "none": mine.attention // 2,
        "dots": mine.attention + mine.attention // 2,
        "full": mine.attention + mine.attention // 2 + mine.projections - last,
    }[remat]
    layers = 3 * (mine.projections + mine.attention)
    runs = teacher_used and not stored
    teacher_layers = runs * sum(each.projections + each.attention for each in theirs)
    kinds = stored or ["hidden"] * len(theirs)
    head, teacher_head = 3 * mine.head, 0
    if teacher_used:
        pairs = zip(their_heads, kinds, strict=True)
        teacher_head = sum(each for each, kind in pairs if kind == "hidden")
    if not fused:
        return StepFlops(layers + head, teacher_layers + teacher_head, 0, 0, repeated)
    tokens = batch * length
    each = head // tokens, teacher_head // tokens
    return StepFlops(layers, teacher_layers, *each, repeated)


class Throughput:
    """Where the time of the steps goes, and what share of the chips' peak is used.

    Args:
        flops: Of a step; nothing is said of operations when None.
        chips: Devices that share a step.
        peak: Operations per second that one of them can do; None when it is not known.
    """

    def __init__(
        self, flops: StepFlops | None = None, chips: int = 1, peak: float | None = None
    ):
        self.flops, self.chips, self.peak = flops, chips, peak
        self._spent: dict[str, float] = collections.defaultdict(float)
        self._all: dict[str, float] = collections.defaultdict(float)
        self.start()

    @contextlib.contextmanager
    def measured(self, part: str) -> Iterator[None]:
        """Within it the time goes to a part of a step, or to what is none of it.

        Parts are data, generate, dispatch and wait; outside are evaluate and save.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent[part] += time.perf_counter() - began

    def count(self, tokens: float) -> None:
        """Adds the counted tokens of a step."""
        self._counted += tokens

    def start(self) -> None:
        """Starts the clock anew; what was measured so far is part of no step."""
        for part, seconds in self._spent.items():
            self._all[part] += seconds
        self._spent.clear()
        self._began, self._counted = time.perf_counter(), 0.0

    def take(self, steps: int, tokens: int) -> dict[str, float | None]:
        """Returns what is measured of the steps since the last call.

        Args:
            steps: How many they were.
            tokens: Slots of the batch of one step, padding included.

        Returns:
            The names of `MEASURED`. Seconds are those of a step on average, on this
            host: `step_seconds` from one to the next, `data_seconds` until a batch lies
            on its devices, `generate_seconds` until a model has completed prompts,
            `learn_seconds` handing the step over and waiting for its end,
            `dispatch_seconds` the first of both alone (on several CPU devices JAX
            computes meanwhile), `host_seconds` all that the host does beside these and
            beside waiting, data included. `save_seconds` is the whole time that
            checkpoints took; it is in no other figure, nor are evaluations. Operations
            are those of both models without what is repeated; MFU is their share of
            the peak.
        """
        spent = self._spent
        outside = spent["evaluate"] + spent["save"]
        # A clock with coarse ticks must not divide by 0.
        seconds = max(time.perf_counter() - self._began - outside, 1e-9)
        busy = spent["wait"] + spent["dispatch"] + spent["generate"]
        rate = steps * tokens / seconds
        found: dict[str, float | None] = {
            "tokens_per_second": rate,
            "tokens_per_second_per_chip": rate / self.chips,
            "step_seconds": seconds / steps,
            "data_seconds": spent["data"] / steps,
            "generate_seconds": spent["generate"] / steps,
            "learn_seconds": (spent["wait"] + spent["dispatch"]) / steps,
            "dispatch_seconds": spent["dispatch"] / steps,
            "host_seconds": max(seconds - busy, 0.0) / steps,
            "save_seconds": spent["save"],
        }
        if self.flops is not None:
            done = steps * self.flops.total(self._counted / steps)
            per_chip = done / seconds / self.chips
            found["flops_per_second_per_chip"] = per_chip
            found["mfu"] = per_chip / self.peak if self.peak else None
        self.start()
        return found

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Returns how busy a whole run kept its devices, for its report.

        Args:
            rows: Of `metrics.jsonl`.

        Returns:
            Medians of what is in `MEASURED`, `chips`, `peak_flops_per_chip`, the
            operations of a step (`student_flops`, `teacher_flops`, `repeated_flops`,
            over all chips), and the seconds that evaluations and saves took in this
            process.
        """
        found: dict[str, Any] = {
            "chips": self.chips,
            "peak_flops_per_chip": self.peak,
        }
        for name in MEASURED:
            values = [row[name] for row in rows if row.get(name) is not None]
            found[name] = float(np.median(values)) if values else None
        if self.flops is not None and rows:
            counted = float(np.mean([row.get("tokens") or 0.0 for row in rows]))
            flops = self.flops
            student = flops.student + counted * flops.student_head
            teacher = flops.teacher + counted * flops.teacher_head
            found["student_flops"] = round(student)
            found["teacher_flops"] = round(teacher)
            found["repeated_flops"] = flops.repeated
        # Both are rare: of saves too the sum is told.
        for part in ("evaluate", "save"):
            found[f"{part}_seconds"] = self._all[part] + self._spent[part]
        return found


def make_throughput(
    settings: Settings,
    student: DecoderConfig,
    teachers: Sequence[DecoderConfig],
    mesh: Mesh,
    *,
    stored: Sequence[str] = (),
) -> Throughput:
    """Returns the throughput of a run, with nothing measured yet; see `step_flops`."""
    flops = step_flops(
        student,
        *teachers,
        batch=settings.data.batch_size,
        length=settings.data.seq_len,
        remat=settings.model.remat,
        fused=settings.run.fused,
        teacher_used=settings.objective.objective != "sft",
        stored=stored,
        teacher_length=settings.data.teacher_len,
    )
    kinds = {device.device_kind for device in mesh.devices.flat}
    return Throughput(
        None if settings.data.buckets else flops,  # Batches differ in length.
        mesh.size,
        peak_flops(kinds.pop()) if len(kinds) == 1 else None,
    )
