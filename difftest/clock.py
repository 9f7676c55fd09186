"""The time of steps of which the first of each size compiles programs."""

import time
from collections.abc import Hashable


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
