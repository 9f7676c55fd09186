"""A small recogniser of spoken words trained by connectionist temporal classification.

Graves, Fernandez, Gomez, Schmidhuber, ICML 2006. Two convolutions over time and frequency, which
forgive voices that are a little higher, and three over time alone; one output every 40 ms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from difftest.backends.pixels import one_line
from difftest.pair import ModelError
from difftest.speech import features
from difftest.speech.transcripts import BLANK

# Frames of features an output stands for.
STRIDE = 4


class Recogniser(nn.Module):
    """Features ``[B, T, BANDS, 1]`` float32 -> logits ``[B, T / 4, symbols]``.

    Attributes:
        symbols: words and the blank.
        width: channels of the layers over time.
        dropout: before each of these layers but the first.
    """

    symbols: int = 11
    width: int = 128
    dropout: float = 0.3

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits; batch statistics are used and kept if ``train``."""

        def layer(x: jax.Array, features: int, kernel: tuple[int, int], stride: int) -> jax.Array:
            x = nn.Conv(features, kernel, (stride, stride), use_bias=False)(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))

        x = layer(x, self.width // 8, (3, 3), 2)
        x = layer(x, self.width // 4, (3, 3), 2)
        x = x.reshape(*x.shape[:2], 1, -1)
        for kernel in (7, 5, 5):
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = layer(x, self.width, (kernel, 1), 1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Conv(self.symbols, (1, 1))(x)[:, :, 0]


def outputs_of(lengths: Any) -> Any:
    """How many outputs stand for so many samples."""
    return -(-features.frames_of(lengths) // STRIDE)


def inputs(audio: jax.Array, lengths: jax.Array) -> jax.Array:
    """What the network takes, float32 ``[B, T, BANDS, 1]``, of int16 audio ``[B, S]``."""
    return features.log_mel(audio.astype(jnp.float32) / 32768, lengths)[..., None]


def loss(logits: jax.Array, lengths: jax.Array, words: jax.Array) -> jax.Array:
    """The mean CTC loss a word.

    Args:
        logits: ``[B, T, K]``.
        lengths: int32 ``[B]``, samples.
        words: int32 ``[B, W]``, -1 from the last word on.
    """
    frames = jnp.arange(logits.shape[1])[None] >= outputs_of(lengths)[:, None]
    absent = (words < 0).astype(jnp.float32)
    each = optax.ctc_loss(
        logits, frames.astype(jnp.float32), jnp.maximum(words + 1, 0), absent, blank_id=BLANK
    )
    return each.sum() / jnp.maximum((1 - absent).sum(), 1)


class SpeechPair(NamedTuple):
    """A recogniser and its compressed twin: int16 ``[B, S]``, int32 ``[B]`` -> ``[B, T, K]``.

    Attributes:
        original: gives probabilities of symbols, the blank first, in each of T outputs.
        compressed: the same.
    """

    original: Callable[[Any, Any], Any]
    compressed: Callable[[Any, Any], Any]

    def probabilities(self, audio: Any, lengths: Any) -> tuple[np.ndarray, np.ndarray]:
        """Asks both: one query a sentence.

        Raises:
            ModelError: one raised, shapes differ, or a probability is not finite.
        """
        found = []
        for name, model in zip(self._fields, self, strict=True):
            try:
                found.append(np.asarray(model(audio, lengths), np.float32))
            except Exception as error:  # A black box may raise anything.
                raise ModelError(f"the {name} model failed: {one_line(error)}") from error
        for name, one in zip(self._fields, found, strict=True):
            if one.ndim != 3 or len(one) != len(audio) or one.shape != found[0].shape:
                raise ModelError(
                    f"the {name} model gave the shape {one.shape} for {len(audio)} sentences; "
                    "accepted is (sentences, outputs, symbols), the same of both models"
                )
            if not np.isfinite(one).all():
                raise ModelError(f"the {name} model gave NaN or infinity for a sentence")
        return found[0], found[1]


def model(run: Callable[[jax.Array], jax.Array]) -> Callable[[Any, Any], np.ndarray]:
    """A model of a function from features ``[B, T, BANDS, 1]`` to logits ``[B, T / 4, K]``.

    Outputs from the sentence's end on are blank for certain.
    """

    @jax.jit
    def probabilities(audio: jax.Array, lengths: jax.Array) -> jax.Array:
        found = jax.nn.softmax(run(inputs(audio, lengths)))
        past = jnp.arange(found.shape[1])[None] >= outputs_of(lengths)[:, None]
        return jnp.where(past[..., None], jax.nn.one_hot(BLANK, found.shape[2])[None, None], found)

    def padded(audio: Any, lengths: Any) -> np.ndarray:
        # Batches are filled to a power of two: a shrinking batch compiles few sizes, not each.
        rows = np.resize(np.arange(len(audio)), 1 << max(len(audio) - 1, 0).bit_length())
        return np.asarray(probabilities(np.asarray(audio)[rows], np.asarray(lengths)[rows]))[
            : len(audio)
        ]

    return padded
