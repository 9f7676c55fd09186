"""ADef: an image deformed rather than painted over.

Alaifari, Alberti, Gauksson, "ADef: an Iterative Algorithm to Construct Adversarial Deformations",
ICLR 2019, section 2 and algorithm 1: DeepFool's step, taken in the space of vector fields that say
where every pixel comes from, smoothed by a Gaussian. As in the authors' code, the image is
interpolated from the original by the sum of the fields, its slope is a central difference, and a
deformation that still fails after the last step is drawn out by a fifth.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.attacks.adversarial import (
    BATCH_SIZE,
    Adversarial,
    Case,
    Search,
    check_counts,
    check_numbers,
    check_picture,
    l2,
    run,
)
from nnslicer_jax.attacks.warping import blur_matrix, sample

_OVERSHOOT = 1.2


def adef(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    steps: int = 100,
    candidates: int = 10,
    smooth: float = 1.0,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for a small deformation that fools the network.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      steps: Most steps.
      candidates: How many classes are looked at, the label and the likeliest others; at least 2.
      smooth: Standard deviation of the Gaussian that smooths the field, pixels.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      The first adversarial images met, with their distance in L2 (of the images, not the field).

    Raises:
      ValueError: For an argument that is not as said above.
    """
    sides = check_picture(images)
    check_counts(steps=steps, candidates=candidates)
    check_numbers(smooth=smooth)
    if min(sides) < 3:
        raise ValueError(f"images must have 3 rows and columns or more, not {np.shape(images)}")
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, the label and another, not {candidates}")
    side = max(sides)
    if not 0 < smooth <= side:
        raise ValueError(f"smooth must be above 0 and at most {side}, not {smooth}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        steps=steps, candidates=candidates, smooth=float(smooth),
    )  # fmt: skip


class ADefState(NamedTuple):
    """Where a search is.

    Attributes:
      image: The image as deformed by `field`.
      going: Whether the network is right about it and steps are left.
      field: `[2, H, W]`: how far down and how far right each pixel comes from.
      classes: The other classes that are looked at.
      step: How many steps were made.
    """

    image: jax.Array
    going: jax.Array
    field: jax.Array
    classes: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, *, candidates: int, **_: Any) -> ADefState:
    logits = case.logits(case.image)
    others = case.likeliest(logits, min(candidates, len(logits)) - 1)
    field = jnp.zeros((2, *case.image.shape[:2]))
    return ADefState(case.image, ~case.errs(logits), field, others, jnp.int32(0))


def _step(case: Case, state: ADefState, *, steps: int, smooth: jax.Array, **_: Any) -> ADefState:
    rows, columns, _channels = case.image.shape
    logits, pull = jax.vjp(case.logits, state.image)
    true = jax.nn.one_hot(case.label, len(logits))
    # Central differences, one-sided at the edges.
    slope = jnp.stack(jnp.gradient(state.image, axis=(0, 1)))
    vertical, horizontal = (
        blur_matrix(size, smooth, max(rows, columns)) for size in (rows, columns)
    )

    def towards(other: jax.Array) -> jax.Array:
        gradient = pull(jax.nn.one_hot(other, len(logits)) - true)[0]
        # How the score reacts to moving each pixel.
        reaction = (gradient[None] * slope).sum(-1)
        smoothed = jnp.einsum("yi,xj,dij->dyx", vertical, horizontal, reaction)
        twice = jnp.einsum("iy,jx,dij->dyx", vertical, horizontal, smoothed)
        gap = logits[other] - logits[case.label]
        return state.field - gap / (jnp.square(smoothed).sum() + 1e-12) * twice

    fields = jax.vmap(towards)(state.classes)
    field = fields[jnp.argmin(jnp.square(fields).sum((1, 2, 3)))]
    image = case.clip(_deformed(case.image, field))
    fooled = case.fools(image)
    last = state.step + 1 >= steps
    farther = case.clip(_deformed(case.image, _OVERSHOOT * field))
    return ADefState(
        jnp.where(last & ~fooled, farther, image),
        ~fooled & ~last,
        field,
        state.classes,
        state.step + 1,
    )


def _deformed(image: jax.Array, field: jax.Array) -> jax.Array:
    """Each pixel from where the field says, or the nearest place inside the image."""
    height, width, _ = image.shape
    rows = jnp.arange(height)[:, None] + field[0]
    columns = jnp.arange(width)[None] + field[1]
    inside = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
    return sample(image, *inside, jnp.float32(0))


_SEARCH = Search(_start, _step)
