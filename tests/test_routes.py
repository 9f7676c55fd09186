"""What routes tell, against naive restatements and cases known by hand."""

import dataclasses
import functools
import math

import numpy as np
import pytest
from scipy import stats

import nnslicer_jax as nns
from interpret import cdrp, plots, routes
from nnslicer_jax import data

LAYERS = {"a": slice(0, 4), "b": slice(4, 10)}


def made(gates, layers=None) -> cdrp.Routes:
    """Routes with the given gates."""
    gates = np.asarray(gates, np.float32)
    layers = LAYERS if layers is None else layers
    zeros = np.zeros(len(gates), np.int32)
    return cdrp.Routes(gates, layers, zeros, zeros.astype(np.float32), zeros, zeros + 1)


def drawn(count: int, seed: int = 0) -> np.ndarray:
    """Gates of which many are 0 and some are equal, `[count, 10]`."""
    rng = np.random.default_rng(seed)
    return np.maximum(rng.integers(-4, 8, (count, 10)), 0).astype(np.float32) / 4


@functools.cache
def digits():
    """Sixty digits with their routes: graph, params, images, labels, routes."""
    digits = data.load("digits")
    trained = nns.zoo.load("digits_cnn")
    images, labels = data.to_float(digits.test_images[:60]), digits.test_labels[:60]
    graph = nns.trace(trained.model.apply, trained.variables, images[:1])
    found = cdrp.route(graph, trained.variables, images, batch_size=60)
    return graph, trained.variables, images, labels, found


def test_critical_nodes_are_above_the_threshold():
    gates = np.array([[0.0, 0.5, 0.51, 3.0]])
    assert routes.critical(gates).tolist() == [[False, False, True, True]]
    assert routes.critical(gates, 0).tolist() == [[False, True, True, True]]
    with pytest.raises(ValueError, match="threshold"):
        routes.critical(gates, -1)


def naive_off(gates, share, mode):
    """Sets of nodes that may be switched off: those surely, and how many in each layer."""
    surely, counts = set(), []
    for part in LAYERS.values():
        on = [i for i in range(part.start, part.stop) if gates[i] > 0.5]
        take = math.ceil(round(share * len(on), 9))
        counts.append(take)
        ranked = sorted(on, key=lambda i: gates[i], reverse=mode == "top")
        if take:
            edge = gates[ranked[take - 1]]
            beyond = (lambda g: g > edge) if mode == "top" else (lambda g: g < edge)  # noqa: B023
            surely |= {i for i in ranked if beyond(gates[i])}
    return surely, counts


@pytest.mark.parametrize("mode", routes.MODES)
def test_a_share_of_the_critical_nodes_of_each_layer_goes(mode):
    gates = drawn(30)
    found = made(gates)
    place, count = routes._order(np.random.default_rng(0), found, mode, tuple(LAYERS), 0.5)
    for share in (0, 0.01, 0.3, 0.5, 1):
        off = routes.switched_off(place, count, share, LAYERS)
        for row, one in zip(off, gates, strict=True):
            surely, counts = naive_off(one, share, mode)
            assert [row[p].sum() for p in LAYERS.values()] == counts
            if mode != "random":
                assert surely <= set(np.flatnonzero(row)) <= set(np.flatnonzero(one > 0.5))
    with pytest.raises(ValueError, match="share must be in 0..1"):
        routes.switched_off(place, count, 1.1, LAYERS)


def test_ablation_equals_zeroing_by_hand():
    graph, params, images, labels, found = digits()
    share = [0, 0.25, 1]
    result = routes.ablate(0, graph, params, images, labels, found, share, "top")
    plain = np.asarray(nns.evaluate(graph, params, images)[0])
    np.testing.assert_array_equal(result.top1[0], plain.argmax(1) == labels)
    assert (result.nodes[0] == 0).all()
    np.testing.assert_array_equal(result.nodes[2], (found.gates > 0.5).sum(1))
    # With all critical nodes gone, by edits of one image.
    neurons = graph.neurons()
    for i in range(5):
        stays = (found.gates[i] <= 0.5).astype(np.float32)
        edits = {
            name: lambda a, stay=stays[part]: a * stay[None, None]
            for name, part in found.layers.items()
        }
        assert all(neurons[name].channel == 2 for name in edits)
        out = np.asarray(nns.evaluate(graph, params, images[i : i + 1], edits)[0])[0]
        assert result.top1[2, i] == (out.argmax() == labels[i])
        assert result.top5[2, i] == (labels[i] in np.argsort(-out)[:5])
    assert (result.top5 | ~result.top1).all()


def test_layers_can_be_ablated_apart():
    graph, params, images, labels, found = digits()
    first, second = found.layers
    for name, part in found.layers.items():
        result = routes.ablate(0, graph, params, images, labels, found, [1], layers=[name])
        np.testing.assert_array_equal(result.nodes[0], (found.gates[:, part] > 0.5).sum(1))
    with pytest.raises(ValueError, match="no gates at 'x'"):
        routes.ablate(0, graph, params, images, labels, found, [1], layers=["x"])
    with pytest.raises(ValueError, match="mode must be one of top, bottom, random, not 'best'"):
        routes.ablate(0, graph, params, images, labels, found, [1], "best")
    with pytest.raises(ValueError, match="equally many"):
        routes.ablate(0, graph, params, images, labels[:3], found, [1])


def test_the_largest_gates_matter_more_than_the_smallest():
    graph, params, images, labels, found = digits()
    share = np.linspace(0.1, 0.9, 5)
    accuracy = {
        mode: routes.ablate(0, graph, params, images, labels, found, share, mode).top1.mean()
        for mode in ("top", "bottom")
    }
    assert accuracy["top"] < accuracy["bottom"]


def test_correlations_are_pearsons():
    first, second = made(drawn(7)), made(drawn(7, 1))
    paired = routes.correlation(first, second)
    crossed = routes.cross_correlation(first, made(drawn(4, 2)))
    for name in LAYERS:
        for i in range(7):
            a, b = first.layer(name)[i], second.layer(name)[i]
            if np.ptp(a) and np.ptp(b):
                np.testing.assert_allclose(paired[name][i], np.corrcoef(a, b)[0, 1], atol=1e-9)
            else:
                assert np.isnan(paired[name][i])
        assert crossed[name].shape == (7, 4)
    itself = routes.correlation(first, first)["b"]
    np.testing.assert_allclose(itself[~np.isnan(itself)], 1)
    assert np.isnan(routes.correlation(made(np.ones((1, 10))), made(np.ones((1, 10))))["a"]).all()
    with pytest.raises(ValueError, match="7 and 3 images"):
        routes.correlation(first, made(drawn(3)))
    with pytest.raises(ValueError, match="different layers"):
        routes.correlation(first, made(drawn(7), {"c": slice(0, 10)}))


def test_separability_of_classes_known_by_hand():
    rows = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.5]])
    apart = routes.separability(rows, np.array([0, 0, 0, 1, 1, 1]), 2)
    assert apart.neighbours == 1 and apart.silhouette > 0.8 and apart.chance == 0.5
    # Of each row's two neighbours the nearer decides: 1, 0 or 2, 1, 11, 10, 11.
    mixed = routes.separability(rows, np.array([0, 1, 1, 0, 0, 1]), 2)
    assert mixed.neighbours == np.mean([False, False, True, True, True, False])
    hits, silhouettes = routes.separable(rows, np.array([0, 1, 1, 0, 0, 1]), 2)
    assert hits.tolist() == [False, False, True, True, True, False]
    # Of the first row: 10.5 on average to its own class, 5.166... to the other.
    np.testing.assert_allclose(silhouettes[0], (15.5 / 3 - 10.5) / 10.5)
    rng = np.random.default_rng(0)
    chance = routes.separability(rng.normal(size=(200, 3)), rng.integers(0, 2, 200))
    assert 0.35 < chance.neighbours < 0.65 and abs(chance.silhouette) < 0.1
    for labels, words in ((np.zeros(6), "2 classes"), (np.arange(6), "2 classes")):
        with pytest.raises(ValueError, match=words):
            routes.separability(rows, labels, 2)
    with pytest.raises(ValueError, match="neighbours"):
        routes.separability(rows, np.array([0, 0, 0, 1, 1, 1]), 6)


def test_an_embedding_keeps_groups_together():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 12)
    rows = rng.normal(size=(36, 5)) + 20 * labels[:, None]
    plane = routes.embedding(0, rows)
    assert plane.shape == (36, 2)
    assert routes.separability(plane, labels).neighbours == 1
    np.testing.assert_array_equal(plane, routes.embedding(0, rows))
    assert np.isfinite(routes.embedding(0, np.ones((6, 3)))).all()
    with pytest.raises(ValueError, match="at least 4"):
        routes.embedding(0, rows[:3])


def test_prototypes_are_means():
    found = made(drawn(6))
    labels = np.array([3, 3, 5, 5, 5, 9])
    present, means = routes.prototypes(found.gates, labels)
    assert present.tolist() == [3, 5, 9] and means.dtype == np.float32
    np.testing.assert_allclose(means[1], found.gates[2:5].mean(0), rtol=1e-6)
    with pytest.raises(ValueError, match="one for each of 6 routes"):
        routes.prototypes(found.gates, labels[:4])


def test_clusters_merge_the_closest_first():
    rows = np.array([[0.0], [10.0], [1.0], [12.0], [50.0]])
    found = routes.cluster(rows)
    assert sorted(found.merges[0, :2]) == [0, 2] and found.merges[0, 2] == 1
    assert sorted(found.merges[1, :2]) == [1, 3] and found.merges[1, 2] == 2
    # Average linkage: the mean of |0-10|, |0-12|, |1-10|, |1-12|.
    assert found.merges[2, 2] == 10.5
    assert found.heights()[0].tolist()[:4] == [0, 10.5, 1, 10.5]
    parts = found.parts(3)
    assert len(set(parts)) == 3 and parts[0] == parts[2] != parts[1] == parts[3] != parts[4]
    assert sorted(found.order) == [0, 1, 2, 3, 4]
    for call, words in (
        (lambda: routes.cluster(rows, "median"), "method must be one of average"),
        (lambda: routes.cluster(rows[:1]), "at least 2 rows"),
        (lambda: found.parts(6), "count must be in 1..5, not 6"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_outliers_lie_far_from_the_rest_of_their_class():
    gates = drawn(12)
    gates[:6] = gates[0] + 0.01 * np.random.default_rng(0).random((6, 10))
    gates[4] += 3
    labels = np.array([0] * 6 + [1] * 5 + [2])
    odd = routes.outliers(gates, labels)
    assert odd.argmax() == 4
    here = np.flatnonzero(labels == 1)
    wide = gates.astype(float)
    apart = [np.linalg.norm(wide[i] - np.mean([wide[j] for j in here if j != i], 0)) for i in here]
    np.testing.assert_allclose(odd[here], apart / np.median(apart), rtol=1e-5)
    assert odd[11] == 0
    assert (routes.outliers(np.ones((3, 10)), np.zeros(3)) == 0).all()


def test_routes_beside_slices_and_paths_of_the_same_images():
    graph, params, images, labels, found = digits()
    some = found.take(np.arange(12))
    path = nns.effective_path(graph, params, images[:12], per_sample=True)
    rng = np.random.default_rng(0)
    piece = dataclasses.replace(
        path, neurons={k: rng.integers(-2, 3, v.shape) for k, v in path.neurons.items()}
    )
    for one in (path, piece):
        scores = np.concatenate([np.abs(one.neurons[name].sum((1, 2))) for name in found.layers], 1)
        kept = rng.random(scores.shape) < 0.3 if one is piece else scores > 0
        given = kept if one is piece else None
        result = routes.similarity(0, some.gates, scores, found.layers, given)
        for name, part in found.layers.items():
            for i in range(12):
                a, b = some.gates[i, part], scores[i, part]
                rank = result.ranks[name][i]
                if np.ptp(a) and np.ptp(b):
                    np.testing.assert_allclose(rank, stats.spearmanr(a, b).statistic, atol=1e-9)
                own = kept[i, part]
                size = own.sum()
                if 0 < size < len(b):
                    # Equal gates may go in any order: those above the last are in, below it out.
                    last = np.sort(a)[-size]
                    least = (own & (a > last)).sum()
                    spare = size - (a > last).sum()
                    equal = own & (a == last), ~own & (a == last)
                    low = least + max(0, spare - equal[1].sum())
                    high = least + min(spare, equal[0].sum())
                    overlap = result.overlap[name][i]
                    assert low / (2 * size - low) <= overlap + 1e-9
                    assert overlap <= high / (2 * size - high) + 1e-9
                else:
                    assert np.isnan(result.overlap[name][i])
    with pytest.raises(ValueError, match="one shape"):
        routes.similarity(0, some.gates, found.gates, found.layers)


def test_similarity_of_what_is_equal_and_of_what_is_drawn():
    scores = drawn(40)
    same = routes.similarity(0, scores, scores, LAYERS)
    for name in LAYERS:
        known = ~np.isnan(same.overlap[name])
        assert known.any() and (same.overlap[name][known] == 1).all()
    rng = np.random.default_rng(1)
    other = routes.similarity(0, rng.random((400, 10)), drawn(400), LAYERS)
    for name in LAYERS:
        overlap, chance = np.nanmean(other.overlap[name]), np.nanmean(other.chance[name])
        assert abs(overlap - chance) < 0.05
        assert abs(np.nanmean(other.ranks[name])) < 0.1


def test_pictures_are_drawn(tmp_path):
    graph, params, images, labels, found = digits()
    curves = {
        mode: routes.ablate(0, graph, params, images, labels, found, [0, 0.5, 1], mode)
        for mode in routes.MODES
    }
    planes = {name: routes.embedding(0, found.layer(name)) for name in found.layers}
    numbers = {name: routes.separability(found.layer(name), labels) for name in found.layers}
    own = routes.correlation(found, found)
    target = routes.cross_correlation(found, found.take(np.arange(9)))
    few = found.take(np.arange(10))
    for number, make in enumerate(
        (
            lambda: plots.ablation(curves),
            lambda: plots.drift(own, target, title="t"),
            lambda: plots.embeddings(planes, labels, numbers),
            lambda: plots.separability(numbers),
            lambda: plots.dendrogram(routes.cluster(few.gates), images[:10], [3]),
            lambda: plots.path(found.gates[0], found.layers),
        )
    ):
        path = tmp_path / f"{number}.png"
        plots.save(make(), path)
        content = path.read_bytes()
        assert content[:4] == b"\x89PNG" and len(content) > 8000
