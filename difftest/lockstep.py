"""The search of black boxes: all unfinished seeds take each step together.

Judging a batch of mutants and making the next are one jitted step; in between the models see one
batch. Places of finished seeds go to the next ones; a model's failure costs only its own seed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from difftest import fitness, mutate
from difftest.ask import ask
from difftest.clock import Clock, shares
from difftest.pair import ModelPair
from difftest.result import SearchResult, finish
from difftest.walk import Rules, Walk, begin_each, chosen, judge_each, propose_each

_CAPACITY = 64


class _Slots(NamedTuple):
    """What is carried from step to step, one row a slot.

    Attributes:
        walks: where each seed's search stands.
        operators: int32 ``[slots]``, what made the mutants.
        mutants: uint8 ``[slots, H, W, C]``, to be asked next.
    """

    walks: Walk
    operators: jax.Array
    mutants: jax.Array


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
        save: called after every step with whether it finished rows.
    """
    classes = rows.outputs_original.shape[1]
    places = np.zeros(0, np.int64)
    slots: _Slots | None = None
    chains: dict[int, list[tuple[str, int]]] = {}
    clock = Clock()
    while len(waiting) or (places >= 0).any():
        clock.start()
        filled = False
        free = (places < 0).sum() if len(places) else batch_size
        if len(waiting) and free >= max(1, len(places) // 8):
            new, waiting = waiting[:free], waiting[free:]
            chains.update((int(place), []) for place in new)
            places, slots = _filled(rules, key, seeds, rows, new, places, slots)
            filled = True
        elif 2 * (len(places) - free) <= len(places):
            # The last seeds to be searched get small batches, of few sizes, to compile few.
            assert slots is not None
            kept = np.flatnonzero(places >= 0)
            size = 1 << (len(kept) - 1).bit_length()
            slots = _taken(slots, np.resize(kept, size))
            places = np.append(places[kept], np.full(size - len(kept), -1))
        assert slots is not None
        active = np.flatnonzero(places >= 0)
        asked = np.asarray(slots.mutants)[active]
        original, compressed, errors = ask(pair, asked, classes)
        queries = np.asarray(slots.walks.queries)[active]
        operators = np.asarray(slots.operators)[active]
        answers = np.zeros((2, len(places), classes), np.float32)
        answers[:, active] = original, compressed
        slots, found, accepted = _step(rules, slots, answers[0], answers[1])
        if int(np.max(slots.walks.store.filled)) == slots.walks.store.vectors.shape[1]:
            walks = slots.walks._replace(store=fitness.grown(slots.walks.store))
            slots = slots._replace(walks=walks)
        failed = np.array([error is not None for error in errors])
        found = np.asarray(found)[active] & ~failed
        accepted = np.asarray(accepted)[active] | found
        at_work = places[active]
        for slot in np.flatnonzero(accepted):
            name = mutate.NAMES[operators[slot]]
            chains[int(at_work[slot])].append((name, int(queries[slot])))
        rows.queries[at_work] += 1
        # Models of JAX functions fill their batches up to powers of two.
        room = (len(active) - 1).bit_length()
        took = clock.seconds((filled, room, slots.walks.store.vectors.shape))
        rows.seconds[at_work] += shares(took, failed)
        spent = (rows.queries[at_work] >= max_queries) | (rows.seconds[at_work] >= timeout)
        over = np.flatnonzero(found | failed | spent)
        for slot in over:
            place = int(at_work[slot])
            chain = chains.pop(place)
            if found[slot]:
                rows.chains[place] = tuple(chain)
            elif failed[slot]:
                rows.errors[place], rows.status[place] = errors[slot], "error"
            else:
                rows.status[place] = "budget"
        if found.any():
            outputs = (original[found], compressed[found])
            finish(rows, seeds, at_work[found], asked[found], outputs)
        places[active[over]] = -1
        save(bool(len(over)))


def _filled(
    rules: Rules,
    key: jax.Array,
    seeds: np.ndarray,
    rows: SearchResult,
    new: np.ndarray,
    places: np.ndarray,
    slots: _Slots | None,
) -> tuple[np.ndarray, _Slots]:
    """Puts new seeds into the free slots; the first ones make the slots."""
    if slots is None:
        places = np.full(len(new), -1)
    free = np.flatnonzero(places < 0)[: len(new)]
    fresh = np.zeros(len(places), bool)
    fresh[free] = True
    places = places.copy()
    places[free] = new
    # Slots that stay empty begin with any seed; nobody asks for their mutants.
    begun = np.maximum(places, 0)
    answers = (rows.outputs_original[begun], rows.outputs_compressed[begun])
    capacity = _CAPACITY if slots is None else slots.walks.store.vectors.shape[1]
    made = _begin(rules, key, begun, seeds[begun], *answers, capacity)
    return places, made if slots is None else _merged(fresh, made, slots)


@partial(jax.jit, static_argnums=(0, 6))
def _begin(rules: Rules, key: jax.Array, places, seeds, original, compressed, capacity: int):
    return _proposed(rules, begin_each(rules, key, places, seeds, original, compressed, capacity))


_merged = jax.jit(chosen)


@jax.jit
def _taken(slots: _Slots, which: jax.Array) -> _Slots:
    return jax.tree.map(lambda leaf: leaf[which], slots)


def _proposed(rules: Rules, walks: Walk) -> _Slots:
    return _Slots(walks, *propose_each(rules, walks))


@partial(jax.jit, static_argnums=0)
def _step(rules: Rules, slots: _Slots, original: jax.Array, compressed: jax.Array):
    walks, found, accepted = judge_each(rules, *slots, original, compressed)
    return _proposed(rules, walks), found, accepted
