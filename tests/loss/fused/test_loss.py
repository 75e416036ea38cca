"""Values and gradients of the fused head against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss

TOKENS, STUDENT, TEACHER, VOCAB = (4, 12), 16, 24, 37
"""As `arrays` makes them."""

OBJECTIVES = {
    "taid": lambda: loss.TAID(jnp.float32(0.3)),
    "forward_kl_warm": lambda: loss.ForwardKL(2.0),
    "reverse_kl": loss.ReverseKL,
    "js": loss.JensenShannon,
    "tvd": loss.TotalVariation,
    "skew_fkl": loss.SkewForwardKL,
    "skew_rkl": loss.SkewReverseKL,
    "adaptive_kl": loss.AdaptiveKL,
    "alpha_mixture": lambda: loss.AlphaMixture(jnp.float32(0.3), -1),
    "alpha_beta": loss.AlphaBeta,
    "concrete_score": lambda: loss.ConcreteScore("teacher"),
    "entropy_gated": lambda: loss.EntropyGated(2.5),
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


@pytest.mark.parametrize("chunk_size", [1, None])
def test_fused_loss_does_not_depend_on_the_chunk(
    arrays, fused, plain, both, agree, chunk_size
):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    found = both(fused, a, objective, chunk_size=chunk_size)
    agree(found, both(plain, a, objective))


@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
def test_fused_loss_of_many_chunks_is_the_plain_form(
    arrays, fused, plain, agree, small_chunks, transposed
):
    a, objective = arrays(tokens=(700,)), loss.Mix(loss.ForwardKL(), 0.5)
    masked = not transposed

    def of(function, mask, hidden, kernel, bias):
        if transposed:
            head = {"transposed": function is fused}
        else:
            head = {"bias": bias, "softcap": 20.0}
        return function(a, objective, hidden, kernel, mask=mask, head=head)

    @jax.jit
    def run(mask):
        return [
            jax.value_and_grad(
                functools.partial(of, function, mask), (0, 1, 2), has_aux=True
            )(a["student"], a["kernel"], a["bias"])
            for function in (fused, plain)
        ]

    order = np.random.default_rng(2).permutation(700)
    # No token, some of the first chunk, all of it, some of later ones, all.
    for counted in (0, 5, 117, 250, 700) if masked else (700,):
        found, expected = run(jnp.asarray(order < counted) if masked else None)
        agree((*found[0], found[1]), (*expected[0], expected[1]))


def test_fused_loss_masks(arrays, fused, plain, both, agree):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    weights = np.random.default_rng(1).random(TOKENS)
    for mask in (weights, np.ones(TOKENS), np.zeros(TOKENS), None):
        mask = None if mask is None else jnp.asarray(mask, jnp.float32)
        found = both(fused, a, objective, mask=mask, chunk_size=5)
        agree(found, both(plain, a, objective, mask=mask))
        if mask is not None and not mask.any():
            assert found[0] == 0
            assert not any(np.any(g) for g in found[2])


def test_fused_loss_masked_tokens_may_hold_anything(arrays, fused, both, agree):
    a, objective = arrays(), OBJECTIVES["mix"]()
    # A chunk with tokens of both kinds, wherever the others are.
    a["mask"] = jnp.asarray(np.arange(48).reshape(TOKENS) % 3 == 1)
    expected = both(fused, a, objective, chunk_size=5)
    out = ~a["mask"][..., None]
    # Of a label that is none the slope is NaN, and 0 times that too.
    a["labels"] = jnp.where(a["mask"], a["labels"], 10**6)
    for bad in (np.nan, np.inf):
        a["student"] = jnp.where(out, bad, a["student"])
        a["teacher"] = jnp.where(out, bad, a["teacher"])
        agree(both(fused, a, objective, chunk_size=5), expected)


def test_fused_loss_of_no_tokens_is_zero(arrays, fused, both):
    a, objective = arrays(tokens=(0,)), loss.TAID(jnp.float32(0.4))
    value, sums, grads = both(fused, a, objective)
    assert value == 0
    assert sums["num_tokens"] == 0
    assert not np.any(grads[1])


def test_fused_loss_head_with_bias_softcap_and_padding(
    arrays, fused, plain, both, agree
):
    a, objective = arrays(), loss.TAID(jnp.float32(0.3))
    a["labels"] = a["labels"] % 30
    head = {"bias": True, "softcap": 3.0, "vocab_size": 30}
    found = both(fused, a, objective, head=head, chunk_size=9)
    agree(found, both(plain, a, objective, head=head))


@pytest.mark.parametrize(
    ("sizes", "real"),
    [
        ({"vocab": 45, "teacher_vocab": 37}, {}),
        ({}, {"head": {"vocab_size": 37}, "teacher_head": {"vocab_size": 30}}),
        ({}, {"head": {"vocab_size": 30}, "teacher_head": {"vocab_size": 37}}),
    ],
)
def test_fused_loss_of_unequal_vocabularies_counts_the_shared_entries(
    arrays, fused, plain, both, agree, sizes, real
):
    a, objective = arrays(**sizes), loss.TAID(jnp.float32(0.4))
    a["labels"], shared = a["labels"] % 30, 30 if real else 37
    found = both(fused, a, objective, chunk_size=9, **real)
    agree(found, both(plain, a, objective, entries=shared))
    # The student's other entries take no part, and neither do the teacher's.
    assert not np.any(found[2][1][:, shared:])


@pytest.mark.parametrize("name", ["taid", "dkd", "sft", "mix"])
def test_fused_loss_does_not_hide_nan_in_a_counted_token(arrays, fused, both, name):
    a, objective = arrays(), OBJECTIVES[name]()
    assert np.isfinite(both(fused, a, objective, chunk_size=5)[0])
    token = np.argwhere(a["mask"])[7]
    for where in ("student", "teacher", "kernel", "teacher_kernel"):
        index = (*token, 3) if a[where].ndim == 3 else (3, 11)
        broken = {**a, where: a[where].at[index].set(jnp.nan)}
        value, sums, gradients = both(fused, broken, objective, chunk_size=5)
        seen = not where.startswith("teacher") or name != "sft"
        assert np.isnan(value) == seen, where
        assert all(np.isnan(g).any() == seen for g in gradients), where
        assert "kl_teacher" not in sums or np.isnan(sums["kl_teacher"]), where
        assert sums["num_tokens"] == int(a["mask"].sum())


@pytest.mark.parametrize("name", ["taid", "mix"])
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


def test_fused_loss_label_that_is_no_real_entry_is_nan(arrays, fused, both):
    a = arrays()
    token = tuple(np.argwhere(a["mask"])[0])
    labels = a["labels"] % 30
    for label in (-1, 30, 36, 37, 10**6, -100):
        a["labels"] = labels.at[token].set(label)
        value = both(fused, a, loss.DKD(), head={"vocab_size": 30})[0]
        assert np.isnan(value) == (label != -100), label


def test_fused_loss_tied_embedding_adds_to_the_embedding_s_gradient(
    arrays, fused, plain
):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of(function, transposed, table):
        hidden = jnp.take(table, a["labels"], axis=0)
        head = {"transposed": transposed}
        return function(a, objective, hidden, table.T, head=head)[0]

    found, expected = (
        jax.jit(jax.grad(functools.partial(of, *which)))(a["kernel"].T)
        for which in ((fused, True), (plain, False))
    )
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

    def bfloat16_logits(a, objective, hidden, kernel, mask):
        """The plain form of a model that gives its logits in its own dtype."""
        return loss.distillation_sums(
            objective, hidden @ kernel, a["teacher"] @ a["teacher_kernel"], mask
        )

    found, others = errors(fused, chunk_size=16), errors(bfloat16_logits)
    for ours, theirs in zip(found, others, strict=True):
        assert ours <= theirs
        # The gradient in the logits and the result, each rounded to 8 bits once.
        assert ours <= 2**-8


def test_fused_loss_derivatives_beside_those_of_the_student(arrays, fused, plain):
    """Scaled by the cotangent; reversed in CTKD's temperature; none of the rest."""
    a = arrays()

    @jax.jit
    def run(a, temperature, cotangent):
        def of(function, moving):
            b = a | {k: moving[k] for k in ("teacher", "teacher_kernel")}
            objective = loss.CTKD(moving["temperature"])
            return function(b, objective, moving["student"], a["kernel"])

        moving = {k: a[k] for k in ("student", "teacher", "teacher_kernel")}
        moving["temperature"] = temperature
        grads = []
        for function in (fused, plain):
            (total, sums), pull = jax.vjp(functools.partial(of, function), moving)
            none = jax.tree.map(jnp.zeros_like, sums)
            (one,), (scaled,) = (pull((x, none)) for x in (jnp.float32(1), cotangent))
            (of_metrics,) = pull((jnp.zeros_like(total), sums))
            grads.append((one, scaled, of_metrics))
        return grads

    (one, scaled, of_metrics), (expected, *_) = run(
        a, jnp.float32(0.7), jnp.float32(-3)
    )
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_metrics))
    assert not np.any(one["teacher"])
    assert not np.any(one["teacher_kernel"])
    assert expected["temperature"] != 0
    np.testing.assert_allclose(one["temperature"], expected["temperature"], rtol=1e-5)
    for key, leaf in one.items():
        np.testing.assert_allclose(-3 * leaf, scaled[key], rtol=1e-6, atol=1e-7)


def test_fused_loss_does_not_compile_again(arrays, fused):
    a = arrays()

    @jax.jit
    def of(objective, mask):
        return fused(a, objective, a["student"], a["kernel"], mask=mask)[0]

    for of_number in (loss.TAID, loss.CTKD):
        before = of._cache_size()
        of(of_number(jnp.float32(0.1)), a["mask"])
        of(of_number(jnp.float32(0.9)), ~a["mask"])
        assert of._cache_size() == before + 1


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


def test_fused_loss_misuse_of_vocabularies_labels_and_chunks_is_an_error(arrays, fused):
    a = arrays()
    kernel = rf"kernel \({STUDENT}, {VOCAB}\)"
    for head in ({"vocab_size": VOCAB + 1}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match=f"1 <= vocab_size <= {VOCAB}.*{kernel}"):
            fused(a, loss.ForwardKL(), a["student"], a["kernel"], head=head)
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        fused(a, loss.ForwardKL(), a["student"], a["kernel"], chunk_size=0)
    a["labels"] = None
    with pytest.raises(ValueError, match=r"DKD needs labels of shape \(4, 12\)"):
        fused(a, loss.DKD(), a["student"], a["kernel"])


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
