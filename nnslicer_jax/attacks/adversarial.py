"""What every attack takes and returns."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Adversarial(NamedTuple):
    """Images changed so that a network errs.

    Attributes:
      images: `[N, ...]`, dtype and bounds as the images attacked.
      success: `[N]` bool: whether the network, run on `images`, predicts another class than
        the label. True as well where it already did so before.
      distance: `[N]` float32: how far each image was moved, in the attack's norm.
    """

    images: jax.Array
    success: jax.Array
    distance: jax.Array


def check(
    apply: Callable, params: Any, images: Any, labels: Any, bounds: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Images and labels as arrays on the device.

    Raises:
      ValueError: For images that are empty, no floats, not finite or outside `bounds`; for
        labels that are no class indices `[N]`; for a network that returns no logits `[N, K]`.
    """
    low, high = bounds
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, not {bounds}")
    pixels, classes = np.asarray(images), np.asarray(labels)
    if pixels.ndim < 2 or len(pixels) == 0:
        raise ValueError(f"images must be [N, ...] with N of at least 1, not {pixels.shape}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"images must be floats in {low:g}..{high:g}, not {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError("images must be finite; some are NaN or infinite")
    if pixels.min() < low or pixels.max() > high:
        given = f"{pixels.min():g}..{pixels.max():g}"
        raise ValueError(f"images must lie in {low:g}..{high:g}, given {given}")
    if classes.shape != (len(pixels),) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [{len(pixels)}], one an image, not {classes.dtype} of "
            f"shape {classes.shape}"
        )
    logits = jax.eval_shape(apply, params, jax.ShapeDtypeStruct(pixels.shape, pixels.dtype))
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(pixels) or shape[1] < 2:
        given = type(logits).__name__ if shape is None else shape
        raise ValueError(f"apply must return logits [N, K] of 2 classes or more, not {given}")
    if classes.min() < 0 or classes.max() >= shape[1]:
        raise ValueError(
            f"labels must be below {shape[1]}, the model's number of classes; given "
            f"{classes.min()}..{classes.max()}"
        )
    return jnp.asarray(pixels), jnp.asarray(classes)
