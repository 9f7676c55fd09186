"""Detectors: selection in one pass, who is flagged, and what is counted of it."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_selection import f_classif
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from interpret import detect
from interpret.detect import Measures, Verdict


def parts(matrix, *cuts):
    """The matrix cut into parts, as they come from disk."""
    ends = [0, *cuts, matrix.shape[0]]
    return [(slice(a, b), matrix[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=60)
    matrix = rng.integers(-3, 4, (60, 30)).astype(np.int16)
    matrix[:, :8] += labels[:, None].astype(np.int16) * rng.integers(-2, 3, 8).astype(np.int16)
    matrix[rng.random(matrix.shape) < 0.5] = 0
    return matrix, labels


# Selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (1, 2, 40), (30,)])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
def test_dependence_is_scikit_learns_in_one_pass(counts, cuts, form):
    matrix, labels = counts
    found = detect.dependence(iter(parts(form(matrix), *cuts)), labels, 30)
    np.testing.assert_allclose(found, f_classif(matrix.astype(float), labels)[0], rtol=1e-9)


def test_dependence_does_not_overflow_int16():
    labels = np.repeat([0, 1], 500)
    matrix = np.full((1000, 2), 32767, np.int16)
    matrix[::3, 0] = -32768
    matrix[labels == 1, 1] = 32766
    matrix[0, 1] = 0
    found = detect.dependence(parts(sparse.csr_array(matrix), 500), labels, 2)
    np.testing.assert_allclose(found, f_classif(matrix.astype(float), labels)[0], rtol=1e-6)


def test_constants_say_nothing_and_a_label_says_all():
    labels = np.repeat([0, 1, 2], 4)
    columns = [np.zeros(12), np.full(12, 7), labels * 5 - 3, np.arange(12) % 2, labels == 1]
    matrix = np.array(columns, float).T
    found = detect.dependence(parts(matrix, 5), labels, 5)
    assert found[:2].tolist() == [0, 0] and np.isinf(found[[2, 4]]).all() and found[3] == 0
    assert detect.most_dependent(found, 9).tolist() == [2, 4]


def test_labels_need_not_be_all_classes(counts):
    matrix, labels = counts
    found = detect.dependence(parts(matrix, 20), labels * 3 + 2, 30)
    np.testing.assert_array_equal(found, detect.dependence(parts(matrix, 20), labels, 30))


@pytest.mark.parametrize("labels", [np.zeros(60, int), np.arange(60)])
def test_labels_without_a_statistic_are_refused(counts, labels):
    with pytest.raises(ValueError, match="^labels must be of 2 classes or more and fewer than"):
        detect.dependence(parts(counts[0]), labels, 30)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_array])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m: parts(m[:, :29], 20),
            "parts must be [20, 30] for slice(0, 20, None) of 60 labels",
        ),
        (
            lambda m: parts(m[:, [0]], 20),
            "parts must be [20, 30] for slice(0, 20, None) of 60 labels",
        ),
        (lambda m: parts(m, 20)[:1], "parts must hold a row for each of 60 labels, given 20"),
        (lambda m: parts(m, 20) * 2, "parts must hold a row for each of 60 labels, given 120"),
        (
            lambda m: [(slice(0, 20), m)],
            "parts must be [20, 30] for slice(0, 20, None) of 60 labels",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_line(counts, form, change, said):
    matrix, labels = counts
    with pytest.raises(ValueError) as caught:
        detect.dependence(change(form(matrix)), labels, 30)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_the_most_dependent_come_first():
    statistic = np.array([3.0, 0.0, 5.0, 3.0, np.inf, 1.0, 3.0])
    for count, expected in ((1, [4]), (2, [2, 4]), (3, [0, 2, 4]), (4, [0, 2, 3, 4])):
        assert detect.most_dependent(statistic, count).tolist() == expected
    assert detect.most_dependent(statistic, 100).tolist() == [0, 2, 3, 4, 5, 6]
    among = np.array([1, 1, 0, 1, 0, 1, 0], bool)
    assert detect.most_dependent(statistic, 2, among).tolist() == [0, 3]
    with pytest.raises(ValueError, match="^count must be at least 1, not 0$"):
        detect.most_dependent(statistic, 0)
    with pytest.raises(ValueError, match="^statistic must be above 0 for some column"):
        detect.most_dependent(statistic, 2, np.arange(7) == 1)


# Verdicts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(detect.CLASSIFIERS))
def test_flagged_is_who_disagrees(counts, name):
    matrix, labels = counts
    matrix = matrix.astype(np.float32)
    fitted = detect.fit(matrix[:40], labels[:40], classifier=name, leaf=2)
    predicted = np.arange(20) % 4
    verdict = detect.judge(fitted, matrix[40:], predicted)
    own = fitted.predict(matrix[40:])
    np.testing.assert_array_equal(verdict.flags, own != predicted)
    assert verdict.flags.any() and not verdict.flags.all()
    probabilities = fitted.predict_proba(matrix[40:])
    expected = [1 - p[c] for p, c in zip(probabilities, predicted, strict=True)]
    np.testing.assert_allclose(verdict.score, expected)
    assert not detect.judge(fitted, matrix[40:], own).flags.any()


def test_a_class_never_seen_is_flagged(counts):
    matrix, labels = counts
    seen = labels != 2
    fitted = detect.fit(matrix[seen], labels[seen])
    verdict = detect.judge(fitted, matrix, np.full(60, 2))
    assert verdict.flags.all() and (verdict.score == 1).all()


def test_sparse_rows_are_judged_as_dense_ones(counts):
    matrix, labels = counts
    predicted = labels[::-1]
    found = [
        detect.judge(detect.fit(form, labels), form, predicted)
        for form in (matrix.astype(np.float32), sparse.csr_array(matrix.astype(np.float32)))
    ]
    np.testing.assert_array_equal(found[0].flags, found[1].flags)
    np.testing.assert_array_equal(found[0].score, found[1].score)


def test_only_larger_leaves_give_a_single_tree_doubts(counts):
    matrix, labels = counts
    scores = [
        detect.judge(detect.fit(matrix, labels, leaf=leaf), matrix, labels).score
        for leaf in (1, 10)
    ]
    assert set(scores[0]) <= {0.0, 1.0}
    assert np.any((scores[1] > 0) & (scores[1] < 1))


def test_bad_options_are_one_line(counts):
    matrix, labels = counts
    with pytest.raises(ValueError, match="^classifier must be one of tree, forest, adaboost, boos"):
        detect.fit(matrix, labels, classifier="oak")
    with pytest.raises(ValueError, match="^leaf must be at least 1, not 0$"):
        detect.fit(matrix, labels, leaf=0)
    with pytest.raises(ValueError, match=r"^labels must be one for each of 60 rows, not of shape"):
        detect.fit(matrix, labels[:5])
    for form in (sparse.csr_array(matrix), sparse.csr_matrix(matrix)):
        with pytest.raises(
            ValueError, match="^features must be dense for classifier .boosting., n"
        ):
            detect.fit(form, labels, classifier="boosting")
    with pytest.raises(ValueError, match=r"^predicted must be one class for each of 60 rows, not"):
        detect.judge(detect.fit(matrix, labels), matrix, labels[:5])


# Measures -----------------------------------------------------------------------------------


def verdict(flags, score):
    return Verdict(np.array(flags, bool), np.array(score, float))


def test_measures_of_a_few_images():
    normal = verdict([1, 0, 0, 0], [0.9, 0.1, 0.5, 0.2])
    adversarial = verdict([1, 1, 0], [0.8, 1.0, 0.5])
    found = detect.measure(normal, adversarial)
    # Of 12 pairs: 0.8 beats three, 1.0 all four, 0.5 two and ties one.
    assert found == pytest.approx((2 / 3, 2 / 3, 2 / 3, 9.5 / 12))


def drawn(seed, normal=50, adversarial=50):
    rng = np.random.default_rng(seed)
    made = []
    for count, shift in ((normal, 0), (adversarial, 2)):
        score = rng.integers(shift, 9, count) / 10
        made.append(Verdict(score + rng.normal(0, 0.1, count) > 0.5, score))
    return made


@pytest.mark.parametrize("seed", range(3))
def test_measures_are_scikit_learns(seed):
    normal, adversarial = drawn(seed, 40, 70)
    truth = np.repeat([0, 1], [40, 70])
    flags, score = (np.concatenate(pair) for pair in zip(normal, adversarial, strict=True))
    expected = (
        precision_score(truth, flags), recall_score(truth, flags), f1_score(truth, flags),
        roc_auc_score(truth, score),
    )  # fmt: skip
    assert detect.measure(normal, adversarial) == pytest.approx(expected)


def test_an_attack_that_never_succeeds_has_no_measures():
    none = verdict([], [])
    for normal in (none, verdict([1, 0], [0.3, 0.2])):
        assert detect.measure(normal, none) == Measures(None, None, None, None)
    assert detect.intervals(none, none) == Measures(None, None, None, None)


def test_where_nothing_is_flagged_precision_is_undefined():
    quiet = verdict([0, 0], [0.1, 0.2])
    assert detect.measure(quiet, quiet) == Measures(None, 0, 0, 0.5)
    found = detect.intervals(quiet, quiet)
    assert found.precision is None and found.recall == (0, 0)


def test_intervals_are_those_of_measures_drawn_anew():
    normal, adversarial = drawn(5)
    draws = np.random.default_rng(3).multinomial(50, np.full(50, 1 / 50), 40)
    naive = []
    for times in draws:
        which = np.repeat(np.arange(50), times)
        naive.append(detect.measure(detect.some(normal, which), detect.some(adversarial, which)))
    found = detect.intervals(normal, adversarial, seed=3, draws=40)
    for (low, high), values in zip(found, zip(*naive, strict=True), strict=True):
        assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        assert low < high


def test_intervals_want_pairs():
    normal, adversarial = drawn(0, 5, 6)
    with pytest.raises(ValueError, match="^adversarial must hold the same images as normal, 5, no"):
        detect.intervals(normal, adversarial)
    with pytest.raises(ValueError, match="^draws must be at least 1, not 0$"):
        detect.intervals(normal, normal, draws=0)


def test_rates_have_the_exact_binomial_interval():
    for count in (1, 7, 100):
        share, (low, high) = detect.rate(np.zeros(count, bool))
        assert (share, low) == (0, 0) and high == pytest.approx(1 - 0.025 ** (1 / count))
        share, (low, high) = detect.rate(np.ones(count, bool))
        assert (share, high) == (1, 1) and low == pytest.approx(0.025 ** (1 / count))
    share, (low, high) = detect.rate(np.arange(10) < 3)
    # Clopper and Pearson's table: 3 of 10.
    assert (share, round(low, 4), round(high, 4)) == (0.3, 0.0667, 0.6525)
    with pytest.raises(ValueError, match="^flags is empty"):
        detect.rate(np.zeros(0, bool))
