"""The time of steps of which the first of each size compiles programs."""

import time
from collections.abc import Hashable

import numpy as np


class Clock:
    """Times steps; the first of each size, in which something may be compiled, counts as none."""

    def __init__(self) -> None:
        self._sizes: set[Hashable] = set()
        self._started = 0.0

    def start(self) -> None:
        """A step begins."""
        self._started = time.perf_counter()

    def seconds(self, size: Hashable) -> float:
        """What the step took that ends now, 0 if none of this size came before."""
        if size not in self._sizes:
            self._sizes.add(size)
            return 0.0
        return time.perf_counter() - self._started


def shares(took: float, failed: np.ndarray) -> np.ndarray:
    """Each seed's share of a step's seconds, float64 ``[B]``.

    A model's crash or hang, and the asking one by one after it, is the time of the seeds that
    failed: it costs the others nothing of theirs.

    Args:
        took: seconds of the step.
        failed: bool ``[B]``, whose images broke a model.
    """
    blamed = failed if failed.any() else np.ones_like(failed)
    return took * blamed / blamed.sum()
