"""The study of adversarial inputs: every row is what the stages say, and a run goes on."""

import itertools
import shutil
import types

import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import adversarial_detection as study
from experiments import record
from interpret import detect, features
from nnslicer_jax import attacks

SCHEDULE = study.Schedule(150, 12, 60, {"Spatial": {}}, ("FGSM 2", "DeepFool L2"), True)
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
    found = study.Study(setup, SCHEDULE, 0, tmp_path_factory.mktemp("study"), "abcdef0")
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
    text = study.text(SCHEDULE, ADAPTIVE)
    record.Record(title=study.TITLE, text=text, rows=tuple(rows))
    return found, {(row.row, row.metric): row for row in rows}


def test_published_numbers_average_to_the_published_averages():
    assert set(study.PUBLISHED) == set(attacks.FIXED_BUDGET) | set(attacks.CLOSEST)
    for method, (precision, recall, f1) in study.PUBLISHED_AVERAGES.items():
        pairs = np.array([found[method] for found in study.PUBLISHED.values()])
        assert pairs.mean(0) == pytest.approx((precision, recall), abs=0.02)
        harmonic = 2 * pairs.prod(1) / pairs.sum(1)
        assert harmonic.mean() == pytest.approx(f1, abs=0.02)


def test_published_figures_stand_beside_the_published_network_alone(made, monkeypatch):
    found, rows = made
    assert all(row.published is None for row in rows.values())
    monkeypatch.setattr(study, "_PUBLISHED_NETWORK", "digits_cnn")
    rows = {(row["row"], row["metric"]): row for row in study.attack_rows(found)}
    assert rows["FGSM 2, NNSlicer", "precision"]["published"] == 0.82
    for name, method in itertools.product(("DeepFool L2", "Spatial"), study.METHODS):
        published = rows[f"{name}, {method}", "recall"]["published"]
        assert published == study.PUBLISHED[name][method][1]
    for detector in found.detectors:
        published = rows[f"average, {detector}", "recall"]["published"]
        as_published = (detector.layers, detector.classifier) == study.PAPER
        as_published &= detector.method in study.METHODS
        assert (published is not None) == as_published


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
    assert rows["FGSM 2, NNSlicer for the true class", "recall"].ours is None
    assert rows["average, FeatureMap, tree, all layers", "recall"].note == (
        "over 2 attacks; undefined for 1 attack that fooled the network on no image"
    )
    assert rows["average, the network's own confidence", "auroc"].note == (
        "over 2 attacks; undefined for 1 attack that fooled the network on no image"
    )


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
        assert recall.n == len(attacked.images)
        precision, flagged = rows[f"{name}, {method}", "precision"], sum(map(np.sum, flags))
        if flagged:
            assert precision.ours == pytest.approx(flags[1].sum() / flagged)
            assert precision.n == flagged and precision.spread[0] < precision.spread[1]
        else:
            assert precision.ours is None


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
    for detector in found.detectors:
        said = study.verdicts(found, detector, study.judged_sets(found))
        recalls = [said[name].flags.mean() for name in ("DeepFool L2", "Spatial")]
        assert rows[f"average, {detector}", "recall"].ours == pytest.approx(np.mean(recalls))
        alarms = rows[str(detector), "flagged of clean test images"]
        assert alarms.ours == said["clean"].flags.mean() and alarms.n == len(found.setup.clean)


def test_the_adaptive_attacker_needs_one_candidate_that_nothing_flags(made):
    found, rows = made
    which, judged = study.adaptive_set(found, ADAPTIVE, 32)
    assert len(which) == 8 and np.abs(judged.images - found.setup.clean[which]).max() <= 0.12501
    name = study.adversary_name(32)
    fooled = judged.predicted != found.setup.labels[which]
    for detector in found.detectors:
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
    again = study.Study(found.setup, SCHEDULE, 0, found.folder, "abcdef0")
    again.extract = dict.fromkeys((*study.METHODS, study.CLASSLESS), never)
    fields = study.run(again, ADAPTIVE)
    assert len(fields) == len(rows)
    for field in fields:
        row = rows[field["row"], field["metric"]]
        assert (row.ours, row.note) == (field["ours"], field.get("note", ""))


def test_stages_of_another_run_are_refused(made):
    found, _ = made
    setup = found.setup

    def again(setup=setup, schedule=SCHEDULE):
        return study.Study(setup, schedule, 0, found.folder, "abcdef0")

    weights = jax.tree.map(lambda leaf: leaf + 1, setup.params)
    other = setup.clean.copy()
    other[0, 0, 0] = 1 - other[0, 0, 0]
    for changed, said in (
        ({"schedule": SCHEDULE._replace(columns=61)}, "columns was 60 and is now 61"),
        ({"setup": setup._replace(params=weights)}, "weights was"),
        ({"setup": setup._replace(clean=other)}, "sets was"),
        ({"setup": setup._replace(labels=setup.labels[::-1])}, "sets was"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            again(**changed)
        assert "\n" not in str(caught.value)
    steps = again(schedule=SCHEDULE._replace(steps={"Spatial": {"turn": 1}}))
    with pytest.raises(ValueError, match="options was"):
        steps.attacked("Spatial")
    guides = again()
    guides.setup = setup._replace(train=setup.train[::-1])
    with pytest.raises(ValueError, match="made_of was"):
        study.adaptive_set(guides, ADAPTIVE, 32)


def test_a_verdict_is_of_just_the_images_that_it_was_made_of(made, tmp_path):
    found, _ = made
    shutil.copytree(found.folder, tmp_path / "study")
    again = study.Study(found.setup, SCHEDULE, 0, tmp_path / "study", "abcdef0")
    detector = study.Detector("NNSlicer")
    sets = {"clean": study.judged_sets(again)["clean"]}
    (path,) = (tmp_path / "study").glob("verdicts/nnslicer_tree_all_layers/clean.npz")
    kept = study.verdicts(again, detector, sets)["clean"]
    # Predictions of other classes: the features kept are not made for them.
    clean = sets["clean"]
    other = study.marked(clean.images, clean.outputs, (clean.predicted + 1) % 10)
    flags = study.verdicts(again, detector, {"clean": other})["clean"].flags
    assert flags.mean() > 0.5 > kept.flags.mean()
    path.write_bytes(b"half a file")
    np.testing.assert_array_equal(study.verdicts(again, detector, sets)["clean"].flags, kept.flags)
    shifted = study.marked(clean.images[::-1].copy(), clean.outputs, clean.predicted)
    with pytest.raises(ValueError, match="images was"):
        study.verdicts(again, detector, {"clean": shifted})


def test_rows_say_which_revisions_made_the_stages(made):
    found, rows = made
    assert found.commits() == ["abcdef0"]
    assert not any("features made" in row.note for row in rows.values())
    later = study.Study(found.setup, SCHEDULE, 0, found.folder, "1234567")
    for field in study.run(later, ADAPTIVE):
        assert field["note"].endswith("stages made at abcdef0")


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


def test_false_alarms_of_the_true_class(made):
    found, rows = made
    which = found.attacked("DeepFool L2").which
    for method in ("NNSlicer", "EffectivePath"):
        said = study.verdicts(found, study.Detector(method), study.true_class_sets(found))
        clean, hits = said["clean, true class"].flags, said["DeepFool L2, true class"].flags
        row = f"DeepFool L2, {method} for the true class"
        assert rows[row, "recall"].ours == pytest.approx(hits.mean())
        precision = rows[row, "precision"]
        assert precision.ours == pytest.approx(hits.sum() / (hits.sum() + clean[which].sum()))
        assert precision.note == "beside their originals"
        drawn = rows[row, "precision beside clean images"]
        assert drawn.ours == pytest.approx(hits.mean() / (hits.mean() + clean.mean()))
        wrong = int((found.setup.predicted != found.setup.labels).sum())
        assert drawn.note.endswith(f"of which the network gets {wrong} wrong")


def test_why_an_average_is_over_fewer_attacks():
    quiet = detect.Measures(None, 0.0, 0.0, 0.5)
    none = detect.Measures(None, None, None, None)
    found = {"a": detect.Measures(0.5, 0.5, 0.5, 0.5), "b": quiet, "c": quiet, "d": none}
    rows = {row["metric"]: row for row in study._averages(study.Detector("NNSlicer"), found, ())}
    harmless = "; undefined for 1 attack that fooled the network on no image"
    assert rows["precision"]["note"] == (
        f"over 1 attack; undefined for 2 attacks, where nothing was flagged{harmless}"
    )
    assert rows["recall"]["note"] == f"over 3 attacks{harmless}"


def test_every_stage_has_its_time_and_its_peak(made):
    found, rows = made
    names = {cost.row for cost in found.costs().values()}
    assert {f"{method} of train" for method in study.METHODS} <= names
    assert {f"{method} of images judged" for method in study.METHODS} <= names
    assert {"attack Spatial", "feature adversary, eps 32/256"} <= names
    assert {f"{detector}: training" for detector in found.detectors} <= names
    for name in names:
        assert rows[name, "time"].ours > 0 and rows[name, "time"].note == ""
        assert rows[name, "peak memory of the process"].ours > 50
    sliced = found.costs()["NNSlicer of train"]
    assert (sliced.images, sliced.whole) == (150, 150)
    row = rows["150 training images sliced", "time"]
    assert row.ours == pytest.approx(sliced.seconds / 60) and row.unit == "min"
    assert row.note == "target at most 60, met"


def test_targets_are_met_or_missed(made):
    found, _ = made

    class Noted(study.Study):
        def costs(self):
            cost = study.Cost("NNSlicer of train", 1000.0, 50, 150, 2049.0)
            return {"NNSlicer of train": cost}

    noted = Noted(found.setup, SCHEDULE, 0, found.folder, "abcdef0")
    time, peak = study.cost_rows(noted)[:2]
    assert time["ours"] == pytest.approx(50)
    assert time["note"] == "target at most 60, met; at the pace of the 50 images that were timed"
    assert peak["note"].startswith("target below 2,048 for the features alone, which is less")


def test_the_cost_of_a_stage_is_that_of_all_runs_that_made_it(setup, tmp_path, monkeypatch):
    found = study.Study(setup, SCHEDULE, 0, tmp_path, "abcdef0")
    clock = iter(range(0, 1000, 10))
    timer = types.SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(study, "time", timer)
    peaks = iter([300.0, 500.0, 400.0])
    monkeypatch.setattr(study, "_peak", lambda: next(peaks))
    images, outputs = np.zeros((600, 2, 2, 1), np.float32), np.zeros(600, int)
    calls = []

    def extract(some, classes):
        calls.append(len(some))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return features.Table(np.zeros((len(some), 3), np.float16), {"a": (0, 3)})

    found.extract = {"NNSlicer": extract}
    with pytest.raises(KeyboardInterrupt):
        found.extracted("NNSlicer", "some", images, outputs)
    row = "NNSlicer of images judged"
    assert found.costs()["NNSlicer of some"] == study.Cost(row, 10.0, 256, 600, 300.0)
    found.extracted("NNSlicer", "some", images, outputs)
    assert calls == [256, 256, 256, 88]
    assert found.costs()["NNSlicer of some"] == study.Cost(row, 30.0, 600, 600, 500.0)
    found.extracted("NNSlicer", "some", images, outputs)
    assert found.costs()["NNSlicer of some"] == study.Cost(row, 30.0, 600, 600, 500.0)
    # What every run makes from the start counts once.
    monkeypatch.setattr(study, "_peak", lambda: 200.0)
    for _ in range(2):
        with found.timed("b", 7):
            pass
    assert found.costs()["b"] == study.Cost("b", 10.0, 7, 7, 200.0)
    (tmp_path / "costs.json").write_text('{"a": {"seconds": 1, "peak_mib": 2}}')
    with pytest.raises(ValueError, match="not the costs of a run's stages, delete it"):
        found.costs()


def test_the_text_names_what_was_run():
    said = study.text(study.SCHEDULES["cpu"], study.ADAPTIVE["cpu"])
    for words in (
        "k = 4,000",
        "JSMA steps 200",
        "LocalSearch rounds 5",
        "in 60 steps",
        "of 4 such",
    ):
        assert words in said
    assert "k = 20,000" in study.text(study.SCHEDULES["published"], study.ADAPTIVE["published"])
