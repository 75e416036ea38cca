"""The fused head against the plain form, which builds the logits."""

import functools

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


def _head(kernel, options):
    return Head(kernel.T if options.get("transposed") else kernel, **options)


def _fused(a, objective, hidden, kernel, *, mask="mask", **options):
    head_options = options.pop("head", {})
    return loss.fused_loss(
        objective,
        hidden,
        _head(kernel, head_options),
        a["teacher"],
        _head(a["teacher_kernel"], options.pop("teacher_head", head_options)),
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
        **options,
    )


def _plain(a, objective, hidden, kernel, *, mask="mask", head=None, entries=None):
    student = _head(kernel, head or {}).logits(hidden)
    teacher = _head(a["teacher_kernel"], head or {}).logits(a["teacher"])
    return loss.distillation_sums(
        objective,
        student[..., :entries],
        teacher[..., :entries],
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
    )


def _both(function, a, objective, **options):
    """Value, sums and gradients in hidden states and kernel."""

    @jax.jit
    def of(a, objective):
        one = functools.partial(function, a, objective, **options)
        (value, sums), grads = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)(
            a["student"], a["kernel"]
        )
        return value, sums, grads

    return of(a, objective)


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

    def of(function, transposed, table):
        hidden = jnp.take(table, ids, axis=0)
        head = {"transposed": transposed}
        return function(a, objective, hidden, table.T, head=head)[0]

    expected = jax.grad(functools.partial(of, _plain, False))(table)
    for function, transposed in ((_fused, False), (_fused, True), (_plain, True)):
        found = jax.grad(functools.partial(of, function, transposed))(table)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_fused_loss_of_a_square_head_takes_the_side_that_it_says(arrays):
    a, objective = arrays(vocab=STUDENT), loss.TAID(jnp.float32(0.4))
    expected = _both(_plain, a, objective)
    for transposed in (False, True):
        head = {"transposed": transposed}
        _agree(_both(_fused, a, objective, head=head), expected)


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


@pytest.fixture
def products(read_program):
    """Operations of a compiled function's products, for every token and entry."""

    def count(function, *arguments, tokens):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return read_program(text).flops / (2 * tokens * VOCAB)

    return count


def test_fused_loss_products_are_those_that_are_needed(arrays, products):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return _fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    count = functools.partial(products, tokens=16)
    arguments = a["student"], a["kernel"]
    forward, all_four = STUDENT + TEACHER, 3 * STUDENT + TEACHER
    assert count(value, *arguments) == forward
    assert count(jax.value_and_grad(value, argnums=(0, 1)), *arguments) == all_four
    # A frozen head, and nothing but the head.
    for argnums in (0, 1):
        grad = jax.value_and_grad(value, argnums=argnums)
        assert count(grad, *arguments) == forward + STUDENT

    def cross_entropy(hidden, kernel):
        return _fused(a, loss.CrossEntropy(), hidden, kernel, chunk_size=4)[0]

    grad = jax.grad(cross_entropy, argnums=(0, 1))
    assert count(grad, *arguments) == 3 * STUDENT


def test_fused_loss_under_checkpoint_and_vmap_repeats_no_product(arrays, products):
    a, objective = arrays(tokens=(16,)), loss.TAID(jnp.float32(0.4))

    def value(hidden, kernel):
        return _fused(a, objective, hidden, kernel, mask=None, chunk_size=4)[0]

    arguments, once = (a["student"], a["kernel"]), 3 * STUDENT + TEACHER
    grad = jax.grad(jax.checkpoint(value), argnums=(0, 1))
    assert products(grad, *arguments, tokens=16) == once
    keep = jax.checkpoint_policies.save_only_these_names("fused_loss")
    kept = jax.checkpoint(value, policy=keep)
    grad = jax.value_and_grad(kept, argnums=(0, 1))
    assert products(grad, *arguments, tokens=16) == once

    def several(hidden, kernel):
        return jnp.sum(jax.vmap(value, in_axes=(0, None))(hidden, kernel))

    grad = jax.value_and_grad(several, argnums=(0, 1))
    arguments = jnp.stack([a["student"]] * 3), a["kernel"]
    # The teacher's hidden states are the same for all three.
    assert products(grad, *arguments, tokens=16) == 9 * STUDENT + TEACHER


@pytest.fixture
def nested(monkeypatch):
    """Sizes as for a large vocabulary: rows in blocks in chunks, strips of the head."""
    from taid_jax.loss.fused import plan, strips

    sizes = [VOCAB * rows for rows in (4, 128, 512)]
    monkeypatch.setitem(plan._ENTRIES, "cpu", sizes)
    monkeypatch.setattr(strips, "STRIP", 8)
    found = plan.make_plan(700, VOCAB, "cpu", None)
    assert 1 < found.rows < found.block < found.chunk < 700
    # Two digits, and a rest of the vocabulary.
    assert found.chunk // found.block == 3
    assert VOCAB % (VOCAB // 5) > 1


def test_fused_loss_with_a_mask_for_every_example_repeats_no_product(
    arrays, nested, products
):
    a, objective = arrays(tokens=(2, 512)), loss.TAID(jnp.float32(0.4))

    def of(hidden, teacher, mask, labels, kernel):
        b = {**a, "teacher": teacher, "labels": labels}
        return _fused(b, objective, hidden, kernel, mask=mask)[0]

    names = "student", "teacher", "mask", "labels", "kernel"
    arguments = [a[name] for name in names]
    every = jax.vmap(jax.value_and_grad(of, (0, 4)), in_axes=(0, 0, 0, 0, None))
    assert products(every, *arguments, tokens=1024) == 3 * STUDENT + TEACHER
    values, (in_hidden, in_kernel) = jax.jit(every)(*arguments)
    for i in range(2):
        one = [x[i] for x in arguments[:-1]]
        value, grads = jax.value_and_grad(of, (0, 4))(*one, a["kernel"])
        np.testing.assert_allclose(values[i], value, rtol=1e-6)
        for x, y in zip((in_hidden[i], in_kernel[i]), grads, strict=True):
            assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)


@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_fused_loss_in_blocks_and_strips_is_the_plain_form(
    arrays, nested, masked, transposed
):
    a, objective = arrays(tokens=(700,)), loss.Mix(loss.ForwardKL(), 0.5)
    bias = jnp.linspace(-1, 1, VOCAB)

    def of(function, mask, hidden, kernel, bias):
        if transposed:
            head = {"transposed": function is _fused}
        else:
            head = {"bias": bias, "softcap": 20.0}
        return function(a, objective, hidden, kernel, mask=mask, head=head)

    @jax.jit
    def both(mask):
        return [
            jax.value_and_grad(
                functools.partial(of, function, mask), (0, 1, 2), has_aux=True
            )(a["student"], a["kernel"], bias)
            for function in (_fused, _plain)
        ]

    order = np.random.default_rng(2).permutation(700)
    # No token, some blocks of the first chunk, all of it, some of the second, all.
    for counted in (0, 5, 120, 250, 350, 500, 700) if masked else (700,):
        found, expected = both(jnp.asarray(order < counted) if masked else None)
        _agree((*found[0], found[1]), (*expected[0], expected[1]))


def test_fused_loss_in_blocks_and_strips_forms_no_product_twice(
    arrays, nested, products
):
    a, objective = arrays(tokens=(1024,)), loss.TAID(jnp.float32(0.4))

    def of(mask, a):
        return _both(_fused, a, objective, mask=mask)

    count = functools.partial(products, tokens=1024)
    assert count(functools.partial(of, None), a) == 3 * STUDENT + TEACHER
    # In a conditional the dearest branch counts: that of a chunk without masked tokens.
    assert count(of, a["mask"], a) == 3 * STUDENT + TEACHER


@pytest.mark.parametrize(
    ("size", "allowed"),
    [((1024, 576, 576, 49152), 252), ((2048, 512, 1024, 32000), 250)],
)
def test_fused_loss_memory(size, allowed):
    """By XLA's own analysis; a mebibyte of it for indices and sums."""
    tokens, student, teacher, vocab = size

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    def mean(hidden, kernel, teacher_hidden, teacher_kernel, mask):
        heads = Head(kernel), Head(teacher_kernel)
        total, sums = loss.fused_loss(
            loss.TAID(jnp.float32(0.4)),
            hidden, heads[0], teacher_hidden, heads[1], mask,
        )  # fmt: skip
        return total / sums["weight"]

    compiled = (
        jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        .lower(
            shape(tokens, student),
            shape(student, vocab),
            shape(tokens, teacher),
            shape(teacher, vocab),
            shape(tokens),
        )
        .compile()
    )
    # An eighth of the plain form's, 1152 and 1500 MiB, and one gradient of the head.
    assert compiled.memory_analysis().temp_size_in_bytes < allowed * 2**20


def test_fused_loss_does_not_compile_again(arrays):
    a = arrays()

    @jax.jit
    def of(objective, mask):
        b = {**a, "mask": mask}
        return _fused(b, objective, a["student"], a["kernel"])[0]

    for of_number in (loss.TAID, loss.CTKD, loss.ForwardKL):
        before = of._cache_size()
        of(of_number(jnp.float32(0.1)), a["mask"])
        of(of_number(jnp.float32(0.9)), ~a["mask"])
        assert of._cache_size() == before + 1


def test_fused_loss_in_float16(arrays):
    a, objective = arrays(tokens=(32,)), loss.TAID(jnp.float32(0.4))
    half = {k: v.astype("float16") if v.dtype == "float32" else v for k, v in a.items()}
    value, _, grads = _both(_fused, half, objective, chunk_size=8)
    rounded = {k: v.astype(a[k].dtype) for k, v in half.items()}
    expected = _both(_plain, rounded, objective)
    assert [g.dtype for g in grads] == [jnp.float16, jnp.float16]
    # Of the same inputs: products are float32 sums, as the plain form's are.
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for x, y in zip(grads, expected[2], strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # The gradient in the logits and the result, each rounded to 11 bits once.
        assert np.linalg.norm(x - y) < 2**-11 * np.linalg.norm(y)


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
        ({"kernel": (VOCAB, STUDENT)}, "student kernel .* `transposed`"),
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


def test_fused_loss_misuse_of_vocabularies_names_the_shapes(arrays):
    a = arrays()
    kernel = rf"kernel \({STUDENT}, {VOCAB}\)"
    for head in ({"vocab_size": VOCAB + 1}, {"vocab_size": 0}):
        with pytest.raises(ValueError, match=f"1 <= vocab_size <= {VOCAB}.*{kernel}"):
            _fused(a, loss.ForwardKL(), a["student"], a["kernel"], head=head)


def test_fused_loss_without_the_labels_that_it_needs_is_an_error(arrays):
    a = arrays()
    a["labels"] = None
    with pytest.raises(ValueError, match=r"DKD needs labels of shape \(4, 12\)"):
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
        head = {"transposed": name == "taid"}
        return _both(_fused, a, objective, mesh=mesh, chunk_size=3, head=head)

    _agree(on_mesh(a), expected)


@pytest.mark.multidevice
@pytest.mark.parametrize("transposed", [False, True], ids=["kernel", "table"])
def test_fused_loss_exchanges_little_in_the_loop_whatever_its_chunks(
    arrays, read_program, transposed
):
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    a = arrays(tokens=(256,), vocab=40)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    tokens, kernel = P(("data", "fsdp")), P("fsdp", "tensor")
    if transposed:
        kernel = P("tensor", "fsdp")
        a = {k: v.T if "kernel" in k else v for k, v in a.items()}
    where = {name: kernel if "kernel" in name else tokens for name in a}
    a = {k: jax.device_put(v, NamedSharding(mesh, where[k])) for k, v in a.items()}

    def total(a, objective, mask, chunk_size, hidden, kernel):
        heads = (Head(k, transposed=transposed) for k in (kernel, a["teacher_kernel"]))
        student_head, teacher_head = heads
        return loss.fused_loss(
            objective,
            hidden,
            student_head,
            a["teacher"],
            teacher_head,
            mask and a[mask],
            mesh=mesh,
            chunk_size=chunk_size,
        )[0]

    def compiled(chunk_size, mask):
        def of(a):
            objective = loss.TAID(jnp.float32(0.4))
            one = functools.partial(total, a, objective, mask, chunk_size)
            return jax.value_and_grad(one, (0, 1))(a["student"], a["kernel"])

        return read_program(jax.jit(of).lower(a).compile().as_text())

    for mask in ("mask", None):
        # 64 tokens on a device.
        few, many = compiled(32, mask), compiled(4, mask)
        assert few.looped
        assert max(few.looped) <= 32
        assert max(many.looped) <= 4
        assert len(few.collectives) == len(many.collectives)
        for program in (few, many):
            assert program.flops * 8 == 2 * 256 * 40 * (3 * STUDENT + TEACHER)


@pytest.mark.multidevice
@pytest.mark.parametrize("text", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_fused_loss_in_blocks_on_eight_devices_equals_one(
    arrays, nested, read_program, text
):
    a, objective = arrays(tokens=(8, 350), vocab=40), loss.TAID(jnp.float32(0.4))
    mesh = make_mesh(text)

    @jax.jit
    def on_mesh(a):
        return _both(_fused, a, objective, mesh=mesh)

    _agree(on_mesh(a), _both(_plain, a, objective))
    program = read_program(on_mesh.lower(a).compile().as_text())
    # Rows are 4 or 8 tokens of a device.
    assert max(program.looped, default=0) <= 8
