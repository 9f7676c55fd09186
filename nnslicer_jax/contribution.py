"""CONTRIB: who contributes to the chosen outputs of one sample, for or against.

Backward analysis of NNSlicer (Zhang, Li, Guo, Chen, Liu: "Dynamic Slicing for Deep Neural
Networks", ESEC/FSE 2020, Algorithm 1): from CONTRIB 1 on the outputs of the criterion back to
the input, each operation adds the sign of every local contribution to what it came from. An
edge's sign is the product of its factors' signs, so that nothing underflows to 0. CONTRIB is
carried as float32, which is exact below 2^24.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax import host_selection, movement, operations, passes
from nnslicer_jax.fold import Env, Rules
from nnslicer_jax.graph import Graph, Node, UnsupportedError
from nnslicer_jax.products import inverse, product
from nnslicer_jax.selection import Selection, kept
from nnslicer_jax.windows import gathering

RULES = Rules("slicing")
# From the weights an operation used to the parameters they were made of. Other functions of
# parameters alone (a product of two, say) have no single synapse for each weight.
WEIGHTS = Rules("slicing", default=lambda node, args, outs, back, how: [None] * len(args))

# Terms formed at once where products are selected on the device.
_CHUNK = 1 << 24


class Term(NamedTuple):
    """A value on one sample.

    Attributes:
      value: The activation or weight.
      delta: Activation minus its profiled mean, float32; None if it does not read the sample.
    """

    value: jax.Array
    delta: Any


def deltas(graph: Graph, env: Env, means: Mapping[int, jax.Array]) -> list[Term | None]:
    """Forward analysis: every value beside its difference from the mean.

    Args:
      graph: The traced model.
      env: Every value on one sample, as `fold.record` returns it.
      means: Value id of each neuron to its mean, broadcastable to the value.

    Returns:
      A `Term` for each value id.
    """
    found: list[Term | None] = [None if v is None else Term(v, None) for v in env]

    def neuron(ident: int) -> None:
        if ident in means:
            value = env[ident].astype(jnp.float32)
            found[ident] = Term(env[ident], value - means[ident])

    neuron(graph.input)
    for node in graph.nodes:
        if not any(node.data):
            continue
        if graph.computes(node):
            if node.key in operations.PRODUCTS and not all(
                graph.values[i].is_float for i in node.outputs
            ):
                raise UnsupportedError(f"slicing: {node} computes whole numbers, not floats")
            for ident in node.outputs:
                neuron(ident)
        else:
            terms = [found[i] or Term(env[i], None) for i in node.inputs]
            moved = movement.forward(node, [t.value for t in terms], [t.delta for t in terms])
            for ident, delta in zip(node.outputs, moved, strict=True):
                found[ident] = Term(env[ident], delta if ident in graph.carried else None)
    return found


def sign(x: jax.Array) -> jax.Array:
    """Sign of every element, float32."""
    return jnp.sign(x).astype(jnp.float32)


def edges(
    rows: jax.Array, columns: jax.Array, back: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    """Signed edges of a weighted sum, summed for each row entry and for each weight.

    Args:
      rows: `[G, P, K]` float32.
      columns: `[G, K, O]` float32; the terms of output (g, p, o) are rows times columns.
      back: `[G, P, O]` float32 in {-1, 0, 1}, multiplied into each edge's sign.
      selection: Which terms stay. Under "largest" every edge counts as +1.

    Returns:
      `[G, P, K]` and `[G, K, O]`, float32 integers.
    """
    if selection.theta is None:
        sign_rows, sign_columns = sign(rows), sign(columns)
        to_rows = sign_rows * jnp.einsum("gpo,gko->gpk", back, sign_columns)
        to_columns = sign_columns * jnp.einsum("gpk,gpo->gko", sign_rows, back)
        return to_rows, to_columns
    if selection.host:
        return host_selection.edges(rows, columns, back, selection)
    if selection.rule != "signed":
        return passes.edges(rows, columns, back, selection)

    across = columns.swapaxes(-1, -2)

    def positions(operands: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        some, signs = operands
        terms = some[:, :, None, :] * across[:, None]
        edge = jnp.where(kept(terms, selection), sign(terms), 0) * signs[..., None]
        return edge.sum(2), edge.sum(1)

    g, p, k = rows.shape
    tall = max(1, min(p, _CHUNK // (g * k * columns.shape[-1])))
    chunks = -(-p // tall)
    fill = ((0, 0), (0, chunks * tall - p), (0, 0))

    def chunked(a: jax.Array) -> jax.Array:
        return jnp.pad(a, fill).reshape(g, chunks, tall, -1).swapaxes(0, 1)

    to_rows, to_columns = jax.lax.map(positions, (chunked(rows), chunked(back)))
    to_rows = to_rows.swapaxes(0, 1).reshape(g, chunks * tall, k)[:, :p]
    return to_rows, to_columns.sum(0).swapaxes(-1, -2)


def sum_edges(terms: jax.Array, back: jax.Array, selection: Selection) -> jax.Array:
    """Signed edges of plain sums: `terms` `[..., K]`, `back` `[...]`; returns `[..., K]`."""
    stay = kept(terms, selection)
    edge = stay if selection.rule == "largest" else jnp.where(stay, sign(terms), 0)
    return edge * back[..., None]


def _back(outs: list[Term], back: list[Any]) -> jax.Array:
    return sign(back[0]) * sign(outs[0].delta)


def product_rule(node: Node, args: list[Term], back: jax.Array, selection: Selection) -> list[Any]:
    """Any weighted sum: the change of one factor under the value of the other."""
    shapes = [a.value.shape for a in args]
    form = product(node, *shapes)
    back = form.results(back)
    returned: list[Any] = [None, None]
    for side in (0, 1):
        if not node.data[side]:
            continue
        factors = [args[0].value, args[1].value]
        factors[side] = args[side].delta
        rows, columns = (f.astype(jnp.float32) for f in factors)
        to_rows, to_columns = edges(form.rows(rows), form.columns(columns), back, selection)
        found = (
            lambda to_rows=to_rows: inverse(form.rows, shapes[0], to_rows),
            lambda to_columns=to_columns: inverse(form.columns, shapes[1], to_columns),
        )
        returned[side] = found[side]()
        if not node.data[1 - side]:
            returned[1 - side] = found[1 - side]()
    return returned


@RULES.register("dot_general", "conv_general_dilated")
def _weighted_sum(node, args, outs, back, how):  # CONTRIB * dy * w_i * dx_i
    return product_rule(node, args, _back(outs, back), how)


@RULES.register("add", "add_any", "sub")
def _sum_of_two(node, args, outs, back, how):
    """Several terms: CONTRIB * dy * dx_i; adding what does not read the sample passes."""
    signs = (1.0, -1.0) if node.key == "sub" else (1.0, 1.0)
    if all(node.data):
        shape = outs[0].value.shape
        terms = [jnp.broadcast_to(s * a.delta, shape) for s, a in zip(signs, args, strict=True)]
        edge = sum_edges(jnp.stack(terms, -1), _back(outs, back), how)
        found = [edge[..., 0], edge[..., 1]]
    elif node.data[1] and node.key == "sub":
        found = [None, -_back(outs, back) * sign(args[1].delta)]
    else:
        found = [back[0] if data else None for data in node.data]
    return movement.fitted(found, args)


@RULES.register("reduce_sum", "reduce_window_sum", "cumsum")
def _sum(node, args, outs, back, how):  # CONTRIB * dy * dx_i
    gather = gathering(node)
    edge = sum_edges(gather(args[0].delta), _back(outs, back), how)
    return [inverse(gather, args[0].value.shape, edge)]


def extreme(node: Node, args: list[Term], out: jax.Array) -> jax.Array:
    """Which elements under each output of a maximum (or minimum) equal it: `[..., K]` bool."""
    fill = jnp.inf if "min" in node.key else -jnp.inf
    values = gathering(node, fill)(args[0].value)
    return values == out[..., None]


@RULES.register(
    "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min", "cummax", "cummin"
)
def _maximum(node, args, outs, back, how):  # CONTRIB * dy * dx_i where x_i = y
    gather = gathering(node)
    edge = jnp.where(extreme(node, args, outs[0].value), sign(gather(args[0].delta)), 0)
    edge = edge * _back(outs, back)[..., None]
    return [inverse(gather, args[0].value.shape, edge)]


def contributing(node: Node, args: list[Term], out: jax.Array) -> list[Any]:
    """Where each operand of `max` or `min` counts; None for one that does not read the sample.

    Of two that do, whichever equals the output, both at a tie. Against a bound that does not,
    strictly beyond it: that is a rectifier.
    """
    if all(node.data):
        return [jnp.broadcast_to(a.value == out, out.shape) for a in args]
    x, bound = args if node.data[0] else args[::-1]
    beyond = x.value > bound.value if node.key == "max" else x.value < bound.value
    return [beyond if data else None for data in node.data]


@RULES.register("max", "min")
def _maximum_of_two(node, args, outs, back, how):
    g = _back(outs, back)
    where = contributing(node, args, outs[0].value)
    found = [
        None if w is None else jnp.where(w, g * sign(a.delta), 0)
        for w, a in zip(where, args, strict=True)
    ]
    return movement.fitted(found, args)


@RULES.register("relu")
def _rectify(node, args, outs, back, how):  # CONTRIB * dy * dx where x > 0
    return [jnp.where(args[0].value > 0, _back(outs, back) * sign(args[0].delta), 0)]


@RULES.register("mul")
def _product_of_two(node, args, outs, back, how):
    """CONTRIB * dy * w * dx; of two that read the sample, each is the other's weight."""
    g = _back(outs, back)
    first, second = args
    if all(node.data):
        found = [
            g * sign(second.value) * sign(first.delta),
            g * sign(first.value) * sign(second.delta),
        ]
    else:
        weight, x = (second, first) if node.data[0] else (first, second)
        found = [g * sign(weight.value) * sign(x.delta)] * 2
    return movement.fitted(found, args)


@RULES.register("reduce_prod", "cumprod")
def _product(node, args, outs, back, how):
    """CONTRIB * dy * w * dx, the other factors together being the weight of each."""
    gather = gathering(node)
    signs = sign(gathering(node, 1.0)(args[0].value))
    zero = signs == 0
    others = jnp.where(zero, 1, signs)
    others = others * others.prod(-1, keepdims=True)
    others = jnp.where(zero.sum(-1, keepdims=True) > zero, 0, others)
    edge = others * sign(gather(args[0].delta)) * _back(outs, back)[..., None]
    return [inverse(gather, args[0].value.shape, edge)]


@RULES.register("div")
def _quotient(node, args, outs, back, how):
    """Scale by 1/c; the trace has made a / b of two that read the sample a product."""
    edge = _back(outs, back) * sign(args[1].value) * sign(args[0].delta)
    return movement.fitted([edge, edge], args)


@RULES.register("neg")
def _negative(node, args, outs, back, how):
    return [-_back(outs, back) * sign(args[0].delta)]


@RULES.register(
    *(operations.UNARY - operations.DECISIONS - {"neg"}), *(operations.NAMED_CALLS - {"relu"}),
    "atan2", "clamp", "nextafter", "pow", "rem",
)  # fmt: skip
def _elementwise(node, args, outs, back, how):  # CONTRIB * dy * dx
    if sum(node.data) != 1:
        raise UnsupportedError(f"slicing: no rule for {node} of several inputs")
    g = _back(outs, back)
    found = [g * sign(a.delta) if data else None for a, data in zip(args, node.data, strict=True)]
    return movement.fitted(found, args)


@RULES.register(*operations.DECISIONS)
def decision(node, args, outs, back, how):
    """A comparison contributes through what it selects, not by itself."""
    return [None] * len(args)


@RULES.register("select_n")
def select(node, args, outs, back, how):
    """To the operand that was selected; what selects gets nothing.

    A rectifier written `where(x > 0, x, 0)` thus passes CONTRIB on, unchanged, where x > 0.
    """
    which = args[0].value.astype(jnp.int32)
    found = [None] + [
        jnp.where(which == i, back[0], 0) if data else None for i, data in enumerate(node.data[1:])
    ]
    return movement.fitted(found, args)


@RULES.register(*(operations.MOVEMENT - {"select_n"}))
def move(node, args, outs, back, how):
    """Through the inverse movement, to whatever of the sample was moved."""
    wanted = [a.delta is not None and i in node.moved for i, a in enumerate(args)]
    # Where nothing was, the sample looks weights up (an embedding).
    return movement.backward(
        node, [a.value for a in args], back, wanted if any(wanted) else _numbers(args)
    )


@WEIGHTS.register(*operations.MOVEMENT)
def _move_weights(node, args, outs, back, how):
    return movement.backward(node, [a.value for a in args], back, _numbers(args))


def _numbers(args: list[Term]) -> list[bool]:
    return [movement.is_number(a.value) for a in args]


# They lead to norms and variances, which no synapse is.
ROOTS = frozenset({"pow", "rsqrt", "sqrt"})


@WEIGHTS.register(*(operations.ELEMENTWISE - operations.MOVEMENT - operations.DECISIONS - ROOTS))
def _made_of(node, args, outs, back, how):
    """A weight computed element by element counts for each use of a parameter of its shape.

    What divides a parameter does not count, nor what is under a root: they are norms and
    variances, which no synapse is.
    """
    shape = jnp.shape(outs[0].value)
    divided = node.key == "div" and node.param[0]
    return [
        back[0] if jnp.shape(a.value) == shape and not (divided and i == 1) else None
        for i, a in enumerate(args)
    ]
