"""Slices from hidden neurons: how large, how alike, and whether they keep the neuron's value."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import nnslicer_jax as nns
from experiments.slice_questions_case import (
    Case,
    Curve,
    Finding,
    mean,
    measured,
    rectified,
    shuffled,
)

_LAYERS = 3


def neuron(case: Case) -> Finding:
    """Slices hidden channels of some layers.

    A slice keeps its neuron's value where the channel's activations in the network cut down to it
    correlate with those in the whole one, over positions and test images. The yardstick keeps
    the same neurons, and as many synapses in each layer drawn among those that lead to the
    channel.
    """
    rng = np.random.default_rng(case.seed)
    names = rectified(case.graph)
    layers = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, _LAYERS).astype(int))]
    images = case.train_images[: case.sizes.of_channel]
    tested = case.test_images[: case.sizes.tested]
    rows, sliced, drawn, shares = [], [], [], []
    for layer in layers:
        place = case.graph.neurons()[layer]
        mean_of = np.asarray(case.profile.means[layer]).reshape(-1, place.shape[place.channel])
        active = np.flatnonzero(mean_of.max(0) > 0)
        channels = np.sort(rng.permutation(active)[: case.sizes.channels])
        # Positive weights cancel nothing: at theta 0 all that leads to the channel is in.
        positive = jax.tree.map(jnp.abs, case.params)
        pieces, of_all, by_slice, by_chance = [], [], [], []
        for channel in channels:
            whole = _activations(case, None, layer, channel, tested)
            leading = nns.static_slice(case.graph, positive, [channel], theta=0.0, neuron=layer)
            piece = case.slice(images, np.full(len(images), channel), neuron=layer)
            pieces.append(piece)
            of_all.append(piece.size()[0] / leading.size()[0])
            by_slice.append(_correlation(whole, _activations(case, piece, layer, channel, tested)))
            by_chance.append(
                np.mean([
                    _correlation(
                        whole,
                        _activations(case, shuffled(piece, rng, leading), layer, channel, tested),
                    )
                    for _ in range(case.sizes.draws)
                ])
            )  # fmt: skip
        pairs = [a.similarity(b) for a, b in itertools.combinations(pieces, 2)]
        row = f"{case.name}, {layer}"
        rows += [
            measured(row, "synapses that lead to a channel in its slice", of_all),
            measured(row, "Jaccard similarity of two channels' slices", pairs, "pairs of channels"),
            measured(row, "correlation of the value, slice", by_slice, unit=""),
            measured(row, "correlation of the value, random synapses", by_chance, unit=""),
        ]
        shares.append(of_all)
        sliced.append(by_slice)
        drawn.append(by_chance)
    depth = [float(names.index(layer) + 1) for layer in layers]
    curves = [
        Curve(label, depth, *zip(*map(mean, found), strict=True))
        for label, found in (
            ("share of the leading synapses", shares),
            ("correlation, slice", sliced),
            ("correlation, random synapses", drawn),
        )
    ]
    return Finding(
        rows, curves, ("rectifier of the criterion, counted from the input", "share, correlation")
    )


def _activations(
    case: Case, piece: nns.Slice | None, layer: str, channel: int, images: np.ndarray
) -> np.ndarray:
    """Activations of one channel over images and positions, flat."""
    found = case.activations(images, layer, piece)
    axis = case.graph.neurons()[layer].channel + 1
    return np.take(found, channel, axis).ravel()


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation; 0 where one stands still."""
    if one.std() < 1e-6 or other.std() < 1e-6:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
