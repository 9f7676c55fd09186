"""FGSM: one step along the sign of the gradient (Goodfellow et al., ICLR 2015, section 4)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnslicer_jax.attacks.adversarial import Adversarial, check


def fgsm(
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    eps: float,
    bounds: tuple[float, float] = (0, 1),
) -> Adversarial:
    """Moves every pixel by at most eps to where the cross-entropy grows.

    Args:
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`; attacked as one batch.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      bounds: Least and greatest pixel value.

    Returns:
      Adversarial images with their distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    pixels, classes = check(apply, params, images, labels, bounds)
    width = bounds[1] - bounds[0]
    if not 0 <= eps <= width:
        raise ValueError(f"eps must be in 0..{width:g}, the width of bounds, not {eps}")
    return _fgsm(apply, params, pixels, classes, eps, bounds)


@functools.partial(jax.jit, static_argnums=0)
def _fgsm(
    apply: Callable,
    params: Any,
    images: jax.Array,
    labels: jax.Array,
    eps: float,
    bounds: tuple[float, float],
) -> Adversarial:
    def margin(pixels: jax.Array) -> jax.Array:
        # Cross-entropy is softplus of this margin: one sign of the gradient, but this one does
        # not round to 0 where the network is sure of itself.
        logits = apply(params, pixels)
        true = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
        others = jax.nn.logsumexp(jnp.where(true, -jnp.inf, logits), axis=1)
        return jnp.sum(others - jnp.where(true, logits, 0).sum(1))

    step = jnp.sign(jax.grad(margin)(images))
    moved = jnp.clip(images + eps * step, *bounds).astype(images.dtype)
    success = jnp.argmax(apply(params, moved), axis=1) != labels
    distance = jnp.abs(moved - images).max(tuple(range(1, images.ndim)))
    return Adversarial(moved, success, distance.astype(jnp.float32))
