"""Asking a pair about the images of a saved result anew."""

from collections.abc import Iterator

import numpy as np

from difftest.ask import ask
from difftest.pair import ModelPair
from difftest.result import SearchResult

# Between answers to one image in two batches.
_ROUNDING = 0.01


def confirm(pair: ModelPair, result: SearchResult, batch_size: int = 128) -> np.ndarray:
    """Asks the pair about the saved triggers: bool ``[N]``, whether each still is one.

    Of a search that keeps the label, the original model must give it too.
    """
    good = np.zeros(len(result.triggers), bool)
    for some, original, compressed in _answers(pair, result, result.success, batch_size):
        labels = original.argmax(axis=1)
        good[some] = labels != compressed.argmax(axis=1)
        if result.settings.get("keep_label"):
            good[some] &= labels == result.seed_labels[some]
    return good


def same_answers(pair: ModelPair, result: SearchResult, batch_size: int = 128) -> bool:
    """Whether the pair answers the saved images as the result says, but for rounding.

    The middle one of all rows decides: a network of 8 bits may round a few of them otherwise in
    another batch.
    """
    done = ~np.isin(result.status, ("waiting", "error"))
    apart = [
        np.maximum(
            np.abs(original - result.outputs_original[some]).max(axis=1),
            np.abs(compressed - result.outputs_compressed[some]).max(axis=1),
        )
        for some, original, compressed in _answers(pair, result, done, batch_size)
    ]
    return not apart or float(np.median(np.concatenate(apart))) <= _ROUNDING


def _answers(
    pair: ModelPair, result: SearchResult, rows: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Places among the rows that are answered, and both models' answers there, ``[n, K]``."""
    places = np.flatnonzero(rows)
    for start in range(0, len(places), batch_size):
        some = places[start : start + batch_size]
        original, compressed, errors = ask(
            pair, result.triggers[some], result.outputs_original.shape[1]
        )
        answered = np.array([error is None for error in errors])
        yield some[answered], original[answered], compressed[answered]
