"""What slicing is estimated to cost."""

import functools

import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import contribution, models
from nnslicer_jax.slicing import _job, _walk_batch
from tests import zoo


@functools.cache
def traced(name: str, shape: tuple[int, ...]):
    module = models.create(name)
    images = jax.ShapeDtypeStruct((1, *shape), np.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), images)
    return nns.trace(module.apply, params, images), params


def lenet5_terms() -> int:
    # A 5x5 window at every position with "same" padding, then three dense layers.
    convolutions = 28 * 28 * 25 * 1 * 6 + 14 * 14 * 25 * 6 * 16
    return convolutions + 7 * 7 * 16 * 120 + 120 * 84 + 84 * 10


def test_terms_are_the_multiplications():
    graph, _ = traced("lenet5", (28, 28, 1))
    assert nns.estimate(graph).terms == lenet5_terms()


def test_products_of_activations_count():
    model = zoo.model("attention")
    graph = nns.trace(model.apply, model.params, model.images(1))
    # Per head of 2: queries by keys and weights by values, 5 x 5 positions of depth 2.
    weights = 5 * 4 * 4 * 4 + 5 * 4 * 8 * 2 + 4 * 3
    assert nns.estimate(graph).terms == weights + 2 * (2 * 5 * 5 * 2)


def test_a_batch_fits_the_budget():
    graph, _ = traced("resnet10", (32, 32, 3))
    for memory in (1, 1 << 20, 1 << 26, 1 << 30):
        found = nns.estimate(graph, memory=memory)
        assert found.bytes > 0 and 1 <= found.batch_size <= 256
        assert found.batch_size == 1 or found.bytes * found.batch_size <= memory
    sizes = [nns.estimate(graph, memory=1 << n).batch_size for n in (20, 24, 28, 32)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_larger_networks_cost_more():
    small, large = (nns.estimate(traced(name, (32, 32, 3))[0]) for name in ("resnet10", "resnet18"))
    assert large.terms > small.terms and large.bytes > small.bytes
    assert large.seconds > small.seconds and large.batch_size <= small.batch_size


def test_theta_0_costs_less():
    graph, _ = traced("resnet10", (32, 32, 3))
    assert nns.estimate(graph, theta=0).seconds < nns.estimate(graph, theta=0.2).seconds
    assert nns.estimate(graph, theta=0).terms == nns.estimate(graph, theta=0.2).terms


@pytest.mark.parametrize("name, shape", [("lenet5", (28, 28, 1)), ("resnet10", (32, 32, 3))])
def test_memory_is_what_the_compiled_walk_takes(name, shape):
    graph, params = traced(name, shape)
    size = 8
    images = jax.ShapeDtypeStruct((size, *shape), np.float32)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), params)
    job = _job(graph, params, images, contribution.RULES, "signed", 0.2, False, size, None, "host")
    means = {
        neuron.value: np.zeros(graph.values[neuron.value].shape, np.float32)
        for neuron in graph.neurons().values()
    }
    walk = job.walk._replace(devices=1)
    compiled = _walk_batch.lower(
        graph, walk, params, means, images, None, np.ones(size, bool), np.float32(0.2)
    ).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes / size
    assert taken / 3 < nns.estimate(graph).bytes < 3 * taken


def test_an_estimate_is_said_in_words():
    graph, _ = traced("lenet5", (28, 28, 1))
    text = str(nns.estimate(graph))
    assert "\n" not in text
    for word in ("M terms", "MiB", "s an image", "batches of"):
        assert word in text
