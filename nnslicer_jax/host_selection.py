"""`selection.kept` for products with many terms, on NumPy's vectorised sort.

XLA's CPU sort manages a few million terms a second, NumPy's hundreds of millions. A callback
takes rows, columns and the outputs' signs, and returns the signed edges already summed for
every row entry and every weight, so that no array of all terms ever exists: terms are formed,
ordered and summed in tiles that stay in cache, on one thread per core.
"""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from nnslicer_jax.selection import Selection

# Terms in a tile: a few arrays of this many 4-byte numbers fit a core's second-level cache.
_TILE = 1 << 16
# Signed edges are summed over a tile in int8.
_MOST = 127


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


def threads() -> int:
    """Threads that select at once: one a core."""
    return os.cpu_count() or 1


@functools.cache
def _workers() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(threads())


def _edges(rule: str, *operands: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    rows, columns, back, theta = (np.asarray(a) for a in operands)
    limit = float(theta.reshape(-1)[0])
    lead = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2], back.shape[:-2])
    count = int(np.prod(lead))
    rows, columns, back = (
        np.broadcast_to(a, (*lead, *a.shape[-2:])) for a in (rows, columns, back)
    )
    (p, k), o = rows.shape[-2:], columns.shape[-1]
    to_rows = np.zeros((count, p, k), np.int32)
    to_columns = np.zeros((count, o, k), np.int32)
    parts = min(o, max(1, threads() // count))
    limits = [o * i // parts for i in range(parts + 1)]
    partial = np.zeros((parts - 1, count, p, k), np.int32)

    def work(task: tuple[int, int]) -> None:
        i, part = task
        at = np.unravel_index(i, lead)
        some = slice(limits[part], limits[part + 1])
        _product(
            rule, limit, np.ascontiguousarray(rows[at]), columns[at][:, some], back[at][:, some],
            to_rows[i] if part == 0 else partial[part - 1, i], to_columns[i, some],
        )  # fmt: skip

    tasks = [(i, part) for i in range(count) for part in range(parts)]
    for _ in _workers().map(work, tasks):
        pass
    to_rows += partial.sum(0, dtype=np.int32)
    columns_out = to_columns.swapaxes(-1, -2)
    return to_rows.reshape(*lead, p, k), columns_out.reshape(*lead, k, o)


def _product(
    rule: str, theta: float, rows: np.ndarray, columns: np.ndarray, back: np.ndarray,
    to_rows: np.ndarray, to_columns: np.ndarray,
) -> None:  # fmt: skip
    """One product: `rows` [P, K], `columns` [K, O], `back` [P, O]; adds to the last two."""
    p, k = rows.shape
    o = columns.shape[1]
    weights = np.ascontiguousarray(columns.T)
    signs = back.astype(np.int8)
    wide = max(1, min(o, _MOST, _TILE // k))
    tall = max(1, min(p, _MOST, _TILE // (k * wide)))
    for top in range(0, p, tall):
        for left in range(0, o, wide):
            block = signs[top : top + tall, left : left + wide]
            at_row, at_column = np.nonzero(block)
            if not len(at_row):
                continue
            terms = rows[top + at_row] * weights[left + at_column]
            stay = kept(terms, rule, theta)
            edge = np.signbit(terms).view(np.int8)
            np.multiply(edge, -2, out=edge)
            edge += 1
            edge *= stay.view(np.int8)
            edge *= block[at_row, at_column][:, None]
            tile = edge
            if len(at_row) < block.size:
                tile = np.zeros((block.size, k), np.int8)
                tile[at_row * block.shape[1] + at_column] = edge
            tile = tile.reshape(*block.shape, k)
            to_rows[top : top + tall] += tile.sum(1, dtype=np.int8)
            to_columns[left : left + wide] += tile.sum(0, dtype=np.int8)


def kept(terms: np.ndarray, rule: str, theta: float) -> np.ndarray:
    """Which terms stay: `[R, K]` float32 to bool, one sum a row."""
    keys = _keys(terms, rule)
    tau = _tau(keys, rule, theta)
    if rule == "signed":
        return ((keys >> 1) >= tau[:, None]) & (terms != 0)
    return (keys >= tau[:, None]) & (terms != 0)


def _keys(terms: np.ndarray, rule: str) -> np.ndarray:
    if rule == "signed":
        # Magnitude above, sign in the lowest bit: one key sorts by |t| and gives t back.
        bits = terms.view(np.uint32)
        keys = bits << 1
        keys |= bits >> 31
        return keys
    return np.abs(terms) if rule == "mass" else terms


def _tau(keys: np.ndarray, rule: str, theta: float) -> np.ndarray:
    ordered = np.sort(keys, axis=-1)
    if rule == "signed":
        terms = ((ordered >> 1) | (ordered << 31)).view(np.float32)
        ordered >>= 1
    else:
        terms = ordered
    below = np.cumsum(terms, axis=-1, dtype=np.float64)
    total = below[:, -1].copy()
    below -= terms
    if rule == "largest":
        fits = total[:, None] - below >= (theta * total)[:, None]
        fits &= total[:, None] > 0
    else:
        np.abs(below, out=below)
        fits = below < (theta * np.abs(total))[:, None]
    fits[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    last = keys.shape[1] - 1 - np.argmax(fits[:, ::-1], axis=-1)
    row = np.arange(len(keys))
    tau = ordered[row, last]
    none = ~fits[row, last]
    if rule == "largest":
        tau[none] = ordered[none, -1]
    elif rule == "signed":
        tau[none] = 0
    else:
        tau[none] = -1
    return tau
