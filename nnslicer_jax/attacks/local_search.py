"""LocalSearch: greedy changes of the pixels that matter most, seen from outside.

Narodytska, Kasiviswanathan, "Simple Black-Box Adversarial Perturbations for Deep Networks", 2016,
section 5, algorithm LocSearchAdv. Each round probes pixels (all channels set to `probe` times
their sign, far out of bounds), changes those whose probes cost the label most probability by the
factor `factor`, wrapped around at the bounds, and takes the pixels near them as the next to probe.
At most 128 pixels are probed a round, drawn where there are more; pixel values count from the
middle of the bounds, whose width is 1.
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
    check_picture,
    choose,
    l2,
    run,
)

_MOST_PROBES = 128
# Of the pixels, those probed in the first round.
_FIRST_SHARE = 0.1


def local_search(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    factor: float = 1.5,
    probe: float = 10.0,
    reach: int = 5,
    changed: int = 5,
    rounds: int = 150,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Changes a few pixels a round until the network errs.

    Args:
      key: Draws which pixels are probed.
      apply: Pure function of the parameters and of images `[N, H, W, C]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape. It is also given pixels out of
        bounds.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      factor: What a changed pixel is multiplied by, 0..2; r in the paper.
      probe: What a probed pixel is set to, times its sign; p in the paper.
      reach: How far from a changed pixel the next probes are, in rows and columns; d.
      changed: Pixels changed a round; t.
      rounds: Most rounds; R.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      The first adversarial images met, with their distance in L2.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_picture(images)
    check_counts(reach=reach, changed=changed, rounds=rounds)
    check_numbers(factor=factor, probe=probe)
    if not 0 <= factor <= 2:
        raise ValueError(f"factor must be in 0..2, not {factor}")
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=l2, closest=True,
        factor=float(factor), probe=float(probe), reach=reach, changed=changed, rounds=rounds,
    )  # fmt: skip


class LocalSearchState(NamedTuple):
    """Where a search is; every step runs the network on one image, a probe or the changed one.

    Attributes:
      image: The image as changed in the rounds before.
      going: Whether the network is right about it and rounds are left.
      key: Draws the probes of the rounds to come.
      places: `[P]` indices of pixels to probe in this round,
      probes: of which so many count.
      scores: `[P]` log-probability of the label under each probe; infinite if not yet known.
      probed: How many are known.
      round: How many rounds were made.
    """

    image: jax.Array
    going: jax.Array
    key: jax.Array
    places: jax.Array
    probes: jax.Array
    scores: jax.Array
    probed: jax.Array
    round: jax.Array


def _start(key: jax.Array, case: Case, **_: Any) -> LocalSearchState:
    pixels = case.image.shape[0] * case.image.shape[1]
    now, later = jax.random.split(key)
    most = min(_MOST_PROBES, pixels)
    return LocalSearchState(
        image=case.image,
        going=~case.fools(case.image),
        key=later,
        places=jax.random.permutation(now, pixels)[:most],
        probes=jnp.int32(max(1, min(most, int(_FIRST_SHARE * pixels)))),
        scores=jnp.full(most, jnp.inf),
        probed=jnp.int32(0),
        round=jnp.int32(0),
    )


def _step(
    case: Case, state: LocalSearchState, *, factor: jax.Array, probe: jax.Array, reach: int,
    changed: int, rounds: int,
) -> LocalSearchState:  # fmt: skip
    height, width, channels = case.image.shape
    middle, scale = (case.low + case.high) / 2, case.high - case.low
    pixels = state.image.reshape(-1, channels)
    centred = (pixels - middle) / scale
    probing = state.probed < state.probes
    place = state.places[jnp.minimum(state.probed, len(state.places) - 1)]
    probed = pixels.at[place].set(probe * jnp.sign(centred[place]) * scale + middle)

    scores, worst = jax.lax.top_k(-state.scores, min(changed, len(state.places)))
    targets = jnp.where(jnp.isfinite(scores), state.places[worst], len(centred))
    grown = factor * centred
    wrapped = jnp.where(jnp.abs(grown) > 0.5, grown - jnp.sign(grown), grown)
    chosen = jnp.zeros(len(centred), bool).at[targets].set(True, mode="drop")
    moved = jnp.where(chosen[:, None], wrapped * scale + middle, pixels)

    image = jnp.where(probing, probed, moved).reshape(case.image.shape)
    logits = case.logits(image)
    score = jax.nn.log_softmax(logits)[case.label]
    ahead = state._replace(
        scores=state.scores.at[state.probed].set(score, mode="drop"), probed=state.probed + 1
    )

    key, later = jax.random.split(state.key)
    vertical, horizontal = (_neighbours(size, reach) for size in (height, width))
    grid = chosen.reshape(height, width).astype(jnp.float32)
    near = (vertical @ grid @ horizontal > 0.5).reshape(-1)
    draws = jnp.where(near, jax.random.uniform(key, near.shape), -1)
    places = jax.lax.top_k(draws, len(state.places))[1]
    over = LocalSearchState(
        image=case.clip(image),
        going=~case.errs(logits) & (state.round + 1 < rounds),
        key=later,
        places=places,
        probes=jnp.minimum(near.sum(), len(state.places)).astype(jnp.int32),
        scores=jnp.full_like(state.scores, jnp.inf),
        probed=jnp.int32(0),
        round=state.round + 1,
    )
    return choose(probing, ahead, over)


def _neighbours(size: int, reach: int) -> jax.Array:
    """1 where two places of an axis are within reach, `[size, size]`."""
    places = jnp.arange(size)
    return (jnp.abs(places[:, None] - places[None]) <= reach).astype(jnp.float32)


_SEARCH = Search(_start, _step)
