"""Detection of adversarial inputs: a classifier of features disagrees with the network.

Zhang et al., "Dynamic Slicing for Deep Neural Networks", ESEC/FSE 2020, section on adversarial
defence: a decision tree learns from the slices of normal inputs which class the network predicts;
an input whose slice looks like another class's than the network's prediction is flagged. Nothing
here depends on where the features come from: rows of numbers, one an input.

The features most dependent on the class are chosen by the F statistic of a one-way analysis of
variance (between classes over within classes): it sees the sign of a CONTRIB, needs sums only, and
so takes one pass over features of any number. The paper does not say how it fits its tree.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse, stats
from sklearn.ensemble import (
    AdaBoostClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier

from interpret.features import Matrix

# Rounding of float64 sums, relative to them: what is smaller counts as no variance.
_ROUNDING = 1e-12


def dependence(parts: Iterable[tuple[slice, Matrix]], labels: np.ndarray, width: int) -> np.ndarray:
    """F statistic of every feature against the label, in one pass.

    Args:
      parts: Which rows, and their features `[n, F]`, as `Features.parts` gives them.
      labels: `[N]` integers from 0, of all rows.
      width: F.

    Returns:
      `[F]` float64: 0 where a feature does not vary between labels, infinite where it does and
      never within one.

    Raises:
      ValueError: For labels of fewer than two classes, or as many classes as rows; for parts of
        another width, or of more or fewer rows than labels.
    """
    labels = np.asarray(labels)
    present, index = np.unique(labels, return_inverse=True)
    classes, count = len(present), len(labels)
    if not 2 <= classes < count:
        raise ValueError(
            f"labels must be of 2 classes or more and fewer than rows, given {classes} classes "
            f"in {count} rows"
        )
    sums, squares = np.zeros((classes, width)), np.zeros(width)
    seen = 0
    for span, part in parts:
        rows = index[span]
        if part.shape != (len(rows), width):
            raise ValueError(
                f"parts must be [{len(rows)}, {width}] for {span} of {count} labels, given "
                f"{part.shape}"
            )
        seen += len(rows)
        ones = np.ones(len(rows))
        pick = sparse.csr_array((ones, (rows, np.arange(len(rows)))), (classes, len(rows)))
        values = part.astype(np.float64)
        added = pick @ values
        sums += added.toarray() if sparse.issparse(added) else added
        squares += (values * values).sum(0)
    if seen != count:
        raise ValueError(f"parts must hold a row for each of {count} labels, given {seen}")
    sizes = np.bincount(index)[:, None]
    explained = (sums**2 / sizes).sum(0)
    between = explained - sums.sum(0) ** 2 / count
    within = squares - explained
    between[between <= _ROUNDING * squares] = 0
    within[within <= _ROUNDING * squares] = 0
    found = np.divide(
        between / (classes - 1), within / (count - classes), out=np.zeros(width), where=within > 0
    )
    found[(within == 0) & (between > 0)] = np.inf
    return found


def most_dependent(
    statistic: np.ndarray, count: int, among: np.ndarray | None = None
) -> np.ndarray:
    """Columns of the greatest statistics, ascending; of equal ones the first.

    Args:
      statistic: `[F]`, from `dependence`.
      count: How many columns at most; one whose statistic is 0 is never among them.
      among: `[F]` bool, which columns may be chosen; None: all.

    Raises:
      ValueError: For a count below 1, or if no column depends on the label.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    allowed = statistic > 0 if among is None else (statistic > 0) & among
    if not allowed.any():
        raise ValueError("statistic must be above 0 for some column that may be chosen")
    columns = np.flatnonzero(allowed)
    order = np.argsort(-statistic[columns], kind="stable")[:count]
    return np.sort(columns[order])


def _tree(seed: int, leaf: int) -> Any:
    return DecisionTreeClassifier(random_state=seed, min_samples_leaf=leaf)


def _forest(seed: int, leaf: int) -> Any:
    return RandomForestClassifier(100, random_state=seed, min_samples_leaf=leaf, n_jobs=-1)


def _adaboost(seed: int, leaf: int) -> Any:
    return AdaBoostClassifier(_tree(seed, leaf).set_params(max_depth=3), random_state=seed)


def _boosting(seed: int, leaf: int) -> Any:
    return HistGradientBoostingClassifier(random_state=seed, min_samples_leaf=leaf)


CLASSIFIERS: Mapping[str, Callable[[int, int], Any]] = MappingProxyType(
    {"tree": _tree, "forest": _forest, "adaboost": _adaboost, "boosting": _boosting}
)


def fit(
    features: Matrix, labels: np.ndarray, *, classifier: str = "tree", seed: int = 0, leaf: int = 1
) -> Any:
    """Trains a classifier of scikit-learn.

    Args:
      features: `[N, k]`, dense or sparse.
      labels: `[N]` integers.
      classifier: One of `CLASSIFIERS`: "tree" (the paper's), "forest" of 100 trees, "adaboost" of
        trees of depth 3, "boosting" (gradient boosting; dense features only).
      seed: Its `random_state`.
      leaf: Fewest training rows in a leaf. With 1 a tree's leaves are pure, and its probabilities
        0 or 1.

    Raises:
      ValueError: For an unknown classifier, a leaf below 1, labels that do not fit, or sparse
        features for "boosting".
    """
    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier must be one of {', '.join(CLASSIFIERS)}, not {classifier!r}")
    if leaf < 1:
        raise ValueError(f"leaf must be at least 1, not {leaf}")
    if classifier == "boosting" and sparse.issparse(features):
        raise ValueError("features must be dense for classifier 'boosting', not sparse")
    if np.shape(labels) != (features.shape[0],):
        raise ValueError(
            f"labels must be one for each of {features.shape[0]} rows, not of shape "
            f"{np.shape(labels)}"
        )
    return CLASSIFIERS[classifier](seed, leaf).fit(features, labels)


class Verdict(NamedTuple):
    """What a detector says of inputs.

    Attributes:
      flags: `[N]` bool: the classifier's class is not the network's.
      score: `[N]` float64, 0..1: how little probability the classifier gives the network's class;
        the greater, the more suspicious. Needs no threshold.
    """

    flags: np.ndarray
    score: np.ndarray


def judge(classifier: Any, features: Matrix, predicted: np.ndarray) -> Verdict:
    """Flags inputs on which a fitted classifier disagrees with the network.

    Args:
      classifier: From `fit`.
      features: `[N, k]`, columns as it was fitted on.
      predicted: `[N]` integers, the network's classes.
    """
    predicted = np.asarray(predicted)
    if predicted.shape != (features.shape[0],):
        raise ValueError(
            f"predicted must be one class for each of {features.shape[0]} rows, not of shape "
            f"{predicted.shape}"
        )
    probabilities = classifier.predict_proba(features)
    # A class that the classifier never saw has no probability.
    own = np.where(predicted[:, None] == classifier.classes_, probabilities, 0).sum(1)
    return Verdict(classifier.classes_[probabilities.argmax(1)] != predicted, 1 - own)


class Measures(NamedTuple):
    """How well a detector tells adversarial inputs (positive) from normal ones.

    Attributes:
      precision: Share of the flagged that are adversarial; None if none is flagged.
      recall: Share of the adversarial that are flagged.
      f1: Harmonic mean of both; 0 if nothing adversarial is flagged.
      auroc: Probability that an adversarial input scores above a normal one, ties half.
    """

    precision: Any
    recall: Any
    f1: Any
    auroc: Any


def measure(normal: Verdict, adversarial: Verdict) -> Measures:
    """Measures from the verdicts on normal and on adversarial inputs; all None without either."""
    if not len(normal.flags) or not len(adversarial.flags):
        return Measures(None, None, None, None)
    hits, misses = int(adversarial.flags.sum()), int((~adversarial.flags).sum())
    alarms = int(normal.flags.sum())
    truth = np.repeat([0, 1], [len(normal.flags), len(adversarial.flags)])
    return Measures(
        precision=hits / (hits + alarms) if hits + alarms else None,
        recall=hits / (hits + misses),
        f1=2 * hits / (2 * hits + alarms + misses),
        auroc=float(roc_auc_score(truth, np.concatenate([normal.score, adversarial.score]))),
    )


def intervals(
    normal: Verdict, adversarial: Verdict, *, seed: int = 0, draws: int = 1000
) -> Measures:
    """95 % intervals of `measure` over images drawn anew with replacement.

    Row i of both is one image, before and after the attack, so pairs are drawn.

    Returns:
      (low, high) in place of each measure; None where one is undefined for every draw.

    Raises:
      ValueError: If the two are not of one length, or for draws below 1.
    """
    count = len(normal.flags)
    if len(adversarial.flags) != count:
        raise ValueError(
            f"adversarial must hold the same images as normal, {count}, not "
            f"{len(adversarial.flags)}"
        )
    if draws < 1:
        raise ValueError(f"draws must be at least 1, not {draws}")
    if not count:
        return Measures(None, None, None, None)
    # How often each image is drawn: all measures are sums weighted by it.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), draws)
    hits, alarms = drawn @ adversarial.flags, drawn @ normal.flags
    above = adversarial.score[:, None] > normal.score
    ties = adversarial.score[:, None] == normal.score
    wins = (drawn * (drawn @ (above + ties / 2))).sum(1)
    with np.errstate(invalid="ignore"):
        precision = hits / (hits + alarms)
    recall, f1, auroc = hits / count, 2 * hits / (hits + alarms + count), wins / count**2
    ends = []
    for values in (precision, recall, f1, auroc):
        known = values[~np.isnan(values)]
        ends.append(tuple(np.quantile(known, [0.025, 0.975]).tolist()) if len(known) else None)
    return Measures(*ends)


def some(verdict: Verdict, which: np.ndarray) -> Verdict:
    """The verdicts on some of the inputs, by index or by mask."""
    return Verdict(verdict.flags[which], verdict.score[which])


def rate(flags: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Share that is flagged, with its exact (Clopper-Pearson) 95 % binomial interval.

    Raises:
      ValueError: For no inputs.
    """
    if not len(flags):
        raise ValueError("flags is empty; it must hold at least one input")
    test = stats.binomtest(int(np.sum(flags)), len(flags))
    low, high = test.proportion_ci(0.95, "exact")
    return test.statistic, (float(low), float(high))
