"""PointWise: noise undone value by value, as long as the network still errs.

Schott, Rauber, Bethge, Brendel, "Towards the first adversarially robust neural network model on
MNIST", ICLR 2019, section 5 (pointwise attack): from salt-and-pepper noise that fools the network,
values go back to the original one after the other in random order, until none can. What is left is
then moved towards the original by bisection, value by value, which makes the image close in
L2 as well. Departure: values go back in groups that double with every success and halve with every
failure, which needs a run of the network a group rather than a value.
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
    choose,
    l2,
    run,
)


def pointwise(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    draws: int = 200,
    passes: int = 10,
    bisections: int = 10,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Looks for adversarial images that differ in few values and little in L2.

    Args:
      key: Draws the noise and the order of values.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`; the noise is the same in all of the last axis
        where there is more than one.
      labels: `[N]` integers, the true classes.
      draws: How many amounts of noise are tried, evenly spaced up to all values.
      passes: Most passes over the values, of either sort; one that changes nothing is the last.
      bisections: How often a value's way back is halved, in a pass of the second sort.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      Closest images, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(draws=draws, passes=passes, bisections=bisections)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        amounts=draws, passes=passes, bisections=bisections,
    )  # fmt: skip


# What a step does.
_DRAW, _RESET, _BISECT = range(3)
# A pass of bisections that gains less than this share of the distance is the last.
_GAIN = 1e-3


class PointwiseState(NamedTuple):
    """Where a search is; every step runs the network on one image.

    Attributes:
      image: The adversarial image so far; the original while there is none.
      going: Whether there is more to do.
      stage: Drawing noise, resetting values or bisecting them.
      key: Draws the noise.
      drawn: How many amounts of noise were tried.
      rank: Of each value in the order they are looked at, a permutation.
      cursor: The rank of the next one.
      group: How many are reset at once.
      better: Whether this pass has changed anything.
      distance: In L2 before this pass.
      tries: How often the value at the cursor was moved.
      near: Where moving it has failed: the original value or on its way.
      passed: How many passes of this stage are over.
    """

    image: jax.Array
    going: jax.Array
    stage: jax.Array
    key: jax.Array
    drawn: jax.Array
    rank: jax.Array
    cursor: jax.Array
    group: jax.Array
    better: jax.Array
    distance: jax.Array
    tries: jax.Array
    near: jax.Array
    passed: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> PointwiseState:
    noise, order = jax.random.split(key)
    zero = jnp.int32(0)
    return PointwiseState(
        image=case.image,
        going=~case.fools(case.image),
        stage=jnp.int32(_DRAW),
        key=noise,
        drawn=zero,
        rank=jax.random.permutation(order, case.image.size).reshape(case.image.shape),
        cursor=zero,
        group=jnp.int32(1),
        better=jnp.bool_(False),
        distance=jnp.float32(jnp.inf),
        tries=zero,
        near=jnp.float32(0),
        passed=zero,
    )


def _step(
    case: Case, state: PointwiseState, *, amounts: int, passes: int, bisections: int
) -> PointwiseState:
    size = case.image.size
    # The next value that differs; `size` if the pass is over.
    differs = (state.image != case.image) & (state.rank >= state.cursor)
    first = jnp.where(differs, state.rank, size).min()
    over = first == size
    # A value's own rank picks it out of the image.
    here = state.rank == first
    original = jnp.where(here, case.image, 0).sum()
    current = jnp.where(here, state.image, 0).sum()
    near = jnp.where(state.tries == 0, original, state.near)
    value = jnp.where(state.tries == 0, original, (near + current) / 2)

    drawing = _noise(case, state, amounts)
    resetting = jnp.where(
        (state.rank >= first) & (state.rank < first + state.group), case.image, state.image
    )
    bisecting = jnp.where(here, value, state.image)
    image = jnp.where(
        state.stage == _DRAW,
        drawing,
        jnp.where(state.stage == _RESET, resetting, bisecting),
    )
    fooled = case.fools(image)
    kept = jnp.where(fooled, image, state.image)

    drawn = state._replace(
        image=kept,
        going=fooled | (state.drawn + 1 < amounts),
        stage=jnp.where(fooled, _RESET, _DRAW).astype(jnp.int32),
        drawn=state.drawn + 1,
    )
    # A group that fails is halved; a value that fails alone is passed over.
    reset = state._replace(
        image=kept,
        cursor=jnp.where(
            fooled, first + state.group, jnp.where(state.group == 1, first + 1, first)
        ),
        group=jnp.where(
            fooled, jnp.minimum(2 * state.group, size), jnp.maximum(state.group // 2, 1)
        ),
        better=state.better | fooled,
    )
    done = (fooled & (state.tries == 0)) | (state.tries >= bisections)
    bisected = state._replace(
        image=kept,
        cursor=jnp.where(done, first + 1, first),
        tries=jnp.where(done, 0, state.tries + 1),
        near=jnp.where(fooled, near, value),
    )
    ended = choose(
        state.stage == _RESET,
        _after_resets(case, state, passes),
        _after_bisections(case, state, passes),
    )
    later = choose(over, ended, choose(state.stage == _RESET, reset, bisected))
    return choose(state.stage == _DRAW, drawn, later)


def _noise(case: Case, state: PointwiseState, amounts: int) -> jax.Array:
    """Salt and pepper of the next amount."""
    amount = (state.drawn + 1) / amounts
    shape = case.image.shape
    if len(shape) > 1:
        shape = (*shape[:-1], 1)
    drawn = jax.random.uniform(jax.random.fold_in(state.key, state.drawn), shape)
    salted = jnp.where(drawn >= 1 - amount / 2, case.high, case.image)
    return jnp.where(drawn < amount / 2, case.low, salted)


def _after_resets(case: Case, state: PointwiseState, passes: int) -> PointwiseState:
    """The next pass, in the reverse order, or the first of bisections."""
    more = state.better & (state.passed + 1 < passes)
    return state._replace(
        stage=jnp.where(more, _RESET, _BISECT).astype(jnp.int32),
        rank=state.rank.size - 1 - state.rank,
        cursor=jnp.int32(0),
        group=jnp.int32(1),
        better=jnp.bool_(False),
        distance=l2(state.image - case.image),
        passed=jnp.where(more, state.passed + 1, 0),
    )


def _after_bisections(case: Case, state: PointwiseState, passes: int) -> PointwiseState:
    distance = l2(state.image - case.image)
    gained = distance < (1 - _GAIN) * state.distance
    return state._replace(
        going=gained & (state.passed + 1 < passes),
        rank=state.rank.size - 1 - state.rank,
        cursor=jnp.int32(0),
        tries=jnp.int32(0),
        distance=distance,
        passed=state.passed + 1,
    )


_SEARCH = Search(_start, _step)
