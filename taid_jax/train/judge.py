"""How a state of a run is judged: held-out figures, and the answers of the student."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taid_jax.data import Dataset, held_out_batches
from taid_jax.evaluate import HeldOut, evaluate, make_judge_step, not_finite
from taid_jax.models.decoder import decoder_functions
from taid_jax.models.files.tokenizer import Tokenizer
from taid_jax.scores import score_answers
from taid_jax.settings import Settings
from taid_jax.sharding import batch_part
from taid_jax.train.answers import Question, prepare_examination
from taid_jax.train.inputs import Pair
from taid_jax.train.objective import make_objective, make_scheduler
from taid_jax.train.state import DistillState
from taid_jax.types import Params

Judge = Callable[[DistillState], HeldOut]


def make_judge(
    settings: Settings,
    pair: Pair,
    dataset: Dataset,
    mesh: Mesh,
    *,
    tokenizer: Tokenizer,
    questions: Sequence[Question] = (),
) -> Judge:
    """Returns the evaluation of a state.

    It depends on the state and the held-out data alone and changes neither, so that one
    that is cut off and begun again gives the same.

    Args:
        settings: Of the run.
        pair: Teacher and student.
        dataset: Its held-out side is judged on.
        mesh: Where batches go.
        tokenizer: Of both models.
        questions: From `find_questions`; answers are not scored without any.

    Raises:
        SettingsError: If no question leaves room for an answer.
    """
    data, run, dtype = settings.data, settings.run, settings.model.dtype
    judge_step = make_judge_step(
        decoder_functions(pair.student_config, dtype=jnp.dtype(dtype)),
        decoder_functions(pair.teacher.config, dtype=jnp.dtype(dtype)),
        make_objective(settings.objective)[0],
        chunk_size=run.chunk_size,
        mesh=mesh,
        fused=run.fused,
    )
    part, parts = batch_part(mesh)
    held_out = held_out_batches(
        dataset.held_out,
        data.batch_size,
        limit=data.held_out_batches,
        process_index=part,
        process_count=parts,
    )
    examination = None
    if questions:
        examination = prepare_examination(
            questions,
            tokenizer,
            pair.student_config,
            pair.generation,
            eval_tokens=settings.evaluation.eval_tokens,
            batch_size=data.batch_size,
            dtype=dtype,
            mesh=mesh,
            shardings=pair.shardings,
        )

    def judge(state: DistillState) -> HeldOut:
        found = evaluate(judge_step, state, pair.teacher.params, held_out, mesh)
        # A model that is no distribution has no answers.
        if examination is None or not_finite(found._asdict()):
            return found
        answers = examination.answers(state.params)
        scores = score_answers(answers, examination.references)
        return found._replace(**scores._asdict())

    return judge


def finished_state(settings: Settings, params: Params) -> DistillState:
    """Returns a student as a state at the end of a run, to be judged.

    Its loss is TAID's at `t_end`, CTKD's at the temperature that training starts with:
    what a run learned beside the student is not exported with it.

    Args:
        settings: Of the objective.
        params: The student's parameters.
    """
    steps = settings.run.steps
    schedule = make_scheduler(settings.objective, steps).init()
    return DistillState(
        step=jnp.asarray(steps, jnp.int32),
        params=params,
        opt_state=(),
        schedule=schedule._replace(t=jnp.asarray(settings.objective.t_end, "float32")),
        learned=make_objective(settings.objective)[1],
        rng=jax.random.key_data(jax.random.key(0, impl="threefry2x32")),
    )
