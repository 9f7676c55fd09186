"""DiffChaser's genetic search carried over to audio, the baseline of section 6.1.

Xie et al., "DiffChaser", IJCAI 2019; Tian et al., TOSEM 2023, section 6.1, who do not say how they
carried it over. A sentence's pool is mutated, spliced in pairs, and kept by k-uncertainty: here the
least lead, over both models and all outputs of a sentence, of the most likely symbol over the next
(k = 2). The pool's size is ours.
"""

import os
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difftest.keeping import Keeping
from difftest.pair import ModelError
from difftest.seeds import checked_key
from difftest.speech import mutations, transcripts
from difftest.speech.recogniser import SpeechPair
from difftest.speech.result import SpeechResult
from difftest.speech.search import ask, check, opening, same_answers, shape_of


def diffchase(
    pair: SpeechPair,
    audio: np.ndarray,
    lengths: np.ndarray,
    key: jax.Array,
    *,
    pool_size: int = 50,
    max_queries: int = 1_000,
    timeout: float = 180.0,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SpeechResult:
    """Searches, from each sentence, audio of which the two models hear different words.

    Args:
        pair: the models.
        audio: int16 ``[N, S]``, zeros from the lengths on.
        lengths: int32 ``[N]``, samples.
        key: sentence n draws with ``fold_in(key, n)``.
        pool_size: sentences of a generation, at least 2.
        max_queries: of one sentence; queries count up to the first trigger, in order.
        timeout: seconds of one sentence.
        checkpoint: a file; each sentence is kept there when it is finished, and a search that was
            ended begins with those.

    Returns:
        As ``search``. A chain holds one entry, the generation and the place of the trigger in it.

    Raises:
        ValueError: sentences or an option are not accepted, or the checkpoint is another search's.
        ModelError: the models fail on every sentence.
    """
    check(audio, lengths, max_queries, timeout, pool_size)
    if pool_size < 2:
        raise ValueError(f"pool_size is {pool_size}; accepted is 2 or more")
    key = checked_key(key)
    settings = {
        "pool_size": int(pool_size),
        "max_queries": int(max_queries),
        "timeout": float(timeout),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    rows, vectors = opening(pair, audio, lengths, pool_size, "diffchaser", settings)
    with Keeping(checkpoint, rows, partial(same_answers, pair)) as keep:
        for place in np.flatnonzero(rows.status == "waiting").tolist():
            _chase(pair, jax.random.fold_in(key, place), rows, place,
                   shape_of(rows, vectors), pool_size, max_queries, timeout)  # fmt: skip
            # A sentence takes longer than any file.
            keep.now()
    return rows


class _Pool(NamedTuple):
    """The sentences that parents are drawn from: int16 ``[P, S]``, int32 and float ``[P]``."""

    audio: jax.Array
    lengths: jax.Array
    margins: np.ndarray


def _begun(audio: np.ndarray, length: int, size: int) -> _Pool:
    return _Pool(
        jnp.repeat(jnp.asarray(audio)[None], size, axis=0),
        jnp.repeat(jnp.asarray(length, jnp.int32)[None], size),
        # Copies of the seed are no competitors.
        np.full(size, np.inf),
    )


def _best(pool: _Pool, children: tuple[jax.Array, jax.Array], margins: np.ndarray) -> _Pool:
    """As many of the pool and its children as were in the pool, by the least margins."""
    everyone = np.concatenate([pool.margins, margins])
    best = np.argsort(everyone, kind="stable")[: len(pool.margins)]
    audio, lengths = jax.tree.map(partial(_taken, jnp.asarray(best)), pool[:2], children)
    return _Pool(audio, lengths, everyone[best])


def again(
    pair: SpeechPair, result: SpeechResult, audio: np.ndarray, lengths: np.ndarray, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """The triggers of a result, made again by the generations that led to them.

    Args:
        pair: the models, asked about all generations but the last.
        result: of ``diffchase``.
        audio: int16 ``[N, S]``, the sentences of the search.
        lengths: int32 ``[N]``, theirs.
        key: the search's.

    Returns:
        int16 ``[N, S]`` and int32 ``[N]``: the triggers, the sentence itself where there is none.

    Raises:
        ModelError: a model fails on a generation.
    """
    audio, lengths = audio.copy(), np.asarray(lengths, np.int32).copy()
    for place in np.flatnonzero(result.success).tolist():
        own = jax.random.fold_in(key, place)
        ((_, last, which),) = result.chains[place]
        pool = _begun(audio[place], lengths[place], result.settings["pool_size"])
        for generation in range(last + 1):
            children = _children(jax.random.fold_in(own, generation), pool.audio, pool.lengths)
            if generation == last:
                break
            answer = ask(pair, *children)
            if broken := [error for error in answer.errors if error is not None]:
                raise ModelError(broken[0])
            pool = _best(pool, children, answer.margin)
        audio[place], lengths[place] = children[0][which], children[1][which]
    return audio, lengths


def _chase(
    pair: SpeechPair, key: jax.Array, rows: SpeechResult, place: int, shape: tuple[int, int],
    pool_size: int, max_queries: int, timeout: float,
) -> None:  # fmt: skip
    started = time.perf_counter()
    pool = _begun(rows.audio[place], rows.lengths[place], pool_size)
    generation = 0
    while rows.queries[place] < max_queries and time.perf_counter() - started < timeout:
        children = _children(jax.random.fold_in(key, generation), pool.audio, pool.lengths)
        answer = ask(pair, children[0], children[1], shape)
        failed = np.array([error is not None for error in answer.errors])
        over = transcripts.disagree(*answer.words) | failed
        left = max_queries - int(rows.queries[place])
        first = np.flatnonzero(over)[:1]
        if len(first) and first[0] < left:
            rows.queries[place] += int(first[0]) + 1
            rows.seconds[place] = time.perf_counter() - started
            if failed[first[0]]:
                rows.errors[place], rows.status[place] = answer.errors[first[0]], "error"
                return
            rows.audio[place] = np.asarray(children[0])[first[0]]
            rows.lengths[place] = int(children[1][first[0]])
            rows.heard[:, place] = answer.words[:, first[0]]
            rows.chains[place] = (("generation", generation, int(first[0])),)
            rows.status[place] = "found"
            return
        rows.queries[place] += min(pool_size, left)
        pool = _best(pool, children, answer.margin)
        generation += 1
    rows.seconds[place] = time.perf_counter() - started
    rows.status[place] = "budget"


@jax.jit
def _taken(which: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([old, new])[which]


@jax.jit
def _children(key: jax.Array, audio: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each sentence's end put onto another's beginning, and the whole mutated."""
    mates, cuts, operators, amounts = jax.random.split(key, 4)
    other = jax.random.randint(mates, lengths.shape, 0, len(lengths))
    shorter = jnp.minimum(lengths, lengths[other])
    cut = (jax.random.uniform(cuts, lengths.shape) * shorter).astype(jnp.int32)
    first = jnp.arange(audio.shape[1])[None] < cut[:, None]
    spliced = jnp.where(first, audio[other], audio)
    names = jax.random.randint(operators, lengths.shape, 0, len(mutations.NAMES))
    return mutations.mutate_batch(names, jax.random.split(amounts, len(lengths)), spliced, lengths)
