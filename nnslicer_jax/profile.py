"""Profiling: how active each neuron is on average over a data set.

First phase of NNSlicer (Zhang et al., ESEC/FSE 2020, Eq. 1). One streaming pass in constant
memory: a batch's means are taken on the device, sample by sample, and merged in float64.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.batches import across_devices, batches, check_params, count
from nnslicer_jax.fold import leaves, record, unbatched
from nnslicer_jax.graph import Graph, Neuron, Node
from nnslicer_jax.progress import Progress
from nnslicer_jax.tensors import read_tensors, write_tensors

# Sums over a batch are taken this much smaller, for attention masks put -3e38 into them; a power
# of two changes no other digit.
_SMALL = 2.0**-24
BASELINES = ("channel", "position")


@dataclasses.dataclass(frozen=True)
class Profile:
    """Mean activations.

    Attributes:
      means: Neuron name to float32 means: `[C]`, one a channel, under baseline "channel"; the
        activation's shape under "position".
      baseline: "channel" or "position".
      count: Number of samples profiled.
      low: Least input value met.
      high: Greatest input value met.
    """

    means: Mapping[str, np.ndarray]
    baseline: str
    count: int
    low: float
    high: float

    def __add__(self, other: "Profile") -> "Profile":
        """The profile of both sets of samples together, as of two processes' shares."""
        if self.baseline != other.baseline or set(self.means) != set(other.means):
            raise ValueError("the profiles are of different networks or baselines")
        count = self.count + other.count
        share = np.float64(other.count) / count
        means = {
            name: (mean + (other.means[name] - np.float64(mean)) * share).astype(np.float32)
            for name, mean in self.means.items()
        }
        span = min(self.low, other.low), max(self.high, other.high)
        return Profile(means, self.baseline, count, *span)

    def save(self, path: str | Path) -> None:
        """Writes the profile to a safetensors file, whole or not at all."""
        about = {name: getattr(self, name) for name in ("baseline", "count", "low", "high")}
        write_tensors(path, self.means, {"profile": json.dumps(about)})


def load_profile(path: str | Path) -> Profile:
    """Reads what `Profile.save` wrote.

    Raises:
      ValueError: If the file is missing, truncated, or no profile.
    """
    means, about = read_tensors(
        path, "profile", {"baseline": str, "count": int, "low": (int, float), "high": (int, float)}
    )
    if about["baseline"] not in BASELINES or about["count"] < 1:
        raise ValueError(f"{path} is not a profile: its header is damaged")
    for name, mean in means.items():
        if mean.dtype != np.float32:
            raise ValueError(f"{path} is not a profile: {name} is {mean.dtype}, not float32")
    return Profile(means, **about)


def profile(
    graph: Graph,
    params: Any,
    images: Any,
    baseline: str = "channel",
    batch_size: int = 256,
    *,
    progress: bool = False,
) -> Profile:
    """Mean activation of every neuron over `images`.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]`, or an iterable of batches `[B, ...]` for sets that do not fit memory.
      baseline: "channel", one mean for each channel over samples and positions (Eq. 1), or
        "position", one for each activation (the released code).
      batch_size: Samples run at once.
      progress: Print a line of progress to standard error.

    Raises:
      ValueError: For an unknown baseline, images or params that do not fit the graph, an empty
        set, or values that are not finite.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, not {baseline!r}")
    leaves(graph, params)
    check_params(params)
    sums: dict[str, Any] = {}
    total, low, high = 0, np.inf, -np.inf
    line = Progress("profiled", count(images), "images") if progress else None
    for batch in batches(graph, images, batch_size):
        weight = np.zeros(len(batch.images), np.float32)
        weight[: batch.real] = 1
        placed = across_devices(batch.images)
        # The same precision as slicing, whose deltas are differences from these means.
        with jax.default_matmul_precision("highest"):
            part, ends = _totals(graph, baseline, params, placed, weight)
        total += batch.real
        if line:
            line.at(total)
        for name, (first, change) in _deviations(graph, baseline, *part).items():
            sums[name] = sums.get(name, 0) + batch.real * first + change
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    means = {name: (found / total).astype(np.float32) for name, found in sums.items()}
    for name, mean in means.items():
        if not np.isfinite(mean).all():
            raise ValueError(f"activations of {name} are not finite; the model or its input is off")
    return Profile(means, baseline, total, low, high)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _totals(graph: Graph, baseline: str, params: Any, images: jax.Array, weight: jax.Array) -> Any:
    neurons, followers = graph.neurons(), _followers(graph)

    def one(sample: jax.Array) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        env = record(graph, params, sample)
        found = {k: unbatched(env[n.value], n).astype(jnp.float32) for k, n in neurons.items()}
        # The operand of a follower that does not read the sample.
        others = {
            name: env[node.inputs[-1 - node.data.index(True)]]
            for name, node in followers.items()
            if len(node.inputs) > 1
        }
        return found, others

    found, others = jax.vmap(one, out_axes=(0, None))(images)
    firsts, changes = {}, {}
    for name, activations in found.items():
        # Deviations from a first activation are summed: that is exact for a neuron that never
        # changes, and an offset costs no precision. The weights are 0 for a batch's padding.
        axes = tuple(a + 1 for a in positions(neurons[name])) if baseline == "channel" else ()
        first = activations[:1]
        for axis in axes:
            first = jax.lax.slice_in_dim(first, 0, 1, axis=axis)
        firsts[name] = first.reshape([n for a, n in enumerate(first.shape) if a not in (0, *axes)])
        if name not in followers:
            change = (activations - first) * _SMALL
            changes[name] = jnp.tensordot(weight, change.mean(axes), 1)
    return (firsts, changes, others), (images.min(), images.max())


def _deviations(
    graph: Graph, baseline: str, firsts: Any, changes: Any, others: Any
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """First activation and summed deviations from it, float64, of every neuron."""
    names = {neuron.value: name for name, neuron in graph.neurons().items()}
    followers = _followers(graph)
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, neuron in graph.neurons().items():
        first = np.asarray(firsts[name], np.float64)
        if name in followers:
            node = followers[name]
            _, change = found[names[node.inputs[node.data.index(True)]]]
            factor = _factor(node, neuron, others.get(name))
            if baseline == "channel" and np.ndim(factor):
                factor = factor.reshape(-1)
            change = change * factor
        else:
            change = np.asarray(changes[name], np.float64) / _SMALL
        found[name] = first, change
    return found


def _followers(graph: Graph) -> dict[str, Node]:
    """Neurons that shift or scale each channel of another one, as a bias or batch norm does.

    Their deviations follow from the other's, which saves more than half of the passes over
    activations.
    """
    by_value = {neuron.value: neuron for neuron in graph.neurons().values()}
    found = {}
    for node in graph.nodes:
        if node.key not in ("add", "sub", "mul", "div", "neg") or sum(node.data) != 1:
            continue
        source = by_value.get(node.inputs[node.data.index(True)])
        neuron = by_value.get(node.outputs[0])
        if source is None or neuron is None or source[2:] != neuron[2:]:
            continue
        # In fewer bits the deviations are rounded anew.
        if neuron.dtype != jnp.float32:
            continue
        alike = all(
            n == 1 or a == neuron.axis
            for i, data in zip(node.inputs, node.data, strict=True)
            if not data
            for a, n in enumerate(graph.values[i].shape)
        )
        if alike:
            found[neuron.name] = node
    return found


def _factor(node: Node, neuron: Neuron, value: Any) -> Any:
    """What a follower multiplies deviations by, broadcastable to one sample's activation."""
    if node.key == "neg" or (node.key == "sub" and node.data[1]):
        return -1.0
    if node.key not in ("mul", "div"):
        return 1.0
    value = np.asarray(value, np.float64)
    if value.ndim and neuron.batch is not None:
        value = value.squeeze(neuron.batch)
    return value if node.key == "mul" else 1 / value


def positions(neuron: Neuron) -> tuple[int, ...]:
    """Axes of a neuron's activation that are positions."""
    return tuple(a for a in range(len(neuron.shape)) if a != neuron.channel)


def means_by_value(graph: Graph, found: Profile) -> dict[int, np.ndarray]:
    """Value id of each neuron to its means, broadcastable to the value's traced shape.

    Raises:
      ValueError: If the profile is not of this graph.
    """
    neurons = graph.neurons()
    if set(neurons) != set(found.means):
        odd = sorted(set(neurons) ^ set(found.means))
        raise ValueError(f"the profile is of another model: they differ at {odd[:3]}")
    return {
        neuron.value: _broadcastable(graph, neuron, found.means[name], found.baseline)
        for name, neuron in neurons.items()
    }


def _broadcastable(graph: Graph, neuron: Neuron, mean: Any, baseline: str) -> Any:
    """A neuron's means in a shape that broadcasts to its value's traced shape."""
    shape = list(graph.values[neuron.value].shape)
    if baseline == "channel":
        shape = [n if a == neuron.axis else 1 for a, n in enumerate(shape)]
    if mean.size != math.prod(shape):
        raise ValueError(f"the profile is of another model: {neuron.name} has {mean.shape} means")
    return mean.reshape(shape)
