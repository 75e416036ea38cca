import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.data.batches import ExampleSet
from taid_jax.data.packing import make_table
from taid_jax.data.tokens import Example
from taid_jax.models.decoder import abstract_params, decoder_functions, init_params
from taid_jax.plan.compiled import abstract_step
from taid_jax.sharding import make_mesh

pytestmark = pytest.mark.optimised


@pytest.fixture
def one_device():
    return make_mesh("data=1", jax.devices()[:1])


def test_abstract_step_holds_master_weights_in_float32(tiny, make_settings, one_device):
    settings = make_settings(dtype="bfloat16", grad_accum=2)
    teacher, student = tiny
    step, arguments = abstract_step(settings, teacher, student, one_device)
    state, teacher_params, _ = arguments

    def dtypes(tree):
        return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}

    assert dtypes(state.params) == {"float32"}
    # Beside the moments the optimizer counts its steps.
    assert dtypes(state.opt_state) == {"float32", "int32"}
    assert dtypes(teacher_params) == {"bfloat16"}
    new_state, metrics = jax.eval_shape(step, *arguments)
    assert dtypes(new_state.params) == dtypes(metrics) == {"float32"}
    assert dtypes(new_state.opt_state) == {"float32", "int32"}


def test_decoder_gradients_are_float32_where_it_computes_in_bfloat16(tiny):
    _, student = tiny
    functions = decoder_functions(student, dtype=jnp.bfloat16)
    params = abstract_params(student)
    batch = {"input_ids": jnp.zeros((1, 8), jnp.int32)}

    def loss(params):
        hidden = functions.hidden(params, batch)
        assert hidden.dtype == jnp.bfloat16
        return jnp.sum(hidden.astype(jnp.float32))

    gradients = jax.eval_shape(jax.grad(loss), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}


@functools.cache
def _equations(jaxpr):
    """All equations of a program, those of programs in it too."""
    found = [*jaxpr.eqns]
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, type(jaxpr)):
                    found += _equations(inner)
    return found


def _products(jaxpr):
    """The dtypes that the matrix products of a program read, with their results."""
    return {
        tuple(value.aval.dtype.name for value in equation.invars)
        for equation in _equations(jaxpr)
        if equation.primitive.name == "dot_general"
    }


def test_abstract_step_has_the_moving_average_in_its_state(
    tiny, make_settings, one_device
):
    """In float32, where the student's weights are; the teacher has none of its own."""
    itself = {"teacher": "self", "student": "a", "teacher_ema": 0.9}
    settings = make_settings(mesh="fsdp=8", **itself)
    _, arguments = abstract_step(settings, tiny[1], tiny[1], make_mesh("fsdp=8"))
    state, teacher, _ = arguments
    assert jax.tree.leaves(teacher) == []
    params = [(leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(state.params)]
    average = [(leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(state.average)]
    assert average == params
    assert any(not where.is_fully_replicated for _, where in average)


def test_abstract_step_has_the_rows_of_a_teacher_that_is_asked_otherwise(
    tiny, make_settings, one_device
):
    """By name and shape, those that the data room makes."""
    asked = {"teacher_prompt": "{prompt}", "teacher_seq_len": 48, "pack": False}
    _, arguments = abstract_step(make_settings(**asked), *tiny, one_device)
    ids = np.arange(3, dtype=np.int32)
    example = Example(ids, ids > 1, 1, 3)
    side = ExampleSet(make_table([]), [], 32, 0, False, teacher_len=48)
    side = side.of_examples([example._replace(teacher=example)] * 16)
    batch = side.batch(range(16), 16)
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in arguments[2].items()}
    assert shapes == {name: (x.shape, x.dtype) for name, x in batch.items()}


@pytest.fixture(scope="module")
def traced(tiny, make_settings):
    """The program of a step in bfloat16, three layers at a time."""
    settings = make_settings(dtype="bfloat16", layer_unroll=3)
    mesh = make_mesh("data=1", jax.devices()[:1])
    step, arguments = abstract_step(settings, *tiny, mesh)
    return step.trace(*arguments).jaxpr.jaxpr


def test_layer_unroll_is_that_of_both_models(traced):
    scans = [e.params for e in _equations(traced) if e.primitive.name == "scan"]
    # Forward of the teacher, forward and backward of the student.
    assert sum(params["unroll"] == 3 for params in scans) == 3


def test_abstract_step_multiplies_in_bfloat16(traced):
    found = _products(traced)
    assert ("bfloat16", "bfloat16") in found
    # None in float32: on a TPU it would take several passes.
    assert ("float32", "float32") not in found


@pytest.mark.slow
def test_decoder_remat_orders_the_memory_of_its_gradient(tiny):
    batch = {"input_ids": jnp.zeros((8, 256), jnp.int32)}

    def temp_bytes(remat):
        functions = decoder_functions(tiny[0], remat=remat)
        gradient = jax.grad(lambda params: jnp.sum(functions.hidden(params, batch)))
        compiled = jax.jit(gradient).lower(abstract_params(tiny[0])).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, full = (temp_bytes(remat) for remat in ("none", "dots", "full"))
    assert none > dots > full


@pytest.mark.slow
@pytest.mark.multidevice
def test_teacher_layout_changes_where_it_lies_and_no_number(tiny, make_settings):
    found, held = {}, {}
    ids = np.random.default_rng(0).integers(1, 96, (8, 16)).astype(np.int32)
    for layout in ("same", "replicated", "all_devices"):
        settings = make_settings(
            batch_size=8, seq_len=16, remat="none", teacher_sharding=layout
        )
        mesh = make_mesh("data=2,fsdp=2,tensor=2")
        step, (state, teacher, batch) = abstract_step(settings, *tiny, mesh)

        def filled(shapes, values):
            return jax.tree.map(
                lambda value, shape: jax.device_put(value, shape.sharding),
                values,
                shapes,
            )

        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
        params = [init_params(config, jax.random.key(1)) for config in tiny]
        teacher = filled(teacher, params[0])
        held[layout] = sum(
            leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(teacher)
        )
        rows = {key: np.ones((8, 16), np.int32) for key in batch}
        rows |= {"input_ids": ids, "labels": ids}
        state = filled(state, zeros._replace(params=params[1]))
        _, metrics = step(state, teacher, filled(batch, rows))
        found[layout] = jax.device_get(metrics)
    assert held["all_devices"] < held["same"] < held["replicated"]
    for layout in ("replicated", "all_devices"):
        for name, value in found["same"].items():
            # The same products in another order of float32 sums.
            np.testing.assert_allclose(
                found[layout][name], value, rtol=1e-5, atol=1e-6, err_msg=name
            )
