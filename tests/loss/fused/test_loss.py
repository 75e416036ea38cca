"""Values and gradients of the fused head against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss

STUDENT, TEACHER, VOCAB = 16, 24, 37
"""As `arrays` makes them."""

OBJECTIVES = {
    "taid": lambda: loss.TAID(jnp.float32(0.3)),
    "forward_kl": loss.ForwardKL,
    "forward_kl_warm": lambda: loss.ForwardKL(2.0),
    "reverse_kl": loss.ReverseKL,
    "js": loss.JensenShannon,
    "tvd": loss.TotalVariation,
    "skew_fkl": loss.SkewForwardKL,
    "skew_rkl": loss.SkewReverseKL,
    "adaptive_kl": loss.AdaptiveKL,
    "ctkd": lambda: loss.CTKD(jnp.float32(4.0)),
    "dkd": loss.DKD,
    "sft": loss.CrossEntropy,
    "mix": lambda: loss.Mix(loss.TAID(jnp.float32(0.3)), 0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_loss_of_every_objective_is_the_plain_form(
    arrays, fused, plain, both, agree, name
):
    a, objective = arrays(), OBJECTIVES[name]()
    agree(both(fused, a, objective, chunk_size=5), both(plain, a, objective))


@pytest.mark.parametrize(
    "options",
    [
        {"bias": jnp.linspace(-1, 1, VOCAB)},
        {"softcap": 3.0},
        {"vocab_size": 30},
        {"bias": jnp.linspace(-1, 1, VOCAB), "softcap": 3.0, "vocab_size": 30},
    ],
    ids=["bias", "softcap", "padded", "all"],
)
@pytest.mark.parametrize("name", ["taid"])
def test_fused_loss_heads(arrays, fused, plain, both, agree, name, options):
    a, objective = arrays(), OBJECTIVES[name]()
    a["labels"] = a["labels"] % 30
    found = both(fused, a, objective, head=options, chunk_size=9)
    agree(found, both(plain, a, objective, head=options))


def test_fused_loss_bias_has_a_gradient(arrays, fused, plain):
    a, objective = arrays(), loss.ForwardKL()
    bias = jnp.linspace(-1, 1, VOCAB)

    def of(function, bias):
        return function(a, objective, a["student"], a["kernel"], head={"bias": bias})[0]

    found = jax.grad(functools.partial(of, fused))(bias)
    expected = jax.grad(functools.partial(of, plain))(bias)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("student", "teacher"), [(37, 45), (45, 37)])
def test_fused_loss_of_unequal_vocabularies_counts_the_shared_entries(
    arrays, fused, plain, both, agree, student, teacher
):
    a = arrays(vocab=student, teacher_vocab=teacher)
    a["labels"] = a["labels"] % 37
    objective = loss.TAID(jnp.float32(0.4))
    found = both(fused, a, objective, chunk_size=9)
    agree(found, both(plain, a, objective, entries=37))


@pytest.mark.parametrize(("student", "teacher"), [(37, 30), (30, 37), (None, 30)])
def test_fused_loss_of_unequal_real_entries_counts_the_shared_ones(
    arrays, fused, plain, both, agree, student, teacher
):
    a = arrays()
    a["labels"] = a["labels"] % 30
    heads = {"head": {"vocab_size": student}, "teacher_head": {"vocab_size": teacher}}
    objective = loss.TAID(jnp.float32(0.4))
    found = both(fused, a, objective, chunk_size=9, **heads)
    agree(found, both(plain, a, objective, entries=30))
    # The student's other entries take no part, and neither do the teacher's.
    assert not np.any(found[2][1][:, 30:])


@pytest.mark.parametrize("name", ["taid", "dkd", "sft", "mix"])
def test_fused_loss_does_not_hide_nan_in_a_counted_token(arrays, fused, name):
    a, objective = arrays(), OBJECTIVES[name]()
    run = jax.jit(
        lambda a, objective: fused(
            a, objective, a["student"], a["kernel"], chunk_size=5
        )
    )
    assert np.isfinite(run(a, objective)[0])
    token = np.argwhere(a["mask"])[7]
    for where in ("student", "teacher", "kernel", "teacher_kernel"):
        index = (*token, 3) if a[where].ndim == 3 else (3, 11)
        broken = {**a, where: a[where].at[index].set(jnp.nan)}
        value, sums = run(broken, objective)
        seen = not where.startswith("teacher") or name != "sft"
        assert np.isnan(value) == seen, where
        assert "kl_teacher" not in sums or np.isnan(sums["kl_teacher"]), where
        assert sums["num_tokens"] == int(a["mask"].sum())


def test_fused_loss_of_nan_has_a_gradient_that_is_not_finite(arrays, fused, both):
    a = arrays()
    a["student"] = a["student"].at[*np.argwhere(a["mask"])[0], 0].set(jnp.nan)
    *_, (in_hidden, in_kernel) = both(fused, a, loss.TAID(jnp.float32(0.4)))
    assert np.isnan(in_hidden).any()
    assert np.isnan(in_kernel).any()


@pytest.mark.parametrize("name", ["taid", "sft", "mix"])
def test_fused_loss_does_not_count_labels_to_be_ignored(
    arrays, fused, both, agree, name
):
    a, objective = arrays(), OBJECTIVES[name]()
    expected = both(fused, a, objective, chunk_size=5)
    out = ~a["mask"]
    a["labels"] = jnp.where(out, -100, a["labels"])
    a["student"] = jnp.where(out[..., None], jnp.nan, a["student"])
    found = both(fused, a, objective, mask=None, chunk_size=5)
    agree(found, expected)
    a["labels"] = jnp.full_like(a["labels"], -100)
    value, sums, gradients = both(fused, a, objective, mask=None, chunk_size=5)
    assert value == sums["num_tokens"] == 0
    assert not any(np.any(g) for g in gradients)


@pytest.mark.parametrize("label", [-1, 30, 36, 37, 10**6])
def test_fused_loss_label_that_is_no_real_entry_is_nan(arrays, fused, label):
    a = arrays()
    token = tuple(np.argwhere(a["mask"])[0])
    a["labels"] = (a["labels"] % 30).at[token].set(label)
    run = jax.jit(
        lambda a: fused(
            a, loss.DKD(), a["student"], a["kernel"], head={"vocab_size": 30}
        )
    )
    assert np.isnan(run(a)[0])
    a["labels"] = a["labels"].at[token].set(-100)
    assert np.isfinite(run(a)[0])


def test_fused_loss_tied_embedding_adds_to_the_embedding_s_gradient(
    arrays, fused, plain
):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    table = a["kernel"].T
    ids = a["labels"]

    def of(function, transposed, table):
        hidden = jnp.take(table, ids, axis=0)
        head = {"transposed": transposed}
        return function(a, objective, hidden, table.T, head=head)[0]

    expected = jax.grad(functools.partial(of, plain, False))(table)
    for function, transposed in ((fused, False), (fused, True), (plain, True)):
        found = jax.grad(functools.partial(of, function, transposed))(table)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_fused_loss_in_bfloat16_is_no_further_from_float64_than_the_plain_form(
    arrays, fused, both
):
    a = arrays(dtype="bfloat16", tokens=(64,))
    objective = loss.TAID(jnp.float32(0.4))
    exact = {k: np.asarray(v, np.float64) for k, v in a.items()}
    s, u = (
        exact["student"] @ exact["kernel"],
        exact["teacher"] @ exact["teacher_kernel"],
    )

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    t = float(np.float32(0.4))
    slope = softmax((1 - t) * s + t * u)
    slope = (softmax(s) - slope) * exact["mask"][:, None]
    truth = (slope @ exact["kernel"].T, exact["student"].T @ slope)

    def errors(function, **options):
        grads = both(function, a, objective, **options)[2]
        return [
            np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e)
            for g, e in zip(grads, truth, strict=True)
        ]

    def bfloat16_logits(a, objective, hidden, kernel):
        """The plain form of a model that gives its logits in its own dtype."""
        return loss.distillation_sums(
            objective, hidden @ kernel, a["teacher"] @ a["teacher_kernel"], a["mask"]
        )

    found, others = errors(fused, chunk_size=16), errors(bfloat16_logits)
    for ours, theirs in zip(found, others, strict=True):
        assert ours <= theirs
        # The gradient in the logits and the result, each rounded to 8 bits once.
        assert ours <= 2**-8


def test_fused_loss_cotangent_scales_the_gradient(arrays, fused):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of(scale, hidden, kernel):
        return scale * fused(a, objective, hidden, kernel)[0]

    one = jax.grad(of, argnums=(1, 2))(1.0, a["student"], a["kernel"])
    three = jax.grad(of, argnums=(1, 2))(-3.0, a["student"], a["kernel"])
    for x, y in zip(one, three, strict=True):
        np.testing.assert_allclose(-3 * np.asarray(x), y, rtol=1e-6, atol=1e-7)


def test_fused_loss_gives_ctkd_s_temperature_its_reversed_gradient(
    arrays, fused, plain
):
    a = arrays()

    def of(function, g):
        return function(a, loss.CTKD(g), a["student"], a["kernel"])[0]

    found = jax.grad(functools.partial(of, fused))(jnp.float32(0.7))
    expected = jax.grad(functools.partial(of, plain))(jnp.float32(0.7))
    assert expected != 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fused_loss_sums_and_teacher_have_no_gradient(arrays, fused):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of_metric(hidden):
        return fused(a, objective, hidden, a["kernel"])[1]["kl_target"]

    assert not np.any(jax.grad(of_metric)(a["student"]))

    def of_teacher(teacher, kernel):
        b = {**a, "teacher": teacher, "teacher_kernel": kernel}
        return fused(b, objective, a["student"], a["kernel"])[0]

    for g in jax.grad(of_teacher, argnums=(0, 1))(a["teacher"], a["teacher_kernel"]):
        assert not np.any(g)


def test_fused_loss_in_float16(arrays, fused, plain, both):
    a, objective = arrays(tokens=(32,)), loss.TAID(jnp.float32(0.4))
    half = {k: v.astype("float16") if v.dtype == "float32" else v for k, v in a.items()}
    value, _, grads = both(fused, half, objective, chunk_size=8)
    rounded = {k: v.astype(a[k].dtype) for k, v in half.items()}
    expected = both(plain, rounded, objective)
    assert [g.dtype for g in grads] == [jnp.float16, jnp.float16]
    # Of the same inputs: products are float32 sums, as the plain form's are.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for x, y in zip(grads, expected[2], strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # The gradient in the logits and the result, each rounded to 11 bits once.
        assert np.linalg.norm(x - y) < 2**-11 * np.linalg.norm(y)


def test_fused_loss_vmaps(arrays, fused):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of(hidden):
        return fused(a, objective, hidden, a["kernel"], chunk_size=16)[0]

    several = jnp.stack([a["student"], 2 * a["student"]])
    found = jax.vmap(jax.grad(of))(several)
    for x, y in zip(found, several, strict=True):
        expected = jax.grad(of)(y)
        assert np.linalg.norm(x - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": (STUDENT + 1, VOCAB)}, "student kernel"),
        ({"kernel": (VOCAB, STUDENT)}, "student kernel .* `transposed`"),
        ({"teacher_kernel": (TEACHER + 1, VOCAB)}, "teacher kernel"),
        ({"teacher": (4, 11, TEACHER)}, "teacher_hidden"),
        ({"labels": (4, 11)}, "labels of shape"),
        ({"mask": (4, 11)}, "mask of shape"),
    ],
)
def test_fused_loss_misuse_names_the_shapes(arrays, fused, change, message):
    a = arrays()
    for name, shape in change.items():
        a[name] = jnp.zeros(shape, a[name].dtype)
    with pytest.raises(ValueError, match=message) as caught:
        fused(a, loss.ForwardKL(), a["student"], a["kernel"])
    assert str(next(iter(change.values()))) in str(caught.value)


def test_fused_loss_misuse_of_vocabularies_names_the_shapes(arrays, fused):
    a = arrays()
    kernel = rf"kernel \({STUDENT}, {VOCAB}\)"
    for head in ({"vocab_size": VOCAB + 1}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match=f"1 <= vocab_size <= {VOCAB}.*{kernel}"):
            fused(a, loss.ForwardKL(), a["student"], a["kernel"], head=head)


def test_fused_loss_without_the_labels_that_it_needs_is_an_error(arrays, fused):
    a = arrays()
    a["labels"] = None
    with pytest.raises(ValueError, match=r"DKD needs labels of shape \(4, 12\)"):
        fused(a, loss.DKD(), a["student"], a["kernel"])
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        fused(a, loss.ForwardKL(), a["student"], a["kernel"], chunk_size=0)
