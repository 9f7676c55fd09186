"""Static slices, of the weights alone, and conditioned ones, of a stated set, beside dynamic."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

import nnslicer_jax as nns
from experiments.slice_questions_case import Case, Finding, curve, kept, measured, shuffled

_THETAS = (0.0, 0.1, 0.2, 0.3, 0.5)


def static(case: Case) -> Finding:
    """Compares slices of one class: from weights, from a stated set of images, from one image.

    A conditioned slice is `slice_network` over the images that meet the condition: all of a
    class, or its brighter half, or the other.
    """
    sizes, rng = case.sizes, np.random.default_rng(case.seed)
    classes = range(case.classes)
    still = [_static(case, label, case.theta) for label in classes]
    stated = case.class_slices
    bright = [case.conditioned(label, _is_bright) for label in classes]
    dark = [case.conditioned(label, lambda x: ~_is_bright(x)) for label in classes]
    images, labels = case.test_images[: sizes.single], case.predicted[: sizes.single]
    single = [case.slice(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
    pairs = {
        "static and conditioned on the class": zip(still, stated, strict=True),
        "static and dynamic of one image": zip([still[k] for k in labels], single, strict=True),
        "conditioned and dynamic of one image": zip(
            [stated[k] for k in labels], single, strict=True
        ),
        "conditioned on the bright and on the dark half of a class": zip(bright, dark, strict=True),
        "static of two classes": itertools.combinations(still, 2),
        "conditioned on two classes": itertools.combinations(stated, 2),
        "dynamic of two images of one class": [
            (single[i], single[j]) for i, j in _pairs(rng, labels, alike=True)
        ],
        "dynamic of two images of two classes": [
            (single[i], single[j]) for i, j in _pairs(rng, labels, alike=False)
        ],
    }
    rows = [
        measured(case.name, f"Jaccard similarity, {name}", [a.similarity(b) for a, b in both])
        for name, both in pairs.items()
    ]
    kinds = {"static": still, "conditioned": stated, "dynamic": single}
    rows += [
        measured(case.name, f"synapses in a slice, {kind}", [kept(piece) for piece in pieces])
        for kind, pieces in kinds.items()
    ]
    union = functools.partial(functools.reduce, nns.Slice.union)
    own = [
        bool(case.logits(image[None], piece).argmax() == label)
        for image, label, piece in zip(images, labels, single, strict=True)
    ]
    rows.append(measured(case.name, "agreement, one image under its own dynamic slice", own))
    wholes = {
        "union of static": (union(still), []), "union of conditioned": (union(stated), []),
        "union of dynamic": (union(single), single),
    }  # fmt: skip
    for name, (piece, parts) in wholes.items():
        rows += _agreement(case, name, piece, rng, parts)
    sizes_by = {t: [kept(_static(case, k, t)) for k in classes] for t in _THETAS}
    agreeing = {t: _same(case, union([_static(case, k, t) for k in classes])) for t in _THETAS}
    sliced = {t: _conditioned(case, t) for t in _THETAS}
    curves = [
        curve("size, static, one class", sizes_by),
        curve("agreement, static, all classes", agreeing),
        curve("size, conditioned, one class", {t: list(map(kept, p)) for t, p in sliced.items()}),
        curve(
            "agreement, conditioned, all classes",
            {t: _same(case, union(p)) for t, p in sliced.items()},
        ),
    ]
    return Finding(rows, curves, ("theta", "%"))


def _is_bright(images: np.ndarray) -> np.ndarray:
    """Which images are brighter than half of them."""
    level = images.mean((1, 2, 3))
    return level > np.median(level)


def _pairs(rng: np.random.Generator, labels: np.ndarray, *, alike: bool) -> np.ndarray:
    """Pairs of images of one class or of two, drawn: at most four times as many as images."""
    first, second = np.triu_indices(len(labels), 1)
    found = np.flatnonzero((labels[first] == labels[second]) == alike)
    drawn = rng.permutation(found)[: 4 * len(labels)]
    return np.stack([first[drawn], second[drawn]], 1)


def _without(parts: Sequence[nns.Slice]) -> Iterator[nns.Slice]:
    """For each of some slices the union of the others, as a slice of 0 and 1."""

    def inside(kind: str) -> dict[str, np.ndarray]:
        found = [getattr(part, kind) for part in parts]
        return {
            key: sum((one[key] != 0 for one in found), np.zeros(first.shape, np.int32))
            for key, first in found[0].items()
        }

    synapses, neurons = inside("synapses"), inside("neurons")
    for part in parts:
        yield dataclasses.replace(
            part,
            synapses={
                k: (synapses[k] > (v != 0)).astype(np.int32) for k, v in part.synapses.items()
            },
            neurons={k: (neurons[k] > (v != 0)).astype(np.int32) for k, v in part.neurons.items()},
        )


def _static(case: Case, label: int, theta: float) -> nns.Slice:
    return nns.static_slice(case.graph, case.params, [label], theta)


def _conditioned(case: Case, theta: float) -> list[nns.Slice]:
    """Slices of the classes, over fewer images than the table's."""
    count = max(1, case.sizes.of_class // 5)
    found = []
    for label in range(case.classes):
        images = case.train_images[case.train_labels == label][:count]
        found.append(case.slice(images, np.full(len(images), label), theta=theta))
    return found


def _same(case: Case, piece: nns.Slice) -> np.ndarray:
    """Whether the network cut down to a slice predicts what the whole one does, `[N]` bool."""
    count = case.sizes.tested
    found = case.logits(case.test_images[:count], piece).argmax(1)
    return found == case.predicted[:count]


def _agreement(
    case: Case, name: str, piece: nns.Slice, rng: np.random.Generator, parts: Sequence[nns.Slice]
) -> list[dict]:
    """What a union of slices does; `parts` are those of the first test images in it, if any.

    Such an image is judged by the union of the others: its own slice holds what it needs.
    """
    same = _same(case, piece)
    for i, others in zip(range(len(same)), _without(parts) if parts else (), strict=False):
        same[i] = case.logits(case.test_images[i : i + 1], others).argmax() == case.predicted[i]
    note = "an image's own slice left out of the union" if parts else ""
    drawn = [_same(case, shuffled(piece, rng)).mean() for _ in range(case.sizes.draws)]
    row = f"{case.name}, {name} slices of all classes"
    return [
        measured(row, "synapses in it", [kept(piece)]),
        measured(row, "agreement as a model", same, note),
        measured(row, "agreement, random synapses", drawn, "draws"),
    ]
