"""Criteria: which synapses are scored, and the scores, beside plain loops."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from prune import criteria, masks
from tests import nets, zoo


def traced(name: str):
    model = zoo.model(name)
    return nns.trace(model.apply, model.params, model.images(1)), model.params


def piece_of(graph: nns.Graph, seed: int) -> nns.Slice:
    """A slice with few different CONTRIBs, so that many are equal."""
    rng = np.random.default_rng(seed)
    synapses = {n: rng.integers(-2, 3, graph.values[i].shape) for n, i in graph.params.items()}
    return nns.Slice(synapses, {}, {}, 1)


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_kernels_are_scored_and_nothing_else(name):
    graph, params = traced(name)
    expected = {n for n in graph.params if n.endswith("kernel")}
    assert set(criteria.kernels(graph)) == expected
    for scores in (
        criteria.contributions(graph, params, piece_of(graph, 0)),
        criteria.weighted(graph, params, piece_of(graph, 0)),
        criteria.magnitudes(graph, params),
        criteria.channels(graph, params),
        criteria.random(jax.random.key(0), graph, params),
    ):
        leaves = jax.tree.leaves(scores, is_leaf=lambda a: a is None)
        scored = {n for n, leaf in zip(graph.params, leaves, strict=True) if leaf is not None}
        assert scored == expected
        for (n, ident), leaf in zip(graph.params.items(), leaves, strict=True):
            assert leaf is None or leaf.shape == graph.values[ident].shape, n


def test_equal_contributions_go_by_weight():
    graph, params = traced("mlp")
    params = jax.tree.map(lambda a: jnp.round(4 * a) / 4, params)  # equal weights too
    piece = piece_of(graph, 1)
    ranks = nets.flat(criteria.contributions(graph, params, piece))
    entries = []
    for name in criteria.kernels(graph):
        weights = nets.flat(params)[name]
        for at in np.ndindex(weights.shape):
            pair = abs(int(piece.synapses[name][at])), abs(float(weights[at]))
            entries.append((pair, int(ranks[name][at])))
    for (one, rank), (other, beside) in itertools.combinations(entries[:150], 2):
        assert (one < other) == (rank < beside) and (one == other) == (rank == beside)
    assert sorted({rank for _, rank in entries}) == list(range(len({pair for pair, _ in entries})))


def test_contributions_beyond_float32_are_told_apart():
    graph, params = traced("mlp")
    piece = piece_of(graph, 0)
    name = criteria.kernels(graph)[0]
    large = piece.synapses[name].copy()
    large.flat[:2] = 2**40, -(2**40) - 1
    piece = dataclasses.replace(piece, synapses={**piece.synapses, name: large})
    ranks = nets.flat(criteria.contributions(graph, params, piece))[name]
    assert ranks.flat[1] == ranks.flat[0] + 1 == ranks.max()


def test_weights_and_channels_are_those_of_loops():
    graph, params = traced("lenet")
    size, channels = (nets.flat(f(graph, params)) for f in (criteria.magnitudes, criteria.channels))
    for name in criteria.kernels(graph):
        weights = nets.flat(params)[name]
        np.testing.assert_array_equal(size[name], np.abs(weights))
        for neuron in range(weights.shape[-1]):
            mean = np.abs(weights[..., neuron]).mean()
            np.testing.assert_allclose(channels[name][..., neuron], mean, rtol=1e-5)
            assert len(np.unique(channels[name][..., neuron])) == 1


def test_neurons_are_read_off_the_operation():
    graph, params = traced("channels_first")  # a kernel of shape (out, in, h, w)
    found = nets.flat(criteria.channels(graph, params))["kernel"]
    expected = np.abs(params["kernel"]).mean((1, 2, 3))
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, None, None, None], found.shape),
                               rtol=1e-5)  # fmt: skip


def test_weighted_contributions_are_products():
    graph, params = traced("mlp")
    piece = piece_of(graph, 0)
    found = nets.flat(criteria.weighted(graph, params, piece))
    for name in criteria.kernels(graph):
        expected = np.abs(piece.synapses[name] * nets.flat(params)[name])
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_chance_follows_the_key():
    graph, params = traced("mlp")
    one, same, other = (criteria.random(jax.random.key(s), graph, params) for s in (0, 0, 1))
    for a, b, c in zip(*map(jax.tree.leaves, (one, same, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.any(a != c)
    assert masks.kept(masks.topk(one, 0.5)) == masks.kept(masks.topk(other, 0.5))


def test_other_slices_are_refused():
    graph, params = traced("mlp")
    per_sample = dataclasses.replace(piece_of(graph, 0), per_sample=True)
    with pytest.raises(ValueError, match="^contributions need one slice"):
        criteria.contributions(graph, params, per_sample)
    with pytest.raises(ValueError, match="^the slice is of another network: it lacks synapses"):
        criteria.weighted(graph, params, nns.Slice({}, {}, {}, 1))
