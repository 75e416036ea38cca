"""A teacher on rows of its own, against each pair of texts by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.data.batches import ExampleSet
from taid_jax.data.packing import make_table, pack_rows
from taid_jax.data.tokens import Example
from taid_jax.models.config import DecoderConfig
from taid_jax.models.decoder import decoder_functions, init_params
from taid_jax.settings import ModelSettings
from taid_jax.sharding import make_mesh, place_batch, replicated
from taid_jax.train.step import batch_loss
from taid_jax.train.teachers import join_params, on_own_rows, teacher_functions
from taid_jax.types import ModelFunctions

CONFIG = DecoderConfig(
    vocab_size=22,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=32,
    max_position_embeddings=64,
    initializer_range=0.4,
)
SEQ_LEN, TEACHER_LEN = 16, 28


def make_example(draw, answer, prompt):
    ids = np.concatenate([draw.integers(0, 22, prompt), answer]).astype(np.int32)
    return Example(ids, np.arange(len(ids)) >= prompt, prompt, len(ids))


@pytest.fixture(scope="module")
def examples():
    """Answers behind two prompts; those of the teacher are longer or shorter."""
    draw, found = np.random.default_rng(0), []
    for _ in range(14):
        answer = draw.integers(0, 22, int(draw.integers(1, 6)))
        mine, theirs = int(draw.integers(1, 6)), int(draw.integers(1, 14))
        teacher = make_example(draw, answer, theirs)
        found.append(make_example(draw, answer, mine)._replace(teacher=teacher))
    return found


def make_set(examples, *, packed):
    found = ExampleSet(make_table([]), [], SEQ_LEN, 0, packed, teacher_len=TEACHER_LEN)
    return found.of_examples(examples)


@pytest.fixture(scope="module")
def models():
    functions = decoder_functions(CONFIG, dtype=jnp.float32)
    params = [init_params(CONFIG, jax.random.key(seed)) for seed in (0, 1)]
    return functions, *params


def logits_only(functions):
    return ModelFunctions(
        logits=lambda params, batch: functions.head(params).logits(
            functions.hidden(params, batch)
        )
    )


def total(models, batch, *, teacher, mesh=None, fused=True):
    student, params, known = models
    run = jax.jit(
        lambda params, known, batch: batch_loss(
            loss.ForwardKL(),
            student,
            params,
            teacher,
            known,
            batch,
            mesh=mesh,
            fused=fused,
        )
    )
    _, sums = run(params, known, batch)
    return float(sums["kl_teacher"]), int(sums["num_tokens"])


@pytest.fixture(scope="module")
def alone(models, examples):
    """The KL of every pair, each text as the only one; in float64 from its logits."""
    functions, *both = models

    @jax.jit
    def logits(params, ids):
        hidden = functions.hidden(params, {"input_ids": ids})
        return functions.head(params).logits(hidden)

    found = []
    for each in examples:
        rows = []
        for params, side in zip(both, (each, each.teacher), strict=True):
            # Padded behind, which a causal model does not see.
            ids = np.zeros((1, TEACHER_LEN), np.int32)
            ids[0, : len(side.ids)] = side.ids
            row = np.asarray(logits(params, ids), np.float64)[0]
            row = row[side.prompt - 1 : side.answer_end - 1]
            rows.append(row - np.log(np.exp(row).sum(-1, keepdims=True)))
        q, p = rows
        found.append((np.exp(p) * (p - q)).sum(-1))
    return found


@pytest.mark.parametrize("packed", [True, False])
def test_on_own_rows_is_each_pair_alone(models, examples, alone, packed):
    side = make_set(examples, packed=packed)
    assert (len(side) < len(examples)) == packed
    batch = side.batch(range(len(side)), len(side) + 1)  # One row is padding.
    teacher, only = on_own_rows(models[0]), on_own_rows(logits_only(models[0]))
    for kl, count in (
        total(models, batch, teacher=teacher),
        total(models, batch, teacher=only, fused=False),
    ):
        assert count == sum(map(len, alone))
        # Float32 against float64, over some tens of tokens.
        np.testing.assert_allclose(kl, np.concatenate(alone).sum(), rtol=2e-6)


def test_several_teachers_on_own_rows_are_the_one_that_a_document_names(
    models, examples, alone
):
    functions, student, known = models
    names = np.array([(1, 0, 0), (0, 0, 1), (0.5, 0, 0.5)], np.float32)
    weights = names[np.arange(len(examples)) % 3]
    side = dataclasses.replace(make_set(examples, packed=True), teacher_weights=weights)
    batch = side.batch(range(len(side)), len(side) + 1)
    settings = ModelSettings(teacher=("a", "b", "c"), teacher_field="who")
    teacher = teacher_functions(settings, [CONFIG] * 3, own_rows=True)
    params = join_params([known, student, known])
    kl, count = total((functions, student, params), batch, teacher=teacher)
    assert count == sum(map(len, alone))
    np.testing.assert_allclose(kl, np.concatenate(alone).sum(), rtol=2e-6)


def test_on_own_rows_with_the_students_prompts_are_the_students(models, examples):
    same = [each._replace(teacher=each._replace(teacher=None)) for each in examples]
    side = make_set(same, packed=True)
    batch = side.batch(range(len(side)), len(side))
    found = total(models, batch, teacher=on_own_rows(models[0]))
    # Rows of another length are summed in another order.
    plain = total(models, batch, teacher=models[0])
    np.testing.assert_allclose(found, plain, rtol=1e-6)


def test_rooms_hold_in_both_rows(examples):
    """What shares a row fits on both sides."""
    side = make_set(examples, packed=True)
    for row in side.rows:
        taken = [side.table[number] for number in row]
        assert sum(len(each.ids) for each in taken) <= SEQ_LEN
        assert sum(len(each.teacher.ids) for each in taken) <= TEACHER_LEN
    alone = pack_rows([len(each.ids) for each in examples], SEQ_LEN)
    assert len(alone) <= len(side.rows) < len(examples)


@pytest.mark.multidevice
def test_on_own_rows_on_eight_devices_is_that_of_one(models, examples):
    side = make_set(examples, packed=False)
    batch = side.batch(range(len(side)), 16)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    (functions, *params), teacher = models, on_own_rows(models[0])
    placed = [jax.device_put(each, replicated(mesh)) for each in params]
    shared = place_batch(batch, mesh)
    found = total((functions, *placed), shared, teacher=teacher, mesh=mesh)
    kl, count = total(models, batch, teacher=teacher)
    assert found[1] == count
    # The order of sums differs.
    np.testing.assert_allclose(found[0], kl, rtol=1e-5)
