"""Floating-point operations of a program, counted in its own structure."""

import math
from collections.abc import Mapping
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var


def count_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of all matrix products, over all devices.

    A product of (m, k) and (k, n) counts 2 m k n; what is not a product does not count.
    A scan counts its body as often as it runs, a conditional its dearest branch, the
    body of a `shard_map` once per device, that of a kernel once per block. A loop
    without a fixed length counts once: the result is then a lower bound.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if not equation.outvars and not equation.effects:
        return 0  # Rematerialisation leaves such calls behind, for XLA to drop.
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
    if name == "pallas_call":
        return inner * _blocks(params)
    if name == "shard_map":
        shape = params["mesh"].shape
        return inner * math.prod(shape[axis] for axis in params["newly_manual_axes"])
    return inner


def _blocks(params: Mapping[str, Any]) -> int:
    """Returns how often the body of a kernel runs.

    Splash attention passes over the blocks that a causal mask hides whole: of a square
    of n by n blocks it runs n (n + 1) / 2. With a window it has them out of its grid.
    """
    grid = [size for size in params["grid_mapping"].grid if isinstance(size, int)]
    runs = math.prod(grid)
    name = str(params.get("name") or params.get("name_and_src_info"))
    if not name.startswith("splash"):
        return runs
    # Blocks of queries and of keys, with the heads between them for the keys' gradient.
    other = grid[-3] if "dkv" in name else grid[-2]
    return runs * (other + 1) // (2 * other) if grid[-1] == other else runs


def _shape(value: Var | Literal) -> tuple[int, ...]:
    return value.aval.shape if isinstance(value.aval, ShapedArray) else ()
