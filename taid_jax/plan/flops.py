"""Floating-point operations of a program, counted in its own structure."""

import collections
import math
from collections.abc import Mapping
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from taid_jax.plan.program import Part, part_of


def count_flops(program: ClosedJaxpr | Jaxpr) -> int:
    """Returns the operations of all matrix products, over all devices.

    A product of (m, k) and (k, n) counts 2 m k n; what is not a product does not count.
    A scan counts its body as often as it runs, a conditional its dearest branch, the
    body of a `shard_map` once per device, that of a kernel once per block. A loop
    without a fixed length counts once: the result is then a lower bound.
    """
    return count_flops_of_parts(program).total()


def count_flops_of_parts(
    program: ClosedJaxpr | Jaxpr, scope: str = ""
) -> collections.Counter[Part]:
    """Returns what `count_flops` does, for each part of the step."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    found: collections.Counter[Part] = collections.Counter()
    for equation in jaxpr.eqns:
        found += _of_equation(equation, scope)
    return found


def _of_equation(equation: JaxprEqn, scope: str) -> collections.Counter[Part]:
    name, params = equation.primitive.name, equation.params
    scope = f"{scope}/{equation.source_info.name_stack}"
    if not equation.outvars and not equation.effects:
        # Rematerialisation leaves such calls behind, for XLA to drop.
        return collections.Counter()
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        operations = 2 * depth * math.prod(_shape(equation.outvars[0]))
        return collections.Counter({part_of(scope): operations})
    if name == "cond":
        branches = (count_flops_of_parts(one, scope) for one in params["branches"])
        return max(branches, key=collections.Counter.total)
    inner: collections.Counter[Part] = collections.Counter()
    for value in params.values():
        if isinstance(value, ClosedJaxpr | Jaxpr):
            inner += count_flops_of_parts(value, scope)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "pallas_call":
        times = _blocks(params)
    elif name == "shard_map":
        shape = params["mesh"].shape
        times = math.prod(shape[axis] for axis in params["newly_manual_axes"])
    return collections.Counter({part: times * n for part, n in inner.items()})


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
