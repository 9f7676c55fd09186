"""The study of open questions, on the digits and few images."""

import dataclasses
import functools
import json
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import record, slice_questions, slice_questions_networks
from experiments.slice_questions_case import (
    SCHEDULES,
    Case,
    Curve,
    Finding,
    Sizes,
    curve,
    kept,
    mean,
    measured,
    prepare,
    rectified,
    shuffled,
)
from experiments.slice_questions_composed import composed
from experiments.slice_questions_neuron import neuron
from experiments.slice_questions_repair import repair
from experiments.slice_questions_static import _agreement, _pairs, _without, static

TINY = Sizes(
    profiled=200, of_class=4, tested=60, channels=2, of_channel=6, subsets=2, known=150, chosen=60,
    judged=80, single=6, draws=2, epochs=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def case() -> Case:
    return prepare("digits_cnn", TINY, seed=0)


def by_metric(found: Finding) -> dict[tuple[str, str], float]:
    """What was measured, by row and metric; every row is one that a results file takes."""
    origin = {"command": "c", "data": "d", "seeds": (0,), "commit": "unknown", "hardware": "h"}
    rows = [record.Row(study="slice_questions", **(origin | row)) for row in found.rows]
    record.Record(title="t", rows=tuple(rows))
    assert all(0 <= row.ours <= 100 for row in rows if row.unit == "%" and row.ours is not None)
    return {(row.row, row.metric): row.ours for row in rows}


def test_means_and_rows_are_what_they_say():
    assert mean([1, 2, 3, 6]) == (3.0, pytest.approx(1.96 * np.std([1, 2, 3, 6], ddof=1) / 2))
    assert mean([0.5]) == (0.5, 0.0)
    assert measured("r", "m", [True, False])["ours"] == 50
    assert measured("r", "m", [0.5, 0.7], unit="")["ours"] == pytest.approx(0.6)
    assert measured("r", "m", [0.5])["spread"] is None
    none = measured("r", "m", [], "why")
    assert none["ours"] is None and none["note"] == "there was none; why"
    assert curve("c", {1: [0.0, 1.0], 2: [0.5]})[:3] == ("c", [1.0, 2.0], [50.0, 50.0])
    with pytest.raises(ValueError, match="at least one"):
        mean([])


def test_class_slices_add_up_to_the_slice_of_the_classes_together(case):
    chosen = [1, 4, 7]
    rows = np.concatenate([np.flatnonzero(case.train_labels == k)[: TINY.of_class] for k in chosen])
    expected = case.slice(case.train_images[rows], case.train_labels[rows])
    found = functools.reduce(operator.add, [case.class_slices[k] for k in chosen])
    for name, contrib in expected.synapses.items():
        np.testing.assert_array_equal(found.synapses[name], contrib, err_msg=name)


def test_shuffled_slices_are_of_the_same_size_and_in_the_same_places(case):
    piece, among = case.class_slices[0], functools.reduce(nns.Slice.union, case.class_slices)
    rng = np.random.default_rng(0)
    for other, inside in ((shuffled(piece, rng), None), (shuffled(piece, rng, among), among)):
        assert 0 < piece.similarity(other) < 1
        for name, contrib in piece.synapses.items():
            assert sorted(other.synapses[name].ravel()) == sorted(contrib.ravel())
            if inside is not None:
                assert not np.any(other.synapses[name][inside.synapses[name] == 0])


def test_slices_of_hidden_channels_keep_their_values(case):
    values = by_metric(neuron(case))
    layers = rectified(case.graph)
    assert len(layers) == 3 and len(values) == 4 * len(layers)
    for layer in layers:
        row = f"digits_cnn, {layer}"
        assert 0 < values[row, "synapses that lead to a channel in its slice"] <= 100
        assert -1 <= values[row, "correlation of the value, random synapses"] <= 1
    last = f"digits_cnn, {layers[-1]}"
    of_slice = values[last, "correlation of the value, slice"]
    assert of_slice > values[last, "correlation of the value, random synapses"]


def test_what_leads_to_a_channel_is_all_that_moves_it(case):
    layer = rectified(case.graph)[1]
    positive = jax.tree.map(jnp.abs, case.params)
    leading = nns.static_slice(case.graph, positive, [3], theta=0.0, neuron=layer)
    gradient = jax.grad(
        lambda p: nns.evaluate(case.graph, p, jnp.ones((1, 8, 8, 1)))[1][layer][..., 3].sum()
    )(positive)
    found = dict(zip(case.graph.params, jax.tree.leaves(gradient), strict=True))
    for name, contrib in leading.synapses.items():
        np.testing.assert_array_equal(contrib != 0, np.asarray(found[name]) != 0, err_msg=name)


def test_unions_of_class_slices_run(case):
    values = by_metric(composed(case))
    for number in (1, 2, 3, 5, 7, 10):
        row = f"digits_cnn, {number} of 10 classes"
        union = values[row, "synapses in the union"]
        assert union >= values[row, "synapses in the slice together"]
    assert values[row, "synapses in the union"] == pytest.approx(
        100 * kept(functools.reduce(nns.Slice.union, case.class_slices))
    )
    accuracy = "accuracy on the classes, "
    assert values[row, accuracy + "whole network"] == pytest.approx(
        100 * (case.predicted == case.test_labels)[: TINY.tested].mean()
    )
    union = values[row, accuracy + "union of class slices"]
    assert union > values[row, accuracy + "random synapses"]


def test_repairs_and_breaks_make_up_the_accuracy(case):
    found = repair(case)
    values = by_metric(found)
    wrong = (case.predicted != case.test_labels)[: TINY.judged]
    rows = {row for row, _ in values if "deviation" in row or "random" in row}
    assert len(rows) == 6
    for row in rows:
        repaired = values[row, "wrong predictions repaired"] or 0.0
        broken = values[row, "right predictions broken"]
        expected = repaired * wrong.mean() + (100 - broken) * (1 - wrong.mean())
        assert values[row, "accuracy"] == pytest.approx(expected)
    # Of right predictions the predicted class is the true one.
    broken = {line.label: line.y for line in found.curves if "broken" in line.label}
    one, other = (broken[f"right ones broken, {kind} class"] for kind in ("predicted", "true"))
    assert one == other


def test_static_and_conditioned_slices_beside_dynamic_ones(case):
    found = static(case)
    values = by_metric(found)
    same = values["digits_cnn", "Jaccard similarity, dynamic of two images of two classes"]
    assert 0 < same < 100
    sizes = [
        values["digits_cnn", f"synapses in a slice, {kind}"] for kind in ("conditioned", "dynamic")
    ]
    assert sizes[0] > sizes[1] > 0
    note = [row["note"] for row in found.rows if row["metric"] == "agreement as a model"]
    assert ["own slice left out" in some for some in note] == [False, False, True]
    row = "digits_cnn, union of conditioned slices of all classes"
    assert values[row, "agreement as a model"] > values[row, "agreement, random synapses"]


def test_each_image_is_judged_by_the_union_of_the_others(case):
    pieces = [case.slice(case.test_images[i : i + 1], case.predicted[i : i + 1]) for i in range(4)]
    for i, found in enumerate(_without(pieces)):
        expected = functools.reduce(nns.Slice.union, pieces[:i] + pieces[i + 1 :])
        for kind in ("synapses", "neurons"):
            for name, contrib in getattr(expected, kind).items():
                np.testing.assert_array_equal(getattr(found, kind)[name], contrib != 0)
    whole = functools.reduce(nns.Slice.union, pieces)
    row = _agreement(case, "some", whole, np.random.default_rng(0), pieces)[1]
    same = case.logits(case.test_images[: TINY.tested], whole).argmax(1)
    for i, others in enumerate(_without(pieces)):
        same[i] = case.logits(case.test_images[: TINY.tested], others).argmax(1)[i]
    assert row["ours"] == pytest.approx(100 * (same == case.predicted[: TINY.tested]).mean())


@pytest.mark.parametrize("alike", [False, True])
def test_pairs_of_images_are_drawn(alike):
    labels = np.arange(40) % 2
    drawn = [_pairs(np.random.default_rng(seed), labels, alike=alike) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    for pairs in drawn:
        assert pairs.shape == (160, 2) and len(set(map(tuple, pairs.tolist()))) == 160
        assert np.all(pairs[:, 0] < pairs[:, 1]) and pairs[:, 0].max() > 20
        assert np.all((labels[pairs[:, 0]] == labels[pairs[:, 1]]) == alike)
    few = _pairs(np.random.default_rng(0), np.array([3, 3, 5]), alike=alike).tolist()
    assert sorted(few) == ([[0, 1]] if alike else [[0, 2], [1, 2]])


# Networks ---------------------------------------------------------------------------------


def test_the_graph_joins_neighbouring_pixels():
    edges = slice_questions_networks.grid()
    pairs = set(map(tuple, edges.tolist()))
    assert len(pairs) == len(edges) == (3 * 8 - 2) ** 2
    for a in range(64):
        for b in range(64):
            near = abs(a // 8 - b // 8) <= 1 and abs(a % 8 - b % 8) <= 1
            assert ((a, b) in pairs) == near


@pytest.mark.parametrize("baseline", ["channel", "position"])
def test_both_forms_of_a_graph_convolution_give_one_slice(baseline):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 3, (4, 8, 8, 1)).astype(np.float32)
    forms = [slice_questions_networks.GraphConvolution(dense, (3, 4), 3) for dense in (True, False)]
    shapes = forms[0].init(jax.random.key(0), images[:1])
    # A ninth of each sum is rounded, and rounded alike where both sum whole numbers.
    params = jax.tree.map(
        lambda a: jnp.asarray(9.0 * rng.integers(-2, 3, a.shape), jnp.float32), shapes
    )
    pieces, logits = [], []
    for model in forms:
        graph = nns.trace(model.apply, params, images[:1])
        profile = nns.profile(graph, params, images, baseline=baseline)
        pieces.append(nns.slice_network(graph, params, profile, images, [0, 1, 2, 0], 0.25))
        logits.append(nns.evaluate(graph, params, jnp.asarray(images))[0])
    np.testing.assert_array_equal(*logits)
    for name, contrib in pieces[0].synapses.items():
        assert np.any(contrib), name
        np.testing.assert_array_equal(pieces[1].synapses[name], contrib, err_msg=name)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_networks_read_the_rows_in_order(cell):
    model = slice_questions_networks.Recurrent(cell, 3, 4)
    images = np.random.default_rng(0).random((2, 8, 8, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), images)
    graph = nns.trace(model.apply, params, images[:1])
    logits, _ = nns.evaluate(graph, params, jnp.asarray(images))
    np.testing.assert_allclose(logits, model.apply(params, images), rtol=1e-4, atol=1e-5)
    assert logits.shape == (2, 4)
    # One gate after another for each of the eight rows.
    assert any("RNN_0[7]" in name for name in graph.neurons())
    assert not any("RNN_0[8]" in name for name in graph.neurons())


def test_networks_are_trained_sliced_and_run(case, monkeypatch):
    forms = {
        ", adjacency": slice_questions_networks.GraphConvolution(True, (4, 4)),
        ", scattered": slice_questions_networks.GraphConvolution(False, (4, 4)),
    }
    monkeypatch.setattr(slice_questions_networks, "NETWORKS", {"graph convolution": (0.1, forms)})
    monkeypatch.setattr(slice_questions_networks, "_THETAS", (0.3,))
    found = slice_questions_networks.networks(dataclasses.replace(case, data="others"))
    assert {row["data"] for row in found.rows} == {"digits, all training and test images"}
    values = by_metric(found)
    accuracies = {
        values[f"digits, graph convolution{form}", "accuracy, whole network"] for form in forms
    }
    assert len(accuracies) == 1
    row = "digits, graph convolution"
    assert values[row, "Jaccard similarity of the two forms' slices, theta 0.3"] > 50


# The command ------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    asked = []

    def answer(name):
        def ask(case):
            asked.append(name)
            if name == "second" and asked.count(name) == 1:
                raise KeyboardInterrupt
            rows = [measured(name, "m", [0.0, 1.0], "a note")]
            if name == "second":
                rows[0]["data"] = "data of its own"
            return Finding(rows, [Curve("c", [1.0], [2.0], [0.1])], ("x", "y"))

        return ask

    monkeypatch.setattr(
        slice_questions, "QUESTIONS", {name: answer(name) for name in ("first", "second")}
    )
    small = dataclasses.replace(TINY, profiled=20, known=20, chosen=1, of_class=1)

    def run(sizes=small, revision="0123456"):
        return slice_questions.run(
            ["first", "second"], sizes, model="digits_cnn", seed=0, folder=tmp_path / "kept",
            figures=tmp_path / "figures", revision=revision,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run()
    rows = run()
    assert asked == ["first", "second", "second"]
    assert [row["row"] for row in rows] == ["first", "second"]
    assert "digits" in rows[0]["data"] and rows[1]["data"] == "data of its own"
    assert run() == rows and len(asked) == 3
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    # Other code, options, weights or data, or a damaged file, ask anew.
    run(revision="7654321")
    assert len(asked) == 5
    loaded = prepare("digits_cnn", small, seed=0)
    images = loaded.test_images.copy()
    images[-1, 0, 0] += 1
    for number, changed in enumerate(({"weights": "0" * 64}, {"test_images": images}), 1):
        other = dataclasses.replace(loaded, **changed)
        with monkeypatch.context() as patched:
            patched.setattr(slice_questions, "prepare", lambda *_, other=other: other)
            run()
        assert len(asked) == 5 + 2 * number
    del asked[5:]
    run(dataclasses.replace(small, draws=3))
    assert len(asked) == 7
    (tmp_path / "kept" / "digits_cnn_first.json").write_text("{")
    run(dataclasses.replace(small, draws=3))
    assert len(asked) == 8
    kept_files = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert kept_files == ["digits_cnn_first.json", "digits_cnn_second.json"]
    assert json.loads((tmp_path / "kept" / kept_files[0]).read_text())["finding"]["rows"]


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="questions: 'third' is not in neuron, composed"):
        slice_questions.run(
            ["third"], TINY, model="digits_cnn", seed=0, folder=tmp_path, figures=tmp_path,
            revision="0123456",
        )  # fmt: skip
    assert set(SCHEDULES) == {"cpu", "published"}
    assert list(tmp_path.iterdir()) == []
