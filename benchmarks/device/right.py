"""Section A: is what the device computes right?"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from device.rows import Figures, MissingError, Options, Row
from device.shapes import only, tiny_config
from taid_jax import loss
from taid_jax.models.attention import Scoring, batch_segments, causal_attention
from taid_jax.models.decoder import decoder_functions, hidden_states, init_params
from taid_jax.models.kernels import cudnn_attention, splash_attention
from taid_jax.schedule import TAIDScheduler
from taid_jax.sharding import activations_on
from taid_jax.train.state import init_state, make_optimizer
from taid_jax.train.step import make_train_step

T_VALUES = (1e-3, 0.1, 0.4, 1.0)
NOISES = (None, 1.0, 1e-3)
"""Teachers: independent of the student, or the student and so much noise."""
SCALES = (1.0, 10.0, 30.0)


def rows(options: Options) -> list[Row]:
    """Returns the rows of the section."""
    vocab = 2048 if options.small else 128_256
    found: list[Row] = [
        (f"TAID's gradient, {n:,} entries", functools.partial(taid_gradient, n))
        for n in (257, vocab)
    ]
    for dtype, precision in (
        *(("float32", name) for name in ("default", "high", "highest")),
        ("bfloat16", "default"),
    ):
        compute = functools.partial(fused_head, options.small, dtype, precision)
        found.append((f"fused head, {dtype}, {precision} precision", compute))
    # Where the device is that CPU, float32 would be compared with itself.
    own_cpu = jax.default_backend() == "cpu"
    dtypes = ("bfloat16",) if own_cpu else ("float32", "bfloat16")
    for dtype in dtypes:
        compute = functools.partial(decoder, options.small, dtype)
        found.append((f"decoder beside float32 on a CPU, {dtype}", compute))
    for kernel in kernels():
        for case in ("plain", "padded", "packed", "windowed", "grouped"):
            compute = functools.partial(attention, options.small, kernel, case)
            found.append((f"{kernel} attention, {case}", compute))
    for dtype in dtypes:
        compute = functools.partial(compare_runs, dtype)
        found.append((f"20 steps beside float32 on a CPU, {dtype}", compute))
    return found


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis, in the dtype of the logits."""
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def exact_taid(student: np.ndarray, teacher: np.ndarray, t: float) -> list[np.ndarray]:
    """Returns TAID of every token and its gradient, float64, from the definition."""
    student, teacher = (x.astype(np.float64) for x in (student, teacher))
    q, p = softmax(student), softmax((1 - t) * student + t * teacher)
    gradient = q - p
    # Of a student that is nearly certain, that entry is a difference of two numbers
    # near 1; the entries add up to 0, so the others have its digits.
    top = student.argmax(-1)[..., None]
    np.put_along_axis(gradient, top, 0.0, -1)
    np.put_along_axis(gradient, top, -gradient.sum(-1, keepdims=True), -1)
    shifted = student - student.max(-1, keepdims=True)
    log_q = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return [-(p * log_q).sum(-1), gradient]


def taid_gradient(vocab: int) -> Figures:
    """Returns how far value and gradient are from float64, for the worst token."""

    @jax.jit
    def ours(student: Array, teacher: Array, t: Array) -> tuple[Array, Array]:
        def total(student: Array) -> tuple[Array, Array]:
            losses = loss.TAID(t)(student, teacher, None)
            return jnp.sum(losses), losses

        gradient, losses = jax.grad(total, has_aux=True)(student)
        return losses, gradient

    rng, worst = np.random.default_rng(0), 0.0
    for scale in SCALES:
        student = (scale * rng.standard_normal((4, vocab))).astype(np.float32)
        other = rng.standard_normal((4, vocab)).astype(np.float32)
        for noise in NOISES:
            teacher = np.float32(scale) * other
            if noise is not None:
                teacher = student + np.float32(noise) * other
            for t in map(np.float32, T_VALUES):
                losses, gradient = map(np.asarray, ours(student, teacher, t))
                expected, exact = exact_taid(student, teacher, float(t))
                apart = np.linalg.norm(gradient - exact, axis=-1)
                by_token = apart / np.linalg.norm(exact, axis=-1)
                # The value of a student that is nearly certain is nearly 0.
                by_value = np.abs(losses - expected) / (0.1 + np.abs(expected))
                # Of numpy's maxima: NaN stays NaN.
                worst = np.maximum(worst, np.maximum(by_token, by_value).max())
    # What the objective promises of its gradient.
    return {"error": float(worst), "limit": 1e-5}


def distance(found: Any, expected: Any) -> float:
    """Returns the norm of the difference, as a share of the norm of what is right."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def fused_head(small: bool, dtype: str, precision: str) -> Figures:
    """Returns how far the fused head and the plain form are from float64."""
    tokens, widths, vocab = (64, (32, 48), 500) if small else (512, (256, 384), 8000)
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    hidden, teacher = (normal(tokens, width) for width in widths)
    kernel, teacher_kernel = (normal(w, vocab, scale=2 * w**-0.5) for w in widths)
    mask = np.arange(tokens) % 5 != 0
    given = jnp.asarray(mask)
    t = 0.4

    def mean(hidden: Array, kernel: Array, *, fused: bool) -> Array:
        objective, heads = loss.TAID(t), (loss.Head(kernel), loss.Head(teacher_kernel))
        if fused:
            total, sums = loss.fused_loss(
                objective, hidden, heads[0], teacher, heads[1], given,
                chunk_size=tokens // 4,
            )  # fmt: skip
        else:
            logits = heads[0].logits(hidden), heads[1].logits(teacher)
            total, sums = loss.distillation_sums(objective, *logits, given)
        return total / sums["num_tokens"]

    h, w, u, v = (
        np.asarray(x, np.float64) for x in (hidden, kernel, teacher, teacher_kernel)
    )
    losses, in_logits = exact_taid(h @ w, u @ v, t)
    in_logits *= mask[:, None] / mask.sum()
    exact = (losses * mask).sum() / mask.sum(), in_logits @ w.T, h.T @ in_logits
    error = {}
    for name, fused in (("fused", True), ("plain", False)):
        form = functools.partial(mean, fused=fused)
        with jax.default_matmul_precision(precision):
            value, gradients = jax.jit(jax.value_and_grad(form, (0, 1)))(hidden, kernel)
        pairs = zip((value, *gradients), exact, strict=True)
        error[name] = float(np.max([distance(*pair) for pair in pairs]))
    # As good as the plain form, whatever the products lose; at the highest precision
    # they lose nothing.
    limit = max(2 * error["plain"], 1e-5)
    if precision == "highest":
        limit = min(limit, 1e-4)
    return {"error": error["fused"], "limit": limit, "plain_error": error["plain"]}


def cpu_device() -> Any:
    """Returns a CPU of JAX's, beside whatever else it has.

    Raises:
        MissingError: If it was told to have none.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise MissingError(f"JAX has no CPU beside the device: {error}") from error


def exact_products(dtype: DTypeLike) -> Any:
    """Within it, products of float32 are exact; those of bfloat16 are anyway."""
    exact = "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
    return jax.default_matmul_precision(exact)


def decoder(small: bool, dtype: str) -> Figures:
    """Returns how far hidden states are from those of a CPU in float32."""
    config = tiny_config() if small else tiny_config(512, layers=4, vocab=8192)
    length = 128 if small else 512
    cpu = cpu_device()
    with jax.default_device(cpu):
        params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, length), np.int32)
    real = np.ones_like(ids)
    real[1, : length // 4] = 0

    def states(device: Any, dtype: DTypeLike) -> np.ndarray:
        batch = {"input_ids": ids, "attention_mask": real}
        form = functools.partial(hidden_states, config=config, dtype=dtype)
        with exact_products(dtype), activations_on(only(device)):
            found = jax.jit(form)(*jax.device_put((params, batch), device))
        return np.asarray(found, np.float32)[real == 1]

    found = states(jax.devices()[0], dtype)
    # Sums in another order; 8 bits in each of some ten products on the way.
    limit = 1e-4 if dtype == "float32" else 3e-2
    return {"error": distance(found, states(cpu, jnp.float32)), "limit": limit}


def kernels() -> dict[str, Callable[..., Array]]:
    """Returns the attentions of this platform by name."""
    own: dict[str, dict[str, Callable[..., Array]]] = {
        "gpu": {"cuDNN": cudnn_attention},
        "tpu": {"splash": splash_attention},
        "cpu": {"splash": functools.partial(splash_attention, interpret=True)},
    }
    return {"blocked": causal_attention, **own[jax.default_backend()]}


def plain_attention(
    queries: Array, keys: Array, values: Array, segments: Array | None, window: int
) -> Array:
    """Returns attention from its definition, by whole squares in float32."""
    queries, keys, values = (x.astype(jnp.float32) for x in (queries, keys, values))
    scores = jnp.einsum("bkgqh,bkmh->bkgqm", queries, keys) * queries.shape[-1] ** -0.5
    place = jnp.arange(queries.shape[3])
    behind = place[:, None] - place[None]
    seen = ((behind >= 0) & (behind < window))[None]
    if segments is not None:
        seen = seen & (segments[:, :, None] == segments[:, None])
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
    return jnp.einsum("bkgqm,bkmh->bkgqh", weights, values)


def attention(small: bool, kernel: str, case: str) -> Figures:
    """Returns how far a kernel's values and gradients are from the definition's."""
    length, head_dim = (128, 16) if small else (1024, 128)
    heads, group = (2, 4) if case == "grouped" else (2, 1)
    rng, segments, window = np.random.default_rng(0), None, None
    if case == "padded":
        real = np.ones((2, length), np.int32)
        real[1, : length // 3] = 0
        segments = batch_segments({"attention_mask": real})
    if case == "packed":
        numbers = np.sort(rng.integers(0, 3, (2, length)), axis=1)
        segments = jnp.asarray(numbers, jnp.int32)
    if case == "windowed":
        window = length // 3

    def normal(*shape: int) -> Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)

    queries = normal(2, heads, group, length, head_dim)
    keys, values = (normal(2, heads, length, head_dim) for _ in range(2))

    def ours(queries: Array, keys: Array, values: Array) -> Array:
        scoring = Scoring(head_dim**-0.5)
        options = {"window": window, "scoring": scoring}
        return kernels()[kernel](queries, keys, values, segments, **options)

    def definition(queries: Array, keys: Array, values: Array) -> Array:
        return plain_attention(queries, keys, values, segments, window or length)

    def both(attend: Callable[..., Array]) -> list[np.ndarray]:
        def total(*arrays: Array) -> tuple[Array, Array]:
            out = attend(*arrays).astype(jnp.float32)
            return jnp.sum(jnp.sin(out)), out

        gradient = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
        gradients, out = gradient(queries, keys, values)
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    found = both(ours)
    with jax.default_matmul_precision("highest"):
        expected = both(definition)
    apart = [
        np.abs(a - b).max() / np.abs(b).max()
        for a, b in zip(found, expected, strict=True)
    ]
    # A kernel rounds to 8 bits in several places.
    return {"error": float(np.max(apart)), "limit": 2.0**-6}


@functools.cache
def run(on_cpu: bool, dtype: str) -> np.ndarray:
    """Returns the figures of 20 steps of a small pair, on a CPU or on the device."""
    device = cpu_device() if on_cpu else jax.devices()[0]
    # Weights so large that teacher and student are far apart.
    student, teacher = (
        dataclasses.replace(config, initializer_range=0.2)
        for config in (tiny_config(), tiny_config(96))
    )
    with jax.default_device(cpu_device()):
        both = [
            jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
            for seed, config in enumerate((student, teacher))
        ]
    optimizer, scheduler = make_optimizer(1e-2), TAIDScheduler(20)
    step = make_train_step(
        *(decoder_functions(config, dtype=dtype) for config in (student, teacher)),
        make_objective=lambda schedule, learned, step: loss.TAID(schedule.t),
        scheduler=scheduler,
        optimizer=optimizer,
        mesh=only(device),
    )
    state = init_state(both[0], optimizer=optimizer, schedule=scheduler.init())
    # Copied: the first step takes the state's arrays over.
    state, params = jax.device_put((state, both[1]), device, may_alias=False)
    rng, figures = np.random.default_rng(0), []
    with exact_products(dtype):
        for _ in range(20):
            ids = rng.integers(0, student.vocab_size, (4, 64), np.int32)
            batch = {"input_ids": ids, "labels": ids.copy()}
            state, metrics = step(state, params, batch)
            names = ("loss", "kl_teacher", "grad_norm")
            figures.append([float(metrics[name]) for name in names])
    return np.asarray(figures)


def compare_runs(dtype: str) -> Figures:
    """Returns how far a run is from that of a CPU in float32.

    The greatest difference of a step's loss, KL to the teacher and norm of the
    gradient, each as a share of what it moves through in the run.
    """
    found, expected = run(False, dtype), run(True, "float32")
    error = np.abs(found - expected).max(0) / np.ptp(expected, axis=0)
    # On a CPU, weights changed by 1e-6 of themselves gave 6e-5, and bfloat16 0.05.
    return {"error": float(error.max()), "limit": 1e-3 if dtype == "float32" else 0.1}
