"""The study of speech to text, at its smallest."""

import shutil

import jax
import numpy as np
import pytest

from difftest.speech import transcripts
from difftest.speech.recordings import RATE, Recording
from experiments import record
from experiments import speech_to_text as study

TINY = study.SCHEDULES["tiny"]
ABOUT = {"command": "x", "data": "x", "seeds": (0,), "commit": "unknown", "hardware": "x"}


def tone(word, speaker):
    at = np.arange(int(0.15 * RATE)) / RATE
    sound = 8000 * np.sin(2 * np.pi * (300 + 250 * word) * at)
    return Recording(word, speaker, 0, sound.astype(np.int16))


SPOKEN = [tone(word, speaker) for word in range(4) for speaker in ("anna", "ben", "cleo")]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return study.prepare(SPOKEN, [], TINY, tmp_path_factory.mktemp("speech"))


def test_the_last_speaker_is_held_out_and_others_are_named(case, tmp_path):
    assert case.held_out == ["cleo"] and len(case.seeds) == 1
    with pytest.raises(ValueError, match="held_out: 'dora' is unknown; known are anna, ben, cleo"):
        study.prepare(SPOKEN, ["dora"], TINY, tmp_path)
    with pytest.raises(ValueError, match="recordings: expected at least one, got none"):
        study.prepare(SPOKEN, ["anna", "ben", "cleo"], TINY, tmp_path)


def test_the_twin_of_eight_bits_is_near(case):
    original, compressed = case.pair.probabilities(case.heard.audio, case.heard.lengths)
    assert original.shape == (6, 20, 11)
    assert 0 < np.abs(original - compressed).max() < 0.2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("searches")


def test_a_finished_search_is_read_again_and_confirmed(case, folder, monkeypatch):
    assert study.SCHEDULES["cpu"].seeds == (50, 50, 1)
    found = study.searches(case, TINY, folder)
    names = sorted(path.name for path in folder.glob("*.npz"))
    assert names == ["dflare_0.npz", "diffchaser_0.npz"]
    with monkeypatch.context() as patched:
        for module, name in ((study.search, "search"), (study.genetic, "diffchase")):
            patched.setattr(module, name, lambda *_, **__: pytest.fail("searched again"))
        again = study.searches(case, TINY, folder)
    np.testing.assert_array_equal(again["DFlare"][0].audio, found["DFlare"][0].audio)
    other = case._replace(weights="other")
    with pytest.raises(ValueError, match="another run, weights was"):
        study.searches(other, TINY, folder)
    # A trigger that is none: the seed itself.
    fake = found["DFlare"][0]
    fake.status[:] = "found"
    fake.audio[:], fake.lengths[:] = case.seeds[0].audio, case.seeds[0].lengths
    same = case.pair._replace(compressed=case.pair.original)
    with pytest.raises(ValueError, match="3 of 3 triggers are not confirmed"):
        study._confirm(same, case.seeds[0], jax.random.key(0), fake, folder / "x.npz")


def test_a_search_that_was_ended_goes_on(case, folder, tmp_path):
    found = study.searches(case, TINY, folder)
    shutil.copytree(folder, tmp_path / "again")
    for name in ("DFlare", "DiffChaser"):
        path = tmp_path / "again" / f"{name.lower()}_0.npz"
        part = study.SpeechResult.load(path)
        part.status[0] = "waiting"
        part.save(path)
    again = study.searches(case, TINY, tmp_path / "again")
    for name, (whole,) in found.items():
        assert again[name][0].status.tolist() == whole.status.tolist()
        assert again[name][0].queries.tolist() == whole.queries.tolist()
        np.testing.assert_array_equal(again[name][0].audio, whole.audio)
        assert (again[name][0].seconds[1:] == whole.seconds[1:]).all()


def test_rows_are_of_what_was_found(case, folder):
    found = study.searches(case, TINY, folder)
    rates = study.error_rates(case)
    heard = np.asarray(transcripts.greedy(case.pair.original(case.heard.audio,
                                                             case.heard.lengths)))  # fmt: skip
    assert rates[0] == pytest.approx(100 * transcripts.word_error_rate(case.heard.words, heard))
    made = [record.Row(study="speech_to_text", **{**ABOUT, **row})
            for row in study.rows(case, rates, found)]  # fmt: skip
    values = {(row.row, row.metric): row.ours for row in made}
    assert values["recogniser", "word error rate"] == pytest.approx(rates[0], abs=0.01)
    for name in ("DFlare", "DiffChaser"):
        result = found[name][0]
        searched = (result.status != "disagrees").sum()
        share = 100 * result.success.sum() / max(1, searched)
        assert values[name, "success rate"] == pytest.approx(share, abs=0.01)
        if result.success.any():
            counts = {row.n for row in made if row.row == name and "queries" in row.metric}
            assert counts == {result.success.sum()}
            assert values[name, "mean queries"] == result.queries[result.success].mean()
