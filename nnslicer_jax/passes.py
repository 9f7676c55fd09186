"""Edges of a weighted sum whose threshold is found bit by bit, no term being stored or sorted.

Under the rules "mass" and "largest" of `selection` what is kept only grows as tau falls, so tau, a
float32, is found in 31 passes over all terms, one for each bit below the sign. A pass forms every
term anew from rows and columns, in registers, which costs less than to move or to sort them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nnslicer_jax.selection import Selection

_BITS = 31
# Steps of a loop that XLA compiles into one on a CPU. All passes, two cores, jax 0.10.2: 1.6 to
# 2.2 ns a term with 16, 7 to 10 with 8, 2 to 3 with 32, and 45 as a reduction.
_UNROLL = 16
# Fewer outputs than this do not fill a vector.
_LANES = 16


def edges(
    rows: jax.Array, columns: jax.Array, back: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array]:
    """Signed edges of a weighted sum, summed for each row entry and for each weight.

    Args:
      rows: `[G, P, K]` float32.
      columns: `[G, K, O]` float32; the terms of output (g, p, o) are rows times columns.
      back: `[G, P, O]` float32 in {-1, 0, 1}, multiplied into each edge's sign.
      selection: The rule, "mass" or "largest", and its theta. Under "largest" every edge counts
        as +1.

    Returns:
      `[G, P, K]` and `[G, K, O]`, float32 integers.
    """
    if back.shape[2] < min(_LANES, back.shape[1]):
        # The last axis is the one that is vectorised.
        rows, columns, back = (a.swapaxes(1, 2) for a in (columns, rows, back))
        to_columns, to_rows = edges(rows, columns, back, selection)
        return to_rows.swapaxes(1, 2), to_columns.swapaxes(1, 2)

    # Formed anew in each pass, a term must come out the same in all.
    rows, columns = lax.optimization_barrier((rows, columns))
    signs = jnp.sign(rows), jnp.sign(columns)
    if selection.rule == "mass":
        rows, columns = jnp.abs(rows), jnp.abs(columns)
    else:
        signs = jnp.abs(signs[0]), jnp.abs(signs[1])
    tau = _threshold(rows, columns, selection)
    by_output = [jnp.moveaxis(a, 2, 0) for a in (columns, signs[1], tau, back)]
    to_rows = _total(
        lambda w, sign, t, b: jnp.where(
            rows * w[:, None] >= t[..., None], b[..., None] * sign[:, None], 0
        ),
        *by_output,
    )
    by_position = [jnp.moveaxis(a, 1, 0) for a in (rows, signs[0], tau, back)]
    to_columns = _total(
        lambda x, sign, t, b: jnp.where(
            x[..., None] * columns >= t[:, None], b[:, None] * sign[..., None], 0
        ),
        *by_position,
    )
    return to_rows * signs[0], to_columns * signs[1]


def _threshold(rows: jax.Array, columns: jax.Array, selection: Selection) -> jax.Array:
    """Tau of each sum, `[G, P, O]`; of magnitudes under "mass"."""
    terms = jnp.moveaxis(rows, 2, 0)[..., None], jnp.moveaxis(columns, 1, 0)[:, :, None]

    def bit(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The first pass is over all terms.
        bits, whole = state
        tried = bits | (1 << (_BITS - i))
        v = lax.bitcast_convert_type(tried, jnp.float32)
        if selection.rule == "mass":
            v = jnp.where(i == 0, jnp.inf, v)
            found = _total(lambda x, w: jnp.where(x * w < v, x * w, 0), *terms)
            whole = jnp.where(i == 0, found, whole)
            fits = found < selection.theta * whole
        else:
            v = jnp.where(i == 0, -jnp.inf, v)
            found = _total(lambda x, w: jnp.where(x * w >= v, x * w, 0), *terms)
            whole = jnp.where(i == 0, found, whole)
            # Some term stays, also at theta 0.
            fits = (found > 0) & (found >= selection.theta * whole)
        return jnp.where((i > 0) & fits, tried, bits), whole

    shape = jax.eval_shape(jnp.matmul, rows, columns).shape
    state = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
    bits, whole = lax.fori_loop(0, _BITS + 1, bit, state)
    tau = lax.bitcast_convert_type(bits, jnp.float32)
    if selection.rule == "mass":
        return tau
    alone = _reduced(lax.max, -jnp.inf, lambda x, w: jnp.where(x * w == 0, -jnp.inf, x * w), *terms)
    return jnp.where(whole > 0, tau, alone)


def _total(each: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    return _reduced(lax.add, 0.0, each, *operands)


def _reduced(
    op: Any, start: float, each: Callable[..., jax.Array], *operands: jax.Array
) -> jax.Array:
    """`each` of every slice along the operands' first axis, reduced by `op`."""
    if not _loops():
        return lax.reduce(jax.vmap(each)(*operands), jnp.float32(start), op, (0,))
    one = jax.eval_shape(each, *(a[0] for a in operands))
    found, _ = lax.scan(
        lambda so_far, at: (op(so_far, each(*at)), None),
        jnp.full(one.shape, start, jnp.float32), operands, unroll=_UNROLL,
    )  # fmt: skip
    return found


def _loops() -> bool:
    """A CPU vectorises a loop whose body works element by element; a GPU wants a reduction."""
    return jax.default_backend() == "cpu"
