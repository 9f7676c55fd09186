"""Removal: what goes with its synapses, beside a loop that looks again until nothing changes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import models
from prune import criteria, masks, removal
from tests import nets

WIDTH = 5


class Residual(nn.Module):
    """Two layers whose outputs are summed, and a third."""

    activation: str = "relu"

    @nn.compact
    def __call__(self, x):
        activation = getattr(nn, self.activation)
        x = activation(nn.Dense(WIDTH)(x))
        x = x + activation(nn.Dense(WIDTH)(x))
        return nn.Dense(3)(x)


def case(seed: int, share: float = 0.35, activation: str = "relu"):
    """The network, and masks that take away most synapses."""
    module = Residual(activation)
    images = jax.random.normal(jax.random.key(1), (6, 4))
    params = module.init(jax.random.key(0), images)
    params = jax.tree.map(lambda a: a + 0.5 if a.ndim == 1 else a, params)
    graph = nns.trace(module.apply, params, images)
    rng = np.random.default_rng(seed)
    kernels = {
        name: rng.random(graph.values[graph.params[name]].shape) < share
        for name in criteria.kernels(graph)
    }
    found = [jnp.asarray(kernels[n]) if n in kernels else None for n in graph.params]
    kept = jax.tree.unflatten(jax.tree.structure(params), found)
    return graph, params, images, kept, [kernels[f"params/Dense_{i}/kernel"] for i in range(3)]


def fixed_point(kernels: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The synapses and neurons left, by taking away until nothing more goes.

    A neuron of the sum lives while either summand does; those of the last layer always stay.
    """
    first, second, third = (kernel.copy() for kernel in kernels)
    a, b = np.ones(WIDTH, bool), np.ones(WIDTH, bool)
    while True:
        before = [v.copy() for v in (first, second, third, a, b)]
        for j in range(WIDTH):
            read_a = second[j].any() or third[j].any()
            a[j] &= first[:, j].any() and read_a
            b[j] &= second[:, j].any() and third[j].any()
            first[:, j] &= a[j]
            second[j] &= a[j]
            second[:, j] &= b[j]
            third[j] &= a[j] or b[j]
        if all(np.array_equal(x, y) for x, y in zip(before, (first, second, third, a, b),
                                                     strict=True)):  # fmt: skip
            return [first, second, third], [a, b]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_what_goes_is_the_fixed_point(share):
    gone = 0
    graph, params, _, _, _ = case(0)
    remove = jax.jit(lambda kept: removal.remove(graph, params, kept).masks)
    for seed in range(20):
        *_, kept, kernels = case(seed, share)
        found = nets.flat(remove(kept))
        expected, neurons = fixed_point(kernels)
        for i, kernel in enumerate(expected):
            np.testing.assert_array_equal(found[f"params/Dense_{i}/kernel"], kernel)
            gone += (kernels[i] & ~kernel).sum()
        for i, there in enumerate(neurons):
            np.testing.assert_array_equal(found[f"params/Dense_{i}/bias"], there)
        assert found["params/Dense_2/bias"].all()
    assert gone > 0


@pytest.mark.parametrize("activation", ["relu", "tanh", "sigmoid", "softplus"])
def test_neurons_without_synapses_are_0(activation):
    graph, params, images, kept, _ = case(4, 0.25, activation)
    network = removal.reduced(graph, params, kept)
    logits, _ = nns.evaluate(graph, network.params, images, network.edits)
    weights, x = nets.flat(params), np.asarray(images)
    mask = [np.asarray(nets.flat(kept)[f"params/Dense_{i}/kernel"]) for i in range(3)]
    f = getattr(nn, activation)
    lives = mask[0].any(0)

    def layer(x, i):
        return (
            x @ (weights[f"params/Dense_{i}/kernel"] * mask[i]) + weights[f"params/Dense_{i}/bias"]
        )

    a = np.where(lives, f(layer(x, 0)), 0)
    b = np.where((mask[1] & lives[:, None]).any(0), f(layer(a, 1)), 0)
    np.testing.assert_allclose(logits, layer(a + b, 2), rtol=1e-5, atol=1e-6)
    assert not lives.all()
    needs_edits = activation in ("sigmoid", "softplus")
    assert bool(network.edits) == needs_edits


def test_batch_norm_goes_with_its_channel():
    module = models.create("resnet10")
    images = jax.random.uniform(jax.random.key(1), (1, 32, 32, 3))
    params = jax.eval_shape(module.init, jax.random.key(0), images)
    params = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
    graph = nns.trace(module.apply, params, images)
    first = np.ones((3, 3, 16, 16), bool)
    first[..., 2] = False
    whole = np.ones((3, 3, 16, 16), bool)
    whole[:] = False  # the second summand of the first block's sum goes
    names = {"params/BasicBlock_0/Conv_0/kernel": first, "params/BasicBlock_0/Conv_1/kernel": whole}
    kept = jax.tree.unflatten(
        jax.tree.structure(params),
        [jnp.asarray(names[n]) if n in names else None for n in graph.params],
    )
    found = nets.flat(jax.jit(lambda k: removal.remove(graph, params, k).masks)(kept))
    # Nothing reads what the first convolution of the block makes, so all of it goes.
    assert not found["params/BasicBlock_0/Conv_0/kernel"].any()
    for norm in (0, 1):
        assert not found[f"params/BasicBlock_0/BatchNorm_{norm}/scale"].any()
        assert not found[f"params/BasicBlock_0/BatchNorm_{norm}/bias"].any()
        assert not found[f"batch_stats/BasicBlock_0/BatchNorm_{norm}/mean"].any()
    # The shortcut holds the sum; a variance may not be set to 0.
    assert found["params/Conv_0/kernel"].all()
    assert found["params/BasicBlock_1/Conv_0/kernel"].all()
    assert found["params/BatchNorm_0/scale"].all()
    assert "batch_stats/BatchNorm_0/var" not in found


def test_what_stays_computes_the_same():
    graph, params, images, kept, _ = case(1, 0.5)
    network = removal.reduced(graph, params, kept)
    again = removal.reduced(graph, network.params, kept)
    for one, other in zip(
        jax.tree.leaves(network.params), jax.tree.leaves(again.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    everything = masks.topk(criteria.magnitudes(graph, params), 1)
    whole = removal.reduced(graph, params, everything)
    np.testing.assert_array_equal(
        nns.evaluate(graph, whole.params, images, whole.edits)[0],
        nns.evaluate(graph, params, images)[0],
    )
