"""Sets of target classes: drawing, checking, and accuracy over sets that share test images."""

import itertools

import numpy as np
import pytest

from experiments import target_classes
from experiments.target_classes import accuracy, packed, target_sets, unpacked, wilson


def test_sets_are_different_sets_drawn_by_the_seed():
    every = target_sets(10, 4, None, 0)
    assert len(every) == len(set(every)) == 210 == len(target_sets(10, 6, 1000, 0))
    assert all(len(set(targets)) == 4 and targets == tuple(sorted(targets)) for targets in every)
    assert target_sets(10, 4, 5, 0) == every[:5] != target_sets(10, 4, 5, 1)
    with pytest.raises(ValueError, match=r"^a set must hold 1..10 target classes, not 11$"):
        target_sets(10, 11, None, 0)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ((), "targets must name at least one class"),
        ((10,), "targets must be different classes in 0..9, not 10"),
        ((-1, 2), "targets must be different classes in 0..9, not -1, 2"),
        ((3, 3), "targets must be different classes in 0..9, not 3, 3"),
    ],
)
def test_targets_out_of_range(targets, said):
    with pytest.raises(ValueError) as caught:
        target_classes.check_targets(targets, 10)
    assert str(caught.value) == said


def test_targets_come_in_order():
    assert target_classes.check_targets([7, 2], 10) == (2, 7)


def drawn(seed: int, sets: int):
    """Right answers, judged images and labels of overlapping sets."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(5), 12)
    judged = np.stack([np.isin(labels, t) for t in target_sets(5, 2, sets, seed)])
    return rng.random(judged.shape) < 0.3 + 0.1 * labels, judged, labels


def test_the_mean_is_that_of_the_sets():
    right, judged, labels = drawn(0, 7)
    found = accuracy(right, judged, labels)
    each = [r[j].mean() for r, j in zip(right, judged, strict=True)]
    assert found.mean == pytest.approx(np.mean(each))
    assert found.by_set == pytest.approx(each)
    assert found.images == judged.any(0).sum()
    assert found.low < found.mean < found.high
    assert found.percent == pytest.approx(100 * found.mean)
    assert found.percents == pytest.approx((100 * found.low, 100 * found.high))


def test_sets_that_repeat_the_same_answers_do_not_narrow_the_interval():
    right, judged, labels = drawn(1, 1)
    once = accuracy(right, judged, labels)
    often = accuracy(np.repeat(right, 50, 0), np.repeat(judged, 50, 0), labels)
    assert often[:4] == pytest.approx(once[:4])


def test_the_variance_is_that_of_drawing_images_again():
    # Drawn with replacement within each class, over and over: what the interval is about.
    right, judged, labels = drawn(2, 6)
    found = accuracy(right, judged, labels)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(4000):
        rows = np.concatenate([rng.choice(np.flatnonzero(labels == c), 12) for c in range(5)])
        means.append((right & judged)[:, rows].sum(1) / judged.sum(1))
    spread = np.mean(means, 1).std() * np.sqrt(12 / 11)
    count = found.mean * (1 - found.mean) / spread**2
    np.testing.assert_allclose(wilson(found.mean, count), (found.low, found.high), atol=0.01)


def test_of_one_set_of_one_class_it_is_wilsons_of_its_images():
    labels = np.array([0] * 20 + [1] * 5)
    right = np.arange(25)[None] < 13
    found = accuracy(right, (labels == 0)[None], labels)
    # The variance is that of a sample, which counts one image less.
    assert (found.mean, found.images) == (pytest.approx(0.65), 20)
    assert (found.low, found.high) == pytest.approx(wilson(0.65, 19))


@pytest.mark.parametrize(("each", "sets"), [(500, 1), (500, 2), (100, 3)])
def test_answers_that_vary_only_between_classes_leave_an_interval(each, sets):
    labels = np.repeat(np.arange(4), each)
    stuck = accuracy(np.tile(labels == 2, (sets, 1)), np.ones((sets, 4 * each), bool), labels)
    assert stuck.mean == pytest.approx(0.25)
    assert (stuck.low, stuck.high) == pytest.approx(wilson(0.25, 4 * each))
    every = accuracy(np.ones((sets, 4 * each), bool), np.ones((sets, 4 * each), bool), labels)
    assert (every.low, every.high) == pytest.approx(wilson(1.0, 4 * each))


@pytest.mark.parametrize("value", [True, False])
def test_where_nothing_varies_the_images_count(value):
    labels = np.repeat(np.arange(2), 4)
    found = accuracy(np.full((3, 8), value), np.ones((3, 8), bool), labels)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (float(value), *wilson(float(value), 8))
    )


def test_intervals_are_wilsons():
    # p within z standard deviations of the observed share: the roots of that equation.
    for correct, count in ((3, 10), (50, 50), (0, 7), (812, 1000)):
        share, z = correct / count, 1.959964
        roots = np.roots([1 + z**2 / count, -(2 * share + z**2 / count), share**2])
        np.testing.assert_allclose(wilson(share, count), np.sort(roots.real), atol=1e-7)


def test_the_share_is_in_its_interval():
    for count in (1, 7, 100, 333, 5000):
        for share in (0.0, 1 / count, 1.0):
            low, high = wilson(share, count)
            assert 0 <= low <= share <= high <= 1


def test_answers_are_packed_and_unpacked():
    for count, seed in itertools.product((1, 7, 8, 9, 400), range(3)):
        right = np.random.default_rng(seed).random(count) < 0.5
        np.testing.assert_array_equal(unpacked(packed(right), count), right)
    with pytest.raises(ValueError, match="^right answers must be of 9 images, not of 8$"):
        unpacked("ff", 9)
