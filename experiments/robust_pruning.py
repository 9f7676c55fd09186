"""Robust pruning: what is left of accuracy and robustness as weights are taken away, by method.

The main tables of Sehwag, Wang, Mittal, Jana, "HYDRA: pruning adversarially robust neural
networks", NeurIPS 2020: a network is trained under an objective, pruned to 10, 5 and 1 % of its
weights, and fine-tuned, all under the same objective. Methods: LWM (least weight magnitude, in one
step or many), ADMM, HYDRA, HARP, HYDRA under HARP's layer shares, and chance. All methods start
from the same trained network, and fine-tune for as long; LWM in one step and chance spend no epochs
on pruning.

``--schedule cpu``: CNN-small, 10,000 training images, 20/5/20 epochs, three seeds, 1,000 test
images. On two cores a cell (a method at a ratio with a seed) takes about seven minutes under TRADES
of ten steps, so all methods at all ratios take a night; ``--methods``, ``--ratios``,
``--objectives`` and ``--seeds`` choose a part, and later parts go on in the same folder, a killed
run within its cell; every row names the code that made its networks. ``--schedule published`` is
the paper's: all training images, crops and flips, 100/20/100 epochs (as many as each objective's
recipe says), for VGG-16 or a wide ResNet on an accelerator. ``--schedule tiny`` takes a minute on
``--model digits_cnn --data digits``.

``python -m experiments.robust_pruning --objectives trades --methods lwm,hydra --ratios 0.99``
"""

import dataclasses
import functools
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from absl import app, flags, logging

from experiments import record, robust_pruning_figures
from experiments.provenance import ROOT, origin
from experiments.train import fingerprint
from nnslicer_jax import checkpoint, data, models
from prune import admm, evaluate, harp, histograms, hydra, lwm, masks, random_masks, stages
from prune.stages import Pruned, Run, Stage

TITLE = "Robust pruning: methods"
TEXT = (
    "Networks trained, pruned and fine-tuned under one objective; a share of the weights (kernels "
    "of convolutions and dense layers) is kept, the same of every layer but for HARP, which "
    "divides as many among the layers. Benign: accuracy on the test images. Era: accuracy that "
    "PGD leaves, an image counting only if it survives every restart. AutoAttack: the ensemble, "
    "on fewer images, of which era is stated too. Vra: share certified, by interval bounds "
    "(vra-t), symbolic intervals (vra-m) or randomized smoothing (vra-s, in L2). In per cent; "
    "mean over seeds, which draw everything from the first weights on, with Student's 95 % "
    "interval of that mean (none for one seed). Differences are within a seed, from the same "
    "trained network. LWM in one step and chance spend no epochs on pruning, all others as many "
    "as HYDRA, but for HYDRA under HARP's shares, which spends twice as many; all fine-tune "
    "alike. Methods that train weights while they prune (ADMM, its penalty 0.01; LWM in steps, "
    "one an epoch) do so at the rate that scores have. Where a schedule has fewer steps than the "
    "paper, the small rates of Adam (CROWN-IBP, MixTrain) grow by as much, up to that of "
    "training; the weight of MixTrain's bounds and HARP's penalty grow so much faster that they "
    "end where they would; free training rounds its epochs up to whole replays. Published figures "
    "stand beside the same network on the same data alone; those of CIFAR-10 are of networks "
    "trained with 500,000 further images. An era no higher than the largest class's share of the "
    "test images is no sign of robustness: a network with one answer for all images has as much, "
    "whatever the attack. That of LWM on CNN-small, 99 % pruned under TRADES, is no higher."
)


class Method(NamedTuple):
    """A way to prune.

    Attributes:
      title: In tables and figures.
      prune: It.
    """

    title: str
    prune: Callable[..., Pruned]


METHODS = {
    "lwm": Method("LWM", lwm.prune),
    "lwm_steps": Method("LWM in steps", lwm.prune),
    "admm": Method("ADMM", admm.prune),
    "hydra": Method("HYDRA", hydra.prune),
    "harp": Method("HARP", harp.prune),
    "hydra_shares": Method("HYDRA, HARP's shares", hydra.prune),
    "random": Method("Random", random_masks.prune),
}
DEFAULT_METHODS = ("lwm", "admm", "hydra", "harp")
# What is measured under each objective.
MEASURES = {
    "crown_ibp": ("benign", "era", "vra_t"),
    "free": ("benign", "era", "autoattack"),
    "mixtrain": ("benign", "era", "vra_m"),
    "natural": ("benign",),
    "pgd": ("benign", "era", "autoattack"),
    "smoothing": ("benign", "vra_s"),
    "trades": ("benign", "era", "autoattack"),
}
# Half the width of the box, by objective; smoothing has a standard deviation and a radius.
EPS = {
    "crown_ibp": 2 / 255, "free": 8 / 255, "mixtrain": 2 / 255, "pgd": 8 / 255, "trades": 8 / 255,
}  # fmt: skip
SIGMA = 0.25
# The paper states vra-s of CIFAR-10 and SVHN at an L2 distance of 110/255.
RADIUS = 110 / 255
# Images of a batch that MixTrain bounds: five of small networks, one of others.
_SMALL = frozenset({"cnn_small", "digits_cnn", "lenet1", "lenet4", "lenet5", "mlp", "mnist_cnn"})
_FEW, _ONE = 5, 1

_SHARES = (1.0, 0.1, 0.05, 0.01)
_Shares = tuple[float | None, ...]
_TABLE: dict[tuple[str, str, str, str], tuple[float | None, _Shares, _Shares]] = {
    ("vgg16", "cifar10", "trades", "era"): (51.9, (48.8, 45.2, 34.3), (49.5, 48.7, 41.7)),
    ("wrn28_4", "cifar10", "trades", "era"): (57.2, (53.8, 49.2, 37.3), (55.2, 54.2, 47.3)),
    ("vgg16", "cifar10", "smoothing", "vra_s"): (61.1, (59.6, 56.8, 44.1), (60.7, 59.9, 54.4)),
    ("wrn28_4", "cifar10", "smoothing", "vra_s"): (63.3, (61.0, 59.9, 49.1), (63.0, 62.5, 56.0)),
    # Of this network the paper names one that is pruned alone.
    ("wrn28_10", "cifar10", "trades", "benign"): (None, (None,) * 3, (88.97, None, None)),
    ("wrn28_10", "cifar10", "trades", "era"): (None, (None,) * 3, (62.24, None, None)),
    ("vgg16", "svhn", "trades", "era"): (53.5, (51.5, 50.4, 29.0), (52.4, 51.7, 46.8)),
    ("wrn28_4", "svhn", "trades", "era"): (60.1, (59.4, 53.4, 45.3), (62.8, 59.8, 52.4)),
    ("vgg16", "svhn", "smoothing", "vra_s"): (60.1, (59.9, 59.8, 51.9), (59.9, 59.3, 58.6)),
    ("wrn28_4", "svhn", "smoothing", "vra_s"): (62.2, (62.2, 61.4, 45.0), (62.3, 62.0, 59.6)),
}


def published(
    model: str, dataset: str, objective: str, measure: str, method: str, keep: float
) -> float | None:
    """The paper's figure in per cent, None where it has none; the method "dense" keeps 1."""
    row = _TABLE.get((model, dataset, objective, measure))
    if row is None or keep not in _SHARES:
        return None
    dense, *pruned = row
    if method == "dense":
        return dense
    if method not in ("lwm", "hydra") or keep == 1:
        return None
    return pruned[method == "hydra"][_SHARES.index(keep) - 1]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much is run.

    Attributes:
      images: Training images, drawn once for all; None for all.
      epochs: Of training, pruning and fine-tuning; None: as each objective's recipe says.
      batch_size: Images a step; None: as the recipe says.
      crop: Pixels of border for random crops.
      flip: Mirror half of the images.
      tests: Test images, drawn once; None for all.
      restarts: Of PGD.
      steps: Of each restart.
      attacked: Test images, the first of `tests`, under AutoAttack; 0: none.
      noisy: Noisy images that certify one; of the first `smoothed` test images.
      smoothed: Test images certified by smoothing.
      eps: Half the width of the box, 0..1; None: as `EPS` says of each objective.
      strong: Test images, the first of `tests`, that `pruning_questions` attacks by PGD of so many
        steps from so many starts.
      options: Of objectives, by name, in place of their defaults.
    """

    images: int | None = 10_000
    epochs: tuple[int, int, int] | None = (20, 5, 20)
    batch_size: int | None = None
    crop: int = 0
    flip: bool = False
    tests: int | None = 1_000
    restarts: int = 10
    steps: int = 50
    attacked: int = 200
    noisy: int = 10_000
    smoothed: int = 200
    strong: tuple[int, int, int] = (100, 1_000, 100)
    eps: float | None = None
    options: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.eps is not None and not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be 0 to 1, not {self.eps}")

    def eps_of(self, objective: str) -> float:
        """Half the width of the box under an objective, 0 where that has none."""
        if objective not in EPS or self.eps is None:
            return EPS.get(objective, 0.0)
        return self.eps


SCHEDULES = {
    "cpu": Schedule(),
    "published": Schedule(
        images=None, epochs=None, crop=4, flip=True, tests=None, attacked=1_000, smoothed=500,
        strong=(1_000, 1_000, 100),
    ),
    "tiny": Schedule(
        images=128, epochs=(2, 1, 1), batch_size=32, tests=32, restarts=2, steps=3, attacked=0,
        noisy=50, smoothed=4, strong=(4, 5, 2),
        options=(("pgd", (("steps", 2),)), ("trades", (("steps", 2),)), ("mixtrain",
                 (("samples", 2),))),
    ),
}  # fmt: skip
# Epochs and rates of training, pruning and fine-tuning, optimiser, batch.
_SGD = ((100, 20, 100), (0.1, 0.1, 0.01), "sgd", 128)
_RECIPES = {
    "crown_ibp": ((200, 20, 100), (1e-3, 1e-5, 1e-5), "adam", 128),
    "mixtrain": ((60, 20, 60), (1e-3, 1e-5, 5e-4), "adam", 50),
}


# What the recipes were made for.
_IMAGES = 50_000


def recipe(
    objective: str, schedule: Schedule, model: str = "cnn_small"
) -> tuple[Stage, Stage, Stage]:
    """The three stages under an objective, for a network of that name.

    Adam moves a number by about its rate a step, so where there are fewer steps than in the paper,
    its small rates of pruning and of fine-tuning grow by as much, up to that of training. The
    weight of MixTrain's bounds grows so much faster that it ends where the paper's does.
    """
    planned, rates, optimizer, batch = _RECIPES.get(objective, _SGD)
    epochs = schedule.epochs or planned
    fewer = [p / e * _IMAGES / (schedule.images or _IMAGES)
             for p, e in zip(planned, epochs, strict=True)]  # fmt: skip
    if optimizer == "adam":
        first, second, third = (
            min(rates[0], r * max(1.0, n)) for r, n in zip(rates, fewer, strict=True)
        )
        rates = first, second, third
    chosen = dict(dict(schedule.options).get(objective, ()))
    if objective in EPS:
        chosen["eps"] = schedule.eps_of(objective)
    if objective == "smoothing":
        chosen["sigma"] = SIGMA
    every = [5 * e / p for p, e in zip(planned, epochs, strict=True)]
    if objective == "free":
        # Every batch is met four times.
        first, second, third = (math.ceil(n / 4) for n in epochs)
        epochs = first, second, third

    def stage(i: int, **more: Any) -> Stage:
        if objective == "mixtrain":
            more = {"samples": _FEW if model in _SMALL else _ONE, "every": every[i], **more}
        return Stage(
            objective, {**more, **chosen}, epochs=epochs[i], learning_rate=rates[i],
            optimizer=optimizer, batch_size=schedule.batch_size or batch, crop=schedule.crop,
            flip=schedule.flip,
        )  # fmt: skip

    ramp: dict[str, dict[str, Any]] = {
        # Boxes grow while the network is trained, and have their width from then on.
        "crown_ibp": {"ramp": 0.6},
        "mixtrain": {"ramp_epochs": round(epochs[0] / 4)},
    }
    return stage(0, **ramp.get(objective, {})), stage(1), stage(2)


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A network with its data.

    Attributes:
      name: Of the model.
      network: It.
      dataset: What it is trained on.
      tests: `[N, ...]` float32, test images in 0..1.
      labels: `[N]` their classes.
      schedule: How much is run.
      commit: Of the code.
    """

    name: str
    network: stages.Network
    dataset: data.Dataset
    tests: np.ndarray
    labels: np.ndarray
    schedule: Schedule
    commit: str = "unknown"


def prepare(
    model: str, dataset: str, data_dir: str | None, schedule: Schedule, commit: str = "unknown"
) -> Case:
    """Loads data, and makes the network.

    Raises:
      ValueError: For an unknown model or data set.
      FileNotFoundError: For a data set that is nowhere.
    """
    whole = data.load(dataset, data_dir)
    if dataset in _WRITTEN:
        schedule = dataclasses.replace(schedule, flip=False)
    module = models.create(model, len(whole.classes))
    some = _drawn(0, len(whole.train_labels), schedule.images)
    held = _drawn(1, len(whole.test_labels), schedule.tests)
    part = whole._replace(
        train_images=whole.train_images[some], train_labels=whole.train_labels[some]
    )
    return Case(
        model, stages.network_of(module, part), part, data.to_float(whole.test_images[held]),
        whole.test_labels[held], schedule, commit,
    )  # fmt: skip


def _drawn(draw: int, count: int, wanted: int | None) -> np.ndarray:
    order = np.random.default_rng((0, draw)).permutation(count)
    return np.sort(order[:wanted])


# Digits mirrored are no digits.
_WRITTEN = frozenset({"digits", "mnist", "svhn"})
# Epochs of pruning that the growth of HARP's penalty is stated for.
_HARP_EPOCHS = 20


# One cell -------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """One network.

    Attributes:
      measured: What was measured of it, 0..1.
      weights: How many it keeps, by size.
      commit: Of the code that made it.
    """

    measured: dict[str, float]
    weights: list[int]
    commit: str = "unknown"


# Ends of the bins that weights are counted in.
EDGES = np.linspace(-0.3, 0.3, 61)


def judge(case: Case, objective: str, found: Pruned, seed: int) -> Outcome:
    """Measures a network by what its objective is about."""
    schedule, key = case.schedule, jax.random.key(seed)
    network, variables = case.network.predict, found.variables
    few, many = case.tests[: schedule.smoothed], case.tests
    eps = schedule.eps_of(objective)
    measures: dict[str, Callable[[], evaluate.Verdict]] = {
        "benign": lambda: evaluate.benign(network, variables, many, case.labels),
        "era": lambda: evaluate.era(
            key, network, variables, many, case.labels, eps=eps, steps=schedule.steps,
            restarts=schedule.restarts,
        ),
        "autoattack": lambda: evaluate.autoattack(
            key, network, variables, many[: schedule.attacked], case.labels[: schedule.attacked],
            eps=eps,
        ),
        "vra_t": lambda: evaluate.vra_t(
            case.network.graph, variables, many, case.labels, eps=eps
        ),
        "vra_m": lambda: evaluate.vra_m(
            case.network.graph, variables, many, case.labels, eps=eps
        ),
        "vra_s": lambda: evaluate.vra_s(
            key, network, variables, few, case.labels[: schedule.smoothed], sigma=SIGMA,
            radius=RADIUS, samples=schedule.noisy,
        ),
    }  # fmt: skip
    wanted = [m for m in MEASURES[objective] if m != "autoattack" or schedule.attacked]
    verdicts = {name: measures[name]() for name in wanted}
    counted = histograms.histogram(variables["params"], found.masks, EDGES)
    return Outcome(
        compared(verdicts, schedule.attacked), [int(n) for n in counted], case.commit
    )  # fmt: skip


# Measures that follow from verdicts on the same images.
ERA_OF_SAME, CONTRADICTED = "era_of_same", "contradicted"


def compared(verdicts: Mapping[str, evaluate.Verdict], attacked: int) -> dict[str, float]:
    """What was measured, 0..1, and how verdicts on the same images agree.

    Args:
      verdicts: By measure, on test images in one order.
      attacked: How many of the first AutoAttack had, for which era is stated too.
    """
    measured: dict[str, float] = {}
    for name, verdict in verdicts.items():
        if name == "autoattack" and "era" in verdicts:
            measured[ERA_OF_SAME] = float(verdicts["era"].right[:attacked].mean())
        measured[name] = verdict.accuracy
        if name in ("vra_t", "vra_m") and "era" in verdicts:
            measured[CONTRADICTED] = float((verdict.right & ~verdicts["era"].right).mean())
    return measured


def pruned(case: Case, objective: str, method: str, keep: Fraction, seed: int, variables: Any,
           run: Run) -> Pruned:  # fmt: skip
    """A trained network, pruned and fine-tuned by a method.

    Args:
      case: From `prepare`.
      objective: Of pruning and of fine-tuning.
      method: A key of `METHODS`.
      keep: Share of the weights.
      seed: Of everything drawn.
      variables: The trained network.
      run: Where checkpoints go.

    Raises:
      ValueError: For an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"methods must be among {', '.join(METHODS)}, not {method}")
    _, search, finetune = recipe(objective, case.schedule, case.name)
    model, dataset = case.network.model, case.dataset
    run = dataclasses.replace(run, seed=seed)
    after = functools.partial(
        METHODS[method].prune, model, dataset, variables=variables, finetune=finetune, run=run
    )
    if method in ("lwm", "random"):
        return after(keep)
    # In fewer epochs than HARP's the penalty ends where it would.
    gamma = harp.GAMMA * _HARP_EPOCHS / search.epochs
    if method == "harp":
        return after(keep, search=search, gamma=gamma)
    if method != "hydra_shares":
        return after(keep, search=search)
    scores = hydra.init_scores(variables["params"])
    shares = dataclasses.replace(run, folder=run.folder and Path(run.folder) / "shares")
    _, numbers = harp.learn(
        case.network, dataset, search, variables, scores, keep, gamma=gamma, run=shares
    )
    return after(numbers, search=search)


def trained(case: Case, objective: str, seed: int, work: Path, show: bool = False) -> Any:
    """The dense network's variables, trained unless the folder holds them."""
    return stages.pretrain(
        case.network, case.dataset, recipe(objective, case.schedule, case.name)[0],
        run=Run(seed=seed, folder=folder_of(work, objective, seed), show=show),
    )  # fmt: skip


def folder_of(work: Path, objective: str, seed: int) -> Path:
    """Where what is trained under an objective with a seed is kept."""
    return work / objective / f"seed_{seed}"


def unpruned(variables: Any) -> Pruned:
    """The dense network as one of which all weights are kept."""
    return Pruned(variables, masks.topk(lwm.scores(variables["params"]), 1))


# All cells ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
    """Which cells are run.

    Attributes:
      objectives: Of `MEASURES`.
      methods: Keys of `METHODS`.
      ratios: Shares that are pruned, 0 to below 1.
      seeds: Of everything drawn.
    """

    objectives: tuple[str, ...] = ("trades",)
    methods: tuple[str, ...] = DEFAULT_METHODS
    ratios: tuple[float, ...] = (0.9, 0.95, 0.99)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name, known in (("objectives", MEASURES), ("methods", METHODS)):
            for one in getattr(self, name):
                if one not in known:
                    raise ValueError(f"{name} must be among {', '.join(known)}, not {one}")
        for ratio in self.ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"ratios must be 0 or more and below 1, not {ratio}")
        for name in ("objectives", "methods", "ratios", "seeds"):
            if len(set(getattr(self, name))) < max(1, len(getattr(self, name))):
                raise ValueError(f"{name} must be different, and at least one")


def share(ratio: float) -> Fraction:
    """What is kept where a ratio is pruned, exactly as the decimals say."""
    return 1 - Fraction(str(ratio))


def percent(ratio: float) -> str:
    """A share in per cent, as the decimals say."""
    return f"{float(100 * Fraction(str(ratio))):g}%"


class Ledger:
    """The outcomes so far, in a JSON file that is written whole after every cell."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, Any] = {}
        if file.is_file():
            try:
                self.done = json.loads(file.read_text())
            except ValueError:
                raise ValueError(f"{file} is damaged: not JSON") from None

    def part(self, name: str, make: Callable[[], Outcome]) -> Outcome:
        """The outcome of that name, made unless it is there."""
        if name not in self.done:
            self.done[name] = make()
            record.write_text(self.file, json.dumps(self.done) + "\n")
        return Outcome(*self.done[name])


Found = dict[tuple[str, str, float], list[Outcome]]  # objective, method, ratio -> one a seed


def run(case: Case, part: Part, work: Path, show: bool = False) -> Found:
    """Runs cells, going on where an earlier run stopped.

    Args:
      case: From `prepare`.
      part: Which cells.
      work: Folder for what is done so far, of this part and of others.
      show: Write progress lines to standard error.

    Returns:
      Outcomes, those of the dense network under the method "dense" and the ratio 0.

    Raises:
      ValueError: For a folder of another run.
      FloatingPointError: Loss or weights stopped being finite.
    """
    claim(case, work)
    ledger = Ledger(work / "done.json")
    found: Found = {}
    for seed, objective in itertools.product(part.seeds, part.objectives):

        @functools.cache
        def dense(objective: str = objective, seed: int = seed) -> Any:
            return trained(case, objective, seed, work, show)

        def of_dense(
            dense: Callable[[], Any] = dense, objective: str = objective, seed: int = seed
        ) -> Outcome:
            return judge(case, objective, unpruned(dense()), seed)

        outcome = ledger.part(f"{objective}/{seed}/dense", of_dense)
        found.setdefault((objective, "dense", 0.0), []).append(outcome)
        for method, ratio in itertools.product(part.methods, part.ratios):
            place = folder_of(work, objective, seed) / method / f"{ratio:g}"

            def of_cell(
                dense: Callable[[], Any] = dense, objective: str = objective, seed: int = seed,
                method: str = method, ratio: float = ratio, place: Path = place,
            ) -> Outcome:  # fmt: skip
                made = pruned(
                    case, objective, method, share(ratio), seed, dense(),
                    Run(folder=place, show=show),
                )  # fmt: skip
                return judge(case, objective, made, seed)

            outcome = ledger.part(f"{objective}/{seed}/{method}/{ratio:g}", of_cell)
            # The ledger has it; checkpoints of many cells would fill a disk.
            shutil.rmtree(place, ignore_errors=True)
            found.setdefault((objective, method, ratio), []).append(outcome)
            if show:
                said = ", ".join(f"{k} {v:.1%}" for k, v in outcome.measured.items())
                print(f"{objective}, {method}, {percent(ratio)} pruned, seed {seed}: {said}",
                      file=sys.stderr, flush=True)  # fmt: skip
    return found


def claim(case: Case, work: Path) -> None:
    """Notes what a folder of results belongs to; which cells are run, and by what code, is open."""
    about = {
        "model": case.name,
        "data": case.dataset.name,
        "sums": fingerprint(case.dataset),
        "tests": float(case.tests.sum(dtype=np.float64)),
        "schedule": json.loads(json.dumps(dataclasses.asdict(case.schedule))),
    }
    checkpoint.claim(work, about)


# Results --------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean in per cent, and the half-width of Student's 95 % interval of it, None of one value."""
    mean = 100 * float(np.mean(values))
    if len(values) < 2:
        return round(mean, 2), None
    quantile = scipy.stats.t.ppf(0.975, len(values) - 1)
    half = 100 * quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return round(mean, 2), round(half, 2)


SAID = {
    "benign": "benign accuracy", "era": "era", "autoattack": "AutoAttack", "vra_t": "vra-t",
    "vra_m": "vra-m", "vra_s": "vra-s", ERA_OF_SAME: "era on AutoAttack's images",
    CONTRADICTED: "certified images that PGD fooled",
}  # fmt: skip
# Whose difference is shown.
PAIRS = (("hydra", "lwm"), ("harp", "hydra"), ("admm", "lwm"), ("hydra_shares", "hydra"))


def rows(case: Case, found: Found) -> list[dict[str, Any]]:
    """Fields of the results' rows: every network, then differences of methods."""
    made = []
    for (objective, method, ratio), outcomes in found.items():
        what = "dense" if method == "dense" else f"{METHODS[method].title}, {percent(ratio)} pruned"
        for measure in outcomes[0].measured:
            mean, half = interval([outcome.measured[measure] for outcome in outcomes])
            made.append({
                "row": f"{objective}: {what}", "metric": SAID[measure], "ours": mean,
                "spread": half, "unit": "%", "n": len(outcomes),
                **made_at(note(case, objective, measure, method), outcomes),
                "published": published(
                    case.name, case.dataset.name, objective, measure, method, float(share(ratio))
                ),
            })  # fmt: skip
    for (objective, method, ratio), outcomes in found.items():
        for better, other in PAIRS:
            beside = found.get((objective, other, ratio))
            if method != better or beside is None:
                continue
            for measure in outcomes[0].measured:
                apart = [
                    a.measured[measure] - b.measured[measure]
                    for a, b in zip(outcomes, beside, strict=True)
                ]
                mean, half = interval(apart)
                one, two = (
                    published(case.name, case.dataset.name, objective, measure, m,
                              float(share(ratio)))
                    for m in (better, other)
                )  # fmt: skip
                made.append({
                    "row": f"{objective}: {METHODS[better].title} - {METHODS[other].title}, "
                    f"{percent(ratio)} pruned",
                    "metric": SAID[measure], "ours": mean, "spread": half, "unit": "points",
                    "n": len(apart),
                    **made_at(note(case, objective, measure, better), outcomes + beside),
                    "published": None if one is None or two is None else round(one - two, 2),
                })  # fmt: skip
    return made


def made_at(note: str, outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The note of a row, and the commit: in the note where its networks were made at several."""
    commits = sorted({outcome.commit for outcome in outcomes})
    if len(commits) == 1:
        return {"note": note, "commit": commits[0]}
    return {"note": f"{note}; networks made at {', '.join(commits)}"}


def note(case: Case, objective: str, measure: str, method: str = "") -> str:
    """How something was measured, in words, and in how many steps LWM pruned if it did in steps."""
    schedule, count = case.schedule, len(case.labels)
    eps = f"eps {Fraction(schedule.eps_of(objective)).limit_denominator(1_000)}"
    attacked = min(schedule.attacked, count)
    pgd = f"PGD-{schedule.steps}, {schedule.restarts} restarts, {eps}"
    said = {
        "benign": f"{count:,} test images",
        "era": f"{count:,} test images, {pgd}",
        ERA_OF_SAME: f"the same {attacked:,} test images, {pgd}",
        "autoattack": f"{attacked:,} test images, {eps}",
        "vra_t": f"{count:,} test images, {eps}",
        "vra_m": f"{count:,} test images, {eps}",
        CONTRADICTED: f"{count:,} test images, {pgd}; 0 unless a certificate is wrong",
        "vra_s": f"{min(schedule.smoothed, count):,} test images, {schedule.noisy:,} noisy ones "
        f"each, radius {RADIUS:.3f}",
    }[measure]
    if method == "lwm_steps":
        said += f"; {recipe(objective, schedule, case.name)[1].epochs} steps of pruning"
    return said


def work_of(model: str, dataset: str, schedule: str, eps: float | None = None) -> str:
    """The folder for what is done so far."""
    box = "" if eps is None else f"_eps_{eps:g}"
    return f"out/robust_pruning/{model}_{dataset}_{schedule}{box}"


def described(case: Case) -> str:
    """The data and the network in words."""
    jpeg = " (JPEG re-encodings)" if "JPEG" in case.dataset.note else ""
    return (
        f"{case.dataset.name}{jpeg}: {len(case.dataset.train_labels):,} training images, "
        f"{len(case.labels):,} test images; {case.name}"
        + ("" if case.schedule.eps is None else f"; eps {case.schedule.eps:g}")
    )


def save_figures(found: Found, part: Part, folder: Path) -> list[Path]:
    """Draws one picture of each measure of each objective, and one of the weights kept."""
    paths = []
    for objective in part.objectives:
        for measure in MEASURES[objective]:
            if measure not in found[objective, "dense", 0.0][0].measured:
                continue
            curves = {
                METHODS[method].title: {
                    ratio: [o.measured[measure] for o in found[objective, method, ratio]]
                    for ratio in part.ratios
                }
                for method in part.methods
            }
            whole = interval([o.measured[measure] for o in found[objective, "dense", 0.0]])[0]
            paths.append(folder / f"{objective}_{measure}.png")
            robust_pruning_figures.curves(
                curves, f"Trained and pruned under {objective}", f"{SAID[measure]}, %", whole,
                paths[-1],
            )  # fmt: skip
        ratio = max(part.ratios)
        weights = {"dense": found[objective, "dense", 0.0][0].weights} | {
            METHODS[m].title: found[objective, m, ratio][0].weights
            for m in ("lwm", "hydra") if m in part.methods
        }  # fmt: skip
        paths.append(folder / f"{objective}_weights.png")
        robust_pruning_figures.weights(
            weights, EDGES, f"Weights kept, {percent(ratio)} pruned, {objective}", paths[-1]
        )
    return paths


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    try:
        part = Part(
            tuple(given.objectives), tuple(given.methods), tuple(map(float, given.ratios)),
            tuple(map(int, given.seeds)),
        )  # fmt: skip
        # Of the code that ran, should it change on the way.
        about = origin(data="", seeds=part.seeds)
        case = prepare(
            given.model, given.data, given.data_dir,
            dataclasses.replace(SCHEDULES[given.schedule], eps=given.eps), about["commit"],
        )  # fmt: skip
        work = Path(given.work or work_of(given.model, given.data, given.schedule, given.eps))
        found = run(case, part, work, show=True)
        save_figures(found, part, Path(given.figures))
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    about["data"] = described(case)
    merge(Path(given.out), "robust_pruning", TITLE, TEXT, about, rows(case, found))


def merge(
    out: Path, study: str, title: str, text: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes a results file as `write`, in which what was measured on something else stays.

    Args:
      out: The file; one of another title is replaced whole.
      study: Of all rows.
      title: Of the file.
      text: Of the file.
      about: Fields of all rows that do not say otherwise.
      rows: The new rows; of the old ones those go whose `row` and `data` are one of theirs.
    """
    known = []
    try:
        before = record.read(out) if out.is_file() else None
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if before is not None and before.title == title:
        made = {(row["row"], row.get("data", about["data"])) for row in rows}
        known = [
            {k: v for k, v in dataclasses.asdict(row).items() if k != "study"}
            for row in before.rows
            if (row.row, row.data) not in made
        ]
    write(out, study, title, text, about, known + rows)


def write(
    out: Path, study: str, title: str, text: str, about: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """Writes a results file, or ends with one line that says why not."""
    try:
        made = tuple(record.Row(study=study, **{**about, **row}) for row in rows)
        record.write(out, record.Record(title=title, text=text, rows=made))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {out.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_string("model", "cnn_small", "network")
    flags.DEFINE_string("data", "cifar10", "data set")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data set")
    flags.DEFINE_enum("schedule", "cpu", sorted(SCHEDULES), "how much is run")
    flags.DEFINE_float("eps", None, "half the width of the box; each objective's unless set", 0, 1)
    flags.DEFINE_list("objectives", ["trades"], f"of {', '.join(MEASURES)}")
    flags.DEFINE_list("methods", list(DEFAULT_METHODS), f"of {', '.join(METHODS)}")
    flags.DEFINE_list("ratios", ["0.9", "0.95", "0.99"], "shares of the weights that are pruned")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "of everything drawn")
    results = ROOT / "experiments" / "results" / "robust_pruning.json"
    flags.DEFINE_string("out", str(results), "results file")
    flags.DEFINE_string("work", None, "folder for what is done so far")
    flags.DEFINE_string("figures", "out/robust_pruning", "folder of the figures")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
