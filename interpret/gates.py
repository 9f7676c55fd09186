"""Control gates: one scalar for each channel of chosen layers, multiplied into its activation.

Wang, Su, Zhang, Hu, "Interpret Neural Networks by Identifying Critical Data Routing Paths", CVPR
2018: a gate stands after the activation of each convolution; in a residual network, at the output
of each residual block. Both places are found in the traced graph. What follows a convolution is
read off the graph's post-dominators: the values through which all that it computes must pass.
"""

import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nnslicer_jax import channels, operations
from nnslicer_jax.evaluation import evaluated
from nnslicer_jax.fold import check_names
from nnslicer_jax.graph import Graph, Node

Layers = Mapping[str, slice]  # layer -> where its gates stand in a row of gates

RULES = ("auto", "convolutions", "blocks")

_PRODUCTS = frozenset({"conv_general_dilated", "dot_general"})
_ELEMENTWISE = (
    operations.ELEMENTWISE
    | operations.IDENTITY
    | operations.NAMED_CALLS
    | {operations.CUSTOM_DERIVATIVE}
)
_LINEAR = operations.IDENTITY | {"add", "add_any", "sub", "neg", operations.CUSTOM_DERIVATIVE}


def places(graph: Graph, at: str | Sequence[str] = "auto") -> dict[str, slice]:
    """Where gates stand.

    Args:
      graph: The traced model.
      at: "convolutions": after the activation of each convolution (of one without an activation,
        after its bias and normalisation); "blocks": at each residual block's output, its
        activation included; "auto": blocks where the network has any, else convolutions; or
        neuron names, as `graph.neurons()` lists them. An activation that is written with
        `jnp.where` is no neuron: a rule's gates then stand in front of it.

    Returns:
      Neuron name to its part of a row of gates, in the order of execution, or as named.

    Raises:
      ValueError: For an unknown rule or name, names that repeat, or a rule that finds no place.
    """
    neurons = graph.neurons()
    if isinstance(at, str):
        if at not in RULES:
            raise ValueError(f"at must be one of {', '.join(RULES)} or neuron names, not {at!r}")
        names = _found(graph, at)
    else:
        if not isinstance(at, Iterable):
            raise ValueError(f"at must be one of {', '.join(RULES)} or neuron names, not {at!r}")
        names = list(at)
        check_names(graph, names)
        if not names or len(set(names)) != len(names):
            raise ValueError(f"at must name at least one neuron and none twice, not {names}")
    ends = np.cumsum([neurons[name].shape[neurons[name].channel] for name in names]).tolist()
    return {n: slice(a, b) for n, a, b in zip(names, [0, *ends[:-1]], ends, strict=True)}


def edits(graph: Graph, layers: Layers, gates: jax.Array) -> dict[str, Any]:
    """Edits of a batch that multiply gates `[B, G]` into their layers.

    A gate in front of max pooling is moved behind it, which changes no value as gates are not
    negative, and leaves less to compute. The derivative then stays that for a growing gate where
    the gate is 0.
    """
    neurons = graph.neurons()
    found: dict[str, Any] = {}
    for name, part in layers.items():
        behind = neurons[_behind_pooling(graph, name)]
        # Two layers may end at one place when both were named.
        factor = gates[:, part].reshape(
            len(gates), *[-1 if a == behind.channel else 1 for a in range(len(behind.shape))]
        )
        before = found.get(behind.name)
        found[behind.name] = functools.partial(_multiplied, before, factor)
    return found


def _multiplied(before: Any, factor: jax.Array, activation: jax.Array) -> jax.Array:
    if before is not None:
        activation = before(activation)
    return activation * factor.astype(activation.dtype)


def check_gates(graph: Graph, layers: Layers, gates: Any, count: int) -> np.ndarray:
    """Gates as float32, or ValueError unless they are finite `[count, G]`, none negative.

    Each layer's part must be as wide as the layer.
    """
    neurons = check_names(graph, layers)
    for name, part in layers.items():
        wide = neurons[name].shape[neurons[name].channel]
        if part.stop - part.start != wide:
            raise ValueError(
                f"layers: {name} has {wide} channels, but {part.stop - part.start} gates"
            )
    gates = np.asarray(gates, np.float32)
    width = max(part.stop for part in layers.values())
    if gates.shape != (count, width):
        raise ValueError(f"gates must have shape {(count, width)}, not {gates.shape}")
    if not np.isfinite(gates).all() or gates.min(initial=0) < 0:
        raise ValueError("gates must be finite and at least 0")
    return gates


@functools.partial(jax.jit, static_argnums=(0, 1))
def gated_logits(
    graph: Graph,
    layers: tuple[tuple[str, int, int], ...],
    params: Any,
    images: jax.Array,
    gates: jax.Array,
) -> jax.Array:
    """Logits `[B, K]` of images `[B, ...]` under gates `[B, G]`; layers as `frozen` gives them."""
    return evaluated(graph, params, images).again(edits(graph, thawed(layers), gates))


def frozen(layers: Layers) -> tuple[tuple[str, int, int], ...]:
    """Layers as a static argument."""
    return tuple((name, part.start, part.stop) for name, part in layers.items())


def thawed(layers: tuple[tuple[str, int, int], ...]) -> dict[str, slice]:
    """Layers from a static argument."""
    return {name: slice(start, stop) for name, start, stop in layers}


def _found(graph: Graph, rule: str) -> list[str]:
    """Names of the neurons that a rule gates."""
    convolutions = [
        node
        for node in graph.nodes
        if node.key == "conv_general_dilated" and node.data == (True, False)
    ]
    if not convolutions:
        raise ValueError(
            "the network has no convolution to put gates behind; give at=[...], names of its "
            "neurons"
        )
    sums = _residual_sums(graph)
    if rule == "blocks" and not sums:
        raise ValueError("the network has no residual blocks; at='convolutions' gates each layer")
    starts = sums if sums and rule != "convolutions" else convolutions
    chain = _post_dominators(graph)
    names = {ident: name for name, n in graph.neurons().items() for ident in [n.value]}
    axes = channels.axes(graph)
    values = {_after(graph, chain, names, axes, node) for node in starts}
    return [names[ident] for ident in sorted(values - {graph.logits})]


def _residual_sums(graph: Graph) -> list[Node]:
    """Sums of a branch with what was led around it, through one convolution at most."""
    passed = [0] * len(graph.values)
    found = []
    for node in graph.nodes:
        if not any(node.data):
            continue
        through = [passed[i] for i, data in zip(node.inputs, node.data, strict=True) if data]
        if _is_sum(node):
            own = sorted((a & ~b).bit_count() for a, b in (through, through[::-1]))
            if own[0] <= 1 and own[0] < own[1]:
                found.append(node)
        total = functools.reduce(int.__or__, through)
        if node.key == "conv_general_dilated":
            total |= 1 << node.index
        for ident in node.outputs:
            passed[ident] = total
    return found


def _is_sum(node: Node) -> bool:
    """Whether it adds two arrays that both depend on the sample."""
    return node.key in ("add", "add_any") and all(node.data)


def _readers(graph: Graph) -> list[list[Node]]:
    """For each value the nodes that read it; a custom derivative reads what its body computed."""
    found: list[list[Node]] = [[] for _ in graph.values]
    for node in graph.nodes:
        custom = node.key == operations.CUSTOM_DERIVATIVE
        skipped = len(node.inputs) - len(node.outputs) if custom else 0
        for ident, data in list(zip(node.inputs, node.data, strict=True))[skipped:]:
            if data:
                found[ident].append(node)
    return found


def _post_dominators(graph: Graph) -> list[int | None]:
    """For each value the first one that all paths from it to the logits meet; None without any."""
    readers = _readers(graph)
    next_: list[int | None] = [None] * len(graph.values)
    depth = {graph.logits: 0}
    for ident in range(graph.logits - 1, -1, -1):
        ways = [out for node in readers[ident] for out in node.outputs if out in depth]
        if not ways:
            continue
        meet = ways[0]
        for other in ways[1:]:
            while meet != other:
                deeper = meet if depth[meet] >= depth[other] else other
                above = next_[deeper]
                assert above is not None
                meet, other = above, other if deeper == meet else meet
        next_[ident], depth[ident] = meet, depth[meet] + 1
    return next_


def _after(
    graph: Graph, chain: list[int | None], names: Collection[int], axes: list[int], node: Node
) -> int:
    """Value id of the activation that follows a node, or of the last before something else."""
    start = node.outputs[0]
    width = graph.values[start].shape[axes[start]]
    here, last, apart, summed = start, start, False, _is_sum(node)
    while here != graph.logits:
        end = chain[here]
        if end is None:
            break
        nodes = _between(graph, here, end)
        shape = graph.values[end].shape
        if any(node.key in _PRODUCTS for node in nodes) or not shape or shape[axes[end]] != width:
            break
        elementwise = all(node.key in _ELEMENTWISE for node in nodes)
        active = elementwise and any(map(_is_active, nodes))
        # A sum with another branch is left only by an activation that follows at once.
        if summed and not active and not all(node.key in operations.IDENTITY for node in nodes):
            break
        summed |= _joins(nodes, here)
        # Normalisation and pooling may stand between a convolution and its activation.
        apart |= not elementwise
        here = end
        if here in names and (active or not (apart or summed)):
            last = here
        if active:
            break
    return last


def _joins(nodes: Sequence[Node], here: int) -> bool:
    """Whether what is led on from a value meets something that does not come from there."""
    behind = {here}
    for node in nodes:
        if any(d and i not in behind for i, d in zip(node.inputs, node.data, strict=True)):
            return True
        behind.update(node.outputs)
    return False


def _between(graph: Graph, start: int, end: int) -> list[Node]:
    """Nodes on the paths from a value to one that all of them meet."""
    behind, found = {start}, []
    for node in graph.nodes:
        if max(node.outputs) > end:
            break
        if not behind.isdisjoint(node.inputs):
            behind.update(node.outputs)
            found.append(node)
    return found


def _is_active(node: Node) -> bool:
    """Whether an element-wise node bends what goes through it."""
    if node.key in _LINEAR:
        return False
    return node.key not in ("mul", "div") or all(node.data)


def _behind_pooling(graph: Graph, name: str) -> str:
    """The neuron a gate of `name` may be multiplied into: the last of max poolings that follow."""
    neurons = graph.neurons()
    here = neurons[name]
    by_value = {n.value: n for n in neurons.values()}
    while True:
        readers = [node for node in graph.nodes if here.value in node.inputs]
        if len(readers) != 1 or here.value in (*graph.outputs, graph.logits):
            return here.name
        (node,) = readers
        if node.key != "reduce_window_max" or node.outputs[0] not in by_value:
            return here.name
        q, axis = node.params, here.axis
        mixes = q["window_dimensions"][axis] > 1 or q["padding"][axis] != (0, 0)
        behind = by_value[node.outputs[0]]
        if mixes or q["window_strides"][axis] != 1 or behind.axis != axis:
            return here.name
        here = behind
