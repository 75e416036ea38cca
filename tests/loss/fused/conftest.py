"""The fused head and the plain form side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taid_jax import loss
from taid_jax.types import Head

TOKENS, STUDENT, TEACHER, VOCAB = (4, 12), 16, 24, 37


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
            "bias": jnp.linspace(-1, 1, vocab, dtype=dtype),
            "mask": jnp.asarray(rng.random(tokens) < 0.6),
            "labels": jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32),
        }

    return make


def _head(a, kernel, options):
    options = dict(options or ())
    if options.get("bias") is True:
        options["bias"] = a["bias"]
    return Head(kernel.T if options.get("transposed") else kernel, **options)


def _fused(
    a,
    objective,
    hidden,
    kernel,
    *,
    mask="mask",
    head=None,
    teacher_head=None,
    **options,
):
    return loss.fused_loss(
        objective,
        hidden,
        _head(a, kernel, head),
        a["teacher"],
        _head(a, a["teacher_kernel"], teacher_head or head),
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
        **options,
    )


def _plain(a, objective, hidden, kernel, *, mask="mask", head=None, entries=None):
    options = dict(head or ())

    def logits(hidden, kernel):
        logits = hidden @ kernel
        if "bias" in options:
            bias = a["bias"] if options["bias"] is True else options["bias"]
            logits += bias.reshape((1,) * (logits.ndim - 1) + (-1,))
        if "softcap" in options:
            logits = options["softcap"] * jnp.tanh(logits / options["softcap"])
        return logits[..., : options.get("vocab_size", entries)]

    return loss.distillation_sums(
        objective,
        logits(hidden, kernel),
        logits(a["teacher"], a["teacher_kernel"]),
        a[mask] if isinstance(mask, str) else mask,
        a["labels"],
    )


# One program for each objective and shape, whatever test asks for it.
@functools.partial(
    jax.jit,
    static_argnames=(
        "function",
        "head",
        "teacher_head",
        "entries",
        "chunk_size",
        "mesh",
    ),
)
def _compiled(a, objective, mask, *, function, **options):
    one = functools.partial(function, a, objective, mask=mask, **options)
    (value, sums), grads = jax.value_and_grad(one, argnums=(0, 1), has_aux=True)(
        a["student"], a["kernel"]
    )
    return value, sums, grads


def _both(function, a, objective, *, mask="mask", **options):
    """Value, sums and gradients in hidden states and kernel."""
    mask = a[mask] if isinstance(mask, str) else mask
    for name in ("head", "teacher_head"):
        if name in options:
            options[name] = tuple(sorted(options[name].items()))
    return _compiled(a, objective, mask, function=function, **options)


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


@pytest.fixture(scope="session")
def fused():
    """`fused(arrays, objective, hidden, kernel, ...)`: its loss and sums."""
    return _fused


@pytest.fixture(scope="session")
def plain():
    """The same by the plain form."""
    return _plain


@pytest.fixture(scope="session")
def both():
    """`both(fused, arrays, objective, ...)`: value, sums and gradients."""
    return _both


@pytest.fixture(scope="session")
def agree():
    """`agree(found, expected)`: both to the promised digits."""
    return _agree


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 tokens and groups of 16, as a large vocabulary has them."""
    from taid_jax.loss import _fused_scan

    monkeypatch.setitem(_fused_scan._ENTRIES, "cpu", 128 * VOCAB)
    monkeypatch.setattr(_fused_scan, "_CPU_ROWS", 16 * VOCAB)


@pytest.fixture
def compile_step():
    """`compile_step(machine, ...)`: mean loss and both gradients, in bfloat16."""
    d_student, d_teacher, vocab = 2048, 4096, 128256
    from taid_jax.plan import find_machine
    from taid_jax.plan.compiled import compiled_anew, plan_mesh

    def compile_step(
        name,
        *,
        tokens=8192,
        mesh=None,
        masked=True,
        chunk_size=None,
        transposed=False,
    ):
        machine = find_machine(name)
        if mesh is None:
            mesh = Mesh([[[machine.devices[0]]]], ("data", "fsdp", "tensor"))
        else:
            mesh = plan_mesh(mesh, machine)

        def shape(layout, *sizes, dtype=jnp.bfloat16):
            where = NamedSharding(mesh, layout)
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

        def mean(hidden, kernel, teacher_hidden, teacher_kernel, mask):
            total, sums = loss.fused_loss(
                loss.TAID(jnp.float32(0.4)),
                hidden,
                Head(kernel, transposed=transposed),
                teacher_hidden,
                Head(teacher_kernel, transposed=transposed),
                mask if masked else None,
                chunk_size=chunk_size,
                mesh=mesh,
            )
            return total / sums["num_tokens"]

        def kernel(*sizes):
            axes = ("fsdp", "tensor")
            if transposed:
                sizes, axes = sizes[::-1], axes[::-1]
            return shape(P(*axes), *sizes)

        rows = P(("data", "fsdp"))
        step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        lowered = step.lower(
            shape(rows, tokens, d_student),
            kernel(d_student, vocab),
            shape(rows, tokens, d_teacher),
            kernel(d_teacher, vocab),
            shape(rows, tokens, dtype=jnp.float32),
        )
        with compiled_anew():
            return lowered.compile()

    return compile_step
