"""Quantization: whole steps, zeros that stay, and outputs near those of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnslicer_jax as nns
from prune import histograms, quantize
from tests.test_hydra import dense, network
from tests.tiny import data

IMAGES = data().test_images.astype(np.float32) / 255


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_weights_are_whole_steps_and_zeros_stay(seed, scale):
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(4, 3)) * scale).astype(np.float32)
    w[rng.random((4, 3)) < 0.5] = 0
    steps, scales = quantize.in_steps(jnp.asarray(w))
    assert steps.dtype == jnp.int8 and scales.shape == (1, 3)
    steps, scales = np.asarray(steps, float), np.asarray(scales, float)
    np.testing.assert_array_equal(steps[w == 0], 0)
    assert (np.abs(steps * scales - w) <= 0.5001 * scales).all()
    most = np.abs(w).max(0)
    np.testing.assert_array_equal(np.abs(steps).max(0), np.where(most > 0, 127, 0))


def test_activations_are_at_the_nearest_of_256_steps():
    x = jnp.asarray([-9.0, -0.5, -0.201, 0.0, 0.123, 1.0, 2.05, 9.0])
    found = np.asarray(quantize.rounded(x, -0.5, 2.05))
    # Steps of 0.01, 0 at step 50.
    np.testing.assert_allclose(found, [-0.5, -0.5, -0.2, 0, 0.12, 1.0, 2.05, 2.05], atol=1e-6)
    assert found[3] == 0
    np.testing.assert_array_equal(quantize.rounded(x, 0.0, 0.0), np.zeros(8))
    slope = jax.grad(lambda x: quantize.rounded(x, -0.5, 2.05).sum())(x)
    np.testing.assert_allclose(slope[2:6], 1, rtol=1e-6)
    np.testing.assert_array_equal(slope[jnp.asarray([0, 7])], 0)


def test_a_quantized_network_says_nearly_the_same():
    graph, params = network().graph, dense()
    found = quantize.quantize(graph, params, IMAGES, batch_size=8)
    run = jax.jit(lambda params: nns.evaluate(graph, params, IMAGES))
    whole, _ = run(params)
    # Activations range as they do with the weights that are used.
    weights, activations = run(found.params())
    for name, (low, high) in found.ranges.items():
        expected = min(0, activations[name].min()), max(0, activations[name].max())
        np.testing.assert_allclose((low, high), expected, rtol=1e-5, atol=1e-6)
    assert set(found.ranges) < set(graph.neurons())
    logits = jax.jit(lambda params: nns.evaluate(graph, params, IMAGES, found.edits())[0])(
        found.params()
    )
    spread = float(np.abs(whole).max())
    assert 0 < np.abs(logits - whole).max() < 0.05 * spread
    assert 0 < np.abs(weights - whole).max() < 0.05 * spread
    # One byte a weight, four for every scale and all else.
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - 4 * (24 + 120 + 60)
    assert found.bytes() == 24 + 120 + 60 + 4 * (6 + 5 + 3) + others


def test_parameters_that_are_not_finite():
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, dense())
    with pytest.raises(ValueError, match="params must be finite"):
        quantize.quantize(network().graph, bad)


def test_histograms_count_what_is_left():
    params = {"a": jnp.asarray([0.1, 0.6, -0.4, 2.0]), "b": jnp.asarray([0.2]), "c": jnp.ones(3)}
    masks = {"a": jnp.asarray([True, True, False, True]), "b": jnp.asarray([True]), "c": None}
    edges = [-1.0, 0.0, 0.5, 1.0]
    np.testing.assert_array_equal(histograms.histogram(params, masks, edges), [0, 2, 1])
    np.testing.assert_array_equal(histograms.histogram(params, masks, edges, layer="b"), [0, 1, 0])
    with pytest.raises(ValueError, match="layer must be one of a, b, not 'c'"):
        histograms.histogram(params, masks, edges, layer="c")
    with pytest.raises(ValueError, match="edges must be at least two numbers that rise"):
        histograms.histogram(params, masks, [1.0, 0.0])
