"""The search when models fail, stores are full, a run ends early, or the input is bad."""

import os
import time

import jax
import numpy as np
import pytest

import difftest
from difftest import clock, device, diffchaser, keeping, lockstep
from difftest.backends.process import ProcessModel
from difftest.result import distance
from tests.pairs import KEY, as_black_box, assert_same_search, linear_pair, seeds

PAIR = linear_pair(apart=0.15)
SEEDS = seeds(24)


def test_a_failure_costs_only_its_own_seed():
    calls = []

    def breaks(images):
        calls.append(len(images))
        if len(calls) > 3 and (images.reshape(len(images), -1).max(1) == 255).any():
            raise RuntimeError("segment\nviolation")
        return PAIR.compressed(images)

    pair = difftest.ModelPair(PAIR.original, breaks)
    result = difftest.search(pair, SEEDS, KEY, variant="released", max_queries=200)
    failed = result.status == "error"
    assert failed.any() and result.success.any()
    errors = {result.errors[place] for place in np.flatnonzero(failed)}
    assert errors == {"the compressed model failed: segment violation"}
    assert all(result.errors[place] is None for place in np.flatnonzero(~failed))
    assert set(result.status) <= {"found", "disagrees", "error", "budget"}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_first_batch_may_fail_whole(batch_size):
    bad = SEEDS[:8].copy()
    bad[0, 0, 0] = 7

    def breaks(images):
        if (images[:, 0, 0] == 7).any():
            raise RuntimeError("seven")
        return PAIR.compressed(images)

    pair = difftest.ModelPair(PAIR.original, breaks)
    result = difftest.search(pair, bad, KEY, max_queries=3, batch_size=batch_size)
    assert result.errors[0] == "the compressed model failed: seven"
    assert result.status[0] == "error" and (result.status[1:] != "waiting").all()
    assert set(result.status[1:]) - {"error"}
    with pytest.raises(difftest.ModelError, match="seven"):
        difftest.search(pair, bad[:1], KEY)


def odd_child():
    """What a child process runs: it crashes or hangs on mutants of some kinds, not on seeds."""
    known = {image.tobytes() for image in SEEDS}

    def model(images):
        for image in images:
            if image.tobytes() not in known and image.sum() % 40 == 0:
                os._exit(3)
            if image.tobytes() not in known and image.sum() % 40 == 1:
                time.sleep(60)
        return PAIR.compressed(images)

    return model


def test_a_process_that_crashes_and_hangs_costs_only_those_seeds():
    with ProcessModel("tests.test_search_failures:odd_child", timeout=2.0) as model:
        pair = difftest.ModelPair(PAIR.original, model)
        result = difftest.search(pair, SEEDS[:12], KEY, max_queries=20)
    said = {error.split("the process ")[1].split(":")[0] for error in result.errors if error}
    assert said == {"ended with status 3", "hung"}
    assert result.success.any()
    assert set(result.status) <= {"found", "disagrees", "error", "budget"}
    for place, error in enumerate(result.errors):
        assert (error is not None) == (result.status[place] == "error")


@pytest.mark.parametrize("search", [device, lockstep])
def test_stores_that_are_full_grow(search, monkeypatch):
    pair = linear_pair(apart=0.15, classes=7)
    pair = pair if search is device else as_black_box(pair)
    # Few at a time, for each number of slots compiles with each size of store.
    options = {"variant": "paper", "max_queries": 90, "batch_size": 2}
    whole = difftest.search(pair, SEEDS[:8], KEY, **options)
    monkeypatch.setattr(search, "_CAPACITY", 8)
    assert_same_search(difftest.search(pair, SEEDS[:8], KEY, **options), whole)
    assert (whole.queries > 16).any()


def test_the_first_step_of_a_size_is_not_timed(monkeypatch):
    now = iter((0.0, 1.0, 5.0, 6.0, 8.0))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now))
    timed = clock.Clock()
    timed.start()
    assert timed.seconds(4) == 0
    timed.start()
    assert timed.seconds(4) == 4
    timed.start()
    assert timed.seconds(2) == 0


def test_a_step_that_broke_is_the_time_of_those_that_broke_it():
    failed = np.array([False, True, False, True])
    np.testing.assert_array_equal(clock.shares(3.0, failed), [0, 1.5, 0, 1.5])
    np.testing.assert_array_equal(clock.shares(3.0, failed & False), [0.75] * 4)


def test_nan_on_the_device_is_that_seeds_error():
    def apply(params, x):
        logits = x.reshape(len(x), -1) @ params
        return logits / (x.max(axis=(1, 2, 3)) < 0.999)[:, None]

    model = difftest.jax_model(apply, PAIR.original.params["kernel"])
    dark = (SEEDS * 0.9).astype(np.uint8)
    pair = difftest.ModelPair(model, model)
    result = difftest.search(pair, dark, KEY, max_queries=50)
    assert (result.status == "error").any()
    for place in np.flatnonzero(result.status == "error"):
        assert "NaN" in result.errors[place]


def test_a_search_that_was_ended_goes_on(tmp_path):
    path = tmp_path / "search.npz"
    options = {"variant": "released", "max_queries": 200, "batch_size": 4}
    whole = difftest.search(as_black_box(PAIR), SEEDS, KEY, **options)
    calls = []

    def ends(images):
        calls.append(len(images))
        if len(calls) > 40:
            raise KeyboardInterrupt
        return PAIR.original(images)

    with pytest.raises(KeyboardInterrupt):
        difftest.search(
            difftest.ModelPair(ends, as_black_box(PAIR).compressed),
            SEEDS,
            KEY,
            checkpoint=path,
            **options,
        )
    part = difftest.SearchResult.load(path)
    assert (part.status == "waiting").any() and (part.status == "found").any()
    asked = []

    def counted(images):
        asked.append(len(images))
        return PAIR.original(images)

    pair = difftest.ModelPair(counted, as_black_box(PAIR).compressed)
    resumed = difftest.search(pair, SEEDS, KEY, checkpoint=path, **options)
    assert_same_search(resumed, whole)
    assert sum(asked) < whole.queries.sum() + len(SEEDS)
    with pytest.raises(ValueError, match="of another search: its max_queries is 200, here it is 9"):
        difftest.search(pair, SEEDS, KEY, checkpoint=path, **{**options, "max_queries": 9})
    other = difftest.ModelPair(PAIR.original, as_black_box(linear_pair(0.3)).compressed)
    with pytest.raises(ValueError, match="is of another pair"):
        difftest.search(other, SEEDS, KEY, checkpoint=path, **options)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a saved search result"):
        difftest.search(pair, SEEDS, KEY, checkpoint=path, **options)


@pytest.mark.parametrize("kind", ["device", "host", "best", "diffchaser"])
def test_a_row_that_is_cut_short_waits(tmp_path, monkeypatch, kind):
    path, run = tmp_path / "search.npz", difftest.search
    options = {"max_queries": 60, "batch_size": 4}
    if kind == "diffchaser":
        run, options = diffchaser.diffchase, {"max_queries": 60, "pool_size": 20}
    elif kind == "best":
        options["variant"] = "best"
    pair = as_black_box(PAIR) if kind == "host" else PAIR
    whole = run(pair, SEEDS[:12], KEY, **options)
    calls = []

    def ends(images, others):
        calls.append(len(images))
        # The device reports many rows at once.
        if sum(calls) > (0 if kind == "device" else 3):
            raise KeyboardInterrupt
        return distance(images, others)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("difftest.result.distance", ends)
        run(pair, SEEDS[:12], KEY, checkpoint=path, **options)
    part = difftest.SearchResult.load(path)
    assert (part.status == "waiting").any()
    for place in np.flatnonzero(part.status != "waiting"):
        assert part.status[place] == whole.status[place]
        assert (part.triggers[place] == whole.triggers[place]).all()
        assert part.chains[place] == whole.chains[place]
        assert part.queries[place] == whole.queries[place]
    assert_same_search(run(pair, SEEDS[:12], KEY, checkpoint=path, **options), whole)


class Written:
    """Rows that note when they are written, by a clock that this takes a second of."""

    def __init__(self):
        self.now, self.at = 0.0, []

    def save(self, path):
        self.at.append(self.now)
        self.now += 1


def test_what_was_not_written_at_once_is_written_in_time(monkeypatch):
    rows = Written()
    monkeypatch.setattr(keeping.time, "perf_counter", lambda: rows.now)
    with keeping.Keeping("nowhere.npz", rows, lambda _: True) as keep:
        for finished in (True, True, False, False, False, False):
            keep(finished)
            rows.now += 9
    # The second row had to wait for 20 seconds to be over, and then for nothing else.
    assert rows.at == [0, 28, 56]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "fast"}, "variant is 'fast'; accepted are paper, released, best"),
        ({"variant": ["x"]}, r"variant is \['x'\]; accepted are paper, released, best"),
        ({"variant": None}, "variant is None; accepted are paper, released, best$"),
        ({"selection": "greedy"}, "selection is 'greedy'"),
        ({"selection": ["x"]}, r"selection is \['x'\]; accepted are .* or None"),
        ({"max_queries": 0}, "max_queries is 0"),
        ({"max_queries": True}, "max_queries is True; accepted are whole numbers from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": "long"}, "timeout is 'long'; accepted are seconds above 0"),
        ({"max_l2": -1}, "max_l2 is -1"),
        ({"max_l2": [[1, 2]] * 90}, "max_l2 is .*; accepted are distances above 0, or None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as told:
        difftest.search(PAIR, SEEDS, KEY, **options)
    assert "\n" not in str(told.value) and len(str(told.value)) < 150


@pytest.mark.parametrize("bad", [SEEDS[0], SEEDS / 255, [1, 2], SEEDS[:, :4]])
def test_bad_seeds(bad):
    with pytest.raises(ValueError, match="seeds are .*; accepted are uint8 images"):
        difftest.search(PAIR, bad, KEY)


def test_seeds_may_be_jax_arrays():
    options = {"variant": "best", "max_queries": 30}
    assert_same_search(
        difftest.search(PAIR, jax.numpy.asarray(SEEDS), KEY, **options),
        difftest.search(PAIR, SEEDS, KEY, **options),
    )


def test_keys_of_another_generator_are_refused():
    with pytest.raises(ValueError, match="key is of the generator rbg; accepted is threefry2x32"):
        difftest.search(PAIR, SEEDS, jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize(
    "key, words",
    [
        (0, "key is 0;"),
        (None, "key is None;"),
        (np.int64(3), r"key is int64 \(\);"),
        (np.zeros(4, np.uint32), r"key is uint32 \(4,\);"),
        (jax.random.split(KEY), r"key is key<fry> \(2,\);"),
    ],
)
@pytest.mark.parametrize("run", [difftest.search, diffchaser.diffchase])
def test_what_is_no_key_is_refused(run, key, words):
    with pytest.raises(ValueError, match=words + r" accepted is one key, such as jax.random.key"):
        run(PAIR, SEEDS, key)


def test_a_key_of_two_numbers_is_the_same_key():
    options = {"variant": "best", "max_queries": 30}
    assert_same_search(
        difftest.search(PAIR, SEEDS, np.asarray(jax.random.key_data(KEY)), **options),
        difftest.search(PAIR, SEEDS, KEY, **options),
    )


def test_wrong_input_shape_is_the_models_error():
    with pytest.raises(difftest.ModelError, match="the original model failed"):
        difftest.search(PAIR, np.zeros((3, 9, 9, 1), np.uint8), KEY)
