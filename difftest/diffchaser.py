"""DiffChaser, the baseline: a genetic search for an input on which two models disagree.

Xie et al., IJCAI 2019, as Tian et al., TOSEM 2023, section 2.5, describe it. A pool of mutants of
the seed; in each generation pairs of it are crossed, mutated and asked about, and those near the
decision boundary of either model are favoured, until one disagrees. The fitness, k-uncertainty, is
the difference of a model's largest and k-th largest probability.

From the papers: the pool, crossover of pairs, mutation by the operators that DFlare took over (in
the arithmetic of its released code, so that published counts are of the same mutations),
k-uncertainty of either model, the limit of 180 seconds. The papers at hand state no sizes, so these
are ours: a pool of 1,000, the published query counts (1,500 to 6,700) being a few such pools; a
crossover ratio of 0.8; k = 2; tournaments of two; uniform crossover of positions, all channels of
one from one parent; one mutation a child.
"""

import os
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difftest import mutate
from difftest.ask import ask
from difftest.confirm import same_answers
from difftest.keeping import Keeping
from difftest.options import (
    real,
    require_max_l2,
    require_one_of,
    require_timeout,
    require_whole,
    said,
)
from difftest.pair import JaxModel, ModelError, ModelPair
from difftest.result import SearchResult, finish
from difftest.seeds import IMPL, checked_key, checked_seeds, labelled
from difftest.walk import within
from nnslicer_jax.checkpoint import digest

_SEEDS_AT_A_TIME = 128


def k_uncertainty(original: jax.Array, compressed: jax.Array, k: int) -> jax.Array:
    """How sure the less sure model is: smaller is better.

    Args:
        original: probabilities ``[..., K]``.
        compressed: the same.
        k: 2..K.

    Returns:
        float32 ``[...]``: the smaller of the two models' differences between the largest and the
        k-th largest probability.
    """
    both = jnp.sort(jnp.stack([original, compressed]), axis=-1)
    return jnp.min(both[..., -1] - both[..., -k], axis=0)


def tournament(key: jax.Array, scores: jax.Array, size: int, count: int) -> jax.Array:
    """Winners, int32 ``[count]``: each has the lowest score of ``size`` drawn with repetition."""
    drawn = jax.random.randint(key, (count, size), 0, scores.shape[0])
    best = jnp.argmin(scores[drawn], axis=1)
    return jnp.take_along_axis(drawn, best[:, None], axis=1)[:, 0]


def crossover(key: jax.Array, mothers: jax.Array, fathers: jax.Array) -> jax.Array:
    """Children, uint8 ``[B, H, W, C]``: each position comes from either parent, half and half."""
    from_mother = jax.random.bernoulli(key, 0.5, (*mothers.shape[:3], 1))
    return jnp.where(from_mother, mothers, fathers)


def diffchase(
    pair: ModelPair,
    seeds: np.ndarray,
    key: jax.Array,
    *,
    pool_size: int = 1000,
    crossover_ratio: float = 0.8,
    k: int = 2,
    tournament_size: int = 2,
    table: str = "released",
    max_queries: int = 100_000,
    timeout: float = 180.0,
    keep_label: bool = False,
    max_l2: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SearchResult:
    """Searches, from each seed, an input that the two models label differently.

    A query is one image through both models, counted in the order of the pool up to the first that
    triggers; the seed's own is not counted. The models see a pool, or the children of a generation,
    as one batch. The same key finds the same, which is how ``replay`` makes a trigger again.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``, height and width at least 8.
        key: seed n draws with ``fold_in(key, n)``.
        pool_size: inputs of a generation, at least 2.
        crossover_ratio: share of the pool that is new in a generation, above 0 and at most 1; the
            others are winners of the last, and cost no query.
        k: of the fitness, 2 to the number of classes.
        tournament_size: how many compete for a place.
        table: of ``mutate.TABLES``.
        max_queries: of one seed.
        timeout: seconds of one seed, asked between generations; programs are compiled before.
        keep_label: only inputs count that the original model gives the seed's label; others lose
            every tournament with one of those.
        max_l2: largest distance from the seed on the 0-1 scale; None: any.
        checkpoint: a file; each seed is kept there when it is finished, and a search that was ended
            begins with those.

    Returns:
        One row a seed. A chain holds one entry, the generation and the place of the trigger in it.

    Raises:
        ValueError: seeds or an option are not accepted, or the checkpoint is another search's.
        ModelError: the models fail on every seed.
    """
    require_whole("pool_size", pool_size, 2)
    require_whole("k", k, 2)
    require_whole("tournament_size", tournament_size, 1)
    require_whole("max_queries", max_queries, 1)
    if not real(crossover_ratio) or not 0 < crossover_ratio <= 1:
        raise ValueError(
            f"crossover_ratio is {said(crossover_ratio)}; accepted are 0 (excluded) to 1"
        )
    require_one_of("table", table, mutate.TABLES)
    require_timeout(timeout)
    require_max_l2(max_l2)
    seeds, key = checked_seeds(seeds), checked_key(key)
    settings = {
        "pool_size": int(pool_size),
        "crossover_ratio": float(crossover_ratio),
        "k": int(k),
        "tournament_size": int(tournament_size),
        "table": table,
        "max_queries": int(max_queries),
        "timeout": float(timeout),
        "keep_label": bool(keep_label),
        "max_l2": None if max_l2 is None else float(max_l2),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
    }
    rows = labelled(pair, seeds, "diffchaser", settings, _SEEDS_AT_A_TIME)
    if k > rows.outputs_original.shape[1] and len(seeds):
        raise ValueError(f"k is {k}; accepted are 2 to {rows.outputs_original.shape[1]}, classes")
    rows.settings["seeds"] = digest([seeds, rows.seed_labels])
    with Keeping(checkpoint, rows, partial(same_answers, pair)) as keep:
        waiting = np.flatnonzero(rows.status == "waiting").tolist()
        if waiting:
            _compile(pair, rows, key, seeds[waiting[0]])
        for place in waiting:
            _chase(pair, seeds, jax.random.fold_in(key, place), rows, place)
            # A seed takes longer than any file.
            keep.now()
    return rows


class _Pool(NamedTuple):
    """Where one seed's search stands, P inputs asked about and B others.

    Attributes:
        known: uint8 ``[P, H, W, C]``, those that stay of the last generation.
        scores: float32 ``[P]``, theirs.
        images: uint8 ``[B, H, W, C]``, to be asked next.
    """

    known: np.ndarray
    scores: np.ndarray
    images: np.ndarray


def _begun(given: dict[str, Any], key: jax.Array, seed: np.ndarray) -> _Pool:
    images = np.asarray(_first(given["table"], given["pool_size"], given["max_l2"], key, seed))
    return _Pool(images[:0], np.zeros(0, np.float32), images)


def _bred(
    given: dict[str, Any],
    key: jax.Array,
    generation: int,
    seed: np.ndarray,
    pool: _Pool,
    original: np.ndarray,
    compressed: np.ndarray,
    allowed: np.ndarray,
) -> _Pool:
    """A generation's pool, of the last one and the models' answers ``[B, K]`` to its images."""
    size = given["pool_size"]
    number = max(1, round(given["crossover_ratio"] * size))
    uncertain = np.asarray(
        k_uncertainty(jnp.asarray(original), jnp.asarray(compressed), given["k"])
    )
    # A disallowed input loses every tournament with an allowed one.
    score = np.where(allowed, uncertain, np.float32(np.inf))
    known = np.concatenate([pool.known, pool.images])
    scores = np.concatenate([pool.scores, score])
    kept, children = _next(
        given["table"],
        number,
        given["tournament_size"],
        given["max_l2"],
        jax.random.fold_in(key, generation),
        seed,
        known,
        scores,
        size - number,
    )
    return _Pool(known[kept], scores[kept], np.asarray(children))


def again(pair: ModelPair, result: SearchResult, seeds: np.ndarray) -> np.ndarray:
    """The triggers of a result, made again by the generations that led to them.

    Args:
        pair: the models, asked about all generations but the last.
        result: of ``diffchase``.
        seeds: uint8 ``[N, H, W, C]``, those of the search.

    Returns:
        uint8 ``[N, H, W, C]``: the triggers, the seed itself where there is none.

    Raises:
        ModelError: a model fails on a generation.
    """
    given, images = result.settings, seeds.copy()
    key = jax.random.wrap_key_data(jnp.asarray(given["key"], jnp.uint32), impl=IMPL)
    for place in np.flatnonzero(result.success).tolist():
        own, seed = jax.random.fold_in(key, place), seeds[place]
        ((_, last, which),) = result.chains[place]
        pool = _begun(given, own, seed)
        for generation in range(1, last + 1):
            answers = ask(pair, pool.images, result.outputs_original.shape[1])
            if broken := [error for error in answers[2] if error is not None]:
                raise ModelError(broken[0])
            allowed = _allowed(given, answers[0], result.seed_labels[place])
            pool = _bred(given, own, generation, seed, pool, *answers[:2], allowed)
        images[place] = pool.images[which]
    return images


def _allowed(given: dict[str, Any], original: np.ndarray, label: int) -> np.ndarray:
    """Bool ``[B]``: the images with these answers may be triggers as far as the label goes."""
    return (original.argmax(axis=1) == label) | (not given["keep_label"])


def _compile(pair: ModelPair, rows: SearchResult, key: jax.Array, seed: np.ndarray) -> None:
    """Runs once what every seed runs, so that no seed's clock contains that it is compiled.

    Models that compile are asked; others are asked nothing that counts for no seed.
    """
    given, classes = rows.settings, rows.outputs_original.shape[1]
    compiling = [one for one in (pair.original, pair.compressed) if isinstance(one, JaxModel)]

    def asked(images: np.ndarray) -> None:
        if compiling:
            ask(ModelPair(compiling[0], compiling[-1]), images, classes)

    pool, left = _begun(given, key, seed), given["max_queries"]
    # A first pool, and the children of all later ones.
    for generation in (1, 2):
        count = len(pool.images)
        asked(pool.images[:left])
        if left <= count:
            return
        left -= count
        answers = np.zeros((count, classes), np.float32)
        pool = _bred(given, key, generation, seed, pool, answers, answers, np.ones(count, bool))
    # The last children may be cut short.
    asked(pool.images[: left % len(pool.images)])


def _chase(
    pair: ModelPair, seeds: np.ndarray, key: jax.Array, rows: SearchResult, place: int
) -> None:
    """Searches from one seed and fills its row in."""
    given = rows.settings
    max_queries, timeout = given["max_queries"], given["timeout"]
    classes = rows.outputs_original.shape[1]
    seed = seeds[place]
    started = time.perf_counter()
    pool = _begun(given, key, seed)
    generation = 0
    while True:
        asked = pool.images[: max_queries - rows.queries[place]]
        original, compressed, errors = ask(pair, asked, classes)
        allowed = _allowed(given, original, rows.seed_labels[place])
        failed = np.array([error is not None for error in errors])
        triggers = allowed & ~failed & (original.argmax(axis=1) != compressed.argmax(axis=1))
        over = np.flatnonzero(triggers | failed)
        if len(over):
            first = int(over[0])
            rows.queries[place] += first + 1
            rows.seconds[place] = time.perf_counter() - started
            if failed[first]:
                rows.errors[place], rows.status[place] = errors[first], "error"
            else:
                rows.chains[place] = (("generation", generation, first),)
                some = slice(first, first + 1)
                outputs = original[some], compressed[some]
                finish(rows, seeds, np.array([place]), asked[some], outputs)
            return
        rows.queries[place] += len(asked)
        rows.seconds[place] = time.perf_counter() - started
        if rows.seconds[place] >= timeout or rows.queries[place] >= max_queries:
            rows.status[place] = "budget"
            return
        generation += 1
        pool = _bred(given, key, generation, seed, pool, original, compressed, allowed)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _first(
    table: str, size: int, max_l2: float | None, key: jax.Array, seed: jax.Array
) -> jax.Array:
    """The first pool: mutants of the seed."""
    return _mutants(table, max_l2, key, seed, jnp.broadcast_to(seed, (size, *seed.shape)))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 8))
def _next(
    table: str,
    number: int,
    tournament_size: int,
    max_l2: float | None,
    key: jax.Array,
    seed: jax.Array,
    pool: jax.Array,
    scores: jax.Array,
    kept: int,
) -> tuple[jax.Array, jax.Array]:
    """Places of the inputs that stay, int32 ``[kept]``, and the children ``[number, H, W, C]``."""
    key_kept, key_mothers, key_fathers, key_cross, key_mutate = jax.random.split(key, 5)
    mothers = tournament(key_mothers, scores, tournament_size, number)
    fathers = tournament(key_fathers, scores, tournament_size, number)
    children = crossover(key_cross, pool[mothers], pool[fathers])
    staying = tournament(key_kept, scores, tournament_size, kept)
    return staying, _mutants(table, max_l2, key_mutate, seed, children)


def _mutants(
    table: str, max_l2: float | None, key: jax.Array, seed: jax.Array, images: jax.Array
) -> jax.Array:
    """Each image through one operator drawn uniformly, uint8 ``[B, H, W, C]``."""
    key_operators, key_each = jax.random.split(key)
    count = images.shape[0]
    operators = jax.random.randint(key_operators, (count,), 0, len(mutate.NAMES))
    mutants = mutate.mutate_batch(table, operators, jax.random.split(key_each, count), images)
    return jax.vmap(partial(within, max_l2, seed))(mutants)
