import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.loss import Head, Teachers, TeachersHead, TopK, TopKHead, fused_loss
from taid_jax.sharding import make_mesh
from taid_jax.train.step import paired_logits

TOKENS, WIDTH, VOCAB = (8, 3), 8, 40


def _case(mean, seed=0):
    """A student; three teachers with all that a head can have; weights of tokens."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(size=shape) * scale, "float32")

    # The student has entries that no teacher has: they do not count.
    hidden, kernel = normal(*TOKENS, WIDTH), normal(WIDTH, VOCAB + 3)
    heads = (
        Head(normal(4, VOCAB), bias=normal(VOCAB)),
        Head(normal(VOCAB, 6), softcap=3.0, transposed=True),
        # Padding, of which nothing is to be seen.
        Head(normal(5, VOCAB + 8, scale=2.0), vocab_size=VOCAB),
    )
    rows = tuple(normal(*TOKENS, width) for width in (4, 6, 5))
    weights = rng.dirichlet(np.ones(3), TOKENS)
    weights[0, 0] = 0, 1, 0
    return (
        hidden,
        kernel,
        Teachers(rows, jnp.float32(weights)),
        TeachersHead(heads, mean),
    )


def _exact_row(teachers, head):
    """The logits of the mean, in float64."""
    found = []
    for rows, each in zip(teachers.rows, head.heads, strict=True):
        kernel = np.float64(each.kernel)
        logits = np.float64(rows) @ (kernel.T if each.transposed else kernel)
        if each.bias is not None:
            logits += np.float64(each.bias)
        if each.softcap is not None:
            logits = each.softcap * np.tanh(logits / each.softcap)
        logits = logits[..., :VOCAB]
        found.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    weighted = [
        np.float64(teachers.weights)[..., number : number + 1]
        for number in range(len(found))
    ]
    pairs = list(zip(weighted, found, strict=True))
    if head.mean == "geometric":
        return sum(weight * row for weight, row in pairs)
    return np.log(sum(weight * np.exp(row) for weight, row in pairs))


@functools.partial(jax.jit, static_argnames=("chunk_size", "mesh"))
def _fused(objective, hidden, kernel, *teacher, **options):
    def mean(hidden, kernel):
        total, sums = fused_loss(objective, hidden, Head(kernel), *teacher, **options)
        return total / sums["num_tokens"]

    return jax.value_and_grad(mean, (0, 1))(hidden, kernel)


@jax.jit
def _plain(objective, hidden, kernel, *teacher, mask=None):
    def mean(hidden, kernel):
        logits = paired_logits(hidden, Head(kernel), *teacher)
        return loss.distillation_loss(objective, *logits, mask)

    return jax.value_and_grad(mean, (0, 1))(hidden, kernel)


def _assert_close(found, expected, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.mark.parametrize("run", [_fused, _plain])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_cross_entropy_to_the_mean_agrees_with_float64(mean, run):
    hidden, kernel, teachers, head = _case(mean)
    found = run(loss.ForwardKL(), hidden, kernel, teachers, head)
    row = _exact_row(teachers, head)
    row -= np.log(np.exp(row).sum(-1, keepdims=True))
    h, w = np.float64(hidden), np.float64(kernel)
    logits = (h @ w)[..., :VOCAB]
    own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    value = -(np.exp(row) * own).sum(-1).mean()
    slope = (np.exp(own) - np.exp(row)) / row[..., 0].size
    slope = np.pad(slope, ((0, 0), (0, 0), (0, 3)))
    expected = value, (slope @ w.T, np.einsum("abd,abv->dv", h, slope))
    _assert_close(found, expected, 3e-6)  # Logits up to 15, of float32 products.


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_a_teacher_with_all_the_weight_is_that_teacher_whatever_the_others_say(mean):
    hidden, kernel, teachers, head = _case(mean)
    bad = teachers.rows[0] * jnp.nan
    weights = jnp.zeros((*TOKENS, 3)).at[..., 1].set(1.0)
    teachers = Teachers((bad, *teachers.rows[1:]), weights)
    objective = loss.TAID(jnp.float32(0.3))
    found = _fused(objective, hidden, kernel, teachers, head)
    alone = _fused(objective, hidden, kernel, teachers.rows[1], head.heads[1])
    if mean == "geometric":
        jax.tree.map(np.testing.assert_array_equal, found, alone)
    _assert_close(found, alone, 1e-6)  # The arithmetic mean is of normalised rows.


def test_the_order_of_teachers_does_not_matter():
    hidden, kernel, teachers, head = _case("arithmetic")
    weights = teachers.weights[..., jnp.array([2, 0, 1])]
    rows, heads = ((each[2], each[0], each[1]) for each in (teachers.rows, head.heads))
    other = Teachers(rows, weights), TeachersHead(heads, "arithmetic")
    case = loss.ForwardKL(), hidden, kernel
    _assert_close(_fused(*case, *other), _fused(*case, teachers, head), 1e-6)


def test_a_stored_row_may_be_one_of_them():
    hidden, kernel, teachers, head = _case("arithmetic")
    logprobs = jax.nn.log_softmax(head.heads[0].logits(teachers.rows[0]))
    values, ids = jax.lax.top_k(logprobs, VOCAB)
    stored = TopK(ids.astype("int32"), values, jnp.full(TOKENS, -jnp.inf))
    rows = (stored, *teachers.rows[1:])
    others = dataclasses.replace(head, heads=(TopKHead(VOCAB), *head.heads[1:]))
    case = loss.ForwardKL(), hidden, kernel
    expected = _fused(*case, teachers, head)
    for run in (_fused, _plain):
        found = run(*case, teachers._replace(rows=rows), others)
        _assert_close(found, expected, 2e-6)


def test_tokens_that_do_not_count_have_no_gradient_even_in_the_objective():
    hidden, kernel, teachers, head = _case("arithmetic")
    mask = jnp.ones(TOKENS, bool).at[0].set(False)
    teachers = teachers._replace(weights=teachers.weights.at[0].set(0.0))

    def total(temperature):
        objective = loss.CTKD(temperature)
        return fused_loss(objective, hidden, Head(kernel), teachers, head, mask)[0]

    assert np.isfinite(jax.grad(total)(jnp.float32(1.5)))


@pytest.mark.multidevice
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_several_teachers_are_the_same_plain_fused_and_on_eight_devices(mean):
    hidden, kernel, teachers, head = _case(mean)
    mask = jnp.asarray(np.random.default_rng(1).random(TOKENS) < 0.7)
    case = loss.TAID(jnp.float32(0.3)), hidden, kernel, teachers, head
    one = _fused(*case, mask=mask, chunk_size=5)
    _assert_close(one, _plain(*case, mask=mask), 2e-6)  # Sums in another order.
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    _assert_close(_fused(*case, mask=mask, mesh=mesh), one, 2e-6)


def test_what_does_not_belong_together_is_refused():
    hidden, kernel, teachers, head = _case("geometric")
    case = loss.ForwardKL(), hidden, Head(kernel)
    with pytest.raises(ValueError, match="2 rows, 3 heads and weights"):
        fused_loss(*case, teachers._replace(rows=teachers.rows[:2]), head)
    with pytest.raises(ValueError, match="teacher kernel of shape"):
        fused_loss(*case, teachers._replace(rows=teachers.rows[::-1]), head)
    with pytest.raises(TypeError, match="need Teachers for teacher_hidden"):
        fused_loss(*case, teachers.rows[0], head)
    others, other_heads = teachers.rows[1:], head.heads[1:]
    for rows, its_head in (
        (teachers, head),
        (None, None),
        (None, head.heads[0]),
        (teachers.rows[0], TopKHead(VOCAB)),
    ):
        several = teachers._replace(rows=(rows, *others))
        heads = dataclasses.replace(head, heads=(its_head, *other_heads))
        with pytest.raises(TypeError, match="need an array with a Head, or TopK with"):
            fused_loss(*case, several, heads)
