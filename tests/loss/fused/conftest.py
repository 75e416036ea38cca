"""The fused head and the plain form side by side, and what a compiled program does."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
def products(read_program):
    """Operations of a compiled function's products, for every token and entry."""

    def count(function, *arguments, tokens):
        text = jax.jit(function).lower(*arguments).compile().as_text()
        return read_program(text).flops / (2 * tokens * VOCAB)

    return count


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 128 tokens and groups of 16, as a large vocabulary has them."""
    from taid_jax.loss import _fused

    monkeypatch.setitem(_fused._ENTRIES, "cpu", 128 * VOCAB)
    monkeypatch.setattr(_fused, "_CPU_ROWS", 16 * VOCAB)


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
        kind: Such as `all-reduce`.
        elements: Of the largest array in its result.
        looped: Whether it is inside a loop.
    """

    kind: str
    elements: int
    looped: bool


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program does on one device.

    Attributes:
        flops: Of matrix products, as often as loops run them; of a conditional, those
            of its dearest branch.
        collectives: Each as it is written, however often it runs.
    """

    flops: int
    collectives: tuple[Collective, ...]

    @property
    def looped(self) -> list[int]:
        """Sizes of the collectives inside loops."""
        return [one.elements for one in self.collectives if one.looped]


_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "reduce-scatter",
)


def _sizes(text: str) -> list[tuple[int, ...]]:
    return [
        tuple(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"\b[a-z]+\d*\[([\d,]*)\]", text)
    ]


class _Reader:
    """Reads the text of an XLA program: `name = type opcode(operands), attributes`."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[tuple[str, str, str, str]]] = {}
        self.collectives: list[Collective] = []
        self.entry, name = "", ""
        for line in text.splitlines():
            if begins := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
                name = begins[2]
                self.computations[name] = []
                self.entry = name if begins[1] else self.entry
            elif found := re.match(
                r"\s+(?:ROOT )?%?([\w.-]+) = (.*?)(?<= )([a-z][\w-]*)\((.*)", line
            ):
                self.computations[name].append(found.groups())

    def flops(self, computation: str, looped: bool = False) -> int:
        types = {name: kind for name, kind, *_ in self.computations[computation]}
        total = 0
        for _, kind, opcode, rest in self.computations[computation]:
            if (opcode := opcode.removesuffix("-start")) in _KINDS:
                largest = max(map(math.prod, _sizes(kind)))
                self.collectives.append(Collective(opcode, largest, looped))
            operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
            if opcode in ("dot", "convolution"):
                total += (
                    2
                    * math.prod(_sizes(kind)[0])
                    * self._depth(
                        opcode, rest, *(_sizes(types[name])[0] for name in operands)
                    )
                )
            called = self._called(rest)
            if opcode == "while":
                body, condition = called["body"], called["condition"]
                trips = self._trips(rest, condition)
                total += trips * self.flops(body, True)
            elif opcode == "conditional":
                total += max(self.flops(name, looped) for name in called.values())
            elif opcode in ("fusion", "call", "async-start"):
                total += sum(self.flops(name, looped) for name in called.values())
        return total

    @staticmethod
    def _called(rest: str) -> dict[str, str]:
        found = dict(re.findall(r"(\w+)=%([\w.-]+)", rest))
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
            found |= {name: name for name in re.findall(r"%([\w.-]+)", branches)}
        return found

    @staticmethod
    def _depth(opcode: str, rest: str, left: tuple, right: tuple) -> int:
        """Products that an entry of the result adds up."""
        if opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)[1]
            return math.prod(left[int(axis)] for axis in axes.split(","))
        # A product is a convolution on a TPU, over windows of one entry.
        window = re.search(r"window=\{size=([\dx]+)", rest)
        assert window is None or set(window[1]) <= set("1x"), rest
        return right[re.search(r"dim_labels=\w+_(\w+)->", rest)[1].index("i")]

    def _trips(self, rest: str, condition: str) -> int:
        """How often a loop runs; from 0 to a constant where it is not written."""
        if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
            return int(told[1])
        bounds = [
            int(rest.split(")")[0])
            for _, kind, opcode, rest in self.computations[condition]
            if opcode == "constant" and kind.startswith("s32[]")
        ]
        assert len(bounds) == 1, condition
        return bounds[0]


@pytest.fixture(scope="session")
def read_program() -> Callable[[str], Program]:
    """What a program does, from `compiled.as_text()`."""

    def read(text: str) -> Program:
        reader = _Reader(text)
        flops = reader.flops(reader.entry)
        return Program(flops, tuple(reader.collectives))

    return read
