"""Normalisation of images channel by channel, with the figures usual for ImageNet."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Of the red, green and blue of ImageNet's training images, 0..1, as published weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalised(
    x: jax.Array, mean: float | Sequence[float], std: float | Sequence[float]
) -> jax.Array:
    """Images [B, H, W, C] less the mean, over std; each one number, or one a channel."""
    centre, scale = (jnp.asarray(n, x.dtype).reshape(1, 1, 1, -1) for n in (mean, std))
    return (x - centre) / scale
