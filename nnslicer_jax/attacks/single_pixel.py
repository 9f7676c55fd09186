"""SinglePixel: one pixel set to the least or the greatest value.

Narodytska, Kasiviswanathan, "Simple Black-Box Adversarial Perturbations for Deep Networks", 2016,
section 4 ("random pixels"): pixels are tried in random order, all channels at once. Of those that
fool the network the closest in L2 is kept, where the paper would stop at the first.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax.attacks.adversarial import (
    BATCH_SIZE,
    Adversarial,
    Case,
    Search,
    check_counts,
    check_picture,
    l2,
    run,
)


def single_pixel(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    max_pixels: int = 1000,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for a single pixel that fools the network.

    Args:
      key: Draws which pixels are tried.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      max_pixels: How many pixels are tried, at most all.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_picture(images)
    check_counts(max_pixels=max_pixels)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        max_pixels=max_pixels,
    )  # fmt: skip


class SinglePixelState(NamedTuple):
    """Where a search is.

    Attributes:
      image: The closest adversarial image so far; the original while there is none.
      going: Whether pixels are left.
      distance: Of `image`; infinite while there is none.
      order: `[H * W]` indices of pixels, in the order they are tried in.
      step: How many images were tried, two a pixel.
    """

    image: jax.Array
    going: jax.Array
    distance: jax.Array
    order: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> SinglePixelState:
    height, width, _channels = case.image.shape
    order = jax.random.permutation(key, height * width)
    right = ~case.fools(case.image)
    return SinglePixelState(case.image, right, jnp.float32(jnp.inf), order, jnp.int32(0))


def _step(case: Case, state: SinglePixelState, *, max_pixels: int) -> SinglePixelState:
    height, width, channels = case.image.shape
    value = jnp.where(state.step % 2 == 0, case.low, case.high)
    pixels = case.image.reshape(-1, channels)
    image = pixels.at[state.order[state.step // 2]].set(value).reshape(case.image.shape)
    distance = l2(image - case.image)
    closer = case.fools(image) & (distance < state.distance)
    return SinglePixelState(
        jnp.where(closer, image, state.image),
        state.step + 1 < 2 * min(max_pixels, height * width),
        jnp.where(closer, distance, state.distance),
        state.order,
        state.step + 1,
    )


_SEARCH = Search(_start, _step)
