"""The fused head against the plain form, which builds the logits."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax import loss
from taid_jax.sharding import make_mesh
from taid_jax.types import Head

TOKENS, STUDENT, TEACHER, VOCAB = (4, 12), 16, 24, 37

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
    "ctkd": lambda: loss.CTKD(jnp.float32(1.0)),
    "dkd": loss.DKD,
    "sft": loss.CrossEntropy,
    "mix": lambda: loss.Mix(loss.TAID(jnp.float32(0.3)), 0.5),
}


@pytest.fixture
def arrays():
    """`arrays(seed, ...)`: hidden states, kernels, a mask and labels."""

    def make(seed=0, tokens=TOKENS, vocab=VOCAB, teacher_vocab=None, dtype="float32"):
        rng = np.random.default_rng(seed)

        def normal(*shape, scale=1.0):
            return jnp.asarray(rng.normal(size=shape) * scale, dtype)

        return {
            "student": normal(*tokens, STUDENT),
            "kernel": normal(STUDENT, vocab, scale=0.5),
            "teacher": normal(*tokens, TEACHER),
            "teacher_kernel": normal(TEACHER, teacher_vocab or vocab, scale=0.5),
            "mask": jnp.asarray(rng.random(tokens) < 0.6),
            "labels": jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32),
        }

    return make


def _fused(a, objective, hidden, kernel, *, mask="mask", **options):
    head_options = options.pop("head", {})
    return loss.fused_loss(
        objective,
        hidden,
        Head(kernel, **head_options),
        a["teacher"],
        Head(a["teacher_kernel"], **options.pop("teacher_head", head_options)),
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
        **options,
    )


def _plain(a, objective, hidden, kernel, *, mask="mask", head=None, entries=None):
    student = Head(kernel, **(head or {})).logits(hidden)
    teacher = Head(a["teacher_kernel"], **(head or {})).logits(a["teacher"])
    return loss.distillation_sums(
        objective,
        student[..., :entries],
        teacher[..., :entries],
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
    )


def _both(function, a, objective, **options):
    """Value, sums and gradients in hidden states and kernel."""
    of = functools.partial(function, a, objective, **options)
    (value, sums), grads = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)(
        a["student"], a["kernel"]
    )
    return value, sums, grads


def _agree(found, expected, *, value_rtol=1e-6, gradient=1e-5):
    # The promise: 1e-6 of the value and 1e-5 of the gradient's norm in float32.
    np.testing.assert_allclose(found[0], expected[0], rtol=value_rtol, atol=1e-7)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        np.testing.assert_allclose(
            found[1][name], expected[1][name], rtol=1e-5, atol=1e-6, err_msg=name
        )
    for a, b in zip(found[2], expected[2], strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= gradient * np.linalg.norm(b)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fused_loss_of_every_objective_is_the_plain_form(arrays, name):
    a, objective = arrays(), OBJECTIVES[name]()
    _agree(_both(_fused, a, objective, chunk_size=5), _both(_plain, a, objective))


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 48, 1000, None])
def test_fused_loss_does_not_depend_on_the_chunk(arrays, chunk_size):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    found = _both(_fused, a, objective, chunk_size=chunk_size)
    _agree(found, _both(_plain, a, objective))


@pytest.mark.parametrize("mask", ["none", "weights", "all", "empty"])
def test_fused_loss_masks(arrays, mask):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    weights = {
        "none": None,
        "weights": jnp.asarray(np.random.default_rng(1).random(TOKENS), jnp.float32),
        "all": jnp.ones(TOKENS, jnp.int32),
        "empty": jnp.zeros(TOKENS, bool),
    }[mask]
    found = _both(_fused, a, objective, mask=weights, chunk_size=8)
    _agree(found, _both(_plain, a, objective, mask=weights))
    if mask == "empty":
        assert found[0] == 0
        assert not any(np.any(np.asarray(g)) for g in found[2])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_fused_loss_masked_tokens_may_hold_anything(arrays, bad):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    expected = _both(_fused, a, objective, chunk_size=8)
    out = ~a["mask"][..., None]
    a["student"] = jnp.where(out, bad, a["student"])
    a["teacher"] = jnp.where(out, bad, a["teacher"])
    found = _both(_fused, a, objective, chunk_size=8)
    _agree(found, expected)


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
@pytest.mark.parametrize("name", ["taid", "js", "sft"])
def test_fused_loss_heads(arrays, name, options):
    a, objective = arrays(), OBJECTIVES[name]()
    a["labels"] = a["labels"] % 30
    found = _both(_fused, a, objective, head=options, chunk_size=9)
    _agree(found, _both(_plain, a, objective, head=options))


def test_fused_loss_bias_has_a_gradient(arrays):
    a, objective = arrays(), loss.ForwardKL()
    bias = jnp.linspace(-1, 1, VOCAB)

    def of(function, bias):
        return function(a, objective, a["student"], a["kernel"], head={"bias": bias})[0]

    found = jax.grad(functools.partial(of, _fused))(bias)
    expected = jax.grad(functools.partial(of, _plain))(bias)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(("student", "teacher"), [(37, 45), (45, 37)])
def test_fused_loss_of_unequal_vocabularies_counts_the_shared_entries(
    arrays, student, teacher
):
    a = arrays(vocab=student, teacher_vocab=teacher)
    a["labels"] = a["labels"] % 37
    objective = loss.TAID(jnp.float32(0.4))
    found = _both(_fused, a, objective, chunk_size=9)
    _agree(found, _both(_plain, a, objective, entries=37))


def test_fused_loss_tied_embedding_adds_to_the_embedding_s_gradient(arrays):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))
    table = a["kernel"].T
    ids = a["labels"]

    def of(function, turned, table):
        hidden = jnp.take(table, ids, axis=0)
        kernel = table.T if turned else table
        return function(a, objective, hidden, kernel)[0]

    expected = jax.grad(functools.partial(of, _plain, True))(table)
    for turned in (True, False):
        found = jax.grad(functools.partial(of, _fused, turned))(table)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_fused_loss_in_bfloat16_is_no_further_from_float64_than_the_plain_form(arrays):
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
        grads = _both(function, a, objective, **options)[2]
        return [
            np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e)
            for g, e in zip(grads, truth, strict=True)
        ]

    def bfloat16_logits(a, objective, hidden, kernel):
        """The plain form of a model that gives its logits in its own dtype."""
        return loss.distillation_sums(
            objective, hidden @ kernel, a["teacher"] @ a["teacher_kernel"], a["mask"]
        )

    fused, plain = errors(_fused, chunk_size=16), errors(bfloat16_logits)
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours <= theirs
        # The gradient in the logits and the result, each rounded to 8 bits once.
        assert ours <= 2**-8


def test_fused_loss_cotangent_scales_the_gradient(arrays):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of(scale, hidden, kernel):
        return scale * _fused(a, objective, hidden, kernel)[0]

    one = jax.grad(of, argnums=(1, 2))(1.0, a["student"], a["kernel"])
    three = jax.grad(of, argnums=(1, 2))(-3.0, a["student"], a["kernel"])
    for x, y in zip(one, three, strict=True):
        np.testing.assert_allclose(-3 * np.asarray(x), y, rtol=1e-6, atol=1e-7)


def test_fused_loss_gives_ctkd_s_temperature_its_reversed_gradient(arrays):
    a = arrays()

    def of(function, g):
        return function(a, loss.CTKD(g), a["student"], a["kernel"])[0]

    found = jax.grad(functools.partial(of, _fused))(jnp.float32(0.7))
    expected = jax.grad(functools.partial(of, _plain))(jnp.float32(0.7))
    assert expected != 0
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_fused_loss_sums_and_teacher_have_no_gradient(arrays):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of_metric(hidden):
        return _fused(a, objective, hidden, a["kernel"])[1]["kl"]

    assert not np.any(jax.grad(of_metric)(a["student"]))

    def of_teacher(teacher, kernel):
        b = {**a, "teacher": teacher, "teacher_kernel": kernel}
        return _fused(b, objective, a["student"], a["kernel"])[0]

    for g in jax.grad(of_teacher, argnums=(0, 1))(a["teacher"], a["teacher_kernel"]):
        assert not np.any(g)


def _dots(function, *arguments):
    """Matrix products in a compiled program; one chunk, so that loops run once."""
    text = jax.jit(function).lower(*arguments).as_text()
    return len(re.findall(r"stablehlo\.dot_general", text))


def test_fused_loss_products_are_those_that_are_needed(arrays):
    a, objective = arrays(tokens=(8,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return _fused(a, objective, hidden, kernel, mask=None, chunk_size=8)[0]

    arguments = a["student"], a["kernel"]
    assert _dots(value, *arguments) == 2
    assert _dots(jax.grad(value, argnums=(0, 1)), *arguments) == 4
    assert _dots(jax.grad(value, argnums=0), *arguments) == 3
    again = jax.grad(jax.checkpoint(value), argnums=(0, 1))
    keep = jax.checkpoint_policies.save_only_these_names("fused_loss")
    kept = jax.grad(jax.checkpoint(value, policy=keep), argnums=(0, 1))
    assert _dots(kept, *arguments) <= _dots(again, *arguments)


def test_fused_loss_does_not_compile_again(arrays):
    a = arrays()

    @jax.jit
    def of(t, mask):
        b = {**a, "mask": mask}
        return _fused(b, loss.TAID(t), a["student"], a["kernel"])[0]

    of(jnp.float32(0.1), a["mask"])
    of(jnp.float32(0.9), ~a["mask"])
    assert of._cache_size() == 1


def test_fused_loss_vmaps(arrays):
    a, objective = arrays(), loss.TAID(jnp.float32(0.4))

    def of(hidden):
        return _fused(a, objective, hidden, a["kernel"], chunk_size=16)[0]

    several = jnp.stack([a["student"], 2 * a["student"]])
    found = jax.vmap(jax.grad(of))(several)
    for x, y in zip(found, several, strict=True):
        expected = jax.grad(of)(y)
        assert np.linalg.norm(x - expected) < 1e-5 * np.linalg.norm(expected)


def test_fused_loss_of_no_tokens_is_zero(arrays):
    a, objective = arrays(tokens=(0,)), loss.TAID(jnp.float32(0.4))
    value, sums, grads = _both(_fused, a, objective)
    assert value == 0
    assert sums["weight"] == 0
    assert not np.any(grads[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": (STUDENT + 1, VOCAB)}, "student kernel"),
        ({"teacher_kernel": (TEACHER + 1, VOCAB)}, "teacher kernel"),
        ({"teacher": (4, 11, TEACHER)}, "teacher_hidden"),
        ({"labels": (4, 11)}, "labels of shape"),
        ({"mask": (4, 11)}, "mask of shape"),
    ],
)
def test_fused_loss_misuse_names_the_shapes(arrays, change, message):
    a = arrays()
    for name, shape in change.items():
        a[name] = jnp.zeros(shape, a[name].dtype)
    with pytest.raises(ValueError, match=message) as caught:
        _fused(a, loss.ForwardKL(), a["student"], a["kernel"])
    assert str(next(iter(change.values()))) in str(caught.value)


def test_fused_loss_without_the_labels_that_it_needs_is_an_error(arrays):
    a = arrays()
    a["labels"] = None
    with pytest.raises(ValueError, match="DKD needs labels"):
        _fused(a, loss.DKD(), a["student"], a["kernel"])
    with pytest.raises(ValueError, match="chunk_size >= 1"):
        _fused(a, loss.ForwardKL(), a["student"], a["kernel"], chunk_size=0)


MESHES = ["data=8", "fsdp=8", "data=2,fsdp=2,tensor=2", "data=2,tensor=4"]


@pytest.mark.multidevice
@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("name", ["taid", "dkd", "adaptive_kl"])
def test_fused_loss_eight_devices_equal_one(arrays, text, name):
    a = arrays(tokens=(8, 6), vocab=40)
    objective, mesh = OBJECTIVES[name](), make_mesh(text)
    expected = _both(_plain, a, objective)

    @jax.jit
    def on_mesh(a):
        return _both(_fused, a, objective, mesh=mesh, chunk_size=3)

    _agree(on_mesh(a), expected)


def _collectives(text):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return re.findall(rf"= (\S+) ({kinds})(?:-start)?\(", text)


@pytest.mark.multidevice
def test_fused_loss_collectives_do_not_grow_with_the_chunks(arrays):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    a = arrays(tokens=(64,), vocab=40)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    where = {
        "student": P(("data", "fsdp")),
        "kernel": P("fsdp", "tensor"),
        "teacher": P(("data", "fsdp")),
        "teacher_kernel": P("fsdp", "tensor"),
        "mask": P(("data", "fsdp")),
        "labels": P(("data", "fsdp")),
    }
    a = {k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in a.items()}

    def compiled(chunk_size):
        def of(a):
            objective = loss.TAID(jnp.float32(0.4))
            return _both(_fused, a, objective, mesh=mesh, chunk_size=chunk_size)

        return jax.jit(of).lower(a).compile().as_text()

    few, many = _collectives(compiled(8)), _collectives(compiled(1))
    assert few
    assert len(few) == len(many)
