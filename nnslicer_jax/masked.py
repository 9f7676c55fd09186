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

from nnslicer_jax import movement, operations
from nnslicer_jax.batches import across_devices, batches
from nnslicer_jax.contribution import WEIGHTS, Term
from nnslicer_jax.evaluation import evaluate
from nnslicer_jax.fold import Rules, backward, leaves, record, unbatched
from nnslicer_jax.graph import Graph, Node
from nnslicer_jax.profile import Profile, means_by_value, positions
from nnslicer_jax.slices import Slice

FILLS = ("mean", "zero")


class Masked(NamedTuple):
    """A network reduced to a slice; a pytree of arrays.

    Attributes:
      params: Parameters, 0 where a synapse is not in the slice; whole where that removes nothing,
        as of a divisor, `exp(w)` or `1 + w`. A normalised weight is normalised over what is left.
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
        # An activation of -inf, as of masked attention, times 0 is no number.
        return jnp.where(self.scale[name] != 0, activation, 0) + self.shift[name]


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
        mean of the terms it loses; "zero": it is removed, but for neurons that something is
        divided by, or whose logarithm is taken.
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
    removable = set(piece.synapses) - _lasting(graph, params)
    kept = [
        jnp.where(piece.synapses[name] != 0, leaf, 0) if name in removable else leaf
        for name, leaf in zip(graph.params, found, strict=True)
    ]
    masked = jax.tree.unflatten(jax.tree.structure(params), kept)
    lost: dict[int, jax.Array] = {}
    if fill == "mean" and profile is not None:
        lost = _lost(graph, params, masked, means_by_value(graph, profile))
    staying = _poles(graph) if fill == "zero" else set()
    scale, shift = {}, {}
    for name, neuron in graph.neurons().items():
        if name == "input" or neuron.value > graph.logits or neuron.value in staying:
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


def _lasting(graph: Graph, params: Any) -> set[str]:
    """Names of the parameters from which something is made that is not 0 where they are."""
    left = _left(graph, params)
    seeds = [i for node in graph.nodes if left.get(node.index) for i in _weights(node)]
    if not seeds:
        return set()

    def reached(params: Any) -> dict[int, Any]:
        env: list[Any] = record(graph, params, _blank(graph))
        terms = [None if value is None else Term(value, None) for value in env]
        ones = {i: jnp.ones(graph.values[i].shape) for i in seeds}
        return backward(graph, Rules("lasting"), terms, ones, weights=WEIGHTS)

    found = jax.eval_shape(reached, params)
    return {name for name, ident in graph.params.items() if ident in found}


def _poles(graph: Graph) -> set[int]:
    """Value ids of the neurons of which something is made that is infinite where they are 0."""
    source: dict[int, int] = {}
    found = set()
    for node in graph.nodes:
        moved = [source[node.inputs[i]] for i in node.moved if node.inputs[i] in source]
        if graph.computes(node) or not moved:
            source.update((i, i) for i in node.outputs)
        else:
            source.update((i, moved[0]) for i in node.outputs)
        if node.key in operations.UNARY and node.data == (True,):
            with jax.ensure_compile_time_eval():
                (out,) = node.bind(jnp.zeros((), graph.values[node.inputs[0]].dtype))
            if jnp.issubdtype(out.dtype, jnp.floating) and not np.isfinite(out):
                found.add(source[node.inputs[0]])
    return found


@functools.partial(jax.jit, static_argnums=0)
def _left(graph: Graph, params: Any) -> dict[int, jax.Array]:
    """For nodes that make a weight from weights, whether any of it is left once those are 0."""
    env: list[Any] = record(graph, params, _blank(graph))
    left = {}
    for node in graph.nodes:
        gone = _weights(node)
        if gone:
            args = [jnp.zeros_like(env[i]) if i in gone else env[i] for i in node.inputs]
            left[node.index] = jnp.stack([(out != 0).any() for out in node.bind(*args)]).any()
    return left


def _weights(node: Node) -> list[int]:
    """Value ids of the weights that an element-wise node makes something of, or divides by."""
    weights = [
        i for i, param, data in zip(node.inputs, node.param, node.data, strict=True)
        if param and not data
    ]  # fmt: skip
    if node.key == "div" and node.inputs[1] in weights:
        # What divides a weight, as its norm, follows from it.
        return weights[:1]
    elementwise = node.key in operations.ELEMENTWISE - operations.MOVEMENT
    return weights if elementwise and not any(node.data) else []


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

    Raises:
      ValueError: If the reduced network returns logits that are not finite.
    """
    same = total = 0
    for batch in batches(graph, images, batch_size):
        found = _equal(graph, params, masked, across_devices(batch.images))
        equal, finite = (np.asarray(a)[: batch.real] for a in found)
        if not finite.all():
            raise ValueError("the reduced network returns logits that are not finite")
        same += int(equal.sum())
        total += batch.real
    return same / total


@functools.partial(jax.jit, static_argnums=0)
def _equal(
    graph: Graph, params: Any, masked: Masked, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """For each image whether the classes are equal, and whether the reduced logits are finite."""
    # Of a model that returns several arrays, the first: what slicing starts from.
    original = jax.tree.leaves(evaluate(graph, params, images)[0])[0]
    reduced = jax.tree.leaves(evaluate(graph, masked.params, images, masked.edits)[0])[0]
    return jnp.argmax(original, -1) == jnp.argmax(reduced, -1), jnp.isfinite(reduced).all(-1)
