"""APGD: projected gradient steps whose length adapts to what they gain.

Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020: algorithm 1 and section 3.1, the DLR loss of section 4. For
L-infinity. A run starts on the surface of the ball, in a random direction, and ends once the
network errs. The step is halved at checkpoints where too few steps gained anything, or where the
best value stands still; then the search goes on from the best point.
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
    linf,
    run,
)

# Share of the gradient step in a move; the rest goes on in the direction of the move before.
_NEW = 0.75
# Share of steps between checkpoints that must gain something, or the step is halved.
_GAINS = 0.75
# Keeps the DLR loss from a division by 0.
_TINY = 1e-12


def apgd(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Adversarial:
    """Climbs a loss within eps of the image.

    Args:
      key: Draws the starts.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, in the images' units, 0 to the width of `bounds`.
      loss: "ce": the log-odds against the label, which grow with the cross-entropy; "dlr": the
        difference of logits ratio, which no scaling of the logits changes, for 3 classes or more;
        "dlr-targeted": towards each of the likeliest other classes in turn, for 4 or more.
      steps: Of each run.
      restarts: Runs, of each class for "dlr-targeted".
      targets: Classes that "dlr-targeted" looks at, at most.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Returns:
      For every image the first that fooled the network, else the one that came closest to it in
      logits, with its distance in L-infinity.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, not {loss!r}")
    eps = check_eps(eps, bounds)
    check_counts(steps=steps, restarts=restarts, targets=targets)
    return run(
        _SEARCH, key, apply, params, images, labels,
        draws=True, bounds=bounds, batch_size=batch_size, norm=linf, closest=False,
        eps=eps, loss=_LOSSES[loss], steps=steps, restarts=restarts,
        targets=targets if loss == "dlr-targeted" else 1,
    )  # fmt: skip


def checkpoints(steps: int) -> list[int]:
    """After how many steps the step's length is looked at, ascending.

    They are `ceil(p_j * steps)` for p_0 = 0, p_1 = 0.22 and, as long as this is below 1,
    p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    share, width = 22, 22
    found: list[int] = []
    while share < 100:
        found.append(math.ceil(share * steps / 100))
        width = max(width - 3, 6)
        share += width
    return sorted(set(found))


# A loss is a function of logits [K], the label and the class to go for.
Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def log_odds(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """Log-odds against the label: cross-entropy is softplus of it, and rounds to 0 before."""
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    return jax.nn.logsumexp(others) - logits[label]


def dlr(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """Lead of the best other class over the label, by the spread of the three highest logits."""
    if len(logits) < 3:
        raise ValueError(f"loss 'dlr' needs 3 classes or more, not {len(logits)}")
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    top = jax.lax.top_k(logits, 3)[0]
    return (others.max() - logits[label]) / (top[0] - top[2] + _TINY)


def dlr_targeted(logits: jax.Array, label: jax.Array, target: jax.Array) -> jax.Array:
    """Lead of one class over the label, by the spread of the four highest logits."""
    if len(logits) < 4:
        raise ValueError(f"loss 'dlr-targeted' needs 4 classes or more, not {len(logits)}")
    top = jax.lax.top_k(logits, 4)[0]
    return (logits[target] - logits[label]) / (top[0] - (top[2] + top[3]) / 2 + _TINY)


_LOSSES: dict[str, Loss] = {"ce": log_odds, "dlr": dlr, "dlr-targeted": dlr_targeted}


class ApgdState(NamedTuple):
    """Where a search is.

    Attributes:
      image: What leads furthest away from the label so far, over all runs,
      lead: and how far the best other class is above the label there.
      going: Whether the network is right about it and steps are left.
      key: Draws the starts to come.
      classes: `[T]` classes to go for in turn.
      run: Which run this is.
      step: Steps made in this run; the first step of a run is to its start.
      point: Where it is,
      previous: and where it was before.
      value: The loss there,
      gradient: and its gradient.
      best_point: Where the loss was highest in this run,
      best: what it was there,
      best_gradient: and its gradient.
      length: Length of a step.
      gains: How many steps since the last checkpoint raised the loss.
      checked: The highest loss at the last checkpoint.
      halved: Whether the step was halved there.
    """

    image: jax.Array
    lead: jax.Array
    going: jax.Array
    key: jax.Array
    classes: jax.Array
    run: jax.Array
    step: jax.Array
    point: jax.Array
    previous: jax.Array
    value: jax.Array
    gradient: jax.Array
    best_point: jax.Array
    best: jax.Array
    best_gradient: jax.Array
    length: jax.Array
    gains: jax.Array
    checked: jax.Array
    halved: jax.Array


def _start(key: jax.Array, case: Case, *, targets: int, **_: Any) -> ApgdState:
    logits = case.logits(case.image)
    none, zero, flat = jnp.float32(0), jnp.int32(0), jnp.zeros_like(case.image)
    return ApgdState(
        image=case.image,
        lead=jnp.float32(-jnp.inf),
        going=~case.errs(logits),
        key=key,
        classes=case.likeliest(logits, min(targets, len(logits) - 1)),
        run=zero,
        step=zero,
        point=case.image,
        previous=case.image,
        value=none,
        gradient=flat,
        best_point=case.image,
        best=none,
        best_gradient=flat,
        length=none,
        gains=zero,
        checked=none,
        halved=jnp.bool_(False),
    )


def _step(
    case: Case, state: ApgdState, *, eps: jax.Array, loss: Loss, steps: int, restarts: int,
    **_: Any,
) -> ApgdState:  # fmt: skip
    now, later = jax.random.split(state.key)
    first = state.step == 0
    low, high = case.clip(case.image - eps), case.clip(case.image + eps)

    shift = jax.random.uniform(now, case.image.shape, minval=-1, maxval=1)
    start = jnp.clip(case.image + eps * shift / jnp.abs(shift).max(), low, high)
    gone = jnp.clip(state.point + state.length * jnp.sign(state.gradient), low, high)
    share = jnp.where(state.step == 1, 1.0, _NEW)
    ahead = share * (gone - state.point) + (1 - share) * (state.point - state.previous)
    point = jnp.where(first, start, jnp.clip(state.point + ahead, low, high))

    target = state.classes[state.run // restarts]

    def valued(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = case.logits(image)
        return loss(logits, case.label, target), logits

    (value, logits), gradient = jax.value_and_grad(valued, has_aux=True)(point)
    lead = case.lead(logits)
    further = lead > state.lead
    gains = jnp.where(first, 0, state.gains + (value > state.value))
    higher = first | (value > state.best)
    best = jnp.where(higher, value, state.best)
    best_point = jnp.where(higher, point, state.best_point)
    best_gradient = jnp.where(higher, gradient, state.best_gradient)

    since = jnp.asarray(_windows(steps))[state.step]
    check = since > 0
    few = gains < _GAINS * since
    still = ~state.halved & (best == state.checked)
    halve = check & (few | still)
    length = jnp.where(first, 2 * eps, state.length)
    over = state.step == steps
    runs = len(state.classes) * restarts
    return ApgdState(
        image=jnp.where(further, point, state.image),
        lead=jnp.where(further, lead, state.lead),
        going=~case.errs(logits) & ~(over & (state.run + 1 == runs)),
        key=later,
        classes=state.classes,
        run=state.run + over,
        step=jnp.where(over, 0, state.step + 1),
        point=jnp.where(halve, best_point, point),
        previous=jnp.where(first, point, state.point),
        value=jnp.where(halve, best, value),
        gradient=jnp.where(halve, best_gradient, gradient),
        best_point=best_point,
        best=best,
        best_gradient=best_gradient,
        length=jnp.where(halve, length / 2, length),
        gains=jnp.where(check, 0, gains),
        checked=jnp.where(first | check, best, state.checked),
        halved=jnp.where(check, halve, state.halved & ~first),
    )


def _windows(steps: int) -> np.ndarray:
    """For each number of steps made, those since the last checkpoint if this is one, else 0."""
    found, last = np.zeros(steps + 1, np.int32), 0
    for at in checkpoints(steps):
        found[at], last = at - last, at
    return found


_SEARCH = Search(_start, _step)
