"""DeepFool: steps to the nearest face of the linearised decision region.

Moosavi-Dezfooli, Fawzi, Frossard, "DeepFool: a simple and accurate method to fool deep neural
networks", CVPR 2016: algorithm 2, and section 3.3 for other norms than L2. Beyond the paper, only
the classes likeliest at the image are looked at, as its authors' code does, and every step goes
1e-4 too far, so that a step of length 0 at the boundary crosses it.
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
    l2,
    linf,
    run,
)

_BEYOND = 1e-4


def deepfool(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    norm: str = "l2",
    steps: int = 50,
    candidates: int = 10,
    overshoot: float = 0.02,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for the closest adversarial image by repeated linearisation.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      norm: "l2" or "linf": the norm to be close in.
      steps: Most steps.
      candidates: How many classes are looked at, the label and the likeliest others; at least 2.
      overshoot: How much longer than the sum of the steps the way from the image is, relative.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in `norm`.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    norms = {"l2": (l2, _l2_step), "linf": (linf, _linf_step)}
    if not isinstance(norm, str) or norm not in norms:
        raise ValueError(f"norm must be 'l2' or 'linf', not {norm!r}")
    check_counts(steps=steps, candidates=candidates)
    if candidates < 2:
        raise ValueError(f"candidates must be at least 2, the label and another, not {candidates}")
    check_numbers(overshoot=overshoot)
    if not overshoot >= 0:
        raise ValueError(f"overshoot must be at least 0, not {overshoot}")
    measure, nearest = norms[norm]
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=measure, closest=True,
        nearest=nearest, steps=steps, candidates=candidates, overshoot=float(overshoot),
    )  # fmt: skip


class DeepFoolState(NamedTuple):
    """Where a walk is.

    Attributes:
      image: The image now.
      going: Whether the network is right about it and steps are left.
      total: Sum of the steps, without overshoot.
      step: How many they were.
      classes: The other classes that are looked at.
    """

    image: jax.Array
    going: jax.Array
    total: jax.Array
    step: jax.Array
    classes: jax.Array


def _l2_step(gap: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distance of a face and the step onto it, for a score `gap` below 0 that has `gradient`."""
    length = l2(gradient) + 1e-8
    distance = jnp.abs(gap) / length
    return distance, (distance + _BEYOND) / length * gradient


def _linf_step(gap: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    distance = jnp.abs(gap) / (jnp.abs(gradient).sum() + 1e-8)
    return distance, (distance + _BEYOND) * jnp.sign(gradient)


def _start(key: jax.Array, case: Case, *, candidates: int, **_: Any) -> DeepFoolState:
    logits = case.logits(case.image)
    others = case.likeliest(logits, min(candidates, len(logits)) - 1)
    nothing = jnp.zeros_like(case.image)
    return DeepFoolState(case.image, ~case.errs(logits), nothing, jnp.int32(0), others)


def _step(
    case: Case, state: DeepFoolState, *, nearest: Callable, steps: int, overshoot: jax.Array,
    **_: Any,
) -> DeepFoolState:  # fmt: skip
    logits, pull = jax.vjp(case.logits, state.image)
    true = jax.nn.one_hot(case.label, len(logits))

    def towards(other: jax.Array) -> tuple[jax.Array, jax.Array]:
        gradient = pull(jax.nn.one_hot(other, len(logits)) - true)[0]
        return nearest(logits[other] - logits[case.label], gradient)

    distances, moves = jax.vmap(towards)(state.classes)
    total = state.total + moves[jnp.argmin(distances)]
    image = case.clip(case.image + (1 + overshoot) * total)
    going = ~case.fools(image) & (state.step + 1 < steps)
    return DeepFoolState(image, going, total, state.step + 1, state.classes)


_SEARCH = Search(_start, _step)
