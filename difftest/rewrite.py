"""A function whose operations of some kinds are replaced by others."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

# Of an equation and its inputs' values: its output, or None to leave the equation as it is.
Rule = Callable[..., jax.Array | None]

_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def rewritten(function: Callable[..., Any], rules: Mapping[str, Rule]) -> Callable[..., Any]:
    """The same function, with some operations replaced.

    Args:
        function: of pytrees of arrays, pure.
        rules: by the name of a primitive that has one output. Functions that are called are looked
            into, loops and branches are not.
    """

    def run(*args: Any) -> Any:
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outs = _evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args), rules)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return run


def _evaluate(jaxpr: Any, consts: Any, args: Any, rules: Mapping[str, Rule]) -> list[Any]:
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [value(atom) for atom in equation.invars]
        name = equation.primitive.name
        inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
        if name in _CALLS and inner is not None:
            outs = _evaluate(inner.jaxpr, inner.consts, values, rules)
        else:
            made = rules[name](equation, *values) if name in rules else None
            outs = _bound(equation, values) if made is None else [made]
        known.update(zip(equation.outvars, outs, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _bound(equation: Any, values: list[Any]) -> list[Any]:
    params = equation.primitive.get_bind_params(equation.params)
    outs = equation.primitive.bind(*values, **params)
    return outs if equation.primitive.multiple_results else [outs]
