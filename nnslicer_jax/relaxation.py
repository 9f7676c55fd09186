"""Two lines between which a function of one number stays, where that number is in an interval.

What CROWN, Fast-Lin and symbolic intervals take for each activation function: Zhang, Weng, Chen,
Hsieh, Daniel, "Efficient neural network robustness certification with general activation
functions", 2018; Weng, Zhang, Chen, Song, Hsieh, Boning, Dhillon, Daniel, "Towards fast computation
of certified robustness for ReLU networks", 2018. A convex function lies above its tangent in the
middle and below its chord; an S-shaped one between two parallels as steep as its flatter end.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax.fold import Rules
from nnslicer_jax.graph import Node
from nnslicer_jax.interval import Interval

Function = Callable[[jax.Array], jax.Array]  # Elementwise.
Slope = Callable[[jax.Array], jax.Array]  # Slope above an unstable ReLU to the slope below it.


class Lines(NamedTuple):
    """`lower * x + offset.lower <= f(x) <= upper * x + offset.upper`, all `[B, ...]`.

    Attributes:
      lower: Slope of the line below.
      upper: Slope of the line above; the same array as `lower` where they are parallel.
      offset: Where the lines cut the axis.
    """

    lower: jax.Array
    upper: jax.Array
    offset: Interval

    @property
    def parallel(self) -> bool:
        """Whether both lines have one slope, whatever the numbers."""
        return self.lower is self.upper


# rule(node, f, x, out, slope) -> Lines, for a node that applies f to one operand in the interval x,
# with f(x) in the interval out.
RULES = Rules("linear bounds")


def steepest(upper: jax.Array) -> jax.Array:
    """CROWN's slope below an unstable ReLU: 1 where the line above is steeper than 1/2, else 0."""
    return (upper > 0.5).astype(upper.dtype)


def same(upper: jax.Array) -> jax.Array:
    """Fast-Lin's slope below an unstable ReLU: that above it."""
    return upper


def constant(out: Interval) -> Lines:
    """The interval itself."""
    flat = jnp.zeros_like(out.lower)
    return Lines(flat, flat, out)


def rectified(x: Interval, slope: Slope) -> Lines:
    """The lines of `max(x, 0)`: above, the chord."""
    unstable = (x.lower < 0) & (x.upper > 0)
    low, high = (jnp.where(unstable, end, fill) for end, fill in zip(x, (0, 1), strict=True))
    upper = jnp.where(unstable, high / (high - low), (x.lower >= 0).astype(low.dtype))
    return Lines(slope(upper), upper, Interval(jnp.zeros_like(upper), -upper * low))


@RULES.register("relu")
def _relu(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    return rectified(x, slope)


@RULES.register("clamp", "clip", "hard_tanh", "relu6")
def _clipped(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    """`max(x, floor) - max(x - ceiling, 0)`; a bound may be infinite."""
    floor, ceiling = (f(jnp.full_like(x.lower, end)) for end in (-jnp.inf, jnp.inf))
    rise = rectified(Interval(x.lower - floor, x.upper - floor), slope)
    stop = rectified(Interval(x.lower - ceiling, x.upper - ceiling), slope)

    def offset(risen: jax.Array, stopped: jax.Array, more: jax.Array, less: jax.Array) -> jax.Array:
        start = jnp.where(risen == 1, 0, (1 - risen) * floor)
        return start + more + jnp.where(stopped == 0, 0, stopped * ceiling) - less

    lower, upper = rise.lower - stop.upper, rise.upper - stop.lower
    return Lines(
        lower,
        lower if rise.parallel and stop.parallel else upper,
        Interval(
            offset(rise.lower, stop.upper, rise.offset.lower, stop.offset.upper),
            offset(rise.upper, stop.lower, rise.offset.upper, stop.offset.lower),
        ),
    )


@RULES.register("leaky_relu")
def _leaky(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    """`a x + (1 - a) max(x, 0)`; where a > 1 the lines change places."""
    a = -f(-jnp.ones_like(x.lower))
    below, above, cut = rectified(x, slope)
    bent = a <= 1
    lower = a + (1 - a) * jnp.where(bent, below, above)
    upper = lower if below is above else a + (1 - a) * jnp.where(bent, above, below)
    zero, most = (1 - a) * cut.lower, (1 - a) * cut.upper
    return Lines(lower, upper, Interval(jnp.where(bent, zero, most), jnp.where(bent, most, zero)))


@RULES.register("atan", "erf", "logistic", "sigmoid", "soft_sign", "tanh")
def _s_shaped(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    flatter = jnp.minimum(*(_with_slope(f, end)[1] for end in x))
    return Lines(
        flatter,
        flatter,
        Interval(out.lower - flatter * x.lower, out.upper - flatter * x.upper),
    )


@RULES.register("abs", "cosh", "exp", "exp2", "mul", "softplus", "square", "squareplus")
def convex(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    """Tangent and chord; a `mul` is of one value with itself."""
    (low, high), middle = x, x.centre
    at, tangent = _with_slope(f, middle)
    wide = high > low
    chord = jnp.where(wide, (f(high) - f(low)) / jnp.where(wide, high - low, 1), tangent)
    return Lines(tangent, chord, Interval(at - tangent * middle, f(low) - chord * low))


@RULES.register("log_sigmoid")
def _concave(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    lower, upper, offset = convex(node, lambda v: -f(v), x, out, slope)
    return Lines(-upper, -lower, Interval(-offset.upper, -offset.lower))


@RULES.register("integer_pow", "log", "rsqrt", "sqrt")
def _of_positive(node: Node, f: Function, x: Interval, out: Interval, slope: Slope) -> Lines:
    """Even powers are convex; other powers, roots and logarithms bend one way above 0."""
    if node.key == "integer_pow" and node.params["y"] >= 0 and node.params["y"] % 2 == 0:
        return convex(node, f, x, out, slope)
    above = x.lower > 0
    inside = Interval(*(jnp.where(above, end, 1) for end in x))
    bend = _concave if node.key in ("log", "sqrt") else convex
    lower, upper, offset = bend(node, f, inside, out, slope)
    return Lines(
        jnp.where(above, lower, 0),
        jnp.where(above, upper, 0),
        Interval(*(jnp.where(above, *pair) for pair in zip(offset, out, strict=True))),
    )


def _with_slope(f: Function, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(f, (x,), (jnp.ones_like(x),))
