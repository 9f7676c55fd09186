"""Finished rows of a search kept in a file, so that a search that was ended goes on with them."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np


class Rows(Protocol):
    """What a search fills in, one row a seed; a row that is not finished is "waiting"."""

    @property
    def status(self) -> np.ndarray:
        """``[N]`` strings."""

    @property
    def variant(self) -> str:
        """The name of the search."""

    @property
    def settings(self) -> dict[str, Any]:
        """What else the search was asked for."""

    def take(self, other: Self, places: np.ndarray) -> None:
        """Copies the rows at some places from another search of the same seeds."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file, whole or not at all."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads it."""


R = TypeVar("R", bound=Rows)


class Keeping(Generic[R]):
    """Takes over the rows that a file says are finished, and writes those that become so.

    A ``with`` block writes when it ends, by an exception too, Ctrl-C among them. A kill that leaves
    no time for that costs the rows that became finished since the last write, no longer ago than a
    step of the search and twenty times what writing takes: it stays below a twentieth of the time.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, rows: R, agrees: Callable[[R], bool]
    ) -> None:
        """Reads the file, if there is one.

        Args:
            path: None: nothing is kept.
            rows: those of the search, filled in place.
            agrees: whether the models still answer as rows read say.

        Raises:
            ValueError: the file is damaged, another search's, or of other models.
        """
        self.path = None if path is None else Path(path)
        self.rows, self.next, self.behind = rows, 0.0, False
        if self.path is not None and self.path.exists():
            _take_over(self.path, rows, agrees)

    def __call__(self, finished: bool) -> None:
        """A step of the search is over: writes, or leaves it to a later call.

        Args:
            finished: whether the step finished rows.
        """
        self.behind |= finished
        if self.behind and time.perf_counter() >= self.next:
            self.now()

    def now(self) -> None:
        """Writes."""
        if self.path is not None:
            started = time.perf_counter()
            self.rows.save(self.path)
            ended = time.perf_counter()
            self.next = ended + 20 * (ended - started)
        self.behind = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.now()


def _take_over(path: Path, rows: R, agrees: Callable[[R], bool]) -> None:
    old = rows.load(path)
    mine, theirs = ({"variant": one.variant, **one.settings} for one in (rows, old))
    for name, value in mine.items():
        if json.dumps(theirs.get(name)) != json.dumps(value):
            raise ValueError(
                f"checkpoint {path} is of another search: its {name} is "
                f"{str(theirs.get(name))[:60]}, here it is {str(value)[:60]}"
            )
    if not agrees(old):
        raise ValueError(
            f"checkpoint {path} is of another pair: these models answer its images otherwise"
        )
    rows.take(old, np.flatnonzero(old.status != "waiting"))
