"""Adversarial images told by their routes (Wang et al., CVPR 2018, detection).

A binary classifier learns from the routes of n images of each class and of their adversarial
twins; judged are other images and their twins. Published for FGSM on ImageNet: AUC near 1, growing
with n of 1, 5 and 10, random forests and gradient boosting slightly ahead of AdaBoost. Here for
every attack, trained on its own twins, and trained on FGSM's. Beside routes stand the mean
activations of the same channels, and the network's own confidence.

``--schedule cpu`` takes two cores about half an hour, most of it the attacks: 35 test images a
class, attacks with fewer steps. ``--schedule published`` takes 120 a class and the attacks'
defaults. Attacked images, routes and judgements are kept: a run that was stopped goes on.
Where other work shares the cores, set OMP_NUM_THREADS=1: boosting's threads wait for each other.

``python -m experiments.routes_detection --models resnet10_cifar10,lenet5_mnist``
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from experiments import routes_case
from experiments.routes_case import Case, Fields, Images, average, noted
from interpret import detect, faithfulness, plots
from nnslicer_jax import attacks
from nnslicer_jax.checkpoint import digest

TITLE = "Routes: adversarial images detected"
TEXT = (
    "AUC of classifiers that tell routes of normal images from those of their adversarial twins, "
    "trained on n images a class with their twins and judged on others with theirs; of every "
    "attack only images that it fools the network on, all of which the network gets right before. "
    "Mean over draws of the training images, with the bootstrapped 95 % interval over draws and "
    "over the images judged, each drawn with its twin; averages over attacks, with the normal "
    "interval over attacks. Trained on the attack's own twins unless it says FGSM. Beside routes: "
    "mean activations of the same channels, random forest, and 1 - the network's probability of "
    "its own class, which learns nothing. Published words are for FGSM on ImageNet; on grey images "
    "FGSM takes steps of 64/256, as 8/256 hardly fools the network there."
)
CLASSIFIERS: Mapping[str, str] = {
    "forest": "random forest", "adaboost": "AdaBoost", "boosting": "gradient boosting",
}  # fmt: skip
ROUTES, ACTIVATIONS = "routes", "mean activations"
# Fewer images judged than this say nothing.
_FEWEST = 10
_UNDEFINED: Fields = {"ours": None, "note": "the attack fools the network on too few images"}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      sizes: n, images of each class that classifiers learn from, ascending.
      pool: Images of each class that those are drawn from, if the attack fools the network.
      judged: Images of each class that classifiers are judged on.
      draws: Training sets drawn.
      attacks: Names of the attacks; "FGSM", by which others are also told, with the step that
        suits the images.
      fewer: Whether attacks take fewer steps than their defaults.
    """

    sizes: tuple[int, ...] = (1, 5, 10)
    pool: int = 20
    judged: int = 15
    draws: int = 3
    attacks: tuple[str, ...] = ("FGSM", *attacks.ATTACKS)
    fewer: bool = True

    def __post_init__(self) -> None:
        if list(self.sizes) != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes must ascend from 1 or more, not {self.sizes}")
        if self.pool < self.sizes[-1]:
            raise ValueError(f"pool must be at least {self.sizes[-1]}, not {self.pool}")


SCHEDULES = {"cpu": Schedule(), "published": Schedule(pool=30, judged=90, draws=10, fewer=False)}


class Twins(NamedTuple):
    """Images and what an attack made of them, those it fools the network on.

    Attributes:
      labels: `[N]`, their classes.
      learns: `[N]` bool, whether classifiers may learn from them; they are judged on the others.
      normal: Kind of feature to rows `[N, F]` of the images.
      adversarial: Kind of feature to rows of their twins.
      confidence: `[2, N]`, the network's probability of its class, before and after.
    """

    labels: np.ndarray
    learns: np.ndarray
    normal: Mapping[str, np.ndarray]
    adversarial: Mapping[str, np.ndarray]
    confidence: np.ndarray

    @property
    def judged(self) -> int:
        """How many classifiers are judged on."""
        return int((~self.learns).sum())


def twins(case: Case, schedule: Schedule, name: str) -> Twins:
    """Attacks images and takes the features of both."""
    per_class = schedule.pool + schedule.judged
    some = routes_case.drawn(case, per_class, right=True)
    moved = routes_case.attacked(case, name, some, routes_case.steps(name, schedule.fewer))
    fooled = moved.predicted != moved.labels
    learns = np.arange(len(some.labels)) % per_class < schedule.pool
    normal, adversarial = (
        {kind: rows[fooled] for kind, rows in _features(case, part).items()}
        for part in (some, moved)
    )
    confidence = np.stack([part.probabilities.max(1)[fooled] for part in (some, moved)])
    return Twins(some.labels[fooled], learns[fooled], normal, adversarial, confidence)


def _features(case: Case, some: Images) -> dict[str, np.ndarray]:
    names = list(case.layers)
    active = faithfulness.of_activations(case.graph, case.params, some.images, names, case.batch)
    return {
        ROUTES: routes_case.routed(case, some.images).gates,
        ACTIVATIONS: np.concatenate([active[name] for name in names], 1),
    }


def training_rows(key: Sequence[int], labels: np.ndarray, learns: np.ndarray, n: int) -> Any:
    """Which images a classifier learns from: n of each class, drawn, or as many as there are.

    Args:
      key: Of the draw.
      labels: `[N]` classes.
      learns: `[N]` bool, images that may be taken.
      n: Of each class.
    """
    rng = np.random.default_rng(key)
    order = rng.permutation(np.flatnonzero(learns))
    return np.sort(
        np.concatenate([order[labels[order] == label][:n] for label in np.unique(labels)])
    )


def scores(
    case: Case, schedule: Schedule, learned: Twins, told: Twins, n: int, classifier: str, kind: str
) -> np.ndarray | None:
    """Suspicion of the images judged and of their twins, `[2, draws, N]`.

    None where there is too little to learn from or to judge.
    """
    if not learned.learns.any() or told.judged < _FEWEST:
        return None
    about = {
        "n": n, "classifier": classifier, "draws": schedule.draws,
        "learned": _mark(learned, kind), "told": _mark(told, kind),
    }  # fmt: skip

    def make() -> list:
        found = []
        for draw in range(schedule.draws):
            rows = training_rows((case.seed, draw, n), learned.labels, learned.learns, n)
            known = np.concatenate([learned.normal[kind][rows], learned.adversarial[kind][rows]])
            truth = np.repeat([0, 1], len(rows))
            fitted = detect.fit(known, truth, classifier=classifier, seed=case.seed + draw)
            sides = (side[kind][~told.learns] for side in (told.normal, told.adversarial))
            # Against "normal", so that the score is the probability of "adversarial".
            none = np.zeros(told.judged, int)
            found.append([detect.judge(fitted, side, none).score.tolist() for side in sides])
        return found

    return np.array(routes_case.part(case, "detection", about, make)).swapaxes(0, 1)


def _mark(found: Twins, kind: str) -> str:
    return digest((found.labels, found.learns, found.normal[kind], found.adversarial[kind]))


def learned_from(learned: Twins, n: int, classes: int) -> str:
    """How many images a class there are to learn from, where they are fewer than n."""
    labels = learned.labels[learned.learns]
    counts = np.minimum(np.unique(labels, return_counts=True)[1], n)
    if counts.sum() == n * classes:
        return ""
    return f"trained on {counts.sum() / classes:.1f} a class, as the attack fools on no more"


def run(case: Case, schedule: Schedule, figures: Path) -> list[Fields]:
    """Attacks, learns and judges; the fields of the rows."""
    names = dict.fromkeys(case.fgsm if name == "FGSM" else name for name in schedule.attacks)
    found = {name: twins(case, schedule, name) for name in names}
    first, most = list(names)[0], schedule.sizes[-1]
    title, classes = case.title, len(case.dataset.classes)
    rows: list[Fields] = []
    table: dict[tuple[str, int, str], dict[str, float]] = {}

    def say(row: str, fields: Fields, **more: Any) -> None:
        rows.append({"row": f"{title}, {row}", "metric": "AUC", **fields, **more})

    def told_apart(learned: Twins, told: Twins, n: int, classifier: str, kind: str) -> Fields:
        suspicion = scores(case, schedule, learned, told, n, classifier, kind)
        if suspicion is None:
            return _UNDEFINED
        fields = routes_case.auc(case.seed, *suspicion, paired=True)
        return noted(fields, learned_from(learned, n, classes))

    kinds = [(ROUTES, name) for name in CLASSIFIERS] + [(ACTIVATIONS, "forest")]
    for name, told in found.items():
        confidence = _UNDEFINED
        if told.judged >= _FEWEST:
            before, after = told.confidence[:, ~told.learns]
            confidence = routes_case.auc(case.seed, 1 - before, 1 - after, paired=True)
        say(f"{name}, confidence", confidence)
        for (kind, classifier), n in itertools.product(kinds, schedule.sizes):
            fields = told_apart(told, told, n, classifier, kind)
            if fields["ours"] is not None:
                table.setdefault((kind, n, classifier), {})[name] = fields["ours"]
            # Fewer images than the most are told by the averages and the figure.
            if n == most or (name == first and kind == ROUTES):
                said = "near 1" if (name, kind, n) == (case.fgsm, ROUTES, most) else None
                row = f"{name}, {kind}, {CLASSIFIERS[classifier]}, n = {n}"
                say(row, fields, published=said)
        if name != first:
            fields = told_apart(found[first], told, most, "forest", ROUTES)
            row = f"{name}, {ROUTES}, {CLASSIFIERS['forest']}, n = {most}, trained on {first}"
            say(row, fields)
    rows += average_rows(title, table)
    rows += growth_rows(case, schedule, first, found[first])
    plots.save(picture(table, schedule), figures / f"{case.slug}.png")
    return rows


def average_rows(
    title: str, table: Mapping[tuple[str, int, str], Mapping[str, float]]
) -> list[Fields]:
    """Mean AUC over the attacks, by features, n and classifier."""
    return [
        {"row": f"{title}, average over attacks, {kind}, {CLASSIFIERS[classifier]}, n = {n}",
         "metric": "AUC", **noted(average(list(known.values())), f"over {len(known)} attacks")}
        for (kind, n, classifier), known in table.items()
    ]  # fmt: skip


def growth_rows(case: Case, schedule: Schedule, name: str, told: Twins) -> list[Fields]:
    """What more images a class gain, and what forests and boosting gain over AdaBoost."""
    few, most = schedule.sizes[0], schedule.sizes[-1]
    found = {
        (n, classifier): scores(case, schedule, told, told, n, classifier, ROUTES)
        for n in (few, most)
        for classifier in CLASSIFIERS
    }
    row, published = f"{case.title}, {name}, {ROUTES}", name == case.fgsm
    fields = [_UNDEFINED, _UNDEFINED]
    wins = {
        key: routes_case.wins(*suspicion)
        for key, suspicion in found.items()
        if suspicion is not None
    }
    if len(wins) == len(found):
        grown = np.mean([wins[most, c] - wins[few, c] for c in CLASSIFIERS], 0)
        ahead = np.mean([wins[most, c] - wins[most, "adaboost"] for c in ("forest", "boosting")], 0)
        fields = [routes_case.resampled(case.seed, part, paired=True) for part in (grown, ahead)]
    return [
        {"row": f"{row}, n = {most} beyond n = {few}", "metric": "AUC",
         "published": "above 0" if published else None,
         **noted(fields[0], "mean over classifiers")},
        {"row": f"{row}, forest and boosting beyond AdaBoost, n = {most}", "metric": "AUC",
         "published": "slightly above 0" if published else None, **fields[1]},
    ]  # fmt: skip


def picture(
    table: Mapping[tuple[str, int, str], Mapping[str, float]], schedule: Schedule
) -> Figure:
    """AUC by n, each attack a thin line and their mean a thick one, a panel a classifier."""
    drawn = Figure(figsize=(7.6, 3.2), layout="constrained")
    panels = drawn.subplots(1, len(CLASSIFIERS), sharey=True)
    for ax, (classifier, said) in zip(panels, CLASSIFIERS.items(), strict=True):
        known = [table.get((ROUTES, n, classifier), {}) for n in schedule.sizes]
        for number, name in enumerate(known[0]):
            ax.plot(schedule.sizes, [row[name] for row in known], color="#999999", linewidth=0.7,
                    label="" if number else "one attack")  # fmt: skip
        if known[0]:
            means = [np.mean(list(row.values())) for row in known]
            ax.plot(schedule.sizes, means, color=plots.COLOURS[0], marker="o", label="mean")
        ax.axhline(0.5, color=plots.COLOURS[1], linestyle=":", label="chance")
        ax.set(title=said, xlabel="images a class", ylim=(0.3, 1.02), xticks=schedule.sizes)
        ax.grid(alpha=0.3)
    panels[0].set_ylabel("AUC")
    panels[0].legend(frameon=False, fontsize=8)
    return drawn


STUDY = routes_case.Study("routes_detection", TITLE, TEXT, SCHEDULES, run)


if __name__ == "__main__":
    routes_case.command(STUDY)
