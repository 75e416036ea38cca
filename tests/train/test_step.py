import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from taid_jax import loss
from taid_jax.train import step as s
from taid_jax.train.state import make_optimizer, updates_applied
from taid_jax.train.teachers import join_params, mix_teachers

TEACHER_SEED, EMA = 2, 0.75


def test_next_token_labels_are_those_of_the_next_position():
    labels = jnp.array([[5, 6, -100, 8]], jnp.int32)
    found = s.next_token_labels({"labels": labels})
    np.testing.assert_array_equal(found, [[6, -100, 8, -100]])


def test_next_token_labels_do_not_cross_segments():
    batch = {
        "labels": jnp.array([[5, 6, 7, 8, 9]], jnp.int32),
        "segment_ids": jnp.array([[1, 1, 2, 2, 0]], jnp.int32),
    }
    found = s.next_token_labels(batch)
    np.testing.assert_array_equal(found, [[6, -100, 8, -100, -100]])


@functools.partial(jax.jit, static_argnames=("student", "teacher", "fused"))
def _batch_loss(objective, student, teacher, params, batch, fused=True):
    return s.batch_loss(
        objective, student, params[0], teacher, params[1], batch, fused=fused
    )


@pytest.fixture
def both_params(make_params):
    return make_params(1), make_params(TEACHER_SEED)


def test_batch_loss_is_the_shifted_cross_entropy(functions, both_params, make_batch):
    batch = make_batch(0)
    total, sums = _batch_loss(
        loss.CrossEntropy(), functions, functions, both_params, batch
    )
    params = jax.tree.map(np.float64, both_params[0])
    x = params["embed"]["embedding"][batch["input_ids"]]
    x = x + np.tanh(x @ params["mix"]["kernel"] + params["mix"]["bias"])
    logits = x @ params["lm_head"]["kernel"]
    log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected, count = 0.0, 0
    for row, labels in zip(log_q, batch["labels"], strict=True):
        for position in range(len(labels) - 1):
            if labels[position + 1] != -100:
                expected -= row[position, labels[position + 1]]
                count += 1
    # Sums of some tens of float32 terms.
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert sums["num_tokens"] == count


def test_batch_loss_fused_or_of_a_model_that_only_has_logits_is_one(
    functions, both_params, make_batch
):
    batch, objective = make_batch(0), loss.TAID(jnp.float32(0.4))
    logits = s.ModelFunctions(
        logits=lambda params, b: functions.head(params).logits(
            functions.hidden(params, b)
        )
    )
    fused, fused_sums = _batch_loss(objective, functions, functions, both_params, batch)
    for student, teacher in (
        (functions, functions),
        (logits, functions),
        (functions, logits),
    ):
        plain, sums = _batch_loss(
            objective, student, teacher, both_params, batch, fused=False
        )
        # The promise of the fused head.
        np.testing.assert_allclose(fused, plain, rtol=1e-6)
        assert fused_sums.keys() == sums.keys()
        for key in sums:
            np.testing.assert_allclose(fused_sums[key], sums[key], rtol=1e-5)


def test_batch_loss_of_two_equal_teachers_is_that_of_the_one_bit_for_bit(
    functions, both_params, make_batch
):
    batch, objective = make_batch(0), loss.TAID(jnp.float32(0.4))
    student, teacher = both_params
    # Half of a number twice is that number, in any order.
    two = mix_teachers([functions] * 2, [0.5, 0.5], mean="geometric")
    both = student, join_params([teacher, teacher])
    _, sums = _batch_loss(objective, functions, functions, both_params, batch)
    _, found = _batch_loss(objective, functions, two, both, batch)
    assert found == sums


def test_batch_loss_model_without_functions_is_an_error(both_params, make_batch):
    nothing = s.ModelFunctions()
    with pytest.raises(ValueError, match="hidden and head, or logits"):
        _batch_loss(loss.ForwardKL(), nothing, nothing, both_params, make_batch(0))


def test_train_step_learns_the_teacher(make_trainer, make_params, make_batch):
    step, state = make_trainer(steps=60, rate=3e-2)
    teacher, found = make_params(TEACHER_SEED), []
    for index in range(60):
        state, metrics = step(state, teacher, make_batch(index))
        found.append(metrics)
    assert metrics["t"] > 0.95
    # Of batches that were not seen before.
    first, last = (
        np.mean([row["kl_teacher"] for row in rows]) for rows in (found[:5], found[-5:])
    )
    assert last < 0.5 * first
    assert state.step == 60


def test_train_step_accumulation_changes_nothing(make_trainer, make_params, make_batch):
    batch = make_batch(0)
    # Very unequal token counts: a mean of means would be far off.
    batch["labels"][::2, 2:] = -100
    teacher = make_params(TEACHER_SEED)
    whole, state = make_trainer()
    state, metrics = whole(state, teacher, batch)
    split, other = make_trainer(grad_accum=4)
    other, found = split(other, teacher, batch)
    for key in metrics:
        # Another order of some tens of float32 terms.
        np.testing.assert_allclose(found[key], metrics[key], rtol=2e-6, err_msg=key)
    for a, b in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(other.opt_state), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(
        state.schedule.prev_loss, other.schedule.prev_loss, rtol=2e-6
    )


def test_train_step_schedule_advances_on_the_distillation_part(
    make_trainer, make_params, make_batch
):
    def mix(schedule, learned, step):
        return loss.Mix(loss.TAID(schedule.t), 0.5)

    step, state = make_trainer(mix, fused=False)
    state, metrics = step(state, make_params(TEACHER_SEED), make_batch(0))
    np.testing.assert_allclose(state.schedule.prev_loss, metrics["distil_loss"])
    np.testing.assert_allclose(
        metrics["loss"],
        0.5 * metrics["distil_loss"] + 0.5 * metrics["lm_loss"],
        rtol=1e-6,
    )


def test_train_step_compiles_once(make_trainer, make_params, make_batch):
    step, state = make_trainer()
    teacher, before = make_params(TEACHER_SEED), step._cache_size()
    for index in range(4):
        state, _ = step(state, teacher, make_batch(index))
    # Compiled for this placement at most once, by this test or one before.
    assert step._cache_size() - before <= 1


def test_train_step_donates_the_state_and_not_the_teacher(
    make_trainer, make_params, make_batch
):
    step, state = make_trainer()
    teacher = make_params(TEACHER_SEED)
    step(state, teacher, make_batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(teacher))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_train_step_not_finite_is_skipped(make_trainer, make_params, make_batch, bad):
    step, state = make_trainer()
    teacher = make_params(TEACHER_SEED)
    state, _ = step(state, teacher, make_batch(0))
    before = jax.tree.map(np.array, state)
    broken = jax.tree.map(np.array, teacher)
    for leaf in jax.tree.leaves(broken):
        leaf[0] = bad
    after, metrics = step(state, broken, make_batch(1))
    assert metrics["skipped"] == 1
    _unchanged(after, before)
    after, metrics = step(after, teacher, make_batch(2))
    assert metrics["skipped"] == 0
    assert updates_applied(after.opt_state) == 2


def test_make_optimizer_decays_neither_biases_nor_layer_norms_nor_what_is_learned():
    names = {"norm": ("scale", "bias"), "rms": ("scale",), "proj": ("kernel", "bias")}
    params = {
        part: {leaf: jnp.ones(2) for leaf in leaves} for part, leaves in names.items()
    }
    trainable = ({"layers": params}, {"temperature": jnp.ones(())})
    optimizer = make_optimizer(0.5, weight_decay=0.1)
    nothing = jax.tree.map(jnp.zeros_like, trainable)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(nothing, optimizer.init(trainable), trainable)
    found = jax.tree_util.tree_leaves_with_path(updates)
    moved = {jax.tree_util.keystr(path[-2:]) for path, leaf in found if np.any(leaf)}
    assert moved == {"['rms']['scale']", "['proj']['kernel']"}


def _nan_of_learned(updates, _):
    return updates[0], jax.tree.map(lambda leaf: leaf * np.nan, updates[1])


@pytest.mark.parametrize(
    "optimizer",
    [
        # 1 - b2 is 0 in float32, and so is the mean of a weight that is not used.
        {"b2": 1 - 1e-8},
        # A mean of squares that float32 does not hold, with an update of 0.
        optax.chain(optax.scale(1e25), optax.adam(1e-2)),
        optax.chain(optax.stateless(_nan_of_learned), optax.sgd(1e-2)),
    ],
    ids=["b2", "moments", "learned"],
)
def test_train_step_update_that_is_not_finite_is_skipped(
    make_trainer, make_params, make_batch, optimizer
):
    step, state = make_trainer(
        lambda schedule, learned, step: loss.CTKD(learned["temperature"]),
        optimizer=optimizer,
        learned={"temperature": jnp.float32(1)},
        fused=False,
    )
    teacher = make_params(TEACHER_SEED)
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, teacher, make_batch(0))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    _unchanged(state, before)


def _unchanged(state, before):
    assert state.step == before.step + 1
    old = jax.tree.leaves(before._replace(step=state.step))
    for a, b in zip(jax.tree.leaves(state), old, strict=True):
        np.testing.assert_array_equal(a, b)


def test_train_step_gradient_norm_that_is_not_finite_is_skipped(
    make_trainer, make_params, make_batch
):
    """Clipped by a norm of inf the gradient is 0: the update alone would not tell."""

    def huge(schedule, learned, step):
        return lambda *arguments: 1e25 * loss.TAID(schedule.t)(*arguments)

    step, state = make_trainer(huge, fused=False)
    # A loss has been seen: the schedule would move by the next.
    seen = state.schedule._replace(prev_loss=jnp.float32(1e26))
    state = state._replace(schedule=seen, step=jnp.int32(3))
    before = jax.tree.map(np.array, state)
    state, metrics = step(state, make_params(TEACHER_SEED), make_batch(0))
    assert np.isfinite(metrics["loss"])
    assert np.isinf(metrics["grad_norm"])
    assert metrics["skipped"] == 1
    assert metrics["delta_t"] == 0
    _unchanged(state, before)


def test_train_step_without_counted_tokens_changes_no_weight_by_gradient(
    make_trainer, make_params, make_batch
):
    step, state = make_trainer()
    batch = make_batch(0)
    batch["labels"][:] = -100
    _, metrics = step(state, make_params(TEACHER_SEED), batch)
    assert metrics["loss"] == 0
    assert metrics["grad_norm"] == 0
    assert metrics["skipped"] == 0


def _pairs(batch):
    """The batch packed, of two texts a row; every second text is the student's."""
    place = np.arange(batch["input_ids"].shape[1])
    ends = np.random.default_rng(1).integers(2, 5, (len(batch["input_ids"]), 1))
    segments = np.where(place < ends, 1, 2).astype(np.int32)
    own = ((segments + np.arange(len(segments))[:, None]) % 2).astype(np.int32)
    return batch | {"segment_ids": segments, "from_student": own}


@pytest.mark.multidevice
def test_train_step_pairs_accumulated_and_on_eight_devices_are_one(
    make_trainer, make_params, make_batch
):
    from taid_jax.sharding import make_mesh, place_batch, replicated
    from taid_jax.train.on_policy.figures import with_text_figures

    def make_objective(schedule, learned, step):
        weight = loss.distillm2_weight(step, 4)
        return loss.ByText(loss.SkewForwardKL(), loss.SkewReverseKL(), weight)

    make, teacher = with_text_figures(make_objective), make_params(TEACHER_SEED)
    plain, state = make_trainer(make, fused=False)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    shared, other = make_trainer(make, mesh=mesh, grad_accum=2)
    other = jax.device_put(other, replicated(mesh))
    there = jax.device_put(teacher, replicated(mesh))
    for index in range(4):
        batch = _pairs(make_batch(index))
        state, metrics = plain(state, teacher, batch)
        other, found = shared(other, there, place_batch(batch, mesh))
        assert found.keys() == metrics.keys()
        for key in metrics:
            np.testing.assert_allclose(
                found[key], metrics[key], rtol=1e-5, atol=1e-7, err_msg=key
            )
        # It rises over the first half of the steps.
        np.testing.assert_allclose(
            metrics["student_weight"], (1.0, 1.25, 1.5, 1.5)[index], rtol=1e-6
        )
        both = metrics["teacher_texts_loss"] + metrics["student_texts_loss"]
        np.testing.assert_allclose(both, metrics["loss"], rtol=1e-6)
        counted = s.next_token_labels(jax.tree.map(jnp.asarray, batch)) != -100
        assert float(metrics["tokens"]) == int(counted.sum())
    with pytest.raises(ValueError, match="needs `from_student` in the batch"):
        plain(state, teacher, make_batch(0))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("mesh_text", "parts", "options"),
    [
        pytest.param("data=8", 1, {}, marks=pytest.mark.slow),
        pytest.param("fsdp=8", 1, {}, marks=pytest.mark.slow),
        pytest.param("data=2,tensor=4", 4, {}, marks=pytest.mark.slow),
        # A live teacher is on this mesh in the test of pairs.
        ("data=2,fsdp=2,tensor=2", 2, {"teacher_ema": EMA}),
    ],
)
def test_train_step_eight_devices_equal_one(
    make_trainer, make_params, make_batch, mesh_text, parts, options
):
    from taid_jax.sharding import make_mesh, place_batch, replicated

    teacher, mesh = make_params(TEACHER_SEED), make_mesh(mesh_text)
    alone, state = make_trainer(**options)
    shared, other = make_trainer(mesh=mesh, grad_accum=parts, **options)
    if options:  # Another than the student, for there to be a distance.
        state, other = (
            each._replace(average=make_params(TEACHER_SEED)) for each in (state, other)
        )
    other = jax.device_put(other, replicated(mesh))
    teacher_there = jax.device_put(teacher, replicated(mesh))
    for index in range(5):
        batch = make_batch(index)
        state, metrics = alone(state, teacher, batch)
        other, found = shared(other, teacher_there, place_batch(batch, mesh))
        for key in ("loss", "kl_teacher", "t", "grad_norm"):
            # The order of sums differs between the meshes.
            np.testing.assert_allclose(
                found[key], metrics[key], rtol=1e-5, atol=1e-7, err_msg=key
            )
    averages = jax.tree.leaves(state.average), jax.tree.leaves(other.average)
    for a, b in zip(*averages, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_train_step_teacher_is_the_moving_average(
    make_trainer, make_params, make_batch
):
    """By numpy; the first loss is that of a live teacher with those weights."""
    step, state = make_trainer(teacher_ema=EMA)
    start = jax.tree.map(np.array, make_params(TEACHER_SEED))
    state = state._replace(average=jax.tree.map(jnp.array, start))
    # Taken in hand before the step donates them.
    plain, other = make_trainer()
    _, expected = plain(other, start, make_batch(0))
    average = jax.tree.map(np.float64, start)
    for index in range(4):
        state, metrics = step(state, {}, make_batch(index))
        if not index:
            for key in ("loss", "kl_teacher", "grad_norm"):
                assert metrics[key] == expected[key]
        average = jax.tree.map(
            lambda a, p: EMA * a + (1 - EMA) * np.float64(p), average, state.params
        )
        for found, wanted in zip(
            jax.tree.leaves(state.average), jax.tree.leaves(average), strict=True
        ):
            assert found.dtype == jnp.float32
            # A few roundings of float32.
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)


def test_init_state_average_begins_as_the_parameters(make_trainer):
    _, state = make_trainer(teacher_ema=EMA)
    assert jax.tree.structure(state.average) == jax.tree.structure(state.params)
    for leaf, average in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(state.average), strict=True
    ):
        np.testing.assert_array_equal(leaf, average)
        assert leaf.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()


def test_train_step_that_is_skipped_leaves_the_average(
    make_trainer, make_params, make_batch
):
    step, state = make_trainer(teacher_ema=EMA)
    state = state._replace(average=make_params(TEACHER_SEED))
    state, _ = step(state, {}, make_batch(0))
    broken = jax.tree.map(np.array, state)
    jax.tree.leaves(broken.params)[0][0] = np.nan
    before = jax.tree.map(np.array, broken)
    state, metrics = step(broken, {}, make_batch(1))
    assert metrics["skipped"] == 1
    _unchanged(state, before)


def test_train_step_average_and_its_decay_come_together(make_trainer, make_batch):
    step, state = make_trainer(teacher_ema=EMA)
    with pytest.raises(ValueError, match=r"averaged=True.*teacher_ema 0.75"):
        step(state._replace(average=None), {}, make_batch(0))
    plain, _ = make_trainer()
    with pytest.raises(ValueError, match="teacher_ema None"):
        plain(state, {}, make_batch(0))
