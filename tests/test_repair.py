"""DRepair: its counts by hand, its folds, and the repaired model beside scikit-learn's."""

import jax
import numpy as np
import pytest
from sklearn.neural_network import MLPClassifier

import difftest
from difftest import ModelError, ModelPair, repair
from difftest.repair import Examples, Judgement, Perceptron
from tests.pairs import KEY, as_black_box, linear_pair, seeds

PAIR = linear_pair(apart=0.3)
SEEDS = seeds(40)


@pytest.fixture(scope="module")
def found():
    return difftest.search(PAIR, SEEDS, KEY, max_queries=300)


@pytest.fixture(scope="module")
def data(found):
    return repair.examples(PAIR, SEEDS, found)


def _drawn(number=30, classes=4, present=None, seed=0):
    rng = np.random.default_rng(seed)
    present = np.arange(classes) if present is None else np.array(present)
    vectors = rng.dirichlet(np.ones(classes), (2, number)).astype(np.float32)
    labels = present[rng.integers(0, len(present), (2, number))]
    return Examples(*vectors, *labels)


def _identity(classes):
    """A perceptron that gives the label the vector has."""
    weights = np.zeros((classes, 50), np.float32)
    weights[:, :classes] = np.eye(classes)
    zeros = np.zeros(50, np.float32), np.zeros(classes, np.float32)
    return Perceptron(weights, zeros[0], weights.T.copy(), zeros[1])


def test_counts_by_hand():
    vectors = np.eye(3, dtype=np.float32)
    held_out = Examples(
        seeds=vectors[[0, 1, 2, 0]],
        triggers=vectors[[0, 1, 1, 2]],
        seed_labels=np.array([0, 1, 0, 1]),  # The third and the fourth deviate now.
        trigger_labels=np.array([0, 2, 1, 0]),  # The first and the third do no longer.
    )
    assert repair.count(_identity(3), held_out) == (2, 2, 4, 4)


def test_ratios_by_hand():
    judged = Judgement(
        repaired=np.array([[50, 10]]),
        induced=np.array([[5, 20]]),
        triggers=np.array([[100, 100]]),
        seeds=np.array([[50, 100]]),
    )
    # Before: 100 deviations; after: 50 + 5 and 90 + 20.
    assert judged.improved.tolist() == [[45, -10]]
    assert judged.repair_ratio.tolist() == [[0.5, 0.1]]
    assert judged.inducing_ratio.tolist() == [[0.1, 0.2]]
    assert judged.improvement_ratio.tolist() == [[0.45, -0.1]]


def test_examples_are_the_seeds_that_have_a_trigger(found, data):
    rows = np.flatnonzero(found.success)
    assert 10 < len(rows) < len(SEEDS) or found.success.all()
    original, compressed = PAIR.probabilities(SEEDS[rows])
    np.testing.assert_allclose(data.seeds, compressed, atol=1e-6)
    assert (data.seed_labels == original.argmax(1)).all()
    # On the seeds the models agree, on the triggers they do not.
    assert (data.seeds.argmax(1) == data.seed_labels).all()
    assert (data.triggers.argmax(1) != data.trigger_labels).all()
    original, compressed = PAIR.probabilities(found.triggers[rows])
    np.testing.assert_allclose(data.triggers, compressed, atol=1e-6)
    assert (data.trigger_labels == original.argmax(1)).all()


def test_other_seeds_are_refused(found):
    with pytest.raises(ValueError, match="seeds have shape"):
        repair.examples(PAIR, SEEDS[:3], found)


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (1, 3), (0, 2, 3), (2,)])
def test_probabilities_are_those_of_scikit_learn(present):
    data = _drawn(present=present)
    vectors = np.concatenate([data.seeds, data.triggers])
    labels = np.concatenate([data.seed_labels, data.trigger_labels])
    ours = repair.probabilities(repair.train(data, seed=3), vectors)
    assert ours.shape == (60, 4) and ours.dtype == np.float32
    expected = np.zeros((60, 4))
    if len(present) == 1:
        expected[:, present] = 1
    else:
        made = MLPClassifier(hidden_layer_sizes=(50,), max_iter=5000, random_state=3)
        made.fit(vectors, labels)
        expected[:, list(present)] = made.predict_proba(vectors)
        assert (ours.argmax(1) == made.predict(vectors)).all()
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert (ours[:, [c for c in range(4) if c not in present]] == 0).all()


def test_the_same_seed_trains_the_same():
    one, two, other = (repair.train(_drawn(), seed) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))
    assert (one.weights != other.weights).any()


def test_a_fold_never_separates_a_seed_from_its_trigger(monkeypatch):
    number = 23
    marks = np.arange(number, dtype=np.float32)[:, None].repeat(3, axis=1)
    labels = np.arange(number) % 3
    data = Examples(marks, marks, labels, labels)
    trained, tested = [], []

    def train(part, seed):
        assert (part.seeds == part.triggers).all()
        trained.append((seed, set(part.seeds[:, 0])))

    def count(_perceptron, part):
        assert (part.seeds == part.triggers).all()
        tested.append(set(part.seeds[:, 0]))
        return 1, 0, len(part.triggers), len(part.seeds)

    monkeypatch.setattr(repair, "train", train)
    monkeypatch.setattr(repair, "count", count)
    judged = repair.cross_validate(data, folds=5, seeds=(4, 9))
    assert judged.triggers.shape == (2, 5)
    assert [seed for seed, _ in trained] == [4] * 5 + [9] * 5
    everyone = set(marks[:, 0])
    for (_, learned), held_out in zip(trained, tested, strict=True):
        assert learned | held_out == everyone and not learned & held_out
    for start in (0, 5):
        folds = tested[start : start + 5]
        assert sum(map(len, folds)) == number and set().union(*folds) == everyone
        assert {len(fold) for fold in folds} == {4, 5}
    assert tested[:5] != tested[5:]


def test_what_can_be_learned_is_repaired():
    # On triggers the compressed model is unsure between its label and the right one.
    labels = np.arange(60) % 3
    sure, unsure = np.full((2, 60, 3), 0.05, np.float32)
    sure[np.arange(60), labels] = 0.9
    unsure[np.arange(60), labels] = 0.45
    unsure[np.arange(60), (labels + 1) % 3] = 0.5
    judged = repair.cross_validate(Examples(sure, unsure, labels, labels), seeds=(0,))
    assert (judged.repair_ratio == 1).all() and (judged.improvement_ratio == 1).all()
    assert (judged.triggers == 12).all() and (judged.induced == 0).all()


def test_improvement_can_be_negative():
    # Labels that have nothing to do with the vectors: seeds deviate, few triggers are hit.
    data = _drawn(number=40, classes=4)
    judged = repair.cross_validate(data, seeds=(0,), folds=4)
    assert judged.improvement_ratio.mean() < 0
    assert (judged.improved == judged.repaired - judged.induced).all()


def test_the_repaired_model_is_the_same_on_the_device(data):
    made = repair.fit(PAIR.compressed, data, seed=1)
    host = repair.repaired_pair(as_black_box(PAIR), made)
    device = repair.repaired_pair(PAIR, made)
    assert device.on_device and not host.on_device
    _, there = device.probabilities(SEEDS)
    _, here = host.probabilities(SEEDS)
    np.testing.assert_allclose(there, here, atol=1e-5)
    vectors = PAIR.probabilities(SEEDS)[1]
    np.testing.assert_allclose(here, repair.probabilities(made.perceptron, vectors), atol=1e-6)
    logits = jax.jit(device.compressed.traced)(device.compressed.params, SEEDS)
    np.testing.assert_allclose(logits, there, atol=1e-5)


def test_models_that_end_in_probabilities_are_repaired_on_the_device(data):
    compressed = PAIR.compressed
    ends = difftest.jax_model(
        lambda params, x: jax.nn.softmax(compressed.apply(params, x)),
        compressed.params,
        outputs="probabilities",
    )
    made = repair.fit(ends, data)
    np.testing.assert_allclose(made.as_jax(ends)(SEEDS), made(SEEDS), atol=1e-5)
    np.testing.assert_allclose(made(SEEDS), made.as_jax(compressed)(SEEDS), atol=1e-5)


def test_the_repaired_pair_is_searched_again(data):
    pair = repair.repaired_pair(PAIR, repair.fit(PAIR.compressed, data))
    result = difftest.search(pair, SEEDS[:8], KEY, max_queries=200)
    original, compressed = pair.probabilities(result.triggers[result.success])
    assert (original.argmax(1) != compressed.argmax(1)).all()
    assert result.success.any()


def test_a_failing_model_is_told_through_the_repair(data):
    made = repair.fit(PAIR.compressed, data)
    broken = repair.RepairedModel(lambda x: np.full((len(x), 4), np.nan), made.perceptron)
    with pytest.raises(ModelError, match="the compressed model gave NaN"):
        ModelPair(PAIR.original, broken).probabilities(SEEDS[:2])
    wide = repair.RepairedModel(lambda x: np.full((len(x), 5), 0.2), made.perceptron)
    with pytest.raises(ModelError, match=r"vectors have shape \(2, 5\); accepted are \[B, 4\]"):
        ModelPair(PAIR.original, wide).probabilities(SEEDS[:2])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": np.zeros((0, 4), np.float32)}, r"seeds have shape \(0, 4\)"),
        ({"triggers": np.zeros((3, 4), np.float32)}, r"triggers have shape \(3, 4\)"),
        ({"triggers": np.full((30, 4), np.nan)}, "triggers hold NaN"),
        ({"seed_labels": np.full(30, 4)}, "seed_labels are .* from 0 to 3"),
        ({"trigger_labels": np.zeros(7, int)}, r"trigger_labels are \(7,\)"),
    ],
)
def test_bad_examples_are_told(change, words):
    with pytest.raises(ValueError, match=words):
        repair.train(_drawn()._replace(**change))


def test_bad_folds_are_told():
    with pytest.raises(ValueError, match="folds is 31; accepted are 2 to 30"):
        repair.cross_validate(_drawn(), folds=31)
    with pytest.raises(ValueError, match="seeds is empty"):
        repair.cross_validate(_drawn(), seeds=())
