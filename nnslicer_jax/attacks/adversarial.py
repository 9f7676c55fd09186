"""What every attack takes and returns, and how it is run over many images.

An attack is written as a search on one image (`Search`); `run` compiles it once for a batch of
images (`jax.vmap`), cuts the images into batches, and judges what comes back by the network
itself.
"""

import functools
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.batches import filled
from nnslicer_jax.evaluation import quickest

# Images attacked at once unless asked otherwise: a ResNet-10 on them stays below 2 GiB.
BATCH_SIZE = 128
# The same image has slightly other logits in another batch. While an attack searches, an image
# counts as adversarial only if another class leads by this much of the two logits' size.
_SLACK = 1e-5
# Share of the batch that has to be done before others take its place.
_IDLE = 0.25
# Most steps between looks at which images are done, each of which waits for the device; at first
# every step is looked at, as some attacks are over after a few.
_STEPS = 8
# Steps before those still under way, a quarter or less, go on in a smaller batch: it has to be
# compiled.
_PATIENCE = 32


class Adversarial(NamedTuple):
    """Images changed so that a network errs.

    Attributes:
      images: `[N, ...]`, dtype and bounds as the images attacked. An attack of a fixed budget
        leaves every image at its budget, fooled or not. One that looks for the closest
        adversarial image returns the original where it found none, and where the network was
        wrong to begin with.
      success: `[N]` bool: whether the network, run on `images`, predicts another class than
        the label. True as well where it already did so before.
      distance: `[N]` float32: how far each image was moved, in the attack's norm: 0 where it is
        the original, so read it where `success` is True.
    """

    images: jax.Array
    success: jax.Array
    distance: jax.Array


class Case(NamedTuple):
    """One image to attack, as a search sees it.

    Attributes:
      logits: Function of an image float32 of any values to the network's logits `[K]` float32;
        the image is rounded to the dtype of the images attacked.
      image: The image, float32 within the bounds.
      label: Its class.
      low: Least value of a pixel.
      high: Greatest value of a pixel.
    """

    logits: Callable[[jax.Array], jax.Array]
    image: jax.Array
    label: jax.Array
    low: jax.Array
    high: jax.Array

    def clip(self, image: jax.Array) -> jax.Array:
        """The image with every pixel within the bounds."""
        return jnp.clip(image, self.low, self.high)

    def lead(self, logits: jax.Array) -> jax.Array:
        """How far the best other class is above the label; above 0 where the network errs."""
        others = jnp.where(self._is_label(logits), -jnp.inf, logits)
        return others.max() - logits[self.label]

    def errs(self, logits: jax.Array) -> jax.Array:
        """Whether another class than the label leads, by more than rounding."""
        others = jnp.where(self._is_label(logits), -jnp.inf, logits).max()
        true = logits[self.label]
        return others - true > _SLACK * jnp.maximum(jnp.abs(others), jnp.abs(true))

    def fools(self, image: jax.Array) -> jax.Array:
        """Whether the network errs on an image; also see `errs`."""
        return self.errs(self.logits(image))

    def loss(self, image: jax.Array) -> jax.Array:
        """Log-odds against the label.

        Cross-entropy is softplus of it: their gradients point the same way, but this one does
        not round to 0 where the network is sure of itself.
        """
        logits = self.logits(image)
        others = jax.nn.logsumexp(jnp.where(self._is_label(logits), -jnp.inf, logits))
        return others - logits[self.label]

    def likeliest(self, logits: jax.Array, count: int) -> jax.Array:
        """The `count` other classes of the greatest logits, `[count]`."""
        return jax.lax.top_k(jnp.where(self._is_label(logits), -jnp.inf, logits), count)[1]

    def _is_label(self, logits: jax.Array) -> jax.Array:
        return jnp.arange(len(logits)) == self.label


class Search(NamedTuple):
    """An attack on one image, as steps from a first state.

    A state is a NamedTuple of arrays with at least `image`, float32 within the bounds: what the
    attack would return now, and `going`: whether it wants another step.

    Attributes:
      start: Function of a key, a `Case` and the attack's options to the first state.
      step: Function of a `Case`, a state and the options to the next state; None for an attack
        that is over at once.
    """

    start: Callable[..., Any]
    step: Callable[..., Any] | None = None


def choose(condition: jax.Array, yes: Any, no: Any) -> Any:
    """One of two states."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def l2(difference: jax.Array) -> jax.Array:
    """Euclidean length of one image's change."""
    return jnp.sqrt(jnp.square(difference).sum())


def linf(difference: jax.Array) -> jax.Array:
    """Greatest change of one image's pixels."""
    return jnp.abs(difference).max()


def run(
    search: Search,
    key: jax.Array | None,
    apply: Callable,
    params: Any,
    images: Any,
    labels: Any,
    *,
    draws: bool,
    bounds: tuple[float, float],
    batch_size: int,
    norm: Callable[[jax.Array], jax.Array],
    closest: bool,
    **options: Any,
) -> Adversarial:
    """Runs a search on every image and judges what it returns.

    Args:
      search: What to run; its functions are those of a module, as compiled programs are kept by
        them.
      key: Random key; every image draws from its own, whatever the batch size.
      apply: Pure function of the parameters and of images `[N, ...]` that returns logits
        `[N, K]`; hashable, and compiled once for each shape.
      params: Its parameters.
      images: `[N, ...]` floats within `bounds`.
      labels: `[N]` integers, the true classes.
      draws: Whether the search draws anything; if not, the key is not looked at.
      bounds: Least and greatest pixel value.
      batch_size: Images attacked at once, which bounds the memory.
      norm: Measures the change of one image.
      closest: Whether images that were not fooled, or did not need to be, come back as they were.
      **options: The search's own. Floats are arguments of the compiled program; another value of
        anything else compiles it anew.

    Raises:
      ValueError: For an argument that is not as said above.
    """
    check_counts(batch_size=batch_size)
    pixels, classes = check(apply, params, images, labels, bounds)
    count = len(pixels)
    size = min(int(batch_size), count)
    spans = list(filled(count, size))
    before = np.concatenate([_logits(apply, params, pixels[span]) for span in spans])[:count]
    _check_logits(before)
    keys = _keys(key if draws else jax.random.key(0), count)
    quick = quickest(apply, params, pixels)
    moved = _searched(search, keys, quick, params, pixels, classes, bounds, size, options)
    after = np.concatenate([_logits(apply, params, moved[span]) for span in spans])[:count]
    success = after.argmax(1) != classes
    if closest:
        wrong = before.argmax(1) != classes
        moved = np.where((wrong | ~success).reshape(-1, *[1] * (moved.ndim - 1)), pixels, moved)
        success |= wrong
    distance = np.concatenate([_distances(norm, moved[span], pixels[span]) for span in spans])
    return Adversarial(jnp.asarray(moved), jnp.asarray(success), jnp.asarray(distance[:count]))


def _searched(
    search: Search,
    keys: jax.Array,
    apply: Callable,
    params: Any,
    pixels: np.ndarray,
    classes: np.ndarray,
    bounds: tuple[float, float],
    size: int,
    options: dict[str, Any],
) -> np.ndarray:
    """What the search makes of every image.

    `size` images are under way at a time; the places of those that are done are taken by others,
    and once none waits, the last ones go on in smaller batches.
    The host makes the steps: a loop inside the compiled program is no faster on an accelerator
    and much slower on a CPU.
    """
    traced = {name: value for name, value in options.items() if isinstance(value, float)}
    static = tuple((name, value) for name, value in options.items() if name not in traced)
    ends = jnp.float32(bounds[0]), jnp.float32(bounds[1])

    def start(which: np.ndarray) -> Any:
        return _start(
            search, apply, static, params, keys[which], pixels[which], classes[which], ends, traced
        )

    count = len(pixels)
    moved = np.empty_like(pixels)
    # Which image is in which place; -1 where there is none any more.
    held, waiting, steps = np.arange(size), size, 0
    images, labels = jnp.asarray(pixels[held]), jnp.asarray(classes[held])
    state = start(held)
    while True:
        going = np.asarray(state.going)
        done, active = (held >= 0) & ~going, (held >= 0) & going
        refill = waiting < count and done.sum() >= _IDLE * size
        shrink = waiting == count and steps >= _PATIENCE and 4 * active.sum() <= len(held)
        if refill or shrink or not active.any():
            moved[held[done]] = np.asarray(_rounded(state.image, images, ends))[done]
            held[done] = -1
            if waiting == count and not active.any():
                return moved
            if waiting < count:
                places = np.flatnonzero(held < 0)[: count - waiting]
                held[places] = np.arange(waiting, waiting + len(places))
                waiting += len(places)
                taken = np.isin(np.arange(size), places)
                which = np.where(taken, held, held[places[0]])
                given = jnp.asarray(pixels[which]), jnp.asarray(classes[which]), start(which)
                images, labels, state = _merged(taken, given, (images, labels, state))
            else:
                left = np.flatnonzero(active)
                places = np.resize(left, max(len(held) // 4, 1))
                held = np.where(np.arange(len(places)) < len(left), held[places], -1)
                images, labels, state = _taken(places, (images, labels, state))
            steps = 0
        if search.step is not None:
            between = min(max(steps // 4, 1), _STEPS)
            for _ in range(between):
                state = _advance(search, apply, static, params, images, labels, state, ends, traced)
            steps += between


def _case(apply: Callable, params: Any, image: jax.Array, label: jax.Array, ends: tuple) -> Case:
    def logits(pixels: jax.Array) -> jax.Array:
        return apply(params, pixels.astype(image.dtype)[None])[0].astype(jnp.float32)

    return Case(logits, image.astype(jnp.float32), label, *ends)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    search: Search, apply: Callable, static: tuple[tuple[str, Any], ...], params: Any,
    keys: jax.Array, images: jax.Array, labels: jax.Array, ends: tuple, traced: dict[str, Any],
) -> Any:  # fmt: skip
    def one(key: jax.Array, image: jax.Array, label: jax.Array) -> Any:
        case = _case(apply, params, image, label, ends)
        return search.start(key, case, **dict(static), **traced)

    return jax.vmap(one)(keys, images, labels)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(
    search: Search, apply: Callable, static: tuple[tuple[str, Any], ...], params: Any,
    images: jax.Array, labels: jax.Array, state: Any, ends: tuple, traced: dict[str, Any],
) -> Any:  # fmt: skip
    def one(image: jax.Array, label: jax.Array, old: Any) -> Any:
        case = _case(apply, params, image, label, ends)
        new = search.step(case, old, **dict(static), **traced)  # type: ignore[misc]
        return choose(old.going, new, old)

    return jax.vmap(one)(images, labels, state)


@jax.jit
def _merged(taken: jax.Array, new: Any, old: Any) -> Any:
    return jax.vmap(choose)(taken, new, old)


@jax.jit
def _taken(places: jax.Array, arrays: Any) -> Any:
    return jax.tree.map(lambda array: array[places], arrays)


@jax.jit
def _rounded(moved: jax.Array, images: jax.Array, ends: tuple) -> jax.Array:
    return jnp.clip(moved, *ends).astype(images.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _logits(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return apply(params, images).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _distances(norm: Callable, moved: jax.Array, images: jax.Array) -> jax.Array:
    return jax.vmap(norm)(moved.astype(jnp.float32) - images.astype(jnp.float32))


def _keys(key: Any, count: int) -> jax.Array:
    try:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count, dtype=jnp.uint32))
    except (TypeError, ValueError):
        raise ValueError(
            f"key must be one of jax.random.key, not {type(key).__name__}"
            f"{getattr(key, 'shape', '')}"
        ) from None


def check(
    apply: Callable, params: Any, images: Any, labels: Any, bounds: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as arrays on the host, in a dtype that JAX computes in.

    Raises:
      ValueError: For images that are empty, no floats, not finite or outside `bounds`; for
        labels that are no class indices `[N]`; for a network that returns no logits `[N, K]`.
    """
    pixels, classes = check_pixels(images, bounds), np.asarray(labels)
    if classes.shape != (len(pixels),) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(
            f"labels must be integers [{len(pixels)}], one an image, not {classes.dtype} of "
            f"shape {classes.shape}"
        )
    logits = _shaped(apply, params, pixels)
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(pixels) or shape[1] < 2:
        given = type(logits).__name__ if shape is None else shape
        raise ValueError(f"apply must return logits [N, K] of 2 classes or more, not {given}")
    if classes.min() < 0 or classes.max() >= shape[1]:
        raise ValueError(
            f"labels must be below {shape[1]}, the model's number of classes; given "
            f"{classes.min()}..{classes.max()}"
        )
    return pixels, classes.astype(np.int32)


def _shaped(apply: Callable, params: Any, pixels: np.ndarray) -> Any:
    """What `apply` returns for the images, shapes and dtypes only."""
    try:
        hash(apply)
    except TypeError:
        raise ValueError(
            f"apply must be hashable, as compiled programs are kept by it; {type(apply).__name__} "
            "is not"
        ) from None
    try:
        return jax.eval_shape(apply, params, jax.ShapeDtypeStruct(pixels.shape, pixels.dtype))
    except Exception as error:  # Models raise many types for a shape that they do not take.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"apply must take images {pixels.shape} {pixels.dtype}; it raises "
            f"{type(error).__name__}: {reason}"
        ) from error


def check_pixels(images: Any, bounds: tuple[float, float], *, name: str = "images") -> np.ndarray:
    """Images as an array on the host, in a dtype that JAX computes in.

    Raises:
      ValueError: For images that are empty, no floats, not finite or outside `bounds`; calls them
        by `name`.
    """
    low, high = check_bounds(bounds)
    try:
        pixels = np.asarray(images)
    except ValueError:
        raise ValueError(f"{name} must be [N, ...], all of one shape") from None
    if pixels.ndim < 2 or len(pixels) == 0:
        raise ValueError(f"{name} must be [N, ...] with N of at least 1, not {pixels.shape}")
    if not jnp.issubdtype(pixels.dtype, jnp.floating):
        raise ValueError(f"{name} must be floats in {low:g}..{high:g}, not {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError(f"{name} must be finite; some are NaN or infinite")
    if pixels.size and (pixels.min() < low or pixels.max() > high):
        given = f"{pixels.min():g}..{pixels.max():g}"
        raise ValueError(f"{name} must lie in {low:g}..{high:g}, given {given}")
    return pixels.astype(jax.dtypes.canonicalize_dtype(pixels.dtype))


def _check_logits(logits: np.ndarray) -> None:
    if np.isnan(logits).any():
        raise ValueError("apply must return logits; it returns NaN for some images")
    if (logits >= 0).all() and np.allclose(logits.sum(1), 1, atol=1e-3):
        warnings.warn(
            "apply seems to return probabilities; attacks want logits, and gradients of a softmax "
            "that is sure of itself vanish: cut the model before it",
            stacklevel=4,
        )


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """The bounds; raises ValueError unless they are two finite numbers in order."""
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be (low, high), two numbers, not {bounds!r}") from None
    if not (_is_number(low) and _is_number(high) and low < high):
        raise ValueError(f"bounds must be (low, high) with low < high, not {bounds}")
    return low, high


def check_eps(eps: float, bounds: tuple[float, float]) -> float:
    """Eps as a float; raises ValueError unless it is 0 to the width of `bounds`."""
    low, high = check_bounds(bounds)
    width = high - low
    if not _is_number(eps) or not 0 <= eps <= width:
        raise ValueError(f"eps must be in 0..{width:g}, the width of bounds, not {eps!r}")
    return float(eps)


def check_counts(**counts: int) -> None:
    """Raises ValueError for a number that is no integer of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"{name} must be an integer of at least 1, not {count!r}")


def check_sizes(**sizes: float) -> None:
    """Raises ValueError for what is no finite number above 0."""
    check_numbers(**sizes)
    for name, size in sizes.items():
        if not size > 0:
            raise ValueError(f"{name} must be above 0, not {size!r}")


def check_numbers(**values: float) -> None:
    """Raises ValueError for what is no finite number."""
    for name, value in values.items():
        if not _is_number(value):
            raise ValueError(f"{name} must be a finite number, not {value!r}")


def _is_number(value: Any) -> bool:
    """Whether a value is a finite real number, of Python, NumPy or JAX."""
    if isinstance(value, str | bytes | list | tuple) or np.ndim(value):
        return False
    array = np.asarray(value)
    return array.dtype.kind in "iuf" and bool(np.isfinite(array))


def check_picture(images: Any) -> tuple[int, int]:
    """Height and width; raises ValueError unless there are two spatial axes and one of channels."""
    try:
        shape = np.shape(images)
    except ValueError:
        raise ValueError("images must be [N, H, W, C], all of one shape") from None
    if len(shape) != 4:
        raise ValueError(f"images must be [N, H, W, C], not {shape}")
    return shape[1], shape[2]
