"""Adversarial inputs that resemble a normal input of another class all the way up the network.

Sabour, Cao, Faghri, Fleet: "Adversarial Manipulation of Deep Representations", ICLR 2016, section
2: within a small change of the image, come as close as possible to the activations that a guide
image has. A detector that looks at activations, or at slices made of them, then sees what it
learned to be normal for the guide's class. Here for several layers at once, each layer's distance
counted relative to the one at the start, and by projected sign-gradient steps in place of L-BFGS.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax.attacks.adversarial import check_counts, check_eps, check_pixels, check_sizes
from nnslicer_jax.batches import filled

# A layer in which image and guide agree from the start has no distance to count by.
_LEAST = 1e-12


def feature_adversary(
    graph: nns.Graph,
    params: Any,
    images: Any,
    guides: Any,
    neurons: Sequence[str],
    *,
    eps: float,
    steps: int = 60,
    relative_step: float = 1 / 15,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = 64,
) -> np.ndarray:
    """Moves images within eps so that their activations become those of their guides.

    Whether the network is fooled is for the caller to look at.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      guides: `[N, ...]` floats within `bounds`, the image that each is to resemble.
      neurons: Names of the activations to match, as `graph.neurons()` lists them.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      steps: Gradient steps, from the image.
      relative_step: Length of a step, in eps.
      bounds: Least and greatest pixel value.
      batch_size: Images moved at once, which bounds the memory.

    Returns:
      `[N, ...]`, dtype of the images, within eps of them and within `bounds`.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    eps = check_eps(eps, bounds)
    check_counts(steps=steps, batch_size=batch_size)
    check_sizes(relative_step=relative_step)
    images = check_pixels(images, bounds)
    guides = check_pixels(guides, bounds, name="guides")
    shape = graph.values[graph.input].shape[1:]
    if images.shape[1:] != shape:
        raise ValueError(
            f"images must be [N, {', '.join(map(str, shape))}] as the model was traced, not "
            f"{images.shape}"
        )
    if images.shape != guides.shape:
        raise ValueError(
            f"guides must be one for each of the images {images.shape}, not {guides.shape}"
        )
    if isinstance(neurons, str):
        raise ValueError(f"neurons must be a list of names, not {neurons!r}")
    unknown = [name for name in neurons if name not in graph.neurons()]
    if unknown or not neurons:
        given = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"neurons must name some of graph.neurons(), given {given}")
    size = min(batch_size, len(images))
    moved = []
    for which in filled(len(images), size):
        start, names = jnp.asarray(images[which]), tuple(neurons)
        aim, far = _aim(graph, names, params, start, jnp.asarray(guides[which]))
        now = start
        # The host makes the steps: a rolled loop is much slower on a CPU.
        for _ in range(steps):
            now = _step(graph, names, params, now, start, aim, far, eps, relative_step, bounds)
        moved.append(np.asarray(now))
    return np.concatenate(moved)[: len(images)]


def _distances(graph: nns.Graph, names: tuple[str, ...], params: Any, images: Any, aim: Any) -> Any:
    """Squared distance of each image's activations from the aim, `[B]` for each neuron."""
    found = nns.evaluate(graph, params, images)[1]
    return {
        name: jnp.square(found[name] - aim[name]).reshape(len(images), -1).sum(1) for name in names
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def _aim(graph: nns.Graph, names: tuple[str, ...], params: Any, start: Any, guides: Any) -> Any:
    found = nns.evaluate(graph, params, guides)[1]
    aim = {name: found[name] for name in names}
    return aim, _distances(graph, names, params, start, aim)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(
    graph: nns.Graph, names: tuple[str, ...], params: Any, now: Any, start: Any, aim: Any,
    far: Any, eps: Any, relative_step: Any, bounds: Any,
) -> Any:  # fmt: skip
    def loss(images: Any) -> Any:
        near = _distances(graph, names, params, images, aim)
        # Images are apart in every term, so the sum's gradient is each one's own.
        return sum((near[name] / jnp.maximum(far[name], _LEAST)).sum() for name in names)

    step = now - relative_step * eps * jnp.sign(jax.grad(loss)(now))
    low, high = bounds
    return jnp.clip(jnp.clip(step, start - eps, start + eps), low, high).astype(start.dtype)
