"""RPGD: projected gradient steps from a random start (Madry et al., ICLR 2018, section 2.1).

Steps along the sign of the gradient, projected onto the L-infinity ball about the image; as many
and as large as the paper's section 5 takes on MNIST, relative to eps: 40 of eps / 30.
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
    check_eps,
    check_sizes,
    linf,
    run,
)


def rpgd(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    steps: int = 40,
    relative_step: float = 1 / 30,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Climbs the cross-entropy within eps of the image.

    Args:
      key: Draws the start, uniform in the ball.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      steps: Gradient steps.
      relative_step: Length of a step, in eps.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Images at the budget, with their distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    eps = check_eps(eps, bounds)
    check_counts(steps=steps)
    check_sizes(relative_step=relative_step)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=linf, closest=False,
        eps=eps, steps=steps, relative_step=float(relative_step),
    )  # fmt: skip


class RpgdState(NamedTuple):
    """The image now, whether steps are left, and how many were made."""

    image: jax.Array
    going: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, *, eps: jax.Array, **_: Any) -> RpgdState:
    shift = jax.random.uniform(key, case.image.shape, minval=-eps, maxval=eps)
    return RpgdState(case.clip(case.image + shift), jnp.bool_(True), jnp.int32(0))


def _step(
    case: Case, state: RpgdState, *, eps: jax.Array, steps: int, relative_step: jax.Array
) -> RpgdState:
    moved = state.image + relative_step * eps * jnp.sign(jax.grad(case.loss)(state.image))
    image = case.clip(jnp.clip(moved, case.image - eps, case.image + eps))
    return RpgdState(image, state.step + 1 < steps, state.step + 1)


_SEARCH = Search(_start, _step)
