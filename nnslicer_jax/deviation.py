"""Neurons that contribute otherwise than is normal for a class, and networks without them.

Zhang et al., ESEC/FSE 2020, name as open whether a wrong prediction is repaired by masking the
neurons that deviate in its slice. Here a neuron (a channel) deviates by the difference of its
CONTRIB from the mean over inputs of a class, in standard deviations, and a masked one is held at
its profiled mean; which neurons an image loses is its own.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.batches import batches
from nnslicer_jax.evaluation import evaluate
from nnslicer_jax.fold import check_names
from nnslicer_jax.graph import Graph
from nnslicer_jax.profile import Profile


class Normal(NamedTuple):
    """What neurons contribute to the slices of each class.

    Attributes:
      mean: Neuron name to the mean CONTRIB of its channels, `[K, C]` float64.
      std: Neuron name to their standard deviation, `[K, C]` float64.
    """

    mean: Mapping[str, np.ndarray]
    std: Mapping[str, np.ndarray]


def normal(contrib: Mapping[str, np.ndarray], labels: Any, classes: int) -> Normal:
    """Mean and deviation of CONTRIB over the inputs of each class.

    Args:
      contrib: Neuron name to the CONTRIB of its channels, `[N, C]`, as `Slice.channels` returns
        it; the neurons that are compared.
      labels: `[N]` class of each input, 0..classes - 1.
      classes: Number of classes K.

    Raises:
      ValueError: For labels that do not fit, or a class without an input.
    """
    labels = _labels(contrib, labels, classes)
    missing = sorted(set(range(classes)) - set(labels.tolist()))
    if missing:
        raise ValueError(f"labels must hold every class below {classes}; {missing[0]} is missing")
    groups = [np.flatnonzero(labels == label) for label in range(classes)]

    def over_classes(statistic: Any) -> dict[str, np.ndarray]:
        return {
            name: np.stack([statistic(found[rows].astype(np.float64), axis=0) for rows in groups])
            for name, found in contrib.items()
        }

    return Normal(over_classes(np.mean), over_classes(np.std))


def deviation(
    contrib: Mapping[str, np.ndarray], labels: Any, usual: Normal
) -> dict[str, np.ndarray]:
    """How far each neuron is from what is normal for a class.

    Args:
      contrib: Neuron name to the CONTRIB of its channels, `[N, C]`.
      labels: `[N]` class that each input is compared with.
      usual: What is normal, of the same neurons.

    Returns:
      Neuron name to |CONTRIB - mean| / std, `[N, C]` float64; a std below 1, which is one edge,
      counts as 1.

    Raises:
      ValueError: For other neurons than those of `usual`, or labels that do not fit.
    """
    if set(contrib) != set(usual.mean):
        odd = sorted(set(contrib) ^ set(usual.mean))
        raise ValueError(f"contrib holds other neurons than usual: they differ at {odd[:3]}")
    classes = len(next(iter(usual.mean.values())))
    labels = _labels(contrib, labels, classes)
    return {
        name: np.abs(found - usual.mean[name][labels]) / np.maximum(usual.std[name][labels], 1)
        for name, found in contrib.items()
    }


def top(scores: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Each input's `count` highest scores among all neurons.

    Args:
      scores: Neuron name to `[N, C]`; equal ones go by the order of neurons and channels.
      count: Neurons to choose for each input, 0 or more; all where there are fewer.

    Returns:
      Neuron name to `[N, C]` bool.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, not {count}")
    side_by_side = np.concatenate(list(scores.values()), axis=1)
    order = np.argsort(-side_by_side, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(side_by_side.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    ends = np.cumsum([found.shape[1] for found in scores.values()])[:-1]
    return dict(zip(scores, np.split(chosen, ends, axis=1), strict=True))


def logits_without(
    graph: Graph,
    params: Any,
    profile: Profile,
    images: Any,
    held: Mapping[str, np.ndarray],
    batch_size: int = 256,
) -> np.ndarray:
    """Runs every image through the network with neurons of its own held at their means.

    Args:
      graph: The traced model.
      params: Its parameters.
      profile: The means.
      images: `[N, ...]`.
      held: Neuron name to which of its channels each image loses, `[N, C]` bool.
      batch_size: Images run at once.

    Returns:
      The model's output (of several, the first), `[N, K]`.

    Raises:
      ValueError: For an unknown neuron or a mask of the wrong shape.
    """
    neurons = check_names(graph, held)
    for name, mask in held.items():
        shape = (len(images), *neurons[name].shape[neurons[name].channel :][:1])
        if np.shape(mask) != shape or np.asarray(mask).dtype != bool:
            raise ValueError(
                f"held {name} must be bool {shape}, not {np.asarray(mask).dtype} {np.shape(mask)}"
            )
    means = {name: profile.means[name] for name in held}
    found, start = [], 0
    for batch in batches(graph, images, batch_size):
        # Filled up as the images are.
        rows = np.minimum(np.arange(start, start + len(batch.images)), start + batch.real - 1)
        some = {name: np.asarray(mask)[rows] for name, mask in held.items()}
        start += batch.real
        found.append(np.asarray(_logits(graph, params, means, batch.images, some))[: batch.real])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: Graph, params: Any, means: Any, images: jax.Array, held: Any) -> jax.Array:
    neurons = graph.neurons()

    def hold(name: str, mask: jax.Array, activation: jax.Array) -> jax.Array:
        neuron, mean = neurons[name], means[name]
        line = [n if a == neuron.channel else 1 for a, n in enumerate(neuron.shape)]
        mean = mean if mean.shape == neuron.shape else mean.reshape(line)
        return jnp.where(mask.reshape(line), mean, activation)

    def one(image: jax.Array, masks: dict[str, jax.Array]) -> jax.Array:
        edits = {name: functools.partial(hold, name, mask) for name, mask in masks.items()}
        return jax.tree.leaves(evaluate(graph, params, image[None], edits)[0])[0][0]

    return jax.vmap(one)(images, held)


def _labels(contrib: Mapping[str, np.ndarray], labels: Any, classes: int) -> np.ndarray:
    """The labels, checked."""
    labels = np.asarray(labels)
    if not contrib:
        raise ValueError("contrib is empty; it must hold at least one neuron")
    rows = {len(found) for found in contrib.values()}
    if rows != {len(np.atleast_1d(labels))} or labels.ndim != 1:
        raise ValueError(
            f"labels must have one class for each of {max(rows)} inputs, not shape {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be class indices, not {labels.dtype}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels must be below {classes}, the number of classes; given "
            f"{labels.min()}..{labels.max()}"
        )
    return labels
