"""Masks: which entries of the parameters stay, as a pytree of booleans, None where all do.

Scores and masks have the structure of the parameters, with None in place of what is not to be
pruned. "The top p %" of n entries are ceil(p * n) of them, at least one.
"""

import math
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
      scope: "layer": that share of every leaf; "global": of all leaves together.

    Returns:
      Masks, bool, True where the entry stays; None where the scores are None.

    Raises:
      ValueError: For a share or scope that is not accepted, no scores, or one that is no number.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope must be layer or global, not {scope!r}")
    share = _share(keep)
    leaves, structure = jax.tree.flatten(scores)
    leaves = [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]
    for leaf in leaves:
        if not any(jnp.issubdtype(leaf.dtype, kind) for kind in _NUMBERS):
            raise ValueError(f"scores must be integers or floats, not {leaf.dtype}")
    if not leaves or not all(jnp.size(leaf) for leaf in leaves):
        raise ValueError("scores must hold at least one array, and no empty ones")
    for leaf in leaves:
        if not isinstance(leaf, jax.core.Tracer) and (leaf != leaf).any():
            raise ValueError("scores must be numbers; some are NaN")
    if scope == "layer":
        found = [_largest(leaf, share) for leaf in leaves]
    else:
        together = _largest(jnp.concatenate([jnp.ravel(leaf) for leaf in leaves]), share)
        ends = [sum(leaf.size for leaf in leaves[: i + 1]) for i in range(len(leaves) - 1)]
        parts = jnp.split(together, ends)
        found = [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


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

    return jax.tree_util.tree_map_with_path(one, masks, params, is_leaf=lambda mask: mask is None)


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


def _largest(scores: jax.Array, share: Fraction) -> jax.Array:
    flat = jnp.ravel(scores)
    order = jnp.argsort(flat, stable=True, descending=True)
    number = math.ceil(share * flat.size)
    return jnp.zeros(flat.size, bool).at[order[:number]].set(True).reshape(jnp.shape(scores))
