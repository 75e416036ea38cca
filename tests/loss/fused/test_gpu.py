"""The fused head as XLA's compiler for GPUs makes it, without a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from taid_jax import loss
from taid_jax.loss import _fused_chunk, _fused_mesh
from taid_jax.loss import _one_pass as kernel
from taid_jax.plan.traffic import list_kernels


@pytest.mark.gpu_compiler
@pytest.mark.optimised
@pytest.mark.parametrize(
    ("masked", "transposed"), [(True, False), (False, False), (True, True)]
)
def test_fused_loss_reads_the_rows_twice(compile_step, masked, transposed):
    module = "jax_plugins.xla_cuda13"
    pytest.importorskip(module, reason=f"no compiler for this machine: no {module}")
    compiled = compile_step("h100:1", masked=masked, transposed=transposed)
    kernels = [one for one in list_kernels(compiled.as_text()) if one.runs == 8]
    # Both rows of 1,024 tokens in float32: once for the sums, once for the gradient,
    # which is written in bfloat16. That is 2.36 GB.
    outside = sum(one.bytes for one in kernels if not one.product)
    rows = 1024 * 128256 * 4
    assert 4.5 * rows <= outside <= 2.6e9
    # The head's gradient, one chunk's rows and gradient, and no copy of any.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2**30


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("sizes", "tokens", "fits"),
    [
        ((1, 1, 1), 8, True),
        ((2, 4, 1), 8, True),
        # The compiler cannot share out a kernel.
        ((2, 2, 2), 8, False),
        ((2, 4, 1), 6, False),
    ],
)
def test_fused_loss_has_the_kernel_where_rows_are_whole(
    arrays, fused, plain, agree, monkeypatch, sizes, tokens, fits
):
    monkeypatch.setattr(_fused_mesh, "runs_on", lambda device: True)
    interpreted = functools.partial(kernel.one_pass, interpret=True)
    monkeypatch.setattr(_fused_chunk, "one_pass", interpreted)
    # Fewer lanes and steps, and so a smaller program.
    monkeypatch.setattr(kernel, "_LANES", 16)
    monkeypatch.setattr(kernel, "_ENTRIES", 2)
    a, objective = arrays(tokens=(tokens, 2)), loss.TAID(jnp.float32(0.4))
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=auto)

    def run(function, **options):
        def value(hidden, kernel):
            return function(a, objective, hidden, kernel, **options)

        gradient = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        return gradient, (a["student"], a["kernel"])

    gradient, arguments = run(fused, mesh=mesh, chunk_size=4)
    program = str(jax.make_jaxpr(gradient)(*arguments))
    assert ("pallas_call" in program) == fits
    (value, sums), gradients = jax.jit(gradient)(*arguments)
    expected, arguments = run(plain)
    (wanted, wanted_sums), wanted_gradients = jax.jit(expected)(*arguments)
    agree((value, sums, gradients), (wanted, wanted_sums, wanted_gradients))


@pytest.mark.parametrize(
    ("capability", "runs"),
    [("7.5", False), ("8.0", True), ("9.0", True), ("10.3", True), ("gfx942", False)],
)
def test_the_kernel_is_for_gpus_that_triton_knows(capability, runs):
    device = types.SimpleNamespace(compute_capability=capability)
    assert kernel.runs_on(device) == runs
    assert not kernel.runs_on(jax.devices()[0])
