"""Model protection: what an attacker makes of a network whose most valuable synapses are hidden.

Zhang et al., ESEC/FSE 2020, the application "model protection", ResNet-10 on CIFAR-10. The half of
each layer's synapses that matter most for some target classes is hidden; the attacker trains for 5
epochs on as many images as a budget allows. The lower its accuracy on the target classes, the
better the protection. Published at 50,000 samples: below 10 % when NNSlicer chose, above 30 % for
the other choices, 90 % for EffectivePath.

The paper leaves much open. Here hidden synapses restart from the initialiser, under a draw that is
not the one the network was trained from; biases, batch norm scales and statistics are exposed; the
attacker draws from the training images of all classes, knows how the network was trained
(augmentation, schedule; batches of at most 32), and takes for each method the learning rate that,
after training on a few samples (1,000; 2,000 in the published schedule), does best on one half of
the test images; accuracy is reported on the other half. Attackers: "all trained" trains the exposed
weights along (the headline: the stronger one), "hidden trained" the hidden synapses alone. The
criterion of NNSlicer is every image of the target classes with all target outputs; that of
EffectivePath the rightly classified ones, with their own class. Of equal CONTRIBs the larger
weights are hidden first. Weight and Random do not depend on the targets, so one run stands for all
sets of them. A baseline trains from scratch.

``--schedule cpu`` takes about 50 minutes on two cores: slices of 100 images a class, two sets of
four target classes up to 5,000 samples; 50,000 for one set, "all trained", and NNSlicer alone.
``--schedule published``: slices of every training image, ten sets, up to 50,000 samples for both.
``--schedule tiny`` takes seconds on ``digits_cnn``.
A run that is killed goes on from the folder ``--folder``.
"""

import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import nnslicer_jax as nns
from experiments import page, record
from experiments.provenance import ROOT, origin
from experiments.target_classes import (
    Accuracy,
    accuracy,
    check_targets,
    packed,
    target_sets,
    unpacked,
    wilson,
)
from nnslicer_jax import checkpoint, data, training
from nnslicer_jax.atomic import replacing
from nnslicer_jax.progress import Progress
from prune import criteria, masks, protect

TARGETED = ("NNSlicer", "EffectivePath")
METHODS = (*TARGETED, "Weight", "Random")
# A network that has nothing of the protected one but its architecture.
SCRATCH = "From scratch"
ATTACKERS = {"all": "all trained", "hidden": "hidden trained"}
TITLE = "Model protection"
TEXT = (
    "Accuracy of an attacker who is given a network without the half of each layer's synapses "
    "that a method chose for some target classes, and trains for 5 epochs on a budget of samples; "
    "lower is better protection. All trained: the attacker trains every weight, the hidden ones "
    "from a fresh start (the headline). Hidden trained: the hidden synapses alone. The learning "
    "rate is the one of those tried that served that attacker best against that method, on one "
    "half of the test images (last rows; a rate at which training diverged counts as no right "
    "answer); all else is of the other half. Accuracy is the mean over sets of target classes, "
    "and the spread its 95 % interval over test images: an image adds the share of the sets in "
    "which it is right, these values vary between the images of a class, and the interval is "
    "Wilson's for as many images as give that variance; n counts different images. Each attack "
    "ran once per set; chance of its training and the draw of sets are not in the interval. "
    "From scratch is the same attacker without the exposed half. The paper's figures are set "
    "beside the headline, though it does not say which attacker they are of."
)

_BATCH = 500
# More steps serve an attacker of few samples.
_ATTACKER_BATCH = 32


class Block(NamedTuple):
    """Attacks of one kind.

    Attributes:
      trains: A key of `ATTACKERS`.
      budget: The attacker's samples.
      methods: Which synapses are hidden.
      sets: How many sets of target classes.
    """

    trains: str
    budget: int
    methods: tuple[str, ...]
    sets: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      classes: Target classes in a set.
      images: Training images of each target class that the slices are made of.
      profiled: Training images for the means.
      rates: The attacker's learning rates to choose from.
      tuning: Samples the choice is made with, under the first set of target classes.
      blocks: The attacks, in order.
      epochs: Passes over the attacker's samples.
    """

    classes: int
    images: int
    profiled: int
    rates: tuple[float, ...]
    tuning: int
    blocks: tuple[Block, ...]
    epochs: int = 5


_EVERY = (*METHODS, SCRATCH)
SCHEDULES = {
    "cpu": Schedule(
        4, 100, 5_000, (0.001, 0.01, 0.1), 1_000,
        (
            Block("all", 1_000, _EVERY, 2),
            Block("hidden", 1_000, METHODS, 2),
            Block("all", 5_000, _EVERY, 2),
            Block("hidden", 5_000, METHODS, 2),
            Block("all", 50_000, ("NNSlicer",), 1),
        ),
    ),
    "published": Schedule(
        4, 5_000, 50_000, (0.001, 0.01, 0.1), 2_000,
        tuple(
            Block(trains, budget, _EVERY if trains == "all" else METHODS, 10)
            for budget in (1_000, 5_000, 10_000, 20_000, 50_000)
            for trains in ATTACKERS
        ),
    ),
    "tiny": Schedule(
        3, 20, 200, (0.01, 0.1), 200,
        (
            Block("all", 100, _EVERY, 2),
            Block("hidden", 100, METHODS, 2),
            Block("all", 400, _EVERY, 2),
        ),
    ),
}  # fmt: skip
_PUBLISHED_NETWORK, _PUBLISHED_SHARE, _PUBLISHED_BUDGET = "resnet10_cifar10", 0.5, 50_000
_PUBLISHED: dict[str, str | int] = {
    "NNSlicer": "below 10", "EffectivePath": 90, "Weight": "above 30", "Random": "above 30",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A network to protect.

    Attributes:
      trained: The network, its variables and its card.
      dataset: What it was trained on, with the half of the test images that is reported on.
      choice: The same with the other half, which learning rates are chosen on.
      graph: The traced network.
      initial: Freshly drawn variables.
      samples: Key of the attacker's draw of images.
      random: Key of the method Random.
      share: Of each layer's synapses that are hidden.
      theta: Size of NNSlicer's slices.
      path_theta: Size of the effective paths.
      seed: Of every draw.
    """

    trained: nns.zoo.Trained
    dataset: data.Dataset
    choice: data.Dataset
    graph: nns.Graph
    initial: Any
    samples: jax.Array
    random: jax.Array
    share: float
    theta: float
    path_theta: float
    seed: int


class Outcome(NamedTuple):
    """One attack.

    Attributes:
      method: Which synapses were hidden.
      targets: Target classes, none where the method does not look at them.
      trains: A key of `ATTACKERS`.
      budget: The attacker's samples; 0 before any attack.
      rate: Its learning rate.
      right: Which test images it gets right, packed as `target_classes.packed` does.
    """

    method: str
    targets: tuple[int, ...]
    trains: str
    budget: int
    rate: float
    right: str

    @property
    def correct(self) -> int:
        """How many it gets right."""
        return int(self.right or "0", 16).bit_count()


def prepare(
    model: str, data_dir: str | None, *, seed: int, share: float, theta: float = 0.2,
    path_theta: float = 0.5,
) -> Case:  # fmt: skip
    """Loads a network of the zoo with its data.

    Raises:
      ValueError: For an unknown network, or a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be 0 to 2**32 - 1, not {seed}")
    trained = nns.zoo.load(model)
    dataset = data.load(trained.card["data"], data_dir)
    shape = dataset.train_images.shape[1:]
    # Not the key of the seed itself: the network may have been trained from its draw.
    initial_key, samples, random = jax.random.split(jax.random.key(seed), 3)
    zeros = jnp.zeros((1, *shape), jnp.float32)
    choice, reported = _halves(dataset, seed)
    return Case(
        trained=trained,
        dataset=reported,
        choice=choice,
        graph=nns.trace(trained.model.apply, trained.variables, zeros),
        initial=dict(jax.jit(trained.model.init)(initial_key, zeros)),
        samples=samples,
        random=random,
        share=share,
        theta=theta,
        path_theta=path_theta,
        seed=seed,
    )


def _halves(dataset: data.Dataset, seed: int) -> tuple[data.Dataset, data.Dataset]:
    """The data set with either half of its test images, drawn, as many of each class."""
    order = np.random.default_rng((seed, 1)).permutation(len(dataset.test_labels))
    by_class = order[np.argsort(dataset.test_labels[order], stable=True)]
    one, other = (
        dataset._replace(
            test_images=dataset.test_images[rows], test_labels=dataset.test_labels[rows]
        )
        for rows in (np.sort(by_class[::2]), np.sort(by_class[1::2]))
    )
    return one, other


def class_images(case: Case, targets: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images of the target classes, at most `count` each, as floats; their labels."""
    labels = case.dataset.train_labels
    order = np.random.default_rng(case.seed).permutation(len(labels))
    rows = np.sort(np.concatenate([order[labels[order] == c][:count] for c in targets]))
    return data.to_float(case.dataset.train_images[rows]), labels[rows]


def crucial(
    case: Case, schedule: Schedule, method: str, targets: Sequence[int], folder: Path | None = None
) -> Any:
    """The synapses that a method hides: masks like the network's variables.

    Args:
      case: The network.
      schedule: How many images slices are made of.
      method: One of `METHODS`.
      targets: Target classes; only the methods in `TARGETED` look at them.
      folder: Keeps slices, so that they are made once.

    Raises:
      ValueError: For another method, or target classes that there are not.
    """
    graph, variables = case.graph, case.trained.variables
    if method == "Weight":
        scores = criteria.magnitudes(graph, variables)
    elif method == "Random":
        scores = criteria.random(case.random, graph, variables)
    elif method in TARGETED:
        targets = check_targets(targets, len(case.dataset.classes))
        name = f"slice_{method}_{'-'.join(map(str, targets))}.safetensors"
        path = None if folder is None else folder / name
        if path is not None and path.is_file():
            piece = nns.load_slice(path)
        else:
            piece = _slice(case, schedule, method, targets)
            if path is not None:
                piece.save(path)
        scores = criteria.contributions(graph, variables, piece)
    else:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    return masks.topk(scores, case.share)


def _slice(case: Case, schedule: Schedule, method: str, targets: Sequence[int]) -> nns.Slice:
    graph, variables = case.graph, case.trained.variables
    images, labels = class_images(case, targets, schedule.images)
    if method == "EffectivePath":
        right = _predictions(graph, variables, images) == labels
        return nns.effective_path(graph, variables, images[right], labels[right], case.path_theta)
    order = np.random.default_rng(case.seed).permutation(len(case.dataset.train_labels))
    some = case.dataset.train_images[np.sort(order[: schedule.profiled])]
    profile = nns.profile(graph, variables, data.to_float(some))
    outputs = np.tile(targets, (len(images), 1))
    return nns.slice_network(graph, variables, profile, images, outputs, case.theta)


def options(case: Case, epochs: int, rate: float) -> training.TrainingOptions:
    """How the attacker trains: as the network was, for fewer epochs, in batches not too large."""
    known = training.TrainingOptions(**case.trained.card["training"])
    batch = min(known.batch_size, _ATTACKER_BATCH)
    return dataclasses.replace(
        known, epochs=epochs, learning_rate=rate, seed=case.seed, batch_size=batch
    )


def attack(
    case: Case, chosen: Any, dataset: data.Dataset, how: training.TrainingOptions | None, *,
    trains: str = "all", scratch: bool = False, checkpoint_dir: Path | None = None,
) -> Any:  # fmt: skip
    """Hides synapses and lets the attacker train.

    Args:
      case: The network.
      chosen: Masks of the hidden synapses, from `crucial`.
      dataset: Its training images are the attacker's.
      how: How the attacker trains, from `options`; None: not at all.
      trains: A key of `ATTACKERS`.
      scratch: Give the attacker nothing of the network.
      checkpoint_dir: Keeps the attack's progress.

    Returns:
      The attacker's variables.
    """
    known = case.initial if scratch else case.trained.variables
    variables = protect.hide(known, case.initial, chosen)
    if how is None:
        return variables
    return protect.retrain(
        case.trained.model, variables, chosen, dataset, how, trains=trains,
        checkpoint_dir=checkpoint_dir,
    )  # fmt: skip


def right_answers(graph: nns.Graph, variables: Any, dataset: data.Dataset) -> np.ndarray:
    """Which test images a network gets right, `[N]` bool."""
    labels = dataset.test_labels
    predicted = [
        _predictions(graph, variables, data.to_float(dataset.test_images[i : i + _BATCH]))
        for i in range(0, len(labels), _BATCH)
    ]
    return np.concatenate(predicted) == labels


@functools.partial(jax.jit, static_argnums=0)
def _predict(graph: nns.Graph, variables: Any, images: jax.Array) -> jax.Array:
    return nns.evaluate(graph, variables, images)[0].argmax(1)


def _predictions(graph: nns.Graph, variables: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(_predict(graph, variables, images))


class Study:
    """The runs of a schedule, each kept in a file once it is done."""

    def __init__(
        self, case: Case, schedule: Schedule, folder: Path, targets: Sequence[int] | None = None,
        *, commit: str = "unknown",
    ) -> None:  # fmt: skip
        """Checks the schedule and takes the folder.

        Args:
          case: The network.
          schedule: What is run.
          folder: For finished runs; made if it is missing.
          targets: The one set of target classes, instead of those drawn.
          commit: Revision of the code, which must not change between a run and its going on.

        Raises:
          ValueError: For budgets or target classes out of range, or a folder of another study.
        """
        self.case, self.schedule, self.folder = case, schedule, folder
        self._done = 0
        self._line: Progress | None = None
        classes, count = len(case.dataset.classes), len(case.dataset.train_labels)
        if not schedule.blocks:
            raise ValueError("max_budget leaves no attack of the schedule")
        wanted = max(block.sets for block in schedule.blocks)
        if targets is None:
            self.sets = target_sets(classes, schedule.classes, wanted, case.seed)
        else:
            self.sets = [check_targets(targets, classes)]
        for block in schedule.blocks:
            if not 1 <= block.budget <= count:
                raise ValueError(
                    f"budget must be 1..{count}, the number of training images, not {block.budget}"
                )
        if not 1 <= schedule.tuning <= count:
            raise ValueError(
                f"tuning must be 1..{count}, the number of training images, not {schedule.tuning}"
            )
        card = case.trained.card
        checkpoint.claim(
            folder,
            {
                "network": card["weights_sha256"],
                "data": checkpoint.digest(
                    (case.dataset.train_images, case.dataset.train_labels)
                    + (case.choice.test_images, case.choice.test_labels)
                    + (case.dataset.test_images, case.dataset.test_labels)
                ),
                "data_note": case.dataset.note,
                "seed": case.seed,
                "share": case.share,
                "thetas": [case.theta, case.path_theta],
                "rates": list(schedule.rates),
                **{
                    name: getattr(schedule, name)
                    for name in ("images", "profiled", "tuning", "epochs")
                },
                "commit": commit,
            },
        )

    def run(self) -> tuple[list[Outcome], list[Outcome]]:
        """Runs what is not yet there.

        Returns:
          The attacks that learning rates are chosen by, judged by one half of the test images;
          and those of all blocks, judged by the other, after what there is before any attack.
        """
        case, schedule, trained = self.case, self.schedule, self.case.dataset
        few = protect.samples(case.samples, case.choice, schedule.tuning)
        tuned = [
            self._kept(f"rate_{rate:g}_", few, method, targets, trains, rate)
            for trains, method, targets, rate in self._trials()
        ]
        none = trained._replace(
            train_images=trained.train_images[:0], train_labels=trained.train_labels[:0]
        )
        outcomes = [
            self._kept("", none, method, targets, "all", 0.0)
            for method in METHODS
            for targets in (self.sets if method in TARGETED else [()])
        ]
        for block, method, targets in self._attacks():
            dataset = protect.samples(case.samples, trained, block.budget)
            rate = best_rate(tuned, block.trains, method)
            outcomes.append(self._kept("", dataset, method, targets, block.trains, rate))
        return tuned, outcomes

    def _trials(self) -> Iterator[tuple[str, str, tuple[int, ...], float]]:
        pairs = dict.fromkeys((b.trains, m) for b in self.schedule.blocks for m in b.methods)
        # Runs of one rate share a compiled step.
        for rate in self.schedule.rates:
            for trains, method in pairs:
                yield trains, method, self.sets[0] if method in TARGETED else (), rate

    def _attacks(self) -> Iterator[tuple[Block, str, tuple[int, ...]]]:
        for block in self.schedule.blocks:
            for method in block.methods:
                for targets in self.sets[: block.sets] if method in TARGETED else [()]:
                    yield block, method, targets

    def _kept(
        self, prefix: str, dataset: data.Dataset, method: str, targets: tuple[int, ...],
        trains: str, rate: float,
    ) -> Outcome:  # fmt: skip
        budget = len(dataset.train_labels)
        chosen = "-".join(map(str, targets)) or "any"
        name = f"{prefix}{trains}_{budget}_{method.replace(' ', '')}_{chosen}.json"
        path = self.folder / name
        self._done += self.schedule.epochs * budget
        if path.is_file():
            found = _read(path, len(dataset.test_labels))
            if found.rate != rate:
                raise ValueError(f"{name} is of the learning rate {found.rate}, not {rate}")
            return found
        if self._line is None:
            total = sum(block.budget for block, *_ in self._attacks())
            total += len(list(self._trials())) * self.schedule.tuning
            before = self._done - self.schedule.epochs * budget
            self._line = Progress("attacked with", self.schedule.epochs * total, "images", before)
        start = time.monotonic()
        case, where = self.case, self.folder / "training" / path.stem
        scratch = method == SCRATCH
        source = "Random" if scratch else method
        try:
            variables = attack(
                case,
                crucial(case, self.schedule, source, targets, self.folder),
                dataset,
                options(case, self.schedule.epochs, rate) if budget else None,
                trains=trains,
                scratch=scratch,
                checkpoint_dir=where,
            )
            right = right_answers(case.graph, variables, dataset)
        except FloatingPointError:
            # A rate that is too high is not taken; of the attack itself nothing would be known.
            if not prefix:
                raise
            right = np.zeros(len(dataset.test_labels), bool)
        found = Outcome(method, targets, trains, budget, rate, packed(right))
        record.write_text(path, json.dumps(found._asdict()) + "\n")
        # Only now: a run that is killed in between is not begun again.
        shutil.rmtree(where, ignore_errors=True)
        share = found.correct / len(dataset.test_labels)
        self._line.at(
            self._done,
            f"{path.stem}: {share:.2%} on all classes, {time.monotonic() - start:.0f} s",
        )
        return found


def _read(path: Path, count: int) -> Outcome:
    try:
        content = json.loads(path.read_text())
        found = Outcome(**{**content, "targets": tuple(content["targets"])})
        unpacked(found.right, count)
        return found
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path.name} is not the outcome of an attack; remove it") from None


def best_rate(tuned: Sequence[Outcome], trains: str, method: str) -> float:
    """The learning rate an attacker takes: most right answers, the lowest of equal ones."""
    found = [o for o in tuned if (o.trains, o.method) == (trains, method)]
    return max(sorted(found, key=lambda o: o.rate), key=lambda o: o.correct).rate


def pooled(
    outcomes: Sequence[Outcome], sets: Sequence[Sequence[int]], labels: np.ndarray
) -> tuple[Accuracy, Accuracy]:
    """Accuracy on the target classes and on all, mean over sets.

    Args:
      outcomes: One for each set, or one that stands for all.
      sets: Of target classes.
      labels: Of the test images.
    """
    if len(outcomes) not in (1, len(sets)):
        raise ValueError(f"outcomes must be 1 or {len(sets)}, as many as sets, not {len(outcomes)}")
    right = np.stack([unpacked(o.right, len(labels)) for o in outcomes])
    of_targets = np.stack([np.isin(labels, targets) for targets in sets])
    each = np.broadcast_to(right, of_targets.shape)
    return accuracy(each, of_targets, labels), accuracy(right, np.ones_like(right), labels)


def grouped(
    outcomes: Sequence[Outcome], sets: Sequence[tuple[int, ...]]
) -> dict[tuple[str, int, str], tuple[list[Outcome], list[tuple[int, ...]]]]:
    """Outcomes by attacker, budget and method, with the sets they are about.

    A method that does not look at the targets is about those that the targeted methods of its
    attacker and budget were run with, or all.
    """
    found: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault((outcome.trains, outcome.budget, outcome.method), []).append(outcome)
    about = {}
    for (trains, budget, method), group in found.items():
        known = {
            o.targets for o in outcomes if (o.trains, o.budget) == (trains, budget) and o.targets
        }
        about[trains, budget, method] = (group, [s for s in sets if s in known] or list(sets))
    return about


def common_sets(
    outcomes: Sequence[Outcome], sets: Sequence[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    """The sets of target classes that every targeted method was run with at every budget."""
    known: dict[tuple[str, int, str], set[tuple[int, ...]]] = {}
    for o in outcomes:
        if o.targets:
            known.setdefault((o.trains, o.budget, o.method), set()).add(o.targets)
    return [targets for targets in sets if all(targets in found for found in known.values())]


def rows(
    case: Case,
    sets: Sequence[tuple[int, ...]],
    tuned: Sequence[Outcome],
    outcomes: Sequence[Outcome],
) -> list[dict[str, Any]]:
    """The row fields of the study: row, metric, published, ours, spread, unit, n, note."""
    labels = case.dataset.test_labels
    whole = _unattacked(case)
    found = _pair("the network as it was", pooled([whole], sets, labels), sets, case, "", None)
    for (trains, budget, method), (group, about) in grouped(outcomes, sets).items():
        who = f"{ATTACKERS[trains]}, {budget:,} samples"
        note = f"learning rate {group[0].rate:g}"
        if not budget:
            who, note = "hidden, before any attack", ""
        published = None
        if trains == "all" and _is_published(case, budget):
            published = _PUBLISHED.get(method)
        accuracies = pooled(group, about, labels)
        found += _pair(f"{method}, {who}", accuracies, about, case, note, published)
    count = len(case.choice.test_labels)
    for outcome in tuned:
        best = best_rate(tuned, outcome.trains, outcome.method) == outcome.rate
        found.append(
            {
                "row": f"{outcome.method}, {ATTACKERS[outcome.trains]}, {outcome.budget:,} "
                f"samples, learning rate {outcome.rate:g}",
                "metric": "on all classes, test images to choose by",
                "ours": 100 * outcome.correct / count,
                "spread": tuple(100 * v for v in wilson(outcome.correct / count, count)),
                "unit": "%",
                "n": count,
                "note": "taken against this method" if best else "",
            }
        )
    return found


def _unattacked(case: Case) -> Outcome:
    """The network as it was."""
    right = right_answers(case.graph, case.trained.variables, case.dataset)
    return Outcome("", (), "all", 0, 0.0, packed(right))


def _is_published(case: Case, budget: int) -> bool:
    """Whether the paper has a figure of this."""
    return (
        case.trained.card["name"] == _PUBLISHED_NETWORK
        and case.share == _PUBLISHED_SHARE
        and budget == _PUBLISHED_BUDGET
    )


def _pair(
    row: str, accuracies: tuple[Accuracy, Accuracy], sets: Sequence[Sequence[int]], case: Case,
    note: str, published: str | int | None,
) -> list[dict[str, Any]]:  # fmt: skip
    target, every = accuracies
    names = "; ".join("+".join(case.dataset.classes[c] for c in targets) for targets in sets)
    shares = ", ".join(f"{100 * share:.1f}" for share in target.by_set)
    about = f"targets {names}" + (f": {shares}" if len(sets) > 1 else "")
    fields = []
    for metric, found, said, theirs in (
        ("on the target classes", target, [note, about], published),
        ("on all classes", every, [note], None),
    ):
        fields.append(
            {
                "row": row,
                "metric": metric,
                "published": theirs,
                "ours": found.percent,
                "spread": found.percents,
                "unit": "%",
                "n": found.images,
                "note": ", ".join(part for part in said if part),
            }
        )
    return fields


def figure(
    case: Case, sets: Sequence[tuple[int, ...]], outcomes: Sequence[Outcome], trains: str
) -> Figure:
    """An attacker's accuracy against its budget, on the target classes and on all.

    A curve is of the same sets of target classes throughout: those of every budget.
    """
    labels = case.dataset.test_labels
    whole = _unattacked(case)
    run = [o for o in outcomes if o.trains == trains and o.budget]
    common = common_sets(run, sets)
    groups = grouped([o for o in run if not o.targets or o.targets in common], common)
    count = f"{len(common)} set{'s' * (len(common) > 1)}"
    drawn = Figure(figsize=(9, 4.4), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    titles = f"On the target classes, {count}", "On all classes"
    for panel, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        methods = [m for m in _EVERY if any(method == m for *_, method in groups)]
        for place, method in enumerate(methods):
            points = sorted(
                (budget, pooled(*about, labels)[panel])
                for (_, budget, m), about in groups.items()
                if m == method
            )
            budgets = [budget for budget, _ in points]
            means = [accuracy.percent for _, accuracy in points]
            spans = np.array([accuracy.percents for _, accuracy in points]).T
            ax.errorbar(
                budgets, means, yerr=np.abs(spans - means), color=page.COLOURS[place],
                marker=page.MARKERS[place], capsize=3, label=method,
                linestyle="--" if method == SCRATCH else "-",
            )  # fmt: skip
        level = pooled([whole], common, labels)[panel].percent
        ax.axhline(level, color="#000000", linestyle=":", label="the network as it was")
        ax.set(xscale="log", xlabel="attacker's samples", ylim=(0, 102), title=title)
        every = sorted({budget for _, budget, _ in groups})
        ax.set_xticks(every, [f"{budget:,}" for budget in every])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel(f"attacker's accuracy, % ({ATTACKERS[trains]})")
    handles, names = axes[0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def save_figures(
    case: Case, sets: Sequence[tuple[int, ...]], outcomes: Sequence[Outcome], folder: Path
) -> list[Path]:
    """Writes one picture an attacker."""
    paths = []
    for trains in ATTACKERS:
        if any(o.trains == trains and o.budget for o in outcomes):
            paths.append(folder / f"model_protection_{trains}.png")
            with replacing(paths[-1]) as partial:
                figure(case, sets, outcomes, trains).savefig(partial, format="png", dpi=160)
    return paths


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    schedule = SCHEDULES[given.schedule or ("tiny" if given.model == "digits_cnn" else "cpu")]
    if given.max_budget is not None:
        fewer = tuple(block for block in schedule.blocks if block.budget <= given.max_budget)
        schedule = dataclasses.replace(schedule, blocks=fewer)
    folder = Path(given.folder or f"out/model_protection/{given.model}")
    try:
        targets = None if given.targets is None else _classes(given.targets)
        case = prepare(given.model, given.data_dir, seed=given.seed, share=given.share)
        # Of the code that ran, should it change on the way.
        about = origin(data=_data(case), seeds=[case.seed])
        study = Study(case, schedule, folder, targets, commit=about["commit"])
        tuned, outcomes = study.run()
        fields = rows(case, study.sets, tuned, outcomes)
        for row in fields:
            published = "" if row.get("published") is None else f" (published {row['published']})"
            print(f"{row['row']}, {row['metric']}: {row['ours']:.2f} %{published}")
        for path in save_figures(case, study.sets, outcomes, Path(given.figures or folder)):
            print(f"wrote {path.name}")
        if given.out:
            made = tuple(record.Row(study="model_protection", **row, **about) for row in fields)
            record.write(given.out, record.Record(title=TITLE, text=TEXT, rows=made))
            print(f"wrote {Path(given.out).name}; python -m experiments.report renders it")
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def _classes(words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(f"targets must be class numbers, not {', '.join(words)}") from None


def _data(case: Case) -> str:
    dataset = case.dataset
    note = f" ({dataset.note})" if dataset.note else ""
    return (
        f"{dataset.name}: attackers draw from the {len(dataset.train_labels):,} training images, "
        f"accuracy on {len(dataset.test_labels):,} test images, learning rates chosen on the "
        f"other {len(case.choice.test_labels):,}{note}"
    )


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("model", "resnet10_cifar10", "network of the zoo to protect")
    flags.DEFINE_enum("schedule", None, sorted(SCHEDULES), "cpu, or tiny for digits_cnn, if unset")
    flags.DEFINE_integer("max_budget", None, "leave out the schedule's attacks of more samples")
    flags.DEFINE_float("share", 0.5, "of each layer's synapses that are hidden")
    flags.DEFINE_list("targets", None, "the one set of target classes, instead of those drawn")
    flags.DEFINE_integer("seed", 0, "of every draw")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    flags.DEFINE_string("folder", None, "keeps finished runs; out/model_protection/ if unset")
    flags.DEFINE_string("figures", None, "folder for the pictures; that of the runs if unset")
    results = ROOT / "experiments" / "results" / "model_protection.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
