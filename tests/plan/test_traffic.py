import jax
import jax.numpy as jnp
import numpy as np
import pytest

from taid_jax.plan import GPUS, find_machine
from taid_jax.plan.compiled import compiled_anew
from taid_jax.plan.flops import count_flops_of_parts
from taid_jax.plan.program import part_of
from taid_jax.plan.roofline import Work, least_seconds
from taid_jax.plan.traffic import count_traffic, list_kernels

pytestmark = pytest.mark.optimised

# A layer of four is sliced out of its stack and used; its result is put in another.
PROGRAM = """\
HloModule jit_step

%take (p.0: f32[4,100], p.1: s32[]) -> f32[1,100] {
  %p.0 = f32[4,100]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %s = f32[1,100]{1,0} dynamic-slice(%p.0, %p.1, %zero), dynamic_slice_sizes={1,100}
}

%put (p.2: f32[4,100], p.3: f32[1,100], p.4: s32[]) -> f32[4,100] {
  %p.2 = f32[4,100]{1,0} parameter(0)
  %p.3 = f32[1,100]{1,0} parameter(1)
  %p.4 = s32[] parameter(2)
  ROOT %u = f32[4,100]{1,0} dynamic-update-slice(%p.2, %p.3, %p.4, %zero)
}

%body (b: (s32[], f32[4,100], f32[4,100])) -> (s32[], f32[4,100], f32[4,100]) {
  %b = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = f32[4,100]{1,0} get-tuple-element(%b), index=1
  %o = f32[4,100]{1,0} get-tuple-element(%b), index=2
  %taken = f32[1,100]{1,0} fusion(%w, %i), kind=kLoop, calls=%take, metadata={op_name="jit(step)/jvp(student)/while/body/slice"}
  %kept = f32[4,100]{1,0} fusion(%o, %taken, %i), kind=kLoop, calls=%put, metadata={op_name="jit(step)/transpose(jvp(student))/while/body/slice"}
  ROOT %t = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) tuple(%i, %w, %kept)
}

%condition (c: (s32[], f32[4,100], f32[4,100])) -> pred[] {
  %c = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

%cheap (x.1: f32[4,100]) -> f32[4,100] {
  ROOT %x.1 = f32[4,100]{1,0} parameter(0)
}

%dear (x.2: f32[4,100]) -> f32[4,100] {
  %x.2 = f32[4,100]{1,0} parameter(0)
  ROOT %n = f32[4,100]{1,0} negate(%x.2), metadata={op_name="jit(step)/jvp(head)/neg"}
}

ENTRY %main (a: f32[4,100], p: pred[]) -> f32[4,100] {
  %a = f32[4,100]{1,0} parameter(0)
  %p = pred[] parameter(1)
  %tuple = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) tuple(%zero, %a, %a)
  %loop = (s32[], f32[4,100]{1,0}, f32[4,100]{1,0}) while(%tuple), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %out = f32[4,100]{1,0} get-tuple-element(%loop), index=2
  %near = f32[4,100]{1,0:T(8,128)S(1)} copy(%out), metadata={op_name="jit(step)/teacher/copy"}
  ROOT %r = f32[4,100]{1,0} conditional(%p, %near, %near), true_computation=%cheap, false_computation=%dear
}
"""  # noqa: E501


def test_count_traffic_of_a_program_counted_by_hand():
    # Per pass: a row read and written, and an index of four bytes; then a row read and
    # put in its place. A copy into the core reads only. A negation does both.
    assert count_traffic(PROGRAM) == {
        "student forward": 4 * (400 + 400 + 4),
        "backward": 4 * (400 + 400 + 4),
        "teacher": 1600,
        "head": 1600 + 1600,
    }


def test_list_kernels_says_how_often_and_which_are_products():
    product = """\
%product (p.5: f32[1,100]) -> f32[1,1] {
  %p.5 = f32[1,100]{1,0} parameter(0)
  ROOT %dot = f32[1,1]{1,0} dot(%p.5, %p.5), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (b"""  # noqa: E501
    one = "  %one = f32[1,1]{1,0} fusion(%taken), kind=kCustom, calls=%product\n"
    text = PROGRAM.replace("%body (b", product).replace("  %kept", one + "  %kept")
    found = {one.name: (one.bytes, one.runs, one.product) for one in list_kernels(text)}
    assert found == {
        "taken": (804, 4, False),
        "one": (404, 4, True),
        "kept": (804, 4, False),
        "near": (1600, 1, False),
        "n": (3200, 1, False),
    }


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(step)/jvp(student)/while/body/transpose", "student forward"),
        ("jit(step)/transpose(jvp(student))/while/rematted_computation", "backward"),
        ("jit(step)/while/body/jvp(teacher)/dot_general", "teacher"),
        ("jit(step)/transpose(jvp(head))/mul", "head"),
        ("jit(step)/mul", "optimizer"),
        ("teacher_params['head']", "head"),
        ("", "optimizer"),
    ],
)
def test_part_of_reads_the_scopes_of_the_step(scope, part):
    assert part_of(scope) == part


def loss(weights, x):
    """Three layers of one product each."""

    def layer(x, weights):
        return jnp.tanh(x @ weights), None

    with jax.named_scope("student"):
        x = jax.lax.scan(layer, x, weights)[0]
    with jax.named_scope("head"):
        return jnp.sum(x.astype(jnp.float32) ** 2)


SHAPES = (3, 512, 512), (4096, 512)


def test_count_flops_of_parts_by_hand():
    shapes = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in SHAPES)
    product = 2 * 4096 * 512 * 512
    found = count_flops_of_parts(jax.make_jaxpr(jax.grad(loss))(*shapes))
    assert found == {"student forward": 3 * product, "backward": 2 * 3 * product}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        pytest.param(
            "h100:1", "jax_plugins.xla_cuda13", marks=pytest.mark.gpu_compiler
        ),
        pytest.param("v5e:1x1", "libtpu", marks=pytest.mark.tpu_compiler),
    ],
)
def test_count_traffic_of_a_compiled_loop(name, module):
    pytest.importorskip(module, reason=f"no compiler for this machine: no {module}")
    place = jax.sharding.SingleDeviceSharding(find_machine(name).devices[0])
    shapes = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in SHAPES
    )
    with compiled_anew():
        text = jax.jit(loss).lower(*shapes).compile().as_text()
    found = count_traffic(text)
    rows, weights = 4096 * 512 * 2, 512 * 512 * 2
    if module == "libtpu":
        # The rows stay within the core: weights are all that is read.
        least, most = 3 * weights, 3.01 * weights
    else:
        # A layer's weights may be written as a slice and read again, its rows copied:
        # this compiler does both.
        least, most = 3 * (weights + 2 * rows), 3.01 * (3 * weights + 4 * rows)
    assert least <= found["student forward"] <= most


def test_least_seconds_by_hand():
    chip = GPUS["h100"]
    parts = [Work(989e12, 3350 * 10**9, 0.0, 50e9), Work(989e12, 0, 0.0, 0.0)]
    found = least_seconds(chip, parts)
    assert found.keys() == {"flops", "hbm", "network"}
    np.testing.assert_allclose(list(found.values()), [2, 1, 1])
    assert least_seconds(None, parts) == {}
