"""Compaction: smaller networks that compute what the masked ones do, and how much smaller."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import models
from prune import compact, criteria, masks, removal
from tests import nets, zoo

SHAPES = {
    "digits_cnn": (8, 8, 1),
    "lenet5": (28, 28, 1),
    "mnist_cnn": (28, 28, 1),
    "resnet10": (32, 32, 3),
    "resnet20": (32, 32, 3),
    "vgg16": (32, 32, 3),
}


def channel_masks(graph: nns.Graph, params, share: float, seed: int):
    """Masks that take away whole rows and columns of every kernel, and single synapses too."""
    rng = np.random.default_rng(seed)
    found = []
    for name, ident in graph.params.items():
        shape = graph.values[ident].shape
        if name not in criteria.kernels(graph):
            found.append(None)
            continue
        mask = rng.random(shape) < 0.9
        for axis in (-1, -2):
            gone = rng.random(shape[axis]) >= share
            gone[rng.integers(shape[axis])] = False
            mask &= ~np.moveaxis(np.broadcast_to(gone, np.moveaxis(mask, axis, -1).shape), -1, axis)
        found.append(jnp.asarray(mask))
    return jax.tree.unflatten(jax.tree.structure(params), found)


def assert_same(graph: nns.Graph, params, kept, images) -> compact.Compact:
    """The compact network computes what the masked one does; returns it."""
    small = compact.compact(graph, params, kept)
    network = removal.reduced(graph, params, kept)
    whole = jax.jit(lambda p, x: nns.evaluate(graph, p.params, x, p.edits)[0])(network, images)
    found = jax.jit(lambda p, x: nns.evaluate(small.graph, p, x)[0])(small.params, images)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        scale = float(jnp.abs(other).max()) + 1e-6
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * scale)
    assert jax.tree.structure(found) == jax.tree.structure(whole)
    assert compact.size(small.graph, small.params) <= compact.size(graph, params)
    return small


def fresh(name: str):
    """A network of the package with weights drawn, biases and statistics among them."""
    module = models.create(name)
    images = jax.random.uniform(jax.random.key(1), (3, *SHAPES[name]))
    params = jax.jit(module.init)(jax.random.key(0), images[:1])
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [a + rng.random(a.shape, np.float32) if a.ndim == 1 else a for a in leaves]
    params = jax.tree.unflatten(tree, leaves)
    return nns.trace(module.apply, params, images), params, images


@pytest.mark.parametrize(
    "name",
    [n if n in ("digits_cnn", "lenet5", "resnet10") else pytest.param(n, marks=pytest.mark.slow)
     for n in SHAPES],
)  # fmt: skip
def test_the_smaller_network_is_the_masked_one(name):
    graph, params, images = fresh(name)
    small = assert_same(graph, params, channel_masks(graph, params, 0.5, 3), images)
    before, after = (compact.size(*n) for n in ((graph, params), small))
    assert after.parameters < 0.5 * before.parameters
    assert after.multiplications < 0.5 * before.multiplications


# Those of which the rules differ; the others take minutes.
QUICK = ("channels_first", "convolutions", "gru", "mlp", "moves", "pools_and_norms")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(zoo.MAKERS)],
)
def test_any_network_keeps_its_outputs(name):
    model = zoo.model(name)
    images = model.images(3)
    graph = nns.trace(model.apply, model.params, images)
    assert_same(graph, model.params, channel_masks(graph, model.params, 0.6, 0), images)


@functools.cache
def perceptron(activation=nn.relu):
    def body(x):
        x = activation(nn.Dense(6)(x))
        x = activation(nn.Dense(5)(x))
        return nn.Dense(3)(x)

    module = nets.Net(body)
    images = jax.random.normal(jax.random.key(1), (4, 4))
    params = module.init(jax.random.key(0), images)
    params = jax.tree.map(lambda a: a + 0.5 if a.ndim == 1 else a, params)
    return nns.trace(module.apply, params, images), params, images


def mask_of(graph, params, changes: dict[str, np.ndarray]):
    found = [jnp.asarray(changes[n], bool) if n in changes else None for n in graph.params]
    return jax.tree.unflatten(jax.tree.structure(params), found)


def test_sizes_are_those_counted_by_hand():
    graph, params, images = perceptron()
    assert compact.size(graph, params) == (24 + 6 + 30 + 5 + 15 + 3, 24 + 30 + 15)
    first, second = np.ones((4, 6)), np.ones((6, 5))
    first[:, [0, 3]] = 0  # two neurons without a synapse
    second[5] = 0  # and one without use
    kept = mask_of(graph, params, {"params/Dense_0/kernel": first, "params/Dense_1/kernel": second})
    small = assert_same(graph, params, kept, images)
    assert compact.size(*small) == (12 + 3 + 15 + 5 + 15 + 3, 12 + 15 + 15)
    shapes = {name: a.shape for name, a in nets.flat(small.params).items()}
    assert shapes["params/Dense_0/kernel"] == (4, 3) and shapes["params/Dense_0/bias"] == (3,)
    assert shapes["params/Dense_1/kernel"] == (3, 5)


def test_sizes_of_convolutions_are_those_counted_by_hand():
    graph, params, images = fresh("digits_cnn")
    convolutions = 64 * 9 * 16 + 16 * 9 * 16 * 32
    assert compact.size(graph, params).multiplications == convolutions + 128 * 32 + 32 * 10
    kernel = np.ones((3, 3, 1, 16))
    kernel[..., 4:] = 0
    small = assert_same(graph, params, mask_of(graph, params, {"params/Conv_0/kernel": kernel}),
                        images)  # fmt: skip
    convolutions = 64 * 9 * 4 + 16 * 9 * 4 * 32
    assert compact.size(*small).multiplications == convolutions + 128 * 32 + 32 * 10


def test_nothing_masked_leaves_everything():
    graph, params, images = fresh("digits_cnn")
    kept = masks.topk(criteria.magnitudes(graph, params), 1)
    small = assert_same(graph, params, kept, images)
    assert compact.size(*small) == compact.size(graph, params)
    for one, other in zip(jax.tree.leaves(small.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "activation", [nn.relu, nn.sigmoid, jnp.cos], ids=["relu", "sigmoid", "cos"]
)
def test_a_layer_pruned_to_nothing_leaves_the_last_bias(activation):
    graph, params, images = perceptron(activation)
    nothing = np.zeros((6, 5))
    kept = mask_of(graph, params, {"params/Dense_1/kernel": nothing})
    small = assert_same(graph, params, kept, images)
    found = nns.evaluate(small.graph, small.params, images)[0]
    if activation is not jnp.cos:  # of which nothing is known
        bias = nets.flat(params)["params/Dense_2/bias"]
        np.testing.assert_allclose(found, np.broadcast_to(bias, found.shape), rtol=1e-6)


def test_the_smaller_network_can_be_sliced():
    graph, params, images = fresh("digits_cnn")
    small = assert_same(graph, params, channel_masks(graph, params, 0.5, 0), images)
    profile = nns.profile(small.graph, small.params, images)
    piece = nns.slice_network(small.graph, small.params, profile, images[:1])
    assert set(criteria.kernels(graph)) <= set(piece.synapses)
    assert set(criteria.kernels(small.graph)) == set(criteria.kernels(graph))


def test_masks_of_another_network_are_refused():
    graph, params, _ = perceptron()
    kept = mask_of(graph, params, {"params/Dense_1/kernel": np.ones((5, 5))})
    with pytest.raises(ValueError, match="^the mask of params/Dense_1/kernel must be bool of"):
        compact.compact(graph, params, kept)
    with pytest.raises(ValueError, match="^masks must have the structure of params"):
        compact.compact(graph, params, {"a": None})
