"""Making the triggers of a saved search of audio again, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

from difftest.seeds import IMPL
from difftest.speech import genetic, mutations
from difftest.speech.recogniser import SpeechPair
from difftest.speech.result import SpeechResult
from difftest.speech.search import mutation_key


def replay(
    result: SpeechResult,
    audio: np.ndarray,
    lengths: np.ndarray,
    pair: SpeechPair | None = None,
    *,
    key: jax.Array | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Follows each sentence's chain.

    Args:
        result: of ``search`` or ``genetic.diffchase``.
        audio: int16 ``[N, S]``, the sentences of the search.
        lengths: int32 ``[N]``, theirs.
        pair: the models, which the generations of the genetic search follow: their answers are
            asked for again, and are to be the same bit for bit.
        key: of the search; None: the result's own, which files of earlier versions lack.

    Returns:
        int16 ``[N, S]`` and int32 ``[N]``: the triggers, the sentence itself where there is none.

    Raises:
        ValueError: other sentences than the search's by number or shape, no key is known, or the
            pair is needed and not given.
        ModelError: a model fails on a generation.
    """
    if audio.shape != result.audio.shape or lengths.shape != result.lengths.shape:
        raise ValueError(
            f"audio and lengths have shapes {audio.shape} and {lengths.shape}, the search's "
            f"{result.audio.shape} and {result.lengths.shape}"
        )
    if key is None:
        if "key" not in result.settings:
            raise ValueError("key is None, and the result names none; accepted is the search's key")
        data = jnp.asarray(result.settings["key"], jnp.uint32)
        key = jax.random.wrap_key_data(data, impl=IMPL)
    if result.variant == "diffchaser":
        if pair is None:
            raise ValueError(
                "pair is None; accepted for a result of 'diffchaser' is its pair, whose answers "
                "its generations follow"
            )
        return genetic.again(pair, result, audio, lengths, key)
    audio, lengths = audio.copy(), np.asarray(lengths, np.int32).copy()
    for place, chain in enumerate(result.chains):
        own = jax.random.fold_in(key, place)
        sound, size = jnp.asarray(audio[place])[None], jnp.asarray(lengths[place])[None]
        for name, query in chain:
            operator = jnp.asarray([mutations.NAMES.index(name)], jnp.int32)
            mutation = mutation_key(own, query)[None]
            sound, size = mutations.mutate_batch(operator, mutation, sound, size)
        audio[place], lengths[place] = sound[0], size[0]
    return audio, lengths
