"""The study of speech to text, at its smallest."""

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


def test_rows_are_of_what_was_found(case):
    found = study.searches(case, TINY)
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
            assert values[name, "mean queries"] == result.queries[result.success].mean()
