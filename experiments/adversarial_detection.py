"""Adversarial inputs detected by their slices (Zhang et al., ESEC/FSE 2020, first application).

Reproduces the table of seventeen attacks on ResNet-10 and CIFAR-10: a decision tree learns from
features of normal training images which class the network predicts; an image is flagged where the
tree disagrees with the network. Features: slices (NNSlicer), effective paths (Qiu et al., CVPR
2019), and the activations of the convolutions (FeatureMap). Attacked are test images that the
network gets right, drawn at random; the images that an attack succeeds on are judged beside their
originals.

What the paper leaves open, and how it is read here: the class a slice is made for, and the one the
tree learns, is the network's prediction. The synapses of the last layer then name that class, in
training as under attack, so that a tree that may look at them can but agree with the network.
Beside it stand features without the last layer and of the first half of the layers, random
forests, the network's own confidence, and slices of adversarial images made for their true class,
which no detector knows but which come close to the paper's recall and precision.

Beyond the paper: false alarms on clean test images, intervals, and an attacker who knows of the
detector (`interpret/feature_adversary.py`).

Schedules: `cpu` takes two cores about 75 minutes: 10,000 training images, 500 attacked, 4,000
features, attacks with fewer steps (`attack_steps`). `published`: 20,000 features and the attacks'
defaults. A run that was cut off goes on where it was; what it keeps takes 13 GB under
`--schedule cpu`.
"""

import functools
import json
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from sklearn.metrics import roc_auc_score

import nnslicer_jax as nns
from experiments import adversarial_detection_figures as figures
from experiments import record
from experiments.attack_steps import FEWER_STEPS
from experiments.bench_slicing import peak_bytes
from experiments.provenance import ROOT, origin
from interpret import detect, features
from interpret.feature_adversary import feature_adversary
from nnslicer_jax import attacks, data
from nnslicer_jax.atomic import replacing
from nnslicer_jax.batches import filled
from nnslicer_jax.checkpoint import claim, digest

TITLE = "Adversarial inputs detected by slices"


class Schedule(NamedTuple):
    """How much is run.

    Attributes:
      train: Training images that the classifiers learn from.
      images: Images attacked.
      columns: Features selected, at most.
      steps: Options of attacks in place of their defaults.
      oracle: Attacks whose images are also sliced for their true class.
      classless: Whether detectors by slices of all outputs at once are tried.
    """

    train: int
    images: int
    columns: int
    steps: Mapping[str, Mapping[str, Any]]
    oracle: tuple[str, ...]
    classless: bool


SCHEDULES = {
    "cpu": Schedule(10_000, 500, 4_000, FEWER_STEPS, ("FGSM 8", "DeepFool L2", "Spatial"), False),
    "published": Schedule(10_000, 500, 20_000, {}, tuple(attacks.ATTACKS), True),
}

METHODS = ("NNSlicer", "EffectivePath", "FeatureMap")
# Slices made for all outputs at once, which name no class; the paper has none.
CLASSLESS = "NNSlicer of all outputs"
# Those whose features are made for a class.
_WITH_CRITERION = METHODS[:2]
# Precision of each method; recall is 1.00 but for FeatureMap, where it stands beside.
PUBLISHED: Mapping[str, Mapping[str, tuple[float, float]]] = {
    name: {"EffectivePath": (path, 1.0), "FeatureMap": maps, "NNSlicer": (sliced, 1.0)}
    for name, path, maps, sliced in (
        ("FGSM 2", 0.69, (0.58, 0.53), 0.82),
        ("FGSM 4", 0.56, (0.60, 0.52), 0.84),
        ("FGSM 8", 0.79, (0.62, 0.55), 0.84),
        ("DeepFool Linf", 0.64, (0.68, 0.68), 0.85),
        ("DeepFool L2", 0.64, (0.68, 0.66), 0.85),
        ("JSMA", 0.69, (0.67, 0.66), 0.85),
        ("RPGD 2", 0.64, (0.63, 0.56), 0.84),
        ("RPGD 4", 0.69, (0.62, 0.50), 0.85),
        ("RPGD 8", 0.60, (0.62, 0.50), 0.85),
        ("CW L2", 0.64, (0.68, 0.66), 0.85),
        ("ADef", 0.73, (0.67, 0.66), 0.84),
        ("SinglePixel", 0.50, (0.44, 0.64), 0.65),
        ("LocalSearch", 0.71, (0.67, 0.68), 0.84),
        ("Boundary", 0.69, (0.69, 0.70), 0.85),
        ("Spatial", 0.64, (0.56, 0.64), 0.77),
        ("PointWise", 0.76, (0.69, 0.69), 0.85),
        ("GaussianBlur", 0.76, (0.68, 0.70), 0.85),
    )
}
# What the paper's figures are of.
_PUBLISHED_NETWORK = "resnet10_cifar10"
# Precision, recall, F1.
PUBLISHED_AVERAGES = {
    "EffectivePath": (0.67, 1.00, 0.80),
    "FeatureMap": (0.63, 0.62, 0.62),
    "NNSlicer": (0.83, 1.00, 0.91),
}

THETA = 0.2
# Keeps the process below 2 GiB.
_BATCH = 32
# The set that classifiers learn from.
_TRAIN = "train"


class Setup(NamedTuple):
    """The network, its data, and the images drawn.

    Attributes:
      name: Of the network in the zoo.
      apply: `apply(params, images) -> logits`.
      params: Its parameters.
      graph: The traced network.
      profile: Mean activations over the training images drawn.
      train: `[N, H, W, C]` float32, 0..1: normal images to learn from.
      train_predicted: `[N]` the network's classes of them.
      clean: `[M, H, W, C]`: test images in the order drawn, right and wrong, up to as many right
        ones as are attacked.
      labels: `[M]` their true classes.
      probabilities: `[M, K]` the network's softmax of them.
      data: Data set and split, in words.
    """

    name: str
    apply: Callable
    params: Any
    graph: nns.Graph
    profile: nns.Profile
    train: np.ndarray
    train_predicted: np.ndarray
    clean: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    data: str

    @property
    def predicted(self) -> np.ndarray:
        """`[M]` the network's classes of the clean test images."""
        return self.probabilities.argmax(1)

    @property
    def right(self) -> np.ndarray:
        """Which clean images the network gets right, and so are attacked: indices."""
        return np.flatnonzero(self.predicted == self.labels)


def prepare(model: str, data_dir: str | None, schedule: Schedule, seed: int) -> Setup:
    """Loads the network, draws the images and profiles those to learn from.

    Raises:
      ValueError: If there are fewer images than the schedule takes.
    """
    trained = nns.zoo.load(model)
    apply, params = trained.model.apply, trained.variables
    found = data.load(trained.card["data"], data_dir)
    draw = np.random.default_rng(seed)
    if len(found.train_labels) < schedule.train:
        raise ValueError(
            f"the schedule takes {schedule.train} training images, {found.name} has "
            f"{len(found.train_labels)}"
        )
    chosen = np.sort(draw.permutation(len(found.train_labels))[: schedule.train])
    train = data.to_float(np.asarray(found.train_images[chosen]))
    order = draw.permutation(len(found.test_labels))
    test = data.to_float(np.asarray(found.test_images[order]))
    labels = np.asarray(found.test_labels)[order].astype(np.int32)
    probabilities = softmax(apply, params, test)
    right = np.flatnonzero(probabilities.argmax(1) == labels)
    if len(right) < schedule.images:
        raise ValueError(
            f"the schedule attacks {schedule.images} test images, {model} gets {len(right)} right"
        )
    stop = right[schedule.images - 1] + 1
    graph = nns.trace(apply, params, train[:1])
    note = f" ({found.note})" if found.note else ""
    return Setup(
        name=model,
        apply=apply,
        params=params,
        graph=graph,
        profile=nns.profile(graph, params, train),
        train=train,
        train_predicted=softmax(apply, params, train).argmax(1),
        clean=test[:stop].copy(),
        labels=labels[:stop],
        probabilities=probabilities[:stop],
        data=f"{found.name}: {len(train):,} training images, {schedule.images} test images that "
        f"the network gets right among the {stop} drawn{note}",
    )


def softmax(apply: Callable, params: Any, images: np.ndarray) -> np.ndarray:
    """The network's probabilities `[N, K]`, batch by batch in one compiled program."""
    found = [
        np.asarray(_softmax(apply, params, images[which]))
        for which in filled(len(images), min(256, len(images)))
    ]
    return np.concatenate(found)[: len(images)]


@functools.partial(jax.jit, static_argnums=0)
def _softmax(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(apply(params, images))


class Attacked(NamedTuple):
    """The images that an attack succeeded on.

    Attributes:
      images: `[S, H, W, C]` float32.
      which: `[S]` the clean image each was made of.
      probabilities: `[S, K]` the network's softmax of them.
    """

    images: np.ndarray
    which: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`[S]` the network's classes, none the true one."""
        return self.probabilities.argmax(1)


class Cost(NamedTuple):
    """What a stage cost; of one that was cut off, all runs that made a part of it.

    Attributes:
      row: What it is reported under, alone or with others.
      seconds: Time taken.
      images: How many images that was for.
      whole: How many images the stage is of.
      peak_mib: Greatest resident set of the process until the stage's end, MiB.
    """

    row: str
    seconds: float
    images: int
    whole: int
    peak_mib: float

    def and_then(self, later: "Cost") -> "Cost":
        """With another part of the same stage."""
        return self.beside(later)._replace(whole=later.whole)

    def beside(self, other: "Cost") -> "Cost":
        """With another stage."""
        return Cost(
            self.row, self.seconds + other.seconds, self.images + other.images,
            self.whole + other.whole, max(self.peak_mib, other.peak_mib),
        )  # fmt: skip

    @property
    def total(self) -> float:
        """Seconds for all images, at the pace of those that were timed."""
        return self.seconds * self.whole / self.images

    @property
    def caveat(self) -> str:
        """What a reader has to know of `total`."""
        if self.images == self.whole:
            return ""
        return f"; at the pace of the {self.images:,} images that were timed"


def _peak() -> float:
    return peak_bytes() / 2**20


class Study:
    """A run in a folder: every stage is made once, and read back when it is there.

    Stages may be made by several revisions of the code, which the folder lists; by other weights,
    images or options they are not read back.

    Attributes:
      setup: The network and its images.
      schedule: How much is run.
      seed: Of every draw.
      folder: Where the stages are.
      commit: The revision of the code that runs.
      detectors: Those tried.
    """

    def __init__(
        self, setup: Setup, schedule: Schedule, seed: int, folder: Path, commit: str
    ) -> None:
        self.setup, self.schedule, self.seed, self.folder = setup, schedule, seed, folder
        self.commit = commit
        self._attacked: dict[str, Attacked] = {}
        claim(
            folder,
            {
                "model": setup.name, "weights": digest(setup.params), "data": setup.data,
                "sets": digest((setup.train, setup.clean, np.asarray(setup.labels, "<i8"))),
                "train": schedule.train, "images": schedule.images, "columns": schedule.columns,
                "theta": THETA, "seed": seed,
            },
        )  # fmt: skip
        self.detectors = DETECTORS + (CLASSLESS_DETECTORS if schedule.classless else ())
        graph, params, profile = setup.graph, setup.params, setup.profile
        self.extract: Mapping[str, features.Extract] = {
            "NNSlicer": features.slices(graph, params, profile, theta=THETA, batch_size=_BATCH),
            CLASSLESS: functools.partial(
                _for_all_outputs,
                features.slices(graph, params, profile, theta=THETA, batch_size=_BATCH),
                setup.probabilities.shape[1],
            ),
            "EffectivePath": features.paths(graph, params, batch_size=_BATCH),
            "FeatureMap": features.maps(
                graph, params, features.convolutions(graph), batch_size=_BATCH
            ),
        }

    @contextmanager
    def timed(self, stage: str, images: int) -> Iterator[None]:
        """Notes what a stage costs that a run makes in one go or from the start."""
        start = time.monotonic()
        yield
        self._note(stage, Cost(stage, time.monotonic() - start, images, images, _peak()))

    def _note(self, stage: str, cost: Cost) -> None:
        costs = {name: one._asdict() for name, one in (self.costs() | {stage: cost}).items()}
        record.write_text(self.folder / "costs.json", json.dumps(costs, indent=1) + "\n")
        if self.commit not in (known := self.commits()):
            commits = json.dumps([*known, self.commit], indent=1)
            record.write_text(self.folder / "commits.json", commits + "\n")
        if cost.images >= cost.whole:
            print(
                f"{stage}: {cost.seconds:,.0f} s, peak {cost.peak_mib:,.0f} MiB",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def costs(self) -> dict[str, Cost]:
        """What each stage cost, over all runs that made some of it."""
        path = self.folder / "costs.json"
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
            return {stage: Cost(**cost) for stage, cost in found.items()}
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}: not the costs of a run's stages, delete it") from None

    def commits(self) -> list[str]:
        """The revisions of the code that made the stages, in the order of their runs."""
        path = self.folder / "commits.json"
        return json.loads(path.read_text()) if path.exists() else []

    def attacked(self, name: str) -> Attacked:
        """The images that an attack succeeds on."""
        if name not in self._attacked:
            self._attacked[name] = self._attack(name)
        return self._attacked[name]

    def _attack(self, name: str) -> Attacked:
        setup, options = self.setup, dict(self.schedule.steps.get(name, {}))
        folder = self.folder / "attacks" / _slug(name)
        attacked, labels = setup.clean[setup.right], setup.labels[setup.right]
        made_of = digest((attacked, np.asarray(labels, "<i8")))
        claim(folder, {"attack": name, "options": options, "made_of": made_of})
        path = folder / "images.npy"
        if not path.exists():
            with self.timed(f"attack {name}", len(attacked)):
                result = attacks.ATTACKS[name](
                    jax.random.key(self.seed), setup.apply, setup.params, attacked, labels,
                    **options,
                )  # fmt: skip
                _save(path, np.asarray(result.images))
        images = np.load(path, allow_pickle=False)
        probabilities = softmax(setup.apply, setup.params, images)
        fooled = probabilities.argmax(1) != labels
        return Attacked(images[fooled], setup.right[fooled], probabilities[fooled])

    def extracted(
        self, method: str, name: str, images: np.ndarray, outputs: np.ndarray
    ) -> features.Features:
        """Features of a set of images for the classes given."""
        folder = self.folder / "features" / _slug(method) / _slug(name)
        stage = f"{method} of {name}"
        row = stage if name == _TRAIN else f"{method} of images judged"
        start = time.monotonic()

        def made(count: int) -> None:
            nonlocal start
            now = time.monotonic()
            cost = Cost(row, now - start, count, len(images), _peak())
            if stage in (known := self.costs()):
                cost = known[stage].and_then(cost)
            self._note(stage, cost)
            start = now

        return features.write(
            folder, images, outputs, self.extract[method], {"method": method}, progress=stage,
            made=made,
        )  # fmt: skip

    def train(self, method: str) -> features.Features:
        """Features of the training images for the network's classes."""
        return self.extracted(method, _TRAIN, self.setup.train, self.setup.train_predicted)

    def columns(self, method: str, layers: str) -> np.ndarray:
        """The columns of some layers that a classifier is given."""
        train = self.train(method)
        path = self.folder / "features" / _slug(method) / "dependence.npy"
        if not path.exists():
            with self.timed(f"{method}: selection", len(train)):
                statistic = detect.dependence(
                    train.parts(), self.setup.train_predicted, train.width
                )
                _save(path, statistic)
        among = allowed(self.setup.graph, train.spans, layers)
        statistic = np.load(path, allow_pickle=False)
        return detect.most_dependent(statistic, self.schedule.columns, among)


def _for_all_outputs(
    extract: features.Extract, classes: int, images: np.ndarray, outputs: np.ndarray
) -> features.Table:
    """Extracts what is made for every class at once; the given ones are not looked at."""
    return extract(images, np.tile(np.arange(classes), (len(images), 1)))


def _slug(name: str) -> str:
    return name.lower().replace(" ", "_").replace("/", "_")


def _save(path: Path, array: np.ndarray) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.save(file, array)


# Layers a classifier may look at.
ALL, NOT_LAST, FIRST_HALF = "all layers", "without the last layer", "first half of the layers"
# The detector as published, and what stands beside it.
PAPER = (ALL, "tree")
VARIANTS = (
    PAPER,
    (NOT_LAST, "tree"),
    (FIRST_HALF, "tree"),
    (ALL, "forest"),
    (FIRST_HALF, "forest"),
)


class Detector(NamedTuple):
    """What flags an image: a classifier of some features.

    Attributes:
      method: One of `METHODS`, or `CLASSLESS`.
      layers: Whose features: `ALL`, `NOT_LAST` or `FIRST_HALF`.
      classifier: One of `detect.CLASSIFIERS`.
    """

    method: str
    layers: str = ALL
    classifier: str = "tree"

    def __str__(self) -> str:
        return f"{self.method}, {self.classifier}, {self.layers}"

    @property
    def as_published(self) -> bool:
        """Whether it is the paper's way."""
        return (self.layers, self.classifier) == PAPER


# Feature maps are those of the convolutions, which the last layer is not.
DETECTORS = tuple(
    Detector(method, *variant)
    for method in METHODS
    for variant in VARIANTS
    if (method, variant[0]) != ("FeatureMap", NOT_LAST)
)
CLASSLESS_DETECTORS = (Detector(CLASSLESS, *PAPER), Detector(CLASSLESS, ALL, "forest"))


def allowed(graph: nns.Graph, spans: Mapping[str, tuple[int, int]], layers: str) -> np.ndarray:
    """Which columns belong to some layers, `[F]` bool; `layers` as in `Detector`."""
    deep = features.depths(graph)
    if layers == ALL:
        chosen = set(spans)
    elif layers == NOT_LAST:
        last = max(deep[name] for name in spans)
        chosen = {name for name in spans if deep[name] < last}
    else:
        half = features.halfway(graph)
        chosen = {name for name in spans if deep[name] < half}
    among = np.zeros(max(stop for _, stop in spans.values()), bool)
    for name in chosen:
        first, stop = spans[name]
        among[first:stop] = True
    return among


class Judged(NamedTuple):
    """A set of images with what detectors are to compare with.

    Attributes:
      images: `[N, H, W, C]`.
      outputs: `[N]` the classes that slices are made for.
      predicted: `[N]` the network's classes.
      mark: Digest of all three.
    """

    images: np.ndarray
    outputs: np.ndarray
    predicted: np.ndarray
    mark: str


def marked(images: np.ndarray, outputs: np.ndarray, predicted: np.ndarray) -> Judged:
    """A set of images with its digest."""
    mark = digest((images, np.asarray(outputs, "<i8"), np.asarray(predicted, "<i8")))
    return Judged(images, outputs, predicted, mark)


def judged_sets(study: Study) -> dict[str, Judged]:
    """Every set that the published way judges: clean images and each attack's, if any."""
    setup = study.setup
    sets = {"clean": marked(setup.clean, setup.predicted, setup.predicted)}
    for name in attacks.ATTACKS:
        found = study.attacked(name)
        if len(found.images):
            sets[name] = marked(found.images, found.predicted, found.predicted)
    return sets


def true_class_sets(study: Study) -> dict[str, Judged]:
    """Sets sliced for their true class, which the network may not predict."""
    setup = study.setup
    sets = {"clean": marked(setup.clean, setup.labels, setup.predicted)}
    for name in study.schedule.oracle:
        found = study.attacked(name)
        if len(found.images):
            sets[name] = marked(found.images, setup.labels[found.which], found.predicted)
    return {f"{name}, true class": known for name, known in sets.items()}


def verdicts(
    study: Study, detector: Detector, sets: Mapping[str, Judged]
) -> dict[str, detect.Verdict]:
    """What a detector says of every image of some sets."""
    folder = study.folder / "verdicts" / _slug(str(detector).replace(",", ""))
    paths = {name: folder / f"{_slug(name)}.npz" for name in sets}
    said = {name: _read_verdict(paths[name], found.mark) for name, found in sets.items()}
    missing = [name for name, verdict in said.items() if verdict is None]
    if missing:
        columns = study.columns(detector.method, detector.layers)
        train = study.train(detector.method)
        with study.timed(f"{detector}: training", len(train)):
            classifier = detect.fit(
                train.take(columns), study.setup.train_predicted,
                classifier=detector.classifier, seed=study.seed,
            )  # fmt: skip
        for name in missing:
            images, outputs, predicted, mark = sets[name]
            found = study.extracted(detector.method, name, images, outputs)
            verdict = detect.judge(classifier, found.take(columns), predicted)
            said[name] = verdict
            with replacing(paths[name]) as partial, partial.open("wb") as file:
                np.savez(file, flags=verdict.flags, score=verdict.score, mark=np.array(mark))
    return {name: verdict for name, verdict in said.items() if verdict is not None}


def _read_verdict(path: Path, mark: str) -> detect.Verdict | None:
    """A verdict that was kept; None if there is none on just these images."""
    try:
        # NumPy leaves a file open that it cannot read.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            if str(file["mark"]) != mark:
                return None
            return detect.Verdict(file["flags"], file["score"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


Fields = dict[str, Any]
_NONE_FOOLED = "the attack fooled the network on no image"


def attack_rows(study: Study) -> list[Fields]:
    """The averages of every detector, then each attack and method as published."""
    sets = judged_sets(study)
    rows: list[Fields] = []
    averages: list[Fields] = []
    for name in attacks.ATTACKS:
        count = len(sets[name].images) if name in sets else 0
        tried = len(study.setup.right)
        note = f"of {tried} attacked"
        rows.append(
            {"row": name, "metric": "images fooled", "ours": count, "n": tried, "note": note}
        )
    for detector in study.detectors:
        said = verdicts(study, detector, sets)
        found = {}
        for name in attacks.ATTACKS:
            normal = adversarial = detect.Verdict(np.empty(0, bool), np.empty(0))
            if name in sets:
                which = study.attacked(name).which
                normal, adversarial = detect.some(said["clean"], which), said[name]
            found[name] = detect.measure(normal, adversarial)
            if detector.as_published:
                rows += _measured(
                    f"{name}, {detector.method}", normal, adversarial, study.seed,
                    _published(study, name, detector.method),
                )  # fmt: skip
        known = _published(study, None, detector.method) if detector.as_published else ()
        averages += _averages(detector, found, known)
    return [*averages, *rows]


def _published(study: Study, attack: str | None, method: str) -> tuple[float, ...]:
    """The paper's figures of a method, for an attack or on average; none for other networks."""
    if study.setup.name != _PUBLISHED_NETWORK:
        return ()
    return (PUBLISHED_AVERAGES if attack is None else PUBLISHED[attack]).get(method, ())


def _measured(
    row: str, normal: detect.Verdict, adversarial: detect.Verdict, seed: int,
    published: Sequence[float],
) -> list[Fields]:  # fmt: skip
    found = detect.measure(normal, adversarial)
    spread = detect.intervals(normal, adversarial, seed=seed)
    count = len(adversarial.flags)
    # Whether each image counts for the measure, of those it is a share of.
    shares = {
        "precision": np.repeat([True, False], [adversarial.flags.sum(), normal.flags.sum()]),
        "recall": adversarial.flags,
    }
    rows = []
    # Empty for a method that the paper does not have.
    known = dict(zip(("precision", "recall"), published, strict=False))
    for metric, ours, interval in zip(found._fields, found, spread, strict=True):
        fields = {"row": row, "metric": metric, "ours": ours, "n": count, "spread": interval}
        if metric in shares and ours is not None:
            fields["n"] = len(shares[metric])
        if ours in (0, 1):
            # Images drawn anew are all alike.
            fields["spread"] = detect.rate(shares[metric])[1] if metric in shares else None
        if metric in known:
            fields["published"] = known[metric]
        if ours is None:
            fields |= {"spread": None, "note": "nothing was flagged" if count else _NONE_FOOLED}
        rows.append(fields)
    return rows


def _averages(
    detector: Detector, found: Mapping[str, detect.Measures], known: Sequence[float]
) -> list[Fields]:
    rows = []
    for at, metric in enumerate(detect.Measures._fields):
        values = [measures[at] for measures in found.values() if measures[at] is not None]
        # Recall is defined wherever the attack fooled the network.
        harmless = sum(measures.recall is None for measures in found.values())
        rows.append(
            {
                "row": f"average, {detector}", "metric": metric,
                "ours": float(np.mean(values)) if values else None,
                "published": known[at] if at < len(known) else None,
                "n": len(values),
                "note": _over(len(values), len(found) - len(values) - harmless, harmless),
            }
        )  # fmt: skip
    return rows


def _over(defined: int, quiet: int, harmless: int) -> str:
    """Over how many attacks an average is, and why not over all."""
    said = f"over {_attacks(defined)}"
    if quiet:
        said += f"; undefined for {_attacks(quiet)}, where nothing was flagged"
    if harmless:
        said += f"; undefined for {_attacks(harmless)} that fooled the network on no image"
    return said


def _attacks(count: int) -> str:
    return f"{count} attack{'' if count == 1 else 's'}"


def confidence_rows(study: Study) -> list[Fields]:
    """AUROC of 1 - the network's own probability of its class: what detectors have to beat."""
    clean = 1 - study.setup.probabilities.max(1)
    values = []
    for name in attacks.ATTACKS:
        found = study.attacked(name)
        if len(found.images):
            scores = np.concatenate([clean[found.which], 1 - found.probabilities.max(1)])
            values.append(roc_auc_score(np.repeat([0, 1], len(found.images)), scores))
    return [
        {
            "row": "average, the network's own confidence", "metric": "auroc",
            "ours": float(np.mean(values)) if values else None, "n": len(values),
            "note": _over(len(values), 0, len(attacks.ATTACKS) - len(values)),
        }
    ]  # fmt: skip


def alarm_rows(study: Study) -> list[Fields]:
    """False alarms on clean test images, with exact binomial intervals."""
    right = study.setup.predicted == study.setup.labels
    sets = {"clean": judged_sets(study)["clean"]}
    rows = []
    for detector in study.detectors:
        flags = verdicts(study, detector, sets)["clean"].flags
        kinds = {"clean test images": np.ones(len(right), bool)}
        if detector.as_published:
            kinds |= {"those predicted rightly": right, "those predicted wrongly": ~right}
        for kind, which in kinds.items():
            fields: Fields = {"row": str(detector), "metric": f"flagged of {kind}"}
            if which.any():
                share, spread = detect.rate(flags[which])
                fields |= {"ours": share, "spread": spread, "n": int(which.sum())}
            else:
                fields |= {"ours": None, "n": 0, "note": "there are none"}
            rows.append(fields)
    return rows


def true_class_rows(study: Study) -> list[Fields]:
    """Slices made for the true class, as no detector can: what a leak of it does."""
    sets, setup = true_class_sets(study), study.setup
    rows: list[Fields] = []
    for method in _WITH_CRITERION:
        said = verdicts(study, Detector(method), sets)
        clean = said["clean, true class"]
        alarms, _ = detect.rate(clean.flags)
        for name in study.schedule.oracle:
            row = f"{name}, {method} for the true class"
            if f"{name}, true class" not in said:
                rows.append({"row": row, "metric": "recall", "ours": None, "note": _NONE_FOOLED})
                continue
            adversarial = said[f"{name}, true class"]
            normal = detect.some(clean, study.attacked(name).which)
            published = _published(study, name, method)
            precision, recall, *_ = _measured(row, normal, adversarial, study.seed, published)
            precision.setdefault("note", "beside their originals")
            share, wrong = recall["ours"], len(clean.flags) - len(setup.right)
            drawn = {
                "row": row, "metric": "precision beside clean images",
                "n": len(adversarial.flags),
                "ours": share / (share + alarms) if share + alarms else None,
                "published": precision.get("published"),
                "note": f"beside as many of all {len(clean.flags)} clean images drawn, of which "
                f"the network gets {wrong} wrong" if share + alarms else "nothing was flagged",
            }  # fmt: skip
            rows += [recall, precision, drawn]
    return rows


class Adaptive(NamedTuple):
    """What the attacker who knows of the detector tries.

    Attributes:
      images: Clean images attacked, of those that the network gets right.
      guides: Normal images of another class that each is made to resemble, one after the other.
      eps: Budgets, in 256ths of the pixel range.
      steps: Gradient steps.
    """

    images: int
    guides: int
    eps: tuple[int, ...]
    steps: int


ADAPTIVE = {
    "cpu": Adaptive(100, 4, (8, 16, 32), 60),
    "published": Adaptive(500, 8, (8, 16, 32), 200),
}


_ABOUT_CLASSLESS = (
    "`NNSlicer of all outputs` stands for slices made for all outputs at once, which name no "
    "class; the paper has none. "
)


def text(schedule: Schedule, adaptive: Adaptive) -> str:
    """What a reader needs beside the table."""
    fewer = "; ".join(
        f"{name} {', '.join(f'{option} {value:g}' for option, value in options.items())}"
        for name, options in schedule.steps.items()
    )
    return (
        "An image is flagged where a classifier of its features, trained on normal images, "
        "disagrees with the network. Judged are the images that an attack succeeds on beside "
        "their originals, all of which the network gets right. "
        f"Attacks run with {f'fewer steps than their defaults ({fewer})' if fewer else 'defaults'}"
        ". The class that a slice is made for, and the one that a classifier learns, is the "
        "network's prediction throughout; the first rows of each method are the published way, a "
        f"decision tree on all layers. Of the layers named, a classifier is given the "
        f"k = {schedule.columns:,} features that depend most on the class, at most. A slice made "
        "for a class names it in the last layer's synapses, so a tree that sees them agrees with "
        f"the network under attack as well. {_ABOUT_CLASSLESS if schedule.classless else ''}Rows "
        "`for the true class` judge images sliced for their true class instead, which no detector "
        "knows: beside their originals, and beside clean images drawn at random, which hold some "
        "that the network gets wrong. How the paper did it is not known here. A single tree's "
        "leaves are pure: its score is 0 or 1, and its AUROC that of one point. The network's own "
        "confidence is 1 - its probability of the predicted class. The feature adversary knows of "
        "the detectors: it moves an image to where its activations are those of a normal image of "
        f"another class, in {adaptive.steps} steps, and succeeds if it does so for one of "
        f"{adaptive.guides} such images. Averages are over the attacks for which the measure is "
        "defined. Spreads are 95 % intervals: over images drawn anew for precision, recall, F1 "
        "and AUROC; exact binomial for other shares, and for precision and recall of 0 or 1. Of "
        "precision n counts the images flagged, of the rest those that fool the network. Times of "
        "features are summed over the runs that made them, those of other stages are of the run "
        "that ended them; peaks are the process's up to their end, with all that it made before."
    )


def adversary_name(eps: int) -> str:
    """What the adaptive attacker of a budget is called."""
    return f"feature adversary, eps {eps}/256"


def adaptive_set(study: Study, adaptive: Adaptive, eps: int) -> tuple[np.ndarray, Judged]:
    """Candidates of the adaptive attacker: which image each is of, and all as a set.

    Each guide is a training image of the class that the network finds second likeliest for the
    image, drawn at random.
    """
    setup = study.setup
    which = np.repeat(setup.right[: adaptive.images], adaptive.guides)
    wanted = np.argsort(setup.probabilities[which], 1)[:, -2]
    draw = np.random.default_rng(study.seed)
    guides = []
    for label in wanted:
        known = np.flatnonzero(setup.train_predicted == label)
        guides.append(draw.choice(known if len(known) else len(setup.train)))
    folder = study.folder / "attacks" / f"feature_adversary_{eps}"
    images, aims = setup.clean[which], setup.train[guides]
    claim(folder, {**adaptive._asdict(), "eps": eps, "made_of": digest((images, aims))})
    path = folder / "images.npy"
    if not path.exists():
        last = [n.value for n in setup.graph.neurons().values()].index(setup.graph.logits)
        names = [*features.convolutions(setup.graph), list(setup.graph.neurons())[last]]
        with study.timed(adversary_name(eps), len(which)):
            moved = feature_adversary(
                setup.graph, setup.params, images, aims, names, eps=eps / 256,
                steps=adaptive.steps,
            )  # fmt: skip
            _save(path, moved)
    moved = np.load(path, allow_pickle=False)
    predicted = softmax(setup.apply, setup.params, moved).argmax(1)
    return which, marked(moved, predicted, predicted)


def adaptive_rows(study: Study, adaptive: Adaptive) -> list[Fields]:
    """Success of the adaptive attacker: network fooled and nothing flagged."""
    rows: list[Fields] = []
    clean = {"clean": judged_sets(study)["clean"]}
    for eps in adaptive.eps:
        which, judged = adaptive_set(study, adaptive, eps)
        fooled = judged.predicted != study.setup.labels[which]
        images, name = np.unique(which), adversary_name(eps)

        def share(row: str, metric: str, wins: np.ndarray, which=which, images=images) -> None:
            ours, spread = detect.rate(np.isin(images, which[wins]))
            rows.append(
                {"row": row, "metric": metric, "ours": ours, "spread": spread, "n": len(images)}
            )

        share(name, "network fooled", fooled)
        for detector in study.detectors:
            said = verdicts(study, detector, clean | {name: judged})
            row = f"{name}, {detector}"
            share(row, "network fooled and not flagged", fooled & ~said[name].flags)
            normal = detect.some(said["clean"], which[fooled])
            found = detect.measure(normal, detect.some(said[name], fooled))
            for metric in ("recall", "auroc"):
                ours = getattr(found, metric)
                note = "" if fooled.any() else "no candidate fooled the network"
                rows.append(
                    {"row": row, "metric": metric, "ours": ours, "n": int(fooled.sum()),
                     "note": note or "over all candidates that fool the network"}
                )  # fmt: skip
    return rows


def judge_all(study: Study, adaptive: Adaptive) -> None:
    """Trains each detector once and keeps what it says of every set."""
    # First, so that their peak of memory is no other stage's.
    for method in dict.fromkeys(detector.method for detector in study.detectors):
        study.train(method)
    sets = judged_sets(study)
    for eps in adaptive.eps:
        sets[adversary_name(eps)] = adaptive_set(study, adaptive, eps)[1]
    known = true_class_sets(study)
    for detector in study.detectors:
        leaks = detector in map(Detector, _WITH_CRITERION)
        verdicts(study, detector, sets | known if leaks else sets)


# What is asked of slicing the training images: minutes, and MiB that their features take.
_MINUTES, _MIB = 60, 2048


def cost_rows(study: Study) -> list[Fields]:
    """Time and memory of every stage, and of slicing the training images beside the targets."""
    costs: dict[str, Cost] = {}
    for cost in study.costs().values():
        costs[cost.row] = costs[cost.row].beside(cost) if cost.row in costs else cost
    count = len(study.setup.train)
    sliced = costs.get(f"{METHODS[0]} of {_TRAIN}")
    row = {"row": f"{count:,} training images sliced", "n": count}
    if sliced is None:
        rows: list[Fields] = [row | {"metric": "time", "ours": None, "note": "was not measured"}]
    else:
        minutes, peak = sliced.total / 60, sliced.peak_mib
        rows = [
            row | {"metric": "time", "ours": minutes, "unit": "min",
                   "note": f"target at most {_MINUTES}, {_verdict(minutes <= _MINUTES)}"
                   + sliced.caveat},
            row | {"metric": "peak memory of the process", "ours": peak, "unit": "MiB",
                   "note": f"target below {_MIB:,} for the features alone, "
                   + ("met" if peak < _MIB else "which is less: network and images count here")},
        ]  # fmt: skip
    for name, cost in costs.items():
        stage = {"row": name, "n": cost.whole}
        rows += [
            stage | {"metric": "time", "ours": cost.total, "unit": "s",
                     "note": cost.caveat.removeprefix("; ")},
            stage | {"metric": "peak memory of the process", "ours": cost.peak_mib,
                     "unit": "MiB"},
        ]  # fmt: skip
    return rows


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def run(study: Study, adaptive: Adaptive) -> list[Fields]:
    """All stages; the fields of the rows that are the study's own."""
    judge_all(study, adaptive)
    rows = [*confidence_rows(study), *attack_rows(study), *alarm_rows(study)]
    rows += [*true_class_rows(study), *adaptive_rows(study, adaptive), *cost_rows(study)]
    commits = study.commits()
    if set(commits) - {study.commit}:
        made = f"stages made at {', '.join(commits)}"
        rows = [row | {"note": "; ".join(filter(None, [row.get("note"), made]))} for row in rows]
    return rows


# Whose image the picture of slices shows, if it fools the network on any.
_PICTURED = "FGSM 8"


def draw(study: Study, rows: Sequence[record.Row], folder: Path) -> None:
    """Writes the pictures."""
    figures.save(figures.per_attack(rows, METHODS), folder / "per_attack.png")
    figures.save(figures.averages(rows), folder / "averages.png")
    figures.save(figures.adaptive(rows), folder / "adaptive.png")
    order = sorted(attacks.ATTACKS, key=lambda name: name != _PICTURED)
    names = [name for name in order if len(study.attacked(name).images)]
    if not names:
        return
    setup, found = study.setup, study.attacked(names[0])
    images = np.stack([setup.clean[found.which[0]], found.images[0]])
    predicted = [setup.predicted[found.which[0]], found.predicted[0]]
    piece = nns.slice_network(
        setup.graph, setup.params, setup.profile, images, np.array(predicted), THETA,
        per_sample=True,
    )  # fmt: skip
    deep = features.depths(setup.graph)
    kernels = sorted((k for k, v in piece.synapses.items() if v.ndim == 5), key=deep.__getitem__)
    layer = kernels[len(kernels) // 2]
    titles = [
        f"{kind}, predicted {label}"
        for kind, label in zip(("normal", f"after {names[0]}"), predicted, strict=True)
    ]
    picture = figures.slices(images, titles, piece.synapses[layer], layer)
    figures.save(picture, folder / "slices.png")


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    # JAX reports every accelerator that it does not find.
    logging.set_verbosity(logging.WARNING)
    options = flags.FLAGS
    schedule = SCHEDULES[options.schedule]
    # The code that runs is that of now, whatever is committed meanwhile.
    about = origin(data="", seeds=[options.seed])
    try:
        setup = prepare(options.model, options.data_dir, schedule, options.seed)
        about["data"] = setup.data
        folder = Path(options.checkpoint_dir)
        study = Study(setup, schedule, options.seed, folder, about["commit"])
        adaptive = ADAPTIVE[options.schedule]
        found = run(study, adaptive)
        rows = tuple(record.Row(study="adversarial_detection", **row, **about) for row in found)
        for row in rows:
            print(f"{row.row}: {row.metric} {row.ours} (published {row.published})")
        draw(study, rows, Path(options.figures))
        if options.out:
            said = text(schedule, adaptive)
            record.write(options.out, record.Record(title=TITLE, text=said, rows=rows))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    flags.DEFINE_string("model", "resnet10_cifar10", "network of the zoo")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_integer("seed", 0, "draws images, attacks, trees and intervals", lower_bound=0)
    folder = ROOT / "out" / "adversarial_detection"
    flags.DEFINE_string("checkpoint_dir", str(folder), "folder for the stages, to go on from")
    flags.DEFINE_string("figures", str(folder / "figures"), "folder for the pictures")
    results = ROOT / "experiments" / "results" / "adversarial_detection.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")
    app.run(main)
