"""Neurons that deviate: ranked as stated, and held still one image at a time."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from nnslicer_jax import deviation
from tests import zoo
from tests.test_bad_input import assert_refused


@functools.cache
def setting():
    model = zoo.model("lenet")
    images = np.asarray(model.images(12))
    graph = nns.trace(model.apply, model.params, images[:1])
    return graph, model.params, nns.profile(graph, model.params, images), images


def hidden(graph: nns.Graph) -> list[str]:
    return [name for name in graph.neurons() if "relu" in name]


def test_normal_and_deviation_are_what_they_say():
    contrib = {
        "a": np.array([[0, 4], [2, 4], [-6, 1], [6, 1]]),
        "b": np.array([[1], [1], [3], [5]]),
    }
    usual = deviation.normal(contrib, [0, 0, 1, 1], 2)
    assert usual.mean["a"].tolist() == [[1, 4], [0, 1]] and usual.mean["b"].tolist() == [[1], [4]]
    assert usual.std["a"].tolist() == [[1, 0], [6, 0]] and usual.std["b"].tolist() == [[0], [1]]
    new = {"a": np.array([[3, 9], [12, -2]]), "b": np.array([[1], [4]])}
    found = deviation.deviation(new, [0, 1], usual)
    # A neuron that never varied counts in edges.
    assert found["a"].tolist() == [[2, 5], [2, 3]] and found["b"].tolist() == [[0], [0]]


def test_top_takes_the_highest_over_all_neurons():
    scores = {"a": np.array([[1.0, 5.0], [0.0, 0.0]]), "b": np.array([[5.0, 2.0], [0.0, 9.0]])}
    chosen = deviation.top(scores, 2)
    assert chosen["a"].tolist() == [[False, True], [True, False]]
    assert chosen["b"].tolist() == [[True, False], [False, True]]
    assert not any(np.any(mask) for mask in deviation.top(scores, 0).values())
    assert all(np.all(mask) for mask in deviation.top(scores, 7).values())


@pytest.mark.parametrize("baseline", ["channel", "position"])
def test_each_image_loses_its_own_neurons(baseline):
    graph, params, _, images = setting()
    profile = nns.profile(graph, params, images, baseline=baseline)
    rng = np.random.default_rng(0)
    names = hidden(graph)
    neurons = graph.neurons()
    held = {n: rng.random((12, neurons[n].shape[neurons[n].channel])) < 0.3 for n in names}
    found = deviation.logits_without(graph, params, profile, images, held, batch_size=5)
    for row, image in enumerate(images):
        # Channels are last in this network.
        edits = {
            n: lambda a, n=n, row=row: jnp.where(held[n][row], profile.means[n], a) for n in names
        }
        expected, _ = nns.evaluate(graph, params, jnp.asarray(image)[None], edits)
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-4, atol=1e-5)


def test_none_held_is_the_model_and_all_held_stands_still():
    graph, params, profile, images = setting()
    names = hidden(graph)
    neurons = graph.neurons()
    none = {n: np.zeros((12, neurons[n].shape[neurons[n].channel]), bool) for n in names}
    found = deviation.logits_without(graph, params, profile, images, none)
    logits, _ = nns.evaluate(graph, params, jnp.asarray(images))
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    still = deviation.logits_without(
        graph, params, profile, images, {n: ~mask for n, mask in none.items()}
    )
    np.testing.assert_allclose(still, np.broadcast_to(still[:1], still.shape), rtol=1e-5)
    assert not np.allclose(found, still)


def test_slices_per_sample_give_the_contributions():
    graph, params, profile, images = setting()
    piece = nns.slice_network(graph, params, profile, images, theta=0.2, per_sample=True)
    contrib = {name: piece.channels()[name] for name in hidden(graph)}
    labels = np.arange(12) % 3
    usual = deviation.normal(contrib, labels, 3)
    for name in contrib:
        for label in range(3):
            rows = contrib[name][labels == label]
            np.testing.assert_allclose(usual.mean[name][label], rows.mean(0))
            np.testing.assert_allclose(usual.std[name][label], rows.std(0))
    chosen = deviation.top(deviation.deviation(contrib, labels, usual), 3)
    assert (sum(mask.sum(1) for mask in chosen.values()) == 3).all()


def test_what_is_refused():
    graph, params, profile, images = setting()
    contrib = {"a": np.zeros((4, 2), int)}
    usual = deviation.normal(contrib, [0, 0, 1, 1], 2)
    for call, words in (
        (lambda: deviation.normal(contrib, [0, 0, 0, 0], 2), ["labels", "every class", "1 is"]),
        (lambda: deviation.normal(contrib, [0, 1], 2), ["labels", "4 inputs", r"\(2,\)"]),
        (lambda: deviation.normal(contrib, [0, 0, 1, 2], 2), ["labels", "below 2", r"0\.\.2"]),
        (lambda: deviation.normal({}, [], 2), ["contrib", "empty"]),
        (lambda: deviation.deviation(contrib, [0.5] * 4, usual), ["labels", "float64"]),
        (lambda: deviation.deviation({"b": contrib["a"]}, [0] * 4, usual), ["contrib", "'a', 'b'"]),
        (lambda: deviation.top(contrib, -1), ["count", "0 or more", "-1"]),
        (
            lambda: deviation.logits_without(graph, params, profile, images, {"x": np.ones(1)}),
            ["no neuron", "x"],
        ),
        (
            lambda: deviation.logits_without(
                graph, params, profile, images, {hidden(graph)[0]: np.ones((12, 99), bool)}
            ),
            ["held", r"\(12, 99\)"],
        ),
    ):
        assert_refused(call, *words)
