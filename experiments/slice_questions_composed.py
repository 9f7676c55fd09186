"""Slices of single classes composed into a model of several."""

import functools
import operator

import numpy as np

import nnslicer_jax as nns
from experiments.slice_questions_case import Case, Finding, curve, kept, measured, shuffled


def composed(case: Case) -> Finding:
    """Runs unions of class slices on test images of their classes.

    Beside the union stand the slice of the images of all these classes together, in which
    contributions for one class and against another cancel, as many synapses as in the union drawn
    at random in each layer, with the same neurons, and the whole network. The class is chosen
    among all.
    """
    rng = np.random.default_rng(case.seed)
    numbers = [k for k in (1, 2, 3, 5, 7, 10) if k < case.classes] + [case.classes]
    images = case.test_images[: case.sizes.tested]
    labels = case.test_labels[: case.sizes.tested]
    rows = []
    found: dict[str, dict[float, list[float]]] = {}
    for number in numbers:
        for subset in _subsets(case, number, rng):
            own = np.isin(labels, subset)
            chosen = [case.class_slices[label] for label in subset]
            union = functools.reduce(nns.Slice.union, chosen)
            # CONTRIB of a set of images is the sum over its images.
            together = functools.reduce(operator.add, chosen)
            pieces = {
                "union of class slices": union,
                "slice of the classes together": together,
                "random synapses": shuffled(union, rng),
                "whole network": None,
            }
            for name, piece in pieces.items():
                right = case.logits(images[own], piece).argmax(1) == labels[own]
                found.setdefault(name, {}).setdefault(number, []).append(float(right.mean()))
            for name, piece in (("union", union), ("together", together)):
                size = found.setdefault(f"size {name}", {})
                size.setdefault(number, []).append(kept(piece))
    for number in numbers:
        row = f"{case.name}, {number} of {case.classes} classes"
        note = "sets of classes"
        if number == 1:
            note += "; the other outputs stand still, so that this says little"
        rows += [
            measured(row, "synapses in the union", found["size union"][number]),
            measured(row, "synapses in the slice together", found["size together"][number]),
        ]
        rows += [
            measured(row, f"accuracy on the classes, {name}", values[number], note)
            for name, values in found.items()
            if not name.startswith("size ")
        ]
    curves = [curve(name, values) for name, values in found.items() if "size" not in name]
    curves.append(curve("synapses in the union", found["size union"]))
    return Finding(rows, curves, ("classes composed", "accuracy on these classes, %"))


def _subsets(case: Case, number: int, rng: np.random.Generator) -> list[list[int]]:
    """Sets of classes, drawn; the one there is where that is all of them."""
    count = 1 if number == case.classes else case.sizes.subsets
    return [sorted(rng.permutation(case.classes)[:number].tolist()) for _ in range(count)]
