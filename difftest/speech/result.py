"""What a search of audio found, one row a sentence, in memory and in one file."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnslicer_jax.atomic import replacing

_ARRAYS = ("status", "queries", "seconds", "audio", "lengths", "heard")


@dataclass(frozen=True, eq=False)
class SpeechResult:
    """One row a sentence.

    Attributes:
        status: ``[N]`` strings: "found"; "disagrees", the models already disagreed, which enters no
            average; "budget", queries or time were spent; "error", a model failed; "waiting", in
            the checkpoint of a search that is not over. Written last: a row that no longer waits is
            whole.
        queries: int32 ``[N]``, sentences through both models; the trigger counts, the seed does
            not.
        seconds: float64 ``[N]``, the share of the time of the batches it was in.
        audio: int16 ``[N, S]``, the trigger, or the seed where none was found.
        lengths: int32 ``[N]``, samples.
        heard: int32 ``[2, N, T]``, the models' transcripts of it, filled up with -1.
        chains: one tuple a sentence, what ``replay`` makes the trigger of again.
        errors: one line a sentence, or None.
        variant: the name of the search.
        settings: what else it was asked for, with the data of its key.
    """

    status: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray
    audio: np.ndarray
    lengths: np.ndarray
    heard: np.ndarray
    chains: list[tuple[tuple, ...]]
    errors: list[str | None]
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def success(self) -> np.ndarray:
        """Bool ``[N]``: a trigger was found."""
        return self.status == "found"

    def take(self, other: "SpeechResult", places: np.ndarray) -> None:
        """Copies the rows at some places, int ``[n]``, from another search of the sentences."""
        for name in _ARRAYS:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "heard":
                mine[:, places] = theirs[:, places]
            else:
                mine[places] = theirs[places]
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
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        # Of a search that is not over, a file is written often.
        write = np.savez if "waiting" in self.status else np.savez_compressed
        with replacing(path) as partial, partial.open("wb") as file:
            write(file, words=np.array(words), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SpeechResult":
        """Reads what ``save`` wrote.

        Raises:
            ValueError: the file is missing, damaged or holds something else.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _ARRAYS}
                words = json.loads(str(file["words"]))
            chains = [
                tuple((str(name), *map(int, how)) for name, *how in chain)
                for chain in words["chains"]
            ]
            # Files of earlier versions say neither variant nor settings.
            names = {name: words[name] for name in ("variant", "settings") if name in words}
            return cls(chains=chains, errors=words["errors"], **names, **arrays)
        except Exception as error:  # NumPy raises many types for a damaged file.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not a saved search of audio ({reason})") from None
