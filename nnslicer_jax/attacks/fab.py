"""FAB: the closest adversarial image, by projections onto the linearised boundary.

Croce, Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML
2020, algorithm 1 in the form for targets of their AutoAttack (2020, section 5), for L-infinity.
Each step projects both the point and the original onto the boundary between the label and one other
class, linearised at the point and within the bounds, and goes between the two, a little too far;
from an adversarial image it goes back towards the original. The paper's final search along a
segment is left out, as AutoAttack does.
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
    linf,
    run,
)

# The paper's alpha_max, eta and beta.
_MOST_BIAS = 0.1
_OVERSHOOT = 1.05
_BACK = 0.9
# Tangents taken at most; each but the last adds a pixel that is at its bound.
_TANGENTS = 64


def fab(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float = 0.0,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for the closest adversarial image in L-infinity.

    Args:
      key: Draws the starts of the second and later restarts.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Distance that is close enough, where the search for an image ends; 0 makes all steps.
      steps: Of each run.
      restarts: Runs towards each class; the first is from the image itself, the others from
        within half the distance reached so far, and half of eps unless that is 0.
      targets: How many of the likeliest other classes are gone for in turn.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    eps = check_eps(eps, bounds)
    check_counts(steps=steps, restarts=restarts, targets=targets)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=linf, closest=True,
        eps=eps, steps=steps, restarts=restarts, targets=targets,
    )  # fmt: skip


def onto(
    point: jax.Array, gap: jax.Array, gradient: jax.Array, low: jax.Array, high: jax.Array
) -> jax.Array:
    """The least move in L-infinity that makes a linear score 0.

    Args:
      point: Any shape, within the bounds.
      gap: The score there.
      gradient: Of the score.
      low: Least value of a pixel after the move.
      high: Greatest value of a pixel after the move.

    Returns:
      A move `d` with `gap + <gradient, d> = 0`; where the bounds leave none, the one that comes
      closest. Every pixel moves by one length, or as far as its bound.
    """
    towards = -jnp.sign(gap) * jnp.sign(gradient)
    room = jnp.where(towards > 0, high - point, jnp.where(towards < 0, point - low, 0))
    weight, need = jnp.abs(gradient), jnp.abs(gap)
    most = room.max()

    # What a length gains, sum(weight * min(length, room)), is concave: where its tangent gains
    # what is needed lies at or below the length that does.
    def tangent(length: jax.Array) -> jax.Array:
        free = room > length
        slope = jnp.where(free, weight, 0).sum()
        rest = need - jnp.where(free, 0, weight * room).sum()
        return jnp.where(slope > 0, jnp.minimum(rest / jnp.where(slope > 0, slope, 1), most), most)

    def on(carry: tuple[jax.Array, jax.Array, Any]) -> jax.Array:
        before, length, count = carry
        return (length > before * (1 + 1e-6)) & (count < _TANGENTS)

    def ahead(carry: tuple[jax.Array, jax.Array, Any]) -> tuple[jax.Array, jax.Array, Any]:
        _, length, count = carry
        return length, jnp.maximum(length, tangent(length)), count + 1

    nothing = jnp.zeros_like(need)
    _, length, _ = jax.lax.while_loop(on, ahead, (nothing, tangent(nothing), jnp.int32(0)))
    return towards * jnp.minimum(length, room)


class FabState(NamedTuple):
    """Where a search is.

    Attributes:
      image: The closest adversarial image so far, or the original.
      distance: Its distance, infinite for the original.
      going: Whether the network is right about the original, steps are left and `distance` is not
        yet close enough.
      key: Draws the starts to come.
      classes: `[T]` classes to go for in turn.
      run: Which run this is.
      step: Steps made in this run.
      point: Where it is.
    """

    image: jax.Array
    distance: jax.Array
    going: jax.Array
    key: jax.Array
    classes: jax.Array
    run: jax.Array
    step: jax.Array
    point: jax.Array


def _start(key: jax.Array, case: Case, *, targets: int, **_: Any) -> FabState:
    logits = case.logits(case.image)
    return FabState(
        image=case.image,
        distance=jnp.float32(jnp.inf),
        going=~case.errs(logits),
        key=key,
        classes=case.likeliest(logits, min(targets, len(logits) - 1)),
        run=jnp.int32(0),
        step=jnp.int32(0),
        point=case.image,
    )


def _step(
    case: Case, state: FabState, *, eps: jax.Array, steps: int, restarts: int, **_: Any
) -> FabState:
    now, later = jax.random.split(state.key)
    point = jnp.where(state.step == 0, _from(now, case, state, eps, restarts), state.point)

    logits, pull = jax.vjp(case.logits, point)
    target = state.classes[state.run // restarts]
    lead = jax.nn.one_hot(target, len(logits)) - jax.nn.one_hot(case.label, len(logits))
    gap, gradient = logits[target] - logits[case.label], pull(lead)[0]
    step = onto(point, gap, gradient, case.low, case.high)
    there = gap + (gradient * (case.image - point)).sum()
    origin = onto(case.image, there, gradient, case.low, case.high)
    lengths = [jnp.maximum(linf(move), 1e-8) for move in (step, origin)]
    bias = jnp.minimum(lengths[0] / (lengths[0] + lengths[1]), _MOST_BIAS)
    near, far = point + _OVERSHOOT * step, case.image + _OVERSHOOT * origin
    moved = case.clip((1 - bias) * near + bias * far)

    after, distance = case.logits(moved), linf(moved - case.image)
    closer = case.errs(after) & (distance < state.distance)
    # Points end up as close to the boundary as rounding lets them: one that had to be across by
    # more than that to be sent back would stay there for good.
    across = case.lead(after) > 0
    best = jnp.where(closer, distance, state.distance)
    over = state.step + 1 == steps
    runs = len(state.classes) * restarts
    return FabState(
        image=jnp.where(closer, moved, state.image),
        distance=best,
        going=(best > eps) & ~(over & (state.run + 1 == runs)),
        key=later,
        classes=state.classes,
        run=state.run + over,
        step=jnp.where(over, 0, state.step + 1),
        point=jnp.where(across, case.image + _BACK * (moved - case.image), moved),
    )


def _from(key: jax.Array, case: Case, state: FabState, eps: jax.Array, restarts: int) -> jax.Array:
    """Where a run starts."""
    shift = jax.random.uniform(key, case.image.shape, minval=-1, maxval=1)
    width = case.high - case.low
    radius = jnp.minimum(jnp.minimum(state.distance, jnp.where(eps > 0, eps, width)), width) / 2
    drawn = case.clip(case.image + radius * shift / jnp.abs(shift).max())
    return jnp.where(state.run % restarts == 0, case.image, drawn)


_SEARCH = Search(_start, _step)
