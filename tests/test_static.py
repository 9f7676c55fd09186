"""Static slices: against the oracle on activations of 1, and what must hold of them."""

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
from tests.test_neuron_criterion import ending_at, flat_positions


def ones(network: naive.Network) -> np.ndarray:
    """An activation of 1 in every cell, but for constants."""
    values = np.ones(len(network.cells))
    for i, cell in enumerate(network.cells):
        if isinstance(cell, naive.Constant):
            values[i] = cell.value
    return values


@pytest.mark.parametrize("name", nets.EXACT)
def test_equals_the_oracle_on_ones(name):
    prepared = exact(name, "channel")
    network = prepared.case.network
    values = ones(network)
    # A theta of 0 compiles anew.
    for theta in (0.0, 0.25) if name in ("lenet", "resnet") else (0.25,):
        for outputs in ([0], [1, 2]):
            expected = naive.contributions(network, values, 0 * values, outputs, theta)
            found = nns.static_slice(prepared.graph, prepared.case.params, outputs, theta)
            assert_same(found, expected)


def test_a_network_by_hand():
    params = {"first": jnp.array([[1.0, -3.0]]), "second": jnp.array([[2.0, 2.0], [-1.0, 1.0]])}
    graph = nns.trace(lambda p, x: x @ p["first"] @ p["second"], params, jnp.ones((1, 1)))
    # Output 0 sums 2 and -1, to 1: |-1| is not below half of it, both stay.
    found = nns.static_slice(graph, params, [0], theta=0.5)
    assert found.synapses["second"].tolist() == [[1, 0], [-1, 0]]
    assert found.synapses["first"].tolist() == [[1, 1]]
    assert found.neurons["input"].tolist() == [2]
    # Output 1 sums 2 and 1, to 3: 1 is below half of it and goes.
    found = nns.static_slice(graph, params, [1], theta=0.5)
    assert found.synapses["second"].tolist() == [[0, 1], [0, 0]]
    assert found.synapses["first"].tolist() == [[1, 0]]
    assert found.criterion == {"method": "static", "rule": "signed", "theta": 0.5}


@pytest.mark.parametrize("theta", [0.0, 0.3])
def test_positive_weights_reach_all_that_leads_to_the_output(theta):
    rng = np.random.default_rng(0)
    params = {"a": rng.uniform(1, 2, (4, 5)), "b": rng.uniform(1, 2, (5, 3))}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in params.items()}
    graph = nns.trace(lambda p, x: nn.relu(x @ p["a"]) @ p["b"], params, np.ones((1, 4), "f4"))
    found = nns.static_slice(graph, params, [1], theta)
    assert not np.any(found.synapses["b"][:, [0, 2]])
    if theta == 0:
        assert np.all(found.synapses["a"] == 1) and np.all(found.synapses["b"][:, 1] == 1)
        assert np.all(found.neurons["input"] == 5)
    else:
        assert 0 < np.count_nonzero(found.synapses["b"][:, 1]) < 5


def test_from_a_hidden_neuron_equals_the_oracle():
    prepared = exact("lenet", "channel")
    network = ending_at(prepared.case.network, "Net/relu_1")
    layer, axis = prepared.case.network.layers["Net/relu_1"]
    values = ones(network)
    start = flat_positions(layer, axis, [2])
    found = nns.static_slice(prepared.graph, prepared.case.params, [2], 0.25, neuron="Net/relu_1")
    assert_same(found, naive.contributions(network, values, 0 * values, start, 0.25))
    assert found.criterion["neuron"] == "Net/relu_1"


def test_scaling_a_layer_changes_nothing_and_turning_it_turns_the_signs():
    prepared = exact("lenet", "channel")
    params = prepared.case.params
    one = nns.static_slice(prepared.graph, params, [0], 0.25)
    scaled = jax.tree.map(lambda a: 4 * a, params)
    other = nns.static_slice(prepared.graph, scaled, [0], 0.25)
    layers = dict(params["params"])
    layers["Dense_1"] = {**layers["Dense_1"], "kernel": -layers["Dense_1"]["kernel"]}
    turned = nns.static_slice(prepared.graph, {"params": layers}, [0], 0.25)
    for name, contrib in one.synapses.items():
        assert np.any(contrib)
        np.testing.assert_array_equal(other.synapses[name], contrib)
        np.testing.assert_array_equal(turned.synapses[name], -contrib)


def test_runs_as_a_network_and_combines_with_dynamic_slices():
    prepared = exact("lenet", "channel")
    given = (prepared.graph, prepared.case.params)
    static = nns.static_slice(*given, [0, 1, 2, 3], 0.25)
    dynamic = nns.slice_network(*given, prepared.profile, prepared.images, theta=0.25)
    assert 0 < static.similarity(dynamic) < 1
    assert static.union(dynamic).size()[0] > max(static.size()[0], dynamic.size()[0])
    assert_refused(lambda: static + dynamic, "method", "do not add up")
    masked = nns.mask_network(*given, static, "mean", prepared.profile)
    assert 0 <= nns.agreement(*given, masked, prepared.images) <= 1


@pytest.mark.parametrize(
    "outputs, options, words",
    [
        ([4], {}, ["class indices below 4", r"4\.\.4"]),
        ([-1], {}, ["class indices below 4", r"-1\.\.-1"]),
        ([], {}, ["class indices", r"shape \(1, 0\)"]),
        ([[0]], {}, ["class indices", r"shape \(1, 1, 1\)"]),
        ([9], {"neuron": "Net/relu_1"}, ["channel indices below 4", "Net/relu_1"]),
        ([0.5], {}, ["class indices", "float64"]),
        ([0], {"theta": 1.5}, ["theta", r"0\.\.1", r"1\.5"]),
        ([0], {"rule": "largest"}, ["rule", "signed or mass", "largest"]),
    ],
)
def test_what_is_refused(outputs, options, words):
    prepared = exact("lenet", "channel")
    assert_refused(
        lambda: nns.static_slice(prepared.graph, prepared.case.params, outputs, **options), *words
    )


def test_places_that_the_sample_chooses_are_refused():
    params = {"table": jnp.ones((7, 3)), "w": jnp.ones((3, 2))}
    lookup = nns.trace(
        lambda p, x: jnp.take(p["table"], x[:, 0], axis=0) @ p["w"], params, np.zeros((1, 1), int)
    )
    ordered = nns.trace(lambda p, x: jnp.sort(x @ p["table"].T, 1)[:, :3] @ p["w"], params,
                        np.zeros((1, 3), "f4"))  # fmt: skip
    for graph in (lookup, ordered):
        assert_refused(
            lambda graph=graph: nns.static_slice(graph, params, [0]), "static slice",
            "where the sample says", error=nns.UnsupportedError,
        )  # fmt: skip
