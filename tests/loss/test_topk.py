import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.loss import Head, TopK, TopKHead, fused_loss
from taid_jax.sharding import make_mesh
from taid_jax.train.step import batch_loss
from taid_jax.types import ModelFunctions

TOKENS, WIDTH, VOCAB, K = (8, 3), 8, 40, 5


def _case(seed=0, k=K):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*TOKENS, WIDTH)), "float32")
    kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), "float32")
    teacher = jnp.asarray(rng.normal(size=(*TOKENS, VOCAB)) * 3, "float32")
    return hidden, kernel, teacher, _rows(teacher, k)


def _rows(logits, k):
    logprobs = np.asarray(logits, np.float64)
    logprobs = logprobs - np.log(np.exp(logprobs).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, -1)
    known = np.take_along_axis(logprobs, order[..., :k], -1)
    rest = np.take_along_axis(logprobs, order[..., k:], -1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(rest).sum(-1))
    as_array = [jnp.asarray(x, "float32") for x in (known, tail)]
    return TopK(jnp.asarray(order[..., :k], "int32"), *as_array)


@functools.partial(jax.jit, static_argnames=("chunk_size", "mesh"))
def _fused(objective, hidden, kernel, rows, head, **options):
    def mean(hidden, kernel):
        total, sums = fused_loss(objective, hidden, Head(kernel), rows, head, **options)
        return total / sums["num_tokens"], sums["kl_teacher"] / sums["num_tokens"]

    return jax.value_and_grad(mean, (0, 1), has_aux=True)(hidden, kernel)


def _assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Sums in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(jnp.abs(b).max()))


def test_forward_kl_of_top_k_is_the_closed_form_with_one_entry_for_the_rest():
    hidden, kernel, _, rows = _case()
    (_, divergence), gradients = _fused(
        loss.ForwardKL(), hidden, kernel, rows, TopKHead(VOCAB)
    )
    # In float64, from k entries and the rest, without any rebuilt row.
    h, w = (np.asarray(x, np.float64) for x in (hidden, kernel))
    logits = h @ w
    q = np.exp(logits - logits.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    p, rest = np.exp(np.float64(rows.logprobs)), np.exp(np.float64(rows.tail))
    ids = np.asarray(rows.ids)
    known = np.take_along_axis(q, ids, -1)
    others = 1 - known.sum(-1)
    expected = (p * np.log(p / known)).sum(-1) + rest * np.log(rest / others)
    np.testing.assert_allclose(divergence, expected.mean(), rtol=1e-6)
    # d/ds of the same: q - p on the known, q_j (1 - rest / others) elsewhere.
    slope = q * np.expand_dims(1 - rest / others, -1)
    np.put_along_axis(slope, ids, known - p, -1)
    slope /= p[..., 0].size
    in_hidden, in_kernel = slope @ w.T, np.einsum("abd,abv->dv", h, slope)
    _assert_close(gradients, (in_hidden, in_kernel))


@pytest.mark.parametrize(
    ("objective", "rest"),
    [
        (loss.TAID(jnp.float32(0.3)), "student"),
        (loss.TAID(jnp.float32(0.3)), "none"),
        (loss.ReverseKL(), "student"),
        (loss.AdaptiveKL(), "uniform"),
    ],
    ids=["taid-student", "taid-none", "reverse_kl-student", "adaptive_kl-uniform"],
)
def test_fused_top_k_is_the_objective_on_whole_rows(objective, rest):
    hidden, kernel, _, rows = _case()
    head = TopKHead(VOCAB, rest)
    (value, _), gradients = _fused(objective, hidden, kernel, rows, head, chunk_size=5)

    def plain(hidden, kernel):
        student = Head(kernel).logits(hidden)
        teacher = head.logits(rows, student)
        return loss.distillation_loss(objective, student, teacher)

    expected = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, kernel)
    _assert_close((value, gradients), expected)


def test_all_entries_are_the_live_teacher():
    hidden, kernel, teacher, _ = _case()
    rows = _rows(teacher, VOCAB)
    student = Head(kernel).logits(hidden)
    row = TopKHead(VOCAB).logits(rows, student)
    np.testing.assert_allclose(row, jax.nn.log_softmax(teacher), rtol=0, atol=2e-6)


def test_rest_is_spread_as_the_student_or_evenly_or_not_at_all():
    rows = TopK(
        jnp.array([[2, 9]]), jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.ones(1) / 4)
    )
    student = jnp.log(jnp.array([[0.1, 0.3, 0.2, 0.4]]))
    # 9 is outside of the vocabulary: it only fills the row up.
    for rest, expected in (
        ("student", [0.25 / 8, 0.75 / 8, 0.5, 0.25 / 2]),
        ("uniform", [0.25 / 3, 0.25 / 3, 0.5, 0.25 / 3]),
        ("none", [0, 0, 0.5, 0]),
    ):
        row = TopKHead(4, rest).logits(rows, student)
        np.testing.assert_allclose(jnp.exp(row), [expected], rtol=1e-6)


def test_an_entry_that_does_not_count_for_the_student_stays_out():
    rows = TopK(jnp.array([[0, 3]]), jnp.log(jnp.array([[0.5, 0.2]])), jnp.zeros(1))
    student = jnp.array([[-jnp.inf, 0.0, 0.0, -jnp.inf]])
    for rest in ("student", "uniform", "none"):
        row = TopKHead(4, rest).logits(rows, student)
        assert row[0, 0] == row[0, 3] == -jnp.inf
        assert not jnp.isnan(row).any()


@pytest.mark.multidevice
def test_fused_top_k_on_eight_devices_is_that_on_one():
    hidden, kernel, _, rows = _case()
    mask = jnp.asarray(np.random.default_rng(1).random(TOKENS) < 0.7)
    case = loss.TAID(jnp.float32(0.3)), hidden, kernel, rows, TopKHead(VOCAB)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    _assert_close(_fused(*case, mask=mask, mesh=mesh), _fused(*case, mask=mask))


def test_masked_tokens_may_hold_anything():
    hidden, kernel, _, rows = _case()
    mask = jnp.ones(TOKENS, bool).at[0].set(False)
    head = TopKHead(VOCAB)
    spoiled = rows._replace(
        logprobs=rows.logprobs.at[0].set(jnp.nan), tail=rows.tail.at[0].set(jnp.nan)
    )
    clean, other = (
        _fused(loss.TAID(jnp.float32(0.3)), hidden, kernel, r, head, mask=mask)
        for r in (rows, spoiled)
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_does_not_fit_together_is_refused():
    hidden, kernel, teacher, rows = _case()

    def call(*pair):
        return fused_loss(loss.ForwardKL(), hidden, Head(kernel), *pair)

    with pytest.raises(TypeError, match="need TopK for teacher_hidden with a TopKHead"):
        call(teacher, TopKHead(VOCAB))
    with pytest.raises(TypeError, match="got TopK with Head"):
        call(rows, Head(kernel))
    with pytest.raises(ValueError, match="need ids and logprobs of shape"):
        call(rows._replace(tail=rows.tail[:4]), TopKHead(VOCAB))


@pytest.mark.parametrize("rest", ["student", "uniform"])
def test_batch_loss_of_top_k_without_the_fused_head_is_the_same(rest):
    """Of a student with more entries than the teacher: these get none of the rest."""
    hidden, kernel, teacher, _ = _case()
    size = VOCAB - 10
    rows, head = _rows(teacher[..., :size], K), TopKHead(size, rest)
    functions = (
        ModelFunctions(lambda params, batch: params["x"], lambda _: Head(kernel)),
        ModelFunctions(lambda params, batch: rows, lambda params: head),
    )
    batch = {"labels": jnp.ones(TOKENS, jnp.int32)}
    fused, plain = (
        jax.jit(
            lambda x, fused=fused: batch_loss(
                loss.ReverseKL(),
                functions[0],
                {"x": x},
                functions[1],
                {},
                batch,
                fused=fused,
            )[0]
        )(hidden)
        for fused in (True, False)
    )
    np.testing.assert_allclose(plain, fused, rtol=1e-6)
