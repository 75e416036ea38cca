"""Held-out evaluation of a student: KL both ways, perplexities, completions."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from taid_jax.data import Dataset
from taid_jax.data.batches import NumpyBatch, held_out_iterator
from taid_jax.errors import ModelError
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.settings import SelectionMetric, Settings
from taid_jax.sharding import batch_part, place_batch
from taid_jax.train.completions import EvalCompletions, score
from taid_jax.train.objective import (
    CALIBRATION_BINS,
    Evaluation,
    MakeObjective,
    make_objective,
    make_scheduler,
    on_data,
)
from taid_jax.train.on_policy.prompts import EvalPrompt
from taid_jax.train.pair import Pair
from taid_jax.train.state import DistillState
from taid_jax.train.step import Metrics, batch_loss
from taid_jax.types import Batch, ModelFunctions, Params

EvalStep = Callable[[DistillState, Params, Batch], Metrics]


class HeldOut(NamedTuple):
    """What one evaluation found, over `tokens` counted tokens.

    Attributes:
        kl_teacher: Mean KL(teacher || student) at temperature 1, nats per token.
        student_perplexity: Exponential of the student's mean cross-entropy.
        teacher_perplexity: Exponential of the teacher's mean cross-entropy.
        tokens: Tokens that counted.
        loss: Mean of the run's own objective, nats per token: TAID's at the t that the
            state has, CTKD's at the learned temperature, DistiLLM-2's of the teacher's
            texts.
        rouge_l: ROUGE-L of the student's greedy completions, 0 to 1; None without any.
        exact_match: Share of those that are the reference; None without any.
        kl_reverse: Mean KL(student || teacher) at temperature 1, nats per token, over
            entries to which the teacher gives a probability above 0. None in rows of
            earlier versions, as `calibration_error`.
        calibration_error: Expected calibration error of the student's most probable
            token, 0 to 1; see `calibration`.
        distinct_2: Different word bigrams of those completions over all of theirs, 0 to
            1; None without any.
    """

    kl_teacher: float
    student_perplexity: float
    teacher_perplexity: float
    tokens: int
    loss: float | None = None
    rouge_l: float | None = None
    exact_match: float | None = None
    kl_reverse: float | None = None
    calibration_error: float | None = None
    distinct_2: float | None = None


def selection_metric(
    found: HeldOut | Mapping[str, Any], name: SelectionMetric
) -> float:
    """Returns the figure that chooses the best state, signed so that lower is better.

    Args:
        found: An evaluation, or a row of `evaluations.jsonl`.
        name: As in the settings. ROUGE-L and exact match are the better the higher.

    Returns:
        Infinity where it is missing, or it or another figure is not finite.
    """
    row = found._asdict() if isinstance(found, HeldOut) else found
    value = row.get(name)
    if value is None or not math.isfinite(value) or nonfinite_figures(row):
        return math.inf
    return -value if name in ("rouge_l", "exact_match") else value


def nonfinite_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of an evaluation that are not finite, by their names.

    A perplexity of inf is a number that a float cannot hold, and is not among them: the
    loss that it is the exponential of is finite.
    """
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, float)
        and not math.isfinite(value)
        and not (name.endswith("_perplexity") and value == math.inf)
    }


def check_finite(found: HeldOut, student: str = "the student") -> None:
    """Refuses models whose figures are not finite, by the name of the one it is.

    Raises:
        ModelError: If a figure is not finite.
    """
    wrong = nonfinite_figures(found._asdict())
    if not wrong:
        return
    models = {"teacher_perplexity": "the teacher", "student_perplexity": student}
    who = [model for name, model in models.items() if name in wrong]
    figures = ", ".join(f"{name} {value}" for name, value in wrong.items())
    raise ModelError(
        f"{' and '.join(who) or 'the two models together'}: not finite on held-out "
        f"text ({figures}). NaN or inf in the weights, or ones too large for --dtype, "
        "are the usual cause; give sound weights, or --dtype float32"
    )


def make_eval_step(
    student: ModelFunctions,
    teacher: ModelFunctions,
    make_objective: MakeObjective,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    fused: bool = True,
) -> EvalStep:
    """Returns the jitted `(state, teacher_params, batch) -> sums`, without gradients.

    The state is read and not donated: nothing of it can change. Arguments are those of
    `make_train_step`.

    Returns:
        A function whose result has the sums `loss` (of the KL), those of `Evaluation`
        and `num_tokens`.
    """

    def step(state: DistillState, teacher_params: Params, batch: Batch) -> Metrics:
        objective = make_objective(state.schedule, state.learned, state.step)
        loss_sum, sums = batch_loss(
            Evaluation(on_data(objective)),
            student,
            state.params,
            teacher,
            state.teacher_of(teacher_params),
            batch,
            chunk_size=chunk_size,
            mesh=mesh,
            fused=fused,
        )
        return {"loss": loss_sum, **sums}

    return jax.jit(step)


def evaluate(
    eval_step: EvalStep,
    state: DistillState,
    teacher_params: Params,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> HeldOut:
    """Returns what is found over held-out batches, weighted by token.

    Raises:
        ValueError: If no token counts.
    """
    total: dict[str, float] = {}
    for batch in batches:
        sums = eval_step(state, teacher_params, place_batch(batch, mesh))
        for key, value in sums.items():
            # Python floats are float64: long sums of float32 batches stay exact enough.
            total[key] = total.get(key, 0.0) + float(value)
    count = total.get("num_tokens", 0.0)
    if not count:
        raise ValueError("the held-out batches have no counted token")

    def perplexity(nll: float) -> float:
        try:
            return math.exp(nll / count)
        except OverflowError:
            return math.inf

    return HeldOut(
        kl_teacher=total["loss"] / count,
        student_perplexity=perplexity(total["student_nll"]),
        teacher_perplexity=perplexity(total["teacher_nll"]),
        tokens=round(count),
        loss=total["objective"] / count,
        kl_reverse=total["kl_reverse"] / count,
        calibration_error=sum(abs(total[name]) for name in CALIBRATION_BINS) / count,
    )


def make_evaluator(
    settings: Settings,
    pair: Pair,
    dataset: Dataset,
    mesh: Mesh,
    *,
    tokenizer: Tokenizer,
    prompts: Sequence[EvalPrompt] = (),
) -> Callable[[DistillState], HeldOut]:
    """Returns the evaluation of a state.

    It depends on the state and the held-out data alone and changes neither, so that one
    that is cut off and begun again gives the same.

    Raises:
        SettingsError: If no prompt leaves room for a completion.
    """
    data, run, dtype = settings.data, settings.run, jnp.dtype(settings.model.dtype)
    eval_step = make_eval_step(
        decoder_functions(pair.student_config, dtype=dtype),
        pair.teacher_functions,
        make_objective(settings.objective, run.steps)[0],
        chunk_size=run.chunk_size,
        mesh=mesh,
        fused=run.fused,
    )
    part, parts = batch_part(mesh)

    def held_out() -> Iterator[NumpyBatch]:
        return held_out_iterator(
            dataset.held_out,
            data.batch_size,
            limit=data.held_out_batches,
            process_index=part,
            process_count=parts,
        )

    completions = None
    if prompts:
        completions = EvalCompletions(
            prompts,
            tokenizer,
            pair.student_config,
            pair.generation,
            max_new_tokens=settings.evaluation.eval_tokens,
            batch_size=data.batch_size,
            dtype=settings.model.dtype,
            mesh=mesh,
            shardings=pair.shardings,
        )

    def evaluator(state: DistillState) -> HeldOut:
        found = evaluate(eval_step, state, pair.teacher_params, held_out(), mesh)
        # A model that is no distribution completes nothing.
        if completions is None or nonfinite_figures(found._asdict()):
            return found
        scores = score(completions(state.params), completions.references)
        return found._replace(**scores._asdict())

    return evaluator


def finished_state(settings: Settings, params: Params) -> DistillState:
    """Returns a student as a state at the end of a run, to be evaluated.

    Its loss is TAID's at `t_end`, CTKD's at the temperature that training starts with:
    what a run learned beside the student is not exported with it.
    """
    steps = settings.run.steps
    schedule = make_scheduler(settings.objective, steps).init()
    return DistillState(
        step=jnp.asarray(steps, jnp.int32),
        params=params,
        opt_state=(),
        schedule=schedule._replace(t=jnp.asarray(settings.objective.t_end, "float32")),
        learned=make_objective(settings.objective, steps)[1],
    )
