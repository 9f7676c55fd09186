"""Speech to text: audio, features, transcripts, mutations, the recogniser and the two searches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difftest.pair import ModelError
from difftest.speech import features, mutations, recogniser, recordings, training, transcripts
from difftest.speech.recordings import Recording

SIZE = 6400


def tone(word, seconds=0.2, speaker="anna", take=0):
    """A word of a synthetic language: a tone of its own."""
    at = np.arange(int(seconds * recordings.RATE)) / recordings.RATE
    sound = 8000 * np.sin(2 * np.pi * (400 + 300 * word) * at) * np.sin(np.pi * at / seconds)
    return Recording(word, speaker, take, sound.astype(np.int16))


TONES = [tone(word, 0.15 + 0.02 * take, take=take) for word in range(4) for take in range(3)]


@pytest.fixture(scope="module")
def said():
    return recordings.strung(np.random.default_rng(0), TONES, 6, SIZE, words=(2, 3))


# Recordings -----------------------------------------------------------------------------------


def test_recordings_are_read_and_strung(tmp_path):
    folder = tmp_path / "speech_digits" / "recordings"
    folder.mkdir(parents=True)
    for one in (tone(3), tone(1, speaker="ben"), tone(1, take=2)):
        recordings.save_wav(folder / f"{one.word}_{one.speaker}_{one.take}.wav", one.samples)
    found = recordings.load(tmp_path)
    assert [(r.word, r.speaker, r.take) for r in found] == [
        (1, "anna", 2), (1, "ben", 0), (3, "anna", 0)
    ]  # fmt: skip
    np.testing.assert_array_equal(found[2].samples, tone(3).samples)
    assert recordings.speakers(found) == ["anna", "ben"]
    (folder / "1_anna_3.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"1_anna_3.wav: not a recording"):
        recordings.load(tmp_path)
    (folder / "1_anna_3.wav").unlink()
    recordings.save_wav(folder / "1_anna_last.wav", tone(1).samples)
    with pytest.raises(ValueError, match=r"1_anna_last.wav: not a recording"):
        recordings.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="put the Free Spoken Digit Dataset"):
        recordings.load(tmp_path / "nothing")


def test_sentences_hold_their_words_and_zeros(said):
    for audio, length, words in zip(*said, strict=True):
        number = len(transcripts.words(words))
        assert 1 <= number <= 3 and (words[number:] == -1).all()
        assert audio[:length].any() and not audio[length:].any()
    # A buffer too small for a second word leaves it out.
    tight = recordings.strung(np.random.default_rng(0), TONES, 4, 3360, words=(3, 3))
    assert all(len(transcripts.words(row)) < 3 for row in tight.words)


def test_resampling_by_two_takes_every_other_sample():
    samples = np.arange(10, dtype=np.int16)
    np.testing.assert_array_equal(recordings.resampled(samples, 2.0), samples[::2])


# Transcripts ----------------------------------------------------------------------------------


def frames(symbols, count=5):
    return 0.9 * np.eye(count)[np.asarray(symbols)] + 0.1 / count


def test_greedy_decoding_by_hand():
    cases = {
        (0, 1, 1, 0, 2): [0, 1], (1, 1, 0, 1, 1): [0, 0], (0, 0, 0, 0, 0): [], (3, 2, 2, 4, 4):
        [2, 1, 3],
    }  # fmt: skip
    found = transcripts.greedy(jnp.asarray(np.stack([frames(symbols) for symbols in cases])))
    assert [transcripts.words(row) for row in np.asarray(found)] == list(cases.values())
    assert all((row[len(w) :] == -1).all() for row, w in zip(found, cases.values(), strict=True))


def test_transcripts_disagree_word_by_word():
    ours = jnp.array([[1, 2, -1], [1, 2, -1], [1, 2, -1], [-1, -1, -1]])
    theirs = jnp.array([[1, 2, -1], [1, 3, -1], [1, 2, 2], [-1, -1, -1]])
    assert transcripts.disagree(ours, theirs).tolist() == [False, True, True, False]


def test_word_error_rate_by_hand():
    said = [[1, 2, 3, -1], [4, 5, -1, -1], [6, -1, -1, -1]]
    heard = [[1, 3], [4, 6, 5, 5], [6]]
    assert [transcripts.edits(transcripts.words(a), b) for a, b in zip(said, heard, strict=True)]\
        == [1, 2, 0]  # fmt: skip
    assert transcripts.word_error_rate(said, heard) == pytest.approx(3 / 6)
    with pytest.raises(ValueError, match="expected 3 sentences, got 1"):
        transcripts.word_error_rate(said, heard[:1])
    with pytest.raises(ValueError, match="at least one word"):
        transcripts.word_error_rate([[-1]], [[2]])


def test_how_surely_a_word_is_heard():
    probabilities = jnp.asarray(frames([0, 2, 2, 1]))
    np.testing.assert_allclose(transcripts.heard(probabilities), [0.92, 0.92, 0.02, 0.02], 1e-6)


# Features -------------------------------------------------------------------------------------


def test_features_follow_their_formula(said):
    found = np.asarray(features.log_mel(said.audio / np.float32(32768), said.lengths))
    window = np.hanning(201)[:-1]
    for row, (audio, length) in enumerate(zip(said.audio, said.lengths, strict=True)):
        count = -(-int(length) // 80)
        sound = np.append(audio / 32768, np.zeros(200))
        power = [np.abs(np.fft.rfft(sound[80 * t : 80 * t + 200] * window, 256)) ** 2
                 for t in range(count)]  # fmt: skip
        bands = np.log(np.stack(power) @ features.filters() + 1e-6)
        wanted = (bands - bands.mean(0)) / np.sqrt(bands.var(0) + 1e-2)
        np.testing.assert_allclose(found[row, :count], wanted, atol=2e-2)
        assert not found[row, count:].any()


def test_features_forget_loudness_and_what_lies_past_the_end(said):
    sound = said.audio / np.float32(32768)
    plain = features.log_mel(sound, said.lengths)
    past = np.arange(SIZE) >= said.lengths[:, None]
    np.testing.assert_array_equal(features.log_mel(sound + past, said.lengths), plain)


# Mutations ------------------------------------------------------------------------------------


def naive_vocoder(sound, tempo, room):
    window = np.hanning(513)[:-1]
    count = -(-len(sound) // 128) + 2
    padded = np.concatenate([np.zeros(256), sound, np.zeros(128 * count + 512 - len(sound))])
    spectra = [np.fft.rfft(padded[128 * t : 128 * t + 512] * window) for t in range(count)]
    out, weight = np.zeros(room + 1024), np.zeros(room + 1024)
    phase = np.angle(spectra[0])
    for step in range(room // 128 + 1):
        at = step * tempo
        left = min(int(at), count - 2)
        one, two = spectra[left], spectra[left + 1]
        part = at - left
        size = (1 - part) * abs(one) + part * abs(two) if at <= count - 1 else 0 * abs(one)
        piece = np.fft.irfft(size * np.exp(1j * phase), 512)
        out[128 * step :][:512] += piece * window
        weight[128 * step :][:512] += window**2
        phase = phase + np.angle(two) - np.angle(one)
    return (out / np.maximum(weight, 1e-3))[256 : 256 + room]


def naive_resample(sound, ratio, size):
    out, cut = np.zeros(size), min(1, 1 / ratio)
    for i in range(size):
        first = int(np.floor(i * ratio))
        for place in range(first - 7, first + 9):
            if 0 <= place < len(sound):
                away = place - i * ratio
                fade = np.cos(np.pi * away / 16) ** 2
                out[i] += sound[place] * cut * np.sinc(cut * away) * fade
    return out


def quiet(said, row=0):
    return jnp.asarray(said.audio[row] / np.float32(32768)), jnp.int32(said.lengths[row])


@pytest.mark.parametrize("tempo", [0.8, 1.0, 1.25])
def test_time_stretch_is_a_phase_vocoder(said, tempo):
    sound, length = quiet(said)
    found, new = mutations.time_stretch(sound, length, tempo)
    assert int(new) == min(round(int(length) / tempo), SIZE)
    wanted = naive_vocoder(np.asarray(sound), tempo, 8064)[:SIZE]
    np.testing.assert_allclose(found[:new], wanted[:new], atol=2e-3)
    assert not found[new:].any()
    if tempo == 1:
        np.testing.assert_allclose(found, sound, atol=2e-3)


@pytest.mark.parametrize("semitones", [-4.0, 3.0])
def test_pitch_shift_keeps_the_length_and_moves_the_pitch(said, semitones):
    sound, length = quiet(said)
    ratio = 2 ** (semitones / 12)
    found, new = mutations.pitch_shift(sound, length, semitones)
    assert int(new) == int(length)
    wanted = naive_resample(naive_vocoder(np.asarray(sound), 1 / ratio, 8064), ratio, SIZE)
    np.testing.assert_allclose(found[:new], wanted[:new], atol=3e-3)
    long = np.zeros(SIZE, np.float32)
    long[:4800] = np.sin(2 * np.pi * 1000 * np.arange(4800) / 8000) / 2
    shifted = mutations.pitch_shift(jnp.asarray(long), jnp.int32(4800), semitones)[0]
    peak = np.abs(np.fft.rfft(np.asarray(shifted[800:4000]))).argmax() * 8000 / 3200
    assert peak == pytest.approx(1000 * ratio, abs=5)


def test_time_shift_rotates_and_gain_scales(said):
    sound, length = quiet(said)
    moved = mutations.time_shift(sound, length, 0.25)
    by = round(0.25 * int(length))
    np.testing.assert_array_equal(moved[:length], np.roll(np.asarray(sound)[: int(length)], by))
    assert not moved[length:].any()
    np.testing.assert_allclose(mutations.gain(sound, 20.0), 10 * np.asarray(sound), rtol=1e-6)


def test_mutants_are_16_bits_within_their_ranges(said):
    count = 16
    operators = np.arange(count, dtype=np.int32) % 4
    keys = jax.random.split(jax.random.key(3), count)
    audio, lengths = np.repeat(said.audio[:1], count, 0), np.repeat(said.lengths[:1], count)
    found, new = mutations.mutate_batch(operators, keys, audio, lengths)
    again = mutations.mutate_batch(operators, keys, audio, lengths)
    np.testing.assert_array_equal(found, again[0])
    assert found.dtype == jnp.int16 and new.dtype == jnp.int32
    assert (np.asarray(new)[operators > 0] == lengths[0]).all()
    lower, upper = lengths[0] / 1.25 - 1, min(lengths[0] / 0.8 + 1, SIZE)
    assert ((new >= lower) & (new <= upper)).all()
    assert all(not row[n:].any() for row, n in zip(np.asarray(found), new, strict=True))
    alone = jax.jit(mutations.mutate)(operators[1], keys[1], audio[1], lengths[1])
    np.testing.assert_allclose(alone[0].astype(int), found[1].astype(int), atol=1)
    loud = np.abs(np.asarray(found)[operators == 3].astype(int)).max(1) / np.abs(audio[0]).max()
    assert (loud >= 10**-0.6 - 0.01).all() and (loud <= 10**0.6 + 0.01).all()


# The recogniser -------------------------------------------------------------------------------

NETWORK = recogniser.Recogniser(symbols=5, width=16, dropout=0.0)
OPTIONS = training.Options(
    steps=250, batch_size=8, learning_rate=1e-2, size=SIZE, speed=1.05, noise=0.01
)


@pytest.fixture(scope="module")
def learned():
    return training.train(NETWORK, TONES, OPTIONS)


def test_a_recogniser_learns_the_tones(learned, said):
    hear = recogniser.model(lambda x: NETWORK.apply(learned, x))
    probabilities = hear(said.audio, said.lengths)
    assert probabilities.shape == (6, SIZE // 320, 5)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    past = np.arange(SIZE // 320) >= recogniser.outputs_of(said.lengths)[:, None]
    assert (np.asarray(probabilities)[past][:, 0] == 1).all()
    heard = np.asarray(transcripts.greedy(probabilities))
    assert transcripts.word_error_rate(said.words, heard) < 0.5


def test_the_loss_is_that_of_the_only_path():
    # One output, one word: the loss is its negative log-probability.
    logits = jnp.array([[[0.0, 1.0, 2.0]]])
    found = recogniser.loss(logits, jnp.array([300]), jnp.array([[1, -1]]))
    assert float(found) == pytest.approx(-float(jax.nn.log_softmax(logits)[0, 0, 2]), rel=1e-4)


def test_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, steps=4)
    whole = training.train(NETWORK, TONES, options)
    drawn = training.sentences_of

    def killed(options, recordings, step):
        if step == 3:
            raise KeyboardInterrupt
        return drawn(options, recordings, step)

    with monkeypatch.context() as patched:
        patched.setattr(training, "sentences_of", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train(NETWORK, TONES, options, folder=tmp_path, every=2)
    resumed = training.train(NETWORK, TONES, options, folder=tmp_path, every=2)
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    with pytest.raises(ValueError, match="another run, seed was 0"):
        training.train(NETWORK, TONES, dataclasses.replace(options, seed=1), folder=tmp_path)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="size: 100 is out of range"):
        training.Options(size=100)
    with pytest.raises(ValueError, match="recordings: expected at least one"):
        training.train(NETWORK, [], OPTIONS)


def test_a_loss_that_is_not_finite_ends_the_training(monkeypatch):
    monkeypatch.setattr(recogniser, "loss", lambda logits, *_: jnp.nan * logits.sum())
    options = dataclasses.replace(OPTIONS, steps=3, seed=5)
    with pytest.raises(FloatingPointError, match="training: the loss is nan at step 3"):
        training.train(NETWORK, TONES, options)


def test_a_pair_checks_what_models_give(said):
    def hear(audio, lengths):
        return np.full((len(audio), 3, 4), 0.25)

    good = recogniser.SpeechPair(hear, hear).probabilities(said.audio, said.lengths)
    assert good[0].shape == (6, 3, 4)
    for fault, text in (
        (lambda a, n: np.ones((len(a), 2, 4)), "the compressed model gave the shape"),
        (lambda a, n: np.full((len(a), 3, 4), np.nan), "the compressed model gave NaN"),
        (lambda a, n: 1 / 0, "the compressed model failed: division by zero"),
    ):
        with pytest.raises(ModelError, match=text):
            recogniser.SpeechPair(hear, fault).probabilities(said.audio, said.lengths)
