"""The studies of routes on the digits: their rows restated plainly, and that a run goes on."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from experiments import (
    faithfulness,
    routes_ablation,
    routes_adversarial,
    routes_case,
    routes_detection,
    routes_semantics,
)
from interpret import cdrp, routes
from interpret import faithfulness as curves
from nnslicer_jax import attacks

ATTACK = "DeepFool L2"
STUDIES = {
    "routes_ablation": (
        routes_ablation,
        routes_ablation.Schedule(per_class=6, shares=(0, 0.01, 0.5, 1), layer_share=0.5),
        ["digits_cnn.png"],
    ),
    "routes_semantics": (
        routes_semantics,
        routes_semantics.Schedule(per_class=6, group=6, members=6, pictured=1),
        [f"digits_cnn_{name}.png" for name in ("class_0", "route", "separability", "tsne")],
    ),
    "routes_adversarial": (
        routes_adversarial,
        routes_adversarial.Schedule(per_class=2, attacks=(ATTACK,), samples=3),
        ["digits_cnn_deepfool_l2.png"],
    ),
    "routes_detection": (
        routes_detection,
        routes_detection.Schedule(
            sizes=(1, 2), pool=4, judged=2, draws=2, attacks=(ATTACK, "FGSM 2", "Spatial")
        ),
        ["digits_cnn.png"],
    ),
    "faithfulness": (
        faithfulness,
        faithfulness.Schedule(per_class=1, profiled=3, steps=4, shares=5),
        ["digits_cnn_mean.png", "digits_cnn_zero.png"],
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def case(folder):
    return routes_case.prepare("digits_cnn", None, folder / "work", 0)


@pytest.fixture(scope="module")
def made(folder):
    """Function of a study's name to its record on the digits."""

    @functools.cache
    def make(name):
        study, schedule, _ = STUDIES[name]
        return routes_case.results(
            study.STUDY, ["digits_cnn"], schedule, data_dir=None, work=folder / "work",
            figures=folder / name, seed=0,
        )  # fmt: skip

    return make


def by_name(record):
    return {(row.row, row.metric): row for row in record.rows}


def refused(*_args, **_options):
    raise AssertionError("this was made before")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_says_what_it_is_and_draws(made, folder, name):
    study, _, pictures = STUDIES[name]
    record = made(name)
    assert record.study == name == study.STUDY.name and record.title == study.TITLE
    assert all(row.data == "digits, digits_cnn" and row.seeds == (0,) for row in record.rows)
    assert sorted(path.name for path in (folder / name).iterdir()) == pictures
    assert set(study.STUDY.schedules) == {"cpu", "published"}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_goes_on_where_it_stopped(made, folder, name, monkeypatch):
    record = made(name)
    study, schedule, _ = STUDIES[name]
    monkeypatch.setattr(cdrp, "route", refused)
    monkeypatch.setattr(routes_case, "_ATTACKS", dict.fromkeys(attacks.ATTACKS, refused))
    again = routes_case.results(
        study.STUDY, ["digits_cnn"], schedule, data_dir=None, work=folder / "work",
        figures=folder / "again", seed=0,
    )  # fmt: skip
    assert again.to_json() == record.to_json()


def test_ablation_counts_what_is_lost(made, case):
    rows = by_name(made("routes_ablation"))
    some = routes_case.drawn(case, 6)
    found = cdrp.route(case.graph, case.params, some.images)
    share = rows["digits_cnn, routes", "nodes that are critical"]
    assert share.ours == pytest.approx(100 * (found.gates > 0.5).mean(), abs=0.5)
    assert share.published == "about 10"
    # With no critical node left, by hand; of the top 1 % in each layer the largest gate goes.
    for name, off in (
        ("Top, 100%", found.gates > 0.5),
        ("Top, 1%", np.concatenate([
            found.layer(n) == found.layer(n).max(1, keepdims=True) for n in case.layers
        ], 1)),
    ):  # fmt: skip
        logits = cdrp.logits(case.graph, case.params, some.images, case.layers, ~off)
        lost = (some.predicted == some.labels) * 1.0 - (logits.argmax(1) == some.labels)
        row = rows[f"digits_cnn, {name}", "top-1 accuracy lost"]
        assert row.ours == pytest.approx(100 * lost.mean(), abs=1e-6) and row.n == 60
        assert row.spread == pytest.approx(196 * lost.std(ddof=1) / 60**0.5, abs=1e-6)
        assert row.published == ("over 30" if "1%" in name and "100" not in name else None)
    beyond = rows["digits_cnn, Top beyond Bottom, 1%", "top-1 accuracy lost"]
    apart = [rows[f"digits_cnn, {mode}, 1%", "top-1 accuracy lost"].ours for mode in
             ("Top", "Bottom")]  # fmt: skip
    assert beyond.ours == pytest.approx(apart[0] - apart[1])
    assert any("alone" in row for row, _ in rows)


def test_semantics_measures_gates_by_layer(made, case):
    rows = by_name(made("routes_semantics"))
    some = routes_case.drawn(case, 6)
    found = routes_case.routed(case, some.images)
    values = []
    for name in case.layers:
        numbers = routes.separability(found.layer(name), some.labels, 5)
        short = name.split("/")[-1]
        values.append(numbers.neighbours)
        row = rows[f"digits_cnn, gates of {short}", "k-NN accuracy"]
        assert row.ours == pytest.approx(numbers.neighbours) and row.n == 60
        row = rows[f"digits_cnn, gates of {short}", "silhouette"]
        assert row.ours == pytest.approx(numbers.silhouette)
    change = rows["digits_cnn, gates, last layer beyond the first", "k-NN accuracy"]
    assert change.ours == pytest.approx(values[-1] - values[0]) and change.published == "above 0"
    parts = routes.cluster(found.gates, "ward").parts(10)
    row = rows[
        "digits_cnn, gates of all layers, 10 clusters", "adjusted Rand index with the classes"
    ]
    assert row.ours == pytest.approx(adjusted_rand_score(some.labels, parts))
    rising = [
        stats.spearmanr(row, np.arange(len(row))).statistic
        for row in np.stack(
            [routes.separable(found.layer(n), some.labels, 5)[1] for n in case.layers], 1
        )
    ]
    row = rows["digits_cnn, gates, silhouette with depth", "rank correlation"]
    assert row.ours == pytest.approx(np.mean(rising)) and row.published == "above 0"
    learns = np.arange(60) % 6 < 3
    right = []
    for gate, label in zip(found.gates[~learns], some.labels[~learns], strict=True):
        means = [found.gates[learns & (some.labels == k)].mean(0) for k in range(10)]
        right.append(np.argmin([np.linalg.norm(gate - mean) for mean in means]) == label)
    row = rows["digits_cnn, gates of all layers, nearest class prototype", "own class"]
    assert row.ours == pytest.approx(100 * np.mean(right)) and row.n == 30
    row = rows[
        "digits_cnn, gates of all layers, merging within a class",
        "rank correlation with the distance of pixels",
    ]
    assert row.n == 10 and -1 <= row.ours <= 1 and row.published == "above 0"
    name = "digits_cnn, gates of all layers, distance from the predicted class's others"
    wrong = some.predicted != some.labels
    row = rows[name, "AUC against images predicted wrongly"]
    if wrong.any():
        odd = routes.outliers(found.gates, some.predicted)
        assert row.ours == pytest.approx(roc_auc_score(wrong, odd))
    else:
        assert row.ours is None


def pearson(a, b):
    """Correlation, of what is not constant."""
    return np.corrcoef(a, b)[0, 1] if np.ptp(a) and np.ptp(b) else None


def defined(values):
    return [value for value in values if value is not None]


def test_drift_is_correlation_by_layer(made, case):
    rows = by_name(made("routes_adversarial"))
    some = routes_case.drawn(case, 2, right=True)
    moved = routes_case.attacked(case, ATTACK, some, {})
    fooled = np.flatnonzero(moved.predicted != some.labels)
    known = routes_case.drawn(case, 3, split="train", right=True)
    before, after, samples = (routes_case.routed(case, p.images) for p in (some, moved, known))
    by_layer = []
    for name in case.layers:
        own, target, unmoved = [], [], []
        for i in fooled:
            of_class = samples.layer(name)[known.labels == moved.predicted[i]]
            a, b = after.layer(name)[i], before.layer(name)[i]
            own.append(pearson(a, b))
            for row, found in ((a, target), (b, unmoved)):
                each = defined(pearson(row, c) for c in of_class)
                found.append(np.mean(each) if each else None)
        row = f"digits_cnn, {ATTACK}, {name.split('/')[-1]}"
        for said, values in (
            ("with its original", own),
            ("with the class it is taken for", target),
            ("of the original with that class", unmoved),
        ):
            found = rows[row, f"correlation {said}"]
            assert found.ours == pytest.approx(np.mean(defined(values)), abs=1e-6)
            assert found.n == len(defined(values)) > 10
        by_layer.append((own, target))
    for at, said, published in (
        (0, "with its original", "below 0"), (1, "with the class it is taken for", "above 0")
    ):  # fmt: skip
        pairs = [
            pair for pair in zip(by_layer[0][at], by_layer[-1][at], strict=True) if None not in pair
        ]
        change = rows[f"digits_cnn, {ATTACK}, last layer beyond the first", f"correlation {said}"]
        assert change.published == published and change.n == len(pairs)
        assert change.ours == pytest.approx(np.mean([b - a for a, b in pairs]), abs=1e-6)
        # Of two layers, the sign of the change.
        depth = rows[f"digits_cnn, {ATTACK}, correlation {said}, with depth", "rank correlation"]
        signs = [np.sign(b - a) for a, b in pairs if a != b]
        assert depth.published == published and depth.ours == pytest.approx(np.mean(signs), abs=0.1)
    nearer = rows[
        f"digits_cnn, {ATTACK}, last layer",
        "images: mean correlation with the class above that with the original",
    ]
    both = [(a, b) for a, b in zip(*by_layer[-1], strict=True) if None not in (a, b)]
    assert nearer.ours == pytest.approx(100 * np.mean([b > a for a, b in both]))


def test_detection_is_that_of_the_library(made, case):
    rows = by_name(made("routes_detection"))
    some = routes_case.drawn(case, 6, right=True)
    moved = routes_case.attacked(case, ATTACK, some, {})
    fooled = moved.predicted != some.labels
    learns = np.arange(60) % 6 < 4
    normal, adversarial = (routes_case.routed(case, p.images).gates for p in (some, moved))
    told = np.concatenate([normal[~learns & fooled], adversarial[~learns & fooled]])
    truth = np.repeat([0, 1], len(told) // 2)
    row = rows[f"digits_cnn, {ATTACK}, routes, random forest, n = 2", "AUC"]
    found, sets = [], []
    for draw in (0, 1):
        which = np.flatnonzero(fooled)
        chosen = which[
            routes_detection.training_rows((0, draw, 2), some.labels[which], learns[which], 2)
        ]
        assert learns[chosen].all() and np.bincount(some.labels[chosen]).max() == 2
        known = np.concatenate([normal[chosen], adversarial[chosen]])
        forest = RandomForestClassifier(100, random_state=draw)
        forest.fit(known, np.repeat([0, 1], len(chosen)))
        found.append(roc_auc_score(truth, forest.predict_proba(told)[:, 1]))
        sets.append(chosen.tolist())
    assert row.n == len(told) // 2 and row.ours == pytest.approx(np.mean(found))
    assert sets[0] != sets[1]
    confidence = np.concatenate([p.probabilities.max(1)[~learns & fooled] for p in (some, moved)])
    row = rows[f"digits_cnn, {ATTACK}, confidence", "AUC"]
    assert row.ours == pytest.approx(roc_auc_score(truth, 1 - confidence))
    # The smallest step of FGSM fools the network on hardly any.
    few = rows["digits_cnn, FGSM 2, routes, random forest, n = 2", "AUC"]
    assert few.ours is None and "too few" in few.note
    average = rows["digits_cnn, average over attacks, routes, random forest, n = 2", "AUC"]
    assert f"over {average.n} attacks" in average.note and average.n < 3
    grown = rows[f"digits_cnn, {ATTACK}, routes, n = 2 beyond n = 1", "AUC"]
    at = [
        np.mean([
            rows[f"digits_cnn, {ATTACK}, routes, {said}, n = {n}", "AUC"].ours
            for said in routes_detection.CLASSIFIERS.values()
        ])
        for n in (1, 2)
    ]  # fmt: skip
    assert grown.ours == pytest.approx(at[1] - at[0])


def test_classifiers_learn_from_n_images_of_each_class():
    labels = np.repeat([0, 1, 2], [5, 3, 4])
    learns = np.ones(12, bool)
    learns[[0, 5, 6, 8]] = False
    rows = routes_detection.training_rows((0, 1), labels, learns, 3)
    assert learns[rows].all() and len(set(rows.tolist())) == len(rows)
    assert np.bincount(labels[rows]).tolist() == [3, 1, 3]
    np.testing.assert_array_equal(rows, routes_detection.training_rows((0, 1), labels, learns, 3))


def test_classifiers_that_lack_images_say_so():
    none = np.zeros((2, 6))
    labels, learns = np.array([0, 0, 0, 1, 1, 1]), np.array([True, True, True, True, False, False])
    learned = routes_detection.Twins(labels, learns, {}, {}, none)
    assert routes_detection.learned_from(learned, 1, 2) == ""
    assert routes_detection.learned_from(learned, 3, 2).startswith("trained on 2.0 a class")


def test_faithfulness_rows_are_areas_of_the_curves(made, case):
    rows = by_name(made("faithfulness"))
    some = routes_case.drawn(case, 1)
    found = cdrp.route(case.graph, case.params, some.images)
    areas = curves.curves(
        0, case.graph, case.params, some.images, curves.of_routes(found), np.linspace(0, 1, 5)
    ).areas
    for area, metric in zip(areas, ("deletion", "insertion"), strict=True):
        row = rows["digits_cnn, routes, channels set to 0", f"area under {metric}"]
        assert row.ours == pytest.approx(area.mean(), abs=0.01) and row.n == 10
        chance = rows["digits_cnn, chance, channels set to 0", f"area under {metric}"]
        beyond = rows["digits_cnn, routes beyond chance, channels set to 0", f"area under {metric}"]
        assert beyond.ours == pytest.approx(row.ours - chance.ours)
    active = curves.of_activations(case.graph, case.params, some.images, list(case.layers))
    ranks = []
    for i in range(10):
        pairs = [(active[name][i], found.layer(name)[i]) for name in case.layers]
        each = [stats.spearmanr(a, b).statistic for a, b in pairs if np.ptp(a) and np.ptp(b)]
        ranks.append(np.mean(each) if each else None)
    row = rows["digits_cnn, activations and routes", "rank correlation of scores"]
    assert row.ours == pytest.approx(np.mean(defined(ranks)), abs=0.02)


def test_the_command_line_says_one_line(tmp_path):
    command = [sys.executable, "-m", "experiments.routes_ablation", "--models=nothing"]
    command.append("--per_class=3")
    done = subprocess.run(
        [*command, f"--out={tmp_path}/a.json", f"--work={tmp_path}", f"--figures={tmp_path}"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: zoo: 'nothing' is unknown; known are ")
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_counts_of_a_schedule_are_flags_of_the_command(tmp_path):
    words = ["--models=digits_cnn", "--group=5", "--per_class=4"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.routes_semantics", *words, f"--work={tmp_path}"],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: group and members must be 2..4, the images of a class")


def test_schedules_are_checked():
    for make, words in (
        (lambda: routes_ablation.Schedule(shares=(0.01, 1)), "shares must begin with 0"),
        (lambda: routes_semantics.Schedule(per_class=5), "group and members must be 2..5"),
        (lambda: routes_detection.Schedule(sizes=(5, 1)), "sizes must ascend"),
        (lambda: routes_detection.Schedule(pool=9), "pool must be at least 10, not 9"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
