"""How faithful explanations by channels are: slices, effective paths, routes, beside baselines.

Every explanation scores the same channels of the same images: NNSlicer's slices and EffectivePath
for the predicted class (|CONTRIB|), routes (gates), integrated gradients, mean |activation|, and
chance. The best-scored share of each layer is deleted, or alone kept, and the probability of the
predicted class is measured over the share. Nobody has published this comparison; nothing stands
beside it. The explanations are also compared with each other.

``--schedule cpu`` takes two cores about five minutes: 30 test images a class. ``--schedule
published`` takes 100.

``python -m experiments.faithfulness --models resnet10_cifar10,lenet5_mnist``
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

import nnslicer_jax as nns
from experiments import routes_case
from experiments.routes_case import Case, Fields, Images, average, mean_known, noted
from interpret import faithfulness, plots, routes

TITLE = "Faithfulness of explanations by channels"
TEXT = (
    "Area under the curve of the predicted class's probability, over the share of each layer's "
    "channels that is deleted (the best-scored first; smaller is more faithful) or that alone is "
    "kept (larger is more faithful). Missing channels are 0, or held at their mean over training "
    "images. Channels are those that routes gate; integrated gradients are the predicted logit's, "
    "for each layer's gates on their own. Likeness of two explanations in a layer: Spearman's "
    "correlation of their scores, and Jaccard similarity of the channels that the second keeps "
    "(CONTRIB not 0; gates above 0.5) and as many of the best of the first, beside what chance "
    "gives; mean over layers. |CONTRIB| of a channel adds up over its positions. "
    "Spreads are normal 95 % intervals over images, of paired differences where two are compared. "
    "Nothing is published to compare with."
)
SLICES, PATHS, ROUTES = "NNSlicer", "EffectivePath", "routes"
GRADIENTS, ACTIVATIONS, CHANCE = "integrated gradients", "activations", "chance"
# First the explanation that is ranked, then the one whose kept channels count.
_PAIRS = (
    (ROUTES, SLICES), (ROUTES, PATHS), (SLICES, PATHS), (GRADIENTS, SLICES), (ACTIVATIONS, SLICES),
    (GRADIENTS, ROUTES), (ACTIVATIONS, ROUTES),
)  # fmt: skip
_BATCH = 32
_GRADIENTS = 64


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      per_class: Test images of each class.
      profiled: Training images of each class that means are over.
      steps: Of integrated gradients.
      shares: Points of the curves, from 0 to 1.
      theta: Size of the slices.
    """

    per_class: int = 30
    profiled: int = 100
    steps: int = 32
    shares: int = 21
    theta: float = 0.2


SCHEDULES = {"cpu": Schedule(), "published": Schedule(per_class=100, profiled=500)}


def explanations(
    case: Case, schedule: Schedule, some: Images, profile: nns.Profile
) -> dict[str, dict[str, np.ndarray]]:
    """Explanation to scores of the gated channels, layer to `[N, C]`."""
    graph, params, names = case.graph, case.params, list(case.layers)
    size = min(_BATCH, nns.estimate(graph, schedule.theta).batch_size)

    def contributions(make: Callable[[np.ndarray, np.ndarray], nns.Slice]) -> dict:
        # A slice of one image is as large as the network: few at a time.
        parts = [
            faithfulness.of_slice(
                make(some.images[at : at + size], some.predicted[at : at + size]), names
            )
            for at in range(0, len(some.labels), size)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    return {
        SLICES: contributions(
            lambda images, outputs: nns.slice_network(
                graph, params, profile, images, outputs, theta=schedule.theta, per_sample=True,
                batch_size=size,
            )
        ),
        PATHS: contributions(
            lambda images, outputs: nns.effective_path(
                graph, params, images, outputs, per_sample=True, batch_size=size
            )
        ),
        ROUTES: faithfulness.of_routes(routes_case.routed(case, some.images)),
        GRADIENTS: faithfulness.of_integrated_gradients(
            graph, params, some.images, case.layers, schedule.steps,
            min(_GRADIENTS, case.batch_differentiated),
        ),
        ACTIVATIONS: faithfulness.of_activations(graph, params, some.images, names, case.batch),
        CHANCE: faithfulness.of_chance(case.seed, len(some.labels), case.layers),
    }  # fmt: skip


def run(case: Case, schedule: Schedule, figures: Path) -> list[Fields]:
    """Scores, deletes, inserts and compares; the fields of the rows."""
    some = routes_case.drawn(case, schedule.per_class)
    known = routes_case.drawn(case, schedule.profiled, split="train")
    profile = nns.profile(case.graph, case.params, known.images, batch_size=case.batch)
    scores = explanations(case, schedule, some, profile)
    shares = np.linspace(0, 1, schedule.shares).tolist()
    fills: dict[str, Mapping[str, np.ndarray] | None] = {
        "channels set to 0": None, "channels held at their mean": means(case, profile)
    }  # fmt: skip
    rows: list[Fields] = []
    for said, fill in fills.items():
        found = {
            name: faithfulness.curves(
                case.seed, case.graph, case.params, some.images, score, shares, fill=fill,
                batch_size=case.batch,
            )
            for name, score in scores.items()
        }  # fmt: skip
        rows += area_rows(case, said, found)
        slug = "zero" if fill is None else "mean"
        plots.save(plots.faithfulness(found), figures / f"{case.slug}_{slug}.png")
    return rows + likeness_rows(case, scores)


def means(case: Case, profile: nns.Profile) -> dict[str, np.ndarray]:
    """Mean of each gated channel, in a shape that fills its activation."""
    neurons = case.graph.neurons()
    return {
        name: profile.means[name].reshape([
            -1 if axis == neurons[name].channel else 1 for axis in range(len(neurons[name].shape))
        ])
        for name in case.layers
    }  # fmt: skip


def area_rows(case: Case, said: str, found: Mapping[str, faithfulness.Curves]) -> list[Fields]:
    """Areas of every explanation, and how far each is from chance and from routes."""
    rows: list[Fields] = []
    for at, metric in enumerate(("area under deletion", "area under insertion")):
        for name, curves in found.items():
            rows.append(
                {"row": f"{case.title}, {name}, {said}", "metric": metric,
                 **average(curves.areas[at])}
            )  # fmt: skip
        better = ("below", "above")[at]
        for other in (SLICES, PATHS, GRADIENTS, ACTIVATIONS, CHANCE):
            apart = found[ROUTES].areas[at] - found[other].areas[at]
            rows.append(
                {"row": f"{case.title}, {ROUTES} beyond {other}, {said}", "metric": metric,
                 **noted(average(apart), f"{better} 0: routes are more faithful")}
            )  # fmt: skip
    return rows


def likeness_rows(case: Case, scores: Mapping[str, Mapping[str, np.ndarray]]) -> list[Fields]:
    """How alike the explanations are."""
    whole = {
        name: np.concatenate([score[layer] for layer in case.layers], 1)
        for name, score in scores.items()
    }
    rows: list[Fields] = []
    for first, second in _PAIRS:
        kept = routes.critical(whole[second], 0.5 if second == ROUTES else 0)
        found = routes.similarity(case.seed, whole[first], whole[second], case.layers, kept)
        for metric, values in (
            ("rank correlation of scores", found.ranks),
            ("Jaccard similarity", found.overlap),
            ("Jaccard similarity by chance", found.chance),
        ):
            rows.append(
                {"row": f"{case.title}, {first} and {second}", "metric": metric,
                 **average(mean_known(np.stack(list(values.values()), 1)))}
            )  # fmt: skip
    return rows


STUDY = routes_case.Study("faithfulness", TITLE, TEXT, SCHEDULES, run)


if __name__ == "__main__":
    routes_case.command(STUDY)
