"""DFlare's search on audio: mutants of a sentence until two recognisers hear different words.

Tian et al., TOSEM 2023, section 6.1, says that transcripts are compared word by word and which
mutations are used; the rest is carried over from images here. D is how far the models' confidences
are apart, each the sum of the largest probabilities over a sentence's outputs: what the top-1
probability is to an image. Novelty looks at how surely each word is heard. The rules are those of
the released code: D may also fall, it starts at 0, and operators are drawn by rank.
"""

import os
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difftest import fitness, select
from difftest.keeping import Keeping
from difftest.pair import ModelError
from difftest.seeds import checked_key
from difftest.speech import mutations, transcripts
from difftest.speech.recogniser import SpeechPair
from difftest.speech.result import SpeechResult
from difftest.walk import chosen
from nnslicer_jax.checkpoint import digest

_CAPACITY = 64


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
    checkpoint: str | os.PathLike[str] | None = None,
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
        checkpoint: a file; finished sentences are kept there, and a search that was ended begins
            with those.

    Raises:
        ValueError: sentences or an option are not accepted, or the checkpoint is another search's.
        ModelError: the models fail on every sentence.
    """
    check(audio, lengths, max_queries, timeout, batch_size)
    if selection not in select.RULES:
        raise ValueError(f"selection is {selection!r}; accepted are {', '.join(select.RULES)}")
    key = checked_key(key)
    settings = {
        "selection": selection,
        "max_queries": int(max_queries),
        "timeout": float(timeout),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    rows, vectors = opening(pair, audio, lengths, batch_size, "released", settings)
    with Keeping(checkpoint, rows, partial(same_answers, pair)) as keep:
        waiting = np.flatnonzero(rows.status == "waiting")
        size = min(batch_size, len(waiting))
        for start in range(0, len(waiting), batch_size):
            some = waiting[start : start + batch_size]
            _run(pair, key, selection, rows, vectors, some, size, max_queries, timeout, keep)
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
    pair: SpeechPair,
    audio: np.ndarray,
    lengths: np.ndarray,
    batch_size: int,
    variant: str,
    settings: dict[str, Any],
) -> tuple[SpeechResult, np.ndarray]:
    """Rows with the models' answers to the sentences themselves; "waiting" where they agree.

    Args:
        pair: the models.
        audio: int16 ``[N, S]``.
        lengths: int32 ``[N]``.
        batch_size: sentences asked at a time.
        variant: the name of the search.
        settings: its options; the sentences' digest is added.

    Returns:
        The rows, and how surely both hear each word, float32 ``[N, 2 K - 2]``.

    Raises:
        ModelError: the models fail on every sentence.
    """
    said = [
        ask(pair, audio[at : at + batch_size], lengths[at : at + batch_size])
        for at in range(0, len(audio), batch_size)
    ]
    errors = [error for one in said for error in one.errors]
    if errors and None not in errors:
        raise ModelError(str(errors[0]))
    good = [one for one in said if None in one.errors]
    wanted = (good[0].words.shape[2], good[0].vectors.shape[1]) if good else (1, 2)
    heard = np.full((2, len(audio), wanted[0]), -1, np.int32)
    vectors = np.zeros((len(audio), wanted[1]), np.float32)
    for number, one in enumerate(said):
        some = slice(number * batch_size, number * batch_size + len(one.errors))
        if None not in one.errors:
            continue
        if (one.words.shape[2], one.vectors.shape[1]) != wanted:
            raise ModelError("the models give sentences of one size other outputs or symbols")
        heard[:, some], vectors[some] = one.words, one.vectors
    status = np.where(transcripts.disagree(*heard), "disagrees", "waiting").astype("<U9")
    status[[error is not None for error in errors]] = "error"
    lengths = np.asarray(lengths, np.int32).copy()
    return SpeechResult(
        status=status,
        queries=np.zeros(len(audio), np.int32),
        seconds=np.zeros(len(audio)),
        audio=audio.copy(),
        lengths=lengths,
        heard=heard,
        chains=[() for _ in audio],
        errors=errors,
        variant=variant,
        settings={**settings, "sentences": digest([audio, lengths, heard])},
    ), vectors


def shape_of(rows: SpeechResult, vectors: np.ndarray) -> tuple[int, int]:
    """Outputs and symbols that ``opening`` was given."""
    return rows.heard.shape[2], vectors.shape[1] // 2 + 1


class Answer(NamedTuple):
    """What a pair says of B sentences; zeros, and no words, of one that a model failed on.

    Attributes:
        words: int32 ``[2, B, T]``, transcripts filled up with -1.
        confidence: float32 ``[2, B]``, sums of the largest probabilities.
        vectors: float32 ``[B, 2 K - 2]``, how surely both hear each word.
        margin: float32 ``[B]``, the least lead of a largest probability over the second.
        errors: one line a sentence, or None.
    """

    words: Any
    confidence: Any
    vectors: Any
    margin: Any
    errors: list[str | None]


def ask(pair: SpeechPair, audio: Any, lengths: Any, shape: tuple[int, int] | None = None) -> Answer:
    """Asks a pair about sentences; one by one if the batch fails.

    Args:
        pair: the models.
        audio: int16 ``[B, S]``.
        lengths: int32 ``[B]``.
        shape: outputs and symbols that the models gave before; None: not known yet.
    """
    audio, lengths = np.asarray(audio), np.asarray(lengths)
    try:
        answers = [_checked(pair, audio, lengths, shape)]
        errors: list[str | None] = [None] * len(audio)
    except ModelError:
        answers, errors = [], []
        for row in range(len(audio)):
            try:
                answers.append(_checked(pair, audio[row : row + 1], lengths[row : row + 1], shape))
                errors.append(None)
            except ModelError as error:
                errors.append(str(error))
    size = shape or (answers[0][0].shape[1:] if answers else (1, 2))
    # Filled up to a power of two: few sizes are compiled.
    both = np.zeros((2, 1 << max(len(audio) - 1, 0).bit_length(), *size), np.float32)
    good = np.flatnonzero([error is None for error in errors])
    if len(good):
        both[:, good] = np.concatenate([np.stack(answer) for answer in answers], axis=1)
    words, confidence, vectors, margin = map(np.asarray, _read(both))
    count = len(audio)
    return Answer(words[:, :count], confidence[:, :count], vectors[:count], margin[:count], errors)


def _checked(
    pair: SpeechPair, audio: np.ndarray, lengths: np.ndarray, shape: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    found = pair.probabilities(audio, lengths)
    if shape is not None and found[0].shape[1:] != shape:
        raise ModelError(f"the models gave {found[0].shape[1:]} a sentence, before it was {shape}")
    return found


@jax.jit
def _read(both: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The numbers of an answer, of probabilities ``[2, B, T, K]``."""
    best = jax.lax.top_k(both, 2)[0]
    heard = transcripts.heard(both)
    return (
        transcripts.greedy(both),
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
    vectors: np.ndarray,
    places: np.ndarray,
    size: int,
    max_queries: int,
    timeout: float,
    keep: Keeping,
) -> None:
    """Searches from the sentences at some places, in ``size`` slots, and fills their rows in."""
    shape = shape_of(rows, vectors)
    at_work = np.arange(size) < len(places)
    # Slots that stay idle hold any sentence; nobody asks about their mutants.
    places = np.resize(places, size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(places))
    walk = _begin(keys, rows.audio[places], rows.lengths[places], vectors[places])
    chains: list[list[tuple[str, int]]] = [[] for _ in places]
    while at_work.any():
        started = time.perf_counter()
        active = np.flatnonzero(at_work)
        operators, audio, lengths = map(np.asarray, _proposed(selection, walk, at_work))
        answer = ask(pair, audio[active], lengths[active], shape)
        failed, found = np.zeros((2, size), bool)
        failed[active] = [error is not None for error in answer.errors]
        found[active] = transcripts.disagree(*answer.words)
        confidence = np.zeros((2, size), np.float32)
        heard = np.zeros((size, vectors.shape[1]), np.float32)
        confidence[:, active], heard[active] = answer.confidence, answer.vectors
        number = int(walk.queries[0])
        walk, accepted = _judged(walk, operators, audio, lengths, confidence, heard, found)
        for slot in np.flatnonzero((np.asarray(accepted) | found) & at_work):
            chains[slot].append((mutations.NAMES[int(operators[slot])], number))
        rows.queries[places[active]] += 1
        done = places[found]
        rows.audio[done], rows.lengths[done] = audio[found], lengths[found]
        rows.heard[:, done] = answer.words[:, found[active]]
        for slot in np.flatnonzero(found):
            rows.chains[places[slot]] = tuple(chains[slot])
        for slot, error in zip(active, answer.errors, strict=True):
            rows.errors[places[slot]] = error
        if int(walk.stores.filled.max()) == walk.stores.vectors.shape[1]:
            walk = walk._replace(stores=fitness.grown(walk.stores))
        rows.seconds[places[active]] += (time.perf_counter() - started) / len(active)
        spent = (rows.queries[places] >= max_queries) | (rows.seconds[places] >= timeout)
        rows.status[places[failed]] = "error"
        rows.status[places[at_work & spent & ~found & ~failed]] = "budget"
        rows.status[done] = "found"
        over = at_work & (found | failed | spent)
        at_work &= ~over
        keep(bool(over.any()))


@jax.jit
def _begin(keys: jax.Array, audio: jax.Array, lengths: jax.Array, vectors: jax.Array) -> _Walk:
    def one(vector: jax.Array) -> fitness.Store:
        return fitness.add(fitness.empty(_CAPACITY, vector.shape[0] // 2), vector)

    operators = jax.vmap(lambda _: select.init(len(mutations.NAMES)))(lengths)
    zeros = jnp.zeros(len(lengths))
    stores = jax.vmap(one)(vectors)
    return _Walk(keys, audio, lengths, zeros, stores, operators, zeros.astype(jnp.int32))


@partial(jax.jit, static_argnums=0)
def _proposed(
    selection: str, walk: _Walk, at_work: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Operators int32 ``[B]``, and the mutants they make; idle slots get the cheapest one."""

    def one(
        key: jax.Array, query: jax.Array, operators: select.SelectState
    ) -> tuple[jax.Array, jax.Array]:
        choice, mutation = jax.random.split(jax.random.fold_in(key, query))
        return select.draw(choice, operators, selection), mutation

    operators, keys = jax.vmap(one)(walk.keys, walk.queries, walk.operators)
    operators = jnp.where(at_work, operators, mutations.NAMES.index("gain"))
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
    audio, lengths = chosen(accepted, (audio, lengths), (walk.audio, walk.lengths))
    stores = jax.vmap(fitness.add)(walk.stores, vectors, new)
    return _Walk(
        walk.keys,
        audio,
        lengths,
        jnp.where(accepted, walk.best + gain, walk.best),
        stores,
        jax.vmap(select.update)(walk.operators, operators, success, last),
        walk.queries + 1,
    ), accepted


def confirm(pair: SpeechPair, result: SpeechResult, batch_size: int = 32) -> np.ndarray:
    """Asks the pair about the triggers anew: bool ``[N]``, whether each still is one."""
    good = result.success.copy()
    for some in np.array_split(np.flatnonzero(good), max(1, -(-int(good.sum()) // batch_size))):
        if len(some):
            answer = ask(pair, result.audio[some], result.lengths[some])
            good[some] = transcripts.disagree(*answer.words)
    return good


def same_answers(pair: SpeechPair, result: SpeechResult, batch_size: int = 32) -> bool:
    """Whether the pair hears the saved audio as the result says, but for rounding.

    At least half of all rows decide: rounding may change a word of a few.
    """
    done = np.flatnonzero(~np.isin(result.status, ("waiting", "error")))
    same: list[bool] = []
    for at in range(0, len(done), batch_size):
        some = done[at : at + batch_size]
        answer = ask(pair, result.audio[some], result.lengths[some])
        heard = result.heard[:, some]
        if answer.words.shape != heard.shape:
            return False
        same += (answer.words == heard).all(axis=(0, 2)).tolist()
    return not same or float(np.mean(same)) >= 0.5
