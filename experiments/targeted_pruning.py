"""Targeted pruning: what is left of the accuracy on chosen classes as synapses are taken away.

Zhang et al., ESEC/FSE 2020 (NNSlicer), targeted pruning: for target classes T and a ratio r, in
every layer the r * n synapses with the smallest |CONTRIB| for the criterion (images of T, all
outputs of T) are pruned, and neurons without synapses go with them. Beside NNSlicer (targeted)
stand NNSlicer on all classes, EffectivePath (targeted), the smallest |w|, the smallest mean |w| of
a neuron, and chance; without fine-tuning and after one epoch on 10,000 images of T. Batch
statistics stay as they are unless fine-tuned.

``--schedule cpu`` takes about an hour on two cores: all 210 sets of 4 classes, slices of 10
training images a class, 40 test images a class, and fine-tuning for three of the sets.
``--schedule published`` is the paper's: sets of 4 and of 6 classes, 100 training images a class,
all test images, and fine-tuning for twenty sets. Stopped and started again, a run goes on.

``python -m experiments.targeted_pruning --model resnet10_cifar10 --schedule cpu``
"""

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
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
from nnslicer_jax import checkpoint, data, training
from nnslicer_jax.progress import Progress
from prune import compact, criteria, masks, removal

TITLE = "Targeted pruning"
TEXT = (
    "NNSlicer's targeted pruning: accuracy, in per cent, against the ratio of synapses (kernels of "
    "convolutions and dense layers) pruned in every layer, mean over sets of target classes with "
    "the normal 95 % interval of that mean over the sets (which overlap). Headline: accuracy on "
    "test images of the target classes among all outputs; the paper does not say whether its own "
    "is that or the one among the outputs of the target classes, which stands beside it. Batch "
    "statistics stay as they are. Ties in |CONTRIB| go by |w|, and neurons left without synapses "
    "go too. Fine-tuned: one epoch on images of the target classes, masks held. A method holds to "
    "the largest ratio up to which it keeps 95 % of the whole network's accuracy."
)
TARGETED = ("NNSlicer (targeted)", "EffectivePath (targeted)")
FIXED = ("NNSlicer (all classes)", "Weight", "Channel", "Random")
METHODS = (TARGETED[0], FIXED[0], TARGETED[1], *FIXED[1:])
# Other readings of NNSlicer (targeted), tried on the sets that are fine-tuned.
READINGS = (
    "NNSlicer (targeted), theta 0.5",
    "NNSlicer (targeted), rule mass, theta 0.5",
    "NNSlicer (targeted), |CONTRIB| times |w|",
)
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
    tuned_sets: int = 3
    tuned_ratios: tuple[float, ...] = (0.7, 0.8, 0.9)
    samples: int = 10_000
    learning_rate: float = 0.02
    compacted: tuple[float, ...] = (0.5, 0.8)

    def __post_init__(self) -> None:
        for name in ("ratios", "tuned_ratios", "compacted"):
            for ratio in getattr(self, name):
                if not 0 <= ratio < 1:
                    raise ValueError(f"{name} must be 0 or more and below 1, not {ratio}")
        for name in ("images", "profiled", "tests", "sets", "tuned_sets", "samples"):
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
        tuned_sets=20,
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


class Judged(NamedTuple):
    """Accuracies of one network, 0..1, by the keys of `METRICS`."""

    target: float
    within: float
    others: float


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


def target_sets(classes: int, size: int, count: int | None, seed: int) -> list[tuple[int, ...]]:
    """Sets of `size` of the classes in an order drawn by the seed: the first `count`, or all."""
    every = list(itertools.combinations(range(classes), size))
    order = np.random.default_rng((seed, 2, size)).permutation(len(every))
    return [every[i] for i in order[:count]]


def check_targets(targets: Sequence[int], classes: int) -> None:
    """Raises ValueError unless `targets` are different classes, at least one, but not all."""
    if not targets:
        raise ValueError("targets is empty; at least one class is due")
    if not all(0 <= t < classes for t in targets) or len(set(targets)) < len(targets):
        raise ValueError(f"targets must be different classes below {classes}, not {targets}")
    if len(targets) == classes:
        raise ValueError(f"targets must leave some of the {classes} classes out")


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
    case: Case, targets: Sequence[int], theta: float = _THETA, rule: str = "signed"
) -> nns.Slice:
    """NNSlicer's slice for the criterion (images of the classes, all their outputs)."""
    images = _images_of(case, targets)
    return nns.slice_network(
        case.graph, case.params, case.profile, images, np.tile(targets, (len(images), 1)),
        theta=theta, rule=rule, batch_size=_even(len(images)),
    )  # fmt: skip


def path(case: Case, targets: Sequence[int]) -> nns.Slice:
    """EffectivePath for the same criterion."""
    images = _images_of(case, targets)
    outputs = np.tile(targets, (len(images), 1))
    return nns.effective_path(
        case.graph, case.params, images, outputs, batch_size=_even(len(images))
    )


def _even(count: int) -> int:
    """A batch size of at most 128 that leaves the last batch least empty."""
    return math.ceil(count / math.ceil(count / 128))


def targeted_scores(case: Case, targets: Sequence[int]) -> dict[str, Any]:
    """Scores by the methods that look at the target classes."""
    check_targets(targets, case.classes)
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
    """Scores by other readings of NNSlicer (targeted)."""
    graph, params = case.graph, case.params
    made = (
        criteria.contributions(graph, params, sliced(case, targets, theta=0.5)),
        criteria.contributions(graph, params, sliced(case, targets, theta=0.5, rule="mass")),
        criteria.weighted(graph, params, sliced(case, targets)),
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


def logits(case: Case, network: nns.Masked) -> np.ndarray:
    """Logits `[N, K]` of the test images."""
    size = min(_BATCH, len(case.tests))
    found: list[np.ndarray] = []
    for start in range(0, len(case.tests), size):
        # The last batch reaches back, so that one shape is compiled.
        start = min(start, len(case.tests) - size)
        new = sum(len(part) for part in found) - start
        found.append(
            np.asarray(_logits(case.graph, network, case.tests[start : start + size]))[new:]
        )
    return np.concatenate(found)


def judge(found: np.ndarray, labels: np.ndarray, targets: Sequence[int]) -> Judged:
    """Accuracies from logits.

    Args:
      found: `[N, K]` logits.
      labels: `[N]` classes.
      targets: The target classes.
    """
    check_targets(targets, found.shape[1])
    chosen = np.asarray(sorted(targets))
    of_target = np.isin(labels, chosen)
    right = found.argmax(1) == labels
    within = chosen[found[:, chosen].argmax(1)] == labels
    return Judged(
        float(right[of_target].mean()),
        float(within[of_target].mean()),
        float(right[~of_target].mean()),
    )


# Stages -------------------------------------------------------------------------------------


class Ledger:
    """What is done so far, in a JSON file that is written whole after every part."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}

    def part(self, name: str, make: Callable[[], Any]) -> Any:
        """The part of that name, made unless it is there."""
        if name not in self.done:
            self.done[name] = make()
            record.write_text(self.file, json.dumps(self.done) + "\n")
        return self.done[name]


def _named(targets: Sequence[int]) -> str:
    return "-".join(map(str, targets))


def whole(case: Case, sets: Iterable[Sequence[int]]) -> list[Judged]:
    """Accuracies of the network as it is, for each set of target classes."""
    found = logits(case, nns.Masked(case.params, {}, {}))
    return [judge(found, case.labels, targets) for targets in sets]


def untuned(case: Case, size: int, ledger: Ledger) -> dict[str, dict[float, list[Judged]]]:
    """Accuracies without fine-tuning: method to ratio to one for each set of that size."""
    schedule = case.schedule
    sets = target_sets(case.classes, size, schedule.sets, case.seed)
    found: dict[str, dict[float, list[Judged]]] = {
        method: {ratio: [] for ratio in schedule.ratios} for method in METHODS
    }
    scores = functools.cache(lambda: fixed_scores(case))
    for method, ratio in itertools.product(FIXED, schedule.ratios):

        def of_all(method: str = method, ratio: float = ratio) -> list[Judged]:
            network = reduced(case.graph, case.params, prune(scores()[method], ratio))
            known = logits(case, network)
            return [judge(known, case.labels, targets) for targets in sets]

        part = ledger.part(f"{size}/{method}/{ratio}", of_all)
        found[method][ratio] = [Judged(*row) for row in part]
    line = Progress(f"sets of {size}: pruned", len(sets), "sets")
    for number, targets in enumerate(sets, 1):

        def of_set(targets: Sequence[int] = targets) -> dict[str, list[Judged]]:
            return {
                method: [
                    judge(
                        logits(case, reduced(case.graph, case.params, prune(scores, ratio))),
                        case.labels,
                        targets,
                    )
                    for ratio in schedule.ratios
                ]
                for method, scores in targeted_scores(case, targets).items()
            }

        part = ledger.part(f"{size}/{_named(targets)}", of_set)
        for method, rows in part.items():
            for ratio, row in zip(schedule.ratios, rows, strict=True):
                found[method][ratio].append(Judged(*row))
        line.at(number)
    return found


def readings(case: Case, ledger: Ledger) -> dict[str, dict[float, list[Judged]]]:
    """Accuracies of other readings without fine-tuning, on the sets that are fine-tuned."""
    found: dict[str, dict[float, list[Judged]]] = {
        name: {ratio: [] for ratio in case.schedule.ratios} for name in (*READINGS, TARGETED[0])
    }
    for targets in tuned_sets(case):

        def of_set(targets: Sequence[int] = targets) -> dict[str, list[Judged]]:
            scores = reading_scores(case, targets)
            scores |= {TARGETED[0]: targeted_scores(case, targets)[TARGETED[0]]}
            return {
                name: [
                    judge(
                        logits(case, reduced(case.graph, case.params, prune(score, ratio))),
                        case.labels,
                        targets,
                    )
                    for ratio in case.schedule.ratios
                ]
                for name, score in scores.items()
            }

        for name, rows in ledger.part(f"readings/{_named(targets)}", of_set).items():
            for ratio, row in zip(case.schedule.ratios, rows, strict=True):
                found[name][ratio].append(Judged(*row))
    return found


def tuned_sets(case: Case) -> list[tuple[int, ...]]:
    """The target classes for which networks are fine-tuned."""
    schedule = case.schedule
    count = schedule.tuned_sets if schedule.sets is None else min(
        schedule.tuned_sets, schedule.sets
    )  # fmt: skip
    return target_sets(case.classes, schedule.sizes[0], count, case.seed)


def tuned(case: Case, ledger: Ledger) -> dict[str, dict[float, list[Judged]]]:
    """Accuracies after one epoch of fine-tuning: method to ratio to one for each set."""
    schedule = case.schedule
    sets = tuned_sets(case)
    found: dict[str, dict[float, list[Judged]]] = {
        method: {ratio: [] for ratio in schedule.tuned_ratios} for method in METHODS
    }
    fixed = functools.cache(lambda: fixed_scores(case))
    line = Progress("fine-tuned", len(sets) * len(METHODS) * len(schedule.tuned_ratios), "networks")
    done = 0
    for targets in sets:
        scores = functools.cache(functools.partial(targeted_scores, case, targets))
        for method, ratio in itertools.product(METHODS, schedule.tuned_ratios):

            def of_one(
                targets: Sequence[int] = targets, method: str = method, ratio: float = ratio,
                scores: Callable[[], dict[str, Any]] = scores,
            ) -> Judged:  # fmt: skip
                score = (scores() if method in TARGETED else fixed())[method]
                params = fine_tune(case, prune(score, ratio), targets)
                return judge(logits(case, nns.Masked(params, {}, {})), case.labels, targets)

            part = ledger.part(f"tuned/{_named(targets)}/{method}/{ratio}", of_one)
            found[method][ratio].append(Judged(*part))
            done += 1
            line.at(done)
    return found


@functools.cache
def _step(model: Any, options: training.TrainingOptions, steps: int) -> Any:
    return training.make_step(model, options, steps)


_apply = jax.jit(masks.apply_masks)


def fine_tune(case: Case, kept: Any, targets: Sequence[int]) -> Any:
    """Trains a pruned network for one epoch on images of the target classes, masks held.

    Returns:
      Its variables; what masks take away, and the neurons that go with it, stays 0.
    """
    schedule = case.schedule
    labels = case.dataset.train_labels
    rng = np.random.default_rng((case.seed, 4, *targets))
    rows = rng.permutation(np.flatnonzero(np.isin(labels, targets)))[: schedule.samples]
    options = training.TrainingOptions(
        epochs=1, learning_rate=schedule.learning_rate, schedule="cosine", seed=case.seed
    )
    size = min(options.batch_size, len(rows))
    steps = len(rows) // size
    held = _held(case.graph, case.params, kept)
    network = reduced(case.graph, case.params, kept)
    variables = jax.tree.map(jnp.array, network.params)
    method = training.optimizer(options, steps)
    state = training.TrainState(
        jnp.zeros((), jnp.int32), variables, method.init(variables["params"])
    )
    step = _step(case.trained.model, options, steps)
    for start in range(0, steps * size, size):
        some = np.sort(rows[start : start + size])
        state, info = step(state, case.dataset.train_images[some], labels[some])
        state = state._replace(variables=_apply(state.variables, held))
    if not info.finite:
        raise FloatingPointError(f"fine-tuning for classes {targets} gave weights not finite")
    return state.variables


@functools.partial(jax.jit, static_argnums=0)
def _held(graph: nns.Graph, params: Any, kept: Any) -> Any:
    return removal.remove(graph, params, kept).masks


def as_networks(case: Case, ledger: Ledger) -> dict[str, list[tuple[float, Judged]]]:
    """Slices run as they are: by fill, share of prunable synapses kept and accuracies."""
    names = criteria.kernels(case.graph)
    found: dict[str, list[tuple[float, Judged]]] = {"mean": [], "zero": []}
    for targets in tuned_sets(case):

        def of_set(targets: Sequence[int] = targets) -> dict[str, tuple[float, Judged]]:
            piece = sliced(case, targets)
            sizes = np.sum([piece.size(name) for name in names], axis=0)
            made = {}
            for fill in found:
                network = nns.mask_network(
                    case.graph, case.params, piece, fill=fill, profile=case.profile
                )
                judged = judge(logits(case, network), case.labels, targets)
                made[fill] = (float(sizes[0] / sizes[1]), judged)
            return made

        for fill, (share, row) in ledger.part(f"slices/{_named(targets)}", of_set).items():
            found[fill].append((share, Judged(*row)))
    return found


def compacted(case: Case, ledger: Ledger) -> dict[str, list[float]]:
    """Networks made smaller: row to parameters, multiplications, and time against the whole."""
    targets = tuned_sets(case)[0]
    scores = functools.cache(lambda: fixed_scores(case) | targeted_scores(case, targets))
    found = {}
    for method, ratio in itertools.product(("Channel", "Weight", TARGETED[0]),
                                           case.schedule.compacted):  # fmt: skip

        def of_one(method: str = method, ratio: float = ratio) -> list[float]:
            kept = prune(scores()[method], ratio)
            small = compact.compact(case.graph, case.params, kept)
            images = jnp.asarray(case.tests[:64])
            before = compact.size(case.graph, case.params)
            after = compact.size(small.graph, small.params)
            share, interval, seconds, _ = time_ratio(
                lambda: _logits(small.graph, nns.Masked(small.params, {}, {}), images),
                lambda: _logits(case.graph, nns.Masked(case.params, {}, {}), images),
                10,
                case.seed,
            )
            return [*before, *after, share, *interval, seconds]

        found[f"{method}, {ratio:.0%} pruned"] = ledger.part(f"compact/{method}/{ratio}", of_one)
    return found


# Results ------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean of accuracies in per cent, and the half-width of its normal 95 % interval."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return round(mean, 2), None
    half = 196 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return round(mean, 2), round(half, 2)


def held_to(curve: dict[float, list[Judged]], before: float) -> float:
    """The largest ratio up to which the mean accuracy on target classes is 95 % of `before`."""
    held = 0.0
    for ratio in sorted(curve):
        if np.mean([j.target for j in curve[ratio]]) < _HELD * before:
            break
        held = ratio
    return held


def curve_rows(
    curves: dict[str, dict[float, list[Judged]]], size: int, what: str
) -> list[dict[str, Any]]:
    """Rows of every method, ratio and metric."""
    rows = []
    for (method, curve), (metric, said) in itertools.product(curves.items(), METRICS.items()):
        for ratio, judged in curve.items():
            if not judged or (metric != "target" and not what and ratio not in _DETAILED):
                continue
            mean, half = interval([getattr(j, metric) for j in judged])
            first = metric == "target" and not what and size == 4
            rows.append({
                "row": f"{method}, {ratio:.0%} pruned{what}, {size} target classes",
                "metric": said, "ours": mean, "spread": half, "unit": "%", "n": len(judged),
                "published": PUBLISHED.get((method, ratio)) if first else None,
            })  # fmt: skip
    return rows


def run(case: Case, work: Path, figures: Path) -> list[dict[str, Any]]:
    """Runs every stage, going on where an earlier run stopped, and draws the figures.

    Args:
      case: From `prepare`.
      work: Folder for what is done so far.
      figures: Folder of the PNG files.

    Returns:
      Fields of the results' rows.
    """
    schedule = case.schedule
    work.mkdir(parents=True, exist_ok=True)
    about = json.loads(json.dumps(dataclasses.asdict(schedule)))
    checkpoint.claim(
        work, {"network": case.trained.card["name"], "seed": case.seed, "schedule": about}
    )
    ledger = Ledger(work / "done.json")
    rows: list[dict[str, Any]] = []
    for size in schedule.sizes:
        curves = untuned(case, size, ledger)
        sets = target_sets(case.classes, size, schedule.sets, case.seed)
        before = whole(case, sets)
        for metric, said in METRICS.items():
            mean, half = interval([getattr(j, metric) for j in before])
            rows.append({
                "row": f"whole network, {size} target classes", "metric": said, "ours": mean,
                "spread": half, "unit": "%", "n": len(sets),
            })  # fmt: skip
        mean_before = float(np.mean([j.target for j in before]))
        for method, curve in curves.items():
            published = HOLDS.get(method) if size == 4 else None
            rows.append({
                "row": f"{method}, {size} target classes", "metric": "holds to a ratio of",
                "ours": round(100 * held_to(curve, mean_before), 1), "unit": "%", "n": len(sets),
                "published": published and round(100 * published, 1),
                "note": "of the ratios tried; published is read from the paper's text",
            })  # fmt: skip
        rows += curve_rows(curves, size, "")
        targeted_pruning_figures.curves(
            curves, f"{size} target classes, without fine-tuning", mean_before,
            figures / f"accuracy_{size}_classes.png",
        )  # fmt: skip
    size = schedule.sizes[0]
    rows += curve_rows(readings(case, ledger), size, ", sets as fine-tuned")
    for fill, found in as_networks(case, ledger).items():
        share = float(np.mean([kept for kept, _ in found]))
        for metric, said in METRICS.items():
            mean, half = interval([getattr(j, metric) for _, j in found])
            rows.append({
                "row": f"slice run as a network, left out held at {fill}, {size} target classes",
                "metric": said, "ours": mean, "spread": half, "unit": "%", "n": len(found),
                "note": f"nothing retrained; {share:.1%} of the synapses, theta {_THETA}",
            })  # fmt: skip
    curves = tuned(case, ledger)
    rows += curve_rows(curves, size, ", fine-tuned")
    mean_before = float(np.mean([j.target for j in whole(case, tuned_sets(case))]))
    targeted_pruning_figures.curves(
        curves, f"{size} target classes, after one epoch of fine-tuning", mean_before,
        figures / f"accuracy_{size}_classes_tuned.png",
    )  # fmt: skip
    for name, numbers in compacted(case, ledger).items():
        weights, products, left, fewer, share, low, high, seconds = numbers
        rows += [
            {"row": f"made smaller: {name}", "metric": "parameters left", "unit": "%",
             "ours": round(100 * left / weights, 2), "note": f"of {weights:,.0f}"},
            {"row": f"made smaller: {name}", "metric": "multiplications left", "unit": "%",
             "ours": round(100 * fewer / products, 2), "note": f"of {products:,.0f} an image"},
            {"row": f"made smaller: {name}", "metric": "time against the whole network",
             "ours": round(share, 3), "spread": (round(low, 3), round(high, 3)),
             "note": f"64 images at once, {1e3 * seconds:.2f} ms whole"},
        ]  # fmt: skip
    return rows


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        case = prepare(given.model, given.data_dir, SCHEDULES[given.schedule], given.seed)
        rows = run(case, Path(given.work), Path(given.figures))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    about = origin(data=_said(case), seeds=[given.seed])
    made = tuple(record.Row(study="targeted_pruning", **row, **about) for row in rows)
    out = Path(given.out)
    record.write(out, record.Record(title=TITLE, text=TEXT, rows=made))
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
