"""Whether a wrong prediction becomes right once the neurons that deviate are held still."""

from typing import NamedTuple

import numpy as np

from experiments.slice_questions_case import Case, Finding, curve, measured, rectified
from nnslicer_jax import deviation
from nnslicer_jax.batches import filled

_COUNTS = (1, 2, 4, 8, 16, 32)
_SLICED = 64


class Judged(NamedTuple):
    """Images with their slices.

    Attributes:
      images: `[N, H, W, C]`.
      labels: `[N]` true classes.
      predicted: `[N]` the network's classes.
      second: `[N]` the class of the second largest logit.
      contrib: Neuron name to the CONTRIB of its channels, `[N, C]`, for the predicted class.
    """

    images: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    second: np.ndarray
    contrib: dict[str, np.ndarray]

    @property
    def wrong(self) -> np.ndarray:
        """Which predictions are wrong."""
        return self.predicted != self.labels


def repair(case: Case) -> Finding:
    """Holds the neurons that deviate most, and counts predictions repaired and broken.

    Normal are the slices of training images predicted rightly. An image's slice is that of its
    predicted class, compared with what is normal for the predicted class, which needs no label,
    or for the true one. All images are treated alike, right ones too. The number of neurons held
    is chosen on training images that normal did not see, for the most right predictions, and for
    the most repaired ones.
    """
    sizes = case.sizes
    train = _judged(case, case.train_images, case.train_labels, 0, sizes.known)
    right = ~train.wrong
    usual = deviation.normal(
        {name: found[right] for name, found in train.contrib.items()}, train.labels[right],
        case.classes,
    )  # fmt: skip
    end = sizes.known + sizes.chosen
    chosen = _judged(case, case.train_images, case.train_labels, sizes.known, end)
    tested = _judged(case, case.test_images, case.test_labels, 0, sizes.judged)
    wrong = tested.wrong
    row = f"{case.name}, whole network"
    rows = [
        measured(row, "accuracy", ~wrong),
        measured(row, "wrong predictions whose second class is right",
              tested.second[wrong] == tested.labels[wrong]),
    ]  # fmt: skip
    curves = []
    for kind in ("predicted class", "true class", "random neurons"):
        before = {m: _after(case, chosen, usual, kind, m) for m in _COUNTS}
        after = {m: _after(case, tested, usual, kind, m) for m in _COUNTS}
        for aim, of in (("accuracy", np.ones_like(chosen.wrong)), ("repairs", chosen.wrong)):
            # The mean of none is no reason to prefer one.
            gains = [before[m][:, of].mean() if of.any() else 0.0 for m in _COUNTS]
            best = _COUNTS[int(np.argmax(gains))]
            note = f"{best} neurons held, chosen for {aim} on training images"
            row = f"{case.name}, deviation from {kind}, for {aim}"
            if kind == "random neurons":
                row = f"{case.name}, {kind}, for {aim}"
            result = after[best].mean(0)
            rows += [
                measured(row, "wrong predictions repaired", result[wrong], note),
                measured(row, "right predictions broken", 1 - result[~wrong], note),
                measured(row, "accuracy", result, note),
            ]
        broken = {m: 1 - after[m].mean(0)[~wrong] for m in _COUNTS}
        curves.append(curve(f"right ones broken, {kind}", broken))
        if wrong.any():
            repaired = {m: after[m].mean(0)[wrong] for m in _COUNTS}
            curves.append(curve(f"wrong ones repaired, {kind}", repaired))
    return Finding(rows, curves, ("neurons held at their means", "predictions, %"))


def _after(case: Case, judged: Judged, usual: deviation.Normal, kind: str, count: int):
    """Which predictions are right once `count` neurons are held: `[draws, N]` bool."""
    if kind == "random neurons":
        rng = np.random.default_rng(case.seed)
        scores = [
            {name: rng.random(found.shape) for name, found in judged.contrib.items()}
            for _ in range(case.sizes.draws)
        ]
    else:
        labels = judged.predicted if kind == "predicted class" else judged.labels
        scores = [deviation.deviation(judged.contrib, labels, usual)]
    return np.stack([
        deviation.logits_without(
            case.graph, case.params, case.profile, judged.images, deviation.top(some, count), 100
        ).argmax(1)
        == judged.labels
        for some in scores
    ])  # fmt: skip


def _judged(case: Case, images: np.ndarray, labels: np.ndarray, start: int, end: int) -> Judged:
    """Slices some images for their predicted classes; the slices of all would not fit memory."""
    images, labels = images[start:end], labels[start:end]
    order = case.logits(images).argsort(1)
    names = rectified(case.graph)
    parts = []
    for rows in filled(len(images), _SLICED):
        piece = case.slice(images[rows], order[rows, -1], per_sample=True)
        found = piece.channels()
        parts.append({name: found[name][: len(images) - rows[0]] for name in names})
    contrib = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Judged(images, labels, order[:, -1], order[:, -2], contrib)
