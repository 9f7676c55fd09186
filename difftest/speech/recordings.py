"""Recordings of single spoken digits, and sentences strung together from them.

The layout is that of the Free Spoken Digit Dataset: ``recordings/<digit>_<speaker>_<take>.wav``,
mono, 16 bit, 8 kHz.
"""

import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nnslicer_jax.data.files import search_folders

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000
# Where the recordings are, below a data folder.
_FOLDERS = ("speech_digits/recordings", "recordings")


class Recording(NamedTuple):
    """One word.

    Attributes:
        word: index into ``WORDS``.
        speaker: a name.
        take: which of the speaker's recordings of the word.
        samples: int16 ``[n]``, 8 kHz.
    """

    word: int
    speaker: str
    take: int
    samples: np.ndarray


class Sentences(NamedTuple):
    """Audio in buffers of one size, with what is said.

    Attributes:
        audio: int16 ``[N, S]``, zeros from the length on.
        lengths: int32 ``[N]``, samples.
        words: int32 ``[N, W]``, indices into ``WORDS``, -1 from the last word on.
    """

    audio: np.ndarray
    lengths: np.ndarray
    words: np.ndarray


def load(data_dir: str | os.PathLike[str] | None = None) -> list[Recording]:
    """Reads all recordings, in the order of their file names.

    Args:
        data_dir: searched first; then $NNSLICER_DATA, then the user's cache.

    Raises:
        FileNotFoundError: no folder holds them.
        ValueError: a file is damaged, or of another kind of audio.
    """
    folders = search_folders(data_dir)
    for folder in folders:
        for below in _FOLDERS:
            if paths := sorted((folder / below).glob("*_*_*.wav")):
                return [_read(path) for path in paths]
    searched = ", ".join(str(folder) for folder in folders)
    raise FileNotFoundError(
        f"speech_digits: not found in {searched}; put the Free Spoken Digit Dataset's wav files "
        f"into {_FOLDERS[0]} of one of them"
    )


def _read(path: Path) -> Recording:
    try:
        digit, speaker, number = path.stem.split("_")
        take = int(number)
        with wave.open(str(path), "rb") as file:
            kind = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.int16)
        if int(digit) not in range(len(WORDS)):
            raise ValueError(f"the digit is {digit}")
    except (ValueError, EOFError, wave.Error) as error:
        raise ValueError(
            f"{path.name}: not a recording <digit>_<speaker>_<take>.wav ({error})"
        ) from None
    if kind != (1, 2, RATE) or not len(samples):
        raise ValueError(
            f"{path.name}: {kind[0]} channels of {8 * kind[1]} bits at {kind[2]} Hz with "
            f"{len(samples)} samples; accepted is mono, 16 bits, {RATE} Hz, not empty"
        )
    return Recording(int(digit), speaker, take, samples)


def speakers(recordings: Sequence[Recording]) -> list[str]:
    """Their names, sorted."""
    return sorted({recording.speaker for recording in recordings})


def strung(
    rng: np.random.Generator,
    recordings: Sequence[Recording],
    count: int,
    size: int,
    *,
    words: tuple[int, int] = (3, 5),
    speed: float = 1.0,
) -> Sentences:
    """Draws sentences of one speaker each, words apart by 20 to 200 ms of silence.

    Args:
        rng: what draws.
        recordings: to draw from.
        count: how many sentences.
        size: samples of the buffer; words that no longer fit are left out.
        words: fewest and most a sentence.
        speed: each sentence, and a little each word, is resampled, pitch and all, by a factor from
            1 / speed to speed; 1: not at all.
    """
    names = speakers(recordings)
    by_speaker = [[r for r in recordings if r.speaker == name] for name in names]
    audio, lengths = np.zeros((count, size), np.int16), np.zeros(count, np.int32)
    said = np.full((count, words[1]), -1, np.int32)
    for row in range(count):
        own = by_speaker[rng.integers(len(names))]
        factor = np.exp(rng.uniform(-1, 1) * np.log(speed))
        at = int(rng.integers(160, 1600))
        for place in range(rng.integers(words[0], words[1] + 1)):
            chosen = own[rng.integers(len(own))]
            varied = factor * np.exp(rng.uniform(-0.3, 0.3) * np.log(speed))
            samples = resampled(chosen.samples, varied)
            if at + len(samples) > size:
                break
            audio[row, at : at + len(samples)] = samples
            said[row, place] = chosen.word
            at += len(samples)
            lengths[row] = min(at + 160, size)
            at += int(rng.integers(160, 1600))
    return Sentences(audio, lengths, said)


def resampled(samples: np.ndarray, factor: float) -> np.ndarray:
    """Played ``factor`` times as fast, by linear interpolation: int16 ``[n / factor]``."""
    if factor == 1:
        return samples
    at = np.arange(int(len(samples) / factor)) * factor
    return np.round(np.interp(at, np.arange(len(samples)), samples)).astype(np.int16)


def save_wav(path: str | os.PathLike[str], samples: np.ndarray) -> None:
    """Writes int16 samples ``[n]`` as a mono 8 kHz file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.astype("<i2").tobytes())
