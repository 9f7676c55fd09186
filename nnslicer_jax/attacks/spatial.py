"""Spatial: the worst rotation and translation of a grid.

Engstrom, Tran, Tsipras, Schmidt, Madry, "A Rotation and a Translation Suffice: Fooling CNNs with
Simple Transformations", 2017 (in ICML 2019 as "Exploring the Landscape of Spatial Robustness"):
the grid search of section 3, within 30 degrees and 3 pixels either way; five values of each. The
worst is the one where another class leads by most.
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
    check_numbers,
    check_picture,
    l2,
    run,
)
from nnslicer_jax.attacks.warping import rotated


def spatial(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    max_rotation: float = 30.0,
    max_translation: float = 3.0,
    rotations: int = 5,
    translations: int = 5,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Rotates and translates every image to where the network errs most.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`; what comes in from outside is `bounds[0]`.
      labels: `[N]` integers, the true classes.
      max_rotation: Largest angle either way, degrees.
      max_translation: Largest shift either way along each axis, pixels.
      rotations: How many angles, evenly spaced from one largest to the other.
      translations: How many shifts along each axis.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Images at their worst, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_picture(images)
    check_counts(rotations=rotations, translations=translations)
    check_numbers(max_rotation=max_rotation, max_translation=max_translation)
    for name, most in (("max_rotation", max_rotation), ("max_translation", max_translation)):
        if not most >= 0:
            raise ValueError(f"{name} must be at least 0, not {most}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=l2, closest=False,
        max_rotation=float(max_rotation), max_translation=float(max_translation),
        rotations=rotations, translations=translations,
    )  # fmt: skip


class SpatialState(NamedTuple):
    """The worst image so far, whether moves are left, its lead, and how many were tried."""

    image: jax.Array
    going: jax.Array
    lead: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> SpatialState:
    return SpatialState(case.image, jnp.bool_(True), jnp.float32(-jnp.inf), jnp.int32(0))


def _step(
    case: Case, state: SpatialState, *, max_rotation: jax.Array, max_translation: jax.Array,
    rotations: int, translations: int,
) -> SpatialState:  # fmt: skip
    angles = jnp.deg2rad(max_rotation) * _grid(rotations)
    shifts = max_translation * _grid(translations)
    turn, down, right = jnp.unravel_index(state.step, (rotations, translations, translations))
    image = case.clip(rotated(case.image, angles[turn], shifts[down], shifts[right], case.low))
    lead = case.lead(case.logits(image))
    worse = lead > state.lead
    return SpatialState(
        jnp.where(worse, image, state.image),
        state.step + 1 < rotations * translations**2,
        jnp.where(worse, lead, state.lead),
        state.step + 1,
    )


def _grid(count: int) -> jax.Array:
    """Evenly spaced from -1 to 1; 0 alone for one."""
    return jnp.linspace(-1, 1, count) if count > 1 else jnp.zeros(1)


_SEARCH = Search(_start, _step)
