"""Routes under attack (Wang et al., CVPR 2018): where an adversarial image leaves its original's.

Published, as pictures of single images: along depth the correlation of an adversarial image's
gates with its original's falls, and that with 50 images of the class it is taken for rises, in the
last layer above the former. Beside it stands the original's correlation with the same 50 images,
which no attack has moved.

``--schedule cpu`` takes two cores about five minutes: 25 test images a class that the network gets
right, three attacks. ``--schedule published`` takes 100 a class and every attack. The images are
those of `routes_detection`, whose attacks and routes this study shares.

``python -m experiments.routes_adversarial --models resnet10_cifar10,lenet5_mnist``
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import routes_case
from experiments.routes_case import Case, Fields, average, mean_known, noted
from interpret import plots, routes
from nnslicer_jax import attacks

TITLE = "Routes: adversarial drift along depth"
TEXT = (
    "Correlation (Pearson) of the gates of each layer: of an image that fools the network with its "
    "original, and with 50 training images of the class it is taken for, which the network gets "
    "right (mean over them); beside it the original's correlation with those same 50. Test images "
    "that the network gets right, of those the ones that the attack fools it on. With depth: "
    "Spearman's correlation of an image's values with the number of the layer. Intervals are of 95 "
    "%, over images, the 50 taken as given: Wilson's of shares, else normal, of paired differences "
    "where two are compared. A layer whose gates are all equal has no correlation, and such images "
    "are left out there. FGSM takes steps of 64/256 instead of 8/256 on grey images, where the "
    "latter hardly fools the network."
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      per_class: Test images of each class that are attacked.
      attacks: Names of the attacks; "FGSM" with the step that suits the images.
      fewer: Whether attacks take fewer steps than their defaults.
      samples: Training images of each class that are compared with.
    """

    per_class: int = 25
    attacks: tuple[str, ...] = ("FGSM", "RPGD 8", "CW L2")
    fewer: bool = True
    samples: int = 50


SCHEDULES = {
    "cpu": Schedule(),
    "published": Schedule(per_class=100, attacks=("FGSM", *attacks.ATTACKS), fewer=False),
}


class Drift(NamedTuple):
    """Correlations of the images that fool the network, by layer.

    Attributes:
      own: Layer to `[N]`, of an adversarial image with its original.
      target: Layer to `[N, S]`, of it with images of the class it is taken for.
      before: Layer to `[N, S]`, of its original with the same.
    """

    own: Mapping[str, np.ndarray]
    target: Mapping[str, np.ndarray]
    before: Mapping[str, np.ndarray]


def drift(case: Case, schedule: Schedule, name: str) -> Drift:
    """Routes images before and after an attack, and compares them."""
    some = routes_case.drawn(case, schedule.per_class, right=True)
    moved = routes_case.attacked(case, name, some, routes_case.steps(name, schedule.fewer))
    fooled = np.flatnonzero(moved.predicted != moved.labels)
    before, after = (routes_case.routed(case, part.images).take(fooled) for part in (some, moved))
    known = routes_case.drawn(case, schedule.samples, split="train", right=True)
    samples = routes_case.routed(case, known.images)
    # Samples lie class by class; of a class that has none there is no correlation.
    taken = moved.predicted[fooled]
    place = np.searchsorted(known.labels, taken)
    there = np.isin(taken, known.labels)
    columns = np.where(there, place, 0)[:, None] + np.arange(schedule.samples)
    target, unmoved = (
        {
            layer: np.where(there[:, None], np.take_along_axis(values, columns, 1), np.nan)
            for layer, values in routes.cross_correlation(part, samples).items()
        }
        for part in (after, before)
    )
    return Drift(routes.correlation(after, before), target, unmoved)


def run(case: Case, schedule: Schedule, figures: Path) -> list[Fields]:
    """Measures every attack and draws it; the fields of the rows."""
    rows: list[Fields] = []
    for name in dict.fromkeys(case.fgsm if n == "FGSM" else n for n in schedule.attacks):
        found = drift(case, schedule, name)
        rows += attack_rows(case, name, found)
        if len(next(iter(found.own.values()))):
            drawn = plots.drift(found.own, found.target, title=f"{case.title}, {name}")
            slug = name.lower().replace(" ", "_")
            plots.save(drawn, figures / f"{case.slug}_{slug}.png")
    return rows


def attack_rows(case: Case, name: str, found: Drift) -> list[Fields]:
    """Correlations in each layer, and how they change from the first to the last."""
    title = f"{case.title}, {name}"
    layers = list(found.own)
    means = {
        "with its original": dict(found.own),
        "with the class it is taken for": {k: mean_known(v) for k, v in found.target.items()},
        "of the original with that class": {k: mean_known(v) for k, v in found.before.items()},
    }
    own, target, before = means.values()
    rows: list[Fields] = []
    for said, values in means.items():
        for layer, short in zip(layers, plots.short(layers), strict=True):
            rows.append(
                {"row": f"{title}, {short}", "metric": f"correlation {said}",
                 **average(values[layer])}
            )  # fmt: skip
    first, last = layers[0], layers[-1]
    changes = {
        "with its original": (own[last] - own[first], "below 0"),
        "with the class it is taken for": (target[last] - target[first], "above 0"),
        "with that class, beyond the original's":
            ((target[last] - before[last]) - (target[first] - before[first]), None),
    }  # fmt: skip
    for said, (values, published) in changes.items():
        rows.append(
            {"row": f"{title}, last layer beyond the first", "metric": f"correlation {said}",
             "published": published, **average(values)}
        )  # fmt: skip
    for said, parts, published in (
        ("with its original", own, "below 0"),
        ("with the class it is taken for", target, "above 0"),
    ):
        rows.append(
            {"row": f"{title}, correlation {said}, with depth", "metric": "rank correlation",
             "published": published, **average(routes_case.depth(parts))}
        )  # fmt: skip
    known = np.isfinite(own[last]) & np.isfinite(target[last])
    least = np.where(np.isnan(found.target[last]), np.inf, found.target[last]).min(1)
    nearer = {
        "mean correlation with the class above that with the original": target[last],
        "least correlation with the class above that with the original": least,
    }
    for said, values in nearer.items():
        fields = average((values > own[last])[known], 100, "%")
        rows.append(
            {"row": f"{title}, last layer", "metric": f"images: {said}",
             **noted(fields, "the talk shows such images" if "least" in said else "")}
        )  # fmt: skip
    return rows


STUDY = routes_case.Study(
    "routes_adversarial", TITLE, TEXT, SCHEDULES, run, ("published", "convolutions")
)


if __name__ == "__main__":
    routes_case.command(STUDY)
