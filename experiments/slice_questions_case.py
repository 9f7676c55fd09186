"""What the questions about slices are asked of: a network, its data, and how much of it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import nnslicer_jax as nns
from nnslicer_jax import checkpoint, data

# What the networks were sliced with by the paper; 0.2 for others.
_THETAS = {"lenet5_mnist": 0.1}
# Images run or sliced at once.
_BATCH = 64
_RUN = 250


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much a schedule does.

    Attributes:
      profiled: Training images profiled.
      of_class: Training images in the slice of a class.
      tested: Test images that cut networks run on.
      channels: Hidden channels sliced in each layer.
      of_channel: Training images in the slice of a hidden channel.
      subsets: Sets of classes drawn of each size.
      known: Training images whose slices say what is normal.
      chosen: Further ones on which the number of held neurons is chosen.
      judged: Test images to repair.
      single: Test images sliced one by one, beside static and conditioned slices.
      draws: Times that a yardstick is drawn at random.
      epochs: Passes over the digits for networks trained here.
    """

    profiled: int
    of_class: int
    tested: int
    channels: int
    of_channel: int
    subsets: int
    known: int
    chosen: int
    judged: int
    single: int
    draws: int
    epochs: int


SCHEDULES = {
    "cpu": Sizes(
        profiled=2000, of_class=30, tested=1000, channels=4, of_channel=50, subsets=5, known=500,
        chosen=500, judged=800, single=50, draws=3, epochs=60,
    ),
    "published": Sizes(
        profiled=50_000, of_class=1000, tested=10_000, channels=16, of_channel=500, subsets=20,
        known=10_000, chosen=5000, judged=10_000, single=1000, draws=10, epochs=60,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One network with its data.

    Attributes:
      name: Of the network in the zoo.
      weights: SHA-256 of the file its parameters are read from.
      graph: The traced network.
      params: Its parameters.
      profile: Mean activations over training images.
      theta: Size of the slices.
      train_images: `[N, H, W, C]` float32, 0..1, as many as are asked for.
      train_labels: `[N]` int32.
      test_images: As train_images.
      test_labels: As train_labels.
      sizes: How much to do.
      seed: Of every draw.
      data: Data set and split, in words.
    """

    name: str
    weights: str
    graph: nns.Graph
    params: Any
    profile: nns.Profile
    theta: float
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    sizes: Sizes
    seed: int
    data: str

    @functools.cached_property
    def classes(self) -> int:
        """Number of classes."""
        return self.graph.values[self.graph.logits].shape[1]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the images and labels."""
        return checkpoint.digest(
            (self.train_images, self.train_labels, self.test_images, self.test_labels)
        )

    @functools.cached_property
    def predicted(self) -> np.ndarray:
        """`[N]` the network's classes of the test images."""
        return self.logits(self.test_images).argmax(1)

    @functools.cached_property
    def class_slices(self) -> list[nns.Slice]:
        """Slice of each class: its first training images, for the class."""
        return [self.conditioned(label) for label in range(self.classes)]

    def conditioned(
        self, label: int, condition: Callable[[np.ndarray], np.ndarray] | None = None
    ) -> nns.Slice:
        """The slice of one class, over its first training images that meet a condition."""
        images = self.train_images[self.train_labels == label]
        if condition is not None:
            images = images[condition(images)]
        images = images[: self.sizes.of_class]
        return self.slice(images, np.full(len(images), label))

    def slice(self, images: np.ndarray, outputs: Any = None, **options: Any) -> nns.Slice:
        """The slice of the images, at the case's theta."""
        options = {"theta": self.theta, "batch_size": _BATCH, **options}
        return nns.slice_network(self.graph, self.params, self.profile, images, outputs, **options)

    def mask(self, piece: nns.Slice) -> nns.Masked:
        """The network cut down to a slice, the rest held at its mean."""
        return nns.mask_network(self.graph, self.params, piece, "mean", self.profile)

    def logits(self, images: np.ndarray, piece: nns.Slice | None = None) -> np.ndarray:
        """Logits `[N, K]`, of the network cut down to a slice where one is given."""
        return self._run(images, None, piece)

    def activations(
        self, images: np.ndarray, neuron: str, piece: nns.Slice | None = None
    ) -> np.ndarray:
        """A neuron's activations `[N, ...]`, likewise."""
        return self._run(images, neuron, piece)

    def _run(self, images: np.ndarray, neuron: str | None, piece: nns.Slice | None) -> np.ndarray:
        masked = None if piece is None else self.mask(piece)
        return np.concatenate([
            np.asarray(_run(self.graph, neuron, self.params, masked, images[i : i + _RUN]))
            for i in range(0, len(images), _RUN)
        ])  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(graph, neuron, params, masked, images):
    """The logits, or a neuron's activations where one is named."""
    if masked is None:
        logits, found = nns.evaluate(graph, params, images)
    else:
        logits, found = nns.evaluate(graph, masked.params, images, masked.edits)
    return logits if neuron is None else found[neuron]


def prepare(
    name: str, sizes: Sizes, seed: int, data_dir: str | None = None, theta: float | None = None
) -> Case:
    """Loads a network of the zoo with its data, and profiles it."""
    trained = nns.zoo.load(name)
    dataset = data.load(trained.card["data"], data_dir)
    count = max(sizes.profiled, 12 * sizes.of_class, sizes.known + sizes.chosen)
    tested = max(sizes.tested, sizes.judged, sizes.single)
    train = data.to_float(np.asarray(dataset.train_images[:count]))
    test = data.to_float(np.asarray(dataset.test_images[:tested]))
    graph = nns.trace(trained.model.apply, trained.variables, train[:1])
    note = f" ({dataset.note})" if dataset.note else ""
    return Case(
        name=name,
        weights=trained.card["weights_sha256"],
        graph=graph,
        params=trained.variables,
        profile=nns.profile(graph, trained.variables, train[: sizes.profiled]),
        theta=_THETAS.get(name, 0.2) if theta is None else theta,
        train_images=train,
        train_labels=np.asarray(dataset.train_labels[:count]).astype(np.int32),
        test_images=test,
        test_labels=np.asarray(dataset.test_labels[:tested]).astype(np.int32),
        sizes=sizes,
        seed=seed,
        data=f"{dataset.name}, first training and test images{note}",
    )


class Curve(NamedTuple):
    """One line of a figure.

    Attributes:
      label: What it is.
      x: Where.
      y: How much.
      spread: Half-width of the 95 % interval of each y.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float]


class Finding(NamedTuple):
    """The answer to one question; plain data, as JSON keeps it.

    Attributes:
      rows: Fields of `record.Row`: row, metric, ours, spread, unit, n, note; data where it is
        not that of the case.
      curves: Lines of its figure.
      axes: Labels of the figure's axes, x then y.
    """

    rows: list[dict[str, Any]]
    curves: list[Curve]
    axes: tuple[str, str]


def mean(values: Any) -> tuple[float, float]:
    """Mean of numbers and half the width of its 95 % interval, 1.96 standard errors."""
    values = np.asarray(values, np.float64)
    if not values.size:
        raise ValueError("values is empty; a mean takes at least one number")
    error = values.std(ddof=1) / math.sqrt(values.size) if values.size > 1 else 0.0
    return float(values.mean()), 1.96 * float(error)


def measured(row: str, metric: str, values: Any, note: str = "", unit: str = "%") -> dict[str, Any]:
    """A row's fields for a mean; under "%" the values are shares, 0..1."""
    values = (100.0 if unit == "%" else 1.0) * np.asarray(values, np.float64)
    common = {"row": row, "metric": metric, "unit": unit, "n": values.size}
    if not values.size:
        return {**common, "ours": None, "note": f"there was none{note and '; '}{note}"}
    middle, half = mean(values)
    return {**common, "ours": middle, "spread": half if values.size > 1 else None, "note": note}


def curve(label: str, groups: Mapping[Any, Any]) -> Curve:
    """A line through the means of groups of shares, in percent."""
    found = [mean(values) for values in groups.values()]
    middles, halves = zip(*found, strict=True)
    return Curve(
        label, [float(x) for x in groups], [100 * y for y in middles], [100 * h for h in halves]
    )


def shuffled(
    piece: nns.Slice, rng: np.random.Generator, among: nns.Slice | None = None
) -> nns.Slice:
    """As many synapses in each layer in random places, of those in `among` where it is given."""
    synapses = {}
    for name, contrib in piece.synapses.items():
        places = np.ones(contrib.shape, bool) if among is None else among.synapses[name] != 0
        moved = np.zeros_like(contrib)
        moved[places] = rng.permutation(contrib[places])
        synapses[name] = moved
    return dataclasses.replace(piece, synapses=synapses)


def kept(piece: nns.Slice) -> float:
    """Share of the network's synapses in a slice, 0..1."""
    inside, whole = piece.size()
    return inside / whole


def rectified(graph: nns.Graph) -> list[str]:
    """Names of the rectifiers' outputs: what the next layer reads."""
    return [name for name in graph.neurons() if name.split("/")[-1].split("_")[0] == "relu"]
