"""How accurate a network is: as it is, under attack, and by certificate.

What HYDRA's tables hold (Sehwag, Wang, Mittal, Jana, NeurIPS 2020, section 4): benign accuracy;
era, the accuracy that PGD with restarts leaves; vra-t, vra-m and vra-s, the accuracy certified by
interval or linear bounds, by symbolic intervals and by randomized smoothing; and AutoAttack (Croce,
Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
attacks", ICML 2020), which tells robustness from gradients that lead nowhere. Distances are in
L-infinity, those of smoothing in L2. Normalisation belongs to the network: images are pixels within
`bounds`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from nnslicer_jax import evaluation
from nnslicer_jax.attacks import Adversarial, apgd, fab, rpgd, square
from nnslicer_jax.attacks.adversarial import BATCH_SIZE, check, check_counts, check_eps
from nnslicer_jax.batches import check_params, filled
from nnslicer_jax.graph import Graph
from nnslicer_jax.interval import interval_bounds
from nnslicer_jax.linear_bounds import linear_bounds, margin_rows
from nnslicer_jax.symbolic import symbolic_bounds

# A margin counts as certified above an allowance for rounding: so many units in the last place of
# the largest magnitude that interval bounds give a logit, and twice what rounding outward moves
# those bounds, which counts the rounding of every value inside, however large beside the logits. It
# covers interval margins; for linear and symbolic bounds, which round otherwise, it is no proof.
_UNITS = 64
# A smaller batch is compiled where at most a quarter of one is left to attack, but none below this.
_SHRINK, _SMALLEST = 4, 8


@dataclasses.dataclass(frozen=True, eq=False)
class Verdict:
    """Which images a network is right about.

    Attributes:
      right: `[N]` bool; which kind of right, says the function that returned it.
    """

    right: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the images, 0..1."""
        return float(self.right.mean())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper and Pearson's interval of the accuracy, for images drawn independently."""
        found = scipy.stats.binomtest(int(self.right.sum()), len(self.right))
        low, high = found.proportion_ci(level, method="exact")
        return float(low), float(high)


@dataclasses.dataclass(frozen=True, eq=False)
class Attacked(Verdict):
    """Which images a network is right about after every attack.

    Attributes:
      benign: `[N]` bool: right before any attack; no image is right after that is not here.
      images: `[N, ...]`: for each that was fooled the image that did it, within eps and the bounds,
        else the original. `right` is what the network says of these, run on them once more.
      after: Name of each attack, in their order, to the accuracy that it and those before left.
    """

    benign: np.ndarray
    images: np.ndarray
    after: Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Certified(Verdict):
    """Which images a network provably stays right about anywhere within eps.

    Attributes:
      benign: `[N]` bool: right before.
      margin: `[N]`, a lower bound of how far the label leads within eps, -inf where none is known.
      slack: `[N]`, allowed for rounding at the logits; certified are those above it.
    """

    benign: np.ndarray
    margin: np.ndarray
    slack: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Smoothed(Verdict):
    """Which images a smoothed network is certified to be right about.

    Attributes:
      predicted: `[N]` int32: the class it returns, -1 where it abstains.
      radius: `[N]` float64, in L2: how far it certainly returns it; 0 where it abstains.
      labels: `[N]` int32.
    """

    predicted: np.ndarray
    radius: np.ndarray
    labels: np.ndarray

    def certified(self, radius: float) -> Verdict:
        """Which images it is right about anywhere within another radius."""
        return Verdict((self.predicted == self.labels) & (self.radius >= radius))


def benign(
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Verdict:
    """Which images a network is right about.

    Args:
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      bounds: Least and greatest pixel value.
      batch_size: Images run at once.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    pixels, classes = _checked(apply, params, images, labels, bounds, batch_size)
    return Verdict(_right(apply, params, pixels, classes, min(batch_size, len(pixels))))


# Under attack --------------------------------------------------------------------------------

Attack = Callable[..., Adversarial]


def era(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    steps: int = 50,
    restarts: int = 10,
    relative_step: float = 0.25,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Attacked:
    """Empirical robust accuracy: an image counts only if it survives every restart of PGD.

    Args:
      key: Draws the starts, uniform in the ball.
      apply: As for `benign`.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, 0 to the width of `bounds`.
      steps: Of each restart, along the sign of the gradient.
      restarts: How many; each attacks the images that survived those before.
      relative_step: Length of a step, in eps: by default 2/255 for an eps of 8/255.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(restarts=restarts)
    attack = functools.partial(
        rpgd, eps=check_eps(eps, bounds), steps=steps, relative_step=relative_step
    )
    tries = [(f"restart {i + 1}", attack) for i in range(restarts)]
    return _survived(key, apply, params, images, labels, eps, bounds, batch_size, tries)


# AutoAttack's standard version.
ENSEMBLE: Mapping[str, Attack] = MappingProxyType(
    {
        "apgd-ce": functools.partial(apgd, loss="ce"),
        "apgd-t": functools.partial(apgd, loss="dlr-targeted"),
        "fab-t": fab,
        "square": square,
    }
)


def autoattack(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    attacks: Mapping[str, Attack] = ENSEMBLE,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Attacked:
    """Accuracy under AutoAttack's ensemble, each attack on the images that survived those before.

    Args:
      key: Each attack draws from its own.
      apply: As for `benign`.
      params: Its parameters.
      images: `[N, H, W, C]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, 0 to the width of `bounds`.
      attacks: By name, in the order to run them; each takes eps by name. Images farther away
        than eps are cut off there before they are judged.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.

    Raises:
      ValueError: For an argument that is not as said above, and for a network of 3 classes or
        fewer, for which the loss of "apgd-t" is not defined.
    """
    if not attacks:
        raise ValueError("attacks must name at least one attack")
    eps = check_eps(eps, bounds)
    tries = [(name, functools.partial(attack, eps=eps)) for name, attack in attacks.items()]
    return _survived(key, apply, params, images, labels, eps, bounds, batch_size, tries)


def _survived(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    eps: float,
    bounds: tuple[float, float],
    batch_size: int,
    tries: Sequence[tuple[str, Attack]],
) -> Attacked:
    """Runs attacks one after the other, each on the images that the network is still right about.

    Args:
      key: Each attack gets its own.
      apply: As for `benign`.
      params: Its parameters.
      images: As for `benign`.
      labels: As for `benign`.
      eps: Largest change of a pixel.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once.
      tries: Names of attacks, and these but for what all attacks take.
    """
    pixels, classes = _checked(apply, params, images, labels, bounds, batch_size)
    low, high = (np.clip(pixels + sign * pixels.dtype.type(eps), *bounds) for sign in (-1, 1))
    judged = min(batch_size, len(pixels))
    before = _right(apply, params, pixels, classes, judged)
    right, worst = before.copy(), pixels.copy()
    after: dict[str, float] = {}
    for i, (name, attack) in enumerate(tries):
        left = np.flatnonzero(right)
        if len(left):
            size = _batch(len(left), judged)
            # Filled up, so that one size of batch is compiled once.
            which = np.resize(left, -(-len(left) // size) * size)
            found = attack(
                _key(key, i), apply, params, pixels[which], classes[which],
                bounds=bounds, batch_size=size,
            )  # fmt: skip
            moved = np.clip(np.asarray(found.images)[: len(left)], low[left], high[left])
            fooled = ~_right(apply, params, moved, classes[left], judged)
            worst[left[fooled]] = moved[fooled]
            right[left] = ~fooled
        after[name] = float(right.mean())
    right = before & _right(apply, params, worst, classes, judged)
    return Attacked(right=right, benign=before, images=worst, after=after)


def _batch(count: int, size: int) -> int:
    """The least of `size`, a quarter of it and a 16th that holds `count` and is not too small."""
    for smaller in (size // _SHRINK**2, size // _SHRINK):
        if smaller >= max(count, _SMALLEST):
            return smaller
    return size


# By certificate ------------------------------------------------------------------------------

# Lower bounds of rows of logits: bound(graph, params, lower, upper, rows). One object each, as
# compiled programs are kept by them.
Bound = Callable[..., jax.Array]
_BOUNDS: Mapping[str, Bound] = {
    method: functools.partial(linear_bounds, method=method)
    for method in ("ibp", "crown-ibp", "crown", "fast-lin")
}


def vra_t(
    graph: Graph,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    method: str = "ibp",
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = BATCH_SIZE,
) -> Certified:
    """Which images bounds certify: the label leads everywhere within eps and the bounds.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, 0 to the width of `bounds`.
      method: "ibp", "crown-ibp", "crown" or "fast-lin", as for `linear_bounds`.
      bounds: Least and greatest pixel value.
      batch_size: Images bounded at once.

    Raises:
      ValueError: For an argument that is not as said above.
      UnsupportedError: For an operation that has no rule.
    """
    if method not in _BOUNDS:
        raise ValueError(f"method must be one of {', '.join(_BOUNDS)}, not {method!r}")
    return _certified(graph, params, images, labels, eps, bounds, batch_size, _BOUNDS[method])


def vra_m(
    graph: Graph,
    params: Any,
    images: Any,
    labels: Any,
    *,
    eps: float,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = 16,
) -> Certified:
    """Which images MixTrain's symbolic intervals certify.

    Args:
      graph: The traced model.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      eps: Largest change of a pixel, 0 to the width of `bounds`.
      bounds: Least and greatest pixel value.
      batch_size: Images bounded at once; see `symbolic` for the memory that each takes.

    Raises:
      ValueError: For an argument that is not as said above.
      UnsupportedError: For an operation that has no rule.
    """
    return _certified(graph, params, images, labels, eps, bounds, batch_size, symbolic_bounds)


def _certified(
    graph: Graph,
    params: Any,
    images: Any,
    labels: Any,
    eps: float,
    bounds: tuple[float, float],
    batch_size: int,
    bound: Bound,
) -> Certified:
    eps = check_eps(eps, bounds)
    apply = functools.partial(evaluation.logits, graph)
    pixels, classes = _checked(apply, params, images, labels, bounds, batch_size)
    found = []
    for span in filled(len(pixels), min(batch_size, len(pixels))):
        some = pixels[span]
        box = _ball(some, eps, bounds)
        found.append(jax.device_get(_margins(graph, bound, params, some, *box, classes[span])))
    good, margin, slack = (np.concatenate(p)[: len(pixels)] for p in zip(*found, strict=True))
    return Certified(right=good & (margin > slack), benign=good, margin=margin, slack=slack)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _margins(
    graph: Graph,
    bound: Bound,
    params: Any,
    images: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Whether the network is right, a lower bound of the margin within a box, and its slack."""
    logits = evaluation.logits(graph, params, images)
    rows = margin_rows(labels, logits.shape[1])
    margin = bound(graph, params, lower, upper, rows).min(1)
    ends = interval_bounds(graph, params, lower, upper)
    wide = interval_bounds(graph, params, lower, upper, outward=True)
    most, moved = (
        jnp.maximum(low, high).reshape(len(images), -1).max(1)
        for low, high in (
            (jnp.abs(ends.lower), jnp.abs(ends.upper)),
            (ends.lower - wide.lower, wide.upper - ends.upper),
        )
    )
    # Of the two logits of a margin.
    slack = _UNITS * jnp.finfo(most.dtype).eps * most + 2 * moved
    return logits.argmax(1) == labels, margin, slack


def _ball(
    pixels: np.ndarray, eps: float, bounds: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Ends of the box within eps and the bounds, rounded outward."""
    number = pixels.dtype.type
    reach = np.nextafter(number(eps), number(np.inf))
    low = np.nextafter(pixels - reach, number(-np.inf))
    high = np.nextafter(pixels + reach, number(np.inf))
    return jnp.asarray(np.clip(low, *bounds)), jnp.asarray(np.clip(high, *bounds))


def vra_s(
    key: jax.Array,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    sigma: float,
    radius: float,
    guesses: int = 100,
    samples: int = 10_000,
    alpha: float = 0.001,
    bounds: tuple[float, float] = (0, 1),
    batch_size: int = 500,
) -> Smoothed:
    """Which images randomized smoothing certifies, in L2.

    Cohen, Rosenfeld, Kolter, "Certified adversarial robustness via randomized smoothing", ICML
    2019, section 3.2.2: the class that most of a few noisy images get is guessed, and its share is
    bounded from below by Clopper and Pearson on others. Noise is drawn afresh for each image;
    noisy images are not clipped.

    Args:
      key: Draws the noise; on a CPU the default generator is faster than `unsafe_rbg`.
      apply: As for `benign`; also given pixels out of bounds.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      sigma: Standard deviation of the noise, in the images' units, above 0.
      radius: In which an image has to be certified to count as right, above 0.
      guesses: Noisy images to guess the class from.
      samples: Noisy images to bound its share by.
      alpha: Chance that a certificate is wrong, above 0 and below 1.
      bounds: Least and greatest pixel value.
      batch_size: Noisy images run at once, at most.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    if not 0 < sigma < np.inf:
        raise ValueError(f"sigma must be above 0, not {sigma}")
    if not 0 < radius < np.inf:
        raise ValueError(f"radius must be above 0, not {radius}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be above 0 and below 1, not {alpha}")
    check_counts(guesses=guesses, samples=samples)
    pixels, classes = _checked(apply, params, images, labels, bounds, batch_size)
    predicted = np.full(len(pixels), -1, np.int32)
    certain = np.zeros(len(pixels))
    for i, image in enumerate(jnp.asarray(pixels)):
        guess, estimate = jax.random.split(_key(key, i))
        first = _votes(guess, apply, params, image, float(sigma), guesses, batch_size)
        votes = _votes(estimate, apply, params, image, float(sigma), samples, batch_size)
        # The device draws and runs the second lot while the host waits for the first.
        top = int(np.asarray(first).argmax())
        share = lower_share(int(np.asarray(votes)[top]), samples, alpha)
        if share > 0.5:
            predicted[i] = top
            certain[i] = sigma * scipy.stats.norm.ppf(share)
    right = (predicted == classes) & (certain >= radius)
    return Smoothed(right=right, predicted=predicted, radius=certain, labels=classes)


def lower_share(hits: int, count: int, alpha: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a share, wrong with chance alpha at most."""
    return float(scipy.stats.beta.ppf(alpha, hits, count - hits + 1)) if hits else 0.0


def _votes(
    key: jax.Array,
    apply: Callable,
    params: Any,
    image: jax.Array,
    sigma: float,
    count: int,
    batch_size: int,
) -> jax.Array:
    """How many of `count` noisy images get each class, `[K]` int32."""
    parts = -(-count // batch_size)
    size = -(-count // parts)
    found = [
        _ballot(apply, size, params, image, sigma, jax.random.fold_in(key, i), count - i * size)
        for i in range(parts)
    ]
    return functools.reduce(jnp.add, found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _ballot(
    apply: Callable, size: int, params: Any, image: jax.Array, sigma: jax.Array, key: jax.Array,
    real: jax.Array,
) -> jax.Array:  # fmt: skip
    """Classes of `size` noisy images, of which the first `real` count."""
    noise = jax.random.normal(key, (size, *image.shape))
    logits = apply(params, (image[None] + sigma * noise).astype(image.dtype))
    chosen = jax.nn.one_hot(logits.argmax(1), logits.shape[1], dtype=jnp.int32)
    return jnp.where(jnp.arange(size)[:, None] < real, chosen, 0).sum(0)


# Images and labels ---------------------------------------------------------------------------


def _checked(
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    bounds: tuple[float, float],
    batch_size: int,
) -> tuple[np.ndarray, np.ndarray]:
    check_counts(batch_size=batch_size)
    check_params(params)
    return check(apply, params, images, labels, bounds)


def _key(key: jax.Array, number: int) -> jax.Array:
    try:
        return jax.random.fold_in(key, number)
    except (TypeError, ValueError):
        raise ValueError(f"key must be one of jax.random.key, not {type(key).__name__}") from None


def _right(
    apply: Callable, params: Any, pixels: np.ndarray, classes: np.ndarray, size: int
) -> np.ndarray:
    """Whether the network's highest logit is that of the label, `[N]` bool; `size` at once."""
    spans = filled(len(pixels), size)
    found = [np.asarray(_predicted(apply, params, pixels[span])) for span in spans]
    return np.concatenate(found)[: len(pixels)] == classes


@functools.partial(jax.jit, static_argnums=0)
def _predicted(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return apply(params, images).argmax(1)
