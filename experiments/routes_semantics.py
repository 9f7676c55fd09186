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
from scipy import stats
from scipy.spatial import distance
from sklearn.metrics import adjusted_rand_score

from experiments import routes_case
from experiments.routes_case import Case, Fields, Images, average, noted
from interpret import cdrp, faithfulness, plots, routes

TITLE = "Routes: what they mean within layers and classes"
TEXT = (
    "Separability of the classes in each layer's gates, on test images: accuracy of the 5 nearest "
    "other images (leave-one-out) and silhouette, from the gates themselves rather than from their "
    "embedding in the plane, and how an image's silhouette rises with the number of the layer "
    "(Spearman). Gates are fitted to the network's answer and may tell it in any layer; beside "
    "them stands the mean activation of each gated channel, which needs no routing. Whole routes: "
    "agreement of clusters (Ward) with the classes as the adjusted Rand index, over groups of "
    "images; the share of one half of the images that is nearest to the mean route of its own "
    "class in the other half; within each class, Spearman's correlation of the distance at which "
    "two images merge (average linkage) with that of their pixels, over classes; and how well the "
    "distance from the other routes of its predicted class tells an image that the network gets "
    "wrong, as AUC with a bootstrapped interval. A reading with balanced gamma suits many gates "
    "(`interpret.cdrp.balanced`). Intervals are of 95 %: Wilson's of shares, else normal, over "
    "images where nothing else is said."
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
    active = faithfulness.of_activations(
        case.graph, case.params, some.images, list(case.layers), case.batch
    )
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
            prototype_row(case, schedule, some, source, whole),
            merging_row(case, some, source, whole),
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
    rising = routes_case.depth({name: measured[1] for name, measured in known.items()})
    rows.append(
        {"row": f"{case.title}, {source}, silhouette with depth", "metric": "rank correlation",
         "published": "above 0" if source == GATES else None, **average(rising)}
    )  # fmt: skip
    return rows


def cluster_row(
    case: Case, schedule: Schedule, some: Images, source: str, whole: np.ndarray
) -> Fields:
    """Agreement of clusters with classes, over disjoint groups of images."""
    classes = len(np.unique(some.labels))
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


def prototype_row(
    case: Case, schedule: Schedule, some: Images, source: str, whole: np.ndarray
) -> Fields:
    """How often an image is nearest to the prototype of its class, made of other images."""
    learns = np.arange(len(some.labels)) % schedule.per_class < schedule.per_class // 2
    present, means = routes.prototypes(whole[learns], some.labels[learns])
    found = present[distance.cdist(whole[~learns], means).argmin(1)]
    return {
        "row": f"{case.title}, {source} of all layers, nearest class prototype",
        "metric": "own class", **average(found == some.labels[~learns], 100, "%"),
    }  # fmt: skip


def merging_row(case: Case, some: Images, source: str, whole: np.ndarray) -> Fields:
    """Whether images of a class that look alike merge early, class by class."""
    found = []
    for label in np.unique(some.labels):
        here = some.labels == label
        pairs = np.triu_indices(int(here.sum()), 1)
        heights = routes.cluster(whole[here]).heights()[pairs]
        pixels = distance.pdist(some.images[here].reshape(int(here.sum()), -1))
        told = len(pairs[0]) > 2 and np.ptp(heights) > 0 and np.ptp(pixels) > 0
        found.append(stats.spearmanr(heights, pixels).statistic if told else np.nan)
    return {
        "row": f"{case.title}, {source} of all layers, merging within a class",
        "metric": "rank correlation with the distance of pixels",
        "published": "above 0" if source == GATES else None, **average(found),
    }  # fmt: skip


def outlier_row(case: Case, some: Images, source: str, whole: np.ndarray) -> Fields:
    """How well being far from the rest of its predicted class tells a wrong prediction."""
    odd = routes.outliers(whole, some.predicted)
    wrong = some.predicted != some.labels
    fields = routes_case.auc(case.seed, odd[~wrong], odd[wrong], paired=False)
    return {
        "row": f"{case.title}, {source} of all layers, distance from the predicted class's others",
        "metric": "AUC against images predicted wrongly", **fields,
    }  # fmt: skip


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
    for label in np.unique(some.labels)[: schedule.pictured].tolist():
        here = np.flatnonzero(some.labels == label)[: schedule.members]
        members = found.take(here)
        odd = routes.outliers(members.gates, some.labels[here])
        drawn = plots.dendrogram(
            routes.cluster(members.gates), some.images[here], np.argsort(-odd)[:3].tolist()
        )
        plots.save(drawn, figures / f"{case.slug}_class_{label}.png")


STUDY = routes_case.Study(
    "routes_semantics", TITLE, TEXT, SCHEDULES, run, ("published", "convolutions", "balanced")
)


if __name__ == "__main__":
    routes_case.command(STUDY)
