"""Critical nodes switched off (Wang et al., CVPR 2018): the accuracy that goes with them.

For each image a share of its critical nodes is switched off in every gated layer: from the largest
gate down (Top), from the smallest critical one up (Bottom), and as many nodes of the layer drawn
at random. Published for 50,000 validation images of ImageNet: 1 % in Top mode costs more than 30
points of top-1 and more than 20 of top-5 accuracy, and about a tenth of all nodes are critical.

``--schedule cpu`` takes two cores about five minutes: 100 test images a class. ``--schedule
published`` takes all test images. Routes are kept and shared with the other studies.

``python -m experiments.routes_ablation --models resnet10_cifar10,lenet5_mnist``
"""

import dataclasses
import itertools
from pathlib import Path

from experiments import routes_case
from experiments.routes_case import Case, Fields, average, noted
from interpret import plots, routes

TITLE = "Routes: critical nodes switched off"
TEXT = (
    "Points of accuracy lost on test images, right and wrong ones alike, when a share of each "
    "image's critical nodes (gates above 0.5) is switched off in every gated layer, the largest "
    "gates first (Top), the smallest critical ones first (Bottom), or as many nodes of the layer "
    "drawn at random, critical or not. A share takes ceil(share * n) nodes of a layer, so at least "
    "one, and 1 % is one node of each layer; the notes say how large a share that is. (A hundredth "
    "of a tenth of the gated channels of AlexNet, VGG-16 or ResNet-50, the published networks, is "
    "one node a layer or less, too.) Intervals are over images: Wilson's 95 % of an accuracy, else "
    "normal ones, of paired differences where two modes are compared. Gates stand at the outputs "
    "of residual blocks, else after each convolution's activation. Where many gates all shrink "
    "alike under the published gamma, a second reading balances it (`interpret.cdrp.balanced`)."
)
_LEAST = 0.01
# Shares that have rows; the figure shows all.
_TOLD = (_LEAST, 0.1, 0.4, 1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      per_class: Test images of each class; None for all.
      shares: Of the critical nodes, 0 first.
      layer_share: Switched off in one layer at a time.
    """

    per_class: int | None = 100
    shares: tuple[float, ...] = (0, _LEAST, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
    layer_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.shares or self.shares[0] != 0 or _LEAST not in self.shares:
            raise ValueError(f"shares must begin with 0 and hold {_LEAST}, not {self.shares}")


SCHEDULES = {"cpu": Schedule(), "published": Schedule(per_class=None)}

_MODES = {"top": "Top", "bottom": "Bottom", "random": "random nodes"}
_PUBLISHED = {"top1": "over 30", "top5": "over 20"}
_SAID = {"top1": "top-1 accuracy lost", "top5": "top-5 accuracy lost"}
_POINTS = "points"
_TOP5_CLASSES = 10


def run(case: Case, schedule: Schedule, figures: Path) -> list[Fields]:
    """Switches nodes off and draws the curves; the fields of the rows."""
    some = routes_case.drawn(case, schedule.per_class)
    found = routes_case.routed(case, some.images)
    on = routes.critical(found.gates)
    rows: list[Fields] = [
        {"row": f"{case.title}, routes", "metric": "nodes that are critical",
         "published": "about 10", **average(on.mean(1), 100, "%")},
        {"row": f"{case.title}, routes", "metric": "images whose class every step lost",
         "ours": int(found.lost.sum()), "n": len(found),
         "note": "their gates are untouched"},
    ]  # fmt: skip
    curves = {
        said: routes.ablate(
            case.seed, case.graph, case.params, some.images, some.labels, found, schedule.shares,
            mode, batch_size=case.batch,
        )
        for mode, said in _MODES.items()
    }  # fmt: skip
    whole = curves["Top"]
    width = on.shape[1]

    def gone(one: routes.Ablation, at: int) -> str:
        count = one.nodes[at].mean()
        return (
            f"{count:.1f} nodes an image: {count / max(on.sum(1).mean(), 1):.0%} of the critical "
            f"ones, {count / width:.1%} of all"
        )

    # Among few classes the first five are most.
    measures = [m for m in _SAID if m == "top1" or len(case.dataset.classes) >= _TOP5_CLASSES]
    for measure in measures:
        rows.append(
            {"row": f"{case.title}, whole network", "metric": _SAID[measure].removesuffix(" lost"),
             **average(getattr(whole, measure)[0], 100, "%")}
        )  # fmt: skip
    lost = {
        (said, measure): getattr(one, measure)[0].astype(float) - getattr(one, measure)
        for said, one in curves.items()
        for measure in measures
    }
    for at, share in enumerate(schedule.shares):
        if share not in _TOLD:
            continue
        for (said, one), measure in itertools.product(curves.items(), measures):
            first = (said, share) == ("Top", _LEAST)
            fields = average(lost[said, measure][at], 100, _POINTS)
            rows.append(
                {"row": f"{case.title}, {said}, {share:.0%}", "metric": _SAID[measure],
                 "published": _PUBLISHED[measure] if first else None,
                 **noted(fields, gone(one, at))}
            )  # fmt: skip
    at = schedule.shares.index(_LEAST)
    for other, measure in itertools.product(("Bottom", "random nodes"), measures):
        apart = lost["Top", measure][at] - lost[other, measure][at]
        rows.append(
            {"row": f"{case.title}, Top beyond {other}, {_LEAST:.0%}", "metric": _SAID[measure],
             **noted(average(apart, 100, _POINTS), "above 0: the largest gates matter more")}
        )  # fmt: skip
    for name, short in zip(case.layers, plots.short(list(case.layers)), strict=True):
        for mode, said in _MODES.items():
            one = routes.ablate(
                case.seed, case.graph, case.params, some.images, some.labels, found,
                [schedule.layer_share], mode, layers=[name], batch_size=case.batch,
            )  # fmt: skip
            less = whole.top1[0].astype(float) - one.top1[0]
            note = f"{one.nodes[0].mean():.1f} nodes of this layer an image"
            rows.append(
                {"row": f"{case.title}, {said}, {schedule.layer_share:.0%} of {short} alone",
                 "metric": _SAID["top1"], **noted(average(less, 100, _POINTS), note)}
            )  # fmt: skip
    plots.save(plots.ablation(curves), figures / f"{case.slug}.png")
    return rows


STUDY = routes_case.Study(
    "routes_ablation", TITLE, TEXT, SCHEDULES, run, ("published", "convolutions", "balanced")
)


if __name__ == "__main__":
    routes_case.command(STUDY)
