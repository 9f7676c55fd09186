"""Criteria: a score for every synapse, the larger the more worth keeping.

Those that Zhang et al., ESEC/FSE 2020, compare for targeted pruning: CONTRIB of a slice (NNSlicer
and EffectivePath), the magnitude of the weight, that of its neuron's weights, and chance. All of
them score the same synapses, the kernels of convolutions and dense layers, so that equal ratios
are equally many: scales of normalisations and biases are not pruned, though a slice has
CONTRIB for the former.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import operations
from nnslicer_jax.fold import leaves
from nnslicer_jax.graph import Graph, Node, UnsupportedError
from nnslicer_jax.slices import Slice


def kernels(graph: Graph) -> tuple[str, ...]:
    """Names of the prunable parameters, in the order of `graph.params`.

    They are those of two or more axes that weight the data in a convolution or a matrix product,
    as they are or after an operation of element by element.
    """
    return tuple(_uses(graph))


def contributions(graph: Graph, params: Any, piece: Slice) -> Any:
    """Ranks by |CONTRIB| in a slice, NNSlicer's or EffectivePath's, then by |w|.

    The paper leaves open which of many equal CONTRIBs go first; here those of smaller weights.

    Args:
      graph: The traced model.
      params: Its parameters.
      piece: One slice of them (not per sample): for chosen classes, or of all.

    Returns:
      A pytree like `params` of int32, None where nothing is pruned. The rank of a synapse is the
      number of different pairs (|CONTRIB|, |w|) in the whole network that are below its own, so
      that the order holds within a layer and between layers, with no rounding.

    Raises:
      ValueError: If the slice is per sample or of another network.
    """
    names = kernels(graph)
    weights = _sliced(graph, params, piece)
    contrib = np.concatenate([np.abs(np.ravel(piece.synapses[name])) for name in names])
    size = np.concatenate([np.abs(np.asarray(weights[name])).ravel() for name in names])
    order = np.lexsort((size, contrib))
    above = (np.diff(contrib[order]) != 0) | (np.diff(size[order]) != 0)
    ranks = np.zeros(len(order), np.int32)
    ranks[order[1:]] = np.cumsum(above)
    found = {}
    start = 0
    for name in names:
        shape = weights[name].shape
        found[name] = jnp.asarray(ranks[start : start + weights[name].size].reshape(shape))
        start += weights[name].size
    return _like(graph, params, found)


def weighted(graph: Graph, params: Any, piece: Slice) -> Any:
    """|CONTRIB| times |w|: how often a synapse counts and how much it carries each time.

    Not in the paper, whose |CONTRIB| alone says nothing of a weight's size.

    Args:
      graph: The traced model.
      params: Its parameters.
      piece: As for `contributions`.

    Returns:
      A pytree like `params` of float32, None where nothing is pruned.
    """
    weights = _sliced(graph, params, piece)
    found = {
        name: jnp.abs(weights[name]) * jnp.asarray(np.abs(piece.synapses[name]), jnp.float32)
        for name in kernels(graph)
    }
    return _like(graph, params, found)


def magnitudes(graph: Graph, params: Any) -> Any:
    """|w| of every synapse: a pytree like `params`, None where nothing is pruned."""
    weights = dict(zip(graph.params, leaves(graph, params), strict=True))
    return _like(graph, params, {name: jnp.abs(weights[name]) for name in kernels(graph)})


def channels(graph: Graph, params: Any) -> Any:
    """Mean |w| over the synapses into each synapse's neuron.

    Of a kernel that is used several times, its first use says which axes are its neurons.

    Returns:
      A pytree like `params`, equal for all synapses of a neuron, None where nothing is pruned.
    """
    weights = dict(zip(graph.params, leaves(graph, params), strict=True))
    found = {}
    for name, axes in _uses(graph).items():
        if axes is None:
            raise UnsupportedError(f"channels: {name} is rearranged before it weights the data")
        means = jnp.abs(weights[name]).mean(axes, keepdims=True)
        found[name] = jnp.broadcast_to(means, weights[name].shape)
    return _like(graph, params, found)


def random(key: jax.Array, graph: Graph, params: Any) -> Any:
    """Scores drawn evenly from 0..1: a pytree like `params`, None where nothing is pruned."""
    weights = dict(zip(graph.params, leaves(graph, params), strict=True))
    names = kernels(graph)
    keys = jax.random.split(key, len(names))
    drawn = {
        name: jax.random.uniform(k, weights[name].shape)
        for name, k in zip(names, keys, strict=True)
    }
    return _like(graph, params, drawn)


def _sliced(graph: Graph, params: Any, piece: Slice) -> dict[str, Any]:
    """The parameters by name; ValueError unless the slice is one of them."""
    if piece.per_sample:
        raise ValueError("contributions need one slice; take sample(i) or total() first")
    weights = dict(zip(graph.params, leaves(graph, params), strict=True))
    for name in kernels(graph):
        if name not in piece.synapses or piece.synapses[name].shape != weights[name].shape:
            raise ValueError(f"the slice is of another network: it lacks synapses {name}")
    return weights


def _like(graph: Graph, params: Any, found: dict[str, jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(params), [found.get(n) for n in graph.params])


def _uses(graph: Graph) -> dict[str, tuple[int, ...] | None]:
    """Kernel to its axes over which a neuron sums, None where rearranging hides them."""
    names = {ident: name for name, ident in graph.params.items()}
    # Value id to the parameters in it, each with the place of the value's axes among its own.
    made: dict[int, dict[str, tuple[int, ...] | None]] = {
        ident: {name: tuple(range(len(graph.values[ident].shape)))} for ident, name in names.items()
    }
    found: dict[str, tuple[int, ...] | None] = {}
    for node in graph.nodes:
        if not any(node.data):
            moved = _carried(graph, node, made)
            made.update((ident, moved) for ident in node.outputs if moved)
        elif node.key in operations.PRODUCTS and sum(node.data[:2]) == 1:
            side = node.data.index(False)
            summed = _summed(node, side)
            for name, places in made.get(node.inputs[side], {}).items():
                if len(graph.values[graph.params[name]].shape) >= 2 and name not in found:
                    found[name] = places and tuple(sorted(places[axis] for axis in summed))
    return {name: found[name] for name in graph.params if name in found}


def _carried(graph: Graph, node: Node, made: dict) -> dict[str, tuple[int, ...] | None]:
    """The parameters that an operation on parameters alone hands on."""
    moved: dict[str, tuple[int, ...] | None] = {}
    if node.key not in operations.ELEMENTWISE | operations.MOVEMENT:
        return moved
    for ident in node.inputs:
        for name, places in made.get(ident, {}).items():
            if node.key == "transpose" and places is not None:
                places = tuple(places[axis] for axis in node.params["permutation"])
            elif node.key in operations.REARRANGE - {"select_n", "transpose"}:
                places = None
            moved.setdefault(name, places)
    return moved


def _summed(node: Node, side: int) -> tuple[int, ...]:
    """Axes of the weights over which an output sums."""
    if node.key == "dot_general":
        return tuple(node.params["dimension_numbers"][0][side])
    numbers = node.params["dimension_numbers"]
    return tuple(numbers.rhs_spec[1:])
