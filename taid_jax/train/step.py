"""The train step: a pure function of the state, jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from taid_jax.loss import (
    ByText,
    TeachersHead,
    TopKHead,
    distillation_sums,
    fused_loss,
)
from taid_jax.sharding import activations_on
from taid_jax.train.objective import MakeObjective, Objective
from taid_jax.train.state import (
    DistillState,
    all_finite,
    move_average,
    updates_applied,
)
from taid_jax.types import IGNORE_INDEX, Batch, ModelFunctions, Params

Metrics = dict[str, Array]
TrainStep = Callable[[DistillState, Params, Batch], tuple[DistillState, Metrics]]


def next_token_labels(batch: Batch) -> Int[Array, "batch length"]:
    """Returns the label of each position's prediction: that of the next position.

    This is the one place where labels are shifted. The last position predicts nothing,
    and neither does the last of a packed segment.

    Args:
        batch: `labels` `(batch, length)`, aligned with the inputs, and `segment_ids`
            of the same shape when packed.
    """

    def following(array: Array | np.ndarray, fill: int) -> Array:
        end = jnp.full((array.shape[0], 1), fill, array.dtype)
        return jnp.concatenate([array[:, 1:], end], axis=1)

    labels = following(batch["labels"], IGNORE_INDEX)
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        same = segments == following(segments, -1)
        labels = jnp.where(same, labels, jnp.full_like(labels, IGNORE_INDEX))
    return labels


def paired_logits(
    student_out: Any, student_head: Any, teacher_out: Any, teacher_head: Any
) -> tuple[Float[Array, "*tokens vocab"], Float[Array, "*tokens vocab"]]:
    """Returns the logits of student and teacher, of the entries that count for both.

    Args:
        student_out: `(*tokens, d_model)` hidden states, or logits where it has no head.
        student_head: Of the student; None without any.
        teacher_out: As the student's, or `TopK`, or `Teachers`.
        teacher_head: Of the teacher, `TopKHead` beside `TopK`, `TeachersHead` beside
            `Teachers`.
    """
    student_logits = student_head.logits(student_out) if student_head else student_out
    if isinstance(teacher_head, TopKHead | TeachersHead):
        # The rest of the probability lies on the entries that count, and no others; and
        # each of several teachers is a distribution over these.
        own = None if student_head is None else student_head.vocab_size
        counted = student_logits[..., : min(teacher_head.vocab_size, own or 1 << 62)]
        teacher_logits = teacher_head.logits(teacher_out, counted)
    else:
        teacher_logits = (
            teacher_head.logits(teacher_out) if teacher_head else teacher_out
        )
    if student_head is not None and teacher_head is not None:
        # As in the fused head: of padded vocabularies the entries that both share.
        shared = min(
            logits.shape[-1] if head.vocab_size is None else head.vocab_size
            for logits, head in (
                (student_logits, student_head),
                (teacher_logits, teacher_head),
            )
        )
        student_logits = student_logits[..., :shared]
        teacher_logits = teacher_logits[..., :shared]
    return student_logits, teacher_logits


def batch_loss(
    objective: Objective | ByText,
    student: ModelFunctions,
    params: Params,
    teacher: ModelFunctions,
    teacher_params: Params,
    batch: Batch,
    *,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    fused: bool = True,
) -> tuple[Float32[Array, ""], Metrics]:
    """Returns the loss summed over the counted tokens of a batch, and its sums.

    The fused head is used when both models offer hidden states, unless not `fused`.

    Args:
        objective: Loss of a token; `ByText` takes who wrote it from `from_student` of
            the batch.
        student: Functions of the student.
        params: Its parameters; gradients flow to these alone.
        teacher: Functions of the teacher.
        teacher_params: Its parameters.
        batch: Arrays of shape `(batch, length)`.
        chunk_size: Tokens of a chunk of the fused head; chosen when None.
        mesh: Where the batch lives, when on several devices.
        fused: Use the fused head where both models offer hidden states and head.

    Returns:
        The sum in nats, and `{"num_tokens": counted tokens, metric: sum, ...}`; of
        `ByText` as its `sums` has it.

    Raises:
        ValueError: If a model offers neither hidden states and head, nor logits, or the
            batch does not say who wrote its texts where that is needed.
    """
    labels = next_token_labels(batch)
    mask = labels != IGNORE_INDEX
    both = (student, params), (teacher, teacher_params)
    fused = fused and all(model.hidden and model.head for model, _ in both)

    def output(model: ModelFunctions, weights: Params) -> tuple[Any, Any]:
        if model.hidden and model.head:
            return model.hidden(weights, batch), model.head(weights)
        if model.logits is None:
            raise ValueError("a model needs hidden and head, or logits; got neither")
        return model.logits(weights, batch), None

    # The scopes say of a compiled program, and of a profile, what belongs to what.
    with activations_on(mesh):
        with jax.named_scope("student"):
            student_out, student_head = output(student, params)
        with jax.named_scope("teacher"):
            teacher_out, teacher_head = jax.lax.stop_gradient(
                output(teacher, teacher_params)
            )

    def over(objective: Objective, mask: Array) -> tuple[Array, Metrics]:
        if fused:
            return fused_loss(
                objective,
                student_out,
                student_head,
                teacher_out,
                teacher_head,
                mask,
                labels,
                chunk_size=chunk_size,
                mesh=mesh,
            )
        logits = paired_logits(student_out, student_head, teacher_out, teacher_head)
        return distillation_sums(objective, *logits, mask, labels)

    with jax.named_scope("head"):
        if not isinstance(objective, ByText):
            return over(objective, mask)
        if "from_student" not in batch:
            raise ValueError("ByText needs `from_student` in the batch, of each token")
        own, texts = jnp.asarray(batch["from_student"]) != 0, None
        if "segment_ids" in batch:
            texts = jnp.asarray(batch["segment_ids"])
        return objective.sums(over, mask, own, texts)


def _micro_batches(batch: Batch, parts: int) -> Batch:
    """Returns `(parts, batch / parts, length)`: each device keeps its own rows."""
    return {
        key: value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1)
        for key, value in batch.items()
    }


def make_train_step(
    student: ModelFunctions,
    teacher: ModelFunctions,
    *,
    make_objective: MakeObjective,
    scheduler: Any,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule | None = None,
    grad_accum: int = 1,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
    shardings: DistillState | None = None,
    fused: bool = True,
    teacher_ema: float | None = None,
) -> TrainStep:
    """Returns the jitted step `(state, teacher_params, batch) -> (state, metrics)`.

    The state is donated; the teacher's parameters are an argument, outside the gradient
    and outside donation. The gradient is the sum over all counted tokens of the global
    batch divided once by their number, so that accumulation and devices do not change
    it, and the schedule advances once per step on that batch's distillation loss.

    A step whose loss, gradient or update is not finite changes nothing but
    `state.step`; its `skipped` is 1. The update are the new parameters, learned values
    and optimizer state, so that a finite state stays one.

    Args:
        student: Functions of the student.
        teacher: Functions of the teacher.
        make_objective: The objective of a step from schedule, learned values and step.
        scheduler: With `update(state, loss, step)`, such as `TAIDScheduler`.
        optimizer: Any optax optimizer over `(params, learned)`.
        learning_rate: Only reported; the optimizer has its own.
        grad_accum: Micro-batches of a step; they divide the batch.
        chunk_size: Tokens of a chunk of the fused head; chosen when None.
        mesh: Where the batch lives, when on several devices.
        shardings: Where the new state lives; as XLA likes when None.
        fused: Use the fused head where both models offer hidden states and head.
        teacher_ema: Of a state with an `average`, which is the teacher in place of
            `teacher_params`: so much of it is kept when a step moves the parameters,
            in (0, 1).

    Returns:
        A function whose metrics are float32 scalars: `loss`, `distil_loss`, the
        objective's own (`kl_teacher`, `lm_loss`, ...) in nats per counted token,
        `t` as used, `delta_t`, `grad_norm` before clipping, `learning_rate`, `tokens`,
        `skipped`.
    """

    def micro_loss(trainable, state, teacher_params, batch):
        params, learned = trainable
        return batch_loss(
            make_objective(state.schedule, learned, state.step),
            student,
            params,
            teacher,
            teacher_params,
            batch,
            chunk_size=chunk_size,
            mesh=mesh,
            fused=fused,
        )

    gradient = jax.value_and_grad(micro_loss, has_aux=True)

    def whole_gradient(trainable, state, teacher_params, batch):
        if grad_accum == 1:
            return gradient(trainable, state, teacher_params, batch)

        def add(total, micro):
            part = gradient(trainable, state, teacher_params, micro)
            return jax.tree.map(jnp.add, total, part), None

        micro = _micro_batches(batch, grad_accum)
        first = jax.eval_shape(
            gradient,
            trainable,
            state,
            teacher_params,
            {k: v[0] for k, v in micro.items()},
        )
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
        return jax.lax.scan(add, zero, micro)[0]

    def step(state: DistillState, teacher_params: Params, batch: Batch):
        if (state.average is None) != (teacher_ema is None):
            raise ValueError(
                "need a state with an average, and teacher_ema, together: see "
                f"init_state(averaged=True); got teacher_ema {teacher_ema}"
            )
        trainable = (state.params, state.learned)
        teacher_params = state.teacher_of(teacher_params)
        (loss_sum, sums), gradients = whole_gradient(
            trainable, state, teacher_params, batch
        )
        num_tokens = sums.pop("num_tokens")
        tokens = sums.pop("tokens", num_tokens)
        divisor = jnp.where(num_tokens == 0, 1.0, num_tokens)
        gradients = jax.tree.map(lambda g: g / divisor.astype(g.dtype), gradients)
        means = {key: value / divisor for key, value in sums.items()}
        loss = loss_sum / divisor
        grad_norm = optax.tree_utils.tree_norm(gradients[0])
        # optax counts in int32 and is not written for strict promotion.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, trainable)
            moved = optax.apply_updates(trainable, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        # Finite gradients may have an update that is not: 0 / 0 in the optimizer's
        # means, or numbers beyond float32. What is NaN once stays so.
        finite &= all_finite((moved, opt_state))
        distil_loss = means.get("distil_loss", loss)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        schedule = scheduler.update(state.schedule, distil_loss, state.step)
        schedule = keep(schedule, state.schedule)
        params, learned = keep(moved, trainable)
        average = state.average
        if average is not None and teacher_ema is not None:
            average = keep(move_average(average, params, teacher_ema), average)
        metrics = {
            **means,
            "loss": loss,
            "distil_loss": distil_loss,
            "t": state.schedule.t,
            "delta_t": schedule.t - state.schedule.t,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "skipped": 1.0 - finite.astype(jnp.float32),
        }
        if learning_rate is not None:
            applied = updates_applied(state.opt_state)
            count = state.step if applied is None else applied
            metrics["learning_rate"] = jnp.asarray(learning_rate(count), jnp.float32)
        state = DistillState(
            step=state.step + 1,
            params=params,
            opt_state=keep(opt_state, state.opt_state),
            schedule=schedule,
            learned=learned,
            average=average,
        )
        return state, metrics

    if shardings is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step))
