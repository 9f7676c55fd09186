"""The search: against the paper's algorithm step by step, on the device and on the host."""

import json

import jax
import numpy as np
import pytest

import difftest
from difftest import walk
from difftest.result import distance
from tests.naive import dflare
from tests.pairs import KEY, as_black_box, assert_same_search, linear_pair, seeds

PAIR = linear_pair(apart=0.15)
SEEDS = seeds(24)


@pytest.mark.parametrize(
    "variant, options",
    [
        ("paper", {}),
        ("released", {}),
        ("paper", {"novelty": False}),
        ("released", {"selection": "uniform"}),
        ("released", {"novelty": False}),
    ],
)
def test_the_walk_is_algorithm_1(variant, options):
    result = difftest.search(PAIR, SEEDS, KEY, variant=variant, max_queries=60, **options)
    searched = np.flatnonzero(result.searched)
    assert len(searched) > 10
    for place in searched[:8]:
        key = jax.random.fold_in(KEY, place)
        queries, trigger = dflare.search(PAIR, SEEDS[place], key, variant, 60, **options)
        assert result.success[place] == (trigger is not None)
        assert result.queries[place] == queries
        if trigger is not None:
            assert (result.triggers[place] == trigger).all()


@pytest.mark.parametrize(
    "variant, limits",
    [
        ("paper", {"keep_label": True, "max_l2": 1.5}),
        ("released", {}),
        ("best", {}),
        ("best", {"keep_label": True, "max_l2": 1.5}),
    ],
)
def test_host_and_device_find_the_same(variant, limits):
    options = {"variant": variant, "max_queries": 40, **limits}
    device = difftest.search(PAIR, SEEDS, KEY, batch_size=5, **options)
    host = difftest.search(as_black_box(PAIR), SEEDS, KEY, batch_size=7, **options)
    assert_same_search(device, host)
    assert device.success.sum() > 3
    if limits:
        assert device.keeps_label[device.success].all()
        assert device.l2.max() <= 1.5
        moved = distance(device.triggers, SEEDS)
        np.testing.assert_allclose(device.l2[device.success], moved[device.success])


@pytest.mark.parametrize("variant", ["paper", "released", "best"])
def test_triggers_are_triggers_and_replay(variant, tmp_path):
    result = difftest.search(PAIR, SEEDS, KEY, variant=variant, max_queries=500)
    assert result.success[result.searched].mean() > 0.9
    assert (difftest.confirm(PAIR, result) == result.success).all()
    result.save(tmp_path / "result.npz")
    loaded = difftest.SearchResult.load(tmp_path / "result.npz")
    assert_same_search(loaded, result)
    assert loaded.settings == json.loads(json.dumps(result.settings))
    assert (difftest.replay(loaded, SEEDS) == result.triggers).all()


def test_a_distance_budget_replays_too():
    result = difftest.search(PAIR, SEEDS, KEY, variant="paper", max_l2=0.8, max_queries=100)
    assert result.success.sum() > 3
    assert (difftest.replay(result, SEEDS) == result.triggers).all()


def test_a_distance_budget_holds_on_large_images():
    rng = np.random.default_rng(0)
    for seed, image in (
        (np.full((224, 224, 3), 240, np.uint8), np.full((224, 224, 3), 40, np.uint8)),
        tuple(rng.integers(0, 256, (2, 300, 300, 3)).astype(np.uint8)),
    ):
        moved = np.asarray(walk.within(4.0, seed, image))
        assert 1 < distance(moved[None], seed[None])[0] <= 4.0


def test_the_label_is_asked_again_where_it_is_kept():
    result = difftest.search(PAIR, SEEDS, KEY, variant="best", keep_label=True, max_queries=50)
    assert (difftest.confirm(PAIR, result) == result.success).all()
    result.seed_labels[:] = (result.seed_labels + 1) % 4
    assert not difftest.confirm(PAIR, result).any()


def test_seeds_that_already_disagree_are_reported_apart():
    result = difftest.search(linear_pair(apart=0.8), SEEDS, KEY, max_queries=5)
    original, compressed = linear_pair(apart=0.8).probabilities(SEEDS)
    disagree = original.argmax(1) != compressed.argmax(1)
    assert disagree.any()
    assert ((result.status == "disagrees") == disagree).all()
    assert (result.queries[disagree] == 0).all()
    assert not result.success[disagree].any() and not result.searched[disagree].any()


def test_best_needs_fewer_queries():
    best, released = (
        difftest.search(PAIR, SEEDS, KEY, variant=variant, max_queries=2000)
        for variant in ("best", "released")
    )
    both = best.success & released.success
    assert best.success[best.searched].all()
    assert np.median(best.queries[both]) < np.median(released.queries[both])


def test_best_without_another_class_walks():
    original, compressed = PAIR.probabilities(SEEDS)
    label = original.argmax(1)
    same = (label == np.bincount(label).argmax()) & (compressed.argmax(1) == label)
    result = difftest.search(PAIR, SEEDS[same], KEY, variant="best", max_queries=500)
    assert result.success.any()
    assert all(chain[0][0] != "line" for chain in result.chains if chain)
    assert (difftest.replay(result, SEEDS[same]) == result.triggers).all()


def test_equal_models_spend_their_budget():
    pair = difftest.ModelPair(PAIR.original, PAIR.original)
    for each in (pair, as_black_box(pair)):
        for variant in ("paper", "best"):
            result = difftest.search(each, SEEDS[:6], KEY, variant=variant, max_queries=30)
            assert (result.status == "budget").all()
            assert (result.queries == 30).all()
            assert (result.triggers == SEEDS[:6]).all()


def test_time_is_limited_too():
    pair = difftest.ModelPair(PAIR.original, PAIR.original)
    for each in (pair, as_black_box(pair)):
        result = difftest.search(each, SEEDS[:6], KEY, max_queries=10**9, timeout=0.05)
        assert (result.status == "budget").all()
        assert (result.seconds >= 0.05).all()


def test_no_seeds_at_all():
    result = difftest.search(PAIR, SEEDS[:0], KEY)
    assert len(result.status) == 0 and result.triggers.shape == (0, 8, 8, 1)
