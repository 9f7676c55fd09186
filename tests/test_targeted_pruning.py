"""The study of targeted pruning, on the digits: its stages, its judging, and going on."""

import dataclasses

import jax
import numpy as np
import pytest

import nnslicer_jax as nns
from experiments import record
from experiments import targeted_pruning as study
from experiments.targeted_pruning import Judged, Schedule
from prune import criteria, masks

TINY = Schedule(
    sets=2, ratios=(0.3, 0.55), images=4, profiled=100, tests=10, tuned_sets=1,
    tuned_ratios=(0.7,), samples=128, compacted=(0.5,),
)  # fmt: skip
ABOUT = {
    "command": "python -m experiments.targeted_pruning", "data": "digits", "seeds": (0,),
    "commit": "unknown", "hardware": "a machine",
}  # fmt: skip


@pytest.fixture(scope="module")
def case():
    return study.prepare("digits_cnn", None, TINY, 0)


@pytest.fixture(scope="module")
def done(case, tmp_path_factory):
    """The rows of a whole run, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    return study.run(case, folder / "work", folder / "figures"), folder


def test_a_run_gives_every_row_once(done):
    rows, folder = done
    made = record.Record(
        title=study.TITLE, text=study.TEXT,
        rows=tuple(record.Row(study="targeted_pruning", **row, **ABOUT) for row in rows),
    )  # fmt: skip
    names = [row.row for row in made.rows]
    for method in study.METHODS:
        for ratio in TINY.ratios:
            assert f"{method}, {ratio:.0%} pruned, 4 target classes" in names
        assert f"{method}, 70% pruned, fine-tuned, 4 target classes" in names
    for row in made.rows:
        if row.unit == "%":
            assert 0 <= row.ours <= 100
    published = {(r.row, r.metric): r.published for r in made.rows if r.published is not None}
    assert published == {
        ("NNSlicer (targeted), 4 target classes", "holds to a ratio of"): 55.0,
        ("NNSlicer (all classes), 4 target classes", "holds to a ratio of"): 45.0,
        ("Weight, 4 target classes", "holds to a ratio of"): 45.0,
        ("NNSlicer (targeted), 55% pruned, 4 target classes", study.METRICS["target"]): "about 80",
    }
    pictures = sorted(p.name for p in (folder / "figures").iterdir())
    assert pictures == ["accuracy_4_classes.png", "accuracy_4_classes_tuned.png"]


def test_a_run_goes_on_where_it_stopped(case, done, monkeypatch):
    rows, folder = done

    def again(*_args, **_options):
        raise AssertionError("this was done before")

    for name in ("sliced", "path", "fixed_scores", "fine_tune"):
        monkeypatch.setattr(study, name, again)
    assert study.run(case, folder / "work", folder / "figures") == rows


def test_another_run_does_not_go_on(case, done):
    _, folder = done
    other = dataclasses.replace(case, schedule=dataclasses.replace(TINY, images=5))
    with pytest.raises(ValueError, match="holds checkpoints of another run, schedule was"):
        study.run(other, folder / "work", folder / "figures")


def test_judging_is_counting():
    logits = np.array([[3, 2, 1, 0], [0, 1, 2, 3], [1, 0, 2, 0], [0, 0, 5, 1], [9, 0, 1, 8]])
    labels = np.array([0, 1, 2, 3, 3])
    # Targets 0 and 1: images 0 and 1; of all outputs 0 is right, 1 is not; among 0 and 1 both are.
    assert study.judge(logits, labels, (0, 1)) == Judged(0.5, 1.0, 1 / 3)
    assert study.judge(logits, labels, (3,)) == Judged(0.0, 1.0, 2 / 3)


def test_targeted_criteria_are_those_of_the_paper(case):
    targets = (1, 4, 7)
    images = study._images_of(case, targets)
    assert len(images) == 3 * TINY.images
    piece = study.sliced(case, targets)
    expected = nns.slice_network(
        case.graph, case.params, case.profile, images, np.tile(targets, (len(images), 1)),
        theta=0.2, batch_size=len(images),
    )  # fmt: skip
    for name in criteria.kernels(case.graph):
        np.testing.assert_array_equal(piece.synapses[name], expected.synapses[name])


def test_the_same_images_stand_for_a_class_in_every_set(case):
    one, other = study._images_of(case, (2,)), study._images_of(case, (2, 5))
    found = {image.tobytes() for image in other}
    assert all(image.tobytes() in found for image in one)


def test_pruned_shares_are_exact(case):
    scores = criteria.magnitudes(case.graph, case.params)
    for ratio in (0, 0.3, 0.55, 0.9):
        kept = study.prune(scores, ratio)
        for name in criteria.kernels(case.graph):
            size = case.graph.values[case.graph.params[name]].shape
            leaf = dict(zip(case.graph.params, _leaves(kept), strict=True))[name]
            assert leaf.sum() == np.prod(size) - int(np.prod(size) * round(100 * ratio) // 100)


def _leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)


def test_fine_tuning_holds_the_masks(case):
    kept = study.prune(criteria.magnitudes(case.graph, case.params), 0.7)
    params = study.fine_tune(case, kept, (0, 1, 2, 3))
    for name, mask, before, after in zip(
        case.graph.params, _leaves(kept), _leaves(case.params), _leaves(params), strict=True
    ):
        if mask is not None:
            assert not np.any(np.asarray(after)[~np.asarray(mask)])
            assert np.any(np.asarray(after) != np.asarray(before)), name


def test_sets_are_drawn_without_repeats():
    every = study.target_sets(10, 4, None, 0)
    assert len(every) == len(set(every)) == 210 == len(study.target_sets(10, 6, None, 0))
    assert study.target_sets(10, 4, 5, 0) == every[:5]
    assert study.target_sets(10, 4, 5, 1) != every[:5]


def test_a_method_holds_as_long_as_it_never_fell():
    curve = {0.3: [Judged(0.9, 0, 0)], 0.5: [Judged(0.7, 0, 0)], 0.6: [Judged(0.9, 0, 0)]}
    assert study.held_to(curve, 0.9) == 0.3
    assert study.held_to(curve, 0.95) == 0.0
    assert study.held_to(curve, 0.7) == 0.6


def test_intervals_are_those_of_a_mean():
    assert study.interval([0.5]) == (50.0, None)
    assert study.interval([0.4, 0.6]) == (50.0, 19.6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda case: study.prune(criteria.magnitudes(case.graph, case.params), 1.0),
         "ratio must be 0 or more and below 1, not 1.0"),
        (lambda case: study.targeted_scores(case, ()),
         "targets is empty; at least one class is due"),
        (lambda case: study.targeted_scores(case, (3, 10)),
         "targets must be different classes below 10, not (3, 10)"),
        (lambda case: study.targeted_scores(case, tuple(range(10))),
         "targets must leave some of the 10 classes out"),
        (lambda case: Schedule(ratios=(0.5, 1.0)),
         "ratios must be 0 or more and below 1, not 1.0"),
        (lambda case: Schedule(images=0), "images must be at least 1, not 0"),
        (lambda case: study.prepare("digits_cnn", None, Schedule(sizes=(10,)), 0),
         "sizes must be 1 to 9, below the 10 classes of digits, not 10"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(case, call, said):
    with pytest.raises(ValueError) as caught:
        call(case)
    assert str(caught.value) == said


def test_methods_score_the_same_synapses(case):
    scores = study.fixed_scores(case) | study.targeted_scores(case, (0, 1))
    assert set(scores) == set(study.METHODS)
    kept = {method: masks.kept(study.prune(score, 0.5)) for method, score in scores.items()}
    assert len(set(kept.values())) == 1
