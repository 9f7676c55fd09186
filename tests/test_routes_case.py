"""What the studies of routes share: images drawn, routes and attacks made once, intervals."""

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from experiments import routes_case
from interpret import cdrp


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return routes_case.prepare("digits_cnn", None, tmp_path_factory.mktemp("routes"), 0)


def refused(*_args, **_options):
    raise AssertionError("this was made before")


def test_images_are_drawn_by_class(case):
    few, more = routes_case.drawn(case, 2), routes_case.drawn(case, 4)
    assert few.labels.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert few.images.dtype == np.float32 and 0 <= few.images.min() < few.images.max() <= 1
    rows = np.flatnonzero(np.arange(40) % 4 < 2)
    np.testing.assert_array_equal(few.images, more.images[rows])
    logits = np.asarray(case.trained.model.apply(case.params, more.images))
    np.testing.assert_array_equal(more.predicted, logits.argmax(1))
    np.testing.assert_allclose(more.probabilities.sum(1), 1, rtol=1e-5)
    everything = routes_case.drawn(case, None)
    assert len(everything.labels) == 360
    test = {image.tobytes() for image in everything.images}
    assert {image.tobytes() for image in few.images} <= test
    learned = routes_case.drawn(case, 2, split="train")
    assert not {image.tobytes() for image in learned.images} <= test


def test_images_that_the_network_gets_right_are_the_first_such(case):
    everything = routes_case.drawn(case, None)
    found = routes_case.drawn(case, 15, right=True)
    assert (found.predicted == found.labels).all() and not (
        everything.predicted == everything.labels
    ).all()
    for label in range(10):
        here = everything.labels == label
        kept = everything.images[here & (everything.predicted == label)][:15]
        np.testing.assert_array_equal(found.images[found.labels == label], kept)
    with pytest.raises(ValueError, match=r"per_class is 99, .* has only \d+ test images that the"):
        routes_case.drawn(case, 99, right=True)


def test_routes_are_made_once(case, monkeypatch):
    images = routes_case.drawn(case, 1).images
    direct = cdrp.route(case.graph, case.params, images)
    monkeypatch.setattr(routes_case, "_PART", 4)
    found = routes_case.routed(case, images)
    np.testing.assert_allclose(found.gates, direct.gates, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.predicted, direct.predicted)
    monkeypatch.setattr(cdrp, "route", refused)
    np.testing.assert_array_equal(routes_case.routed(case, images).gates, found.gates)
    # Other images, another network, other code: made anew.
    with pytest.raises(AssertionError, match="made before"):
        routes_case.routed(case, images[::-1])
    other = dataclasses.replace(
        case, trained=case.trained._replace(variables={"params": {"a": np.ones(1)}})
    )
    with pytest.raises(AssertionError, match="made before"):
        routes_case.routed(other, images)
    card = {**case.trained.card, "options": {"mean": 0.2}}
    for changed in (dataclasses.replace(case, trained=case.trained._replace(card=card)),):
        with pytest.raises(AssertionError, match="made before"):
            routes_case.routed(changed, images)
    monkeypatch.setattr(routes_case, "ROUTING", "changed")
    with pytest.raises(AssertionError, match="made before"):
        routes_case.routed(case, images)


def test_attacked_images_are_made_once(case, monkeypatch):
    some = routes_case.drawn(case, 1, right=True)
    found = routes_case.attacked(case, "DeepFool L2", some, {})
    assert (found.predicted != some.labels).mean() > 0.8
    np.testing.assert_array_equal(found.labels, some.labels)
    monkeypatch.setattr(routes_case, "_ATTACKS", {"DeepFool L2": refused})
    again = routes_case.attacked(case, "DeepFool L2", some, {})
    np.testing.assert_array_equal(again.images, found.images)
    with pytest.raises(AssertionError, match="made before"):
        routes_case.attacked(case, "DeepFool L2", some, {"steps": 3})


def test_fgsm_suits_the_images(case):
    assert case.fgsm == "FGSM 64"
    some = routes_case.drawn(case, 1, right=True)
    moved = routes_case.attacked(case, case.fgsm, some, {})
    assert np.abs(moved.images - some.images).max() == pytest.approx(0.25)


def test_parts_are_made_once(case):
    first = routes_case.part(case, "test", {"n": 1}, lambda: {"ours": 0.5})
    assert first == {"ours": 0.5} == routes_case.part(case, "test", {"n": 1}, refused)
    assert routes_case.part(case, "test", {"n": 2}, lambda: 3) == 3


def test_balanced_routes_are_made_with_balanced_gamma(case):
    # 48 gates: as published.
    few = routes_case.prepare("digits_cnn", None, case.folder, 0, "balanced")
    assert few.options == {"gamma": 0.05, "learning_rate": 0.1} and few.title.endswith("balanced")
    other = dataclasses.replace(few, options=cdrp.balanced(480))
    images = routes_case.drawn(case, 1).images
    found = routes_case.routed(other, images)
    assert found.options["gamma"] == 12 / 480
    direct = cdrp.route(case.graph, case.params, images, gamma=0.025, learning_rate=0.2)
    np.testing.assert_allclose(found.gates, direct.gates, rtol=1e-3, atol=1e-4)


def test_readings_are_checked(case):
    with pytest.raises(ValueError, match="reading must be one of published, convolutions, balanc"):
        routes_case.prepare("digits_cnn", None, case.folder, 0, "x")


def test_averages_have_normal_intervals():
    values = np.array([1.0, 0.0, np.nan, 1.0, 1.0])
    found = routes_case.average(values, 100, "%")
    assert found["ours"] == 75 and found["n"] == 4 and found["unit"] == "%"
    assert found["spread"] == pytest.approx(1.96 * 50 / 2)
    assert routes_case.average([2.0])["spread"] is None
    nothing = routes_case.average([np.nan])
    assert nothing["ours"] is None and nothing["note"]
    assert routes_case.noted(nothing, "b")["note"].endswith("; b")
    assert routes_case.noted({"ours": 1}, "b")["note"] == "b"
    table = np.array([[1.0, np.nan, 3.0], [np.nan] * 3])
    np.testing.assert_array_equal(routes_case.mean_known(table), [2, np.nan])


def test_shares_have_wilsons_intervals():
    found = routes_case.average(np.array([True] * 9 + [False]), 100, "%")
    # Wilson (1927), by hand: (p + z^2 / 2n +- z sqrt(p(1 - p)/n + z^2 / 4n^2)) / (1 + z^2 / n).
    z, n, share = 1.96, 10, 0.9
    middle, half = share + z**2 / 20, z * (share * 0.1 / n + z**2 / 400) ** 0.5
    expected = [100 * (middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1)]
    assert found["ours"] == pytest.approx(90) and found["spread"] == pytest.approx(
        expected, rel=1e-4
    )
    low, high = routes_case.average(np.ones(20, bool))["spread"]
    assert 0.8 < low < 0.9 and high == 1


def test_depth_is_rank_correlation_with_the_layer():
    values = {"a": np.array([1.0, 3, 0, 2]), "b": np.array([2.0, 1, np.nan, 2]),
              "c": np.array([3.0, 2, 1, 2])}  # fmt: skip
    np.testing.assert_allclose(routes_case.depth(values), [1, -0.5, np.nan, np.nan])


def test_intervals_are_over_classifiers_too():
    # Two classifiers, of which one tells all and the other nothing.
    found = np.stack([np.ones((30, 30)), np.full((30, 30), 0.5)])
    row = routes_case.resampled(0, found, paired=True)
    assert row["ours"] == 0.75 and row["spread"] == pytest.approx((0.5, 1)) and row["n"] == 30


def test_auc_is_that_of_the_library():
    rng = np.random.default_rng(0)
    normal, adversarial = rng.integers(0, 6, (3, 20)), rng.integers(2, 8, (3, 20))
    truth = np.repeat([0, 1], 20)
    expected = np.mean([
        roc_auc_score(truth, np.concatenate(pair))
        for pair in zip(normal, adversarial, strict=True)
    ])  # fmt: skip
    for paired in (True, False):
        found = routes_case.auc(0, normal, adversarial, paired=paired)
        low, high = found["spread"]
        assert found["ours"] == pytest.approx(expected) and found["n"] == 20
        assert low < expected < high
    apart = routes_case.auc(0, np.arange(4), np.arange(5) + 9, paired=False)
    assert apart["ours"] == 1 and apart["spread"] == (1, 1)
    assert routes_case.auc(0, np.zeros(0), np.arange(3), paired=False)["ours"] is None
