"""Targeted pruning: what is left of the accuracy on chosen classes as synapses are taken away.

Zhang et al., ESEC/FSE 2020 (NNSlicer), targeted pruning: for target classes T and a ratio r, in
every layer the r * n synapses with the smallest |CONTRIB| for the criterion (images of T, all
outputs of T) are pruned, and neurons without synapses go with them. Beside NNSlicer (targeted)
stand NNSlicer on all classes, EffectivePath (targeted), the smallest |w|, the smallest mean |w| of
a neuron, and chance; without fine-tuning and after one epoch on images of T. Batch statistics stay
as they are unless fine-tuned.

``--schedule cpu`` takes about an hour on two cores: all 210 sets of 4 classes, slices of 10
training images a class, 40 test images a class; twenty of the sets are fine-tuned, 80 % pruned,
on 2,500 images each, and five show other readings of the paper. ``--schedule published`` is the
paper's: sets of 4 and of 6 classes, 100 training images a class, all test images, and fine-tuning
on 10,000 images. Stopped and started again, a run goes on.

``python -m experiments.targeted_pruning --model resnet10_cifar10 --schedule cpu``
"""

import dataclasses
import functools
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import nnslicer_jax as nns
from experiments import record, targeted_pruning_figures
from experiments.bench_graph import ratio as time_ratio
from experiments.provenance import ROOT, origin
from experiments.target_classes import (
    Accuracy,
    accuracy,
    check_targets,
    packed,
    target_sets,
    unpacked,
)
from nnslicer_jax import checkpoint, data, training
from nnslicer_jax.batches import filled
from nnslicer_jax.progress import Progress
from prune import compact, criteria, masks, removal

TITLE = "Targeted pruning"
TEXT = (
    "NNSlicer's targeted pruning: accuracy, in per cent, against the ratio of synapses (kernels of "
    "convolutions and dense layers) pruned in every layer, mean over sets of target classes. The "
    "sets overlap and share test images, so the 95 % interval is over test images: an image adds "
    "the share of the sets in which it is right, these values vary between the images of a class, "
    "and the interval is Wilson's for as many images as give that variance; n counts different "
    "images, and which sets are drawn is not in the interval. Headline: accuracy on test images of "
    "the target classes among all outputs; the paper does not say whether its own is that or the "
    "one among the outputs of the target classes, which stands beside it. Batch statistics stay as "
    "they are. Ties in |CONTRIB| go by |w|, and neurons left without synapses go too. "
    "EffectivePath (targeted) is sliced as NNSlicer is, of images of the target classes and all "
    "their outputs; its authors' own criterion, the class of each rightly predicted image, stands "
    "among the other readings. Fine-tuned: one epoch on images of the target classes, masks held, "
    "no augmentation; the whole network is fine-tuned likewise with nothing pruned. A method holds "
    "to the largest ratio up to which it keeps 95 % of the whole network's accuracy, which is not "
    "fine-tuned."
)
TARGETED = ("NNSlicer (targeted)", "EffectivePath (targeted)")
FIXED = ("NNSlicer (all classes)", "Weight", "Channel", "Random")
METHODS = (TARGETED[0], FIXED[0], TARGETED[1], *FIXED[1:])
# Fine-tuned with nothing pruned.
WHOLE = "whole network"
# Other readings of the targeted methods, tried on some of the sets.
READINGS = (
    "NNSlicer (targeted), theta 0.5",
    "NNSlicer (targeted), rule mass, theta 0.5",
    "NNSlicer (targeted), |CONTRIB| of each image added up",
    "NNSlicer (targeted), |CONTRIB| times |w|",
    "EffectivePath, own class of correctly predicted images",
)
# What the paper's figures are of.
_PUBLISHED_NETWORK = "resnet10_cifar10"
PUBLISHED = {("NNSlicer (targeted)", 0.55): "about 80"}
HOLDS = {"NNSlicer (targeted)": 0.55, "NNSlicer (all classes)": 0.45, "Weight": 0.45}
METRICS = {
    "target": "target classes, among all outputs",
    "within": "target classes, among their own outputs",
    "others": "other classes, among all outputs",
}
_HELD = 0.95
# Ratios of which the results list every metric; the paper's two.
_DETAILED = (0.45, 0.55)
_THETA = 0.2
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      sizes: Numbers of target classes.
      sets: Sets of each size, drawn; None for all.
      ratios: Shares pruned, without fine-tuning.
      images: Training images a class that slices are of.
      profiled: Training images that are profiled.
      tests: Test images a class; None for all.
      readings: Sets of the first size on which other readings are tried, drawn.
      tuned_sets: Sets of the first size that are fine-tuned, drawn.
      tuned_ratios: Shares pruned before fine-tuning.
      samples: Training images of the target classes that an epoch goes over.
      learning_rate: Where its cosine starts.
      compacted: Shares pruned of the networks made smaller.
    """

    sizes: tuple[int, ...] = (4,)
    sets: int | None = None
    ratios: tuple[float, ...] = (0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)
    images: int = 10
    profiled: int = 2_000
    tests: int | None = 40
    readings: int = 5
    tuned_sets: int = 20
    tuned_ratios: tuple[float, ...] = (0.8,)
    samples: int = 2_500
    learning_rate: float = 0.02
    compacted: tuple[float, ...] = (0.5, 0.8)

    def __post_init__(self) -> None:
        for name in ("ratios", "tuned_ratios", "compacted"):
            for ratio in getattr(self, name):
                if not 0 <= ratio < 1:
                    raise ValueError(f"{name} must be 0 or more and below 1, not {ratio}")
        for name in ("images", "profiled", "tests", "sets", "readings", "tuned_sets", "samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, not {number}")


SCHEDULES = {
    "cpu": Schedule(),
    "published": Schedule(
        sizes=(4, 6),
        ratios=(0.1, 0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9),
        images=100,
        profiled=10_000,
        tests=None,
        readings=20,
        tuned_ratios=(0.7, 0.8, 0.9),
        samples=10_000,
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A network with its data.

    Attributes:
      trained: The network.
      graph: It, traced.
      profile: Mean activations.
      dataset: Where images come from.
      tests: `[N, ...]` float32, test images in 0..1, equally many of each class.
      labels: `[N]` their classes.
      schedule: How much is run.
      seed: Of every draw.
    """

    trained: nns.zoo.Trained
    graph: nns.Graph
    profile: nns.Profile
    dataset: data.Dataset
    tests: np.ndarray
    labels: np.ndarray
    schedule: Schedule
    seed: int

    @property
    def params(self) -> Any:
        """The whole network's variables."""
        return self.trained.variables

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return len(self.dataset.classes)


class Answers(NamedTuple):
    """Which test images one network gets right, packed as `target_classes.packed` does.

    Attributes:
      right: Among all outputs.
      within: Among the outputs of the target classes; none of other images.
    """

    right: str
    within: str


Curves = dict[str, dict[float, list[Answers]]]


def prepare(model: str, data_dir: str | None, schedule: Schedule, seed: int) -> Case:
    """Loads network and data, traces and profiles.

    Raises:
      ValueError: For an unknown network or data set, or a set of all classes.
    """
    trained = nns.zoo.load(model)
    dataset = data.load(trained.card["data"], data_dir)
    for size in schedule.sizes:
        if not 0 < size < len(dataset.classes):
            raise ValueError(
                f"sizes must be 1 to {len(dataset.classes) - 1}, below the {len(dataset.classes)} "
                f"classes of {dataset.name}, not {size}"
            )
    rng = np.random.default_rng((seed, 1))
    at = np.concatenate(
        [
            _drawn(rng, dataset.test_labels, label, schedule.tests)
            for label in range(len(dataset.classes))
        ]
    )
    tests = data.to_float(dataset.test_images[np.sort(at)])
    graph = nns.trace(trained.model.apply, trained.variables, tests[:1])
    few = np.sort(rng.permutation(len(dataset.train_labels))[: schedule.profiled])
    profile = nns.profile(graph, trained.variables, data.to_float(dataset.train_images[few]))
    return Case(
        trained, graph, profile, dataset, tests, dataset.test_labels[np.sort(at)], schedule, seed
    )


def _drawn(rng: np.random.Generator, labels: np.ndarray, label: int, count: int | None) -> Any:
    found = rng.permutation(np.flatnonzero(labels == label))
    return found if count is None else found[:count]


def check_some(targets: Sequence[int], classes: int) -> tuple[int, ...]:
    """The target classes in order; ValueError also where they are all classes."""
    found = check_targets(targets, classes)
    if len(found) == classes:
        raise ValueError(f"targets must leave some of the {classes} classes out")
    return found


# Criteria -----------------------------------------------------------------------------------


def _images_of(case: Case, targets: Iterable[int]) -> np.ndarray:
    """Training images of the classes, float32: the same of a class in whichever set it is."""
    rows = [
        _drawn(
            np.random.default_rng((case.seed, 3, label)),
            case.dataset.train_labels,
            label,
            case.schedule.images,
        )
        for label in targets
    ]
    return data.to_float(case.dataset.train_images[np.sort(np.concatenate(rows))])


def sliced(
    case: Case, targets: Sequence[int], theta: float = _THETA, rule: str = "signed", *,
    per_sample: bool = False,
) -> nns.Slice:  # fmt: skip
    """NNSlicer's slice for the criterion (images of the classes, all their outputs)."""
    images = _images_of(case, targets)
    return nns.slice_network(
        case.graph, case.params, case.profile, images, np.tile(targets, (len(images), 1)),
        theta=theta, rule=rule, per_sample=per_sample, batch_size=_even(len(images)),
    )  # fmt: skip


def unsigned(case: Case, targets: Sequence[int]) -> nns.Slice:
    """As `sliced`, but |CONTRIB| of the images are added up: signs of two images do not cancel."""
    each = sliced(case, targets, per_sample=True)
    synapses = {name: np.abs(contrib).sum(0) for name, contrib in each.synapses.items()}
    neurons = {name: np.abs(contrib).sum(0) for name, contrib in each.neurons.items()}
    return dataclasses.replace(each, synapses=synapses, neurons=neurons, per_sample=False)


def path(case: Case, targets: Sequence[int]) -> nns.Slice:
    """EffectivePath for the same criterion."""
    images = _images_of(case, targets)
    outputs = np.tile(targets, (len(images), 1))
    return nns.effective_path(
        case.graph, case.params, images, outputs, batch_size=_even(len(images))
    )


def own_path(case: Case, targets: Sequence[int]) -> nns.Slice:
    """EffectivePath as its authors use it: of rightly predicted images and their own class.

    Raises:
      ValueError: If the network gets none of the images right.
    """
    found = [piece for label in targets if (piece := _own_path(case, label)) is not None]
    if not found:
        raise ValueError(f"targets {_named(targets)}: no training image of them is predicted right")
    return functools.reduce(operator.add, found)


@functools.cache
def _own_path(case: Case, label: int) -> nns.Slice | None:
    """The paths of the rightly predicted images of a class together, if there are any."""
    images = _images_of(case, [label])
    found = _logits(case.graph, nns.Masked(case.params, {}, {}), images)
    each = nns.effective_path(
        case.graph, case.params, images, np.full(len(images), label), per_sample=True,
        batch_size=_even(len(images)),
    )  # fmt: skip
    right = [each.sample(int(i)) for i in np.flatnonzero(np.asarray(found).argmax(1) == label)]
    return functools.reduce(operator.add, right) if right else None


def _even(count: int) -> int:
    """A batch size of at most 128 that leaves the last batch least empty."""
    return math.ceil(count / math.ceil(count / 128))


def targeted_scores(case: Case, targets: Sequence[int]) -> dict[str, Any]:
    """Scores by the methods that look at the target classes."""
    check_some(targets, case.classes)
    pieces = sliced(case, targets), path(case, targets)
    return {
        method: criteria.contributions(case.graph, case.params, piece)
        for method, piece in zip(TARGETED, pieces, strict=True)
    }


def fixed_scores(case: Case) -> dict[str, Any]:
    """Scores by the methods that do not."""
    graph, params = case.graph, case.params
    every = sliced(case, range(case.classes))
    made = (
        criteria.contributions(graph, params, every),
        criteria.magnitudes(graph, params),
        criteria.channels(graph, params),
        criteria.random(jax.random.key(case.seed), graph, params),
    )
    return dict(zip(FIXED, made, strict=True))


def reading_scores(case: Case, targets: Sequence[int]) -> dict[str, Any]:
    """Scores by other readings of the targeted methods."""
    graph, params = case.graph, case.params
    made = (
        criteria.contributions(graph, params, sliced(case, targets, theta=0.5)),
        criteria.contributions(graph, params, sliced(case, targets, theta=0.5, rule="mass")),
        criteria.contributions(graph, params, unsigned(case, targets)),
        criteria.weighted(graph, params, sliced(case, targets)),
        criteria.contributions(graph, params, own_path(case, targets)),
    )
    return dict(zip(READINGS, made, strict=True))


_topk = jax.jit(masks.topk, static_argnums=(1, 2))


def prune(scores: Any, ratio: float) -> Any:
    """Masks that prune the share `ratio` of every layer's synapses.

    Raises:
      ValueError: For a ratio below 0, or of 1 or more.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be 0 or more and below 1, not {ratio}")
    return _topk(scores, 1 - Fraction(str(ratio)), "layer")


# Judging ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph: nns.Graph, network: nns.Masked, images: jax.Array) -> jax.Array:
    return nns.evaluate(graph, network.params, images, network.edits)[0]


@functools.partial(jax.jit, static_argnums=0)
def reduced(graph: nns.Graph, params: Any, kept: Any) -> nns.Masked:
    """The network under masks, compiled once."""
    return removal.reduced(graph, params, kept)


def logits(graph: nns.Graph, network: nns.Masked, images: np.ndarray) -> np.ndarray:
    """Logits `[N, K]` of images."""
    found = [
        np.asarray(_logits(graph, network, images[which]))
        for which in filled(len(images), min(_BATCH, len(images)))
    ]
    return np.concatenate(found)[: len(images)]


def ranked(case: Case, network: nns.Masked) -> np.ndarray:
    """Classes `[N, K]` of each test image from the largest logit down, of equal ones the first."""
    return np.argsort(-logits(case.graph, network, case.tests), axis=1, stable=True)


def judge(order: np.ndarray, labels: np.ndarray, targets: Sequence[int]) -> Answers:
    """Right answers from ranked classes.

    Args:
      order: `[N, K]` from `ranked`.
      labels: `[N]` classes.
      targets: The target classes.
    """
    chosen = np.isin(order, check_some(targets, order.shape[1]))
    first = order[np.arange(len(order)), chosen.argmax(1)]
    return Answers(packed(order[:, 0] == labels), packed(first == labels))


def pruned_to(case: Case, scores: Any, ratio: float) -> np.ndarray:
    """Ranked classes of the test images by the network pruned to a ratio, nothing retrained."""
    return ranked(case, reduced(case.graph, case.params, prune(scores, ratio)))


def measured(
    case: Case, sets: Sequence[Sequence[int]], answers: Sequence[Answers], metric: str
) -> Accuracy:
    """Mean accuracy over sets, the answers being those of one network each, of a key of METRICS."""
    right = [a.within if metric == "within" else a.right for a in answers]
    count = len(case.labels)
    judged = np.stack([np.isin(case.labels, targets) for targets in sets])
    return accuracy(
        np.stack([unpacked(text, count) for text in right]),
        ~judged if metric == "others" else judged,
        case.labels,
    )


# Stages -------------------------------------------------------------------------------------


class Ledger:
    """What is done so far: a JSON file for each part, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made unless it is there.

        Raises:
          ValueError: If its file is damaged.
        """
        file = self.folder / f"{re.sub(r'[^0-9A-Za-z.-]+', '_', name)}.json"
        if not file.is_file():
            record.write_text(file, json.dumps({"part": make()}) + "\n")
        try:
            return json.loads(file.read_text())["part"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file.name} is not a part of a run; remove it") from None


def _named(targets: Sequence[int]) -> str:
    return "-".join(map(str, targets))


def whole(case: Case, sets: Iterable[Sequence[int]]) -> list[Answers]:
    """Answers of the network as it is, for each set of target classes."""
    order = ranked(case, nns.Masked(case.params, {}, {}))
    return [judge(order, case.labels, targets) for targets in sets]


def untuned(case: Case, size: int, ledger: Ledger) -> Curves:
    """Answers without fine-tuning: method to ratio to one for each set of that size."""
    schedule = case.schedule
    sets = target_sets(case.classes, size, schedule.sets, case.seed)
    found: Curves = {method: {ratio: [] for ratio in schedule.ratios} for method in METHODS}
    scores = functools.cache(lambda: fixed_scores(case))
    for method, ratio in itertools.product(FIXED, schedule.ratios):
        # One network for all sets, of any size.

        def of_all(method: str = method, ratio: float = ratio) -> list[list[int]]:
            return pruned_to(case, scores()[method], ratio).tolist()

        order = ledger.part(f"{method}/{ratio}", of_all)
        found[method][ratio] = [judge(np.asarray(order), case.labels, targets) for targets in sets]
    line = Progress(f"sets of {size}: pruned", len(sets), "sets")
    for number, targets in enumerate(sets, 1):
        _append(found, _targeted(case, targets, ledger))
        line.at(number)
    return found


def _targeted(case: Case, targets: Sequence[int], ledger: Ledger) -> Any:
    """The ledger's answers for a set by the methods that look at it."""
    return ledger.part(
        f"{len(targets)}/{_named(targets)}",
        lambda: _judged_at(case, targeted_scores(case, targets), targets),
    )


def _judged_at(
    case: Case, scores: Mapping[str, Any], targets: Sequence[int]
) -> dict[str, list[Answers]]:
    """Method to answers at each ratio of the schedule."""
    return {
        method: [
            judge(pruned_to(case, s, ratio), case.labels, targets) for ratio in case.schedule.ratios
        ]
        for method, s in scores.items()
    }


def _append(curves: Curves, part: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Adds the answers of a set, from the ledger, to the curves."""
    for method, rows in part.items():
        for ratio, row in zip(curves[method], rows, strict=True):
            curves[method][ratio].append(Answers(*row))


def readings(case: Case, ledger: Ledger) -> Curves:
    """Answers by other readings without fine-tuning, beside the targeted methods."""
    schedule = case.schedule
    found: Curves = {
        name: {ratio: [] for ratio in schedule.ratios} for name in (*TARGETED, *READINGS)
    }
    sets = some_sets(case, schedule.readings)
    line = Progress("other readings: pruned", len(sets), "sets")
    for number, targets in enumerate(sets, 1):

        def of_set(targets: Sequence[int] = targets) -> dict[str, list[Answers]]:
            return _judged_at(case, reading_scores(case, targets), targets)

        _append(found, _targeted(case, targets, ledger))
        _append(found, ledger.part(f"readings/{_named(targets)}", of_set))
        line.at(number)
    return found


def some_sets(case: Case, count: int) -> list[tuple[int, ...]]:
    """The first of the sets of the first size, at most as many as are run."""
    schedule = case.schedule
    count = count if schedule.sets is None else min(count, schedule.sets)
    return target_sets(case.classes, schedule.sizes[0], count, case.seed)


def tuned(case: Case, ledger: Ledger) -> Curves:
    """Answers after one epoch of fine-tuning: method to ratio to one for each set.

    Among the methods is `WHOLE`, at the ratio 0.
    """
    schedule = case.schedule
    sets = some_sets(case, schedule.tuned_sets)
    found: Curves = {WHOLE: {0.0: []}}
    found |= {method: {ratio: [] for ratio in schedule.tuned_ratios} for method in METHODS}
    fixed = functools.cache(lambda: fixed_scores(case))
    runs = [(method, ratio) for method, curve in found.items() for ratio in curve]
    line = Progress("fine-tuned", len(sets) * len(runs), "networks")
    done = 0
    for targets in sets:
        scores = functools.cache(functools.partial(targeted_scores, case, targets))
        for method, ratio in runs:

            def of_one(
                targets: Sequence[int] = targets, method: str = method, ratio: float = ratio,
                scores: Callable[[], dict[str, Any]] = scores,
            ) -> Answers:  # fmt: skip
                if method in TARGETED:
                    score = scores()[method]
                else:
                    score = fixed()["Weight" if method == WHOLE else method]
                params = fine_tune(case, prune(score, ratio), targets)
                return judge(ranked(case, nns.Masked(params, {}, {})), case.labels, targets)

            part = ledger.part(f"tuned/{_named(targets)}/{method}/{ratio}", of_one)
            found[method][ratio].append(Answers(*part))
            done += 1
            line.at(done)
    return found


def fine_tune(case: Case, kept: Any, targets: Sequence[int]) -> Any:
    """Trains a pruned network for one epoch on images of the target classes, masks held.

    Returns:
      Its variables; what masks take away, and the neurons that go with it, stays 0.
    """
    schedule, dataset = case.schedule, case.dataset
    rng = np.random.default_rng((case.seed, 4, *targets))
    of_targets = np.flatnonzero(np.isin(dataset.train_labels, targets))
    rows = np.sort(rng.permutation(of_targets)[: schedule.samples])
    options = training.TrainingOptions(
        epochs=1, learning_rate=schedule.learning_rate, schedule="cosine", seed=case.seed
    )
    variables = reduced(case.graph, case.params, kept).params
    held = _held(case.graph, case.params, kept)
    trainable = jax.tree.map(
        lambda mask, leaf: np.ones(np.shape(leaf), bool) if mask is None else np.asarray(mask),
        held["params"], variables["params"], is_leaf=lambda mask: mask is None,
    )  # fmt: skip
    some = dataset._replace(
        train_images=dataset.train_images[rows], train_labels=dataset.train_labels[rows]
    )
    found = training.train(
        case.trained.model, some, options, variables=variables, trainable=trainable
    )
    # Batch statistics of neurons that are gone follow what is left of them.
    return _apply(found, held)


_apply = jax.jit(masks.apply_masks)


@functools.partial(jax.jit, static_argnums=0)
def _held(graph: nns.Graph, params: Any, kept: Any) -> Any:
    return removal.remove(graph, params, kept).masks


def as_networks(case: Case, ledger: Ledger) -> dict[str, list[tuple[float, Answers]]]:
    """Slices run as they are: by fill, share of prunable synapses kept and answers."""
    names = criteria.kernels(case.graph)
    found: dict[str, list[tuple[float, Answers]]] = {"mean": [], "zero": []}
    sets = some_sets(case, case.schedule.tuned_sets)
    line = Progress("slices: run", len(sets), "sets")
    for number, targets in enumerate(sets, 1):

        def of_set(targets: Sequence[int] = targets) -> dict[str, tuple[float, Answers]]:
            piece = sliced(case, targets)
            sizes = np.sum([piece.size(name) for name in names], axis=0)
            made = {}
            for fill in found:
                network = nns.mask_network(
                    case.graph, case.params, piece, fill=fill, profile=case.profile
                )
                judged = judge(ranked(case, network), case.labels, targets)
                made[fill] = (float(sizes[0] / sizes[1]), judged)
            return made

        for fill, (share, row) in ledger.part(f"slices/{_named(targets)}", of_set).items():
            found[fill].append((share, Answers(*row)))
        line.at(number)
    return found


class Smaller(NamedTuple):
    """A network made smaller, beside the whole one.

    Attributes:
      weights: Parameters of the whole network.
      products: Its multiplications for an image.
      left: Parameters of the smaller one.
      fewer: Its multiplications.
      time: Its time over that of the whole one.
      low: Lower end of the 95 % interval of that.
      high: Its upper end.
      seconds: Of the whole network, 64 images at once.
      apart: Largest difference of a logit from the masked network's, over the largest logit.
    """

    weights: float
    products: float
    left: float
    fewer: float
    time: float
    low: float
    high: float
    seconds: float
    apart: float


def compacted(case: Case, ledger: Ledger) -> dict[str, Smaller]:
    """Networks made smaller, by method and share pruned."""
    targets = some_sets(case, 1)[0]
    scores = functools.cache(lambda: fixed_scores(case) | targeted_scores(case, targets))
    found = {}
    for method, ratio in itertools.product(("Channel", "Weight", TARGETED[0]),
                                           case.schedule.compacted):  # fmt: skip

        def of_one(method: str = method, ratio: float = ratio) -> Smaller:
            kept = prune(scores()[method], ratio)
            small = compact.compact(case.graph, case.params, kept)
            less = nns.Masked(small.params, {}, {})
            before = compact.size(case.graph, case.params)
            after = compact.size(small.graph, small.params)
            masked = logits(case.graph, reduced(case.graph, case.params, kept), case.tests)
            apart = np.abs(logits(small.graph, less, case.tests) - masked).max()
            images = jnp.asarray(case.tests[:64])
            share, interval, seconds, _ = time_ratio(
                lambda: _logits(small.graph, less, images),
                lambda: _logits(case.graph, nns.Masked(case.params, {}, {}), images),
                10,
                case.seed,
            )
            return Smaller(
                *before, *after, share, *interval, seconds, float(apart / np.abs(masked).max())
            )

        part = ledger.part(f"compact/{method}/{ratio}", of_one)
        found[f"{method}, {ratio:.0%} pruned"] = Smaller(*part)
    return found


# Results ------------------------------------------------------------------------------------


def held_to(curve: Mapping[float, Accuracy], before: float) -> float:
    """The largest ratio up to which the mean accuracy is 95 % of `before`."""
    held = 0.0
    for ratio in sorted(curve):
        if curve[ratio].mean < _HELD * before:
            break
        held = ratio
    return held


def measured_curves(
    case: Case, sets: Sequence[Sequence[int]], curves: Curves, metric: str = "target"
) -> dict[str, dict[float, Accuracy]]:
    """Method to ratio to the mean accuracy over sets, by a key of METRICS."""
    return {
        method: {ratio: measured(case, sets, found, metric) for ratio, found in curve.items()}
        for method, curve in curves.items()
    }


def curve_rows(
    case: Case, sets: Sequence[Sequence[int]], curves: Curves, what: str
) -> list[dict[str, Any]]:
    """Rows of every method, ratio and metric."""
    rows = []
    size = len(sets[0])
    for metric, (method, curve) in itertools.product(METRICS, curves.items()):
        for ratio, answers in curve.items():
            if metric != "target" and not what and ratio not in _DETAILED:
                continue
            name = method if method == WHOLE else f"{method}, {ratio:.0%} pruned"
            row = _row(case, sets, answers, metric, f"{name}{what}, {size} target classes")
            if metric == "target" and not what and size == 4 and _is_published(case):
                row["published"] = PUBLISHED.get((method, ratio))
            rows.append(row)
    return rows


def _row(
    case: Case, sets: Sequence[Sequence[int]], answers: Sequence[Answers], metric: str, name: str,
    note: str = "",
) -> dict[str, Any]:  # fmt: skip
    found = measured(case, sets, answers, metric)
    low, high = found.percents
    sets_said = f"{len(sets)} set{'s' * (len(sets) > 1)} of classes"
    return {
        "row": name, "metric": METRICS[metric], "ours": round(found.percent, 2),
        "spread": (round(low, 2), round(high, 2)), "unit": "%", "n": found.images,
        "note": f"{sets_said}; {note}" if note else sets_said,
    }  # fmt: skip


def _is_published(case: Case) -> bool:
    """Whether the paper's figures are of this network."""
    return case.trained.card["name"] == _PUBLISHED_NETWORK


def run(case: Case, work: Path, figures: Path, commit: str) -> list[dict[str, Any]]:
    """Runs every stage, going on where an earlier run stopped, and draws the figures.

    Args:
      case: From `prepare`.
      work: Folder for what is done so far.
      figures: Folder of the PNG files.
      commit: Revision of the code, which must not change between a run and its going on.

    Returns:
      Fields of the results' rows.

    Raises:
      ValueError: If the folder is of another run.
    """
    schedule, dataset = case.schedule, case.dataset
    about = json.loads(json.dumps(dataclasses.asdict(schedule)))
    checkpoint.claim(
        work,
        {
            "network": case.trained.card["weights_sha256"],
            "data": checkpoint.digest(
                (dataset.train_images, dataset.train_labels, case.tests, case.labels)
            ),
            "data_note": dataset.note,
            "seed": case.seed,
            "schedule": about,
            "commit": commit,
        },
    )
    ledger = Ledger(work / "parts")
    rows: list[dict[str, Any]] = []
    for size in schedule.sizes:
        rows += _untuned_rows(case, size, ledger, figures)
    size = schedule.sizes[0]
    sets = some_sets(case, schedule.readings)
    rows += curve_rows(case, sets, readings(case, ledger), ", sets of the other readings")
    rows += _tuned_rows(case, ledger, figures)
    sets = some_sets(case, schedule.tuned_sets)
    for fill, found in as_networks(case, ledger).items():
        share = float(np.mean([kept for kept, _ in found]))
        rows += [
            _row(
                case, sets, [a for _, a in found], metric,
                f"slice run as a network, left out held at {fill}, {size} target classes",
                f"nothing retrained; {share:.1%} of the synapses, theta {_THETA}",
            )
            for metric in METRICS
        ]  # fmt: skip
    for name, small in compacted(case, ledger).items():
        rows += [
            {"row": f"made smaller: {name}", "metric": "parameters left", "unit": "%",
             "ours": round(100 * small.left / small.weights, 2),
             "note": f"of {small.weights:,.0f}"},
            {"row": f"made smaller: {name}", "metric": "multiplications left", "unit": "%",
             "ours": round(100 * small.fewer / small.products, 2),
             "note": f"of {small.products:,.0f} an image"},
            {"row": f"made smaller: {name}", "metric": "time against the whole network",
             "ours": round(small.time, 3), "spread": (round(small.low, 3), round(small.high, 3)),
             "note": f"64 images at once, {1e3 * small.seconds:.2f} ms whole"},
            {"row": f"made smaller: {name}", "metric": "largest difference of a logit",
             "ours": small.apart, "n": len(case.labels),
             "note": "from the masked network's, over the largest logit"},
        ]  # fmt: skip
    return rows


def _untuned_rows(case: Case, size: int, ledger: Ledger, figures: Path) -> list[dict[str, Any]]:
    curves = untuned(case, size, ledger)
    sets = target_sets(case.classes, size, case.schedule.sets, case.seed)
    before = whole(case, sets)
    rows = [
        _row(case, sets, before, metric, f"{WHOLE}, {size} target classes") for metric in METRICS
    ]
    level = measured(case, sets, before, "target").mean
    found = measured_curves(case, sets, curves)
    for method, curve in found.items():
        published = HOLDS.get(method) if size == 4 and _is_published(case) else None
        rows.append({
            "row": f"{method}, {size} target classes", "metric": "holds to a ratio of",
            "ours": round(100 * held_to(curve, level), 1), "unit": "%", "n": len(sets),
            "published": published and round(100 * published, 1),
            "note": "of the ratios tried; n counts sets"
            + ("; published is read from the paper's text" if published else ""),
        })  # fmt: skip
    targeted_pruning_figures.curves(
        found, f"{size} target classes, without fine-tuning", {WHOLE: level},
        figures / f"accuracy_{size}_classes.png",
    )  # fmt: skip
    return rows + curve_rows(case, sets, curves, "")


def _tuned_rows(case: Case, ledger: Ledger, figures: Path) -> list[dict[str, Any]]:
    sets, size = some_sets(case, case.schedule.tuned_sets), case.schedule.sizes[0]
    curves = tuned(case, ledger)
    before = whole(case, sets)
    rows = [
        _row(case, sets, before, metric, f"{WHOLE}, sets as fine-tuned, {size} target classes")
        for metric in METRICS
    ]
    found = measured_curves(case, sets, curves)
    levels = {
        f"{WHOLE}, fine-tuned": found.pop(WHOLE)[0.0].mean,
        f"{WHOLE}, not fine-tuned": measured(case, sets, before, "target").mean,
    }
    targeted_pruning_figures.curves(
        found, f"{size} target classes, after one epoch of fine-tuning", levels,
        figures / f"accuracy_{size}_classes_tuned.png",
    )  # fmt: skip
    return rows + curve_rows(case, sets, curves, ", fine-tuned")


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        case = prepare(given.model, given.data_dir, SCHEDULES[given.schedule], given.seed)
        # Of the code that ran, should it change on the way.
        about = origin(data=_said(case), seeds=[given.seed])
        rows = run(case, Path(given.work), Path(given.figures), about["commit"])
        made = tuple(record.Row(study="targeted_pruning", **row, **about) for row in rows)
        out = Path(given.out)
        record.write(out, record.Record(title=TITLE, text=TEXT, rows=made))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out.name}; python -m experiments.report renders it")


def _said(case: Case) -> str:
    name, schedule = case.dataset.name, case.schedule
    jpeg = " (JPEG re-encodings)" if "JPEG" in case.dataset.note else ""
    return (
        f"{name}{jpeg}: slices of {schedule.images} training images a class, "
        f"{len(case.labels):,} test images; {case.trained.card['name']}"
    )


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("model", "resnet10_cifar10", "network of the zoo")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    flags.DEFINE_integer("seed", 0, "of every draw", lower_bound=0)
    results = ROOT / "experiments" / "results" / "targeted_pruning.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", "out/targeted_pruning", "folder for what is done so far")
    flags.DEFINE_string("figures", "out/targeted_pruning", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
