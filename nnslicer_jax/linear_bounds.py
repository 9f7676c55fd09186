"""Linear bounds: lines put around each activation, carried back from the outputs to the inputs.

CROWN (Zhang, Weng, Chen, Hsieh, Daniel, "Efficient neural network robustness certification with
general activation functions", 2018), Fast-Lin (Weng et al., "Towards fast computation of certified
robustness for ReLU networks", 2018) and CROWN-IBP (Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning,
Hsieh, "Towards stable and efficient training of verifiably robust neural networks", 2020), for any
traced model. What is linear goes back through the transpose of the node itself; an operation that
has an interval rule but no lines is met by its interval. Departing from its paper, CROWN also
intersects what it finds of a value with its interval bounds.

The bounds are not rounded outward. In float32 they are off by about the rounding error of the
logits; to certify, trace and run in float64 (`jax.enable_x64`).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax import interval, operations, relaxation
from nnslicer_jax.evaluation import run_quick
from nnslicer_jax.fold import Env, Rules, backward
from nnslicer_jax.graph import Graph, Node
from nnslicer_jax.interval import Interval, Run, ends, precise
from nnslicer_jax.relaxation import Lines, Slope
from nnslicer_jax.windows import gathering

# Numbers held at once while values inside the model are bounded, for each array of coefficients.
_HELD = 1 << 26

# A row's coefficients on each operand, [b, M, ...] with b = B or, while no sample matters, 1;
# and the terms that end here: coefficients [b, M, ...] on something in an interval [B, ...].
Step = tuple[list[Any], list[tuple[jax.Array, Interval]]]


class Method(NamedTuple):
    """How activations are bounded.

    Attributes:
      slope: Below an unstable ReLU; None: every activation is met by its interval.
      parallel: Whether both lines have one slope, so that one walk gives both bounds.
      inner: Whether the intervals of values inside the model come from linear bounds too.
      intersect: Whether these are intersected with interval bounds.
    """

    slope: Slope | None
    parallel: bool
    inner: bool
    intersect: bool


_METHODS = {
    "crown": Method(relaxation.steepest, False, True, True),
    "crown-ibp": Method(relaxation.steepest, False, False, False),
    "fast-lin": Method(relaxation.same, True, True, False),
    "ibp": Method(None, True, False, False),
}


class Walk(NamedTuple):
    """What every step knows."""

    graph: Graph
    method: Method


def linear_bounds(
    graph: Graph,
    params: Any,
    lower: jax.Array,
    upper: jax.Array,
    rows: jax.Array,
    *,
    method: str = "crown",
) -> jax.Array:
    """Lower bounds of `rows @ logits` for every sample in a box.

    Pure and traceable: put it under `jit`, `grad` or a sharding.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      lower: `[B, ...]`, the lowest of each input.
      upper: `[B, ...]`, the highest of each input, at least `lower`.
      rows: `[M, K]`, or `[B, M, K]` for rows of each sample's own: sums of logits to bound, such
        as `margin_rows`.
      method: "crown": intervals inside the model by CROWN too; "fast-lin": the same with
        parallel lines; "crown-ibp": CROWN from the logits back, intervals inside the model by
        interval bounds; "ibp": interval bounds, the last linear layers merged with the rows.

    Returns:
      Lower bounds `[B, M]`, -inf where nothing is known.

    Raises:
      ValueError: For a wrong shape, an empty box, or an unknown method.
      UnsupportedError: For an operation that has no rule.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, not {method!r}")
    walk = Walk(graph, _METHODS[method])
    box = Interval(lower, upper)
    env = interval.propagate(graph, params, box)
    rows = check_rows(graph, rows, len(lower))
    if walk.method.inner:
        env = _tightened(walk, env)
    return jnp.broadcast_to(known(_bounds(walk, env, rows).lower), (len(lower), rows.shape[1]))


def margin_rows(labels: jax.Array, num_classes: int) -> jax.Array:
    """Rows that take the margins of the logits: that of the label less that of each other class.

    Args:
      labels: `[B]` integers, 0..num_classes - 1.
      num_classes: K, at least 2.

    Returns:
      `[B, K - 1, K]` float32; the other classes in ascending order.
    """
    others = jnp.arange(num_classes - 1)[None]
    others = others + (others >= labels[:, None])
    own = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return own[:, None] - jax.nn.one_hot(others, num_classes, dtype=jnp.float32)


def check_rows(graph: Graph, rows: Any, size: int) -> jax.Array:
    """The rows as `[b, M, ...]`, shaped like the logits, or ValueError."""
    shape = graph.values[graph.logits].shape
    rest = shape[shape[:1] == (1,) :]
    count = math.prod(rest)
    given = jnp.shape(rows)
    if len(given) not in (2, 3) or given[-1] != count or (len(given) == 3 and given[0] != size):
        raise ValueError(f"rows must have shape [M, {count}] or [{size}, M, {count}], not {given}")
    dtype = graph.values[graph.logits].dtype
    return jnp.asarray(rows, dtype).reshape(given[0] if len(given) == 3 else 1, -1, *rest)


def known(lower: jax.Array) -> jax.Array:
    """A lower bound; NaN comes of infinities: nothing is known there."""
    return jnp.where(jnp.isnan(lower), -jnp.inf, lower)


# The walk ------------------------------------------------------------------------------------


def _bounds(walk: Walk, env: Env, seed: jax.Array, value: int | None = None) -> Interval:
    """Bounds of rows of a value, which is the logits unless said; upper ones if parallel.

    Args:
      walk: The graph and the method.
      env: The interval or array of each value before it.
      seed: Rows, `[b, M, ...]`.
      value: Value id.

    Returns:
      `[B, M]`, or `[1, M]` where no sample matters.
    """
    value = walk.graph.logits if value is None else value
    if not isinstance(env[value], Interval):
        fixed = _dot(seed, env[value].reshape(1, *seed.shape[2:]))
        return Interval(fixed, fixed)
    terms: list[tuple[jax.Array, Interval]] = []

    def step(node, args, outs, back, context):
        rule = RULES[node] if _carries(walk.graph, node) else _met
        found, ended = rule(node, args, outs, back, walk)
        terms.extend(ended)
        return found

    steps = Rules(RULES.interpretation, default=step)
    total = backward(walk.graph, steps, env, {value: seed})
    if walk.graph.input in total:
        terms.append((total[walk.graph.input], env[walk.graph.input]))
    found = [_over(*term) for term in terms]
    return Interval(*(functools.reduce(jnp.add, terms) for terms in zip(*found, strict=True)))


def _carries(graph: Graph, node: Node) -> bool:
    """Whether lines can go through a node: whole numbers, which may wrap, have their interval."""
    if node.key in operations.IDENTITY or node.key == operations.CUSTOM_DERIVATIVE:
        return True
    read = [i for i, data in zip(node.inputs, node.data, strict=True) if data]
    return all(graph.values[i].is_float for i in (*read, *node.outputs))


def _over(rows: jax.Array, x: Interval) -> Interval:
    """The least and most of `rows @ x`, `[B, M]`, over an interval."""
    middle = _dot(rows, x.centre)
    if x.lower is x.upper:
        return Interval(middle, middle)
    spread = _dot(jnp.abs(rows), x.radius)
    return Interval(middle - spread, middle + spread)


def _dot(rows: jax.Array, x: jax.Array) -> jax.Array:
    """`[b, M, ...]` times `[c, ...]`: `[max(b, c), M]`."""
    flat = rows.reshape(*rows.shape[:2], -1)
    return jnp.matmul(flat, x.reshape(len(x), -1, 1), precision="highest")[..., 0]


def _tightened(walk: Walk, env: Env) -> Env:
    """Intervals of the values that activations read, by walks of their own."""
    graph = walk.graph
    env, exact = list(env), _exact(graph)
    for node in graph.nodes:
        if not any(node.data):
            continue
        if not is_linear(graph, node):
            for ident in node.inputs:
                value = graph.values[ident]
                if value.data and value.is_float and ident not in exact:
                    env[ident] = _inner(walk, env, ident)
                    exact.add(ident)
        outs = interval.bounded(graph, False, node, *[env[i] for i in node.inputs])
        for ident, out in zip(node.outputs, outs, strict=True):
            env[ident] = out
    return env


def _inner(walk: Walk, env: Env, ident: int) -> Interval:
    """Bounds of every number of one value."""
    start: Interval = env[ident]
    size, shape = start.lower[0].size, start.lower.shape
    # Coefficients live on the values below; the largest bounds the rows that go at once.
    below = [math.prod(v.shape) for v in walk.graph.values[: ident + 1] if v.data]
    chunk = min(size, max(1, _HELD // (len(start.lower) * max(below))))

    def some(places: jax.Array) -> Interval:
        rows = jax.nn.one_hot(places, size, dtype=start.lower.dtype)
        rows = rows.reshape(1, -1, *shape[1:])
        found = _bounds(walk, env, rows, ident)
        if walk.method.parallel:
            return found
        return Interval(found.lower, -_bounds(walk, env, -rows, ident).lower)

    if chunk == size:
        found = some(jnp.arange(size))
    else:
        count = -(-size // chunk)
        places = jnp.arange(count * chunk).reshape(count, chunk)
        parts = jax.lax.map(some, places)
        found = Interval(*(jnp.moveaxis(p, 0, 1).reshape(p.shape[1], -1) for p in parts))
    found = Interval(*(jnp.broadcast_to(e[:, :size], (shape[0], size)) for e in found))
    found = Interval(*(end.reshape(shape) for end in found))
    if not walk.method.intersect:
        return found
    return Interval(jnp.fmax(found.lower, start.lower), jnp.fmin(found.upper, start.upper))


def _exact(graph: Graph) -> set[int]:
    """Values whose interval no walk can improve.

    The sample, one linear operation on it, activations of such, and what moves or scales these.
    """
    box, exact = {graph.input}, {graph.input}
    for node in graph.nodes:
        read = [i for i, data in zip(node.inputs, node.data, strict=True) if data]
        if not read:
            continue
        alone = len(read) == 1 and read[0] in exact
        if is_linear(graph, node):
            apart = node.key in _APART
            if len(read) == 1 and read[0] in box:
                exact.update(node.outputs)
                if apart:
                    box.update(node.outputs)
            elif (alone and (apart or node.key in operations.REARRANGE)) or (
                node.key == operations.CUSTOM_DERIVATIVE
                and set(node.inputs[-len(node.outputs) :]) <= exact
            ):
                exact.update(node.outputs)
        else:
            exact.update(node.outputs)
    return exact


# Steps ---------------------------------------------------------------------------------------

# Linear, and each number of the result comes of one number that no other comes of.
_APART = operations.IDENTITY | {
    "add", "concatenate", "div", "expand_dims", "mul", "neg", "pad", "reshape", "rev", "slice",
    "split", "squeeze", "stack", "sub", "transpose",
}  # fmt: skip
_PRODUCTS = {"conv_general_dilated", "div", "dot_general", "mul"}
_LINEAR = (operations.MOVEMENT - operations.ORDER) | _PRODUCTS | {
    "add", "add_any", "cumsum", "neg", "reduce_sum", "reduce_window_sum", "sub",
}  # fmt: skip


def is_linear(graph: Graph, node: Node) -> bool:
    """Whether a node is affine in the operands that read the sample, all of them floats."""
    if node.key not in _LINEAR:
        return False
    if node.key == operations.CUSTOM_DERIVATIVE:
        return True
    if not all(graph.values[i].is_float for i in node.outputs):
        return False
    if node.key in operations.IDENTITY:
        return True
    read = [i for i, data in enumerate(node.data) if data]
    if not all(graph.values[node.inputs[i]].is_float for i in read):
        return False
    if node.key in _PRODUCTS:
        return len(read) == 1 and not (node.key == "div" and read == [1])
    return node.key not in operations.MOVEMENT or all(i in node.moved for i in read)


def _met(
    node: Node, args: Sequence[Any], outs: Sequence[Any], back: Sequence[Any], walk: Walk
) -> Step:
    """The node's interval, whatever its operands."""
    terms = [(rows, out) for rows, out in zip(back, outs, strict=True) if rows is not None]
    return [None] * len(args), terms


def _activation(
    node: Node, args: Sequence[Any], outs: Sequence[Any], back: Sequence[Any], walk: Walk
) -> Step:
    """Between the lines of a function of one operand, if there are any."""
    slots = [i for i, data in enumerate(node.data) if data]
    if node not in relaxation.RULES or len(slots) > 1:
        return _met(node, args, outs, back, walk)
    run, slot = functools.partial(run_quick, walk.graph, node), slots[0]

    def f(x: jax.Array) -> jax.Array:
        return run(*args[:slot], x, *args[slot + 1 :])[0]

    return _between(node, f, slot, args, outs, back, walk)


def _between(
    node: Node,
    f: relaxation.Function,
    slot: int,
    args: Sequence[Any],
    outs: Sequence[Any],
    back: Sequence[Any],
    walk: Walk,
) -> Step:
    x, out = args[slot], outs[0]
    if walk.method.slope is None or x.lower.shape != out.lower.shape:
        return _met(node, args, outs, back, walk)
    lines = relaxation.RULES[node](node, f, x, out, walk.method.slope)
    if walk.method.parallel and not lines.parallel:
        return _met(node, args, outs, back, walk)
    found: list[Any] = [None] * len(args)
    found[slot], term = _under(lines, back[0])
    return found, [term]


def _under(lines: Lines, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Interval]]:
    """Coefficients on x that bound those on f(x) from below, and the term that ends here.

    A negative coefficient takes the line above, another the line below.
    """
    if lines.parallel:
        return rows * lines.lower[:, None], (rows, lines.offset)
    slopes = jnp.where(rows > 0, lines.lower[:, None], lines.upper[:, None])
    return slopes * rows, (rows, lines.offset)


RULES = Rules("linear bounds", default=_activation)


@RULES.register(operations.CUSTOM_DERIVATIVE)
def _body(node, args, outs, back, walk):
    return [None] * (len(args) - len(back)) + list(back), []


@RULES.register(*operations.IDENTITY)
def _identity(node, args, outs, back, walk):
    if not is_linear(walk.graph, node):
        return _met(node, args, outs, back, walk)
    found = [rows if data else None for rows, data in zip(back, node.data, strict=True)]
    return found, []


@RULES.register(*(_LINEAR - operations.IDENTITY - {operations.CUSTOM_DERIVATIVE, "mul"}))
def _linear(node, args, outs, back, walk):
    """Back through the transpose of the node; what it adds ends here."""
    if not is_linear(walk.graph, node):
        return _met(node, args, outs, back, walk)
    read = [i for i, data in enumerate(node.data) if data]
    run = functools.partial(run_quick, walk.graph, precise(node))

    def affine(*xs: jax.Array) -> tuple[jax.Array, ...]:
        operands = list(args)
        for i, x in zip(read, xs, strict=True):
            operands[i] = x
        return run(*operands)

    def zeros(size: int) -> list[jax.Array]:
        ends = [args[i].lower for i in read]
        return [jnp.zeros((size, *end.shape[1:]), end.dtype) for end in ends]

    given = [rows for rows in back if rows is not None]
    b, m = max(len(rows) for rows in given), given[0].shape[1]
    rows = [
        jnp.zeros((b * m, *out.lower.shape[1:]), out.lower.dtype)
        if r is None
        else jnp.broadcast_to(r, (b, *r.shape[1:])).reshape(b * m, *r.shape[2:])
        for r, out in zip(back, outs, strict=True)
    ]
    if node.key == "conv_general_dilated":
        backs = (_deconvolved(run, read[0], args, rows[0]),)
    else:
        _, pull = jax.vjp(affine, *zeros(b * m))
        backs = pull(tuple(rows))
    found = [None] * len(args)
    for i, one in zip(read, backs, strict=True):
        found[i] = one.reshape(b, m, *one.shape[1:])
    if all(node.data) or node.key in _PRODUCTS:
        return found, []
    added = affine(*zeros(1))
    terms = [(r, Interval(o, o)) for r, o in zip(back, added, strict=True) if r is not None]
    return found, terms


def _deconvolved(run: Run, slot: int, args: Sequence[Any], rows: jax.Array) -> jax.Array:
    """Rows through the transpose of a convolution, with gradients in the form XLA is fast at.

    As `<back(rows, w), g> = <rows, run(g, w)>`, gradients of the transpose are those of the
    convolution itself. Derived from the transpose they would be convolutions of dilated rows, which
    take four times as long on a CPU.
    """
    one, weights = args[slot].lower, args[1 - slot]

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return run(*((x, w) if slot == 0 else (w, x)))[0]

    @jax.custom_vjp
    def back(rows: jax.Array, w: jax.Array) -> jax.Array:
        zeros = jnp.zeros((len(rows), *one.shape[1:]), one.dtype)
        _, pull = jax.vjp(lambda x: forward(x, w), zeros)
        return pull(rows)[0]

    def saved(rows: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        return back(rows, w), (rows, w)

    def gradients(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows, w = kept
        to_rows, pull = jax.vjp(lambda v: forward(g, v), w)
        return to_rows, pull(rows)[0]

    back.defvjp(saved, gradients)
    return back(rows, weights)


@RULES.register("max", "min")
def _larger_of_two(node, args, outs, back, walk):
    """`max(x, y) = y + max(x - y, 0)`, `min(x, y) = x - max(x - y, 0)`."""
    shape = outs[0].lower.shape
    if walk.method.slope is None or any(
        a.lower.shape != shape for a in args if isinstance(a, Interval)
    ):
        return _met(node, args, outs, back, walk)
    x, y = (a if isinstance(a, Interval) else ends(everywhere(a, shape)) for a in args)
    lines = relaxation.rectified(Interval(x.lower - y.upper, x.upper - y.lower), walk.method.slope)
    rows = back[0]
    if node.key == "max":
        on_x, term = _under(lines, rows)
        on_y = rows - on_x
    else:
        down, term = _under(lines, -rows)
        on_x, on_y = rows + down, -down
    found, terms = [None, None], [term]
    for i, (on, operand) in enumerate(zip((on_x, on_y), (x, y), strict=True)):
        if node.data[i]:
            found[i] = on
        else:
            terms.append((on, operand))
    return found, terms


def everywhere(a: Any, shape: tuple[int, ...]) -> jax.Array:
    """An operand that does not read the sample, for samples of a shape: `[1, ...]`.

    An infinity is taken as the lowest or highest number, which 0 times is 0.
    """
    a = jnp.asarray(a)
    one, about = (1, *shape[1:]), jnp.finfo(a.dtype)
    a = jnp.clip(a, about.min, about.max)
    return jnp.broadcast_to(a.reshape(one) if a.ndim else a, one)


@RULES.register("mul")
def _product(node, args, outs, back, walk):
    """McCormick's planes, or with one slope: `x y` about the product of the centres."""
    if is_linear(walk.graph, node):
        return _linear(node, args, outs, back, walk)
    x, y = (ends(a) for a in args)
    if node.inputs[0] == node.inputs[1]:
        return _between(node, jnp.square, 0, args, outs, back, walk)
    if walk.method.slope is None or not x.lower.shape == y.lower.shape == outs[0].lower.shape:
        return _met(node, args, outs, back, walk)
    rows = back[0]
    if walk.method.parallel:
        middle, width = -x.centre * y.centre, x.radius * y.radius
        found = [rows * y.centre[:, None], rows * x.centre[:, None]]
        return found, [(rows, Interval(middle - width, middle + width))]
    along_x = jnp.where(rows > 0, y.lower[:, None], y.upper[:, None])
    offset = Interval(-x.lower * y.lower, -x.lower * y.upper)
    return [along_x * rows, x.lower[:, None] * rows], [(rows, offset)]


@RULES.register(
    "cummax", "cummin", "reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min"
)
def _maximum(node, args, outs, back, walk):
    """Above the operand whose lower end is highest; that one itself where it is above all others.

    Elsewhere below the highest upper end.
    """
    if walk.method.slope is None or walk.method.parallel:
        return _met(node, args, outs, back, walk)
    shape = walk.graph.values[node.inputs[0]].shape
    rest = outs[0].lower.shape[1:]
    side = -1.0 if "min" in node.key else 1.0

    def terms(x: jax.Array, fill: float = 0.0) -> jax.Array:
        each = jax.vmap(gathering(node, fill))(x.reshape(len(x), *shape))
        return each.reshape(len(x), *rest, each.shape[-1])

    x = args[0]
    low, high = (x.lower, x.upper) if side > 0 else (-x.upper, -x.lower)
    lows, highs = terms(low, -jnp.inf), terms(high, -jnp.inf)
    chosen = jax.nn.one_hot(lows.argmax(-1), lows.shape[-1], dtype=low.dtype)
    others = jnp.where(chosen > 0, -jnp.inf, highs).max(-1)
    alone = others <= lows.max(-1)
    rows = side * back[0]
    on = jnp.where((rows > 0) | alone[:, None], rows, 0)
    spread = on[..., None] * chosen[:, None]
    b, m = spread.shape[:2]
    one = jax.ShapeDtypeStruct((b * m, *x.lower.shape[1:]), low.dtype)
    (found,) = jax.linear_transpose(terms, one)(spread.reshape(b * m, *spread.shape[2:]))
    found = side * found.reshape(b, m, *found.shape[1:])
    top = jnp.where(alone, 0, highs.max(-1))
    return [found], [(rows - on, Interval(top, top))]
