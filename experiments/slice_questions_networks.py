"""Recurrent and graph-convolution networks: their slices, on scikit-learn's digits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from experiments.slice_questions_case import Case, Finding, curve, kept, measured, shuffled
from nnslicer_jax import data, training

_THETAS = (0.1, 0.3, 0.5)
_SIDE = 8


class Recurrent(nn.Module):
    """Reads the rows of an image [B, 8, 8, 1] one after another."""

    cell: Callable[[int], nn.RNNCellBase]
    features: int = 24
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images in [0, 1] to logits [B, num_classes]; training and inference are alike."""
        del train
        states: Any = nn.RNN(self.cell(self.features))(x[..., 0])
        return nn.Dense(self.num_classes)(states[:, -1])


def grid() -> np.ndarray:
    """The graph of an image's pixels: [E, 2] sources and targets, each pixel its own too."""
    pixels = [(r, c) for r in range(_SIDE) for c in range(_SIDE)]
    return np.array([
        (_SIDE * r + c, _SIDE * (r + i) + c + j)
        for r, c in pixels for i in (-1, 0, 1) for j in (-1, 0, 1)
        if 0 <= r + i < _SIDE and 0 <= c + j < _SIDE
    ])  # fmt: skip


class GraphConvolution(nn.Module):
    """Pixels [B, 8, 8, 1] as the nodes of a graph: each adds up what its neighbours hold."""

    dense: bool
    features: tuple[int, ...] = (8, 16)
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images in [0, 1] to logits [B, num_classes]; training and inference are alike."""
        del train
        x = x.reshape(x.shape[0], _SIDE * _SIDE, 1)
        for features in self.features:
            x = nn.relu(self.gather(nn.Dense(features)(x)))
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))

    def gather(self, x: jax.Array) -> jax.Array:
        """Sums over neighbours, as a product with the adjacency or by scattering messages."""
        edges = grid()
        if self.dense:
            adjacency = np.zeros((_SIDE * _SIDE,) * 2, np.float32)
            adjacency[edges[:, 1], edges[:, 0]] = 1
            return jnp.einsum("pq,bqc->bpc", jnp.asarray(adjacency), x) / 9
        return jnp.zeros_like(x).at[:, edges[:, 1]].add(x[:, edges[:, 0]]) / 9


# Name -> learning rate and the forms of one network, which share their weights.
NETWORKS: dict[str, tuple[float, dict[str, nn.Module]]] = {
    "LSTM": (0.2, {"": Recurrent(nn.LSTMCell)}),
    "GRU": (0.2, {"": Recurrent(nn.GRUCell)}),
    "graph convolution": (
        0.1,
        {", adjacency": GraphConvolution(dense=True), ", scattered": GraphConvolution(dense=False)},
    ),
}


def networks(case: Case) -> Finding:
    """Trains each network on the digits, slices it for all classes and runs the slices.

    The slice of all classes is that of training images, each for its own class.
    """
    rows: list[dict[str, Any]] = []
    curves = []
    digits = data.load("digits")
    for name, (rate, forms) in NETWORKS.items():
        options = training.TrainingOptions(
            epochs=case.sizes.epochs, batch_size=64, learning_rate=rate, seed=case.seed
        )
        params = training.train(next(iter(forms.values())), digits, options)
        pieces = []
        for form, model in forms.items():
            small = _digits(case, f"digits, {name}{form}", model, params, digits)
            right = small.predicted == small.test_labels
            rows.append(measured(small.name, "accuracy, whole network", right))
            sizes, agreeing = {}, {}
            for theta in _THETAS:
                piece = _slice(small, theta)
                sizes[theta] = [kept(piece)]
                agreeing[theta] = _same(small, piece)
                rows += _rows(small, piece, theta, agreeing[theta])
                # The forms name their neurons otherwise.
                pieces.append(dataclasses.replace(piece, neurons={}, axes={}))
            curves += [
                curve(f"size, {name}{form}", sizes),
                curve(f"agreement, {name}{form}", agreeing),
            ]
        for theta, one, other in zip(
            _THETAS, pieces[: len(_THETAS)], pieces[len(_THETAS) :], strict=False
        ):
            metric = f"Jaccard similarity of the two forms' slices, theta {theta:g}"
            rows.append(measured(f"digits, {name}", metric, [one.similarity(other)]))
    # Whatever the case is of.
    said = f"{digits.name}, all training and test images"
    return Finding([{**row, "data": said} for row in rows], curves, ("theta", "%"))


def _digits(case: Case, name: str, model: nn.Module, params: Any, digits: data.Dataset) -> Case:
    """A network trained here as a case of its own."""
    train, test = data.to_float(digits.train_images), data.to_float(digits.test_images)
    graph = nns.trace(model.apply, params, train[:1])
    return dataclasses.replace(
        case, name=name, graph=graph, params=params, profile=nns.profile(graph, params, train),
        train_images=train, train_labels=digits.train_labels, test_images=test,
        test_labels=digits.test_labels, data=digits.name,
    )  # fmt: skip


def _slice(case: Case, theta: float) -> nns.Slice:
    """The slice of all classes."""
    count = min(case.sizes.of_class * case.classes, len(case.train_labels))
    return case.slice(case.train_images[:count], case.train_labels[:count], theta=theta)


def _same(case: Case, piece: nns.Slice) -> np.ndarray:
    return case.logits(case.test_images, piece).argmax(1) == case.predicted


def _rows(case: Case, piece: nns.Slice, theta: float, same: np.ndarray) -> list[dict[str, Any]]:
    rng = np.random.default_rng(case.seed)
    drawn = [_same(case, shuffled(piece, rng)).mean() for _ in range(case.sizes.draws)]
    return [
        measured(case.name, f"synapses in the slice, theta {theta:g}", [kept(piece)]),
        measured(case.name, f"agreement as a model, theta {theta:g}", same),
        measured(case.name, f"agreement, random synapses, theta {theta:g}", drawn, "draws"),
    ]
