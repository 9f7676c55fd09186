"""Sets of target classes: drawn, checked, and judged with an interval over the test images.

Sets overlap, so an accuracy over several of them is a mean over test images, each with a weight: an
image is judged once in every set that its class is in, by a network of that set.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Standard normal quantile of a 95 % interval.
_Z = 1.959964


def target_sets(classes: int, size: int, count: int | None, seed: int) -> list[tuple[int, ...]]:
    """Different sets of `size` of the classes in an order drawn: the first `count`, or all.

    Raises:
      ValueError: For a size that there is no set of.
    """
    if not 1 <= size <= classes:
        raise ValueError(f"a set must hold 1..{classes} target classes, not {size}")
    every = list(itertools.combinations(range(classes), size))
    order = np.random.default_rng((seed, size)).permutation(len(every))
    return [every[i] for i in order[:count]]


def check_targets(targets: Sequence[int], classes: int) -> tuple[int, ...]:
    """The target classes in order.

    Raises:
      ValueError: For none, the same twice, or one that there is not.
    """
    if not len(targets):
        raise ValueError("targets must name at least one class")
    if len(set(targets)) < len(targets) or not all(0 <= target < classes for target in targets):
        raise ValueError(
            f"targets must be different classes in 0..{classes - 1}, not "
            f"{', '.join(map(str, targets))}"
        )
    return tuple(sorted(targets))


class Accuracy(NamedTuple):
    """Mean accuracy over sets of target classes.

    Attributes:
      mean: 0..1; every set counts alike.
      low: Lower end of the 95 % interval over test images.
      high: Its upper end.
      images: Different images judged.
      by_set: Accuracy in each set.
    """

    mean: float
    low: float
    high: float
    images: int
    by_set: tuple[float, ...]

    @property
    def percent(self) -> float:
        """The mean in per cent."""
        return 100 * self.mean

    @property
    def percents(self) -> tuple[float, float]:
        """The interval in per cent."""
        return 100 * self.low, 100 * self.high


def accuracy(right: np.ndarray, judged: np.ndarray, labels: np.ndarray) -> Accuracy:
    """Mean accuracy over sets, with an interval over the test images.

    The mean is a sum over images, each adding the share of the sets that judge it and in which it
    is right, divided by the sets' sizes. The variance of the sum is that of these values between
    the images of a class, added up over images and classes; the interval is Wilson's for as many
    images as would give that variance, or for all of them where nothing varies. It is for these
    sets; drawing others is not in it.

    Args:
      right: `[S, N]` bool, right answers in each set.
      judged: `[S, N]` bool, the images that a set judges; at least one in each.
      labels: `[N]` classes of the images.
    """
    each = right & judged
    sizes = judged.sum(1)
    values = (each / sizes[:, None]).mean(0)
    variance = 0.0
    for label in np.unique(labels):
        of_class = values[labels == label]
        # Where nothing varies, rounding leaves a variance that is not 0.
        if len(of_class) > 1 and np.ptp(of_class):
            variance += len(of_class) * float(of_class.var(ddof=1))
    mean, images = min(float(values.sum()), 1.0), int(judged.any(0).sum())
    # Where nothing varies between the images of a class, as many as there are count.
    count = mean * (1 - mean) / variance if variance and 0 < mean < 1 else images
    return Accuracy(mean, *wilson(mean, count), images, tuple((each.sum(1) / sizes).tolist()))


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share among so many, 0..1."""
    extra = _Z**2 / count
    middle = (share + extra / 2) / (1 + extra)
    half = _Z / (1 + extra) * math.sqrt(share * (1 - share) / count + extra / (4 * count))
    # Rounding must not put the share outside.
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)


def packed(right: np.ndarray) -> str:
    """Right answers, `[N]` bool, as hexadecimal digits."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """Right answers, `[count]` bool, from hexadecimal digits.

    Raises:
      ValueError: Unless they are as many.
    """
    found = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(found) != math.ceil(count / 8):
        raise ValueError(f"right answers must be of {count} images, not of {8 * len(found)}")
    return np.unpackbits(found, count=count).astype(bool)
