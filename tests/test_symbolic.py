"""Symbolic intervals: a zonotope restated, the same bounds by Fast-Lin, and points inside."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import evaluation
from tests import boxes
from tests.naive import bounds as naive


@functools.cache
def bounded(name: str):
    """Both sides of every logit, and the same by Fast-Lin."""
    model, graph = boxes.traced(name)
    rows = boxes.either_side(int(np.prod(graph.values[graph.logits].shape)))

    @jax.jit
    def run(params, lower, upper):
        symbolic = nns.symbolic_bounds(graph, params, lower, upper, rows)
        back = nns.linear_bounds(graph, params, lower, upper, rows, method="fast-lin")
        return symbolic, back

    return *run(model.params, *boxes.box(name)), rows


@pytest.mark.parametrize("seed", range(3))
def test_dense_networks_equal_the_formulas(seed):
    graph, params, layers = boxes.dense((4, 7, 6, 5, 3), seed)
    rng = np.random.default_rng(seed)
    lower = rng.normal(size=(3, 4)).astype(np.float32)
    upper = (lower + rng.uniform(0, 0.8, lower.shape)).astype(np.float32)
    rows = rng.normal(size=(5, 3)).astype(np.float32)
    found = jax.jit(functools.partial(nns.symbolic_bounds, graph))(params, lower, upper, rows)
    for i in range(3):
        box = lower[i].astype(float), upper[i].astype(float)
        expected = naive.zonotope(layers, box, rows.astype(float))
        np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-5)


def test_small_network_by_hand():
    """`x = relu(x) - relu(-x)` for x in -1..3, margins taken before errors are bounded."""

    def apply(w, x):
        return nn.relu(x @ w["first"]) @ w["second"]

    params = {"first": jnp.array([[1.0, -1.0]]), "second": jnp.array([[1.0], [-1.0]])}
    ends = jnp.array([[-1.0]]), jnp.array([[3.0]])
    graph = nns.trace(apply, params, ends[0])
    found = nns.symbolic_bounds(graph, params, *ends, jnp.array([[1.0], [-1.0]]))
    # x = 1 + 2 e: relu(x) = 0.75 x + 0.375 (1 + e'), relu(-x) = -0.25 x + 0.375 (1 + e'').
    np.testing.assert_array_equal(found, [[1 - 2 - 0.75, -1 - 2 - 0.75]])


@pytest.mark.parametrize("name", ["mlp", "plain_function", "resnet", "remat"])
def test_networks_of_relu_are_bounded_as_by_fast_lin(name):
    symbolic, back, _ = bounded(name)
    np.testing.assert_allclose(symbolic, back, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["activations", "convolutions", "lenet", "moves", "resnet"])
def test_no_point_leaves_the_bounds(name):
    model, graph = boxes.traced(name)
    symbolic, _, rows = bounded(name)
    lower, upper = boxes.box(name)
    points = boxes.points(lower, upper, 60).reshape(-1, *model.shape)
    values = jax.jit(lambda p, x: evaluation.logits(graph, p, x) @ rows.T)(model.params, points)
    least = np.asarray(values).reshape(60, 2, -1).min(0)
    worst = jax.jit(functools.partial(boxes.worst, graph))(model.params, lower, upper, rows)
    slack = 2e-5 * (1 + np.abs(values).max())
    assert np.isfinite(symbolic).all()
    assert (symbolic <= least + slack).all() and (symbolic <= worst + slack).all()


def test_gradients_are_finite_also_of_a_point():
    model, graph = boxes.traced("lenet")
    rows = boxes.either_side(4)

    def total(params, lower, upper):
        return nns.symbolic_bounds(graph, params, lower, upper, rows).sum()

    slope = jax.jit(jax.grad(total))
    middle = model.images(2)
    for ends in (boxes.box("lenet"), (middle, middle)):
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(slope(model.params, *ends)))


def test_rows_of_each_samples_own_and_samples_one_by_one():
    model, graph = boxes.traced("mlp")
    lower, upper = boxes.box("mlp", 3)
    rows = nns.margin_rows(jnp.array([2, 0, 1]), 3)
    run = jax.jit(functools.partial(nns.symbolic_bounds, graph))
    found = run(model.params, lower, upper, rows)
    assert found.shape == (3, 2)
    for i in range(3):
        alone = run(model.params, lower[i : i + 1], upper[i : i + 1], rows[i])
        np.testing.assert_allclose(found[i], alone[0], rtol=1e-5, atol=1e-5)


def test_bad_boxes():
    model, graph = boxes.traced("mlp")
    with pytest.raises(ValueError, match="lower must be at most upper"):
        nns.symbolic_bounds(
            graph,
            model.params,
            np.ones((1, 5), np.float32),
            np.zeros((1, 5), np.float32),
            np.eye(3),
        )
