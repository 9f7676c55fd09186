"""What routes mean (Wang et al., CVPR 2018): classes within layers, and odd images within classes.

Published for 50,000 validation images of ImageNet, as pictures: classes lie further apart in the
gates of deeper layers (t-SNE), images of a class that look alike have routes that merge early, and
odd images of a class stand apart. Here each has a number too, and beside the gates stands what
needs no routing: the mean activation of each gated channel.

``--schedule cpu`` takes two cores about five minutes: 100 test images a class. ``--schedule
published`` takes 500, as t-SNE and silhouettes grow with the square of their number.

``python -m experiments.routes_semantics --models resnet10_cifar10,lenet5_mnist``
"""

import dataclasses
from pathlib import Path

import numpy as np
from sklearn.metrics import adjusted_rand_score

from experiments import routes_case
from experiments.routes_case import Case, Fields, Images, average, noted
from interpret import cdrp, faithfulness, plots, routes

TITLE = "Routes: what they mean within layers and classes"
TEXT = (
    "Separability of the classes in each layer's gates, on test images: accuracy of the 5 nearest "
    "other images (leave-one-out) and silhouette, from the gates themselves rather than from their "
    "embedding in the plane. Beside them the mean activation of each gated channel, which needs no "
    "routing. Whole routes: agreement of clusters (Ward) with the classes as the adjusted Rand "
    "index, mean and normal 95 % interval over groups of images; and how well the distance from a "
    "class's other routes tells images that the network gets wrong, as AUC with a bootstrapped 95 "
    "% interval. Other spreads are normal 95 % intervals over images."
)
GATES, ACTIVATIONS = "gates", "mean activations"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      per_class: Test images of each class.
      neighbours: That vote on an image's class.
      group: Images of each class that are clustered at once.
      members: Images in a dendrogram, all of one class.
      pictured: Classes that a dendrogram is drawn of.
    """

    per_class: int = 100
    neighbours: int = 5
    group: int = 20
    members: int = 30
    pictured: int = 3

    def __post_init__(self) -> None:
        if not 1 < self.group <= self.per_class or not 1 < self.members <= self.per_class:
            raise ValueError(
                f"group and members must be 2..{self.per_class}, the images of a class, not "
                f"{self.group} and {self.members}"
            )


SCHEDULES = {"cpu": Schedule(), "published": Schedule(per_class=500, group=50, members=50)}


def run(case: Case, schedule: Schedule, figures: Path) -> list[Fields]:
    """Measures, clusters and draws; the fields of the rows."""
    some = routes_case.drawn(case, schedule.per_class)
    found = routes_case.routed(case, some.images)
    active = faithfulness.of_activations(case.graph, case.params, some.images, list(case.layers))
    sources = {
        GATES: {name: found.layer(name) for name in case.layers},
        ACTIVATIONS: active,
    }
    rows: list[Fields] = []
    for source, values in sources.items():
        rows += layer_rows(case, schedule, some, source, values)
        whole = np.concatenate(list(values.values()), 1)
        rows += [
            cluster_row(case, schedule, some, source, whole),
            outlier_row(case, some, source, whole),
        ]
    draw(case, schedule, some, found, figures)
    return rows


def layer_rows(
    case: Case, schedule: Schedule, some: Images, source: str, values: dict[str, np.ndarray]
) -> list[Fields]:
    """Separability in each layer, and how much the last is above the first."""
    short = dict(zip(values, plots.short(list(values)), strict=True))
    rows: list[Fields] = []
    known = {
        name: routes.separable(found, some.labels, schedule.neighbours)
        for name, found in values.items()
    }
    first, last = list(values)[0], list(values)[-1]
    for at, metric in enumerate(("k-NN accuracy", "silhouette")):
        for name, measured in known.items():
            rows.append(
                {"row": f"{case.title}, {source} of {short[name]}", "metric": metric,
                 **average(measured[at])}
            )  # fmt: skip
        change = known[last][at].astype(float) - known[first][at]
        rows.append(
            {"row": f"{case.title}, {source}, last layer beyond the first", "metric": metric,
             "published": "above 0" if source == GATES else None, **average(change)}
        )  # fmt: skip
    return rows


def cluster_row(
    case: Case, schedule: Schedule, some: Images, source: str, whole: np.ndarray
) -> Fields:
    """Agreement of clusters with classes, over disjoint groups of images."""
    classes = len(case.dataset.classes)
    rank = np.arange(len(some.labels)) % schedule.per_class
    scores = []
    for start in range(0, schedule.per_class - schedule.group + 1, schedule.group):
        here = np.flatnonzero((rank >= start) & (rank < start + schedule.group))
        parts = routes.cluster(whole[here], "ward").parts(classes)
        scores.append(adjusted_rand_score(some.labels[here], parts))
    return {
        "row": f"{case.title}, {source} of all layers, {classes} clusters",
        "metric": "adjusted Rand index with the classes",
        **noted(average(scores), f"groups of {schedule.group} images a class"),
    }


def outlier_row(case: Case, some: Images, source: str, whole: np.ndarray) -> Fields:
    """How well being far from the rest of one's class tells wrong predictions."""
    odd = routes.outliers(_rows(whole), some.labels)
    wrong = some.predicted != some.labels
    fields = routes_case.auc(case.seed, odd[~wrong], odd[wrong], paired=False)
    return {
        "row": f"{case.title}, {source} of all layers, distance from the class's others",
        "metric": "AUC against images predicted wrongly", **fields,
    }  # fmt: skip


def _rows(values: np.ndarray) -> cdrp.Routes:
    """Any rows, one an image, in the form of routes."""
    none = np.zeros(len(values), np.int32)
    return cdrp.Routes(
        values, {"all": slice(0, values.shape[1])}, none, none.astype(np.float32), none, none
    )


def draw(case: Case, schedule: Schedule, some: Images, found: cdrp.Routes, figures: Path) -> None:
    """The pictures: planes and separability, a dendrogram of some classes, one route."""
    planes = {name: routes.embedding(case.seed, found.layer(name)) for name in case.layers}
    numbers = {
        name: routes.separability(found.layer(name), some.labels, schedule.neighbours)
        for name in case.layers
    }
    classes = case.dataset.classes
    plots.save(
        plots.embeddings(planes, some.labels, numbers, classes), figures / f"{case.slug}_tsne.png"
    )
    plots.save(plots.separability(numbers), figures / f"{case.slug}_separability.png")
    plots.save(plots.path(found.gates[0], case.layers), figures / f"{case.slug}_route.png")
    for label in range(min(schedule.pictured, len(classes))):
        here = np.flatnonzero(some.labels == label)[: schedule.members]
        members = found.take(here)
        odd = routes.outliers(members, some.labels[here])
        drawn = plots.dendrogram(
            routes.cluster(members.gates), some.images[here], np.argsort(-odd)[:3].tolist()
        )
        plots.save(drawn, figures / f"{case.slug}_class_{label}.png")


STUDY = routes_case.Study("routes_semantics", TITLE, TEXT, SCHEDULES, run, ("auto", "convolutions"))


if __name__ == "__main__":
    routes_case.command(STUDY)
