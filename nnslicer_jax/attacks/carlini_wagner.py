"""Carlini and Wagner's L2 attack ("Towards Evaluating the Robustness of Neural Networks", 2017).

Section VI.A: Adam on w, where tanh w is the image, against squared distance plus c times the gap
of the logits (f6 of section V.A, which is 0 once the image is adversarial by `confidence`); the
constant c is found by bisection. The gap is to the label: the attack is not targeted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nnslicer_jax.attacks.adversarial import (
    BATCH_SIZE,
    Adversarial,
    Case,
    Search,
    check_counts,
    check_numbers,
    check_sizes,
    choose,
    l2,
    run,
)

# tanh stays this far from 1, where its inverse is infinite.
_INSIDE = 0.999999
# What counts as progress in a tenth of the steps, or in so many where that is less: Adam moves
# pixels at the bounds slowly at first.
_PROGRESS, _PATIENCE = 0.9999, 50


def carlini_wagner(
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    steps: int = 10_000,
    searches: int = 9,
    step_size: float = 0.01,
    confidence: float = 0.0,
    first_constant: float = 1e-3,
    abort_early: bool = True,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for the closest adversarial image in L2 by gradient descent.

    Args:
      key: As every attack takes one; nothing is drawn, None will do.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      steps: Most steps of Adam for each constant.
      searches: How many constants are tried.
      step_size: Of Adam, on w.
      confidence: By how much another class must lead.
      first_constant: Tried first; ten times as much while it does not succeed, then bisected.
      abort_early: Whether a constant is left once a tenth of the steps (50 at least) brought the
        image no progress.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(steps=steps, searches=searches)
    check_sizes(step_size=step_size, first_constant=first_constant)
    check_numbers(confidence=confidence)
    if not confidence >= 0:
        raise ValueError(f"confidence must be at least 0, not {confidence}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=False, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        steps=steps, searches=searches, step_size=float(step_size), confidence=float(confidence),
        first_constant=float(first_constant), abort_early=bool(abort_early),
    )  # fmt: skip


class CarliniWagnerState(NamedTuple):
    """Where the descent for one constant is, and what is known from others.

    Attributes:
      image: The closest adversarial image so far; the original while there is none.
      going: Whether there are constants left.
      distance: Of `image`; infinite while there is none.
      constant: The one tried now.
      lower: The greatest constant that failed.
      upper: The least that succeeded; infinite while none did.
      search: How many were tried before.
      shift: How far w is from where it started.
      adam: The optimizer's state.
      found: Whether this constant has led to an adversarial image.
      lowest: The least loss so far.
      checked: What that was when progress was last looked at.
      step: How many steps were made.
    """

    image: jax.Array
    going: jax.Array
    distance: jax.Array
    constant: jax.Array
    lower: jax.Array
    upper: jax.Array
    search: jax.Array
    shift: jax.Array
    adam: optax.OptState
    found: jax.Array
    lowest: jax.Array
    checked: jax.Array
    step: jax.Array


def _start(
    key: jax.Array, case: Case, *, first_constant: jax.Array, step_size: jax.Array, **_: Any
) -> CarliniWagnerState:
    zero, infinite = jnp.float32(0), jnp.float32(jnp.inf)
    shift = jnp.zeros_like(case.image)
    return CarliniWagnerState(
        image=case.image,
        going=~case.fools(case.image),
        distance=infinite,
        constant=jnp.asarray(first_constant, jnp.float32),
        lower=zero,
        upper=infinite,
        search=jnp.int32(0),
        shift=shift,
        adam=optax.adam(step_size).init(shift),
        found=jnp.bool_(False),
        lowest=infinite,
        checked=infinite,
        step=jnp.int32(0),
    )


def _step(
    case: Case, state: CarliniWagnerState, *, steps: int, searches: int, step_size: jax.Array,
    confidence: jax.Array, abort_early: bool, **_: Any,
) -> CarliniWagnerState:  # fmt: skip
    adam = optax.adam(step_size)
    middle, half = (case.low + case.high) / 2, (case.high - case.low) / 2
    w = jnp.arctanh((case.image - middle) / half * _INSIDE)

    def loss(shift: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        image = middle + half * jnp.tanh(w + shift)
        logits = case.logits(image)
        gap = jnp.maximum(confidence - case.lead(logits), 0)
        change = jnp.square(image - (middle + half * jnp.tanh(w))).sum()
        return change + state.constant * gap, (image, logits)

    (value, (image, logits)), gradient = jax.value_and_grad(loss, has_aux=True)(state.shift)
    fooled = case.errs(logits) & (case.lead(logits) > confidence)
    distance = l2(image - case.image)
    closer = fooled & (distance < state.distance)
    lowest = jnp.minimum(value, state.lowest)
    look = abort_early & (state.step % max(-(-steps // 10), _PATIENCE) == 0)
    stuck = look & ~(lowest <= _PROGRESS * state.checked)
    update, moments = adam.update(gradient, state.adam)
    on = state._replace(
        image=jnp.where(closer, image, state.image),
        distance=jnp.where(closer, distance, state.distance),
        shift=state.shift + update,
        adam=moments,
        found=state.found | fooled,
        lowest=lowest,
        checked=jnp.where(look, lowest, state.checked),
        step=state.step + 1,
    )
    return choose(stuck | (on.step >= steps), _next_constant(on, searches, adam), on)


def _next_constant(
    state: CarliniWagnerState, searches: int, adam: optax.GradientTransformation
) -> CarliniWagnerState:
    lower = jnp.where(state.found, state.lower, state.constant)
    upper = jnp.where(state.found, state.constant, state.upper)
    shift = jnp.zeros_like(state.shift)
    return state._replace(
        going=state.search + 1 < searches,
        constant=jnp.where(jnp.isinf(upper), 10 * state.constant, (lower + upper) / 2),
        lower=lower,
        upper=upper,
        search=state.search + 1,
        shift=shift,
        adam=adam.init(shift),
        found=jnp.bool_(False),
        lowest=jnp.float32(jnp.inf),
        checked=jnp.float32(jnp.inf),
        step=jnp.int32(0),
    )


_SEARCH = Search(_start, _step)
