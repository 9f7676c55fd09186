"""The study of adversarial inputs: every row is what the stages say, and a run goes on."""

import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import adversarial_detection as study
from experiments import record
from interpret import detect, features
from nnslicer_jax import attacks

SCHEDULE = study.Schedule(150, 12, 60, {"Spatial": {}}, ("FGSM 2", "DeepFool L2"))
ADAPTIVE = study.Adaptive(4, 2, (32,), 10)
# FGSM of the smallest step fools the digits' network on none of a few images.
FEW = {name: attacks.ATTACKS[name] for name in ("FGSM 2", "DeepFool L2", "Spatial")}


@pytest.fixture(scope="module")
def setup():
    return study.prepare("digits_cnn", None, SCHEDULE, 0)


@pytest.fixture(scope="module", autouse=True)
def few_attacks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attacks, "ATTACKS", FEW)
        yield


@pytest.fixture(scope="module")
def made(setup, tmp_path_factory):
    """A whole run: the study and its rows by row and metric."""
    found = study.Study(setup, SCHEDULE, 0, tmp_path_factory.mktemp("study"))
    about = {
        "command": "x",
        "data": setup.data,
        "seeds": (0,),
        "commit": "unknown",
        "hardware": "x",
    }
    rows = [
        record.Row(study="adversarial_detection", **fields, **about)
        for fields in study.run(found, ADAPTIVE)
    ]
    record.Record(title=study.TITLE, text=study.TEXT, rows=tuple(rows))
    return found, {(row.row, row.metric): row for row in rows}


def test_published_numbers_average_to_the_published_averages():
    assert set(study.PUBLISHED) == set(attacks.FIXED_BUDGET) | set(attacks.CLOSEST)
    for method, (precision, recall, f1) in study.PUBLISHED_AVERAGES.items():
        pairs = np.array([found[method] for found in study.PUBLISHED.values()])
        assert pairs.mean(0) == pytest.approx((precision, recall), abs=0.02)
        harmonic = 2 * pairs.prod(1) / pairs.sum(1)
        assert harmonic.mean() == pytest.approx(f1, abs=0.02)


def test_images_are_drawn_as_said(setup):
    assert len(setup.train) == len(setup.train_predicted) == 150
    assert len(setup.right) == 12 and setup.right[-1] == len(setup.clean) - 1
    direct = np.asarray(setup.apply(setup.params, setup.clean)).argmax(1)
    np.testing.assert_array_equal(setup.predicted, direct)
    np.testing.assert_array_equal(np.flatnonzero(direct == setup.labels), setup.right)
    other = study.prepare("digits_cnn", None, SCHEDULE, 1)
    assert not np.array_equal(other.clean[:5], setup.clean[:5])


def test_too_few_images_are_named():
    with pytest.raises(
        ValueError, match="^the schedule takes 5000 training images, digits has 143"
    ):
        study.prepare("digits_cnn", None, SCHEDULE._replace(train=5000), 0)
    with pytest.raises(ValueError, match="^the schedule attacks 360 test images, digits_cnn gets"):
        study.prepare("digits_cnn", None, SCHEDULE._replace(images=360), 0)


def test_judged_are_the_images_that_an_attack_fools(made):
    found, rows = made
    for name in FEW:
        attacked = found.attacked(name)
        setup = found.setup
        again = (
            np.asarray(setup.apply(setup.params, attacked.images)) if len(attacked.images) else []
        )
        assert all(
            p == logits.argmax() != setup.labels[i]
            for p, logits, i in zip(attacked.predicted, again, attacked.which, strict=True)
        )
        assert set(attacked.which) <= set(setup.right)
        assert rows[name, "images fooled"].ours == len(attacked.images)
    assert rows["FGSM 2", "images fooled"].ours == 0 < rows["DeepFool L2", "images fooled"].ours


def test_an_attack_that_never_succeeds_is_a_row_with_a_note(made):
    _, rows = made
    for method in study.METHODS:
        for metric in detect.Measures._fields:
            row = rows[f"FGSM 2, {method}", metric]
            assert (row.ours, row.n, row.spread) == (None, 0, None)
            assert row.note == "the attack fooled the network on no image"
    assert rows["FGSM 2, NNSlicer", "precision"].published == 0.82
    assert rows["FGSM 2, NNSlicer for the true class", "recall"].ours is None
    assert rows["average, FeatureMap, tree, all layers", "recall"].note == "over 2 attacks"


def test_slices_of_all_outputs_do_not_look_at_a_class(made):
    found, _ = made
    setup, extract = found.setup, found.extract[study.CLASSLESS]
    images, none = setup.train[:3], np.zeros(3, int)
    values = extract(images, none).values
    np.testing.assert_array_equal(values.toarray(), extract(images, none + 1).values.toarray())
    every = np.tile(np.arange(10), (3, 1))
    piece = nns.slice_network(
        setup.graph, setup.params, setup.profile, images, every, study.THETA, per_sample=True
    )
    direct = np.concatenate([v.reshape(3, -1) for v in piece.synapses.values()], 1)
    np.testing.assert_array_equal(values.toarray(), direct)


@pytest.mark.parametrize("method", study.METHODS)
def test_rows_are_those_of_a_tree_on_features_in_memory(made, method):
    found, rows = made
    setup, extract = found.setup, found.extract[method]

    def direct(images, outputs):
        values = extract(images, outputs).values
        return np.asarray(values.toarray() if hasattr(values, "toarray") else values, np.float64)

    train = direct(setup.train, setup.train_predicted)
    statistic = detect.dependence([(slice(0, 150), train)], setup.train_predicted, train.shape[1])
    columns = detect.most_dependent(statistic, 60)
    tree = detect.fit(train[:, columns].astype(np.float32), setup.train_predicted)
    for name in ("DeepFool L2", "Spatial"):
        attacked = found.attacked(name)
        normal = setup.clean[attacked.which]
        flags = [
            tree.predict(direct(images, classes)[:, columns].astype(np.float32)) != classes
            for images, classes in (
                (normal, setup.predicted[attacked.which]), (attacked.images, attacked.predicted)
            )
        ]  # fmt: skip
        recall = rows[f"{name}, {method}", "recall"]
        assert recall.ours == pytest.approx(flags[1].mean())
        assert recall.spread[0] <= recall.ours <= recall.spread[1]
        assert recall.published == study.PUBLISHED[name][method][1]
        precision = rows[f"{name}, {method}", "precision"].ours
        if sum(map(np.sum, flags)):
            assert precision == pytest.approx(flags[1].sum() / (flags[0].sum() + flags[1].sum()))
        else:
            assert precision is None


def test_columns_are_those_of_the_layers(made):
    found, _ = made
    graph, spans = found.setup.graph, found.train("NNSlicer").spans
    masks = {
        layers: study.allowed(graph, spans, layers)
        for layers in (study.ALL, study.NOT_LAST, study.FIRST_HALF)
    }
    assert masks[study.ALL].all()
    for layers, kept in (
        (study.NOT_LAST, {"Conv_0", "Conv_1", "Dense_0"}),
        (study.FIRST_HALF, {"Conv_0", "Conv_1"}),
    ):
        for name, (first, stop) in spans.items():
            assert (masks[layers][first:stop] == (name.split("/")[1] in kept)).all()
        detector = study.Detector("NNSlicer", layers)
        assert masks[layers][found.columns(detector.method, detector.layers)].all()


def test_averages_and_false_alarms(made):
    found, rows = made
    for detector in study.DETECTORS:
        said = study.verdicts(found, detector, study.judged_sets(found))
        recalls = [said[name].flags.mean() for name in ("DeepFool L2", "Spatial")]
        assert rows[f"average, {detector}", "recall"].ours == pytest.approx(np.mean(recalls))
        alarms = rows[str(detector), "flagged of clean test images"]
        assert alarms.ours == said["clean"].flags.mean() and alarms.n == len(found.setup.clean)
        published = rows[f"average, {detector}", "recall"].published
        as_published = (detector.layers, detector.classifier) == study.PAPER
        as_published &= detector.method in study.METHODS
        assert (published is not None) == as_published


def test_the_adaptive_attacker_needs_one_candidate_that_nothing_flags(made):
    found, rows = made
    which, judged = study.adaptive_set(found, ADAPTIVE, 32)
    assert len(which) == 8 and np.abs(judged.images - found.setup.clean[which]).max() <= 0.12501
    name = study.adversary_name(32)
    fooled = judged.predicted != found.setup.labels[which]
    for detector in study.DETECTORS:
        flags = study.verdicts(found, detector, {name: judged})[name].flags
        wins = [np.any(fooled[which == i] & ~flags[which == i]) for i in np.unique(which)]
        row = rows[f"{name}, {detector}", "network fooled and not flagged"]
        assert (row.ours, row.n) == (pytest.approx(np.mean(wins)), 4)


def test_a_run_goes_on_from_its_stages(made, monkeypatch):
    found, rows = made

    def never(*args, **options):
        raise AssertionError("made again")

    monkeypatch.setattr(detect, "fit", never)
    monkeypatch.setattr(study, "feature_adversary", never)
    monkeypatch.setattr(attacks, "ATTACKS", dict.fromkeys(FEW, never))
    again = study.Study(found.setup, SCHEDULE, 0, found.folder)
    again.extract = dict.fromkeys((*study.METHODS, study.CLASSLESS), never)
    fields = study.run(again, ADAPTIVE)
    assert len(fields) == len(rows)
    for field in fields:
        assert rows[field["row"], field["metric"]].ours == field["ours"]


def test_stages_of_another_run_are_refused(made):
    found, _ = made
    with pytest.raises(ValueError, match="columns was 60 and is now 61"):
        study.Study(found.setup, SCHEDULE._replace(columns=61), 0, found.folder)
    other = study.Study(
        found.setup, SCHEDULE._replace(steps={"Spatial": {"turn": 1}}), 0, found.folder
    )
    with pytest.raises(ValueError, match="options was"):
        other.attacked("Spatial")


def test_pictures_are_drawn(made, tmp_path):
    found, rows = made
    study.draw(found, list(rows.values()), tmp_path)
    names = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(names) == {"adaptive.png", "averages.png", "per_attack.png", "slices.png"}
    assert all(content.startswith(b"\x89PNG") for content in names.values())


def test_a_kernel_as_a_picture():
    kernel = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    picture = study.figures.kernel_picture(kernel)
    assert picture.shape == (8, 15)
    assert picture[3 * 2 + 1, 4 * 3 + 2] == kernel[1, 2, 3, 4]
    assert sorted(picture.ravel()) == list(range(120))


def test_peak_memory_is_noted(made):
    found, rows = made
    for method in study.METHODS:
        row = rows[f"{method} of train", "peak memory of the process"]
        assert row.ours == found.costs()[f"{method} of train"]["peak_mib"] > 50
        assert (
            features.open_features(found.folder / "features" / method.lower() / "train").count
            == 150
        )
