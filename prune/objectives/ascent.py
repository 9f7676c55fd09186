"""Projected steps along the sign of a gradient (Madry et al., ICLR 2018, Section 2.1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def ascend(
    loss: Callable[[jax.Array], jax.Array],
    start: jax.Array,
    images: jax.Array,
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> jax.Array:
    """Climbs a loss within eps of the images and within 0..1; no gradient goes through it.

    Args:
      loss: Function of images `[B, ...]` to a number.
      start: `[B, ...]`, where to start.
      images: `[B, ...]` in 0..1.
      eps: Largest change of a pixel.
      step_size: Change of a pixel in a step.
      steps: At least 1.

    Returns:
      Images `[B, ...]` in 0..1.
    """

    def step(_: int, moved: jax.Array) -> jax.Array:
        moved = moved + step_size * jnp.sign(jax.grad(loss)(moved))
        return jnp.clip(jnp.clip(moved, images - eps, images + eps), 0.0, 1.0)

    return jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, step, start))
