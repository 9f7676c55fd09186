"""The search of pairs of JAX functions: mutation, both models and judgement in one device loop.

Seeds are searched in slots, which step together; a finished seed's slot takes the next seed
without leaving the loop. The loop ends every few hundred steps, so that the host can note what was
accepted, see to the time and to the room of the stores, and save; and it ends when most slots have
nothing left to do, so that the host can leave those out.
"""

import time
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from difftest import fitness, mutate
from difftest.pair import JaxModel, ModelPair
from difftest.result import SearchResult, finish
from difftest.walk import Rules, Walk, begin_each, chosen, judge_each, propose_each

_CAPACITY = 64
_STEPS = 128
# Fewer slots go on when so few of them, one in this many, are at work. Each size compiles once.
_FEW = 8
_WAITING, _FOUND, _SPENT, _FAILED = range(4)


class _Seeds(NamedTuple):
    """What the slots are filled from, M seeds.

    Attributes:
        images: uint8 ``[M, H, W, C]``.
        begun: queries spent on them before, int32 ``[M]``.
        places: int32 ``[M]``, their numbers among all seeds.
        original: ``[M, K]``, the models' answers to the seeds.
        compressed: the same.
    """

    images: jax.Array
    begun: jax.Array
    places: jax.Array
    original: jax.Array
    compressed: jax.Array


class _Rows(NamedTuple):
    """What became of the seeds, one row each and one more that takes what belongs to none."""

    status: jax.Array
    queries: jax.Array
    triggers: jax.Array
    original: jax.Array
    compressed: jax.Array


class _Log(NamedTuple):
    """What each slot did in each step of the present loop, ``[steps, slots]``."""

    row: jax.Array
    operator: jax.Array
    query: jax.Array
    accepted: jax.Array


class _State(NamedTuple):
    step: jax.Array
    following: jax.Array
    row: jax.Array
    walks: Walk
    rows: _Rows
    log: _Log


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
    """Searches the waiting seeds and fills their rows in: as ``lockstep.run``, same results."""
    if not len(waiting):
        return
    assert isinstance(pair.original, JaxModel) and isinstance(pair.compressed, JaxModel)
    models = (pair.original, pair.compressed)
    params = tuple(model.params for model in models)
    steps = _program(models, rules, max_queries)
    begun = rows.queries[waiting].copy()
    source = _Seeds(
        jnp.asarray(seeds[waiting]),
        jnp.asarray(rows.queries[waiting]),
        jnp.asarray(waiting, jnp.int32),
        jnp.asarray(rows.outputs_original[waiting]),
        jnp.asarray(rows.outputs_compressed[waiting]),
    )
    slots = min(batch_size, len(waiting))
    state = _start(rules, key, source, slots)
    accepted_by: list[list[tuple[str, int]]] = [[] for _ in waiting]
    reported = np.zeros(len(waiting), bool)
    compiled: tuple[int, ...] = ()
    while not reported.all():
        if state.walks.store.vectors.shape != compiled:
            # Nobody's time: with all slots empty it ends at once.
            empty = state._replace(row=jnp.full_like(state.row, len(waiting)))
            jax.block_until_ready(steps(params, key, source, empty))
            compiled = state.walks.store.vectors.shape
        started = time.perf_counter()
        state = steps(params, key, source, state)
        taken = int(state.step)
        log = _Log(*(leaf[:taken] for leaf in jax.device_get(state.log)))
        took = time.perf_counter() - started
        used = log.row < len(waiting)
        if taken:
            share = took / taken / np.maximum(used.sum(axis=1), 1)
            times = np.repeat(share[:, None], log.row.shape[1], axis=1)
            np.add.at(rows.seconds, waiting[log.row[used]], times[used])
        for step, slot in zip(*np.nonzero(log.accepted & used), strict=True):
            accepted_by[log.row[step, slot]].append(
                (mutate.NAMES[log.operator[step, slot]], int(log.query[step, slot]))
            )
        slow = (np.asarray(state.row) < len(waiting)) & (
            np.append(rows.seconds[waiting], 0)[np.asarray(state.row)] >= timeout
        )
        if slow.any():
            state = _give_up(rules, key, source, state, jnp.asarray(slow))
        at_work = np.flatnonzero(np.asarray(state.row) < len(waiting))
        if len(at_work) and _are_few(len(at_work), state, len(waiting)):
            size = 1 << (len(at_work) - 1).bit_length()
            state = _taken(state, np.resize(at_work, size), np.arange(size) < len(at_work))
        status = np.asarray(state.rows.status)[:-1]
        new = np.flatnonzero((status != _WAITING) & ~reported)
        if len(new):
            _report(rows, seeds, waiting, begun, state.rows, status, new, accepted_by)
            reported[new] = True
        save(bool(len(new)))
        if not bool(_have_room(state, len(waiting))):
            walks = state.walks._replace(store=fitness.grown(state.walks.store))
            state = state._replace(walks=walks)


def _are_few(at_work: Any, state: _State, number: int) -> Any:
    """Whether no seed waits for a slot and most slots are empty."""
    return (state.following >= number) & (_FEW * at_work <= state.row.shape[0])


def _have_room(state: _State, number: int) -> jax.Array:
    """Whether no slot that has a seed has a full store."""
    full = state.walks.store.filled >= state.walks.store.vectors.shape[1]
    return ~jnp.any(full & (state.row < number))


@jax.jit
def _taken(state: _State, which: jax.Array, filled: jax.Array) -> _State:
    """Some of the slots; those that are not filled have no seed."""
    nobody = state.rows.status.shape[0] - 1
    return state._replace(
        row=jnp.where(filled, state.row[which], nobody),
        walks=jax.tree.map(lambda leaf: leaf[which], state.walks),
        log=_empty_log(which.shape[0]),
    )


def _empty_log(slots: int) -> _Log:
    return _Log(
        jnp.zeros((_STEPS, slots), jnp.int32),
        jnp.zeros((_STEPS, slots), jnp.int8),
        jnp.zeros((_STEPS, slots), jnp.int32),
        jnp.zeros((_STEPS, slots), bool),
    )


def _report(
    rows: SearchResult,
    seeds: np.ndarray,
    waiting: np.ndarray,
    begun: np.ndarray,
    done: _Rows,
    status: np.ndarray,
    new: np.ndarray,
    accepted_by: list[list[tuple[str, int]]],
) -> None:
    """Copies the rows that were finished."""
    places = waiting[new]
    rows.queries[places] = begun[new] + np.asarray(done.queries)[new]
    rows.status[places[status[new] == _SPENT]] = "budget"
    found = new[status[new] == _FOUND]
    outputs = (np.asarray(done.original)[found], np.asarray(done.compressed)[found])
    for row in found:
        rows.chains[waiting[row]] = tuple(accepted_by[row])
    finish(rows, seeds, waiting[found], np.asarray(done.triggers)[found], outputs)
    for place in waiting[new[status[new] == _FAILED]]:
        rows.errors[place] = "a model gave NaN or infinity for an image"
        rows.status[place] = "error"


@partial(jax.jit, static_argnums=(0, 3))
def _start(rules: Rules, key: jax.Array, source: _Seeds, slots: int) -> _State:
    number, *shape = source.images.shape
    classes = source.original.shape[1]
    rows = _Rows(
        jnp.zeros(number + 1, jnp.int8),
        jnp.zeros(number + 1, jnp.int32),
        jnp.zeros((number + 1, *shape), jnp.uint8),
        jnp.zeros((number + 1, classes)),
        jnp.zeros((number + 1, classes)),
    )
    row = jnp.arange(slots, dtype=jnp.int32)
    log = _empty_log(slots)
    walks = _fresh(rules, key, source, row, _CAPACITY)
    return _State(jnp.int32(0), jnp.int32(slots), row, walks, rows, log)


def _fresh(rules: Rules, key: jax.Array, source: _Seeds, row: jax.Array, capacity: int) -> Walk:
    """Walks that begin; rows past the last seed repeat it and are never looked at."""
    last = source.images.shape[0] - 1
    images, _, places, original, compressed = (leaf[jnp.minimum(row, last)] for leaf in source)
    return begin_each(rules, key, places, images, original, compressed, capacity)


def _refill(rules: Rules, key: jax.Array, source: _Seeds, state: _State, over: jax.Array) -> _State:
    """Gives the slots that are over to the next seeds."""
    number = source.images.shape[0]
    new = state.following + jnp.cumsum(over).astype(jnp.int32) - 1
    row = jnp.where(over, jnp.minimum(new, number), state.row)
    walks = _fresh(rules, key, source, row, state.walks.store.vectors.shape[1])
    return state._replace(
        following=jnp.minimum(state.following + over.sum(dtype=jnp.int32), number),
        row=row,
        walks=chosen(over, walks, state.walks),
    )


@partial(jax.jit, static_argnums=0)
def _give_up(
    rules: Rules, key: jax.Array, source: _Seeds, state: _State, slow: jax.Array
) -> _State:
    number = source.images.shape[0]
    into = jnp.where(slow, state.row, number)
    rows = state.rows._replace(
        status=state.rows.status.at[into].set(_SPENT),
        queries=state.rows.queries.at[into].set(state.walks.queries),
    )
    return _refill(rules, key, source, state._replace(rows=rows), slow)


# A program is some thousand regions of memory, of which a process has 65,530: few are kept.
@lru_cache(maxsize=4)
def _program(models: tuple[JaxModel, JaxModel], rules: Rules, max_queries: int) -> Any:
    return jax.jit(partial(_steps, models, rules, max_queries))


def _steps(
    models: tuple[JaxModel, JaxModel],
    rules: Rules,
    max_queries: int,
    params: tuple[Any, Any],
    key: jax.Array,
    source: _Seeds,
    state: _State,
) -> _State:
    """Up to so many steps; ends early if nothing is left or a store is full."""
    number = source.images.shape[0]

    def going(state: _State) -> jax.Array:
        at_work = (state.row < number).sum()
        return (
            (state.step < _STEPS)
            & (at_work > 0)
            & ~_are_few(at_work, state, number)
            & _have_room(state, number)
        )

    def step(state: _State) -> _State:
        walks = state.walks
        operators, mutants = propose_each(rules, walks)
        original, compressed = (
            model.traced(own, mutants) for model, own in zip(models, params, strict=True)
        )
        judged, found, accepted = judge_each(rules, walks, operators, mutants, original, compressed)
        finite = jnp.isfinite(original).all(axis=1) & jnp.isfinite(compressed).all(axis=1)
        found &= finite
        at_work = state.row < number
        spent = source.begun[jnp.minimum(state.row, number - 1)] + judged.queries >= max_queries
        over = at_work & (found | ~finite | spent)
        status = jnp.where(found, _FOUND, jnp.where(finite, _SPENT, _FAILED)).astype(jnp.int8)
        log = _Log(
            state.log.row.at[state.step].set(state.row),
            state.log.operator.at[state.step].set(operators.astype(jnp.int8)),
            state.log.query.at[state.step].set(walks.queries),
            state.log.accepted.at[state.step].set(accepted | found),
        )
        into = jnp.where(over, state.row, number)
        news = (status, judged.queries, mutants, original, compressed)
        after = state._replace(step=state.step + 1, walks=judged, log=log)

        def finished(state: _State) -> _State:
            rows = _Rows(
                *(old.at[into].set(new) for old, new in zip(state.rows, news, strict=True))
            )
            return _refill(rules, key, source, state._replace(rows=rows), over)

        return lax.cond(jnp.any(over), finished, lambda state: state, after)

    return lax.while_loop(going, step, state._replace(step=jnp.int32(0)))
