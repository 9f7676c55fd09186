"""Four mutations of audio as pure functions of fixed shapes: a padded buffer and a length.

Tian et al., TOSEM 2023, section 6.1, names TimeStretch, PitchShift, TimeShift and Gain of the
library Audiomentations; ranges are that library's defaults: tempo 0.8 to 1.25, pitch -4 to 4
semitones, a rotation by up to half of the sentence, -12 to 12 dB. Stretching is a phase vocoder
(Flanagan and Golden, 1966, as Laroche and Dolson, 1999, put it); a shift of pitch is a stretch
that is resampled back to the old length. A stretch changes the sentence's length, up to what the
buffer holds. All results are rounded to 16 bits, as a file would hold them.
"""

import jax
import jax.numpy as jnp
import numpy as np

NAMES = ("time_stretch", "pitch_shift", "time_shift", "gain")
TEMPO = (0.8, 1.25)
SEMITONES = (-4.0, 4.0)
SHIFT = (-0.5, 0.5)
DECIBELS = (-12.0, 12.0)

_FFT, _HOP = 512, 128
# Taps on each side of an output sample when resampling.
_TAPS = 8


def mutate(
    operator: jax.Array, key: jax.Array, audio: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One mutation of one sentence.

    Args:
        operator: int32 scalar, index into ``NAMES``.
        key: of the amount.
        audio: int16 ``[S]``, zeros from the length on.
        length: int32 scalar, samples.

    Returns:
        int16 ``[S]`` and int32 scalar, alike.
    """
    sound = audio.astype(jnp.float32) / 32768
    amount = jax.random.uniform(key)

    def between(low: float, high: float) -> jax.Array:
        return low + (high - low) * amount

    def gentle() -> tuple[jax.Array, jax.Array]:
        moved = time_shift(sound, length, between(*SHIFT))
        louder = gain(sound, between(*DECIBELS))
        return jnp.where(operator == 2, moved, louder), length

    def vocoded() -> tuple[jax.Array, jax.Array]:
        # One program serves both: a stretch, then resampling, at a ratio of 1 for a mere stretch.
        ratio = jnp.where(operator == 0, 1.0, 2 ** (between(*SEMITONES) / 12))
        tempo = jnp.where(operator == 0, between(*TEMPO), 1 / ratio)
        return stretched_and_resampled(sound, length, tempo, ratio)

    sound, length = jax.lax.cond(operator < 2, vocoded, gentle)
    return jnp.round(jnp.clip(sound * 32768, -32768, 32767)).astype(jnp.int16), length


@jax.jit
def mutate_batch(
    operators: jax.Array, keys: jax.Array, audio: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``mutate`` row by row: int32 ``[B]``, keys ``[B]``, int16 ``[B, S]``, int32 ``[B]``.

    Rows follow one another, so that each computes its own operator alone.
    """
    return jax.lax.map(lambda row: mutate(*row), (operators, keys, audio, lengths))


def gain(sound: jax.Array, decibels: jax.Array) -> jax.Array:
    """Louder or quieter: float32 ``[S]``."""
    return sound * 10 ** (decibels / 20)


def time_shift(sound: jax.Array, length: jax.Array, fraction: jax.Array) -> jax.Array:
    """The sentence rotated by a fraction of its length, float32 ``[S]``; its end comes first."""
    at = jnp.arange(sound.shape[0])
    by = jnp.round(fraction * length).astype(jnp.int32)
    return jnp.where(at < length, sound[(at - by) % jnp.maximum(length, 1)], 0)


def time_stretch(
    sound: jax.Array, length: jax.Array, tempo: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Slower or faster at the same pitch; see ``stretched_and_resampled``."""
    return stretched_and_resampled(sound, length, tempo, jnp.float32(1))


def pitch_shift(
    sound: jax.Array, length: jax.Array, semitones: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Higher or lower at the same length; see ``stretched_and_resampled``."""
    ratio = 2 ** (jnp.float32(semitones) / 12)
    return stretched_and_resampled(sound, length, 1 / ratio, ratio)


def stretched_and_resampled(
    sound: jax.Array, length: jax.Array, tempo: jax.Array, ratio: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A phase vocoder, then playback ``ratio`` times as fast.

    Args:
        sound: float32 ``[S]``.
        length: int32 scalar.
        tempo: how many times as fast the vocoder goes through the sound, at least 1 / 1.26.
        ratio: of playback.

    Returns:
        float32 ``[S]``, zeros from the new length on, and that length: length / (tempo * ratio),
        at most S.
    """
    size = sound.shape[0]
    # An octave's third more: what the highest shift of pitch needs before it is resampled.
    room = int(np.ceil(1.26 * size / _HOP)) * _HOP
    long = vocoder(sound, tempo, room)
    out = jnp.where(ratio == 1, long[:size], resample(long, ratio, size))
    new = jnp.minimum(jnp.round(length / (tempo * ratio)), size).astype(jnp.int32)
    return jnp.where(jnp.arange(size) < new, out, 0), new


def vocoder(sound: jax.Array, tempo: jax.Array, room: int) -> jax.Array:
    """Goes through a sound ``tempo`` times as fast at the same pitch.

    Magnitudes are interpolated between the two frames around each new one; phases advance by as
    much as between those two.

    Args:
        sound: float32 ``[S]``.
        tempo: scalar.
        room: samples of the result, a multiple of the hop of 128.

    Returns:
        float32 ``[room]``.
    """
    window = jnp.asarray(np.hanning(_FFT + 1)[:-1], jnp.float32)
    count = -(-sound.shape[0] // _HOP) + 2
    padded = jnp.pad(sound, (_FFT // 2, count * _HOP + _FFT - sound.shape[0]))
    places = np.arange(count)[:, None] * _HOP + np.arange(_FFT)
    spectra = jnp.fft.rfft(padded[places] * window[None])
    steps = jnp.arange(room // _HOP + 1) * tempo
    before = jnp.clip(steps.astype(jnp.int32), 0, count - 2)
    part = (steps - before)[:, None]
    left, right = spectra[before], spectra[before + 1]
    size = (1 - part) * jnp.abs(left) + part * jnp.abs(right)
    size = jnp.where((steps <= count - 1)[:, None], size, 0)
    # The expected advance of a bin in one hop cancels: turns are whole where it is added back.
    advance = jnp.angle(right) - jnp.angle(left)
    phase = jnp.angle(spectra[:1]) + jnp.cumsum(advance, axis=0) - advance
    pieces = jnp.fft.irfft(jax.lax.complex(size * jnp.cos(phase), size * jnp.sin(phase)), _FFT)
    return _overlapped(pieces.astype(jnp.float32) * window[None], window, room)


def _overlapped(pieces: jax.Array, window: jax.Array, room: int) -> jax.Array:
    """Frames ``[n, 512]``, 128 apart, added up and freed of the windows' own sum."""
    parts = _FFT // _HOP

    def added(frames: jax.Array) -> jax.Array:
        blocks = frames.reshape(len(frames), parts, _HOP)
        shifted = [jnp.pad(blocks[:, i], ((i, parts - 1 - i), (0, 0))) for i in range(parts)]
        return sum(shifted[1:], shifted[0]).reshape(-1)

    weight = added(jnp.broadcast_to(jnp.square(window)[None], pieces.shape))
    whole = added(pieces) / jnp.maximum(weight, 1e-3)
    return whole[_FFT // 2 : _FFT // 2 + room]


def resample(sound: jax.Array, ratio: jax.Array, size: int) -> jax.Array:
    """Plays a sound ``ratio`` times as fast, by windowed sinc of 16 taps: float32 ``[size]``.

    Frequencies that the result cannot hold are cut off.
    """
    at = jnp.arange(size) * ratio
    first = jnp.floor(at).astype(jnp.int32)
    offsets = jnp.arange(1 - _TAPS, _TAPS + 1)
    away = offsets[None] - (at - first)[:, None]
    cut = jnp.minimum(1.0, 1 / ratio)
    taps = cut * jnp.sinc(cut * away) * jnp.square(jnp.cos(jnp.pi * away / (2 * _TAPS)))
    places = first[:, None] + offsets[None]
    inside = (places >= 0) & (places < len(sound))
    values = jnp.where(inside, sound[jnp.clip(places, 0, len(sound) - 1)], 0)
    return (values * taps).sum(axis=1)
