"""`selection.kept` for products with many terms, on NumPy's vectorised sort.

XLA's CPU sort manages a few million terms a second, NumPy's hundreds of millions. A callback
takes rows, columns and the outputs' signs, and returns the signed edges already summed for
every row entry and every weight, so that no array of all terms ever exists: terms are formed,
ordered and summed in tiles, on one thread per core.
"""

import concurrent.futures
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.cores import cores
from nnslicer_jax.selection import Selection

# Terms in a tile. Smaller ones fit a core's cache, but the threads then spend their time handing
# the interpreter's lock to each other: 2^16 takes twice as long as this.
_TILE = 1 << 19
# Signed edges are summed over a tile in int8.
_MOST = 127
# From so many terms on, a part of them is sorted rather than all.
_MANY = 256
# How far from theta, in share of the mass, a sample of a row is trusted to bracket tau.
_BRACKET = 0.09


def edges(
    rows: jax.Array, columns: jax.Array, back: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    """Signed edges of `rows @ columns`, summed for each row entry and each weight.

    Args:
      rows: `[G, P, K]` float32.
      columns: `[G, K, O]` float32.
      back: `[G, P, O]` float32 in {-1, 0, 1}: the sign every edge of an output is multiplied
        by; outputs of 0 are skipped.
      selection: The rule and its theta.

    Returns:
      `[G, P, K]` and `[G, K, O]` float32 integers.
    """
    call = functools.partial(_edges, selection.rule)
    shapes = [jax.ShapeDtypeStruct(a.shape, jnp.int32) for a in (rows, columns)]
    out = jax.pure_callback(
        call, shapes, rows, columns, back, jnp.float32(selection.theta), vmap_method="expand_dims"
    )
    return out[0].astype(jnp.float32), out[1].astype(jnp.float32)


@functools.cache
def _workers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(cores())


def _edges(rule: str, *operands: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    rows, columns, back, theta = (np.asarray(a) for a in operands)
    limit = float(theta.reshape(-1)[0])
    lead = np.broadcast_shapes(rows.shape[:-3], columns.shape[:-3], back.shape[:-3])
    rows, back = (
        np.broadcast_to(a, (*lead, *a.shape[-3:])).reshape(-1, *a.shape[-3:]) for a in (rows, back)
    )
    if columns.size > np.prod(columns.shape[-3:]):
        columns = np.broadcast_to(columns, (*lead, *columns.shape[-3:]))
    columns = columns.reshape(-1, *columns.shape[-3:])
    (samples, groups, p, k), o = rows.shape, columns.shape[-1]
    to_rows = np.zeros((samples, groups, p, k), np.int32)
    to_columns = np.zeros((samples, groups, o, k), np.int32)
    # Samples under the same weights go together; too few of them for all threads are cut.
    runs = _cuts(samples, cores() if len(columns) == 1 else samples)
    parts = -(-cores() // (len(runs) * groups))
    tops, lefts = (_cuts(p, parts), [slice(o)]) if p > o else ([slice(p)], _cuts(o, parts))
    adding = threading.Lock()

    def work(task: tuple[slice, int, slice, slice]) -> None:
        run, g, top, left = task
        weights = columns[min(run.start, len(columns) - 1), g, :, left]
        found = _product(rule, limit, rows[run, g, top], weights, back[run, g, top, left])
        with adding:
            to_rows[run, g, top] += found[0]
            to_columns[run, g, left] += found[1]

    for _ in _workers().map(work, itertools.product(runs, range(groups), tops, lefts)):
        pass
    columns_out = to_columns.swapaxes(-1, -2)
    return to_rows.reshape(*lead, groups, p, k), columns_out.reshape(*lead, groups, k, o)


def _cuts(size: int, parts: int) -> list[slice]:
    """`size` things in at most `parts` runs of nearly one length."""
    parts = min(size, parts)
    return [slice(size * i // parts, size * (i + 1) // parts) for i in range(parts)]


def _product(
    rule: str, theta: float, rows: np.ndarray, columns: np.ndarray, back: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`rows` [S, P, K], `columns` [K, O], `back` [S, P, O] -> int32 [S, P, K] and [S, O, K]."""
    s, p, k = rows.shape
    o = columns.shape[1]
    weights = np.ascontiguousarray(columns.T)
    to_rows, to_columns = np.zeros((s, p, k), np.int32), np.zeros((s, o, k), np.int32)
    # An edge's sign is the product of its factors' signs. "largest" counts every edge as +1.
    signs = [np.sign(a).astype(np.int8) for a in (rows, weights, back)]
    if rule == "largest":
        signs = [np.abs(a) for a in signs]
    sign_rows, sign_weights, sign_back = signs
    wide = max(1, min(o, _MOST, _TILE // k))
    tall = max(1, min(p, _MOST, _TILE // (k * wide)))
    deep = max(1, min(s, _TILE // (k * wide * tall)))
    for first, top, left in itertools.product(
        range(0, s, deep), range(0, p, tall), range(0, o, wide)
    ):
        at = slice(first, first + deep), slice(top, top + tall), slice(left, left + wide)
        block = sign_back[at]
        sample, row, column = places = np.nonzero(block)
        if not len(sample):
            continue
        row_at = sample + first, row + top
        terms = rows[row_at]
        terms *= weights[column + left]
        edge = _stay(terms, rule, theta).view(np.int8)
        edge *= sign_rows[row_at]
        edge *= sign_weights[column + left]
        edge *= block[places][:, None]
        if len(sample) < block.size:
            tile = np.zeros((block.size, k), np.int8)
            tile[np.ravel_multi_index(places, block.shape)] = edge
            edge = tile
        tile = edge.reshape(*block.shape, k)
        to_rows[at[0], at[1]] += tile.sum(2, dtype=np.int8)
        to_columns[at[0], at[2]] += tile.sum(1, dtype=np.int8)
    return to_rows, to_columns


def kept(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """Which terms stay: `[R, K]` float32 to bool, one sum a row."""
    return _stay(terms, rule, theta) & (terms != 0)


def _stay(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """`kept`, but for terms of 0."""
    keys = _keys(terms, rule)
    tau = _tau(keys, terms, rule, theta)
    if rule == "signed":
        keys >>= 1
    return keys >= tau[:, None]


def _keys(terms: np.ndarray, rule: str) -> np.ndarray:
    """What terms are ordered by, and can be read back from."""
    if rule == "signed":
        # Magnitude above, sign in the lowest bit: one key sorts by |t| and gives t back.
        bits = terms.view(np.uint32)
        keys = bits << 1
        keys |= bits >> 31
        return keys
    return np.abs(terms) if rule == "mass" else terms


def _tau(keys: np.ndarray, terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """The threshold of each row: a magnitude's bits under "signed", else a float."""
    if keys.shape[1] < _MANY:
        return _tau_of_all(keys, rule, theta)
    # Sorting a part of the terms mostly finds tau; rows where it does not are sorted in full.
    find = {"signed": _tau_from_top, "mass": _tau_in_bracket, "largest": _tau_from_top}[rule]
    tau, found = find(keys, terms, theta)
    again = np.flatnonzero(~found)
    if len(again):
        tau[again] = _tau_of_all(keys[again], rule, theta)
    return tau


def _tau_of_all(keys: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """The threshold, from all terms in order."""
    ordered = np.sort(keys, axis=-1)
    ordered, terms = _read(ordered, rule)
    through = np.cumsum(terms, axis=-1, dtype=np.float64)
    total = through[:, -1].copy()
    through -= terms
    tau, found = _last_fit(ordered, _fits(through, total, rule, theta))
    none = ~found
    if rule == "largest":
        tau[none] = np.where(ordered[none] == 0, -np.inf, ordered[none]).max(-1)
    else:
        tau[none] = 0
    return tau


def _tau_from_top(
    keys: np.ndarray, terms: np.ndarray, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The threshold, where it lies among the largest quarter of the terms."""
    rule = "signed" if keys.dtype == np.uint32 else "largest"
    rank = keys.shape[1] - keys.shape[1] // 4
    top = np.sort(np.partition(keys, rank, axis=-1)[:, rank:], axis=-1)
    ordered, terms_of_top = _read(top, rule)
    total = terms.sum(-1, dtype=np.float64)
    through = np.cumsum(terms_of_top, axis=-1, dtype=np.float64)
    through += (total - through[:, -1])[:, None]
    through -= terms_of_top
    fits = _fits(through, total, rule, theta)
    # The first may have equals among the rest.
    fits[:, 0] = False
    return _last_fit(ordered, fits)


def _tau_in_bracket(
    keys: np.ndarray, terms: np.ndarray, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """The threshold, where a sample of each row brackets it: mass only grows along the order."""
    rows, count = keys.shape
    wanted = _share(keys.sum(-1), theta)
    sample = np.sort(keys[:, :: count // 128], axis=-1)
    mass = np.cumsum(sample, axis=-1, dtype=np.float64)
    low, high = (_at_share(sample, mass, theta + slack) for slack in (-_BRACKET, _BRACKET))
    under = keys < low[:, None]
    below = (keys * under).sum(-1).astype(np.float64)
    inside = keys < high[:, None]
    beyond = np.count_nonzero(inside, axis=1) < count
    inside &= ~under
    held = np.count_nonzero(inside, axis=1)
    wide = max(int(held.max()), 1)
    start = np.arange(rows) * wide - (np.cumsum(held) - held)
    at = np.flatnonzero(inside)
    ordered = np.full(rows * wide, np.inf, np.float32)
    ordered[np.arange(len(at)) + np.repeat(start, held)] = keys.reshape(-1)[at]
    ordered = np.sort(ordered.reshape(rows, wide), axis=-1)
    part = np.where(np.isinf(ordered), 0, ordered)
    through = np.cumsum(part, axis=-1, dtype=np.float64)
    through += below[:, None]
    after = through[:, -1].copy()
    through -= part
    fits = through < wanted[:, None]
    fits[np.isinf(ordered)] = False
    tau, found = _last_fit(ordered, fits)
    return tau, found & ((after >= wanted) | ~beyond)


def _at_share(sample: np.ndarray, mass: np.ndarray, share: float) -> np.ndarray:
    """The sample's element before which `share` of its mass lies; infinity past its end."""
    rank = np.count_nonzero(mass < share * mass[:, -1:], axis=1)
    ends = np.minimum(rank, sample.shape[1] - 1)
    found = sample[np.arange(len(sample)), ends]
    return np.where(rank < sample.shape[1], found, np.inf).astype(np.float32)


def _read(ordered: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """What sorted keys are ordered by, and their terms."""
    if rule != "signed":
        return ordered, ordered
    return ordered >> 1, ((ordered >> 1) | (ordered << 31)).view(np.float32)


def _fits(below: np.ndarray, total: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """Where a rule's condition holds, `below` being the sum of the terms before each."""
    if rule == "largest":
        fits = total[:, None] - below >= _share(total, theta)[:, None]
        fits &= total[:, None] > 0
        return fits
    return np.abs(below, out=below) < _share(np.abs(total), theta)[:, None]


def _share(total: np.ndarray, theta: float) -> np.ndarray:
    """Theta times the total, rounded to float32 as on the device: ties fall to one side."""
    return (np.float32(theta) * total.astype(np.float32)).astype(np.float64)


def _last_fit(ordered: np.ndarray, fits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The last of each sorted row that fits, and whether any does.

    Equal ones go together: only the first of them counts.
    """
    fits[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    last = ordered.shape[1] - 1 - np.argmax(fits[:, ::-1], axis=-1)
    row = np.arange(len(ordered))
    return ordered[row, last], fits[row, last]
