"""FGSM: one step along the sign of the gradient (Goodfellow et al., ICLR 2015, section 4)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nnslicer_jax.attacks.adversarial import (
    BATCH_SIZE,
    Adversarial,
    Case,
    Search,
    check_eps,
    linf,
    run,
)


def fgsm(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Moves every pixel by at most eps to where the cross-entropy grows.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Images at the budget, with their distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    eps = check_eps(eps, bounds)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=linf, closest=False, eps=eps,
    )  # fmt: skip


class FgsmState(NamedTuple):
    """The image at its budget; there is nothing left to do."""

    image: jax.Array
    going: jax.Array


def _start(key: jax.Array, case: Case, *, eps: jax.Array) -> FgsmState:
    moved = case.image + eps * jnp.sign(jax.grad(case.loss)(case.image))
    return FgsmState(case.clip(moved), jnp.bool_(False))


_SEARCH = Search(_start)
