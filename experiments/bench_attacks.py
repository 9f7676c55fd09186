"""What attacks cost beside Foolbox's: images a second, measured by turns in one process.

Foolbox attacks the same images on the same network, compiled, with as many steps; it runs attacks
step by step in one batch. Attacks that it has no code for on JAX are timed alone.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

import nnslicer_jax as nns
from experiments import record
from experiments.attack_steps import FEWER_STEPS
from experiments.bench_graph import ratio
from experiments.provenance import ROOT, origin
from nnslicer_jax import attacks, data

TITLE = "Speed of the attacks"
TEXT = (
    "Images a second of each attack on images that the network gets right, and how many times "
    "those of Foolbox 3.3.4 that is, given the network compiled, and as it is, which runs it "
    "operation by operation: medians of runs by turns, after one that compiles. The spread is the "
    "95 % interval over resampled runs. Steps are fewer than the attacks' defaults, the same for "
    "both. Beside it, how many images each fools and how far it moves those; and for attacks that "
    "run the network a fixed number of times, the time beside that of these passes alone, which "
    "no attack can be much faster than."
)
TARGET = 5


# How Foolbox is given the network.
COMPILED = "network compiled"
NETWORKS: Mapping[str, Callable] = {COMPILED: jax.jit, "network as it is": lambda apply: apply}


class Passes(NamedTuple):
    """How often an attack runs the network on every image, whatever it finds."""

    gradients: int
    forwards: int


class Pace(NamedTuple):
    """How to run an attack so that a run takes seconds.

    Attributes:
      ours: Options.
      name: Foolbox's class; None if it has none that runs on JAX.
      theirs: Its options.
      iterative: Whether the target for speed holds.
      passes: What the attack needs of the network, where that is fixed.
    """

    ours: Mapping[str, Any] = {}
    name: str | None = None
    theirs: Mapping[str, Any] = {}
    iterative: bool = True
    passes: Passes | None = None


# Every attack also runs the network before and after.
_FGSM = Pace(name="LinfFastGradientAttack", iterative=False, passes=Passes(1, 2))
_RPGD = Pace(name="LinfProjectedGradientDescentAttack", passes=Passes(40, 2))
PACES = {
    "FGSM 2": _FGSM,
    "FGSM 4": _FGSM,
    "FGSM 8": _FGSM,
    "DeepFool Linf": Pace(name="LinfDeepFoolAttack"),
    "DeepFool L2": Pace(name="L2DeepFoolAttack"),
    "JSMA": Pace(FEWER_STEPS["JSMA"]),
    "RPGD 2": _RPGD,
    "RPGD 4": _RPGD,
    "RPGD 8": _RPGD,
    "CW L2": Pace(
        FEWER_STEPS["CW L2"],
        "L2CarliniWagnerAttack",
        {"steps": 60, "binary_search_steps": 5, "initial_const": 1.0},
    ),
    "ADef": Pace(FEWER_STEPS["ADef"]),
    "SinglePixel": Pace(FEWER_STEPS["SinglePixel"]),
    "LocalSearch": Pace(FEWER_STEPS["LocalSearch"]),
    "Boundary": Pace(FEWER_STEPS["Boundary"], "BoundaryAttack", {"steps": 300}),
    "Spatial": Pace(passes=Passes(0, 5**3 + 2)),
    "PointWise": Pace(),
    "GaussianBlur": Pace(FEWER_STEPS["GaussianBlur"], "GaussianBlurAttack", {"steps": 100}),
}


class Case(NamedTuple):
    """A network and images it gets right.

    Attributes:
      name: Of the network in the zoo.
      apply: `apply(params, images) -> logits`.
      params: Its parameters.
      images: `[N, H, W, C]` float32, 0..1.
      labels: `[N]` int32.
      data: Data set and split, in words.
    """

    name: str
    apply: Callable
    params: Any
    images: np.ndarray
    labels: np.ndarray
    data: str


def prepare(name: str, count: int, data_dir: str | None) -> Case:
    """Loads a network of the zoo and the first `count` test images that it gets right.

    Raises:
      ValueError: If it gets fewer than that right among the first four times as many.
    """
    trained = nns.zoo.load(name)
    dataset = trained.card["data"]
    found = data.load(dataset, data_dir)
    images = data.to_float(np.asarray(found.test_images[: 4 * count]))
    labels = np.asarray(found.test_labels[: 4 * count]).astype(np.int32)
    logits = jax.jit(trained.model.apply)(trained.variables, images)
    right = np.asarray(logits).argmax(1) == labels
    if right.sum() < count:
        raise ValueError(
            f"images is {count}, but {name} gets only {right.sum()} of the first {len(labels)} "
            f"test images of {dataset} right"
        )
    images, labels = images[right][:count], labels[right][:count]
    note = f" ({found.note})" if found.note else ""
    about = f"{dataset}, first {len(images)} test images that the network gets right{note}"
    return Case(name, trained.model.apply, trained.variables, images, labels, about)


def _foolbox() -> Any:
    """The package, or None where it is not installed."""
    with warnings.catch_warnings():
        # It imports names that SciPy is about to drop.
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("foolbox")
        except ImportError:
            return None


def measure(case: Case, name: str, runs: int, seed: int, foolbox: Any) -> list[dict[str, Any]]:
    """The row fields of one attack: row, metric, ours, spread, unit, n, note.

    Args:
      case: The network and the images.
      name: The attack's row.
      runs: Of each of the two.
      seed: Of the attacks and of resampling.
      foolbox: The package, or None.
    """
    pace, function = PACES[name], attacks.ATTACKS[name]
    count = len(case.images)
    key = jax.random.key(seed)

    def ours() -> attacks.Adversarial:
        return function(key, case.apply, case.params, case.images, case.labels, **pace.ours)

    rows: list[dict[str, Any]] = []
    common = {"row": f"{case.name}, {name}", "n": count}

    def say(metric: str, value: float | None, unit: str = "", **more: Any) -> None:
        if value is None:
            more.setdefault("note", "none was fooled")
        rows.append({**common, "metric": metric, "ours": value, "unit": unit, **more})
        shown = "none" if value is None else f"{value:.4g}"
        print(f"{case.name}, {name} {metric}: {shown} {unit} {more.get('note', '')}", flush=True)

    result = ours()
    say("images fooled", float(np.mean(result.success)))
    say("mean distance of these", _mean(result.distance, result.success))
    seconds = None
    eps = getattr(function, "keywords", {}).get("eps")
    for given in NETWORKS if foolbox is not None and pace.name is not None else {}:
        theirs = _theirs(case, pace, eps, seed, foolbox, NETWORKS[given](case.apply))
        try:
            moved, fooled = (np.asarray(array) for array in theirs())
        except ValueError as error:
            # Its Boundary gives up on all images where it finds no start for one.
            say(f"times Foolbox's images a second, {given}", None, note=f"it stops: {error}")
            continue
        if given == COMPILED:
            # Its Carlini-Wagner returns black where it finds nothing.
            fooled = fooled & (moved != 0).any((1, 2, 3))
            norm = np.inf if eps is not None or name.endswith("Linf") else 2
            change = np.linalg.norm((moved - case.images).reshape(count, -1), ord=norm, axis=1)
            say("Foolbox: images fooled", float(fooled.mean()))
            say("Foolbox: mean distance of these", _mean(change, fooled))
        times, interval, seconds, _ = ratio(theirs, ours, runs, seed)
        verdict = f"target at least {TARGET}, {'met' if times >= TARGET else 'missed'}"
        note = verdict if pace.iterative else ""
        say(f"times Foolbox's images a second, {given}", float(times), spread=interval, note=note)
    if seconds is None:
        _, _, seconds, _ = ratio(ours, ours, runs, seed)
    say("images a second", count / seconds, "images/s")
    if pace.passes is not None:
        bare, spread, _, _ = ratio(ours, _bare(case, pace.passes), runs, seed)
        say("time beside that of the network's passes alone", float(bare), spread=spread)
    return rows


def _theirs(
    case: Case, pace: Pace, eps: float | None, seed: int, foolbox: Any, run: Callable
) -> Callable[[], Any]:
    """Foolbox's attack on a network; returns images and whether they fool it."""
    network = foolbox.JAXModel(lambda x: run(case.params, x), bounds=(0, 1))
    attack = getattr(foolbox.attacks, str(pace.name))(**pace.theirs)
    images, labels = jnp.asarray(case.images), jnp.asarray(case.labels)
    np.random.seed(seed)

    def call() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attack(network, images, labels, epsilons=eps)[1:]

    return call


def _bare(case: Case, passes: Passes) -> Callable[[], Any]:
    """So many passes of the compiled network over the images, one after the other."""
    forward = jax.jit(case.apply)
    gradient = jax.jit(jax.grad(lambda images, params: case.apply(params, images).max(-1).sum()))
    images = jnp.asarray(case.images)

    def call() -> Any:
        found = [gradient(images, case.params) for _ in range(passes.gradients)]
        return found[-1:] + [forward(case.params, images) for _ in range(passes.forwards)]

    return call


def _mean(distance: Any, success: Any) -> float | None:
    chosen = np.asarray(distance)[np.asarray(success)]
    return float(chosen.mean()) if len(chosen) else None


def main(_: Any) -> None:
    """Measures every attack on every network and writes one results file."""
    options = flags.FLAGS
    unknown = set(options.attacks) - set(PACES)
    if unknown:
        raise app.UsageError(f"--attacks: {sorted(unknown)[0]!r} is not in {', '.join(PACES)}")
    logging.set_verbosity(logging.WARNING)
    try:
        cases = [prepare(name, options.images, options.data_dir) for name in options.models]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    foolbox = _foolbox()
    if foolbox is None:
        print("foolbox is not installed (pip install -e .[test]): attacks are timed alone")
    rows = [
        record.Row(study="bench_attacks", **row, **origin(data=case.data, seeds=[options.seed]))
        for case in cases
        for name in options.attacks
        for row in measure(case, name, options.runs, options.seed, foolbox)
    ]
    if options.out:
        path = Path(options.out)
        record.write(path, record.Record(title=TITLE, text=TEXT, rows=tuple(rows)))
        print(f"wrote {path.name}; python -m experiments.report renders it")


def _define_flags() -> None:
    # Flags are global, and every study has an --out: defined here, modules import side by side.
    flags.DEFINE_list(
        "models", ["lenet5_mnist", "resnet10_cifar10"], "networks of the zoo to attack"
    )
    flags.DEFINE_list("attacks", list(PACES), "attacks to measure")
    flags.DEFINE_integer("images", 64, "images attacked", lower_bound=1)
    flags.DEFINE_integer("runs", 5, "runs of each of the two", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "of the attacks and of resampling")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    results = ROOT / "experiments" / "results" / "bench_attacks.json"
    flags.DEFINE_string("out", str(results), "results file; empty writes none")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
