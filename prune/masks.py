"""Masks: which entries of the parameters stay, as a pytree of booleans, None where all do.

Scores and masks have the structure of the parameters, with None in place of what is not to be
pruned. "The top p %" of n entries are ceil(p * n) of them, at least one: a layer too small for the
share keeps one. A global share leaves every layer its best entry before it takes the best of all:
methods that rank all weights together empty whole layers where little is kept, and nothing passes
an empty layer. Equal scores are settled by position, the earlier one (in C order, then in the
order of the leaves) being kept.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCOPES = ("layer", "global")
_NUMBERS = (np.bool_, np.integer, np.floating)


def topk(scores: Any, keep: float | Fraction, scope: str = "layer") -> Any:
    """Keeps the entries with the largest scores, exactly as many as asked.

    Pure JAX: `jax.jit(topk, static_argnums=(1, 2))` works. Equal scores are settled by position,
    the earlier one (in C order, then in the order of the leaves) being kept.

    Args:
      scores: Pytree of arrays of integers or floats; None: not to be pruned.
      keep: Share of the entries to keep, above 0 and at most 1; a float is read as the decimal
        that it prints as, so 0.1 of 30 are 3.
      scope: "layer": that share of every leaf; "global": of all leaves together, at least one of
        each.

    Returns:
      Masks, bool, True where the entry stays; None where the scores are None.

    Raises:
      ValueError: For a share or scope that is not accepted, no scores, or one that is no number.
    """
    scores = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else np.asarray(leaf), scores)
    for leaf in jax.tree.leaves(scores):
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in _NUMBERS):
            raise ValueError(f"scores must be integers or floats, not {leaf.dtype}")
        if not isinstance(leaf, jax.core.Tracer) and (leaf != leaf).any():
            raise ValueError("scores must be numbers; some are NaN")
    return largest(scores, counts(scores, keep, scope))


def counts(scores: Any, keep: Any, scope: str = "layer") -> Any:
    """How many entries are kept.

    Args:
      scores: As for `topk`; only their shapes matter.
      keep: As for `topk`; or the numbers themselves, a pytree of whole numbers like the scores.
      scope: As for `topk`.

    Returns:
      For "layer" a pytree of int like the scores, for "global" one int.

    Raises:
      ValueError: For a share, numbers or a scope that are not accepted, or no scores.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be layer or global, not {scope!r}")
    leaves, structure = jax.tree.flatten(scores)
    sizes = [math.prod(np.shape(leaf)) for leaf in leaves]
    if not sizes or not all(sizes):
        raise ValueError("scores must hold at least one array, and no empty ones")
    numbers: Any
    given: Any
    numbers, given = jax.tree.flatten(keep)
    if not jax.tree_util.treedef_is_leaf(given):
        if given != structure:
            raise ValueError("keep must be a share, or numbers structured as the scores are")
        for number, size in zip(numbers, sizes, strict=True):
            if not isinstance(number, int | np.integer) or not 1 <= number <= size:
                raise ValueError(f"keep must be whole numbers, 1 to {size} here, not {number!r}")
        return jax.tree.unflatten(structure, map(int, numbers))
    share = _share(keep)
    if scope == "global":
        return max(math.ceil(share * sum(sizes)), len(sizes))
    return jax.tree.unflatten(structure, [math.ceil(share * size) for size in sizes])


def largest(scores: Any, counts: Any) -> Any:
    """Keeps as many entries as counted, those with the largest scores.

    Pure JAX, the counts may be traced.

    Args:
      scores: As for `topk`.
      counts: Whole numbers of at least 0: a pytree like the scores, of numbers `[]`, one for every
        leaf, or one number for all of them together, of which each gets one first.

    Returns:
      Masks, as `topk`.
    """
    structure: Any
    each: Any
    leaves, structure = jax.tree.flatten(scores)
    numbers, each = jax.tree.flatten(counts)
    if each == structure:
        found = [_largest(leaf, n) for leaf, n in zip(leaves, numbers, strict=True)]
    else:
        (number,) = numbers
        together = jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])
        ends = np.cumsum([leaf.size for leaf in leaves])
        starts = [0, *map(int, ends[:-1])]
        best = jnp.stack([
            start + together[start:end].argmax() for start, end in zip(starts, ends, strict=True)
        ])  # fmt: skip
        parts = jnp.split(_largest(together, number, best), ends[:-1])
        found = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


def straight_through(scores: Any, masks: Any) -> Any:
    """Masks as numbers, of which the scores get the gradient as it is.

    Args:
      scores: Pytree of float arrays, None: not to be pruned.
      masks: Bool, like the scores.

    Returns:
      1.0 where the mask is True, else 0.0; the gradient of each number is its score's.
    """
    return jax.tree.map(_straight_through, scores, masks)


@jax.custom_vjp
def _straight_through(scores: jax.Array, mask: jax.Array) -> jax.Array:
    return mask.astype(scores.dtype)


def _forth(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
    return mask.astype(scores.dtype), None


def _back(_: None, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient, None


_straight_through.defvjp(_forth, _back)


def is_none(tree: Any) -> bool:
    """Whether a tree is the None of a leaf that is never pruned: `is_leaf` of `jax.tree.map`."""
    return tree is None


def over(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """The function leaf by leaf, None where the first tree has None."""
    return jax.tree.map(
        lambda leaf, *rest: None if leaf is None else function(leaf, *rest),
        first, *others, is_leaf=is_none,
    )  # fmt: skip


def apply_masks(params: Any, masks: Any) -> Any:
    """The parameters with 0 where the mask is False; leaves whose mask is None stay as they are.

    Raises:
      ValueError: For a mask that is not bool.
    """

    def one(path: Any, mask: Any, leaf: Any) -> Any:
        if mask is None:
            return leaf
        check_mask(path, mask)
        return jnp.where(mask, leaf, 0)

    return jax.tree_util.tree_map_with_path(one, masks, params, is_leaf=is_none)


def check_mask(path: Any, mask: Any) -> None:
    """Raises ValueError unless the mask at that place of a pytree is bool."""
    if jnp.result_type(mask) != jnp.bool_:
        where = jax.tree_util.keystr(path)
        raise ValueError(
            f"masks must be bool, not {jnp.result_type(mask)}{where and f' at {where}'}"
        )


def kept(masks: Any) -> tuple[int, int]:
    """Entries that stay, and all entries that have a mask."""
    leaves = jax.tree.leaves(masks)
    return sum(int(leaf.sum()) for leaf in leaves), sum(leaf.size for leaf in leaves)


def _share(keep: float | Fraction) -> Fraction:
    try:
        share = Fraction(str(keep))
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share <= 1:
        raise ValueError(f"keep must be above 0 and at most 1, not {keep}")
    return share


@jax.jit
def _largest(scores: jax.Array, count: Any, first: jax.Array | None = None) -> jax.Array:
    """The count largest of all scores, those at the places `first` [L] before any other.

    The least score kept is found bit by bit, by counting what is at least as large: 32 passes,
    where XLA's sort on a CPU takes many times as long.
    """
    ranks = _ranks(jnp.ravel(scores))
    if first is not None:
        top = jnp.iinfo(ranks.dtype).max
        ranks = jnp.minimum(ranks, jnp.asarray(top - 1, ranks.dtype)).at[first].set(top)
    bits = ranks.dtype.itemsize * 8
    count = jnp.asarray(count, jnp.int32)

    def settle(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (jnp.ones((), ranks.dtype) << (bits - 1 - i).astype(ranks.dtype))
        return jnp.where((ranks >= more).sum(dtype=jnp.int32) >= count, more, least)

    least = jax.lax.fori_loop(0, bits, settle, jnp.zeros((), ranks.dtype))
    above, equal = ranks > least, ranks == least
    left = count - above.sum(dtype=jnp.int32)
    chosen = above | (equal & (jnp.cumsum(equal, dtype=jnp.int32) <= left))
    return chosen.reshape(jnp.shape(scores))


def _ranks(flat: jax.Array) -> jax.Array:
    """Unsigned integers in the same order; numbers that are equal, as 0 and -0, stay equal."""
    wide = flat.dtype.itemsize == 8
    unsigned = jnp.uint64 if wide else jnp.uint32
    sign = jnp.asarray(1 << (63 if wide else 31), unsigned)
    if not jnp.issubdtype(flat.dtype, jnp.floating):
        if jnp.issubdtype(flat.dtype, jnp.unsignedinteger) or flat.dtype == bool:
            return flat.astype(unsigned)
        return flat.astype(jnp.int64 if wide else jnp.int32).view(unsigned) ^ sign
    bits = jnp.where(flat == 0, 0, flat).astype(jnp.float64 if wide else jnp.float32).view(unsigned)
    # The bits of a number below 0 fall as it rises.
    return jnp.where(bits & sign, ~bits, bits | sign)
