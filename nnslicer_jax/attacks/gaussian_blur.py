"""GaussianBlur: as little blur as makes the network err (the attack of that name in Foolbox).

Rauber, Brendel, Bethge, "Foolbox: A Python toolbox to benchmark the robustness of machine learning
models", 2017. Standard deviations are tried from small to large; images are mirrored at
their edges (the outermost pixel is repeated), and the Gaussian ends at four deviations.
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
    check_sizes,
    l2,
    run,
)
from nnslicer_jax.attacks.warping import blur_matrix


def gaussian_blur(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    steps: int = 1000,
    max_sigma: float | None = None,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for the least Gaussian blur that fools the network.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      steps: How many standard deviations are tried, evenly spaced.
      max_sigma: The largest, in pixels; the larger of H and W unless given, and at most that.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Images with the least blur, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    side = max(check_picture(images))
    check_counts(steps=steps)
    sigma = side if max_sigma is None else max_sigma
    check_sizes(max_sigma=sigma)
    if sigma > side:
        raise ValueError(f"max_sigma must be at most {side}, the images' side, not {max_sigma}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        steps=steps, max_sigma=float(sigma),
    )  # fmt: skip


class BlurState(NamedTuple):
    """The image as blurred last, whether to go on, and how many deviations were tried."""

    image: jax.Array
    going: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> BlurState:
    return BlurState(case.image, ~case.fools(case.image), jnp.int32(0))


def _step(case: Case, state: BlurState, *, steps: int, max_sigma: jax.Array) -> BlurState:
    rows, columns, _ = case.image.shape
    sigma = (state.step + 1) / steps * max_sigma
    vertical, horizontal = (
        blur_matrix(size, sigma, max(rows, columns)) for size in (rows, columns)
    )
    image = case.clip(jnp.einsum("yi,xj,ijc->yxc", vertical, horizontal, case.image))
    going = ~case.fools(image) & (state.step + 1 < steps)
    return BlurState(image, going, state.step + 1)


_SEARCH = Search(_start, _step)
