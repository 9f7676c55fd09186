"""A static slice: what the weights alone say of who contributes to chosen outputs, for no input.

The dynamic slice of NNSlicer (Zhang et al., ESEC/FSE 2020, Algorithm 1) with every activation
and every delta put at 1: the local contribution of a weighted sum is CONTRIB * w, theta weighs
the weights themselves against each other, and signs are summed as before. A rectifier is open
and every element of a maximum is one. The paper names static slices as open; this reading of
them is ours.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import contribution, operations
from nnslicer_jax.batches import check_params
from nnslicer_jax.contribution import deltas
from nnslicer_jax.fold import Rules, forward, leaves
from nnslicer_jax.graph import Graph, Node, UnsupportedError
from nnslicer_jax.selection import Selection
from nnslicer_jax.slices import Slice
from nnslicer_jax.slicing import as_slice, check_criterion, criterion_neuron, seeds_of, walk_back


def static_slice(
    graph: Graph,
    params: Any,
    outputs: Sequence[int],
    theta: float = 0.2,
    rule: str = "signed",
    *,
    neuron: str | None = None,
) -> Slice:
    """Slices a network for chosen outputs and no input.

    Args:
      graph: The traced model.
      params: Its parameters.
      outputs: `[k]` class indices of the output neurons of interest.
      theta: Size of the slice, 0..1: 0 keeps every term, more keeps fewer.
      rule: "signed" or "mass", as for `slice_network`.
      neuron: Name of a neuron on which the criterion stands instead of the logits; `outputs` are
        indices of its channels.

    Returns:
      The slice, int32, as that of one sample.

    Raises:
      ValueError: For an option, class index or parameters that are not accepted.
      UnsupportedError: Where the model takes data from places that depend on the sample.

    Warns:
      UserWarning: As `slice_network`.
    """
    if rule not in ("signed", "mass"):
        raise ValueError(f"rule must be signed or mass, not {rule!r}")
    if not 0 <= theta <= 1:
        raise ValueError(f"theta must be in 0..1, not {theta}")
    start = criterion_neuron(graph, neuron)
    # As for one image.
    chosen = check_criterion(start, np.asarray(outputs)[None], 1)
    seed = seeds_of(start, chosen, 1)[0]
    leaves(graph, params)
    check_params(params)
    walked = _walk(graph, rule, theta > 0, start, params, seed, np.float32(theta))
    synapses, neurons = jax.tree.map(np.asarray, walked)
    about: dict[str, Any] = {"method": "static", "rule": rule, "theta": float(theta)}
    if neuron is not None:
        about["neuron"] = neuron
    found = as_slice(graph, synapses, neurons, count=1, per_sample=False)
    return dataclasses.replace(found, criterion=about)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _walk(graph, rule, filtered, start, params, seed, theta):
    sample = graph.values[graph.input]
    ones = Rules("static slice", default=functools.partial(_one, graph))
    env = forward(graph, ones, [*leaves(graph, params), jnp.ones(sample.shape, sample.dtype)])
    means = {neuron.value: jnp.float32(0) for neuron in graph.neurons().values()}
    selection = Selection(rule, theta if filtered else None)
    terms = deltas(graph, env, means)
    return walk_back(graph, contribution.RULES, terms, start, seed, selection)


def _one(graph: Graph, node: Node, *args: jax.Array) -> tuple[jax.Array, ...]:
    """1 for what the node computes; what it moves stays, 0 in the padding."""
    conditions = [data for i, data in enumerate(node.data) if i not in node.moved]
    if node.key in operations.ORDER or (any(conditions) and node.key != "select_n"):
        raise UnsupportedError(f"static slice: {node} takes data from where the sample says")
    if not graph.computes(node):
        return node.bind(*args)
    values = [graph.values[i] for i in node.outputs]
    return tuple(jnp.ones(value.shape, value.dtype) for value in values)
