"""What a search of audio found, one row a sentence, in memory and in one file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nnslicer_jax.atomic import replacing

_ARRAYS = ("status", "queries", "seconds", "audio", "lengths", "heard")


@dataclass(frozen=True, eq=False)
class SpeechResult:
    """One row a sentence.

    Attributes:
        status: ``[N]`` strings: "found"; "disagrees", the models already disagreed, which enters no
            average; "budget", queries or time were spent; "error", a model failed.
        queries: int32 ``[N]``, sentences through both models; the trigger counts, the seed does
            not.
        seconds: float64 ``[N]``, the share of the time of the batches it was in.
        audio: int16 ``[N, S]``, the trigger, or the seed where none was found.
        lengths: int32 ``[N]``, samples.
        heard: int32 ``[2, N, T]``, the models' transcripts of it, filled up with -1.
        chains: one tuple a sentence of the steps that make the trigger: operator, query.
        errors: one line a sentence, or None.
    """

    status: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray
    audio: np.ndarray
    lengths: np.ndarray
    heard: np.ndarray
    chains: list[tuple[tuple[str, int], ...]]
    errors: list[str | None]

    @property
    def success(self) -> np.ndarray:
        """Bool ``[N]``: a trigger was found."""
        return self.status == "found"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one ``.npz`` file, whole or not at all."""
        words = json.dumps({"chains": self.chains, "errors": self.errors})
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, words=np.array(words), **arrays)

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
                tuple((str(name), int(query)) for name, query in chain) for chain in words["chains"]
            ]
            return cls(chains=chains, errors=words["errors"], **arrays)
        except Exception as error:  # NumPy raises many types for a damaged file.
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path}: not a saved search of audio ({reason})") from None
