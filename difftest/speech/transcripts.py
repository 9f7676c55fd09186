"""From probabilities of frames to words: greedy CTC decoding, and how transcripts differ.

Graves, Fernandez, Gomez, Schmidhuber, "Connectionist temporal classification", ICML 2006: of the
likeliest symbols of all frames, repeats merge and blanks go. Symbol 0 is the blank, symbol w + 1
the word w. Transcripts are int32 ``[..., T]`` with -1 from the last word on; so two transcripts of
one length are the same sentence where all their entries are.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

BLANK = 0


def greedy(probabilities: jax.Array) -> jax.Array:
    """The transcripts of frames: ``[..., T, K]`` -> int32 ``[..., T]``, -1 from the end on."""
    symbols = probabilities.argmax(axis=-1)
    before = jnp.roll(symbols, 1, axis=-1).at[..., 0].set(BLANK)
    spoken = (symbols != BLANK) & (symbols != before)
    # A stable sort brings what is spoken to the front, in order.
    order = jnp.argsort(~spoken, axis=-1, stable=True)
    words = jnp.where(spoken, symbols - 1, -1).astype(jnp.int32)
    return jnp.take_along_axis(words, order, axis=-1)


def disagree(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Whether transcripts ``[..., T]`` differ in a word or in their number: bool ``[...]``."""
    return (ours != theirs).any(axis=-1)


def words(transcript: Sequence[int]) -> list[int]:
    """The words of one transcript, without what fills it up."""
    return [int(word) for word in transcript if word >= 0]


def edits(said: Sequence[int], heard: Sequence[int]) -> int:
    """Fewest words replaced, left out or put in that turn one sentence into the other."""
    row = list(range(len(heard) + 1))
    for at, word in enumerate(said, 1):
        corner, row[0] = row[0], at
        for place, other in enumerate(heard, 1):
            corner, row[place] = (
                row[place],
                min(row[place] + 1, row[place - 1] + 1, corner + (word != other)),
            )
    return row[-1]


def word_error_rate(said: Sequence[Sequence[int]], heard: Sequence[Sequence[int]]) -> float:
    """Edits over words said, of transcripts that may be filled up with -1.

    Raises:
        ValueError: as many sentences must be heard as were said, with at least one word.
    """
    if len(said) != len(heard):
        raise ValueError(f"heard: expected {len(said)} sentences, got {len(heard)}")
    total = sum(len(words(one)) for one in said)
    if not total:
        raise ValueError("said: expected at least one word, got none")
    return sum(edits(words(a), words(b)) for a, b in zip(said, heard, strict=True)) / total


def heard(probabilities: jax.Array) -> jax.Array:
    """How surely each word is heard: the most over frames, ``[..., T, K]`` -> ``[..., K - 1]``.

    What a probability vector is to an image: it says of a sentence what the models make of it, of
    one size for sentences of all lengths, and does not move with when a word is said.
    """
    return probabilities[..., 1:].max(axis=-2)
