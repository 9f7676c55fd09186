"""Quantization to 8 bits: pruned networks whose weights, and activations if asked, are whole steps.

Weights are symmetric about 0, as Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko,
"Quantization and training of neural networks for efficient integer-arithmetic-only inference",
CVPR 2018, have those of convolutions in later form: one scale for each output, whole steps from
-127 to 127, so that what is pruned stays exactly 0. Activations are affine, one scale for each
neuron's array, 256 steps that hold 0, between the least and the greatest seen on some images.
Arithmetic stays float32; only what is stored between operations is rounded.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import nnslicer_jax as nns
from nnslicer_jax import batches
from nnslicer_jax.graph import Graph
from prune import criteria
from prune.masks import is_none

_MOST = 127
_STEPS = 255


class Quantized(NamedTuple):
    """A quantized network: `nns.evaluate(graph, q.params(), images, q.edits())` runs it.

    Attributes:
      kept: The parameters, None where there are `steps` and `scales`.
      steps: int8, like the parameters, None where nothing is quantized.
      scales: float32 `[1, ..., outputs]`, like the steps.
      ranges: Neuron name to the least and the greatest value its 256 steps reach.
    """

    kept: Any
    steps: Any
    scales: Any
    ranges: Mapping[str, tuple[float, float]]

    def params(self) -> Any:
        """The parameters, float32, of what the quantized network computes with."""
        return jax.tree.map(
            lambda kept, steps, scale: kept if steps is None else steps.astype("float32") * scale,
            self.kept, self.steps, self.scales, is_leaf=is_none,
        )  # fmt: skip

    def edits(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """The rounding of activations, as `nns.evaluate` takes it."""
        return {
            name: functools.partial(rounded, low=low, high=high)
            for name, (low, high) in self.ranges.items()
        }

    def bytes(self) -> int:
        """What weights, scales and all other parameters take."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.kept, self.steps, self.scales)))


def quantize(graph: Graph, params: Any, images: Any = None, *, batch_size: int = 256) -> Quantized:
    """Quantizes the kernels of a network, and its activations if there are images.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]` or an iterable of batches, by which activations range with the weights
        quantized; None: activations are not quantized.
      batch_size: Images at once.

    Raises:
      ValueError: For parameters that are not finite, or images that do not fit.
    """
    batches.check_params(params)
    names = set(criteria.kernels(graph))
    leaves, structure = jax.tree.flatten(params)
    kept: list[Any] = []
    steps: list[Any] = []
    scales: list[Any] = []
    for name, leaf in zip(graph.params, leaves, strict=True):
        if name not in names:
            kept, steps, scales = [*kept, leaf], [*steps, None], [*scales, None]
            continue
        found, scale = in_steps(leaf)
        kept, steps, scales = [*kept, None], [*steps, found], [*scales, scale]
    trees = [jax.tree.unflatten(structure, part) for part in (kept, steps, scales)]
    made = Quantized(trees[0], trees[1], trees[2], ranges={})
    if images is None:
        return made
    return made._replace(ranges=ranges(graph, made.params(), images, batch_size=batch_size))


def in_steps(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights `[..., outputs]` as int8 steps and the scale `[1, ..., outputs]` of each output."""
    axes = tuple(range(weights.ndim - 1))
    most = jnp.abs(weights).max(axes, keepdims=True)
    scale = jnp.where(most > 0, most, 1) / _MOST
    steps = jnp.clip(jnp.round(weights / scale), -_MOST, _MOST)
    return steps.astype(jnp.int8), scale.astype(jnp.float32)


def rounded(x: jax.Array, low: float, high: float) -> jax.Array:
    """An activation at the nearest of 256 steps from low to high, one of which is 0.

    The gradient passes as if nothing were rounded, 0 where the ends cut off: that of the steps
    themselves is 0, and would hide from attacks where to go.
    """
    if low == high:
        return jnp.zeros_like(x)
    scale = (high - low) / _STEPS
    zero = round(-low / scale)
    smooth = jnp.clip(x / scale + zero, 0, _STEPS)
    steps = jnp.clip(jnp.round(x / scale) + zero, 0, _STEPS)
    steps = smooth + jax.lax.stop_gradient(steps - smooth)
    return ((steps - zero) * scale).astype(x.dtype)


def ranges(
    graph: Graph, params: Any, images: Any, *, batch_size: int = 256
) -> dict[str, tuple[float, float]]:
    """The least and the greatest value of every neuron's array on some images, 0 among them.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: As for `quantize`.
      batch_size: Images at once.

    Returns:
      By neuron name, for those of floats; the logits, which nothing stores, left out.

    Raises:
      ValueError: For images that do not fit.
    """
    floats = {
        name for name, neuron in graph.neurons().items()
        if graph.values[neuron.value].is_float and neuron.value != graph.logits
    }  # fmt: skip

    @jax.jit
    def extremes(params: Any, x: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        _, found = nns.evaluate(graph, params, x)
        return {name: (found[name].min(), found[name].max()) for name in floats}

    made = dict.fromkeys(sorted(floats), (0.0, 0.0))
    for batch, _ in batches.batches(graph, images, batch_size):
        for name, (low, high) in jax.device_get(extremes(params, batch)).items():
            made[name] = min(made[name][0], float(low)), max(made[name][1], float(high))
    return made
