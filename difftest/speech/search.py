"""DFlare's search on audio: mutants of a sentence until two recognisers hear different words.

Tian et al., TOSEM 2023, section 6.1, says that transcripts are compared word by word and which
mutations are used; the rest is carried over from images here. D is how far the models' confidences
are apart, each the sum of the largest probabilities over a sentence's outputs: what the top-1
probability is to an image. Novelty looks at how surely each word is heard. The rules are those of
the released code: D may also fall, it starts at 0, and operators are drawn by rank.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difftest import fitness, select
from difftest.speech import mutations, transcripts
from difftest.speech.recogniser import SpeechPair

_CAPACITY = 64


@dataclass(frozen=True, eq=False)
class SpeechResult:
    """One row a sentence.

    Attributes:
        status: ``[N]`` strings: "found"; "disagrees", the models already disagreed, which enters no
            average; "budget", queries or time were spent.
        queries: int32 ``[N]``, sentences through both models; the trigger counts, the seed does
            not.
        seconds: float64 ``[N]``, the share of the time of the batches it was in.
        audio: int16 ``[N, S]``, the trigger, or the seed where none was found.
        lengths: int32 ``[N]``, samples.
        heard: int32 ``[2, N, T]``, the models' transcripts of it, filled up with -1.
        chains: one tuple a sentence of the steps that make the trigger: operator, query.
    """

    status: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray
    audio: np.ndarray
    lengths: np.ndarray
    heard: np.ndarray
    chains: list[tuple[tuple[str, int], ...]]

    @property
    def success(self) -> np.ndarray:
        """Bool ``[N]``: a trigger was found."""
        return self.status == "found"


class _Walk(NamedTuple):
    """Where the searches stand, one row a sentence."""

    keys: jax.Array
    audio: jax.Array
    lengths: jax.Array
    best: jax.Array
    stores: fitness.Store
    operators: select.SelectState
    queries: jax.Array


def search(
    pair: SpeechPair,
    audio: np.ndarray,
    lengths: np.ndarray,
    key: jax.Array,
    *,
    selection: str = "ranked",
    max_queries: int = 1_000,
    timeout: float = 180.0,
    batch_size: int = 32,
) -> SpeechResult:
    """Searches, from each sentence, audio of which the two models hear different words.

    Args:
        pair: the models.
        audio: int16 ``[N, S]``, zeros from the lengths on.
        lengths: int32 ``[N]``, samples.
        key: sentence n draws with ``fold_in(key, n)``.
        selection: of ``select.RULES``.
        max_queries: of one sentence.
        timeout: seconds of one sentence, its share of its batches.
        batch_size: sentences searched at a time.

    Raises:
        ValueError: sentences, models' outputs or an option are not accepted.
    """
    check(audio, lengths, max_queries, timeout, batch_size)
    if selection not in select.RULES:
        raise ValueError(f"selection is {selection!r}; accepted are {', '.join(select.RULES)}")
    rows = opening(pair, audio, lengths, batch_size)
    waiting = np.flatnonzero(rows.status == "budget")
    for start in range(0, len(waiting), batch_size):
        _run(pair, key, selection, rows, waiting[start : start + batch_size], max_queries, timeout)
    return rows


def check(
    audio: np.ndarray, lengths: np.ndarray, max_queries: int, timeout: float, batch_size: int
) -> None:
    """Raises ValueError for what no search of audio accepts."""
    if audio.ndim != 2 or audio.dtype != np.int16:
        raise ValueError(
            f"audio: expected int16 [N, samples], got {audio.dtype} {list(audio.shape)}"
        )
    if lengths.shape != audio.shape[:1] or ((lengths < 1) | (lengths > audio.shape[1])).any():
        raise ValueError(
            f"lengths: expected {len(audio)} whole numbers from 1 to {audio.shape[1]}, got "
            f"{np.asarray(lengths).tolist()[:8]}"
        )
    for name, value in (("max_queries", max_queries), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value!r}; accepted is 1 or more")
    if not timeout > 0:
        raise ValueError(f"timeout is {timeout!r}; accepted is more than 0")


def opening(
    pair: SpeechPair, audio: np.ndarray, lengths: np.ndarray, batch_size: int
) -> SpeechResult:
    """Rows with the models' answers to the sentences themselves; "budget" where they agree."""
    said = [
        ask(pair, audio[at : at + batch_size], lengths[at : at + batch_size])
        for at in range(0, len(audio), batch_size)
    ]
    heard = np.concatenate([one.words for one in said], axis=1) if said else np.zeros((2, 0, 1))
    differ = np.asarray(transcripts.disagree(*map(jnp.asarray, heard)))
    return SpeechResult(
        status=np.where(differ, "disagrees", "budget").astype("<U9"),
        queries=np.zeros(len(audio), np.int32),
        seconds=np.zeros(len(audio)),
        audio=audio.copy(),
        lengths=np.asarray(lengths, np.int32).copy(),
        heard=heard.astype(np.int32),
        chains=[() for _ in audio],
    )


class Answer(NamedTuple):
    """What a pair says of B sentences.

    Attributes:
        words: int32 ``[2, B, T]``, transcripts filled up with -1.
        confidence: float32 ``[2, B]``, sums of the largest probabilities.
        vectors: float32 ``[B, 2 K - 2]``, how surely both hear each word.
        margin: float32 ``[B]``, the least lead of a largest probability over the second.
    """

    words: Any
    confidence: Any
    vectors: Any
    margin: Any


def ask(pair: SpeechPair, audio: Any, lengths: Any) -> Answer:
    """Asks a pair about sentences, int16 ``[B, S]`` and int32 ``[B]``."""
    return Answer(*map(np.asarray, _read(*pair.probabilities(audio, lengths))))


@jax.jit
def _read(original: jax.Array, compressed: jax.Array) -> Answer:
    both = jnp.stack([original, compressed])
    best = jax.lax.top_k(both, 2)[0]
    heard = transcripts.heard(both)
    return Answer(
        jnp.stack([transcripts.greedy(one) for one in (original, compressed)]),
        best[..., 0].sum(axis=-1),
        jnp.concatenate([heard[0], heard[1]], axis=-1),
        (best[..., 0] - best[..., 1]).min(axis=(0, 2)),
    )


def mutation_key(key: jax.Array, query: jax.Array | int) -> jax.Array:
    """The key that the mutant of a query (0 the first) is drawn with."""
    return jax.random.split(jax.random.fold_in(key, query))[1]


def _run(
    pair: SpeechPair,
    key: jax.Array,
    selection: str,
    rows: SpeechResult,
    places: np.ndarray,
    max_queries: int,
    timeout: float,
) -> None:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(places))
    answer = ask(pair, rows.audio[places], rows.lengths[places])
    walk = _begin(keys, rows.audio[places], rows.lengths[places], answer.vectors)
    at_work = np.ones(len(places), bool)
    chains: list[list[tuple[str, int]]] = [[] for _ in places]
    while at_work.any():
        started = time.perf_counter()
        operators, audio, lengths = _proposed(selection, walk)
        answer = ask(pair, audio, lengths)
        found = np.asarray(transcripts.disagree(*map(jnp.asarray, answer.words))) & at_work
        number = int(walk.queries[0])
        walk, accepted = _judged(
            walk, operators, audio, lengths, answer.confidence, answer.vectors, found
        )
        for slot in np.flatnonzero((np.asarray(accepted) | found) & at_work):
            chains[slot].append((mutations.NAMES[int(operators[slot])], number))
        rows.queries[places[at_work]] += 1
        rows.seconds[places[at_work]] += (time.perf_counter() - started) / at_work.sum()
        done = places[found]
        rows.status[done] = "found"
        rows.audio[done], rows.lengths[done] = np.asarray(audio)[found], np.asarray(lengths)[found]
        rows.heard[:, done] = answer.words[:, found]
        for slot in np.flatnonzero(found):
            rows.chains[places[slot]] = tuple(chains[slot])
        spent = (rows.queries[places] >= max_queries) | (rows.seconds[places] >= timeout)
        at_work &= ~found & ~spent
        if int(walk.stores.filled.max()) == walk.stores.vectors.shape[1]:
            walk = walk._replace(stores=fitness.grown(walk.stores))


@jax.jit
def _begin(keys: jax.Array, audio: jax.Array, lengths: jax.Array, vectors: jax.Array) -> _Walk:
    def one(vector: jax.Array) -> fitness.Store:
        return fitness.add(fitness.empty(_CAPACITY, vector.shape[0] // 2), vector)

    operators = jax.vmap(lambda _: select.init(len(mutations.NAMES)))(lengths)
    zeros = jnp.zeros(len(lengths))
    stores = jax.vmap(one)(vectors)
    return _Walk(keys, audio, lengths, zeros, stores, operators, zeros.astype(jnp.int32))


@partial(jax.jit, static_argnums=0)
def _proposed(selection: str, walk: _Walk) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Operators int32 ``[B]``, and the mutants they make."""

    def one(
        key: jax.Array, query: jax.Array, operators: select.SelectState
    ) -> tuple[jax.Array, jax.Array]:
        choice, mutation = jax.random.split(jax.random.fold_in(key, query))
        return select.draw(choice, operators, selection), mutation

    operators, keys = jax.vmap(one)(walk.keys, walk.queries, walk.operators)
    audio, lengths = mutations.mutate_batch(operators, keys, walk.audio, walk.lengths)
    return operators, audio, lengths


@jax.jit
def _judged(
    walk: _Walk,
    operators: jax.Array,
    audio: jax.Array,
    lengths: jax.Array,
    confidence: jax.Array,
    vectors: jax.Array,
    found: jax.Array,
) -> tuple[_Walk, jax.Array]:
    """The searches after the query, and which mutants were accepted."""
    gain = jnp.abs(confidence[0] - confidence[1]) - walk.best
    new = jax.vmap(fitness.novel)(walk.stores, vectors)
    tied = jnp.abs(gain) <= fitness.TOLERANCE
    accepted = (~tied | new) & ~found
    success = accepted | found
    last = jnp.where(success, operators, walk.operators.last)
    added = jax.vmap(fitness.add)(walk.stores, vectors)

    def chosen(which: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(which.reshape(-1, *[1] * (yes.ndim - 1)), yes, no)

    return _Walk(
        walk.keys,
        chosen(accepted, audio, walk.audio),
        jnp.where(accepted, lengths, walk.lengths),
        jnp.where(accepted, walk.best + gain, walk.best),
        jax.tree.map(partial(chosen, new), added, walk.stores),
        jax.vmap(select.update)(walk.operators, operators, success, last),
        walk.queries + 1,
    ), accepted


def replay(
    audio: np.ndarray, length: int, key: jax.Array, place: int, chain: tuple[tuple[str, int], ...]
) -> tuple[np.ndarray, int]:
    """Makes a trigger again from its sentence.

    Args:
        audio: int16 ``[S]``.
        length: samples.
        key: the search's.
        place: the sentence's number among all.
        chain: of the result.

    Returns:
        int16 ``[S]``, and its length.
    """
    own = jax.random.fold_in(key, place)
    sound, size = jnp.asarray(audio)[None], jnp.asarray([length], jnp.int32)
    for name, query in chain:
        operator = jnp.asarray([mutations.NAMES.index(name)], jnp.int32)
        sound, size = mutations.mutate_batch(operator, mutation_key(own, query)[None], sound, size)
    return np.asarray(sound[0]), int(size[0])
