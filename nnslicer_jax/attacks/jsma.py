"""JSMA: one value at a time, where the saliency map is largest.

Papernot, McDaniel, Jha, Fredrikson, Celik, Swami, "The Limitations of Deep Learning in Adversarial
Settings", EuroS&P 2016, section III.B: a value is worth increasing by equation 8, decreasing by
equation 9. The target is the likeliest other class. Departures: single values rather than pairs,
both directions, and where no value is salient, the one that the target's logit reacts to most.
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
    run,
)


def jsma(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    theta: float = 0.1,
    steps: int = 2000,
    changes: int = 7,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Changes the most salient values until the network errs.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      theta: How much a value is changed at a time, relative to the width of `bounds`, up to 1.
      steps: Most changes of an image.
      changes: Most changes of a value.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      The first adversarial images met, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(steps=steps, changes=changes)
    check_numbers(theta=theta)
    if not 0 < theta <= 1:
        raise ValueError(f"theta must be above 0 and at most 1, not {theta}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        theta=float(theta), steps=steps, changes=changes,
    )  # fmt: skip


class JsmaState(NamedTuple):
    """Where a search is.

    Attributes:
      image: The image now.
      going: Whether the network was right about the last one and there is something to change.
      counts: How often each value was changed.
      target: The class to reach.
      step: How many changes there were.
    """

    image: jax.Array
    going: jax.Array
    counts: jax.Array
    target: jax.Array
    step: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> JsmaState:
    logits = case.logits(case.image)
    target = case.likeliest(logits, 1)[0]
    counts = jnp.zeros(case.image.shape, jnp.int32)
    return JsmaState(case.image, ~case.errs(logits), counts, target, jnp.int32(0))


def _step(case: Case, state: JsmaState, *, theta: jax.Array, steps: int, changes: int) -> JsmaState:
    logits, pull = jax.vjp(case.logits, state.image)
    to_target = jax.nn.one_hot(state.target, len(logits))
    wanted, unwanted = jax.vmap(pull)(jnp.stack([to_target, 1 - to_target]))[0]

    room = jnp.where(wanted > 0, state.image < case.high, state.image > case.low)
    free = room & (wanted != 0) & (state.counts < changes)
    # Equations 8 and 9 in one: wanted goes up and the others down, or the other way round.
    salient = free & (wanted * unwanted < 0)
    saliency = jnp.where(salient, jnp.abs(wanted * unwanted), -1)
    reaction = jnp.where(free, jnp.abs(wanted), -1)
    place = jnp.argmax(jnp.where(salient.any(), saliency, reaction))
    here = (jnp.arange(wanted.size) == place).reshape(wanted.shape)

    # Whether the network errs on the image before the change: no second run to know it.
    changing = ~case.errs(logits) & free.any()
    moved = case.clip(state.image + theta * (case.high - case.low) * jnp.sign(wanted))
    return JsmaState(
        jnp.where(changing & here, moved, state.image),
        changing & (state.step + 1 < steps),
        state.counts + here,
        state.target,
        state.step + 1,
    )


_SEARCH = Search(_start, _step)
