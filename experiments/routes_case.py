"""What the studies of routes look at: a network, its images, and routes that are made once.

Routes and attacked images lie in one folder, each under a digest of all that they depend on:
network, images, options, hardware and the code that makes them. So the studies share them, a run
that was stopped goes on, and whatever changes is made anew.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy
import sklearn
from absl import app, flags, logging
from scipy import stats

import nnslicer_jax as nns
from experiments import record
from experiments.attack_steps import FEWER_STEPS
from experiments.provenance import ROOT, origin
from experiments.target_classes import wilson
from interpret import cdrp, gates
from nnslicer_jax import attacks, data
from nnslicer_jax.atomic import replacing
from nnslicer_jax.attacks.adversarial import BATCH_SIZE
from nnslicer_jax.batches import batches, filled
from nnslicer_jax.checkpoint import digest
from nnslicer_jax.cost import BUDGET

Fields = dict[str, Any]  # of a record.Row


class Reading(NamedTuple):
    """How routes are made.

    Attributes:
      at: Where gates stand.
      balanced: Whether gamma and the learning rate suit the number of gates; else as published.
      title: How rows say it.
    """

    at: str
    balanced: bool
    title: str


READINGS: Mapping[str, Reading] = {
    "published": Reading("auto", False, ""),
    "convolutions": Reading("convolutions", False, ", gates at every convolution"),
    "balanced": Reading("auto", True, ", gamma balanced"),
}
# Images routed between two files, at most; a run that is stopped loses no more.
_PART = 256
_BATCH = 256
_DRAWS = 1000
# Types of a schedule's fields that the command line may change.
_COUNTS = (int, int | None)


def _code(*parts: str) -> str:
    """Digest of source files, and of what runs them."""
    found = hashlib.sha256()
    for name in parts:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    versions = [module.__version__ for module in (jax, np, scipy, sklearn)]
    found.update(" ".join([*versions, jax.default_backend()]).encode())
    return found.hexdigest()


# Read once, when the code is loaded: files may change while a study goes on.
ATTACKING = _code("nnslicer_jax")
ROUTING = _code("nnslicer_jax", "interpret/cdrp.py", "interpret/gates.py")
JUDGING = _code(
    "nnslicer_jax", "interpret", "experiments/routes_case.py", "experiments/routes_detection.py"
)
_ATTACKS: Mapping[str, Callable[..., attacks.Adversarial]] = {
    **attacks.ATTACKS,
    # Steps that fool networks on colour images hardly fool those on grey strokes.
    "FGSM 64": functools.partial(attacks.fgsm, eps=64 / 256),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A network with its data, and how it is routed.

    Attributes:
      trained: The network.
      graph: It, traced.
      dataset: Where images come from.
      reading: One of `READINGS`.
      layers: Where gates stand.
      options: Gamma and learning rate of `cdrp.route`.
      folder: Where routes and attacked images are kept.
      seed: Of every draw.
    """

    trained: nns.zoo.Trained
    graph: nns.Graph
    dataset: data.Dataset
    reading: str
    layers: Mapping[str, slice]
    options: Mapping[str, Any]
    folder: Path
    seed: int

    @property
    def params(self) -> Any:
        """The network's variables."""
        return self.trained.variables

    @functools.cached_property
    def apply(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The network as a function; as traced, it takes the faster forms of its convolutions."""
        return lambda params, images: nns.evaluate(self.graph, params, images)[0]

    @functools.cached_property
    def weights(self) -> str:
        """Digest of the variables."""
        return digest(self.params)

    @functools.cached_property
    def batch(self) -> int:
        """Images run at once; such a pass holds a few activations."""
        return max(1, min(_BATCH, BUDGET // (4 * max(self._sizes))))

    @functools.cached_property
    def batch_differentiated(self) -> int:
        """Images differentiated at once; such a pass holds every activation."""
        return max(1, min(_BATCH, BUDGET // (2 * sum(self._sizes))))

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each activation of an image."""
        return [4 * math.prod(self.graph.values[i].shape) for i in self.graph.carried]

    @property
    def fgsm(self) -> str:
        """Name of the FGSM that the published one is compared with."""
        return "FGSM 8" if self.dataset.test_images.shape[-1] == 3 else "FGSM 64"

    @property
    def title(self) -> str:
        """What rows begin with."""
        return f"{self.trained.card['name']}{READINGS[self.reading].title}"

    @property
    def slug(self) -> str:
        """What files of the case begin with."""
        name = self.trained.card["name"]
        return name if self.reading == "published" else f"{name}_{self.reading}"

    @property
    def said(self) -> str:
        """The data set in words."""
        jpeg = " (JPEG re-encodings)" if "JPEG" in self.dataset.note else ""
        return f"{self.dataset.name}{jpeg}, {self.trained.card['name']}"


class Images(NamedTuple):
    """Some images.

    Attributes:
      images: `[N, H, W, C]` float32 in 0..1.
      labels: `[N]` int32, their classes.
      probabilities: `[N, K]`, the network's softmax of them.
    """

    images: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`[N]`, the network's classes."""
        return self.probabilities.argmax(1)

    def take(self, index: Any) -> "Images":
        """Some of them, by an index or mask."""
        return Images(*(values[index] for values in self))


def prepare(
    model: str, data_dir: str | None, folder: Path, seed: int, reading: str = "published"
) -> Case:
    """Loads a network of the zoo with its data, and finds the places of its gates.

    Raises:
      ValueError: For an unknown network or reading, or data of other classes than the network's.
      FileNotFoundError: If weights or data are nowhere.
    """
    if reading not in READINGS:
        raise ValueError(f"reading must be one of {', '.join(READINGS)}, not {reading!r}")
    trained = nns.zoo.load(model)
    card = trained.card
    dataset = data.load(card["data"], data_dir, **card.get("data_options", {}))
    if len(dataset.classes) != card["num_classes"]:
        # Of other classes the labels would be other logits.
        raise ValueError(
            f"{dataset.name} has {len(dataset.classes)} classes and {model} has "
            f"{card['num_classes']}; in a folder of images every class has its folder, empty or not"
        )
    image = jax.ShapeDtypeStruct((1, *card["input_shape"]), np.float32)
    graph = nns.trace(trained.model.apply, trained.variables, image)
    layers = gates.places(graph, READINGS[reading].at)
    count = max(part.stop for part in layers.values())
    # Of a single gate these are the published ones.
    options = cdrp.balanced(count if READINGS[reading].balanced else 1)
    return Case(trained, graph, dataset, reading, layers, options, folder, seed)


def drawn(case: Case, per_class: int | None, *, split: str = "test", right: bool = False) -> Images:
    """Images of each class that has any, class after class, in an order drawn by the seed.

    Args:
      case: The network and its data.
      per_class: How many of each class; None for all.
      split: "test" or "train".
      right: Take only images that the network gets right.

    Raises:
      ValueError: If there are no images, or a class has some but fewer.
    """
    dataset = case.dataset
    source, labels = {
        "test": (dataset.test_images, dataset.test_labels),
        "train": (dataset.train_images, dataset.train_labels),
    }[split]
    orders = {}
    for label in np.unique(labels).tolist():
        rng = np.random.default_rng((case.seed, label, split == "train"))
        orders[label] = rng.permutation(np.flatnonzero(labels == label))
    if not orders:
        raise ValueError(f"{dataset.name} has no {split} images")
    # Few more than wanted are looked at first, the rest of a class only if those do not do.
    first = 2 * per_class + 10 if right and per_class is not None else per_class
    rows = np.concatenate([order[:first] for order in orders.values()])
    found = _looked(case, source, rows)
    if right and per_class is not None:
        counts = np.bincount(
            labels[rows][found.argmax(1) == labels[rows]], minlength=max(orders) + 1
        )
        rest = [order[first:] for label, order in orders.items() if counts[label] < per_class]
        more = np.concatenate([rows[:0], *rest])
        if len(more):
            rows, found = np.append(rows, more), np.append(found, _looked(case, source, more), 0)
    good = (found.argmax(1) == labels[rows]) | (not right)
    kept = []
    for label in orders:
        here = np.flatnonzero((labels[rows] == label) & good)[:per_class]
        if per_class is not None and len(here) < per_class:
            kind = " that the network gets right" if right else ""
            raise ValueError(
                f"per_class is {per_class}, but class {dataset.classes[label]} has only "
                f"{len(here)} {split} images{kind}"
            )
        kept.append(here)
    chosen = np.concatenate(kept)
    if not len(chosen):
        raise ValueError(f"{dataset.name} has no {split} images that the network gets right")
    rows, found = rows[chosen], found[chosen]
    return Images(_pixels(source, rows), np.asarray(labels[rows], np.int32), found)


def _looked(case: Case, source: Any, rows: np.ndarray) -> np.ndarray:
    """The network's softmax of some images, `[N, K]`, which are not all in memory at once."""
    order = np.argsort(rows)
    size = case.batch
    parts = (_pixels(source, rows[order[at : at + size]]) for at in range(0, len(rows), size))
    return probabilities(case, parts)[np.argsort(order)]


def _pixels(source: Any, rows: np.ndarray) -> np.ndarray:
    # Read on demand, images come in the order of the files.
    order = np.argsort(rows)
    return data.to_float(np.asarray(source[rows[order]]))[np.argsort(order)]


def probabilities(case: Case, images: Any) -> np.ndarray:
    """The network's softmax of images `[N, ...]` or of batches of them, `[N, K]`."""
    return np.concatenate([
        np.asarray(_softmax(case.apply, case.params, batch.images))[: batch.real]
        for batch in batches(case.graph, images, case.batch)
    ])  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def _softmax(apply: Callable, params: Any, images: jax.Array) -> jax.Array:
    return jax.nn.softmax(apply(params, images))


# Made once ----------------------------------------------------------------------------------


def routed(case: Case, images: np.ndarray) -> cdrp.Routes:
    """Routes of images, read from the folder where they are there."""
    # Equal parts of one shape, which is compiled once.
    size = math.ceil(len(images) / math.ceil(len(images) / _PART))
    places = {name: [part.start, part.stop] for name, part in case.layers.items()}
    parts = []
    for rows in filled(len(images), size):
        about = {"at": places, "options": dict(case.options)}
        key = _digest(case, ROUTING, about, images[rows])
        path = case.folder / "routes" / f"{key}.safetensors"
        if path.exists():
            made = cdrp.load_routes(path)
        else:
            made = cdrp.route(
                case.graph, case.params, images[rows], list(case.layers), progress=True,
                **case.options,
            )  # fmt: skip
            made.save(path)
        parts.append(made)
    return cdrp.joined(parts).take(np.arange(len(images)))


def attacked(case: Case, name: str, some: Images, options: Mapping[str, Any]) -> Images:
    """What an attack makes of images, each beside its label, whether it fools the network or not.

    Args:
      case: The network.
      name: Of the attack.
      some: Images to attack.
      options: Of the attack in place of its defaults.
    """
    about = {"attack": name, "options": dict(options), "seed": case.seed}
    key = _digest(case, ATTACKING, about, some.images, some.labels)
    path = case.folder / "attacks" / f"{key}.npy"
    if not path.exists():
        print(f"{case.title}: {name}", file=sys.stderr, flush=True)
        made = _ATTACKS[name](
            jax.random.key(case.seed), case.apply, case.params, some.images, some.labels,
            batch_size=min(BATCH_SIZE, case.batch_differentiated), **options,
        )  # fmt: skip
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, np.asarray(made.images))
    images = np.load(path, allow_pickle=False)
    return Images(images, some.labels, probabilities(case, images))


def steps(name: str, fewer: bool) -> Mapping[str, Any]:
    """An attack's options: those that make it take seconds, or its defaults."""
    return FEWER_STEPS.get(name, {}) if fewer else {}


def part(case: Case, name: str, about: Mapping[str, Any], make: Callable[[], Any]) -> Any:
    """A result in JSON that is made once.

    Args:
      case: The network.
      name: Of the kind of result.
      about: All that the result depends on but for the network, the code and the seed.
      make: Makes it.
    """
    key = _digest(case, JUDGING, {"part": name, "about": dict(about), "seed": case.seed})
    path = case.folder / name / f"{key}.json"
    if not path.exists():
        record.write_text(path, json.dumps(make()) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def _digest(case: Case, code: str, about: Mapping[str, Any], *arrays: np.ndarray) -> str:
    marks = [case.trained.card, case.weights, code, [a.shape for a in arrays], digest(arrays)]
    text = json.dumps([about, *marks], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# Numbers ------------------------------------------------------------------------------------


def average(values: Any, scale: float = 1.0, unit: str = "") -> Fields:
    """Mean over images with its 95 % interval: Wilson's of a share, else normal; NaN is left out.

    Args:
      values: `[N]`, one an image; bool for a share.
      scale: What values are multiplied by.
      unit: Of the result.
    """
    known = np.asarray(values, float).ravel()
    known = scale * known[np.isfinite(known)]
    if not len(known):
        return {"ours": None, "unit": unit, "n": 0, "note": "defined for none of the images"}
    if np.asarray(values).dtype == bool:
        share = np.mean(values)
        low, high = wilson(float(share), len(known))
        spread = (scale * low, scale * high)
        return {"ours": scale * float(share), "spread": spread, "unit": unit, "n": len(known)}
    half = 1.96 * known.std(ddof=1) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"ours": float(known.mean()), "spread": half, "unit": unit, "n": len(known)}


def mean_known(table: np.ndarray) -> np.ndarray:
    """Mean of each row over what is defined, `[N]`, NaN where nothing is."""
    known = np.isfinite(table)
    sums, counts = np.where(known, table, 0).sum(1), known.sum(1)
    return np.divide(sums, counts, out=np.full(len(table), np.nan), where=counts > 0)


def depth(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of each image, Spearman's correlation of its values with the number of the layer, `[N]`.

    Args:
      values: Layer to `[N]`, from the input on; where an image lacks one or all are equal: NaN.
    """
    table = np.stack(list(values.values()), 1).astype(float)
    places = np.arange(table.shape[1])
    told = np.isfinite(table).all(1) & (np.ptp(table, 1) > 0)
    return np.array([
        stats.spearmanr(row, places).statistic if known else np.nan
        for row, known in zip(table, told, strict=True)
    ])  # fmt: skip


def auc(seed: int, negative: np.ndarray, positive: np.ndarray, *, paired: bool) -> Fields:
    """Chance that a positive scores above a negative, ties half, with its bootstrapped interval.

    Args:
      seed: Of what is drawn anew.
      negative: `[N]` scores, or `[D, N]` of D classifiers, over which the mean is taken.
      positive: `[M]` or `[D, M]` scores.
      paired: Whether row i of both is one image, which is then drawn in both.
    """
    if not positive.size or not negative.size:
        return {"ours": None, "n": 0, "note": "there are none to tell apart"}
    negative, positive = np.atleast_2d(negative), np.atleast_2d(positive)
    return resampled(seed, wins(negative, positive), paired=paired)


def wins(negative: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """`[D, M, N]`: 1 where classifier d scores positive i above negative j, 1/2 where equal."""
    above = positive[:, :, None] > negative[:, None]
    equal = positive[:, :, None] == negative[:, None]
    return above + equal / 2


def resampled(seed: int, found: np.ndarray, *, paired: bool) -> Fields:
    """Mean of `[D, M, N]` with its 95 % interval over all three drawn with replacement.

    Args:
      seed: Of the draws.
      found: From `wins`, or a difference of such.
      paired: Whether M and N are the same images, and drawn alike.
    """
    rng = np.random.default_rng(seed)

    def drawn(count: int) -> np.ndarray:
        return rng.multinomial(count, np.full(count, 1 / count), _DRAWS) / count

    classifiers, first = drawn(found.shape[0]), drawn(found.shape[1])
    second = first if paired else drawn(found.shape[2])
    means = sum(
        share[:, None] * (first @ one) for share, one in zip(classifiers.T, found, strict=True)
    )
    low, high = np.quantile((means * second).sum(1), (0.025, 0.975))
    return {
        "ours": float(found.mean()), "spread": (float(low), float(high)), "n": found.shape[1]
    }  # fmt: skip


def noted(fields: Fields, note: str) -> Fields:
    """Fields with a note added to what is noted already."""
    both = "; ".join(filter(None, (fields.get("note", ""), note)))
    return {**fields, "note": both}


# Command line -------------------------------------------------------------------------------


class Study(NamedTuple):
    """A study of routes.

    Attributes:
      name: Its module below `experiments`.
      title: Of its results.
      text: What a reader needs beside the table.
      schedules: Name to how much is run.
      run: Function of a case, a schedule and the folder of the figures to the rows' fields.
      readings: How routes are made, each studied for itself.
    """

    name: str
    title: str
    text: str
    schedules: Mapping[str, Any]
    run: Callable[[Case, Any, Path], list[Fields]]
    readings: tuple[str, ...] = ("published",)


def results(
    study: Study, models: Sequence[str], schedule: Any, *, data_dir: str | None, work: Path,
    figures: Path, seed: int,
) -> record.Record:  # fmt: skip
    """Runs a study on networks of the zoo.

    Raises:
      ValueError: For an unknown network, or more images asked for than there are.
      FileNotFoundError: If weights or data are nowhere.
    """
    rows: list[record.Row] = []
    for model in models:
        known: list[Any] = []
        for reading in study.readings:
            case = prepare(model, data_dir, work, seed, reading)
            # Few gates are balanced as published, and some networks have no blocks.
            if (case.layers, case.options) in known:
                continue
            known.append((case.layers, case.options))
            # Before the run: the code may change while it goes on.
            about = origin(data=case.said, seeds=[seed])
            for fields in study.run(case, schedule, figures):
                rows.append(record.Row(study=study.name, **fields, **about))
    return record.Record(title=study.title, text=study.text, rows=tuple(rows))


def command(study: Study) -> None:
    """Runs a study from the command line."""
    flags.DEFINE_list("models", ["resnet10_cifar10", "lenet5_mnist"], "networks of the zoo")
    flags.DEFINE_string("data_dir", None, "folder searched first for the data sets")
    flags.DEFINE_enum("schedule", "cpu", sorted(study.schedules), "how much is run")
    flags.DEFINE_integer("seed", 0, "of every draw", lower_bound=0)
    file = ROOT / "experiments" / "results" / f"{study.name}.json"
    flags.DEFINE_string("out", str(file), "results file")
    flags.DEFINE_string("work", "out/routes", "folder of routes and attacked images, shared")
    flags.DEFINE_string("figures", f"out/{study.name}", "folder of the figures")
    counts = [f.name for f in dataclasses.fields(study.schedules["cpu"]) if f.type in _COUNTS]
    for name in counts:
        flags.DEFINE_integer(name, None, "in place of the schedule's", lower_bound=1)

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected argument {argv[1]!r}")
        logging.set_verbosity(logging.WARNING)
        given = flags.FLAGS
        changed = {k: getattr(given, k) for k in counts if getattr(given, k) is not None}
        try:
            schedule = dataclasses.replace(study.schedules[given.schedule], **changed)
            made = results(
                study, given.models, schedule, data_dir=given.data_dir, work=Path(given.work),
                figures=Path(given.figures), seed=given.seed,
            )  # fmt: skip
            out = Path(given.out)
            record.write(out, made)
        except (OSError, ValueError) as error:
            sys.exit(f"error: {error}")
        print(f"wrote {out.name}; python -m experiments.report renders it")

    app.run(main)
