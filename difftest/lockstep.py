"""The search of black boxes: all unfinished seeds take each step together.

Mutation and judgement of a batch are one jitted step each; in between the models see one batch.
A seed that finishes gives its place to the next; a model's failure costs only its own seed.
"""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difftest import fitness, mutate
from difftest.ask import ask
from difftest.pair import ModelPair
from difftest.result import SearchResult, finish
from difftest.walk import Rules, Walk, begin, choose, judge, within

_CAPACITY = 64


def run(
    pair: ModelPair,
    seeds: np.ndarray,
    key: jax.Array,
    rules: Rules,
    rows: SearchResult,
    waiting: np.ndarray,
    *,
    max_queries: int,
    timeout: float,
    batch_size: int,
    save: Any,
) -> None:
    """Searches the waiting seeds and fills their rows in.

    Args:
        pair: the models.
        seeds: uint8 ``[N, H, W, C]``.
        key: seed n draws with ``fold_in(key, n)``.
        rules: the variant.
        rows: filled in place; labels and outputs of the seeds are there already.
        waiting: the places of the seeds to be searched.
        max_queries: a seed.
        timeout: seconds of a seed's share.
        batch_size: seeds at a time.
        save: called without arguments whenever rows were finished.
    """
    classes = rows.outputs_original.shape[1]
    places = np.zeros(0, np.int64)
    walks: Walk | None = None
    accepted_by: dict[int, list[tuple[str, int]]] = {}
    while len(waiting) or len(places):
        room = batch_size - len(places)
        if len(waiting) and (room >= max(1, batch_size // 4) or not len(places)):
            new, waiting = waiting[:room], waiting[room:]
            capacity = _CAPACITY if walks is None else walks.store.vectors.shape[1]
            fresh = _begin(
                rules,
                key,
                new,
                seeds[new],
                rows.outputs_original[new],
                rows.outputs_compressed[new],
                capacity,
            )
            walks = fresh if walks is None else _joined(_taken(walks, len(places)), fresh)
            places = np.concatenate([places, new])
            accepted_by.update((int(place), []) for place in new)
        assert walks is not None
        started = time.perf_counter()
        # Arrays are filled up to a power of two, so that a shrinking batch compiles few sizes.
        size = _filled(len(places))
        if len(walks.queries) != size:
            walks = _resized(walks, size)
        before = np.asarray(walks.queries)
        operators, mutants = _propose(rules, walks)
        asked = np.asarray(mutants)[: len(places)]
        original, compressed, errors = ask(pair, asked, classes)
        blank = np.zeros((size - len(places), classes), np.float32)
        walks, found, accepted = _judge(
            rules,
            walks,
            operators,
            mutants,
            np.concatenate([original, blank]),
            np.concatenate([compressed, blank]),
        )
        if int(np.max(walks.store.filled)) == walks.store.vectors.shape[1]:
            walks = walks._replace(store=fitness.grown(walks.store))
        names = [mutate.NAMES[index] for index in np.asarray(operators)[: len(places)]]
        found = np.array(found)[: len(places)]
        share = (time.perf_counter() - started) / len(places)
        rows.queries[places] += 1
        rows.seconds[places] += share
        failed = np.array([error is not None for error in errors])
        found &= ~failed
        for slot in np.flatnonzero(np.asarray(accepted)[: len(places)] | found):
            place = int(places[slot])
            accepted_by[place].append((names[slot], int(before[slot])))
        spent = (rows.queries[places] >= max_queries) | (rows.seconds[places] >= timeout)
        over = found | failed | spent
        if over.any():
            finish(
                rows,
                seeds,
                places[found],
                asked[found],
                (original[found], compressed[found]),
            )
            for slot in np.flatnonzero(over):
                place = int(places[slot])
                chain = accepted_by.pop(place)
                if found[slot]:
                    rows.chains[place] = tuple(chain)
                elif failed[slot]:
                    rows.status[place], rows.errors[place] = "error", errors[slot]
                else:
                    rows.status[place] = "budget"
            save()
            walks = _taken(walks, np.flatnonzero(~over))
            places = places[~over]


def _filled(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _taken(walks: Walk, which: int | np.ndarray) -> Walk:
    index = np.arange(which) if isinstance(which, int) else which
    return jax.tree.map(lambda leaf: leaf[index], walks)


def _resized(walks: Walk, size: int) -> Walk:
    """Rows repeated or dropped at the end; those past the seeds in use are never looked at."""
    return _taken(walks, np.minimum(np.arange(size), len(walks.queries) - 1))


def _joined(walks: Walk, fresh: Walk) -> Walk:
    return jax.tree.map(lambda old, new: jnp.concatenate([old, new]), walks, fresh)


@partial(jax.jit, static_argnums=(0, 6))
def _begin(rules: Rules, key: jax.Array, places, seeds, original, compressed, capacity: int):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
    start = jax.vmap(begin, (None, 0, 0, 0, 0, None))
    return start(rules, keys, seeds, original, compressed, capacity)


@partial(jax.jit, static_argnums=0)
def _propose(rules: Rules, walks: Walk) -> tuple[jax.Array, jax.Array]:
    operators, keys = jax.vmap(choose, (None, 0))(rules, walks)
    mutants = mutate.mutate_batch(rules.table, operators, keys, walks.image)
    return operators, jax.vmap(within, (None, 0, 0))(rules.max_l2, walks.seed, mutants)


@partial(jax.jit, static_argnums=0)
def _judge(rules: Rules, walks: Walk, operators, mutants, original, compressed):
    return jax.vmap(judge, (None, 0, 0, 0, 0, 0))(
        rules, walks, operators, mutants, original, compressed
    )
