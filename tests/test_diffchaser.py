"""DiffChaser: its fitness, crossover and selection, how it counts queries, and how it ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difftest
from difftest import ModelPair, diffchaser
from difftest.diffchaser import crossover, diffchase, k_uncertainty, tournament
from difftest.result import distance
from tests.pairs import KEY, as_black_box, assert_same_search, linear_pair, seeds

PAIR = linear_pair(apart=0.15)
SEEDS = seeds(8)
SMALL = {"pool_size": 20, "max_queries": 200}


def test_k_uncertainty_by_hand():
    original = jnp.array([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]])
    compressed = jnp.array([[0.1, 0.6, 0.05, 0.25], [1.0, 0.0, 0.0, 0.0]])
    found = {k: k_uncertainty(original, compressed, k) for k in (2, 3, 4)}
    # First row: 0.5 - 0.3 against 0.6 - 0.25, 0.5 - 0.2 against 0.6 - 0.1, 0.5 against 0.55.
    np.testing.assert_allclose(found[2], [0.2, 0], atol=1e-6)
    np.testing.assert_allclose(found[3], [0.3, 0], atol=1e-6)
    np.testing.assert_allclose(found[4], [0.5, 0], atol=1e-6)


def test_a_tournament_is_won_by_the_lowest_score():
    scores = jnp.array([3.0, 1.0, 2.0, 0.0])
    # With many competitors everyone meets the best; with one nobody is preferred.
    assert (tournament(KEY, scores, 100, 50) == 3).all()
    fair = np.bincount(np.asarray(tournament(KEY, scores, 1, 4000)), minlength=4) / 4000
    np.testing.assert_allclose(fair, 0.25, atol=0.04)
    # Of two the j-th best of n wins with the chance (2 (n - j) + 1) / n^2.
    pairs = np.bincount(np.asarray(tournament(KEY, scores, 2, 4000)), minlength=4) / 4000
    np.testing.assert_allclose(pairs, [1 / 16, 5 / 16, 3 / 16, 7 / 16], atol=0.04)


def test_crossover_takes_positions_whole_from_either_parent():
    rng = np.random.default_rng(0)
    mothers, fathers = rng.integers(0, 256, (2, 50, 8, 8, 3)).astype(np.uint8)
    children = np.asarray(crossover(KEY, mothers, fathers))
    of_mother, of_father = (children == one for one in (mothers, fathers))
    assert (of_mother.all(-1) | of_father.all(-1)).all()
    assert 0.45 < of_mother.all(-1).mean() < 0.55
    assert (np.asarray(crossover(KEY, mothers, mothers)) == mothers).all()


class Scripted:
    """A pair that agrees but on the images whose number, in order of asking, is given.

    The number of the first image asked in a search is 0, that of the seed.
    """

    def __init__(self, triggers=()):
        self.triggers, self.asked, self.batches = triggers, 0, []

    def pair(self):
        return ModelPair(self.original, self.compressed)

    def original(self, images):
        return np.tile(np.float32([0.8, 0.2]), (len(images), 1))

    def compressed(self, images):
        numbers = self.asked + np.arange(len(images))
        self.asked += len(images)
        self.batches.append(len(images))
        out = self.original(images)
        out[np.isin(numbers, self.triggers)] = [0.2, 0.8]
        return out


@pytest.mark.parametrize(
    ("at", "batches"),
    [(1, [1, 20]), (20, [1, 20]), (21, [1, 20, 16]), (36, [1, 20, 16]), (60, [1, 20, 16, 16, 16])],
)
def test_queries_count_up_to_the_trigger(at, batches):
    # The seed is number 0, so the number of an image is that of its query.
    scripted = Scripted(triggers=(at, at + 1))
    result = diffchase(scripted.pair(), SEEDS[:1], KEY, pool_size=20)
    assert result.status.tolist() == ["found"]
    assert result.queries.tolist() == [at]
    assert scripted.batches == batches
    start = sum(batches[:-1])
    assert result.chains == [(("generation", len(batches) - 2, at - start),)]
    assert result.outputs_original.argmax() == 0 and result.outputs_compressed.argmax() == 1


@pytest.mark.parametrize("limit", [7, 20, 30, 36])
def test_no_more_than_max_queries_are_asked(limit):
    scripted = Scripted()
    result = diffchase(scripted.pair(), SEEDS[:1], KEY, pool_size=20, max_queries=limit)
    assert result.status.tolist() == ["budget"]
    assert result.queries.tolist() == [limit] and scripted.asked == 1 + limit
    assert (result.triggers == SEEDS[:1]).all() and result.chains == [()]


def test_time_ends_a_search_between_generations():
    scripted = Scripted()
    result = diffchase(scripted.pair(), SEEDS[:1], KEY, pool_size=20, timeout=1e-9)
    assert result.status.tolist() == ["budget"] and result.queries.tolist() == [20]
    assert result.seconds[0] > 0


def test_an_image_that_breaks_a_model_ends_its_seed_alone():
    broken = SEEDS[1]

    def fragile(images):
        if any((image == broken).all() for image in images):
            raise RuntimeError("too  dark\nfor me")
        return PAIR.original(images)

    pair = ModelPair(fragile, PAIR.compressed)
    result = diffchase(pair, SEEDS[:3], KEY, **SMALL)
    assert result.status[1] == "error"
    assert result.errors == [None, "the original model failed: too dark for me", None]
    assert result.seed_labels[1] == -1 and result.queries[1] == 0
    whole = diffchase(PAIR, SEEDS[:3], KEY, **SMALL)
    assert result.queries[[0, 2]].tolist() == whole.queries[[0, 2]].tolist()


@pytest.mark.parametrize("status", ["error", "found"])
def test_of_nan_and_trigger_the_first_counts(status):
    asked = []

    def original(images):
        asked.append(images)
        return np.tile(np.float32([0.9, 0.1]), (len(images), 1))

    diffchase(ModelPair(original, original), SEEDS[:1], KEY, pool_size=20, max_queries=20)
    pool = asked[-1]
    different = [row for row in range(20) if (pool == pool[row]).all((1, 2, 3)).sum() == 1]
    one, two = different[:2]
    trigger, nan = (two, one) if status == "error" else (one, two)

    def compressed(images):
        out = np.tile(np.float32([0.9, 0.1]), (len(images), 1))
        out[(images == pool[trigger]).all((1, 2, 3))] = [0.1, 0.9]
        out[(images == pool[nan]).all((1, 2, 3))] = np.nan
        return out

    result = diffchase(ModelPair(original, compressed), SEEDS[:1], KEY, pool_size=20)
    assert result.status.tolist() == [status]
    assert result.queries.tolist() == [one + 1]
    if status == "error":
        assert "NaN" in result.errors[0]


def test_triggers_trigger_and_are_repeated():
    result = diffchase(PAIR, SEEDS, KEY, **SMALL)
    assert result.success.sum() >= 4
    original, compressed = PAIR.probabilities(result.triggers)
    differ = original.argmax(1) != compressed.argmax(1)
    assert (differ == (result.success | (result.status == "disagrees"))).all()
    np.testing.assert_allclose(result.outputs_compressed, compressed, atol=1e-6)
    np.testing.assert_allclose(result.l2, distance(result.triggers, SEEDS))
    again = diffchase(PAIR, SEEDS, KEY, **SMALL)
    assert (again.triggers == result.triggers).all()
    assert again.queries.tolist() == result.queries.tolist()
    # What is found for a seed depends on no other.
    few = diffchase(PAIR, SEEDS[:3], KEY, **SMALL)
    assert (few.triggers == result.triggers[:3]).all()
    assert result.variant == "diffchaser"


def test_it_stays_within_its_limits(tmp_path):
    result = diffchase(PAIR, SEEDS, KEY, keep_label=True, max_l2=1.0, **SMALL)
    assert result.success.any()
    assert result.keeps_label[result.success].all()
    assert result.l2.max() <= 1
    result.save(tmp_path / "chase.npz")
    loaded = difftest.SearchResult.load(tmp_path / "chase.npz")
    assert loaded.chains == result.chains and loaded.settings == result.settings


@pytest.mark.parametrize("limits", [{}, {"keep_label": True, "max_l2": 1.0}])
def test_triggers_are_made_again_from_their_file(tmp_path, limits):
    pair = linear_pair(apart=0.05)
    options = {"pool_size": 10, "max_queries": 150}
    result = diffchase(pair, SEEDS, KEY, **options, **limits)
    assert max(chain[0][1] for chain in result.chains if chain) > 2
    result.save(tmp_path / "chase.npz")
    loaded = difftest.SearchResult.load(tmp_path / "chase.npz")
    made = difftest.replay(loaded, SEEDS, pair)
    assert (made == result.triggers).all() and made.dtype == np.uint8
    assert (difftest.confirm(pair, loaded) == result.success).all()


def test_a_replay_says_what_it_lacks():
    pair = linear_pair(apart=0.05)
    result = diffchase(pair, SEEDS[:4], KEY, pool_size=10, max_queries=150)
    with pytest.raises(ValueError, match="pair is None; accepted for a result of 'diffchaser'"):
        difftest.replay(result, SEEDS[:4])
    with pytest.raises(ValueError, match="seeds have shape .8, 8, 8, 1., the search's .4, 8"):
        difftest.replay(result, SEEDS, pair)

    def broken(images):
        raise RuntimeError("gone")

    with pytest.raises(difftest.ModelError, match="the original model failed: gone"):
        difftest.replay(result, SEEDS[:4], ModelPair(broken, pair.compressed))


def test_a_seed_that_already_disagrees_is_set_apart():
    scripted = Scripted(triggers=(0,))
    result = diffchase(scripted.pair(), SEEDS[:1], KEY, **SMALL)
    assert result.status.tolist() == ["disagrees"] and result.queries.tolist() == [0]
    assert scripted.asked == 1


def test_no_seeds_give_no_rows():
    assert len(diffchase(PAIR, SEEDS[:0], KEY).status) == 0


def interrupted(after):
    """The pair, whose original ends the run when so many seeds have been searched."""
    pools = []

    def original(images):
        # The first generation of a seed alone is as large.
        pools.extend([1] * (len(images) == SMALL["pool_size"]))
        if len(pools) > after:
            raise KeyboardInterrupt
        return PAIR.original(images)

    return ModelPair(original, as_black_box(PAIR).compressed)


def test_a_run_that_was_ended_goes_on_with_every_finished_seed(tmp_path):
    path = tmp_path / "chase.npz"
    whole = diffchase(PAIR, SEEDS, KEY, **SMALL)
    done = (whole.status == "disagrees").sum()
    for after in (2, 0, 3):
        with pytest.raises(KeyboardInterrupt):
            diffchase(interrupted(after), SEEDS, KEY, checkpoint=path, **SMALL)
        part = difftest.SearchResult.load(path)
        finished = part.status != "waiting"
        assert finished.sum() == done + after < len(SEEDS)
        done = finished.sum()
        assert (part.status[finished] == whole.status[finished]).all()
        assert (part.triggers[finished] == whole.triggers[finished]).all()
    resumed = diffchase(PAIR, SEEDS, KEY, checkpoint=path, **SMALL)
    assert_same_search(resumed, whole)
    assert (resumed.l2 == whole.l2).all() and (resumed.keeps_label == whole.keeps_label).all()
    assert (resumed.seconds[finished] == part.seconds[finished]).all()
    assert_same_search(difftest.SearchResult.load(path), whole)


def test_a_seed_is_kept_before_the_next_begins(tmp_path, monkeypatch):
    path, chase = tmp_path / "chase.npz", diffchaser._chase
    kept = []

    def look(pair, seeds, key, rows, place):
        kept.append(path.exists() and (difftest.SearchResult.load(path).status != "waiting").sum())
        assert kept[-1] == (rows.status != "waiting").sum() or not path.exists()
        chase(pair, seeds, key, rows, place)

    monkeypatch.setattr(diffchaser, "_chase", look)
    diffchase(PAIR, SEEDS, KEY, checkpoint=path, **SMALL)
    assert len(kept) >= 4 and kept[1:] == sorted(set(kept[1:]))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "chase.npz"
    diffchase(PAIR, SEEDS, KEY, checkpoint=path, **SMALL)
    for seeds_, key, options, words in (
        (SEEDS, KEY, {**SMALL, "max_queries": 9}, "its max_queries is 200, here it is 9"),
        (SEEDS, KEY, {**SMALL, "pool_size": 9}, "its pool_size is 20, here it is 9"),
        (SEEDS, jax.random.key(8), SMALL, "its key is"),
        (SEEDS[:3], KEY, SMALL, "its seeds is"),
    ):
        with pytest.raises(ValueError, match=f"of another search: {words}"):
            diffchase(PAIR, seeds_, key, checkpoint=path, **options)
    with pytest.raises(ValueError, match="its variant is diffchaser, here it is released"):
        difftest.search(PAIR, SEEDS, KEY, checkpoint=path)
    with pytest.raises(ValueError, match="is of another pair"):
        diffchase(ModelPair(PAIR.original, linear_pair(0.3).compressed), SEEDS, KEY,
                  checkpoint=path, **SMALL)  # fmt: skip


def test_no_seeds_clock_contains_compiling(monkeypatch):
    traced, grown, chase, mutants = [], [], diffchaser._chase, diffchaser._mutants

    def apply(params, x):
        traced.append(x.shape)
        return x.reshape(len(x), -1) @ params

    def noted(*given):
        traced.append("a pool")
        return mutants(*given)

    def timed(*given):
        before = len(traced)
        chase(*given)
        grown.append(len(traced) - before)

    monkeypatch.setattr(diffchaser, "_mutants", noted)
    monkeypatch.setattr(diffchaser, "_chase", timed)
    model = difftest.jax_model(apply, jnp.asarray(PAIR.original.params["kernel"]))
    # No other test has these sizes: 41, then 33 and 33, then 3.
    options = {"pool_size": 41, "max_queries": 110}
    result = diffchase(ModelPair(model, model), SEEDS[:2], KEY, **options)
    assert result.queries.tolist() == [110, 110]
    assert grown == [0, 0] and traced.count("a pool") == 2
    assert {shape[0] for shape in traced if shape != "a pool"} == {2, 64, 4}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool_size": 1}, "pool_size is 1; accepted are whole numbers from 2"),
        ({"k": 5}, "k is 5; accepted are 2 to 4"),
        ({"k": 1}, "k is 1; accepted are whole numbers from 2"),
        ({"crossover_ratio": 0}, "crossover_ratio is 0"),
        ({"tournament_size": 0}, "tournament_size is 0"),
        ({"table": "other"}, "table is 'other'; accepted are released, clean"),
        ({"table": ["x"]}, r"table is \['x'\]; accepted are released, clean"),
        ({"crossover_ratio": "x"}, "crossover_ratio is 'x'"),
        ({"max_queries": 0}, "max_queries is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"max_l2": 0}, "max_l2 is 0"),
    ],
)
def test_bad_options_are_told(options, words):
    with pytest.raises(ValueError, match=words):
        diffchase(PAIR, SEEDS, jax.random.key(0), **options)


def test_bad_seeds_are_told():
    with pytest.raises(ValueError, match="seeds are float32"):
        diffchase(PAIR, SEEDS.astype(np.float32), KEY)
