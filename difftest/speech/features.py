"""Log-mel features of audio in padded buffers, normalised over each sentence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from difftest.speech.recordings import RATE

WINDOW, HOP, FFT, BANDS = 200, 80, 256, 32
# Below the quietest speech: silence of zeros is no outlier among recordings with noise.
_FLOOR = 1e-6


@functools.cache
def filters(bands: int = BANDS, low: float = 60.0, high: float = 3800.0) -> np.ndarray:
    """Triangles equally wide on the mel scale, float32 ``[FFT / 2 + 1, bands]``."""
    mel = np.linspace(_mel(low), _mel(high), bands + 2)
    edges = 700 * (np.exp(mel / 1127) - 1)
    at = np.arange(FFT // 2 + 1)[:, None] * RATE / FFT
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _mel(hertz: float) -> float:
    return 1127 * float(np.log1p(hertz / 700))


def frames_of(lengths: jax.Array | np.ndarray | int) -> jax.Array | np.ndarray | int:
    """Frames that begin within so many samples."""
    return -(-lengths // HOP)


def log_mel(audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """Features, of mean 0 and deviation 1 in each band over a sentence's own frames.

    Args:
        audio: float ``[B, S]``, -1..1, S a multiple of ``HOP``.
        lengths: int32 ``[B]``, samples.

    Returns:
        float32 ``[B, S / HOP, BANDS]``, 0 in the frames from the length on.
    """
    batch, size = audio.shape
    count = size // HOP
    audio = jnp.where(jnp.arange(size)[None] < lengths[:, None], audio, 0)
    # 200 samples every 80 are rows of 80 beside the two that follow.
    blocks = jnp.pad(audio, ((0, 0), (0, 2 * HOP))).reshape(batch, count + 2, HOP)
    pieces = [blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]]
    windows = jnp.concatenate(pieces, axis=-1)[..., :WINDOW]
    windows = windows * np.hanning(WINDOW + 1)[None, None, :-1].astype(np.float32)
    power = jnp.square(jnp.abs(jnp.fft.rfft(windows, FFT)))
    bands = jnp.log(power @ filters() + _FLOOR)
    real = (jnp.arange(count)[None] < frames_of(lengths)[:, None])[..., None]  # type: ignore[index]
    number = jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    mean = jnp.where(real, bands, 0).sum(axis=1, keepdims=True) / number
    square = jnp.where(real, jnp.square(bands - mean), 0).sum(axis=1, keepdims=True) / number
    return jnp.where(real, (bands - mean) / jnp.sqrt(square + 1e-2), 0)
