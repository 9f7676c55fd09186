"""EffectivePath, the baseline: the largest terms that make up most of each sum.

Qiu, Leng, Guo, Chen, Li, Guo, Zhu: "Adversarial Defense Through Network Profiling Based Path
Extraction", CVPR 2019. The walk of NNSlicer with other rules: activations instead of deltas, a
weighted sum keeps the fewest of its largest terms that reach theta of it, everything kept
counts as +1. The paper's layers are dense, convolution, ReLU and max pooling; here residual
adds and average pools are sums of their terms, a scaled or negated value is a sum of one term
(one of 0 ends the path), ties stay together, and any other function of one value is passed
through.
"""

from typing import Any

import jax.numpy as jnp

from nnslicer_jax import operations
from nnslicer_jax.contribution import (
    Term,
    contributing,
    decision,
    extreme,
    move,
    product_rule,
    select,
    sign,
    sum_edges,
)
from nnslicer_jax.fold import Env, Rules
from nnslicer_jax.graph import Graph, UnsupportedError
from nnslicer_jax.movement import fitted
from nnslicer_jax.products import inverse
from nnslicer_jax.windows import gathering

RULES = Rules("effective path")
RULES.register(*operations.DECISIONS)(decision)
RULES.register("select_n")(select)
RULES.register(*(operations.MOVEMENT - {"select_n"}))(move)


def activations(graph: Graph, env: Env) -> list[Term | None]:
    """Every value as a `Term` whose change is its activation itself."""
    return [
        None if v is None else Term(v, v.astype(jnp.float32) if i in graph.carried else None)
        for i, v in enumerate(env)
    ]


def _on(back: list[Any]) -> Any:
    """1 where an output is on the path."""
    return sign(back[0])


@RULES.register("dot_general", "conv_general_dilated")
def _weighted_sum(node, args, outs, back, how):
    return product_rule(node, args, _on(back), how)


@RULES.register("add", "add_any", "sub")
def _sum_of_two(node, args, outs, back, how):
    on = _on(back)
    if all(node.data):
        shape = outs[0].value.shape
        second = -args[1].delta if node.key == "sub" else args[1].delta
        terms = [jnp.broadcast_to(t, shape) for t in (args[0].delta, second)]
        edge = sum_edges(jnp.stack(terms, -1), on, how)
        found = [edge[..., 0], edge[..., 1]]
    elif node.data[1] and node.key == "sub":
        found = [None, jnp.where(args[1].value != 0, on, 0)]
    else:
        found = [on if data else None for data in node.data]
    return fitted(found, args)


@RULES.register("reduce_sum", "reduce_window_sum", "cumsum")
def _sum(node, args, outs, back, how):
    gather = gathering(node)
    edge = sum_edges(gather(args[0].delta), _on(back), how)
    return [inverse(gather, args[0].value.shape, edge)]


@RULES.register(
    "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax", "cummin"
)
def _maximum(node, args, outs, back, how):
    edge = jnp.where(extreme(node, args, outs[0].value), _on(back)[..., None], 0)
    return [inverse(gathering(node), args[0].value.shape, edge)]


@RULES.register("max", "min")
def _maximum_of_two(node, args, outs, back, how):
    on = _on(back)
    where = contributing(node, args, outs[0].value)
    return fitted([None if w is None else jnp.where(w, on, 0) for w in where], args)


@RULES.register("relu")
def _rectify(node, args, outs, back, how):
    return [jnp.where(args[0].value > 0, _on(back), 0)]


@RULES.register("neg")
def _negative(node, args, outs, back, how):
    return [jnp.where(args[0].value != 0, _on(back), 0)]


@RULES.register(
    *(operations.UNARY - operations.DECISIONS - {"neg"}), *(operations.NAMED_CALLS - {"relu"}),
    "atan2", "clamp", "nextafter", "pow", "rem",
)  # fmt: skip
def _elementwise(node, args, outs, back, how):
    if sum(node.data) != 1:
        raise UnsupportedError(f"effective path: no rule for {node} of several inputs")
    return fitted([_on(back) if data else None for data in node.data], args)


@RULES.register("reduce_prod", "cumprod")
def _product(node, args, outs, back, how):
    gather = gathering(node)
    shape = (*outs[0].value.shape, gather(args[0].value).shape[-1])
    on = jnp.where(outs[0].value != 0, _on(back), 0)
    return [inverse(gather, args[0].value.shape, jnp.broadcast_to(on[..., None], shape))]


@RULES.register("mul", "div")
def _scale(node, args, outs, back, how):
    # A weighted sum of one term.
    on = jnp.where(outs[0].value != 0, _on(back), 0)
    return fitted([on, on], args)
