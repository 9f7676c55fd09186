"""What a search found, one row a seed, in memory and in one file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnslicer_jax.atomic import replacing

STATUSES = ("found", "disagrees", "budget", "error", "waiting")
_ARRAYS = (
    "status",
    "queries",
    "seconds",
    "triggers",
    "outputs_original",
    "outputs_compressed",
    "seed_labels",
    "keeps_label",
    "l2",
)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """One row a seed; N seeds ``[H, W, C]``, K classes.

    Attributes:
        status: ``[N]`` strings: "found"; "disagrees", the pair already disagreed on the seed,
            which enters no average; "budget", queries or time were spent; "error"; "waiting", in
            the checkpoint of a search that is not over.
        queries: int32 ``[N]``, images through both models; the trigger counts, the seed does not.
        seconds: float64 ``[N]``, the seed's share of the time of the batches it was in.
        triggers: uint8 ``[N, H, W, C]``; the seed itself where none was found.
        chains: one tuple a seed, what ``replay`` makes the trigger of again.
        errors: one line a seed, or None.
        outputs_original, outputs_compressed: float32 ``[N, K]`` at the trigger (or the seed).
        seed_labels: int32 ``[N]``, the original model's label of the seed.
        keeps_label: bool ``[N]``, whether the original model gives the trigger that label too.
        l2: float32 ``[N]``, distance of the trigger from its seed on the 0-1 scale.
        variant: the name of the search.
        settings: what else it was asked for, with the data of its key; ``replay`` reads it.

    A row's status is written last: whatever interrupts a search, a row that no longer waits is
    whole.
    """

    status: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray
    triggers: np.ndarray
    chains: list[tuple]
    errors: list[str | None]
    outputs_original: np.ndarray
    outputs_compressed: np.ndarray
    seed_labels: np.ndarray
    keeps_label: np.ndarray
    l2: np.ndarray
    variant: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> np.ndarray:
        """Bool ``[N]``: a trigger was found."""
        return self.status == "found"

    @property
    def searched(self) -> np.ndarray:
        """Bool ``[N]``: the seeds that the success rate is of, all but those that disagreed."""
        return ~np.isin(self.status, ("disagrees", "waiting"))

    def take(self, other: "SearchResult", places: np.ndarray) -> None:
        """Copies the rows at some places, int ``[n]``, from another search of the same seeds."""
        for name in _ARRAYS:
            getattr(self, name)[places] = getattr(other, name)[places]
        for place in places.tolist():
            self.chains[place], self.errors[place] = other.chains[place], other.errors[place]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one ``.npz`` file, whole or not at all."""
        words = json.dumps(
            {
                "chains": self.chains,
                "errors": self.errors,
                "variant": self.variant,
                "settings": self.settings,
            }
        )
        with replacing(path) as partial, partial.open("wb") as file:
            arrays = {name: getattr(self, name) for name in _ARRAYS}
            np.savez(file, words=np.array(words), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SearchResult":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is missing, damaged or holds something else.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                words = json.loads(str(file["words"]))
            chains = [_tuples(chain) for chain in words["chains"]]
            names = ("errors", "variant", "settings")
            return cls(chains=chains, **{name: words[name] for name in names}, **arrays)
        except Exception as error:  # NumPy raises many types for a damaged file.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not a saved search result ({reason})") from None


def _tuples(value: object) -> tuple:
    return tuple(_tuples(item) if isinstance(item, list) else item for item in value)  # type: ignore[attr-defined]


def empty(
    seeds: np.ndarray, classes: int, variant: str, settings: dict[str, Any] | None = None
) -> SearchResult:
    """Rows to be filled in place: no seed searched yet, each its own trigger."""
    count = len(seeds)
    return SearchResult(
        status=np.full(count, "waiting", dtype="<U9"),
        queries=np.zeros(count, np.int32),
        seconds=np.zeros(count),
        triggers=seeds.copy(),
        chains=[()] * count,
        errors=[None] * count,
        outputs_original=np.zeros((count, classes), np.float32),
        outputs_compressed=np.zeros((count, classes), np.float32),
        seed_labels=np.full(count, -1, np.int32),
        keeps_label=np.zeros(count, bool),
        l2=np.zeros(count, np.float32),
        variant=variant,
        settings=settings or {},
    )


def distance(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """L2 distances on the 0-1 scale, float32 ``[N]``, of uint8 images ``[N, H, W, C]``."""
    apart = images.astype(np.float64) - others
    return (np.sqrt((apart**2).sum(axis=(1, 2, 3))) / 255).astype(np.float32)


def finish(
    rows: SearchResult,
    seeds: np.ndarray,
    places: np.ndarray,
    triggers: np.ndarray,
    outputs: tuple[np.ndarray, np.ndarray],
) -> None:
    """Fills in what follows from the triggers found for the seeds at ``places``, int ``[n]``.

    Args:
        rows: filled in place; queries, seconds and chains are there already.
        seeds: uint8 ``[N, H, W, C]``.
        places: which seeds.
        triggers: uint8 ``[n, H, W, C]``.
        outputs: probabilities ``[n, K]`` of the two models at the triggers.
    """
    rows.triggers[places] = triggers
    rows.outputs_original[places], rows.outputs_compressed[places] = outputs
    rows.keeps_label[places] = outputs[0].argmax(axis=1) == rows.seed_labels[places]
    rows.l2[places] = distance(triggers, seeds[places])
    rows.status[places] = "found"
