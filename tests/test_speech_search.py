"""The searches of audio on a pair whose words are its loudness and length."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difftest.pair import ModelError
from difftest.speech import genetic, mutations, search, transcripts
from difftest.speech.recogniser import SpeechPair
from difftest.speech.replay import replay
from difftest.speech.result import SpeechResult

SIZE = 1600
KEY = jax.random.key(3)


def listener(limit):
    """Hears word 1 in loud sentences and word 0 in quiet ones, then how long they are."""

    @jax.jit
    def probabilities(audio, lengths):
        real = jnp.arange(SIZE)[None] < lengths[:, None]
        power = jnp.where(real, jnp.square(audio / 32768.0), 0).sum(1) / lengths
        loud = jax.nn.sigmoid(20 * (jnp.log10(power + 1e-9) - limit))
        word = jnp.stack([jnp.full_like(loud, 1e-3), 1 - loud, loud], 1)
        blank = jnp.tile(jnp.array([[1.0, 0, 0]]), (len(loud), 1))
        found = jnp.stack([word, blank], 1)
        return found / found.sum(2, keepdims=True)

    return probabilities


PAIR = SpeechPair(listener(-2.0), listener(-1.9))


@pytest.fixture(scope="module")
def seeds():
    rng = np.random.default_rng(0)
    lengths = rng.integers(800, SIZE, 5).astype(np.int32)
    loudness = np.array([300, 1500, 2400, 6000, 9000])[:, None]
    audio = (loudness * np.sin(np.arange(SIZE) * 0.3)[None]).astype(np.int16)
    return np.where(np.arange(SIZE)[None] < lengths[:, None], audio, 0).astype(np.int16), lengths


@pytest.fixture(scope="module")
def found(seeds):
    return search.search(PAIR, *seeds, KEY, max_queries=150)


def words_of(result):
    return [np.asarray(transcripts.greedy(model(result.audio, result.lengths))) for model in PAIR]


def test_triggers_trigger_and_replay(found, seeds):
    assert found.success.sum() >= 4
    ours, theirs = words_of(found)
    differ = np.asarray(transcripts.disagree(jnp.asarray(ours), jnp.asarray(theirs)))
    np.testing.assert_array_equal(differ, found.success)
    np.testing.assert_array_equal(found.heard[0], ours)
    for place in np.flatnonzero(found.success):
        chain = found.chains[place]
        assert chain[-1][1] + 1 == found.queries[place]
    audio, lengths = replay(found, *seeds)
    np.testing.assert_array_equal(audio, found.audio)
    np.testing.assert_array_equal(lengths, found.lengths)


def test_a_sentence_does_not_depend_on_its_company(found, seeds):
    again = search.search(PAIR, *seeds, KEY, max_queries=150, batch_size=2)
    np.testing.assert_array_equal(again.queries, found.queries)
    np.testing.assert_array_equal(again.audio, found.audio)


def test_the_walk_is_that_of_the_released_code(seeds):
    """One sentence, step by step, from the formulas."""
    audio, length = seeds[0][0], int(seeds[1][0])
    own = jax.random.fold_in(KEY, 0)
    tried, succeeded, last = np.zeros(4), np.zeros(4), -1
    answer = search.ask(PAIR, audio[None], np.array([length]))
    best, store = 0.0, [answer.vectors[0]]
    chain = []
    for query in range(12):
        from difftest import select

        state = select.SelectState(
            jnp.int32(last), jnp.asarray(tried, jnp.int32), jnp.asarray(succeeded, jnp.int32)
        )
        choice, mutation = jax.random.split(jax.random.fold_in(own, query))
        operator = int(select.draw(choice, state, "ranked"))
        mutants = mutations.mutate_batch(
            jnp.array([operator]), mutation[None], jnp.asarray(audio)[None], jnp.array([length])
        )
        answer = search.ask(PAIR, *mutants)
        tried[operator] += 1
        new = all(((answer.vectors[0] - old) ** 2).sum() > 0.5 for old in store)
        gain = abs(answer.confidence[0, 0] - answer.confidence[1, 0]) - best
        store += [answer.vectors[0]] if new else []
        differ = answer.words[0, 0].tolist() != answer.words[1, 0].tolist()
        if differ or abs(gain) > 1e-3 or new:
            succeeded[operator] += 1
            last = operator
            chain.append((mutations.NAMES[operator], query))
        if differ:
            break
        if abs(gain) > 1e-3 or new:
            best += gain
            audio, length = np.asarray(mutants[0][0]), int(mutants[1][0])
    one = search.search(PAIR, seeds[0][:1], seeds[1][:1], KEY, max_queries=12)
    assert one.queries[0] == query + 1
    if one.success[0]:
        assert list(one.chains[0]) == chain


def test_budgets_and_seeds_that_disagree(seeds):
    twins = SpeechPair(PAIR.original, PAIR.original)
    none = search.search(twins, *seeds, KEY, max_queries=3)
    assert (none.status == "budget").all() and (none.queries == 3).all()
    np.testing.assert_array_equal(none.audio, seeds[0])
    short = search.search(twins, *seeds, KEY, timeout=1e-9)
    assert (short.status == "budget").all() and (short.queries == 1).all()
    other = SpeechPair(listener(-9.0), listener(9.0))
    already = search.search(other, *seeds, KEY)
    assert (already.status == "disagrees").all() and not already.queries.any()
    nothing = search.search(PAIR, seeds[0][:0], seeds[1][:0], KEY)
    assert len(nothing.status) == 0


def test_the_genetic_search_counts_up_to_its_trigger(seeds):
    result = genetic.diffchase(PAIR, *seeds, KEY, pool_size=8, max_queries=60)
    assert result.success.sum() >= 3
    ours, theirs = words_of(result)
    differ = np.asarray(transcripts.disagree(jnp.asarray(ours), jnp.asarray(theirs)))
    np.testing.assert_array_equal(differ, result.success)
    assert (result.queries[result.success] >= 1).all() and (result.queries <= 60).all()
    twins = SpeechPair(PAIR.original, PAIR.original)
    none = genetic.diffchase(twins, *(one[:1] for one in seeds), KEY, pool_size=8, max_queries=20)
    assert none.queries[0] == 20 and none.status[0] == "budget"


def test_genetic_triggers_are_made_again_from_their_file(seeds, tmp_path):
    near = SpeechPair(PAIR.original, listener(-1.98))
    result = genetic.diffchase(near, *seeds, KEY, pool_size=4, max_queries=100)
    assert max(chain[0][1] for chain in result.chains if chain) > 2
    result.save(tmp_path / "found.npz")
    loaded = SpeechResult.load(tmp_path / "found.npz")
    audio, lengths = replay(loaded, *seeds, near)
    np.testing.assert_array_equal(audio, result.audio)
    np.testing.assert_array_equal(lengths, result.lengths)
    with pytest.raises(ValueError, match="pair is None; accepted for a result of 'diffchaser'"):
        replay(loaded, *seeds)
    with pytest.raises(ValueError, match="audio and lengths have shapes .2, 1600. and .2,., the"):
        replay(loaded, *(one[:2] for one in seeds), near)
    broken = near._replace(compressed=counted(PAIR.compressed, [], lambda one: True))
    with pytest.raises(ModelError, match="the compressed model failed: no luck"):
        replay(loaded, *seeds, broken)


def counted(model, sizes, fails=lambda audio: False):
    """A model that notes the sizes of its batches, and raises on some sentences."""

    def ask(audio, lengths):
        sizes.append(len(audio))
        if any(fails(one) for one in np.asarray(audio)):
            raise OSError("no\nluck")
        return model(audio, lengths)

    return ask


def test_a_failing_sentence_costs_only_itself(found, seeds):
    first = seeds[0][1]
    pair = SpeechPair(counted(PAIR.original, [], lambda one: (one == first).all()), PAIR.compressed)
    for batch_size in (1, 32):
        some = search.search(pair, *seeds, KEY, max_queries=150, batch_size=batch_size)
        assert some.status[1] == "error" and some.queries[1] == 0
        assert some.errors[1] == "the original model failed: no luck"
        others = np.arange(5) != 1
        np.testing.assert_array_equal(some.queries[others], found.queries[others])
        np.testing.assert_array_equal(some.audio[others], found.audio[others])
    # A mutant that fails ends its own search.
    place = int(np.flatnonzero(found.success)[0])
    trigger = found.audio[place]
    pair = SpeechPair(
        PAIR.original, counted(PAIR.compressed, [], lambda one: (one == trigger).all())
    )
    some = search.search(pair, *seeds, KEY, max_queries=150)
    assert some.status[place] == "error" and some.queries[place] == found.queries[place]
    assert (np.delete(some.status, place) == np.delete(found.status, place)).all()
    chased = genetic.diffchase(pair, *seeds, KEY, pool_size=8, max_queries=8)
    assert chased.errors == [None] * 5
    pair = SpeechPair(PAIR.original, counted(PAIR.compressed, [], lambda one: True))
    with pytest.raises(ModelError, match="the compressed model failed: no luck"):
        search.search(pair, *seeds, KEY)


def test_only_unfinished_sentences_are_asked(seeds):
    sizes = []
    pair = SpeechPair(counted(PAIR.original, sizes), PAIR.compressed)
    found = search.search(pair, *seeds, KEY, max_queries=150)
    waiting = found.queries[found.queries > 0]
    assert sizes[0] == 5
    assert sizes[1:] == [int((waiting > step).sum()) for step in range(waiting.max())]


def assert_same(one, other):
    assert one.status.tolist() == other.status.tolist()
    assert one.queries.tolist() == other.queries.tolist()
    assert one.chains == other.chains and one.errors == other.errors
    for name in ("audio", "lengths", "heard"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


RUNS = {
    "search": (search.search, {"max_queries": 150, "batch_size": 2}),
    "genetic": (genetic.diffchase, {"max_queries": 60, "pool_size": 8}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_search_that_was_ended_goes_on(seeds, tmp_path, name):
    run, options = RUNS[name]
    path, whole, calls = tmp_path / "found.npz", run(PAIR, *seeds, KEY, **options), []

    def counted_calls(audio, lengths):
        calls.append(len(audio))
        return PAIR.original(audio, lengths)

    counting = PAIR._replace(original=counted_calls)
    run(counting, *seeds, KEY, **options)
    number = len(calls)

    def ends(audio, lengths):
        if len(calls) == 2 * number // 3:
            raise KeyboardInterrupt
        return counted_calls(audio, lengths)

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(PAIR._replace(original=ends), *seeds, KEY, checkpoint=path, **options)
    part = SpeechResult.load(path)
    finished = part.status != "waiting"
    assert 1 <= finished.sum() < 5 and (part.status == "found").any()
    for array in ("status", "queries", "audio", "lengths"):
        np.testing.assert_array_equal(
            getattr(part, array)[finished], getattr(whole, array)[finished]
        )
    calls.clear()
    resumed = run(counting, *seeds, KEY, checkpoint=path, **options)
    assert len(calls) < number
    assert_same(resumed, whole)
    assert (resumed.seconds[finished] == part.seconds[finished]).all()
    assert_same(SpeechResult.load(path), whole)
    for given, others, words in (
        (seeds, {"max_queries": 9}, f"its max_queries is {options['max_queries']}, here it is 9"),
        ((seeds[0][:3], seeds[1][:3]), {}, "its sentences is"),
    ):
        with pytest.raises(ValueError, match=f"of another search: {words}"):
            run(PAIR, *given, KEY, checkpoint=path, **{**options, **others})
    with pytest.raises(ValueError, match="is of another pair"):
        other = PAIR._replace(compressed=listener(-2.2))
        run(other, *seeds, KEY, checkpoint=path, **options)


def test_a_sentence_that_is_cut_short_waits(seeds, tmp_path, monkeypatch):
    path, whole = tmp_path / "found.npz", search.search(PAIR, *seeds, KEY, max_queries=150)
    last = int(whole.queries.max())
    judged, calls = search._judged, []

    def ends(*given):
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return judged(*given)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(search, "_judged", ends)
        search.search(PAIR, *seeds, KEY, max_queries=150, checkpoint=path)
    part = SpeechResult.load(path)
    assert (part.status == "waiting").sum() == (whole.queries == last).sum()
    assert_same(search.search(PAIR, *seeds, KEY, max_queries=150, checkpoint=path), whole)


def test_files_of_earlier_versions_are_read(found, seeds, tmp_path):
    path = tmp_path / "found.npz"
    found.save(path)
    with np.load(path) as file:
        arrays = dict(file)
    words = json.loads(str(arrays.pop("words")))
    del words["variant"], words["settings"]
    np.savez(path, words=np.array(json.dumps(words)), **arrays)
    assert_same(SpeechResult.load(path), found)
    old = SpeechResult.load(path)
    with pytest.raises(ValueError, match="key is None, and the result names none"):
        replay(old, *seeds)
    np.testing.assert_array_equal(replay(old, *seeds, key=KEY)[0], found.audio)
    with pytest.raises(ValueError, match="its variant is , here it is released"):
        search.search(PAIR, found.audio, found.lengths, KEY, checkpoint=path)


def test_results_are_saved_whole(found, tmp_path):
    found.save(tmp_path / "found.npz")
    again = SpeechResult.load(tmp_path / "found.npz")
    assert again.chains == found.chains and again.errors == found.errors
    np.testing.assert_array_equal(again.audio, found.audio)
    assert (search.confirm(PAIR, again) == found.success).all()
    assert not search.confirm(SpeechPair(PAIR.original, PAIR.original), again).any()
    (tmp_path / "found.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="found.npz: not a saved search of audio"):
        SpeechResult.load(tmp_path / "found.npz")


def test_what_is_not_accepted_is_named(seeds):
    audio, lengths = seeds
    for given, options, text in (
        ((audio.astype(float), lengths), {}, "audio: expected int16"),
        ((audio, lengths[:2]), {}, "lengths: expected 5 whole numbers from 1 to 1600"),
        ((audio, lengths), {"max_queries": 0}, "max_queries is 0"),
        ((audio, lengths), {"timeout": 0}, "timeout is 0"),
        ((audio, lengths), {"selection": "best"}, "selection is 'best'"),
    ):
        with pytest.raises(ValueError, match=text):
            search.search(PAIR, *given, KEY, **options)
    with pytest.raises(ValueError, match="pool_size is 1; accepted is 2 or more"):
        genetic.diffchase(PAIR, audio, lengths, KEY, pool_size=1)
