"""Floating-point operations of a program, counted in its own structure."""

import math

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


def count_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of all matrix products, over all devices.

    A product of (m, k) and (k, n) counts 2 m k n; what is not a product does not count.
    A scan counts its body as often as it runs, a conditional its dearest branch, the
    body of a `shard_map` once per device. A loop without a fixed length counts once:
    the result is then a lower bound.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        return 2 * depth * math.prod(_shape(equation.outvars[0]))
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    inner = sum(
        count_flops(value)
        for value in params.values()
        if isinstance(value, ClosedJaxpr | Jaxpr)
    )
    if name == "scan":
        return inner * params["length"]
    if name == "shard_map":
        shape = params["mesh"].shape
        return inner * math.prod(shape[axis] for axis in params["newly_manual_axes"])
    return inner


def _shape(value: Var | Literal) -> tuple[int, ...]:
    return value.aval.shape if isinstance(value.aval, ShapedArray) else ()
