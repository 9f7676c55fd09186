"""Interval bounds on every value of a model, for a box of inputs.

Interval bound propagation as in Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic,
Mann, Kohli, "On the effectiveness of interval bound propagation for training verifiably robust
models", 2018, for any traced model. Whole batches are carried, as in `evaluation`.

Rounded outward, bounds hold for the model in the real numbers, and for the model in floating point
whatever the order of its sums: each operation adds its worst-case rounding error, elementary
functions being taken to be right to 16 units in the last place. Otherwise they are what floating
point makes of the formulas, off by about the rounding error of the model itself.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import operations
from nnslicer_jax.evaluation import run_quick
from nnslicer_jax.fold import Env, Rules, check_batch, forward, leaves
from nnslicer_jax.graph import Graph, Node, UnsupportedError

Run = Callable[..., tuple[jax.Array, ...]]  # The node as a function of batches.

RULES = Rules("interval bounds")


class Interval(NamedTuple):
    """Elementwise lower <= value <= upper.

    Attributes:
      lower: `[B, ...]`, -inf where nothing is known.
      upper: `[B, ...]`, inf where nothing is known.
    """

    lower: jax.Array
    upper: jax.Array

    # Halved first, as the lowest numbers that stand for -inf must not overflow.
    @property
    def centre(self) -> jax.Array:
        """What lies halfway."""
        return self.lower / 2 + self.upper / 2

    @property
    def radius(self) -> jax.Array:
        """How far the ends are from the centre."""
        return self.upper / 2 - self.lower / 2


def interval_bounds(
    graph: Graph, params: Any, lower: jax.Array, upper: jax.Array, *, outward: bool = False
) -> Interval:
    """Bounds on the logits for every sample in a box.

    Pure and traceable: put it under `jit`, `grad` or a sharding.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      lower: `[B, ...]`, the lowest of each input.
      upper: `[B, ...]`, the highest of each input, at least `lower`.
      outward: Whether to round outward, so that no rounding error can make a bound wrong; takes
        half as long again.

    Returns:
      Lower and upper bounds `[B, K]` of the logits.

    Raises:
      ValueError: For a wrong shape, an empty box, or params of another structure.
      UnsupportedError: For an operation that has no rule.
    """
    env = propagate(graph, params, Interval(lower, upper), outward)
    return _settled(env[graph.logits], graph.values[graph.logits].shape[1:], len(lower))


def neuron_bounds(
    graph: Graph, params: Any, lower: jax.Array, upper: jax.Array, *, outward: bool = False
) -> dict[str, Interval]:
    """Bounds on every neuron for every sample in a box.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      lower: `[B, ...]`, the lowest of each input.
      upper: `[B, ...]`, the highest of each input, at least `lower`.
      outward: As in `interval_bounds`.

    Returns:
      Lower and upper bounds `[B, ...]` by neuron name, shaped as `graph.neurons()` lists them.

    Raises:
      ValueError: As `interval_bounds`.
      UnsupportedError: As `interval_bounds`.
    """
    env = propagate(graph, params, Interval(lower, upper), outward)
    return {
        name: _settled(env[neuron.value], neuron.shape, len(lower))
        for name, neuron in graph.neurons().items()
    }


def propagate(graph: Graph, params: Any, box: Interval, outward: bool = False) -> Env:
    """The interval of every value that reads the sample, and the array of every other.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      box: Ends `[B, ...]` of the inputs.
      outward: As in `interval_bounds`.

    Returns:
      For each value id, an `Interval` of ends `[B, ...]`, or an array.

    Raises:
      ValueError: As `interval_bounds`.
      UnsupportedError: As `interval_bounds`.
    """
    check_box(graph, box)
    box = Interval(jnp.asarray(box.lower), jnp.asarray(box.upper))
    rules = Rules(RULES.interpretation, default=functools.partial(bounded, graph, outward))
    return forward(graph, rules, [*leaves(graph, params), box])


def bounded(graph: Graph, outward: bool, node: Node, *args: Any) -> tuple[Interval, ...]:
    """The interval of each output of one node.

    Args:
      graph: The traced model.
      outward: As in `interval_bounds`.
      node: A node that reads the sample.
      args: For each operand, its `Interval` or its array.
    """
    run = functools.partial(run_quick, graph, precise(node))
    outs = RULES[node](node, run, *args)
    if node.key in _ARITHMETIC and not jnp.issubdtype(outs[0].lower.dtype, jnp.floating):
        return (_fitted(graph, node, run, args, *outs),)
    return tuple(_widened(graph, node, run, args, out) for out in outs) if outward else outs


def precise(node: Node) -> Node:
    """The node at the highest precision, which bounds need on accelerators too."""
    if "precision" not in node.params:
        return node
    highest = jax.lax.Precision.HIGHEST
    return dataclasses.replace(node, params={**node.params, "precision": (highest, highest)})


def check_box(graph: Graph, box: Interval) -> None:
    """Raises ValueError unless the ends are batches of the traced shape, in order."""
    for name, end in zip(box._fields, box, strict=True):
        try:
            check_batch(graph, end)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    lower, upper = box
    if lower.shape != upper.shape:
        raise ValueError(
            f"lower and upper must have one shape, not {tuple(lower.shape)} and "
            f"{tuple(upper.shape)}"
        )
    known = not any(isinstance(end, jax.core.Tracer) for end in box)
    if known and not np.all(np.asarray(lower) <= np.asarray(upper)):
        raise ValueError("lower must be at most upper everywhere, and neither may hold NaN")


def ends(x: Any) -> Interval:
    """The interval of an operand, also of one that does not read the sample."""
    return x if isinstance(x, Interval) else Interval(x, x)


def _settled(x: Any, shape: tuple[int, ...], size: int) -> Interval:
    """A result's ends, one row a sample. NaN comes of infinities: nothing is known there."""
    if not isinstance(x, Interval):
        return Interval(*(jnp.broadcast_to(jnp.reshape(x, shape), (size, *shape)),) * 2)
    lower, upper = (end.reshape(size, *shape) for end in x)
    if jnp.issubdtype(lower.dtype, jnp.floating):
        lower = jnp.where(jnp.isnan(lower), -jnp.inf, lower)
        upper = jnp.where(jnp.isnan(upper), jnp.inf, upper)
    return Interval(lower, upper)


def _lowers(args: Sequence[Any]) -> list[Any]:
    return [ends(a).lower for a in args]


def _uppers(args: Sequence[Any]) -> list[Any]:
    return [ends(a).upper for a in args]


# Monotone ------------------------------------------------------------------------------------

_RISING = frozenset({
    "acosh", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "clip", "erf", "erf_inv", "exp",
    "exp2", "expm1", "floor", "hard_sigmoid", "hard_tanh", "log1p", "log_sigmoid", "logistic",
    "relu", "relu6", "round", "sigmoid", "sign", "sinh", "soft_sign", "softplus", "squareplus",
    "tanh",
})  # fmt: skip
_FALLING = frozenset({"acos", "erfc", "neg", "not"})


@RULES.register(
    *_RISING, "add", "add_any", "clamp", "cumlogsumexp", "cummax", "cummin", "cumsum", "max", "min",
    "reduce_max", "reduce_min", "reduce_sum", "reduce_window_max", "reduce_window_min",
    "reduce_window_sum",
)  # fmt: skip
def _rising(node, run, *args):
    """Rising in every operand: lower ends make the lower end."""
    return tuple(map(Interval, run(*_lowers(args)), run(*_uppers(args))))


@RULES.register(*_FALLING)
def _falling(node, run, *args):
    return tuple(map(Interval, run(*_uppers(args)), run(*_lowers(args))))


@RULES.register("log", "rsqrt", "sqrt")
def _of_positive(node, run, x):
    """What lies below 0 is slack of the bounds: the model takes roots and logarithms of others."""
    (low,), (high,) = run(jnp.maximum(x.lower, 0)), run(jnp.maximum(x.upper, 0))
    return (Interval(high, low) if node.key == "rsqrt" else Interval(low, high),)


@RULES.register("sub")
def _difference(node, run, a, b):
    a, b = ends(a), ends(b)
    (lower,), (upper,) = run(a.lower, b.upper), run(a.upper, b.lower)
    return (Interval(lower, upper),)


@RULES.register(operations.CUSTOM_DERIVATIVE)
def _body(node, run, *args):
    return tuple(ends(a) for a in args[len(args) - len(node.outputs) :])


@RULES.register(*(operations.MOVEMENT - operations.ORDER - {
    operations.CUSTOM_DERIVATIVE, "convert_element_type", "select_n"}), "sort")  # fmt: skip
def _moved(node, run, *args):
    """Moved data keep their order, sorted data too; places that the sample names are not known."""
    placed = any(data for i, data in enumerate(node.data) if i not in node.moved)
    if placed or (node.key == "sort" and len(args) > 1):
        raise UnsupportedError(f"{RULES.interpretation}: no rule for {node} by the sample")
    return _rising(node, run, *args)


# Products ------------------------------------------------------------------------------------


@RULES.register("mul", "div")
def _product(node, run, a, b):
    """Extreme at the corners."""
    if node.inputs[0] == node.inputs[1]:
        return _turning(node, lambda x: run(x, x), a)
    corners = [run(x, y)[0] for x in set_of(a) for y in set_of(b)]
    if node.key == "div" and node.data[1]:
        raise UnsupportedError(f"{RULES.interpretation}: no rule for {node} of whole numbers")
    return (
        Interval(functools.reduce(jnp.minimum, corners), functools.reduce(jnp.maximum, corners)),
    )


def set_of(x: Any) -> tuple[jax.Array, ...]:
    """The ends of an interval; an array alone."""
    return tuple(x) if isinstance(x, Interval) else (x,)


@RULES.register("dot_general", "conv_general_dilated")
def _weighted_sum(node, run, a, b):
    """Centres are multiplied; `|W|` carries the radius."""
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (*set_of(a), *set_of(b))):
        raise UnsupportedError(f"{RULES.interpretation}: no rule for {node} of whole numbers")
    (centre_a, radius_a), (centre_b, radius_b) = _centred(a), _centred(b)
    (centre,) = run(centre_a, centre_b)
    if radius_b is None:
        (radius,) = run(radius_a, jnp.abs(centre_b))
    elif radius_a is None:
        (radius,) = run(jnp.abs(centre_a), radius_b)
    else:
        # |ab - cd| <= |c| r + r (|d| + r), which need not be reached.
        (left,) = run(jnp.abs(centre_a), radius_b)
        (right,) = run(radius_a, jnp.abs(centre_b) + radius_b)
        radius = left + right
    return (Interval(centre - radius, centre + radius),)


def _centred(x: Any) -> tuple[jax.Array, jax.Array | None]:
    if not isinstance(x, Interval):
        return x, None
    return x.centre, x.radius


# Functions that turn -------------------------------------------------------------------------

# Where a function that is monotone on either side turns, if it does.
_TURNS = {
    "abs": 0.0, "celu": 0.0, "cosh": 0.0, "elu": 0.0, "hard_silu": -1.5, "leaky_relu": 0.0,
    "mish": -1.1924491, "selu": 0.0, "silu": -1.2784645, "square": 0.0,
}  # fmt: skip


@RULES.register(*_TURNS)
def _turning(node, run, x, *settings):
    """Extreme at an end or where it turns; a slope of either sign may stand on either side."""
    turn = jnp.asarray(_TURNS.get(node.key, 0.0), x.lower.dtype)
    points = [run(p, *settings)[0] for p in (*x, jnp.clip(turn, x.lower, x.upper))]
    return (Interval(functools.reduce(jnp.minimum, points), functools.reduce(jnp.maximum, points)),)


@RULES.register("integer_pow")
def _power(node, run, x):
    y = node.params["y"]
    if y >= 0:
        return _turning(node, run, x) if y % 2 == 0 else _rising(node, run, x)
    # Nothing is known of 1/x where x may be 0.
    ((low,), (high,)), known = map(run, x), (x.lower > 0) | (x.upper < 0)
    return (
        Interval(
            jnp.where(known, jnp.minimum(low, high), -jnp.inf),
            jnp.where(known, jnp.maximum(low, high), jnp.inf),
        ),
    )


@RULES.register("cos", "sin")
def _wave(node, run, x):
    """Extreme at an end, or at a crest or trough in between."""
    (low,), (high,) = map(run, x)

    def within(start: float) -> jax.Array:
        """Whether start + 2 pi k is in the interval; rounding may say yes a little too often."""
        slack = 1e-5
        first = jnp.ceil((x.lower - start) / (2 * math.pi) - slack)
        return first <= (x.upper - start) / (2 * math.pi) + slack

    crest = math.pi / 2 if node.key == "sin" else 0.0
    lower = jnp.where(within(crest + math.pi), -1.0, jnp.minimum(low, high))
    upper = jnp.where(within(crest), 1.0, jnp.maximum(low, high))
    return (Interval(lower.astype(low.dtype), upper.astype(low.dtype)),)


# Whole numbers, which wrap where they do not fit their type ------------------------------------

# What may not fit.
_ARITHMETIC = {
    "abs", "add", "add_any", "cumsum", "div", "integer_pow", "mul", "neg", "reduce_sum",
    "reduce_window_sum", "square", "sub",
}  # fmt: skip


@RULES.register("convert_element_type")
def _cast(node, run, x):
    """Rising, but to a bool, which asks whether a number is not 0."""
    (low,), (high,) = map(run, x)
    given, kind = x.lower.dtype, low.dtype
    if kind == jnp.bool_ != given:
        # NaN for an end leaves it open.
        beside = (x.lower <= x.upper) & ((x.lower > 0) & low | (x.upper < 0) & high)
        return (Interval(beside, low | high),)
    if given == jnp.bool_ or jnp.issubdtype(kind, jnp.floating):
        return (Interval(low, high),)
    return (_if_it_fits(x, Interval(low, high)),)


def _if_it_fits(real: Interval, whole: Interval) -> Interval:
    """Whole numbers where the real ones fit their type; elsewhere any, as XLA promises none."""
    about = jnp.iinfo(whole.lower.dtype)
    # As floats, which compare with every type; 2 ** bits is one, the highest whole number may not.
    fits = (real.lower >= float(about.min)) & (real.upper < float(about.max) + 1)
    least, most = (jnp.asarray(end, whole.lower.dtype) for end in (about.min, about.max))
    return Interval(jnp.where(fits, whole.lower, least), jnp.where(fits, whole.upper, most))


def _fitted(graph: Graph, node: Node, run: Run, args: Sequence[Any], out: Interval) -> Interval:
    """The interval of whole numbers, wherever those of floats say that the node cannot wrap."""
    floats = [
        Interval(*(end.astype(float) for end in a)) if isinstance(a, Interval)
        else jnp.asarray(a, float)
        for a in args
    ]  # fmt: skip
    (real,) = RULES[node](node, run, *floats)
    return _if_it_fits(_widened(graph, node, run, floats, real), out)


# Decisions: lower says "certainly", upper says "possibly" -------------------------------------


@RULES.register("and", "or", "reduce_and", "reduce_or")
def _logic(node, run, *args):
    """Rising, of decisions; the bits of whole numbers are not."""
    if any(ends(a).lower.dtype != jnp.bool_ for a in args):
        raise UnsupportedError(f"{RULES.interpretation}: no rule for {node} of whole numbers")
    return _rising(node, run, *args)


@RULES.register("gt", "ge", "lt", "le")
def _comparison(node, run, a, b):
    a, b = ends(a), ends(b)
    above = node.key in ("gt", "ge")
    low, high = run(a.lower, b.upper)[0], run(a.upper, b.lower)[0]
    certain, possible = (low, high) if above else (high, low)
    # An unknown end, NaN, leaves the comparison open.
    unknown = jnp.isnan(a.lower + a.upper + b.lower + b.upper)
    return (Interval(certain & ~unknown, possible | unknown),)


@RULES.register("select_n")
def _selected(node, run, which, *cases):
    """Where the choice is open, either case may be taken."""
    if not node.data[0]:
        return _rising(node, run, which, *cases)
    if which.lower.dtype != bool:
        raise UnsupportedError(f"{RULES.interpretation}: no rule for {node} by a number")
    lowers = [run(choice, *_lowers(cases))[0] for choice in which]
    uppers = [run(choice, *_uppers(cases))[0] for choice in which]
    return (Interval(jnp.minimum(*lowers), jnp.maximum(*uppers)),)


# Rounding ------------------------------------------------------------------------------------

_EXACT = (operations.MOVEMENT - {"convert_element_type", "reduce_precision"}) | (
    operations.DECISIONS
) | {
    "abs", "ceil", "clamp", "clip", "cummax", "cummin", "floor", "max", "min", "neg", "reduce_and",
    "reduce_max", "reduce_min", "reduce_or", "reduce_window_max", "reduce_window_min", "relu",
    "relu6", "round", "sign",
}  # fmt: skip
_SUMS = {
    "conv_general_dilated", "cumsum", "dot_general", "reduce_sum", "reduce_window_sum",
}  # fmt: skip
# Elementary functions are taken to be this right, in units in the last place.
_UNITS = 16
# Further roundings that a sum may meet: of weights folded into it, and of its ends.
_MORE = 8


def _widened(graph: Graph, node: Node, run: Run, args: Sequence[Any], out: Interval) -> Interval:
    """An interval that the node's rounding error, in the model and in its bounds, cannot leave."""
    if node.key in _EXACT or not jnp.issubdtype(out.lower.dtype, jnp.floating):
        return out
    about = jnp.finfo(out.lower.dtype)
    if node.key in _SUMS:
        # A sum of n terms is off by at most n u / (1 - n u) of the sum of their magnitudes,
        # u = eps / 2: once for the model and once for the bound.
        count = (_terms(graph, node) + _MORE) * float(about.eps) / 2
        (total,) = run(*[functools.reduce(jnp.maximum, map(jnp.abs, set_of(a))) for a in args])
        error = 2 * count / (1 - count) * total + about.tiny
        return Interval(out.lower - error, out.upper + error)
    share = float(about.eps) * _UNITS
    if node.key == "reduce_precision":
        share = max(share, 2.0 ** -node.params["mantissa_bits"])
    return Interval(
        out.lower - (share * jnp.abs(out.lower) + about.tiny),
        out.upper + (share * jnp.abs(out.upper) + about.tiny),
    )


def _terms(graph: Graph, node: Node) -> int:
    """How many terms each output sums."""
    shape, q = graph.values[node.inputs[0]].shape, node.params
    if node.key == "conv_general_dilated":
        kernel = graph.values[node.inputs[1]].shape
        return math.prod(kernel) // kernel[q["dimension_numbers"].rhs_spec[0]]
    if node.key == "dot_general":
        return math.prod(shape[a] for a in q["dimension_numbers"][0][0])
    if node.key == "reduce_window_sum":
        return math.prod(q["window_dimensions"])
    return math.prod(shape[a] for a in q["axes"]) if "axes" in q else shape[q["axis"]]
