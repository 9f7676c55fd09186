"""Boundary: a walk along the decision boundary towards the original.

Brendel, Rauber, Bethge, "Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box
Machine Learning Models", ICLR 2018, section 2 and algorithm 1: a random step on the sphere about
the original, then one towards it, taken if the network still errs. Step lengths adapt to how often
steps succeed: both to that of steps on the sphere (section 2.3: about a half), the one towards the
original to that of whole steps. The start is uniform noise that fools the network, blended with
the original as far as it still does.
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
    check_sizes,
    choose,
    l2,
    run,
)

# How many images of noise are tried, and how many blends of one with the original.
_DRAWS = 1000
_BLENDS = 50
# One step in so many is on the sphere only, to see how often these succeed.
_EVERY = 10
# How many outcomes adapt a length, and beyond which success rates they do.
_SPHERE_WINDOW, _SPHERE_LOW, _SPHERE_HIGH = 20, 0.2, 0.5
_WHOLE_WINDOW, _WHOLE_LOW, _WHOLE_HIGH = 100, 0.1, 0.25


def boundary(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    steps: int = 25_000,
    sphere_step: float = 0.01,
    source_step: float = 0.01,
    adaptation: float = 1.5,
    converged: float = 1e-7,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for the closest adversarial image by decisions of the network alone.

    Args:
      key: Draws the start and the steps.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      steps: Most steps.
      sphere_step: First length of a step on the sphere, relative to its radius.
      source_step: First length of a step towards the original, likewise.
      adaptation: Factor by which lengths are changed, above 1.
      converged: Length of the step towards the original at which a walk ends.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(steps=steps)
    check_numbers(adaptation=adaptation)
    check_sizes(sphere_step=sphere_step, source_step=source_step, converged=converged)
    if not adaptation > 1:
        raise ValueError(f"adaptation must be above 1, not {adaptation}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        steps=steps, sphere_step=float(sphere_step), source_step=float(source_step),
        adaptation=float(adaptation), converged=float(converged),
    )  # fmt: skip


# What a step does.
_DRAW, _BLEND, _WALK = range(3)


class Outcomes(NamedTuple):
    """How many steps of a sort were tried since lengths changed, and how many succeeded."""

    tried: jax.Array
    succeeded: jax.Array


class BoundaryState(NamedTuple):
    """Where a walk is; every step runs the network on one image.

    Attributes:
      image: The closest adversarial image so far; the original while there is none.
      going: Whether there is more to do.
      stage: Drawing noise, blending it with the original, or walking.
      key: Draws noise and steps.
      noise: The adversarial noise that is blended.
      step: How many steps of the stage were made.
      sphere_step: Length of a step on the sphere.
      source_step: Length of a step towards the original.
      sphere: Outcomes of steps on the sphere.
      whole: Outcomes of whole steps.
    """

    image: jax.Array
    going: jax.Array
    stage: jax.Array
    key: jax.Array
    noise: jax.Array
    step: jax.Array
    sphere_step: jax.Array
    source_step: jax.Array
    sphere: Outcomes
    whole: Outcomes


def _start(
    key: jax.Array, case: Case, *, sphere_step: jax.Array, source_step: jax.Array, **_: Any
) -> BoundaryState:
    none = Outcomes(jnp.int32(0), jnp.int32(0))
    return BoundaryState(
        image=case.image,
        going=~case.fools(case.image),
        stage=jnp.int32(_DRAW),
        key=key,
        noise=case.image,
        step=jnp.int32(0),
        sphere_step=jnp.asarray(sphere_step, jnp.float32),
        source_step=jnp.asarray(source_step, jnp.float32),
        sphere=none,
        whole=none,
    )


def _step(
    case: Case, state: BoundaryState, *, steps: int, adaptation: jax.Array, converged: jax.Array,
    **_: Any,
) -> BoundaryState:  # fmt: skip
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.stage), state.step)
    # Uniform between -1 and 1; its inverse error function is normal.
    drawn = jax.random.uniform(key, case.image.shape, minval=-1 + 1e-6, maxval=1)
    noise = case.low + (case.high - case.low) * (drawn + 1) / 2
    blend = case.image + (state.step + 1) / _BLENDS * (state.noise - case.image)
    on_sphere, whole = _proposals(case, state, jax.scipy.special.erfinv(drawn))
    sphere_only = state.step % _EVERY == _EVERY - 1
    walk = jnp.where(sphere_only, on_sphere, whole)
    image = case.clip(
        jnp.where(state.stage == _DRAW, noise, jnp.where(state.stage == _BLEND, blend, walk))
    )
    fooled = case.fools(image)

    first = state._replace(
        going=fooled | (state.step + 1 < _DRAWS),
        stage=jnp.where(fooled, _BLEND, _DRAW).astype(jnp.int32),
        noise=jnp.where(fooled, image, state.noise),
        step=jnp.where(fooled, 0, state.step + 1),
    )
    blended = state._replace(
        image=jnp.where(fooled, image, state.image),
        # The last blend is the noise itself, which is known to fool the network.
        going=fooled | (state.step + 1 < _BLENDS),
        stage=jnp.where(fooled, _WALK, _BLEND).astype(jnp.int32),
        step=jnp.where(fooled, 0, state.step + 1),
    )
    closer = fooled & ~sphere_only & (l2(image - case.image) < l2(state.image - case.image))
    walked = _adapted(state, fooled, sphere_only, adaptation)
    walked = walked._replace(
        image=jnp.where(closer, image, state.image),
        going=(state.step + 1 < steps) & (walked.source_step >= converged),
        step=state.step + 1,
    )
    return choose(state.stage == _DRAW, first, choose(state.stage == _BLEND, blended, walked))


def _proposals(case: Case, state: BoundaryState, normal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A random place on the sphere about the original, and the one a step on from there."""
    away = state.image - case.image
    radius = l2(away) + 1e-12
    sideways = normal - (normal * away).sum() / jnp.square(radius) * away
    sideways = sideways * (state.sphere_step * radius / (l2(sideways) + 1e-12))
    shrink = jnp.sqrt(1 + jnp.square(state.sphere_step))
    on_sphere = case.clip(case.image + (away + sideways) / shrink)
    back = case.image - on_sphere
    distance = l2(back) + 1e-12
    # To where the radius is less by the step, had clipping not moved it already.
    length = jnp.maximum(state.source_step * radius + distance - radius, 0)
    return on_sphere, on_sphere + length / distance * back


def _adapted(
    state: BoundaryState, fooled: jax.Array, sphere_only: jax.Array, factor: jax.Array
) -> BoundaryState:
    """The state with step lengths changed where enough outcomes say so."""
    sphere, up, down = _judged(
        state.sphere, sphere_only, fooled, _SPHERE_WINDOW, _SPHERE_LOW, _SPHERE_HIGH
    )
    both = jnp.where(up, factor, jnp.where(down, 1 / factor, 1))
    whole, up, down = _judged(
        state.whole, ~sphere_only, fooled, _WHOLE_WINDOW, _WHOLE_LOW, _WHOLE_HIGH
    )
    source = jnp.where(up, factor, jnp.where(down, 1 / factor, 1))
    return state._replace(
        sphere_step=state.sphere_step * both,
        source_step=state.source_step * both * source,
        sphere=sphere,
        whole=whole,
    )


def _judged(
    outcomes: Outcomes, counts: jax.Array, success: jax.Array, window: int, low: float, high: float
) -> tuple[Outcomes, jax.Array, jax.Array]:
    """Outcomes with another one, and whether they call for longer or for shorter steps."""
    tried = outcomes.tried + counts
    succeeded = outcomes.succeeded + (counts & success)
    full = tried >= window
    rate = succeeded / jnp.maximum(tried, 1)
    left = Outcomes(jnp.where(full, 0, tried), jnp.where(full, 0, succeeded))
    return left, full & (rate > high), full & (rate < low)


_SEARCH = Search(_start, _step)
