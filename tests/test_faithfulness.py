"""Deletion and insertion against loops over units, and scores against their definitions."""

import functools
import math

import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from interpret import cdrp, faithfulness, gates, plots
from tests import zoo

CONV, LATER = "Net/relu_0", "Net/relu_1"


@functools.cache
def small():
    model = zoo.model("lenet")
    images = model.images(5, seed=1)
    return nns.trace(model.apply, model.params, images[:1]), model.params, images


def a_slice() -> nns.Slice:
    """CONTRIBs of five images, made up."""
    graph, _, _ = small()
    rng = np.random.default_rng(0)
    neurons = {
        name: rng.integers(-3, 4, (5, *neuron.shape)) for name, neuron in graph.neurons().items()
    }
    axes = {name: neuron.channel for name, neuron in graph.neurons().items()}
    return nns.Slice({}, neurons, axes, 5, per_sample=True)


def naive(graph, params, image, scores, shares, fill=0.0):
    """Deletion and insertion of one image, unit by unit; scores differ within each layer."""
    out = np.asarray(nns.evaluate(graph, params, image[None])[0])[0]
    wanted = out.argmax()
    rows = []
    for without in (True, False):
        row = []
        for share in shares:
            edits = {}
            for name, values in scores.items():
                best = sorted(np.ndindex(values.shape), key=lambda u: -values[u])  # noqa: B023
                first = set(best[: math.ceil(round(share * values.size, 9))])
                mask = np.ones(graph.neurons()[name].shape, np.float32)
                for unit in np.ndindex(values.shape):
                    if (unit in first) == without:
                        # A channel is the last axis here.
                        mask[(..., *unit)] = 0
                edits[name] = lambda a, m=mask: a * m + fill * (1 - m)
            changed = np.asarray(nns.evaluate(graph, params, image[None], edits)[0])[0]
            row.append(np.asarray(jax.nn.softmax(changed))[wanted])
        rows.append(row)
    return rows


@pytest.mark.parametrize("fill", [0.0, 0.5])
def test_curves_equal_a_loop_over_units(fill):
    graph, params, images = small()
    rng = np.random.default_rng(0)
    shares = [0, 0.3, 0.5, 1]
    shape = graph.neurons()["input"].shape
    for scores in (
        {CONV: rng.random((5, 4)), LATER: rng.random((5, 6))},
        {"input": rng.random((5, *shape))},
    ):
        found = faithfulness.curves(
            0, graph, params, images, scores, shares, batch_size=2,
            fill={name: np.float32(fill) for name in scores},
        )  # fmt: skip
        for i, image in enumerate(images):
            one = {name: values[i] for name, values in scores.items()}
            deletion, insertion = naive(graph, params, image, one, shares, fill)
            np.testing.assert_allclose(found.deletion[i], deletion, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(found.insertion[i], insertion, rtol=1e-4, atol=1e-6)


def test_both_curves_join_the_whole_network_and_the_empty_one():
    graph, params, images = small()
    scores = faithfulness.of_chance(0, 5, gates.places(graph))
    found = faithfulness.curves(0, graph, params, images, scores)
    whole = np.asarray(jax.nn.softmax(nns.evaluate(graph, params, images)[0])).max(1)
    np.testing.assert_allclose(found.deletion[:, 0], whole, rtol=1e-5)
    np.testing.assert_allclose(found.insertion[:, -1], whole, rtol=1e-5)
    np.testing.assert_allclose(found.deletion[:, -1], found.insertion[:, 0], rtol=1e-5)
    assert found.shares.tolist() == np.linspace(0, 1, 21).tolist()


def test_areas_are_those_of_trapezia():
    found = faithfulness.Curves(
        np.array([0.0, 0.5, 1.0]), np.array([[1.0, 0.5, 0.0]]), np.array([[0.0, 1.0, 1.0]])
    )
    deletion, insertion = found.areas
    assert deletion.tolist() == [0.5] and insertion.tolist() == [0.75]


def test_units_of_all_layers_compete_across_the_network():
    graph, params, images = small()
    # All of the first layer before any of the second.
    scores = {CONV: np.full((5, 4), 2.0), LATER: np.full((5, 6), 1.0)}
    found = faithfulness.curves(0, graph, params, images, scores, [0, 0.4, 1], scope="network")
    off = {CONV: lambda a: a * 0}
    out = np.asarray(jax.nn.softmax(nns.evaluate(graph, params, images, off)[0]))
    wanted = np.asarray(nns.evaluate(graph, params, images)[0]).argmax(1)
    np.testing.assert_allclose(found.deletion[:, 1], out[range(5), wanted], rtol=1e-4, atol=1e-6)


def test_equal_scores_go_in_an_order_of_chance():
    rng = np.random.default_rng(0)
    first = faithfulness._ranks(rng, np.zeros((300, 5))).argmin(1)
    assert np.bincount(first, minlength=5).min() > 30
    ranks = faithfulness._ranks(rng, np.array([[1.0, 3.0, 2.0]]))
    assert ranks.tolist() == [[2, 0, 1]]


def test_scores_are_those_of_slices_routes_and_activations():
    graph, params, images = small()
    piece = a_slice()
    by_channel = faithfulness.of_slice(piece, [CONV, "input"])
    np.testing.assert_array_equal(by_channel[CONV], np.abs(piece.neurons[CONV]).sum((1, 2)))
    single = faithfulness.of_slice(piece, ["input"], "activations")
    np.testing.assert_array_equal(single["input"], np.abs(piece.neurons["input"]))
    active = faithfulness.of_activations(graph, params, images, [LATER, CONV], batch_size=2)
    assert list(active) == [LATER, CONV]
    recorded = np.asarray(nns.evaluate(graph, params, images)[1][CONV])
    np.testing.assert_allclose(active[CONV], np.abs(recorded).mean((1, 2)), rtol=1e-5)
    found = cdrp.route(graph, params, images, iterations=3)
    np.testing.assert_array_equal(faithfulness.of_routes(found)[LATER], found.gates[:, 4:])


def test_integrated_gradients_add_up_to_what_the_logit_loses():
    graph, params, images = small()
    layers = gates.places(graph)
    scores = faithfulness.of_integrated_gradients(
        graph, params, images, layers, steps=400, batch_size=2
    )
    logits = np.asarray(nns.evaluate(graph, params, images)[0])
    wanted = logits.argmax(1)
    for name in layers:
        off = np.asarray(nns.evaluate(graph, params, images, {name: lambda a: a * 0})[0])
        lost = (logits - off)[range(5), wanted]
        np.testing.assert_allclose(scores[name].sum(1), lost, rtol=1e-2, atol=1e-2)


def test_gradients_rank_the_channels_of_a_linear_network_exactly():
    # The logit is linear in the gates, so an optimal order and its areas are known.
    rng = np.random.default_rng(0)

    def apply(p, x):
        return (x @ p["first"]) @ p["second"]

    params = {
        "first": rng.normal(size=(4, 8)).astype(np.float32),
        "second": rng.normal(size=(8, 2)).astype(np.float32),
    }
    images = rng.normal(size=(20, 4)).astype(np.float32)
    graph = nns.trace(apply, params, images[:1])
    layers = gates.places(graph, ["dot_general_0"])
    scores = faithfulness.of_integrated_gradients(graph, params, images, layers, steps=1)
    hidden = images @ params["first"]
    wanted = (hidden @ params["second"]).argmax(1)
    expected = hidden * params["second"].T[wanted]
    np.testing.assert_allclose(scores["dot_general_0"], expected, rtol=1e-4, atol=1e-5)
    margin = hidden * (params["second"].T[wanted] - params["second"].T[1 - wanted])
    best, chance = (
        faithfulness.curves(0, graph, params, images, s).areas
        for s in ({"dot_general_0": margin}, faithfulness.of_chance(0, 20, layers))
    )
    assert best[0].mean() < chance[0].mean() and best[1].mean() > chance[1].mean()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": {}}, "at least one neuron"),
        ({"scores": {"x": np.ones((5, 2))}}, "no neuron 'x'"),
        ({"scores": {CONV: np.ones((5, 3))}}, "must have shape"),
        ({"scores": {CONV: np.full((5, 4), np.nan)}}, "finite"),
        ({"fill": {LATER: 0}}, "fill must be for neurons that are scored, not Net/relu_1"),
        ({"scope": "all"}, "scope must be one of layer, network, not 'all'"),
        ({"shares": [0, 0.5]}, "rise from 0 to 1"),
        ({"shares": [0, 0.5, 0.5, 1]}, "rise from 0 to 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, words):
    graph, params, images = small()
    options = {"scores": {CONV: np.ones((5, 4))}, **change}
    with pytest.raises(ValueError, match=words) as caught:
        faithfulness.curves(0, graph, params, images, options.pop("scores"), **options)
    assert "\n" not in str(caught.value)


def test_scores_of_nothing_are_refused():
    graph, params, images = small()
    piece = a_slice()
    for call, words in (
        (lambda: faithfulness.of_slice(piece, [CONV], "layers"), "channels or activations"),
        (lambda: faithfulness.of_slice(piece, ["x"]), "no neuron 'x'"),
        (lambda: faithfulness.of_slice(piece.total(), [CONV]), "per_sample"),
        (
            lambda: faithfulness.of_integrated_gradients(
                graph, params, images, gates.places(graph), steps=0
            ),
            "steps must be at least 1",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_curves_are_drawn(tmp_path):
    graph, params, images = small()
    layers = gates.places(graph)
    found = {
        str(key): faithfulness.curves(
            key, graph, params, images, faithfulness.of_chance(key, 5, layers), [0, 0.5, 1]
        )
        for key in range(2)
    }
    path = tmp_path / "curves.png"
    plots.save(plots.faithfulness(found), path)
    assert path.read_bytes()[:4] == b"\x89PNG"
