"""A slice turned back into a network that runs, and how well it agrees with the original.

Zhang et al., ESEC/FSE 2020, define a slice as a network of its own; nothing is retrained. What
is left out of a slice is either removed (0) or held at its profiled mean, which is what a delta
of 0 says about it.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax import movement
from nnslicer_jax.batches import across_devices, batches
from nnslicer_jax.contribution import WEIGHTS, Term
from nnslicer_jax.evaluation import evaluate
from nnslicer_jax.fold import Rules, backward, leaves, record, unbatched
from nnslicer_jax.graph import Graph
from nnslicer_jax.profile import Profile, means_by_value, positions
from nnslicer_jax.slices import Slice

FILLS = ("mean", "zero")


class Masked(NamedTuple):
    """A network reduced to a slice; a pytree of arrays.

    Attributes:
      params: Parameters, 0 where a synapse is not in the slice. What divides stays: dividing by
        0 removes nothing.
      scale: Neuron name to 1 where it is in the slice and 0 where not, broadcastable to its
        activation.
      shift: Neuron name to what is added then: the mean of what was left out, or 0.
    """

    params: Any
    scale: Mapping[str, jax.Array]
    shift: Mapping[str, jax.Array]

    @property
    def edits(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Edits under which `evaluate` runs the reduced network."""
        return {name: functools.partial(self._edit, name) for name in self.scale}

    def _edit(self, name: str, activation: jax.Array) -> jax.Array:
        return activation * self.scale[name] + self.shift[name]


def mask_network(
    graph: Graph, params: Any, piece: Slice, fill: str = "mean", profile: Profile | None = None
) -> Masked:
    """Reduces a network to a slice.

    A hidden neuron is out when none of its activations is in the slice; it stands still then.
    The input and the logits stay.

    Args:
      graph: The traced model.
      params: Its parameters.
      piece: One slice (not per sample).
      fill: "mean": what is left out is held at its mean, so that each weighted sum keeps the
        mean of the terms it loses; "zero": it is removed.
      profile: The means, needed for "mean".

    Raises:
      ValueError: For an unknown fill, a missing profile, a per-sample slice, or a slice of
        another network.
    """
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, not {fill!r}")
    if piece.per_sample:
        raise ValueError("mask_network needs one slice; take sample(i) or total() first")
    if fill == "mean" and profile is None:
        raise ValueError("fill='mean' needs the profile")
    found = leaves(graph, params)
    for name, contrib in piece.synapses.items():
        if name not in graph.params or graph.values[graph.params[name]].shape != contrib.shape:
            raise ValueError(f"the slice is of another network: it holds synapses {name}")
    if set(piece.neurons) != set(graph.neurons()):
        odd = sorted(set(piece.neurons) ^ set(graph.neurons()))
        raise ValueError(f"the slice is of another network: they differ at {odd[:3]}")
    removable = set(piece.synapses) - _divisors(graph, params)
    kept = [
        jnp.where(piece.synapses[name] != 0, leaf, 0) if name in removable else leaf
        for name, leaf in zip(graph.params, found, strict=True)
    ]
    masked = jax.tree.unflatten(jax.tree.structure(params), kept)
    lost: dict[int, jax.Array] = {}
    if fill == "mean" and profile is not None:
        lost = _lost(graph, params, masked, means_by_value(graph, profile))
    scale, shift = {}, {}
    for name, neuron in graph.neurons().items():
        if name == "input" or neuron.value > graph.logits:
            continue
        on = (piece.neurons[name] != 0).any(positions(neuron), keepdims=True).astype(np.float32)
        if neuron.value == graph.logits:
            on = np.ones_like(on)
        mean: Any = np.float32(0)
        if profile is not None and fill == "mean":
            mean = profile.means[name]
            mean = mean.reshape(on.shape) if profile.baseline == "channel" else mean
        scale[name] = jnp.asarray(on)
        gone = unbatched(lost[neuron.value], neuron) if neuron.value in lost else 0
        shift[name] = on * gone + (1 - on) * mean
    return Masked(masked, scale, shift)


def _divisors(graph: Graph, params: Any) -> set[str]:
    """Names of the parameters that divide something, and so count for it."""
    seeds = []
    for node in graph.nodes:
        if node.key == "div" and not node.data[1] and (node.data[0] or not node.parameters[0]):
            seeds.append(node.inputs[1])
        elif node.key == "integer_pow" and not node.data[0] and node.params["y"] < 0:
            seeds.append(node.inputs[0])
    seeds = [i for i in seeds if graph.values[i].parameters]
    if not seeds:
        return set()

    def reached(params: Any) -> dict[int, Any]:
        env: list[Any] = record(graph, params, _blank(graph))
        terms = [None if value is None else Term(value, None) for value in env]
        ones = {i: jnp.ones(graph.values[i].shape) for i in seeds}
        return backward(graph, Rules("divisors"), terms, ones, weights=WEIGHTS)

    found = jax.eval_shape(reached, params)
    return {name for name, ident in graph.params.items() if ident in found}


def _blank(graph: Graph) -> jax.Array:
    value = graph.values[graph.input]
    return jnp.zeros(value.shape[1:], value.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _lost(graph: Graph, params: Any, masked: Any, found: dict[int, jax.Array]) -> dict[int, Any]:
    """Value id of each weighted sum to the mean of the terms it lost, of its traced shape."""
    whole: list[Any] = record(graph, params, _blank(graph))
    part: list[Any] = record(graph, masked, _blank(graph))
    means = {i: jnp.broadcast_to(mean, graph.values[i].shape) for i, mean in found.items()}
    lost: dict[int, Any] = {}
    for node in graph.nodes:
        if not any(node.data):
            continue
        if not graph.computes(node):
            moved = [means.get(i, whole[i]) for i in node.inputs]
            values = [whole[i] for i in node.inputs]
            means.update(zip(node.outputs, movement.forward(node, values, moved), strict=True))
        elif node.key in ("dot_general", "conv_general_dilated", "mul"):
            with_all, with_some = (
                node.bind(*[means.get(i, env[i]) for i in node.inputs])[0] for env in (whole, part)
            )
            lost[node.outputs[0]] = with_all - with_some
    return lost


def agreement(
    graph: Graph, params: Any, masked: Masked, images: Any, batch_size: int = 256
) -> float:
    """Share of images, 0..1, whose top-1 class the reduced network shares with the original.

    Args:
      graph: The traced model.
      params: Its parameters.
      masked: The reduced network.
      images: `[N, ...]`, or an iterable of batches.
      batch_size: Images run at once.
    """
    same = total = 0
    for batch in batches(graph, images, batch_size):
        equal = np.asarray(_equal(graph, params, masked, across_devices(batch.images)))
        same += int(equal[: batch.real].sum())
        total += batch.real
    return same / total


@functools.partial(jax.jit, static_argnums=0)
def _equal(graph: Graph, params: Any, masked: Masked, images: jax.Array) -> jax.Array:
    original = evaluate(graph, params, images)[0]
    reduced = evaluate(graph, masked.params, images, masked.edits)[0]
    # Of a model that returns several arrays, the first: what slicing starts from.
    return jnp.argmax(jax.tree.leaves(original)[0], -1) == jnp.argmax(
        jax.tree.leaves(reduced)[0], -1
    )
