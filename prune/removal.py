"""Removal: the neurons that a mask leaves without synapses, and what they leave without use.

Zhang et al., ESEC/FSE 2020: a neuron whose synapses are all gone goes too. Over the traced graph a
channel is

- alive if a synapse that stays leads to it from a channel that is alive; a bias alone keeps no
  neuron alive, a sum lives while any of its summands does, and the outputs always live;
- used if it is alive and a synapse that stays leads from it to a channel that is used.

What is not alive counts as 0. What is alive but not used changes nothing. Since the graph has no
cycle, one pass forward and one backward reach the fixed point.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax import movement, operations
from nnslicer_jax.fold import leaves
from nnslicer_jax.graph import Graph, Node
from prune.masks import apply_masks

_SUMS = frozenset({"add", "add_any", "sub"})
_EITHER = _SUMS | {"clamp", "max", "min"}
_REDUCTIONS = frozenset({"reduce_max", "reduce_min", "reduce_sum"})
_POOLS = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
_RUNNING = frozenset({"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"})
_FIXED = "sort", "top_k"


class Removal(NamedTuple):
    """What is left of a masked network; a pytree of arrays.

    Attributes:
      masks: Like the parameters: True where an entry is used, also of biases and normalisations;
        None for parameters that may not be set to 0 (a variance, a divisor).
      alive: For each value of the graph, which entries are alive, bool of its traced shape.
      used: Likewise, which are used.
    """

    masks: Any
    alive: tuple[jax.Array, ...]
    used: tuple[jax.Array, ...]


def remove(graph: Graph, params: Any, masks: Any) -> Removal:
    """Finds what masks leave over.

    Pure and traceable, with the masks as arguments. An operation without a rule keeps alive, and
    uses, all it meets, so that too little may be removed but never too much.

    Args:
      graph: The traced model.
      params: Its parameters; their values do not matter.
      masks: Bool, like `params`, False where a synapse is gone; None where nothing is masked.

    Raises:
      ValueError: If masks and parameters do not fit.
    """
    found = _mask_leaves(graph, params, masks)
    alive = _alive(graph, found)
    used = _used(graph, alive)
    zeroed = _may_be_zero(graph)
    left = [used[i] if i in zeroed else None for i in graph.params.values()]
    return Removal(jax.tree.unflatten(jax.tree.structure(params), left), alive, used)


def reduced(graph: Graph, params: Any, masks: Any) -> nns.Masked:
    """The network without the synapses that masks take away and the neurons that go with them.

    Args:
      graph: The traced model.
      params: Its parameters.
      masks: As for `remove`.

    Returns:
      Parameters with 0 for what is gone, and edits where a neuron would not be 0 by that alone
      (after a sigmoid, say). Networks of ReLU need none: their parameters are all there is.
    """
    removal = remove(graph, params, masks)
    scale, shift = {}, {}
    restless = springs(graph)
    for name, neuron in graph.neurons().items():
        if neuron.value in restless:
            there = removal.alive[neuron.value]
            there = there if neuron.batch is None else there.squeeze(neuron.batch)
            positions = tuple(a for a in range(there.ndim) if a != neuron.channel)
            scale[name] = there.any(positions, keepdims=True).astype(jnp.float32)
            shift[name] = jnp.zeros((1,) * there.ndim)
    # What was masked is 0 even where nothing else of its parameter may be.
    return nns.Masked(apply_masks(apply_masks(params, masks), removal.masks), scale, shift)


def _mask_leaves(graph: Graph, params: Any, masks: Any) -> dict[int, Any]:
    """Value id of each masked parameter to its mask."""
    leaves(graph, params)
    found: list[Any] = []
    try:
        jax.tree.map(lambda _, mask: found.append(mask), params, masks)
    except ValueError:
        raise ValueError("masks must have the structure of params, None for no mask") from None
    masked = {}
    for (name, ident), mask in zip(graph.params.items(), found, strict=True):
        if mask is None:
            continue
        shape = graph.values[ident].shape
        if jnp.shape(mask) != shape or jnp.result_type(mask) != jnp.bool_:
            given = f"{jnp.result_type(mask)} of shape {jnp.shape(mask)}"
            raise ValueError(f"the mask of {name} must be bool of shape {shape}, not {given}")
        masked[ident] = jnp.asarray(mask)
    return masked


# Forward ------------------------------------------------------------------------------------


def _alive(graph: Graph, masks: dict[int, Any]) -> tuple[jax.Array, ...]:
    env: list[Any] = [None] * len(graph.values)
    known = known_values(graph)
    for ident in (*graph.params.values(), graph.input):
        env[ident] = masks.get(ident, jnp.ones(graph.values[ident].shape, bool))
    for ident, value in graph.consts.items():
        numeric = not jnp.issubdtype(graph.values[ident].dtype, jax.dtypes.extended)
        env[ident] = jnp.asarray(value) != 0 if numeric else jnp.ones(jnp.shape(value), bool)
    channels = _channels(graph)
    last = {*graph.outputs, graph.logits}
    for node in graph.nodes:
        lives = _life(graph, node, [env[i] for i in node.inputs], known)
        for ident, there in zip(node.outputs, lives, strict=True):
            if ident in channels:
                there = _evened(there, channels[ident])
            env[ident] = jnp.ones_like(there) if ident in last else there
    return tuple(env)


def _life(graph: Graph, node: Node, args: list[Any], known: dict[int, Any]) -> Sequence[Any]:
    """What is alive of a node's outputs."""
    shapes = [graph.values[i].shape for i in node.outputs]
    whole = [jnp.ones(shape, bool) for shape in shapes]
    if not all(graph.values[i].is_float for i in node.outputs):
        return whole
    if node.key in operations.MOVEMENT and node.key not in _FIXED:
        if not _is_settled(node, known):
            return whole
        values = [known.get(i, arg) for i, arg in zip(node.inputs, args, strict=True)]
        moved = movement.forward(node, values, [a.astype(jnp.float32) for a in args])
        return [m > 0 for m in moved]
    if node.key in operations.PRODUCTS:
        return [_bound(node, *args) > 0]
    read = [a for a, data in zip(args, node.data, strict=True) if data or not any(node.data)]
    if node.key == "mul" or (node.key == "div" and node.data[1:] == (False,)):
        factors = args if node.key == "mul" else args[:1]
        return [functools.reduce(jnp.logical_and, [_stretched(a, shapes[0]) for a in factors])]
    if node.key in _EITHER and (node.key in _SUMS or any(node.data)):
        return [functools.reduce(jnp.logical_or, [_stretched(a, shapes[0]) for a in read])]
    if _is_activation(graph, node):
        return [read[0]]
    if node.key in _REDUCTIONS:
        return [args[0].any(node.params["axes"])]
    if node.key in _POOLS | _RUNNING:
        return [_stretched(args[0].any(_spread(node), keepdims=True), shapes[0])]
    return whole


# Backward -----------------------------------------------------------------------------------


def _used(graph: Graph, alive: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    total: list[Any] = [jnp.zeros(value.shape, bool) for value in graph.values]
    for ident in (*graph.outputs, graph.logits):
        total[ident] = jnp.ones(graph.values[ident].shape, bool)
    known, channels = known_values(graph), _channels(graph)
    for node in reversed(graph.nodes):
        for ident in node.outputs:
            if ident in channels:
                total[ident] = _evened(total[ident], channels[ident])
            total[ident] &= alive[ident]
        back = [total[i] for i in node.outputs]
        wanted = _wanted(graph, node, [alive[i] for i in node.inputs], back, known)
        for ident, want in zip(node.inputs, wanted, strict=True):
            total[ident] |= want
    return tuple(there & live for there, live in zip(total, alive, strict=True))


def _wanted(
    graph: Graph, node: Node, alive: list[Any], back: list[Any], known: dict[int, Any]
) -> Sequence[Any]:
    """What the used part of a node's outputs is made of, for each input."""
    shapes = [graph.values[i].shape for i in node.inputs]
    anything = functools.reduce(jnp.logical_or, [b.any() for b in back])
    whole = [jnp.broadcast_to(anything, shape) for shape in shapes]
    if node.key in operations.MOVEMENT and node.key not in _FIXED:
        if not _is_settled(node, known):
            return whole
        values = [known.get(i, a) for i, a in zip(node.inputs, alive, strict=True)]
        given = [b.astype(jnp.float32) for b in back]
        moved = movement.backward(node, values, given, [True] * len(values))
        return [w if m is None else m > 0 for m, w in zip(moved, whole, strict=True)]
    if node.key in operations.PRODUCTS:
        numbers = [a.astype(jnp.float32) for a in alive]
        _, pull = jax.vjp(functools.partial(_bound, node), *numbers)
        return [b > 0 for b in pull(back[0].astype(jnp.float32))]
    if node.key in operations.ELEMENTWISE or _is_activation(graph, node):
        return [movement.unbroadcast(back[0].astype(jnp.float32), shape) > 0 for shape in shapes]
    if node.key in _REDUCTIONS:
        return [_stretched(jnp.expand_dims(back[0], node.params["axes"]), shapes[0])]
    if node.key in _POOLS | _RUNNING:
        return [_stretched(back[0].any(_spread(node), keepdims=True), shapes[0])]
    return whole


# Of operations ------------------------------------------------------------------------------


def _bound(node: Node, left: jax.Array, right: jax.Array) -> jax.Array:
    """A product of zeros and ones, float32: not 0 where a term is not."""
    params = {**node.params, "preferred_element_type": np.dtype(np.float32)}
    factors = left.astype(jnp.float32), right.astype(jnp.float32)
    return node.primitive.bind(*factors, **node.primitive.get_bind_params(params))


def _is_settled(node: Node, known: dict[int, Any]) -> bool:
    """Whether a movement moves the same way whatever the sample and the parameters are."""
    return all(node.inputs[i] in known for i in range(len(node.inputs)) if i not in node.moved)


def _is_activation(graph: Graph, node: Node) -> bool:
    """Whether the output is a function of one input, element by element, that goes with it."""
    if node.key in operations.NAMED_CALLS or node.key == "logistic":
        return any(node.data)
    return node.key in operations.UNARY and _at_zero(graph, node) == 0


def _at_zero(graph: Graph, node: Node) -> float:
    """What an operation of one operand makes of 0."""
    with jax.ensure_compile_time_eval():
        (out,) = node.bind(jnp.zeros((), graph.values[node.inputs[0]].dtype))
    return float(out)


def _spread(node: Node) -> tuple[int, ...]:
    """Axes along which a pool or a running sum mixes positions."""
    if node.key in _RUNNING:
        return (node.params["axis"],)
    windows, strides = node.params["window_dimensions"], node.params["window_strides"]
    padding = node.params["padding"]
    sizes = enumerate(zip(windows, strides, padding, strict=True))
    return tuple(a for a, (w, s, pad) in sizes if w != 1 or s != 1 or tuple(pad) != (0, 0))


def _stretched(there: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(there.reshape((1,) * (len(shape) - there.ndim) + there.shape), shape)


def _evened(there: jax.Array, axis: int) -> jax.Array:
    """A neuron lives, and is used, at all its positions or at none."""
    others = tuple(a for a in range(there.ndim) if a != axis)
    return jnp.broadcast_to(there.any(others, keepdims=True), there.shape)


# Of graphs ----------------------------------------------------------------------------------


def _channels(graph: Graph) -> dict[int, int]:
    """Value id of each neuron but the input to its channel axis."""
    neurons = graph.neurons().values()
    return {n.value: n.axis for n in neurons if n.value != graph.input and len(n.shape)}


def known_values(graph: Graph) -> dict[int, Any]:
    """Values that depend neither on the sample nor on a parameter."""
    known = dict(graph.consts)
    with jax.ensure_compile_time_eval():
        for node in graph.nodes:
            if not any(node.data) and not any(node.param):
                outs = node.bind(*[known[i] for i in node.inputs])
                known.update(zip(node.outputs, outs, strict=True))
    return known


def _may_be_zero(graph: Graph) -> set[int]:
    """Ids of the parameters whose unused entries may be 0: they are only added and multiplied."""
    harmless = _SUMS | operations.PRODUCTS | {"mul"} | (operations.MOVEMENT - {*_FIXED})
    bad: set[int] = {*graph.outputs}
    for node in reversed(graph.nodes):
        if node.key not in harmless or any(i in bad for i in node.outputs if not any(node.data)):
            bad.update(node.inputs)
    floats = {i for i in graph.params.values() if graph.values[i].is_float}
    return floats - bad


def springs(graph: Graph) -> set[int]:
    """Ids of the neurons that may go, and yet are not 0 where parameters are."""
    last = {*graph.outputs, graph.logits}
    zeroed = _zeroed(graph)
    gone: set[int] = set()
    found: set[int] = set()
    for node in graph.nodes:
        if not any(node.data):
            continue
        if node.key in operations.PRODUCTS:
            gone.update(node.outputs)
            continue
        if not any(i in gone for i in node.inputs):
            continue
        gone.update(i for i in node.outputs if i not in last)
        if graph.computes(node) and not _keeps_zero(graph, node, zeroed):
            found.update(i for i in node.outputs if i not in last and graph.values[i].is_float)
    return found & {n.value for n in graph.neurons().values()}


def _zeroed(graph: Graph) -> set[int]:
    """Ids of what is 0 where the neuron that it is added to is gone.

    It is made of parameters that are used nowhere else, where they may have to stay.
    """
    uses = collections.Counter(ident for node in graph.nodes for ident in node.inputs)
    found = {ident for ident in _may_be_zero(graph) if uses[ident] == 1}
    for node in graph.nodes:
        if any(node.data):
            continue
        of_one = node.key in operations.MOVEMENT - {*_FIXED}
        if (of_one and all(node.inputs[i] in found for i in node.moved)) or (
            node.key == "mul" and any(i in found for i in node.inputs)
        ):
            found.update(i for i in node.outputs if uses[i] == 1)
    return found


def _keeps_zero(graph: Graph, node: Node, zeroed: set[int]) -> bool:
    """Whether an operation makes 0 of what is gone."""
    if node.key in ("mul", "div") or node.key in _REDUCTIONS | _POOLS:
        return True
    if node.key in _SUMS:
        beside = [i for i, data in zip(node.inputs, node.data, strict=True) if not data]
        return all(i in zeroed for i in beside)
    if node.key == "max":
        beside = [i for i, data in zip(node.inputs, node.data, strict=True) if not data]
        return all(np.all(np.asarray(graph.consts.get(i, 1)) <= 0) for i in beside)
    if node.key in operations.NAMED_CALLS:
        with jax.ensure_compile_time_eval():
            args: list[Any] = [
                jnp.zeros(graph.values[i].shape, graph.values[i].dtype)
                if data else graph.consts.get(i)
                for i, data in zip(node.inputs, node.data, strict=True)
            ]  # fmt: skip
            return all(a is not None for a in args) and not np.any(node.bind(*args)[0])
    return node.key in operations.UNARY and _at_zero(graph, node) == 0
