"""Square: random squares at the budget, kept where they cost the label its lead; no gradients.

Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial
attack via random search", ECCV 2020: algorithms 1 and 2, for L-infinity. The search starts from
vertical stripes; each query sets every pixel of a random square to its budget, one sign a channel.
Squares cover less and less of the image (`sides`).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.attacks.adversarial import (
    BATCH_SIZE,
    Adversarial,
    Case,
    Search,
    check_counts,
    check_eps,
    check_picture,
    linf,
    run,
)

# Queries of 10,000 after which the share of the image that a square covers is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_PUBLISHED = 10_000


def square(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    queries: int = 5000,
    share: float = 0.8,
    horizon: int = _PUBLISHED,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Sets random squares to the budget until the network errs.

    Args:
      key: Draws the squares.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape. No gradient of it is taken.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      queries: Squares tried, at most.
      share: Of the image that the first squares cover, above 0 and at most 1; p in the paper.
      horizon: Queries that the paper's schedule of shares is stretched over. AutoAttack leaves
        it at 10,000, of which it makes 5,000.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      For every image the first that fooled the network, else the one that came closest to it in
      logits, with its distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_picture(images)
    eps = check_eps(eps, bounds)
    check_counts(queries=queries, horizon=horizon)
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    height, width = np.shape(images)[1:3]
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=linf, closest=False,
        eps=eps, lengths=sides(queries, share, horizon, height, width),
    )  # fmt: skip


def sides(queries: int, share: float, horizon: int, height: int, width: int) -> tuple[int, ...]:
    """Side of each query's square, in pixels: it covers about `share / 2 ** h` of the image.

    h is how many of 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 the query has passed, scaled
    from 10,000 to `horizon`.
    """
    found = []
    for query in range(queries):
        at = query * _PUBLISHED // horizon
        halvings = sum(at > limit for limit in _HALVINGS)
        side = round(math.sqrt(share / 2**halvings * height * width))
        found.append(min(max(side, 1), height, width))
    return tuple(found)


class SquareState(NamedTuple):
    """Where a search is.

    Attributes:
      image: The best image so far,
      lead: how far the best other class is above the label there,
      going: and whether the network is right about it and queries are left.
      key: Draws the squares to come.
      query: How many were tried.
    """

    image: jax.Array
    lead: jax.Array
    going: jax.Array
    key: jax.Array
    query: jax.Array


def _start(key: jax.Array, case: Case, *, eps: jax.Array, **_: Any) -> SquareState:
    now, later = jax.random.split(key)
    stripes = jax.random.rademacher(now, (1, *case.image.shape[1:]), jnp.float32)
    wrong = case.fools(case.image)
    image = jnp.where(wrong, case.image, case.clip(case.image + eps * stripes))
    logits = case.logits(image)
    return SquareState(image, case.lead(logits), ~case.errs(logits), later, jnp.int32(0))


def _step(
    case: Case, state: SquareState, *, eps: jax.Array, lengths: tuple[int, ...]
) -> SquareState:
    vertical, horizontal, signs, later = jax.random.split(state.key, 4)
    side = jnp.asarray(lengths)[state.query]

    def within(key: jax.Array, size: int) -> jax.Array:
        first = jax.random.randint(key, (), 0, size - side + 1)
        places = jnp.arange(size)
        return (places >= first) & (places < first + side)

    height, width, channels = case.image.shape
    chosen = within(vertical, height)[:, None] & within(horizontal, width)[None]
    sign = jax.random.rademacher(signs, (1, 1, channels), jnp.float32)
    tried = jnp.where(chosen[..., None], case.clip(case.image + eps * sign), state.image)

    logits = case.logits(tried)
    lead, fooled = case.lead(logits), case.errs(logits)
    better = fooled | (lead > state.lead)
    return SquareState(
        image=jnp.where(better, tried, state.image),
        lead=jnp.where(better, lead, state.lead),
        going=~fooled & (state.query + 1 < len(lengths)),
        key=later,
        query=state.query + 1,
    )


_SEARCH = Search(_start, _step)
