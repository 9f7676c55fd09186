"""Symbolic intervals: each value as a sum of errors, those of the inputs and of every activation.

The bounds MixTrain trains with (Wang, Chen, Abdou, Jana, "MixTrain: scalable training of verifiably
robust neural networks", 2018; Wang, Pei, Whitehouse, Yang, Jana, "Efficient formal safety analysis
of neural networks", 2018): a zonotope, to which an unstable ReLU adds one error. For any traced
model: what is linear maps the errors, an activation lies between two parallel lines, and any other
operation starts anew from its interval.

Errors are carried forward: one array as large as a value for every input and for every activation
so far, for each sample. `linear_bounds(..., method="fast-lin")` walks back instead; on networks of
ReLU it gives the same bounds, in less time and memory wherever a network narrows. Nothing is
rounded outward: see `linear_bounds`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax import interval, operations, relaxation
from nnslicer_jax.evaluation import run_batch
from nnslicer_jax.fold import Rules, forward, leaves
from nnslicer_jax.graph import Graph, Node
from nnslicer_jax.interval import Interval, check_box, precise
from nnslicer_jax.linear_bounds import check_rows, everywhere, is_linear, known


class Errors(NamedTuple):
    """Errors of one origin, each anywhere in -1..1, and what they do to a value.

    Attributes:
      scale: `[B, E]`, what every error is multiplied by; None: nothing.
      parts: `[b, E, ...]` with b = B or, while no sample matters, 1.
    """

    scale: jax.Array | None
    parts: jax.Array

    def each(self) -> jax.Array:
        """What each error does, scaled: `[B, E, ...]`."""
        if self.scale is None:
            return self.parts
        return self.parts * self.scale.reshape(*self.scale.shape, *(1,) * (self.parts.ndim - 2))


class Zonotope(NamedTuple):
    """A centre and the errors around it, by the value id they arose at.

    Attributes:
      centre: `[B, ...]`.
      errors: Of each origin.
    """

    centre: jax.Array
    errors: Mapping[int, Errors]

    def interval(self) -> Interval:
        """Its ends."""
        radius = functools.reduce(jnp.add, map(_radius, self.errors.values()))
        radius = radius.reshape(-1, *self.centre.shape[1:])
        return Interval(self.centre - radius, self.centre + radius)


def symbolic_bounds(
    graph: Graph, params: Any, lower: jax.Array, upper: jax.Array, rows: jax.Array
) -> jax.Array:
    """Lower bounds of `rows @ logits` for every sample in a box.

    Pure and traceable: put it under `jit`, `grad` or a sharding.

    Args:
      graph: The traced model.
      params: The parameters, structured as they were traced.
      lower: `[B, ...]`, the lowest of each input.
      upper: `[B, ...]`, the highest of each input, at least `lower`.
      rows: `[M, K]`, or `[B, M, K]` for rows of each sample's own: sums of logits to bound, such
        as `linear_bounds.margin_rows`, taken before any error is bounded.

    Returns:
      Lower bounds `[B, M]`, -inf where nothing is known.

    Raises:
      ValueError: For a wrong shape or an empty box.
      UnsupportedError: For an operation that has no rule.
    """
    box = Interval(lower, upper)
    check_box(graph, box)
    rows = check_rows(graph, rows, len(lower))
    flat = rows.reshape(*rows.shape[:2], -1)
    box = Interval(*map(jnp.asarray, box))
    start = _around(graph.input, box) if graph.values[graph.input].is_float else box
    rules = Rules("symbolic bounds", default=functools.partial(_step, graph))
    logits = forward(graph, rules, [*leaves(graph, params), start])[graph.logits]
    if not isinstance(logits, Zonotope):
        logits = Zonotope(jnp.reshape(logits, (1, -1)), {})
    found = _dot(flat, logits.centre.reshape(len(logits.centre), -1, 1))[..., 0]
    for errors in logits.errors.values():
        parts = errors.parts.reshape(*errors.parts.shape[:2], -1)
        each = jnp.abs(_dot(flat, parts.swapaxes(1, 2)))
        if errors.scale is not None:
            each = each * errors.scale[:, None]
        found = found - each.sum(-1)
    return jnp.broadcast_to(known(found), (len(lower), rows.shape[1]))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _radius(errors: Errors) -> jax.Array:
    """What the errors of one origin can do together, `[B, n]`."""
    parts = jnp.abs(errors.parts.reshape(*errors.parts.shape[:2], -1))
    if errors.scale is None:
        return parts.sum(1)
    return _dot(errors.scale[:, None], parts)[:, 0]


def _around(ident: int, x: Interval) -> Zonotope:
    """An interval, one error a number."""
    return Zonotope(x.centre, {ident: _fresh(x.radius)})


def _fresh(radius: jax.Array) -> Errors:
    size = radius[0].size
    parts = jnp.eye(size, dtype=radius.dtype).reshape(1, size, *radius.shape[1:])
    return Errors(radius.reshape(-1, size), parts)


def _ends(x: Any) -> Any:
    return x.interval() if isinstance(x, Zonotope) else x


def _step(graph: Graph, node: Node, *args: Any) -> tuple[Any, ...]:
    """One node that reads the sample."""
    symbolic = all(isinstance(a, Zonotope) for a, data in zip(args, node.data, strict=True) if data)
    if node.key == operations.CUSTOM_DERIVATIVE:
        return tuple(
            a if isinstance(a, Zonotope | Interval) else Interval(a, a)
            for a in args[len(args) - len(node.outputs) :]
        )
    if symbolic and is_linear(graph, node):
        return _linear(graph, node, args)
    found = _activation(graph, node, args) if symbolic else None
    if found is not None:
        return (found,)
    outs = interval.bounded(graph, False, node, *map(_ends, args))
    return tuple(
        _around(i, out) if graph.values[i].is_float else out
        for i, out in zip(node.outputs, outs, strict=True)
    )


def _linear(graph: Graph, node: Node, args: tuple[Any, ...]) -> tuple[Zonotope, ...]:
    """The centre goes through the node, every error through what the node multiplies."""
    read = [i for i, data in enumerate(node.data) if data]
    run = functools.partial(run_batch, graph, precise(node))

    def affine(*xs: jax.Array) -> tuple[jax.Array, ...]:
        operands = list(args)
        for i, x in zip(read, xs, strict=True):
            operands[i] = x
        return run(*operands)

    zonotopes = [args[i] for i in read]
    centres = affine(*(z.centre for z in zonotopes))
    mapped: list[dict[int, Errors]] = [{} for _ in centres]
    for origin in {origin: None for z in zonotopes for origin in z.errors}:
        met = [z.errors[origin] for z in zonotopes if origin in z.errors]
        scaled = all(e.scale is not None for e in met)
        scale = met[0].scale if scaled else None
        parts = [e.parts if scaled else e.each() for e in met]
        size, count = max(len(p) for p in parts), parts[0].shape[1]
        across = iter(parts)
        operands = [
            jnp.broadcast_to(p, (size, *p.shape[1:])).reshape(size * count, *p.shape[2:])
            if p is not None
            else jnp.zeros((size * count, *z.centre.shape[1:]), z.centre.dtype)
            for z in zonotopes
            for p in [next(across) if origin in z.errors else None]
        ]
        zeros = [jnp.zeros_like(o) for o in operands]
        _, moved = jax.jvp(affine, tuple(zeros), tuple(operands))
        for into, out in zip(mapped, moved, strict=True):
            into[origin] = Errors(scale, out.reshape(size, count, *out.shape[1:]))
    return tuple(Zonotope(c, errors) for c, errors in zip(centres, mapped, strict=True))


def _activation(graph: Graph, node: Node, args: tuple[Any, ...]) -> Zonotope | None:
    """Between parallel lines, where there are such."""
    out = node.outputs[0]
    shape = next(a.centre.shape for a in args if isinstance(a, Zonotope))
    if graph.values[out].shape != graph.values[node.inputs[node.data.index(True)]].shape:
        return None
    if node.key in ("max", "min"):
        # max(x, y) = y + max(x - y, 0), min(x, y) = x - max(x - y, 0)
        x, y = (a if isinstance(a, Zonotope) else Zonotope(everywhere(a, shape), {}) for a in args)
        apart = _sum(x, y, -1.0)
        lines = relaxation.rectified(apart.interval(), relaxation.same)
        rise = _between(out, apart, lines)
        return _sum(y, rise, 1.0) if node.key == "max" else _sum(x, rise, -1.0)
    if node.key == "mul" and node.inputs[0] != node.inputs[1]:
        x, y = args
        if x.centre.shape != y.centre.shape:
            return None
        # x y = y x_0 + x y_0 - x_0 y_0, less or more than the product of the radii
        (below_x, _), (below_y, _) = x.interval(), y.interval()
        width = (x.centre - below_x) * (y.centre - below_y)
        found = _sum(_scaled(x, y.centre), _scaled(y, x.centre), 1.0)
        return Zonotope(x.centre * y.centre, {**found.errors, out: _fresh(width)})
    if node not in relaxation.RULES or sum(node.data) > 1:
        return None
    run, slot = functools.partial(run_batch, graph, node), node.data.index(True)
    x = args[slot]

    def f(v: jax.Array) -> jax.Array:
        return run(*args[:slot], v, *args[slot + 1 :])[0]

    ends = x.interval()
    (whole,) = interval.bounded(graph, False, node, *map(_ends, args))
    lines = relaxation.RULES[node](node, f, ends, whole, relaxation.same)
    return _between(out, x, lines) if lines.parallel else None


def _between(ident: int, x: Zonotope, lines: relaxation.Lines) -> Zonotope:
    line = _scaled(x, lines.lower)
    fresh = _fresh(lines.offset.radius)
    return Zonotope(line.centre + lines.offset.centre, {**line.errors, ident: fresh})


def _scaled(x: Zonotope, by: jax.Array) -> Zonotope:
    """Every number times one of each sample's own."""
    errors = {i: Errors(None, e.each() * by[:, None]) for i, e in x.errors.items()}
    return Zonotope(x.centre * by, errors)


def _sum(x: Zonotope, y: Zonotope, sign: float) -> Zonotope:
    """`x + sign * y`, errors of one origin together."""
    errors = dict(x.errors)
    for i, e in y.errors.items():
        there = errors.get(i)
        if there is None:
            errors[i] = Errors(e.scale, sign * e.parts)
        else:
            errors[i] = Errors(None, there.each() + sign * e.each())
    return Zonotope(x.centre + sign * y.centre, errors)
