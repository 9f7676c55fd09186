"""Options of the searches, each refused in one line that says what it is and what is accepted."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def said(value: Any) -> str:
    """The value in few words on one line."""
    return " ".join(repr(value).split())[:60]


def real(value: Any) -> bool:
    """Whether it is a number."""
    numbers = int | float | np.integer | np.floating
    return isinstance(value, numbers) and not isinstance(value, bool)


def require_one_of(name: str, value: Any, accepted: Iterable[str], none: bool = False) -> None:
    """Raises ValueError for anything but the accepted strings, or None if ``none``."""
    known = tuple(accepted)
    if not (value is None and none) and not (isinstance(value, str) and value in known):
        also = " or None" if none else ""
        raise ValueError(f"{name} is {said(value)}; accepted are {', '.join(known)}{also}")


def require_whole(name: str, value: Any, least: int) -> None:
    """Raises ValueError for anything but a whole number from ``least``."""
    if not real(value) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} is {said(value)}; accepted are whole numbers from {least}")


def require_timeout(value: Any) -> None:
    """Raises ValueError for anything but seconds above 0."""
    if not real(value) or not value > 0:
        raise ValueError(f"timeout is {said(value)}; accepted are seconds above 0")


def require_max_l2(value: Any) -> None:
    """Raises ValueError for anything but a distance above 0, or None."""
    if value is not None and (not real(value) or not value > 0):
        raise ValueError(f"max_l2 is {said(value)}; accepted are distances above 0, or None")
