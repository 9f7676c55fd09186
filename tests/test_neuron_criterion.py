"""A criterion on a hidden neuron: against the oracle, and against a network that ends there."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from tests import nets
from tests.naive import slicing as naive
from tests.test_bad_input import assert_refused
from tests.test_contribution import assert_same, exact

# A neuron in the middle of each network.
PLACES = {
    "mlp": "Net/relu_0",
    "conv_channels_first": "relu",
    "residual": "Net/add",
    "matrix_products": "dot_general_3",
    "layer_used_twice": "Net/relu_0",
    "lenet": "Net/relu_1",
    "resnet": "Net/relu_0",
}


def ending_at(network: naive.Network, name: str) -> naive.Network:
    """The same network, its outputs being the activations of one of its layers."""
    cut = copy.copy(network)
    cut.output = network.layers[name][0].ravel()
    return cut


def flat_positions(layer: np.ndarray, axis: int, channels: list[int]) -> list[int]:
    """Where the channels lie in the flat layer."""
    numbers = np.arange(layer.size).reshape(layer.shape)
    return np.take(numbers, channels, axis).ravel().tolist()


@pytest.mark.parametrize("theta", [0.0, 0.25])
@pytest.mark.parametrize("name", PLACES)
def test_channels_equal_the_oracle(name, theta):
    prepared = exact(name, "channel")
    neuron = PLACES[name]
    layer, axis = prepared.case.network.layers[neuron]
    network = ending_at(prepared.case.network, neuron)
    outputs = np.array([[0], [1], [layer.shape[axis] - 1]])
    pieces = nns.slice_network(
        prepared.graph, prepared.case.params, prepared.profile, prepared.images, outputs, theta,
        per_sample=True, neuron=neuron,
    )  # fmt: skip
    for row, values in enumerate(prepared.values):
        start = flat_positions(layer, axis, outputs[row].tolist())
        expected = naive.contributions(network, values, prepared.means, start, theta)
        assert_same(pieces, expected, row)
    assert any(np.any(contrib) for contrib in pieces.synapses.values())


@pytest.mark.parametrize("name", ["lenet", "resnet"])
def test_single_activations_and_paths_equal_the_oracle(name):
    prepared = exact(name, "channel")
    neuron = PLACES[name]
    layer, _ = prepared.case.network.layers[neuron]
    network = ending_at(prepared.case.network, neuron)
    chosen = np.random.default_rng(0).random((3, *layer.shape)) < 0.2
    given = (prepared.graph, prepared.case.params)
    pieces = nns.slice_network(
        *given, prepared.profile, prepared.images, chosen, 0.25, per_sample=True, neuron=neuron
    )
    paths = nns.effective_path(*given, prepared.images, chosen, 0.5, per_sample=True, neuron=neuron)
    for row, values in enumerate(prepared.values):
        start = np.flatnonzero(chosen[row]).tolist()
        assert_same(pieces, naive.contributions(network, values, prepared.means, start, 0.25), row)
        assert_same(paths, naive.effective_path(network, values, start, 0.5), row)


class Net(nn.Module):
    """A small network that ends at its logits, or at the second rectifier."""

    whole: bool

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(3, (3, 3), name="first")(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(4, (3, 3), name="second")(x)).reshape(x.shape[0], -1)
        return nn.Dense(5, name="third")(x) if self.whole else x


@functools.cache
def setting():
    images = np.random.default_rng(0).integers(-3, 4, (8, 6, 6, 2)).astype(np.float32)
    params = nets.fill(Net(whole=True).init(jax.random.key(0), images[:1]), whole=True, seed=0)
    graph = nns.trace(Net(whole=True).apply, params, images[:1])
    return graph, params, nns.profile(graph, params, images), images


@pytest.mark.parametrize("theta", [0.0, 0.25, 0.5])
def test_equals_the_slice_of_a_network_that_ends_there(theta):
    graph, params, profile, images = setting()
    first = {"params": {k: v for k, v in params["params"].items() if k != "third"}}
    ended = nns.trace(Net(whole=False).apply, first, images[:1])
    known = nns.profile(ended, first, images)
    channels = np.arange(len(images)) % 4
    # Of the flat logits [3 * 3 * 4], those of the channel.
    flat = np.arange(9)[None] * 4 + channels[:, None]
    expected = nns.slice_network(ended, first, known, images, flat, theta, per_sample=True)
    found = nns.slice_network(
        graph, params, profile, images, channels, theta, per_sample=True, neuron="Net/relu_1"
    )
    single = np.broadcast_to(np.eye(4, dtype=bool)[channels][:, None, None], (8, 3, 3, 4))
    alone = nns.slice_network(
        graph, params, profile, images, single, theta, per_sample=True, neuron="Net/relu_1"
    )
    for name, contrib in expected.synapses.items():
        assert np.any(contrib), name
        np.testing.assert_array_equal(found.synapses[name], contrib, err_msg=name)
        np.testing.assert_array_equal(alone.synapses[name], contrib, err_msg=name)
    for name, contrib in expected.neurons.items():
        np.testing.assert_array_equal(found.neurons[name], contrib, err_msg=name)
    assert set(found.synapses) - set(expected.synapses) == {"params/third/kernel"}
    assert not np.any(found.synapses["params/third/kernel"])
    for name in set(found.neurons) - set(expected.neurons):
        assert not np.any(found.neurons[name])


def test_sets_of_images_add_up_and_run_as_a_network():
    graph, params, profile, images = setting()
    neuron, channels = "Net/relu_1", np.zeros(len(images), int)
    some = functools.partial(
        nns.slice_network, graph, params, profile, images, channels, 0.25, neuron=neuron
    )
    one, apart = some(), some(per_sample=True).total()
    for name, contrib in apart.synapses.items():
        np.testing.assert_array_equal(one.synapses[name], contrib)
        np.testing.assert_array_equal(some(batch_size=3).synapses[name], contrib)
    assert one.criterion["neuron"] == neuron
    other = nns.slice_network(graph, params, profile, images, theta=0.25)
    assert "neuron" not in other.criterion
    assert_refused(lambda: one + other, "neuron", "do not add up")
    masked = nns.mask_network(graph, params, one, "mean", profile)
    logits, _ = nns.evaluate(graph, masked.params, jnp.asarray(images), masked.edits)
    # No way leads on from the neuron: the logits stand still.
    np.testing.assert_allclose(logits, np.broadcast_to(logits[:1], logits.shape), atol=1e-4)


def test_a_model_without_logits_can_be_sliced_from_a_neuron():
    params = {"w": jnp.asarray(np.random.default_rng(0).integers(-2, 3, (3, 4)), jnp.float32)}
    images = np.random.default_rng(1).integers(-3, 4, (5, 2, 3)).astype(np.float32)
    graph = nns.trace(lambda p, x: nn.relu(x @ p["w"]), params, images[:1])
    profile = nns.profile(graph, params, images)
    assert_refused(lambda: nns.slice_network(graph, params, profile, images), "logits", "2, 4")
    found = nns.slice_network(graph, params, profile, images, [1] * 5, 0.0, neuron="relu")
    assert np.any(found.synapses["w"][:, 1]) and not np.any(found.synapses["w"][:, [0, 2, 3]])


@pytest.mark.parametrize("outputs", [[0] * 4, [[0]] * 4, [True] * 4])
def test_a_neuron_of_one_number(outputs):
    rng = np.random.default_rng(0)
    params = {"w": rng.integers(1, 4, (3, 4)), "out": rng.integers(1, 4, (4, 2))}
    params = {name: jnp.asarray(w, jnp.float32) for name, w in params.items()}
    images = rng.integers(1, 5, (4, 3)).astype(np.float32)

    def apply(p, x):
        hidden = x @ p["w"]
        return (hidden * hidden.sum(1)[:, None]) @ p["out"]

    graph = nns.trace(apply, params, images[:1])
    assert graph.neurons()["reduce_sum"].shape == ()
    profile = nns.profile(graph, params, images)
    given = (graph, params, profile, images)
    found = nns.slice_network(*given, outputs, 0.0, per_sample=True, neuron="reduce_sum")
    # All weights are positive; what stands still contributes nothing.
    delta = images - images.mean(0)
    total = np.sign((delta @ np.asarray(params["w"])).sum(1))
    hidden = np.sign(delta @ np.asarray(params["w"]))
    expected = np.sign(delta)[:, :, None] * np.abs(hidden)[:, None] * total[:, None, None]
    np.testing.assert_array_equal(found.neurons["reduce_sum"], np.ones(4))
    np.testing.assert_array_equal(found.synapses["w"], expected)
    assert not np.any(found.synapses["out"])
    static = nns.static_slice(graph, params, [0], 0.0, neuron="reduce_sum")
    np.testing.assert_array_equal(static.synapses["w"], np.ones((3, 4)))
    assert_refused(
        lambda: nns.slice_network(*given, [1] * 4, neuron="reduce_sum"), "channel indices below 1"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"neuron": "Net/relu_7", "outputs": [0] * 8}, ["no neuron", "Net/relu_7", "neurons()"]),
        ({"neuron": "Net/relu_1"}, ["outputs", "channel", "Net/relu_1", "None"]),
        ({"neuron": "Net/relu_1", "outputs": [4] * 8}, ["channel indices below 4", r"4\.\.4"]),
        ({"neuron": "Net/relu_1", "outputs": [0.5] * 8}, ["channel indices", "float64"]),
        ({"neuron": "Net/relu_1", "outputs": [0] * 3}, ["8 images", "not 3"]),
        (
            {"neuron": "Net/relu_1", "outputs": np.ones((8, 3, 4), bool)},
            [r"bool \[N, 3, 3, 4\]", r"\(8, 3, 4\)"],
        ),
        ({"outputs": np.ones((8, 4), bool)}, ["class indices", r"bool \[N, 5\]", r"\(8, 4\)"]),
    ],
)  # fmt: skip
def test_criteria_that_are_refused(options, words):
    graph, params, profile, images = setting()
    assert_refused(lambda: nns.slice_network(graph, params, profile, images, **options), *words)
